//! `v4 push`.

use serde_json::json;
use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::pulling;

/// Send a model to the registry in its name
///
/// The name says where: `v4 cp mine ghcr.io/me/mine` and then `v4 push ghcr.io/me/mine`. What the
/// registry has already is not sent. Credentials are those of `docker login`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model, for example localhost:5000/me/mine
    model: String,
    /// Talk plain HTTP to a registry that is not on this machine
    #[arg(long)]
    insecure: bool,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let name: ModelName = args.model.parse()?;
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let body = json!({ "model": name.to_string(), "insecure": args.insecure });
    client::runtime()?.block_on(pulling::follow(&client, "/api/push", &body))
}
