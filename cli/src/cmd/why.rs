//! `v4 why`.

use std::fmt::Write as _;

use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::{human, output};

/// Say why a model was loaded, unloaded, kept waiting or refused
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model
    model: String,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Fail);
    let body = json!({ "model": args.model });
    let why = client::runtime()?.block_on(client.call(Method::POST, "/api/why", Some(&body)))?;
    output::print(&text(&why, Timestamp::now()))
}

fn text(why: &Value, now: Timestamp) -> String {
    let model = why["model"].as_str().unwrap_or_default();
    let decisions: Vec<&Value> = why["decisions"].as_array().into_iter().flatten().collect();
    if decisions.is_empty() {
        return format!("Nothing was decided for {model} since the daemon started.\n");
    }
    let mut text = String::new();
    for decision in decisions {
        let when = human::when(decision["at"].as_str().unwrap_or_default(), now);
        let reason = decision["reason"].as_str().unwrap_or_default();
        let _ = writeln!(text, "{when}: {model} {reason}.");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_are_sentences_with_their_time() {
        let mut why = json!({"model": "a:latest", "decisions": [
            {"at": "2026-11-24T12:00:00Z", "what": "ready", "reason": "is ready after 0.9 s: it takes 7 MiB"},
        ]});
        let now = "2026-11-24T12:03:00Z".parse().expect("a time");
        assert_eq!(text(&why, now), "3 minutes ago: a:latest is ready after 0.9 s: it takes 7 MiB.\n");
        why["decisions"] = json!([]);
        assert!(text(&why, now).contains("Nothing was decided"));
    }
}
