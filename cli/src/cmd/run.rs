//! `v4 run`.

use std::io::{self, IsTerminal as _, Read as _};

use http::Method;
use serde_json::{Map, Value, json};
use v4_proto::ModelName;

use crate::answer::{self, End};
use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::{output, pulling, repl};

/// Bytes of piped text that are read as part of a prompt: far more than any context holds.
const PIPED_BYTES: usize = 32 << 20;

/// Ask a model, or chat with it
///
/// With a prompt, or with text on the standard input, the answer is written to the standard output
/// and that is all. Without, a chat begins. A model that is not here yet is pulled first.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model, for example smollm2 or gemma3:270m
    model: String,
    /// What to ask; text on the standard input goes before it
    prompt: Vec<String>,
    /// Say afterwards how long everything took
    #[arg(long)]
    verbose: bool,
    /// Instructions that the model gets before everything else
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// How daring the choice of words is; 0 always takes the likeliest
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, value_parser = finite)]
    temperature: Option<f64>,
    /// Make the choice of words repeatable
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// At most this many tokens of answer
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    num_predict: Option<i64>,
    /// How long the model stays loaded afterwards: 10m, 1h, 0, -1 for ever
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = time)]
    keepalive: Option<Value>,
}

/// A number that JSON can carry.
fn finite(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "it is not a number".to_owned())?;
    if number.is_finite() { Ok(number) } else { Err("it must be a finite number".to_owned()) }
}

/// A time as the API takes it: a bare number means seconds only as a number. What a unit means is
/// for the daemon to say.
fn time(text: &str) -> Result<Value, String> {
    if text.parse::<f64>().is_err() {
        return Ok(Value::from(text));
    }
    let seconds = finite(text).map_err(|why| format!("{why}; -1 is for ever"))?;
    Ok(Value::from(seconds))
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let session = Session::new(args)?;
    let prompt = prompt(&args.prompt)?;
    let place = Place::find(world.variable)?;
    let client = Client::new(place, IfAbsent::Start);
    let runtime = client::runtime()?;
    runtime.block_on(session.make_present(&client))?;
    match prompt {
        Some(prompt) => runtime.block_on(once(&client, &session, &prompt)),
        None => repl::run(&client, &runtime, session),
    }
}

/// What holds for every request of one `v4 run`.
#[derive(Debug, Clone)]
pub struct Session {
    /// The model.
    pub name: ModelName,
    /// Instructions before everything else.
    pub system: Option<String>,
    /// Sampling options as the API names them.
    pub options: Map<String, Value>,
    /// How long the model stays loaded.
    pub keep_alive: Option<Value>,
    /// Whether timings are printed.
    pub is_verbose: bool,
}

impl Session {
    fn new(args: &Args) -> Result<Self, Failure> {
        let given = [
            ("temperature", args.temperature.map(Value::from)),
            ("seed", args.seed.map(Value::from)),
            ("num_predict", args.num_predict.map(Value::from)),
        ];
        let options =
            given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect();
        Ok(Self {
            name: args.model.parse()?,
            system: args.system.clone(),
            options,
            keep_alive: args.keepalive.clone(),
            is_verbose: args.verbose,
        })
    }

    /// The parts of a request body that do not depend on the prompt.
    pub fn body(&self) -> Value {
        let mut body = json!({ "model": self.name.to_string(), "options": self.options });
        if let Some(keep_alive) = &self.keep_alive {
            body["keep_alive"] = keep_alive.clone();
        }
        body
    }

    /// Pulls the model unless the daemon has it.
    async fn make_present(&self, client: &Client) -> Result<(), Failure> {
        let name = self.name.to_string();
        match client.call(Method::POST, "/api/show", Some(&json!({ "model": name }))).await {
            Err(failure) if failure.is_not_found() => pulling::pull(client, &name).await,
            other => other.map(|_| ()),
        }
    }
}

/// One answer.
async fn once(client: &Client, session: &Session, prompt: &str) -> Result<(), Failure> {
    let mut body = session.body();
    body["prompt"] = prompt.into();
    if let Some(system) = &session.system {
        body["system"] = system.as_str().into();
    }
    let (said, end) = answer::ask(client, "/api/generate", &body).await?;
    if session.is_verbose {
        output::note(&format!("\n{}", answer::timings(&said.figures).trim_end()));
    }
    match end {
        End::Whole => Ok(()),
        End::Stopped => Err(Failure::Stopped),
    }
}

