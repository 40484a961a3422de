//! `v4 show`.

use std::fmt::Write as _;

use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};
use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::output;
use crate::place::Place;

/// Lines of a long text (licence, system prompt) that the overview shows.
const FIRST_LINES: usize = 2;

/// Show what is known of a model
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model
    model: String,
    /// Only its licence
    #[arg(long, group = "part")]
    license: bool,
    /// Only its Modelfile
    #[arg(long, group = "part")]
    modelfile: bool,
    /// Only its parameters
    #[arg(long, group = "part")]
    parameters: bool,
    /// Only its template
    #[arg(long, group = "part")]
    template: bool,
    /// Only its system prompt
    #[arg(long, group = "part")]
    system: bool,
    /// Only where it came from, with the sources and digest of each file
    #[arg(long, group = "part")]
    provenance: bool,
    /// Also its metadata and tensors
    #[arg(short, long, conflicts_with = "part")]
    verbose: bool,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let name: ModelName = args.model.parse()?;
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let body = json!({ "model": name.to_string(), "verbose": args.verbose });
    let shown = client::runtime()?.block_on(client.call(Method::POST, "/api/show", Some(&body)))?;
    if args.provenance {
        return output::print(&provenance(&shown));
    }
    let parts = [
        ("license", args.license),
        ("modelfile", args.modelfile),
        ("parameters", args.parameters),
        ("template", args.template),
        ("system", args.system),
    ];
    match parts.into_iter().find(|(_, is_asked)| *is_asked) {
        Some((key, _)) => output::print(&part(&shown, key)),
        None => output::print(&overview(&shown, args.verbose)),
    }
}

/// One text of the daemon's answer, ending with a line end unless it is empty.
pub fn part(shown: &Value, key: &str) -> String {
    let text = shown[key].as_str().unwrap_or_default();
    if text.is_empty() || text.ends_with('\n') { text.to_owned() } else { format!("{text}\n") }
}

/// Where a model came from.
fn provenance(shown: &Value) -> String {
    let origin = &shown["provenance"];
    if origin.is_null() {
        return "It was made on this machine, or put here by another program.\n".to_owned();
    }
    let mut text = String::new();
    for (key, name) in [("from", "from"), ("revision", "revision"), ("license", "license")] {
        if let Some(value) = origin[key].as_str().filter(|value| !value.is_empty()) {
            let _ = writeln!(text, "{name:<12}{value}");
        }
    }
    let time = origin["pulled_at"].as_i64().and_then(|at| Timestamp::from_second(at).ok());
    if let Some(time) = time {
        let _ = writeln!(text, "{:<12}{time}", "pulled at");
    }
    for file in origin["files"].as_array().into_iter().flatten() {
        let is_verified = file["verified"].as_bool().unwrap_or(false);
        let word = if is_verified { "verified" } else { "as it came, nothing to hold it to" };
        let digest = file["digest"].as_str().unwrap_or_default();
        let _ = writeln!(text, "{:<12}{digest} ({word})", "file");
        for source in file["sources"].as_array().into_iter().flatten() {
            let _ = writeln!(text, "{:<12}{}", "", source.as_str().unwrap_or_default());
        }
    }
    text
}

/// The sections, each under an indented heading.
pub fn overview(shown: &Value, is_verbose: bool) -> String {
    let mut sections = vec![
        ("Model", model(shown)),
        ("Capabilities", list(&shown["capabilities"])),
        ("Parameters", parameters(shown)),
        ("System", first_lines(shown, "system")),
        ("License", first_lines(shown, "license")),
    ];
    if is_verbose {
        sections.push(("Metadata", metadata(shown)));
        sections.push(("Tensors", tensors(shown)));
    }
    let mut text = String::new();
    for (title, rows) in sections.into_iter().filter(|(_, rows)| !rows.is_empty()) {
        let _ = writeln!(text, "  {title}");
        let width = rows.iter().map(|(key, _)| key.chars().count()).max().unwrap_or(0);
        for (key, value) in rows {
            let line = if value.is_empty() { key } else { format!("{key:<width$}    {value}") };
            let _ = writeln!(text, "    {line}");
        }
        text.push('\n');
    }
    text
}

type Rows = Vec<(String, String)>;

