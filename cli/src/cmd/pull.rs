//! `v4 pull`.

use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::pulling;

/// Fetch a model, or make sure that it is whole and current
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model, for example smollm2 or gemma3:270m
    model: String,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let name: ModelName = args.model.parse()?;
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    client::runtime()?.block_on(pulling::pull(&client, &name.to_string()))
}