/// The prompt of the command line after that of the standard input. `None` when a person should be
/// asked.
fn prompt(words: &[String]) -> Result<Option<String>, Failure> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(join("", &words.join(" ")));
    }
    let piped = piped(stdin.lock(), PIPED_BYTES)?;
    match join(&piped, &words.join(" ")) {
        Some(prompt) => Ok(Some(prompt)),
        None => Err(Failure::Wrong(
            "there is nothing to ask: give a prompt, or text on the standard input".to_owned(),
        )),
    }
}

/// The text that `from` holds, at most `limit` bytes of it.
fn piped(from: impl io::Read, limit: usize) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let one_more = u64::try_from(limit).map_or(u64::MAX, |limit| limit.saturating_add(1));
    from.take(one_more).read_to_end(&mut bytes).map_err(Failure::Input)?;
    if bytes.len() > limit {
        return Err(Failure::Wrong(format!(
            "the text on the standard input has more than {limit} bytes; give less of it"
        )));
    }
    String::from_utf8(bytes)
        .map_err(|error| Failure::Input(io::Error::new(io::ErrorKind::InvalidData, error)))
}

/// Piped text, a blank line, then what was asked of it. `None` when both are blank.
fn join(piped: &str, asked: &str) -> Option<String> {
    match (piped.trim(), asked.trim()) {
        ("", "") => None,
        ("", asked) => Some(asked.to_owned()),
        (_, "") => Some(piped.trim_end().to_owned()),
        (_, asked) => Some(format!("{}\n\n{asked}", piped.trim_end())),
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command, FromArgMatches as _};

    use super::*;

    fn matches(line: &[&str]) -> Result<clap::ArgMatches, clap::Error> {
        Args::augment_args(Command::new("run").no_binary_name(true)).try_get_matches_from(line)
    }

    fn session(line: &[&str]) -> Session {
        let matched = matches(line).expect("a command line");
        Session::new(&Args::from_arg_matches(&matched).expect("arguments")).expect("a session")
    }

    #[test]
    fn piped_text_goes_before_the_prompt() {
        assert_eq!(join("", " hi "), Some("hi".into()));
        assert_eq!(join("  code\n", ""), Some("  code".into()));
        assert_eq!(join("a\nb\n", "why?"), Some("a\nb\n\nwhy?".into()));
        assert_eq!(join(" \n", ""), None);
    }

    #[test]
    fn flags_become_options_of_the_api() {
        let session = session(&[
            "m",
            "hello",
            "--temperature",
            "0",
            "--seed",
            "7",
            "--num-predict",
            "-1",
            "--keepalive",
            "-1",
        ]);
        let expected = json!({"model": "m:latest", "keep_alive": -1.0,
            "options": {"temperature": 0.0, "seed": 7, "num_predict": -1}});
        assert_eq!(session.body(), expected);
    }

    #[test]
    fn numbers_that_json_cannot_carry_are_usage_errors() {
        for flag in ["--temperature", "--keepalive"] {
            for text in ["nan", "inf", "-inf", "infinity", "1e999"] {
                let error = matches(&["m", &format!("{flag}={text}")]).expect_err(text);
                assert_eq!(error.kind(), clap::error::ErrorKind::ValueValidation, "{flag} {text}");
            }
        }
    }

    #[test]
    fn too_much_piped_text_is_refused_and_not_cut() {
        assert_eq!(piped("é".as_bytes(), 2).expect("it fits"), "é");
        let refused = piped("aé".as_bytes(), 2).expect_err("it does not fit").to_string();
        assert!(refused.contains("more than 2 bytes"), "{refused}");
        assert!(matches!(piped(b"\xff".as_slice(), 2), Err(Failure::Input(_))));
    }

    #[test]
    fn a_time_with_a_unit_stays_text() {
        assert_eq!(session(&["m", "--keepalive", "10m"]).body()["keep_alive"], "10m");
        assert_eq!(session(&["m"]).body(), json!({"model": "m:latest", "options": {}}));
    }
}
