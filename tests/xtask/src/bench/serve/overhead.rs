//! One answer through the daemon, and the same arithmetic by the engine in a process of its own.

use std::process::Command;

use serde_json::{Value, json};

use super::Args;
use super::ask::{Answer, Asked, words};
use super::server::Engine;
use crate::bench::median;

/// Words of a prompt, and tokens of its answer.
const WORDS: usize = 64;
const TOKENS: usize = 128;
/// Tokens of context.
const CONTEXT: usize = 1024;

/// Measures ours.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    let server = args.server(&Engine::V4, 1, CONTEXT)?;
    let fresh = Asked { is_fresh: true, ..server.asked.clone() };
    let n_prompt = fresh.ask(&words(WORDS, 40), 1)?.n_prompt;
    let (mut rates, mut firsts, mut engine) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..u64::from(args.reps) {
        rates.push(fresh.ask(&words(WORDS, 2 * i + 41), TOKENS)?.rate());
        firsts.push(server.asked.ask(&words(WORDS, 2 * i + 42), 1)?);
        engine.push(alone(args, n_prompt)?);
    }
    let of = |figure: fn(&Answer) -> f64| median(firsts.iter().map(figure).collect());
    let (first, rate) = (of(Answer::first), median(rates));
    let beyond = of(|answer| answer.first() - answer.read);
    let [engine_first, engine_rate] =
        [0, 1].map(|i| median(engine.iter().map(|figures| figures[i]).collect()));
    args.say(
        &format!(
            "overhead v4         one answer: {rate:.1} tokens/s through the daemon, \
             {engine_rate:.1} by the engine ({:+.1} %); first token after {n_prompt} tokens \
             {:.1} ms, {:.2} of it outside the engine; {:.1} by the engine alone",
            100.0 * (rate / engine_rate - 1.0),
            1e3 * first,
            1e3 * beyond,
            1e3 * engine_first,
        ),
        &json!({
            "part": "overhead", "engine": "v4", "tokens_per_s": rate,
            "engine_tokens_per_s": engine_rate, "first_token_s": first,
            "first_token_outside_s": beyond, "engine_first_token_s": engine_first,
            "prompt_tokens": n_prompt,
        }),
    );
    Ok(())
}

/// The time of the prompt's step and the rate of the steps after it.
fn alone(args: &Args, n_prompt: usize) -> Result<[f64; 2], String> {
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    let out = Command::new(this)
        .arg("bench")
        .arg(&args.files[0])
        .args(["--json", "--reps", "1", "--threads", &args.threads().to_string()])
        .args(["--prefill", &n_prompt.to_string(), "--decode", &TOKENS.to_string()])
        .output()
        .map_err(|error| error.to_string())?;
    let words = || String::from_utf8_lossy(&out.stderr).into_owned();
    let figures: Value = serde_json::from_slice(&out.stdout).map_err(|_| words())?;
    let figure = |name: &str| figures[name].as_f64().ok_or_else(words);
    let first = n_prompt as f64 / figure("prefill_tokens_per_s")?;
    Ok([first, figure("decode_tokens_per_s")?])
}
