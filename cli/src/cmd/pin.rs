//! `v4 pin`.

use http::Method;
use serde_json::{Value, json};
use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::output;
use crate::place::Place;

/// List the models that no quota removes, or pin models so
///
/// A quota is set with `V4_QUOTA`; `V4_QUOTA_EVICT=on` lets a pull that needs more remove models.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The models
    #[arg(value_name = "MODEL", required_if_eq("remove", "true"))]
    models: Vec<String>,
    /// Take their pins away
    #[arg(long)]
    remove: bool,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let names: Vec<ModelName> =
        args.models.iter().map(|model| model.parse()).collect::<Result<_, _>>()?;
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    client::runtime()?.block_on(async {
        for name in &names {
            let body = json!({ "model": name.to_string(), "pinned": !args.remove });
            client.call(Method::POST, "/api/pins", Some(&body)).await?;
        }
        if names.is_empty() {
            let answer = client.call(Method::GET, "/api/pins", None).await?;
            let pins = answer["models"].as_array().into_iter().flatten().filter_map(Value::as_str);
            output::print(&pins.map(|pin| format!("{pin}\n")).collect::<Vec<_>>().concat())?;
        }
        Ok(())
    })
}
