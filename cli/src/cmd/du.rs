//! `v4 du`.

use std::fmt::Write as _;

use http::Method;
use serde_json::Value;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::{human, output};

/// Show what each model costs on disk, alone and shared with others
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: &Args, world: &World) -> Result<(), Failure> {
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let usage = client::runtime()?.block_on(client.call(Method::GET, "/api/du", None))?;
    output::print(&table(&usage))
}

fn table(usage: &Value) -> String {
    let size = |value: &Value| human::size(value.as_u64().unwrap_or(0));
    let models = usage["models"].as_array().into_iter().flatten();
    let rows: Vec<_> = models
        .map(|model| {
            let name = model["name"].as_str().unwrap_or_default().to_owned();
            [name, size(&model["own"]), size(&model["shared"])]
        })
        .collect();
    let mut text = human::table(["NAME", "ALONE", "SHARED"], &rows);
    let _ = write!(text, "\ntotal {}", size(&usage["total"]));
    for (key, words) in [
        ("orphans", "that no model needs; `v4 prune` removes them"),
        ("deleted", "of deleted models; `v4 prune` removes them, `v4 restore` brings them back"),
        (
            "kv",
            "of idle conversations, which V4_KV_DISK bounds and not V4_QUOTA; those used longest ago \
             go by themselves, and all of a model's with it",
        ),
        ("partials", "of downloads that are not done; `v4 prune --partials` removes them"),
    ] {
        if usage[key].as_u64().is_some_and(|n| n > 0) {
            let _ = write!(text, ", {} {words}", size(&usage[key]));
        }
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn costs_are_a_table_with_a_sum() {
        let usage = json!({"models": [{"name": "a:latest", "own": 2000, "shared": 0}],
            "orphans": 10, "deleted": 20, "partials": 0, "kv": 5000, "total": 7030});
        let expected = "NAME        ALONE    SHARED\na:latest    2 KB     0 B\n\n\
                        total 7 KB, 10 B that no model needs; `v4 prune` removes them, 20 B of deleted \
                        models; `v4 prune` removes them, `v4 restore` brings them back, 5 KB of idle conversations, \
                        which V4_KV_DISK bounds and not V4_QUOTA; those used longest ago go by \
                        themselves, and all of a model's with it\n";
        assert_eq!(table(&usage), expected);
    }
}
