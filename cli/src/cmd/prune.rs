//! `v4 prune`.

use http::Method;
use serde_json::json;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::{human, output};

/// Remove what no model needs, and what was deleted for good
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Also downloads that are not done; a later pull begins at 0
    #[arg(long)]
    partials: bool,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let body = json!({ "partials": args.partials });
    let call = client.call(Method::POST, "/api/prune", Some(&body));
    let freed = client::runtime()?.block_on(call)?["freed"].as_u64().unwrap_or(0);
    output::print(&format!("freed {}\n", human::size(freed)))
}
