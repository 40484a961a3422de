//! `v4 roots`.

use std::path::PathBuf;

use http::Method;
use serde_json::{Value, json};

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::files::{self, Kind};
use crate::place::Place;
use crate::{human, output};

/// List the stores of other programs that are read in place, or add and remove one
///
/// The models of an Ollama store are listed and run as they lie there, and what a cache of Hugging
/// Face has is not fetched again. Nothing in them is changed.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    change: Option<Change>,
}

#[derive(Debug, clap::Subcommand)]
enum Change {
    /// Read this one too, for example ~/.ollama/models or ~/.cache/huggingface/hub
    Add {
        /// The folder
        path: PathBuf,
    },
    /// Read this one no more
    Remove {
        /// The folder
        path: PathBuf,
    },
}

/// Where others keep theirs, below the home directory.
const USUAL: [&str; 2] = [".ollama/models", ".cache/huggingface/hub"];

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let order = match &args.change {
        None => None,
        Some(Change::Add { path }) => Some(("add", path)),
        Some(Change::Remove { path }) => Some(("remove", path)),
    };
    let order = order.map(|(change, path)| {
        let path = std::path::absolute(path)
            .map_err(|source| Failure::System { what: "tell the current folder", source })?;
        Ok::<Value, Failure>(json!({ change: path }))
    });
    let order = order.transpose()?;
    client::runtime()?.block_on(async {
        if let Some(order) = &order {
            return client.call(Method::POST, "/api/roots", Some(order)).await.map(drop);
        }
        let answer = client.call(Method::GET, "/api/roots", None).await?;
        output::print(&table(&answer))?;
        let home = (world.variable)("HOME").map(PathBuf::from).unwrap_or_default();
        for found in USUAL.map(|path| home.join(path)) {
            let text = found.display().to_string();
            let is_known = rows(&answer).any(|root| root["path"] == text.as_str());
            if !is_known && files::kind(&found) == Some(Kind::Folder) {
                output::note(&format!("found {text}; read it with `v4 roots add {text}`"));
            }
        }
        Ok(())
    })
}

fn rows(answer: &Value) -> impl Iterator<Item = &Value> {
    answer["roots"].as_array().into_iter().flatten()
}

fn table(answer: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let rows: Vec<_> = rows(answer).map(|root| [text(&root["kind"]), text(&root["path"])]).collect();
    human::table(["KIND", "PATH"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_a_table() {
        let answer = json!({"roots": [{"kind": "ollama", "path": "/m"}]});
        assert_eq!(table(&answer), "KIND      PATH\nollama    /m\n");
    }
}
