//! `v4 cp`.

use http::Method;
use serde_json::json;
use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::output;
use crate::place::Place;

/// Give a model another name
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model
    source: String,
    /// The name to give it
    destination: String,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let (from, to): (ModelName, ModelName) = (args.source.parse()?, args.destination.parse()?);
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let body = json!({ "source": from.to_string(), "destination": to.to_string() });
    client::runtime()?.block_on(client.call(Method::POST, "/api/copy", Some(&body)))?;
    output::print(&format!("copied '{from}' to '{to}'\n"))
}
