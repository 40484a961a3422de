//! `v4 import`.

use std::path::PathBuf;

use serde_json::json;
use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::pulling;

/// Make a model of files that are here: a GGUF file, a folder of them, or one of safetensors
///
/// Nothing is moved and nothing is asked. Where the file system has reflinks (Btrfs, XFS) the model
/// takes no space of its own; elsewhere the files are copied, or hard-linked with --link.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file or the folder; a folder of safetensors needs its config.json and tokenizer.json
    path: PathBuf,
    /// The name to make; not said is that of the file, with the quant as its tag
    name: Option<String>,
    /// Where there are no reflinks, make hard links: no copy, but the files become read-only, and
    /// once somebody changes one its model is refused
    #[arg(long)]
    link: bool,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let name = args.name.as_ref().map(|name| name.parse::<ModelName>()).transpose()?;
    let path = std::path::absolute(&args.path)
        .map_err(|source| Failure::System { what: "tell the current folder", source })?;
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let body = json!({
        "path": path,
        "model": name.map(|name| name.to_string()),
        "link": args.link,
    });
    client::runtime()?.block_on(pulling::follow(&client, "/api/import", &body))
}