fn model(shown: &Value) -> Rows {
    let details = &shown["details"];
    let info = &shown["model_info"];
    let arch = info["general.architecture"].as_str().or(details["family"].as_str());
    let of_arch = |key: &str| {
        let found = &info[format!("{}.{key}", arch.unwrap_or_default())];
        plain(if found.is_null() { &details[key] } else { found })
    };
    let rows = [
        ("architecture", arch.unwrap_or_default().to_owned()),
        ("parameters", plain(&details["parameter_size"])),
        ("context length", of_arch("context_length")),
        ("embedding length", of_arch("embedding_length")),
        ("quantization", plain(&details["quantization_level"])),
        ("requires", plain(&shown["requires"])),
    ];
    let known = rows.into_iter().filter(|(_, value)| !value.is_empty());
    known.map(|(key, value)| (key.to_owned(), value)).collect()
}

fn list(items: &Value) -> Rows {
    let items = items.as_array().into_iter().flatten();
    items.map(|item| (plain(item), String::new())).collect()
}

/// The `parameters` text has a line each: a name, blanks, a value.
fn parameters(shown: &Value) -> Rows {
    let lines = shown["parameters"].as_str().unwrap_or_default().lines();
    let split = |line: &str| match line.split_once(char::is_whitespace) {
        Some((key, value)) => (key.to_owned(), value.trim().to_owned()),
        None => (line.to_owned(), String::new()),
    };
    lines.filter(|line| !line.trim().is_empty()).map(split).collect()
}

fn first_lines(shown: &Value, key: &str) -> Rows {
    let text = shown[key].as_str().unwrap_or_default();
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut rows: Rows =
        lines.by_ref().take(FIRST_LINES).map(|line| (line.to_owned(), String::new())).collect();
    if lines.next().is_some() {
        rows.push(("...".to_owned(), String::new()));
    }
    rows
}

fn metadata(shown: &Value) -> Rows {
    let entries = shown["model_info"].as_object().into_iter().flatten();
    entries.map(|(key, value)| (key.clone(), short(value))).collect()
}

fn tensors(shown: &Value) -> Rows {
    let tensors = shown["tensors"].as_array().into_iter().flatten();
    let row = |tensor: &Value| {
        (plain(&tensor["name"]), format!("{:<8}{}", plain(&tensor["type"]), tensor["shape"]))
    };
    tensors.map(row).collect()
}

/// A value as a person writes it: strings without quotes, nothing for `null`.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// A value on one line: long lists and texts are cut.
fn short(value: &Value) -> String {
    const CHARS: usize = 60;
    let text = plain(value).replace('\n', "\\n");
    if text.chars().count() <= CHARS {
        return text;
    }
    text.chars().take(CHARS).chain("...".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown() -> Value {
        json!({
            "details": {"family": "llama", "parameter_size": "134.52M", "quantization_level": "Q4_1"},
            "model_info": {"general.architecture": "llama", "llama.context_length": 2048,
                           "llama.embedding_length": 576, "tokenizer.ggml.tokens": null},
            "capabilities": ["completion", "tools"],
            "parameters": "stop                           \"<|im_end|>\"\n",
            "license": "Apache License\n\nVersion 2.0\nmore",
            "tensors": [{"name": "output.weight", "type": "Q6_K", "shape": [576, 49152]}],
        })
    }

    #[test]
    fn the_overview_has_the_sections_that_there_are() {
        let expected = "  Model
    architecture        llama
    parameters          134.52M
    context length      2048
    embedding length    576
    quantization        Q4_1

  Capabilities
    completion
    tools

  Parameters
    stop    \"<|im_end|>\"

  License
    Apache License
    Version 2.0
    ...

";
        assert_eq!(overview(&shown(), false), expected);
        let verbose = overview(&shown(), true);
        assert!(verbose.contains("    output.weight    Q6_K    [576,49152]\n"), "{verbose}");
    }

    #[test]
    fn provenance_is_told_file_by_file() {
        let shown = json!({"provenance": {"from": "library:m", "revision": null,
            "pulled_at": 0, "files": [{"digest": "sha256:aa", "verified": true,
            "sources": ["pypi:a@1/x"]}]}});
        let expected = "from        library:m\npulled at   1970-01-01T00:00:00Z\n\
                        file        sha256:aa (verified)\n            pypi:a@1/x\n";
        assert_eq!(provenance(&shown), expected);
        assert!(provenance(&json!({})).starts_with("It was made on this machine"));
    }

    #[test]
    fn a_part_ends_with_a_line_end() {
        assert_eq!(part(&json!({"system": "be brief"}), "system"), "be brief\n");
        assert_eq!(part(&json!({}), "system"), "");
    }
}
