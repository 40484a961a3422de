//! `v4 plan`.

use std::fmt::Write as _;
use std::time::Duration;

use http::Method;
use serde_json::{Value, json};

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::{human, output};

/// Say what would happen if a model was used now
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model
    model: String,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let body = json!({ "model": args.model });
    let plan = client::runtime()?.block_on(client.call(Method::POST, "/api/plan", Some(&body)))?;
    output::print(&text(&plan))
}

fn text(plan: &Value) -> String {
    let mut text = String::new();
    let model = plan["model"].as_str().unwrap_or_default();
    let reason = plan["reason"].as_str().unwrap_or_default();
    let _ = match plan["outcome"].as_str().unwrap_or_default() {
        "serve" => writeln!(text, "{model} is loaded and would answer at once."),
        "queue" => writeln!(text, "{model} would answer when one of its sequences is free."),
        "load" => writeln!(text, "{model} would be loaded."),
        "wait" => writeln!(text, "{model} {reason}."),
        _ => writeln!(text, "{model} would be refused: {reason}."),
    };
    if let Some(bytes) = plan["bytes"].as_object() {
        let size = |key: &str| human::size(bytes[key].as_u64().unwrap_or(0));
        let _ = writeln!(
            text,
            "It needs {}: {} of weights, {} of keys and values for {} x {} tokens, {} of scratch.",
            size("total"),
            size("weights"),
            size("kv"),
            plan["slots"],
            plan["context"],
            size("scratch"),
        );
        let how = match plan["is_measured"].as_bool() {
            Some(true) => "as measured",
            _ => "an estimate: none was measured yet",
        };
        let _ = writeln!(text, "A load takes {} ({how}).", ms(&plan["wake_ms"]));
    }
    if let Some(place) = plan["placement"].as_str() {
        let _ = writeln!(text, "It would lie {place}.");
    }
    for line in plan["devices"].as_array().into_iter().flatten().map(device) {
        text.push_str(&line);
    }
    for complaint in plan["complaints"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "{}.", complaint.as_str().unwrap_or_default());
    }
    let loaded: Vec<&Value> = plan["loaded"].as_array().into_iter().flatten().collect();
    if !loaded.is_empty() {
        let rows: Vec<_> = loaded.iter().map(|model| row(model)).collect();
        let head = ["LOADED", "SIZE", "WEIGHTS", "KV", "ANSWERS", "IDLE", "LOAD", "USED AGAIN"];
        text.push('\n');
        text.push_str(&human::table(head, &rows));
    }
    for model in loaded {
        if let Some(place) = model["placement"].as_str() {
            let _ = writeln!(text, "{} lies {place}.", model["model"].as_str().unwrap_or_default());
        }
        if let Some(reason) = model["reason"].as_str() {
            let _ = writeln!(text, "\n{} {reason}.", model["model"].as_str().unwrap_or_default());
        }
    }
    text
}

/// What a device has, or why it has nothing of ours.
fn device(device: &Value) -> String {
    let size = |key: &str| human::size(device[key].as_u64().unwrap_or(0));
    let mut text = device["name"].as_str().unwrap_or_default().to_owned();
    if let Some(product) = device["product"].as_str() {
        let _ = write!(text, " ({product})");
    }
    if let Some(reason) = device["reason"].as_str() {
        return format!("{text} is not used: {reason}.\n");
    }
    let _ = write!(text, ": {} of {} in use", size("used_bytes"), size("budget_bytes"));
    if device["others_bytes"].as_u64().is_some_and(|bytes| bytes > 0) {
        let _ = write!(text, "; other programs have {}", size("others_bytes"));
    }
    text + ".\n"
}

fn row(model: &Value) -> [String; 8] {
    let size = |value: &Value| human::size(value.as_u64().unwrap_or(0));
    let percent = model["probability"].as_f64().unwrap_or(0.0) * 100.0;
    let name = model["model"].as_str().unwrap_or_default();
    let pin = if model["pinned"] == true { " (pinned)" } else { "" };
    [
        format!("{name}{pin}"),
        size(&model["size"]),
        size(&model["bytes"]["weights"]),
        size(&model["bytes"]["kv"]),
        model["running"].to_string(),
        ms(&model["idle_ms"]),
        ms(&model["wake_ms"]),
        format!("{percent:.0} %"),
    ]
}

/// Milliseconds as a person cares.
fn ms(value: &Value) -> String {
    let time = Duration::from_millis(value.as_u64().unwrap_or(0));
    if time < Duration::from_mins(2) {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        human::span(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read_as_sentences_and_a_table() {
        let plan = json!({
            "model": "b:latest", "outcome": "load", "reason": null,
            "bytes": {"weights": 700_000_000, "kv": 80_000_000, "scratch": 134_217_728, "total": 914_217_728},
            "context": 4096, "slots": 4, "wake_ms": 2300, "is_measured": true,
            "devices": [{"name": "host", "budget_bytes": 1_500_000_000, "used_bytes": 1_200_000_000}],
            "loaded": [{
                "model": "a:latest", "size": 1_200_000_000, "running": 0, "pinned": false,
                "bytes": {"weights": 1_000_000_000, "kv": 60_000_000, "scratch": 134_217_728, "total": 1_194_217_728},
                "idle_ms": 300_000, "wake_ms": 900, "probability": 0.346, "burden": 1.0,
                "leaves": "unload", "reason": "is unloaded to make room for b:latest: …",
            }],
        });
        let text = text(&plan);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "b:latest would be loaded.");
        assert_eq!(
            lines[1],
            "It needs 914 MB: 700 MB of weights, 80 MB of keys and values for 4 x 4096 tokens, 134 MB \
             of scratch."
        );
        assert_eq!(lines[2], "A load takes 2.3 s (as measured).");
        assert_eq!(lines[3], "host: 1.2 GB of 1.5 GB in use.");
        let row: Vec<&str> = lines[6].split("  ").map(str::trim).filter(|it| !it.is_empty()).collect();
        assert_eq!(
            row,
            ["a:latest", "1.2 GB", "1 GB", "60 MB", "0", "5 minutes", "0.9 s", "35 %"]
        );
        assert_eq!(lines[8], "a:latest is unloaded to make room for b:latest: ….");
    }

    #[test]
    fn devices_say_what_they_have_and_why_not() {
        let plan = json!({
            "model": "b:latest", "outcome": "load", "bytes": null, "placement": "on gpu0",
            "devices": [
                {"name": "gpu0", "product": "Double", "budget_bytes": 9, "used_bytes": 1, "others_bytes": 3},
                {"name": "gpu1", "product": "Double", "reason": "it has gone"},
            ],
            "complaints": ["gpu2: it is lost"],
            "loaded": [{"model": "a:latest", "placement": "on the host"}],
        });
        let text = text(&plan);
        for line in [
            "It would lie on gpu0.",
            "gpu0 (Double): 1 B of 9 B in use; other programs have 3 B.",
            "gpu1 (Double) is not used: it has gone.",
            "gpu2: it is lost.",
            "a:latest lies on the host.",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in {text}");
        }
    }

    #[test]
    fn a_refusal_says_why_and_no_sizes() {
        let plan = json!({
            "model": "b:latest", "outcome": "refuse", "reason": "it is too large", "bytes": null,
            "context": 0, "slots": 0, "wake_ms": 0, "is_measured": false,
            "devices": [{"name": "host", "budget_bytes": 10, "used_bytes": 0}], "loaded": [],
        });
        assert_eq!(text(&plan), "b:latest would be refused: it is too large.\nhost: 0 B of 10 B in use.\n");
    }
}
