//! `v4 list`.

use http::Method;
use jiff::Timestamp;
use serde_json::Value;
use v4_proto::Digest;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::{human, output};

/// List the models on this machine
#[derive(Debug, clap::Args)]
#[command(visible_alias = "ls")]
pub struct Args {
    /// Only models whose name starts with this
    prefix: Option<String>,
    /// Those that were removed and that `v4 restore` brings back
    #[arg(long)]
    deleted: bool,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let path = if args.deleted { "/api/deleted" } else { "/api/tags" };
    let listing = client::runtime()?.block_on(client.call(Method::GET, path, None))?;
    let prefix = args.prefix.as_deref().unwrap_or_default().to_lowercase();
    let time = if args.deleted { ("DELETED", "deleted_at") } else { ("MODIFIED", "modified_at") };
    output::print(&table(&listing, &prefix, time, Timestamp::now()))
}

/// `time` is the last column: its title and its key.
fn table(listing: &Value, prefix: &str, time: (&str, &str), now: Timestamp) -> String {
    let rows: Vec<_> = models(listing, prefix)
        .map(|model| {
            let text = |key: &str| model[key].as_str().unwrap_or_default();
            [
                text("name").to_owned(),
                short(text("digest")),
                human::size(model["size"].as_u64().unwrap_or(0)),
                human::when(text(time.1), now),
            ]
        })
        .collect();
    human::table(["NAME", "ID", "SIZE", time.0], &rows)
}

/// The models of a listing whose name starts with `prefix` in any case.
pub fn models<'a>(listing: &'a Value, prefix: &'a str) -> impl Iterator<Item = &'a Value> {
    listing["models"].as_array().into_iter().flatten().filter(move |model| {
        model["name"].as_str().is_some_and(|name| name.to_lowercase().starts_with(prefix))
    })
}

/// A digest as people see it.
pub fn short(hex: &str) -> String {
    Digest::from_hex(hex.trim_start_matches("sha256:")).map_or("-".to_owned(), |d| d.short())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_listing_is_a_table() {
        let digest = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
        let listing = json!({"models": [
            {"name": "smollm2:latest", "digest": digest, "size": 98_362_432,
             "modified_at": "2026-11-23T11:00:00.123456789+01:00"},
            {"name": "other:1", "digest": "odd"},
        ]});
        let now = "2026-11-23T12:00:00Z".parse().expect("a time");
        let header = "NAME              ID              SIZE     MODIFIED\n";
        let first = "smollm2:latest    b179c9523d0e    98 MB    2 hours ago\n";
        let second = "other:1           -               0 B      Unknown\n";
        let made = ("MODIFIED", "modified_at");
        assert_eq!(table(&listing, "", made, now), [header, first, second].concat());
        assert_eq!(table(&listing, "smol", made, now), [header, first].concat());
        assert_eq!(table(&Value::Null, "", made, now), "NAME    ID    SIZE    MODIFIED\n");
    }
}
