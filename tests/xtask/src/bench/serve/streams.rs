//! Eight answers at once.

use std::sync::Barrier;
use std::time::Instant;

use serde_json::json;

use super::Args;
use super::ask::{Answer, Asked, Dialect, words};
use crate::bench::median;

/// Answers at once, words of each's prompt, and tokens of each.
const ANSWERS: usize = 8;
const WORDS: usize = 64;
const TOKENS: usize = 48;
/// Sequences that the servers run.
const SLOTS: [usize; 2] = [4, 8];
/// Tokens of context of each.
const CONTEXT: usize = 512;

/// One round.
struct Round {
    /// Tokens a second of one answer by itself, its prompt included.
    alone: f64,
    /// Tokens a second of all.
    together: f64,
    /// The median time to a first token.
    first: f64,
    /// Answers with the text that they have alone; of ours only.
    same: Option<usize>,
}

/// Measures each engine on each number of sequences.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    for slots in SLOTS {
        for engine in args.engines() {
            let server = args.server(&engine, slots, CONTEXT)?;
            let rounds: Vec<Round> = (0..args.reps)
                .map(|i| round(&server.asked, u64::from(i)))
                .collect::<Result<_, _>>()?;
            let of = |figure: fn(&Round) -> f64| median(rounds.iter().map(figure).collect());
            let (alone, together) = (of(|round| round.alone), of(|round| round.together));
            let first = of(|round| round.first);
            let n = ANSWERS * rounds.len();
            let same: Option<usize> = rounds.iter().map(|round| round.same).sum();
            let texts =
                same.map_or_else(String::new, |same| format!(", {same} of {n} texts as alone"));
            let name = engine.name();
            args.say(
                &format!(
                    "streams  {name:<10} {ANSWERS} on {slots}: {together:6.1} tokens/s in all \
                     ({alone:5.1} alone), first token {first:5.2} s{texts}"
                ),
                &json!({
                    "part": "streams", "engine": name, "slots": slots,
                    "tokens_per_s": together, "alone_tokens_per_s": alone,
                    "first_token_s": first, "same_texts": same, "texts": n,
                }),
            );
        }
    }
    Ok(())
}

fn round(asked: &Asked, round: u64) -> Result<Round, String> {
    let prompt = |i: usize| words(WORDS, 1000 * round + i as u64);
    let alone = asked.ask(&prompt(ANSWERS), TOKENS)?;
    let prompts: Vec<String> = (0..ANSWERS).map(prompt).collect();
    let (answers, seconds) = together(asked, &prompts)?;
    let n_tokens: usize = answers.iter().map(|answer| answer.n_tokens).sum();
    let mut same = (asked.dialect == Dialect::Ollama).then_some(0);
    for (prompt, answer) in prompts.iter().zip(&answers) {
        if let Some(same) = &mut same {
            *same += usize::from(asked.ask(prompt, TOKENS)?.text == answer.text);
        }
    }
    Ok(Round {
        alone: alone.n_tokens as f64 / alone.seconds,
        together: n_tokens as f64 / seconds,
        first: median(answers.iter().map(Answer::first).collect()),
        same,
    })
}

/// Asks all prompts at once; the answers, and the time until the last had ended.
fn together<'a>(asked: &'a Asked, prompts: &'a [String]) -> Result<(Vec<Answer>, f64), String> {
    let barrier = Barrier::new(prompts.len() + 1);
    std::thread::scope(|scope| {
        let one = |prompt: &'a String| {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                asked.ask(prompt, TOKENS)
            })
        };
        let threads: Vec<_> = prompts.iter().map(one).collect();
        barrier.wait();
        let begin = Instant::now();
        let joined = threads.into_iter().map(|thread| thread.join().map_err(|_| "a panic")?);
        let answers = joined.collect::<Result<Vec<_>, String>>()?;
        Ok((answers, begin.elapsed().as_secs_f64()))
    })
}
