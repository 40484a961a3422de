//! `v4 rm`.

use http::Method;
use serde_json::json;
use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::{World, stop};
use crate::error::Failure;
use crate::output;
use crate::place::Place;

/// Remove models from this machine; `v4 restore` brings them back until the next prune
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
            // One that is damaged cannot be asked to stop; removing it stops it all the same.
            let _ = stop::unload(&client, name).await;
            let body = json!({ "model": name.to_string() });
            client.call(Method::DELETE, "/api/delete", Some(&body)).await?;
            output::print(&format!("deleted '{name}'\n"))?;
        }
        Ok(())
    })
}
