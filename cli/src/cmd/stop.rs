//! `v4 stop`.

use http::{Method, StatusCode};
use serde_json::json;
use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::{World, list};
use crate::error::Failure;
use crate::place::Place;

/// Take a model out of memory
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model, as `v4 ps` shows it
    model: String,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let name: ModelName = args.model.parse()?;
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Fail);
    let is_loaded = client::runtime()?.block_on(unload(&client, &name))?;
    if is_loaded { Ok(()) } else { Err(not_loaded(&name)) }
}

/// Unloads a model. `false` when it was not loaded.
///
/// # Errors
/// As [`Client::call`].
pub async fn unload(client: &Client, name: &ModelName) -> Result<bool, Failure> {
    let loaded = client.call(Method::GET, "/api/ps", None).await?;
    let is_this = |text: &str| text.parse::<ModelName>().is_ok_and(|other| other.matches(name));
    if !list::models(&loaded, "").filter_map(|model| model["name"].as_str()).any(is_this) {
        return Ok(false);
    }
    let body = json!({"model": name.to_string(), "keep_alive": 0, "stream": false});
    client.call(Method::POST, "/api/generate", Some(&body)).await?;
    Ok(true)
}

fn not_loaded(name: &ModelName) -> Failure {
    Failure::Refused {
        status: StatusCode::NOT_FOUND,
        message: format!("couldn't find model \"{name}\" to stop; see what is loaded with `v4 ps`"),
    }
}
