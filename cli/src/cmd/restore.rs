//! `v4 restore`.

use http::Method;
use serde_json::json;
use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::output;
use crate::place::Place;

/// Bring models back that were removed
///
/// What `v4 rm` removed can come back until the next `v4 prune`, until a pull needs the room, and
/// for a week at most. `v4 list --deleted` shows what there is.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The models
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let names: Vec<ModelName> =
        args.models.iter().map(|model| model.parse()).collect::<Result<_, _>>()?;
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    client::runtime()?.block_on(async {
        for name in &names {
            let body = json!({ "model": name.to_string() });
            client.call(Method::POST, "/api/restore", Some(&body)).await?;
            output::print(&format!("restored '{name}'\n"))?;
        }
        Ok(())
    })
}
