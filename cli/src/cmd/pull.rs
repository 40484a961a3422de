//! `v4 pull`.

use std::path::{Path, PathBuf};

use http::Method;
use serde_json::json;
use v4_proto::{ModelName, name::Reference};

use crate::client::{self, Client, IfAbsent};
use crate::cmd::{World, lock};
use crate::error::Failure;
use crate::output;
use crate::place::Place;
use crate::pulling;

/// Fetch a model, or make sure that it is whole and current
///
/// A name is looked up in the library of v4, then in the registry registry.ollama.ai. With a host
/// in front, as in ghcr.io/me/model or localhost:5000/me/model, it comes from that registry, and
/// hf:USER/REPOSITORY[@REVISION][:QUANT] is a repository of Hugging Face; `safetensors` in place of
/// a quant takes its safetensors. What is broken off goes on where it was with the next pull.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model, for example smollm2 or gemma3:270m
    #[arg(required_unless_present = "locked")]
    model: Option<String>,
    /// Only the very models that a lock file names, all of them unless one is said
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = lock::FILE)]
    locked: Option<PathBuf>,
    /// Bytes a second at most, for example 2M or 500K
    #[arg(long, value_name = "RATE")]
    limit_rate: Option<String>,
    /// Let the daemon go on alone; `v4 pulls` shows it
    #[arg(long)]
    detach: bool,
    /// Another v4 that may have it, as http://HOST:PORT; may be said more than once
    #[arg(long = "peer", value_name = "URL")]
    peers: Vec<String>,
    /// Talk plain HTTP to a registry that is not on this machine
    #[arg(long)]
    insecure: bool,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let mut wanted = Vec::new();
    if let Some(model) = &args.model {
        let Reference { name, .. } = model.parse()?;
        wanted.push((model.clone(), name, None));
    }
    if let Some(file) = &args.locked {
        wanted = locked(file, wanted.pop().map(|(_, name, _)| name).as_ref())?;
    }
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    client::runtime()?.block_on(async {
        for (model, name, digest) in wanted {
            let body = json!({
                "model": model,
                "locked": digest,
                "limit_rate": args.limit_rate,
                "insecure": args.insecure,
                "peers": args.peers,
                "detach": args.detach,
                "stream": !args.detach,
            });
            if !args.detach {
                pulling::follow(&client, "/api/pull", &body).await?;
                continue;
            }
            client.call(Method::POST, "/api/pull", Some(&body)).await?;
            output::print(&format!("pulling '{name}' in the background; see `v4 pulls`\n"))?;
        }
        Ok(())
    })
}

/// What is pulled: as it was typed, its name, and the digest that it must have.
type Wanted = (String, ModelName, Option<String>);

/// The models of a lock file, or the one that is asked for.
fn locked(file: &Path, only: Option<&ModelName>) -> Result<Vec<Wanted>, Failure> {
    let mut found = Vec::new();
    for (model, entry) in lock::read(file)? {
        let name: ModelName = model.parse()?;
        if only.is_none_or(|only| only.matches(&name)) {
            let digest = entry["digest"].as_str().unwrap_or_default().to_owned();
            found.push((model, name, Some(digest)));
        }
    }
    match only {
        Some(name) if found.is_empty() => {
            Err(Failure::Wrong(format!("{} does not have '{name}'", file.display())))
        }
        _ => Ok(found),
    }
}
