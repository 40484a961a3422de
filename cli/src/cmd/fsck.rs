//! `v4 fsck`.

use serde_json::json;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::pulling;

/// Hash every model again and say what is damaged
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pull what is damaged again; of large files only the damaged parts
    #[arg(long)]
    repair: bool,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let body = json!({ "repair": args.repair, "stream": true });
    client::runtime()?.block_on(pulling::follow(&client, "/api/fsck", &body))
}
