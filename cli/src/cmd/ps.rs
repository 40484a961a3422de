//! `v4 ps`.

use http::Method;
use jiff::Timestamp;
use serde_json::Value;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::{World, list};
use crate::error::Failure;
use crate::place::Place;
use crate::{human, output};

/// List the models that are loaded now
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only models whose name starts with this
    prefix: Option<String>,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Fail);
    let loaded = match client::runtime()?.block_on(client.call(Method::GET, "/api/ps", None)) {
        Ok(loaded) => loaded,
        // Not an error: the question is answered.
        Err(Failure::NotRunning) => {
            output::note(&Failure::NotRunning.to_string());
            Value::Null
        }
        Err(failure) => return Err(failure),
    };
    let prefix = args.prefix.as_deref().unwrap_or_default().to_lowercase();
    output::print(&table(&loaded, &prefix, Timestamp::now()))
}

fn table(loaded: &Value, prefix: &str, now: Timestamp) -> String {
    let rows: Vec<_> = list::models(loaded, prefix)
        .map(|model| {
            let text = |key: &str| model[key].as_str().unwrap_or_default();
            let number = |key: &str| model[key].as_u64().unwrap_or(0);
            [
                text("name").to_owned(),
                list::short(text("digest")),
                human::size(number("size")),
                match model["placement"].as_str() {
                    Some(place) => place.to_owned(),
                    None => processor(number("size"), number("size_vram")),
                },
                number("context_length").to_string(),
                match text("state") {
                    "draining" => "Stopping...".to_owned(),
                    _ => human::when(text("expires_at"), now),
                },
            ]
        })
        .collect();
    human::table(["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"], &rows)
}

/// Where the bytes of a model are: `100% CPU`, `40%/60% CPU/GPU`.
fn processor(size: u64, on_gpu: u64) -> String {
    match on_gpu {
        _ if size == 0 || on_gpu > size => "Unknown".to_owned(),
        0 => "100% CPU".to_owned(),
        _ if on_gpu == size => "100% GPU".to_owned(),
        _ => {
            let cpu = (u128::from(size - on_gpu) * 100 + u128::from(size) / 2) / u128::from(size);
            format!("{cpu}%/{}% CPU/GPU", 100 - cpu)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn shares_of_a_processor_add_up() {
        assert_eq!(processor(0, 0), "Unknown");
        assert_eq!(processor(10, 0), "100% CPU");
        assert_eq!(processor(10, 10), "100% GPU");
        assert_eq!(processor(1000, 604), "40%/60% CPU/GPU");
        assert_eq!(processor(10, 11), "Unknown");
    }

    #[test]
    fn loaded_models_are_a_table() {
        let mut loaded = json!({"models": [{
            "name": "smollm2:latest", "digest": "b1".repeat(32), "size": 200_000_000, "size_vram": 0,
            "context_length": 2048, "expires_at": "2026-11-23T12:04:30Z",
        }]});
        let now = "2026-11-23T12:00:00Z".parse().expect("a time");
        let text = table(&loaded, "", now);
        let row = "smollm2:latest    b1b1b1b1b1b1    200 MB    100% CPU     2048       4 minutes from now";
        assert_eq!(text.lines().nth(1), Some(row));
        loaded["models"][0]["placement"] = json!("on gpu0");
        assert!(table(&loaded, "", now).contains("200 MB    on gpu0    "));
        loaded["models"][0]["state"] = json!("draining");
        assert!(table(&loaded, "", now).contains("Stopping..."));
    }
}
