//! `v4 config`.

use std::fmt::Write as _;

use http::Method;
use serde_json::Value;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::{human, output};

/// Show the settings that count and who said each, or have the file read again
///
/// A switch of `v4 serve` comes before a variable, a variable before the file (`V4_CONFIG`, else
/// `config.toml` in the home), the file before one of Ollama's variables. docs/reference.md says
/// what each setting means.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Read the file again; what cannot change while the daemon runs is named
    #[arg(long)]
    reload: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let (method, path) = if args.reload {
        (Method::POST, "/api/config/reload")
    } else {
        (Method::GET, "/api/config")
    };
    let answer = client::runtime()?.block_on(client.call(method, path, None))?;
    if args.json {
        return output::print(&format!("{answer:#}\n"));
    }
    output::print(&if args.reload { news(&answer) } else { page(&answer) })
}

fn rows<'a>(answer: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    answer[key].as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// What changed, and what will.
fn news(answer: &Value) -> String {
    let keys = |key| rows(answer, key).map(text).collect::<Vec<_>>().join(", ");
    let (changed, later) = (keys("changed"), keys("at_next_start"));
    let mut said = match changed.as_str() {
        "" => "nothing changed\n".to_owned(),
        keys => format!("changed: {keys}\n"),
    };
    if !later.is_empty() {
        let _ = writeln!(said, "at the next start: {later}");
    }
    said
}

fn page(answer: &Value) -> String {
    let shown = |one: &Value| [text(&one["key"]), text(&one["value"]), text(&one["source"])];
    let settings: Vec<_> = rows(answer, "settings").map(shown).collect();
    let mut page = human::table(["SETTING", "VALUE", "FROM"], &settings);
    if let Some(file) = answer["file"].as_str() {
        let _ = writeln!(page, "\nfile: {file}");
    }
    for one in rows(answer, "ignored") {
        let [name, value, why] = ["variable", "value", "why"].map(|key| text(&one[key]));
        let _ = writeln!(page, "\n{name}={value} changes nothing here: {why}");
    }
    page
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_page_says_who_said_what_and_what_changes_nothing() {
        let answer = json!({
            "file": "/h/config.toml",
            "settings": [
                {"key": "slots", "value": "3", "source": "file, line 2"},
                {"key": "quota", "value": null, "source": "default"},
            ],
            "ignored": [{"variable": "OLLAMA_VULKAN", "value": "1", "why": "none"}],
        });
        let page = page(&answer);
        assert!(page.starts_with("SETTING    VALUE    FROM\nslots      3        file, line 2\n"));
        assert!(page.contains("\nfile: /h/config.toml\n"), "{page}");
        assert!(page.ends_with("OLLAMA_VULKAN=1 changes nothing here: none\n"), "{page}");
    }

    #[test]
    fn news_are_what_changed_and_what_waits() {
        let answer = json!({"changed": ["quota"], "at_next_start": ["slots", "listen"]});
        assert_eq!(news(&answer), "changed: quota\nat the next start: slots, listen\n");
        assert_eq!(news(&json!({"changed": [], "at_next_start": []})), "nothing changed\n");
    }
}
