//! Short prompts and a running answer while a long prompt is read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::Args;
use super::ask::{Answer, Asked, words};
use super::server::Engine;
use crate::bench::median;

/// Sequences of the server.
const SLOTS: usize = 4;
/// Tokens of context beyond the long prompt's.
const MORE: usize = 4096;
/// Tokens of the answer whose pace is measured by itself.
const IDLE_TOKENS: usize = 192;
/// Words of a short prompt, and tokens of its answer.
const SHORT: (usize, usize) = (16, 1);
/// How long the long prompt is read before the first short one.
const LEAD: Duration = Duration::from_millis(300);

/// What was seen while the long prompt was read.
struct Seen {
    /// Times to the first token of short prompts.
    firsts: Vec<f64>,
    /// Times between pieces of the running answer.
    gaps: Vec<f64>,
    /// The time to the long prompt's first token, and its tokens.
    long: (f64, usize),
}

/// Measures each engine.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    for engine in args.engines() {
        let server = args.server(&engine, SLOTS, args.long + MORE)?;
        let asked = &server.asked;
        let idle = gaps(&asked.ask(&words(64, 70), IDLE_TOKENS)?.pieces);
        let alone = asked.ask(&words(SHORT.0, 71), SHORT.1)?.first();
        let seen = beside(asked, args.long)?;
        say(args, &engine, (&idle, alone), &seen);
    }
    Ok(())
}

fn say(args: &Args, engine: &Engine, (idle, alone): (&[f64], f64), seen: &Seen) {
    let (idle_p99, p99) = (percentile(idle, 99), percentile(&seen.gaps, 99));
    let (first, worst) = (median(seen.firsts.clone()), percentile(&seen.firsts, 100));
    let (n_short, (long, n_long)) = (seen.firsts.len(), seen.long);
    let name = engine.name();
    args.say(
        &format!(
            "stall    {name:<10} while {n_long} tokens are read ({long:.1} s): first token \
             {:.0} ms ({:.0} at most, {:.0} alone; {n_short} prompts), between tokens p99 {:.0} ms \
             ({:.0} idle, {:.1}x)",
            1e3 * first,
            1e3 * worst,
            1e3 * alone,
            1e3 * p99,
            1e3 * idle_p99,
            p99 / idle_p99,
        ),
        &json!({
            "part": "stall", "engine": name, "long_tokens": n_long, "long_s": long,
            "first_token_s": first, "worst_first_token_s": worst, "alone_first_token_s": alone,
            "short_prompts": n_short, "between_p99_s": p99, "idle_between_p99_s": idle_p99,
        }),
    );
}

/// A running answer and short prompts beside a long one.
fn beside(asked: &Asked, long: usize) -> Result<Seen, String> {
    let prompt = asked.prompt_of(long, 80)?;
    let is_read = AtomicBool::new(false);
    let zero = Instant::now();
    std::thread::scope(|scope| {
        let (is_read, prompt) = (&is_read, &prompt);
        let runs = scope.spawn(move || {
            let begin = zero.elapsed().as_secs_f64();
            let goes_on = |_: &Answer| !is_read.load(Ordering::Relaxed);
            asked.ask_while(&words(64, 81), MORE / 2, goes_on).map(|answer| (begin, answer))
        });
        std::thread::park_timeout(2 * LEAD);
        let reads = scope.spawn(move || {
            let begin = zero.elapsed().as_secs_f64();
            let answer = asked.ask(prompt, 1);
            is_read.store(true, Ordering::Relaxed);
            answer.map(|answer| (begin, answer))
        });
        std::thread::park_timeout(LEAD);
        let mut firsts = Vec::new();
        while !is_read.load(Ordering::Relaxed) {
            let answer = asked.ask(&words(SHORT.0, 90 + firsts.len() as u64), SHORT.1)?;
            if !is_read.load(Ordering::Relaxed) {
                firsts.push(answer.first());
            }
        }
        let (long_begin, read) = reads.join().map_err(|_| "a panic")??;
        let (begin, ran) = runs.join().map_err(|_| "a panic")??;
        let end = long_begin + read.first();
        let during =
            ran.pieces.iter().map(|at| begin + at).filter(|at| (long_begin..end).contains(at));
        let gaps = gaps(&during.collect::<Vec<_>>());
        Ok(Seen { firsts, gaps, long: (read.first(), read.n_prompt) })
    })
}

/// Times between pieces.
fn gaps(pieces: &[f64]) -> Vec<f64> {
    pieces.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// The value that so many of a hundred do not exceed.
fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        let found = [50, 99, 100].map(|percent| percentile(&values, percent).to_string());
        assert_eq!(found, ["100", "198", "200"]);
        assert_eq!(percentile(&[7.0], 99).to_string(), "7");
        assert!(percentile(&[], 99).is_nan());
    }
}
