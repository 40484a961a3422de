//! What a client sees of the daemon: many answers at once, an answer beside a long prompt, a swap,
//! a conversation that comes back, the cost of the way through the daemon, connections that idle.
//!
//! Every part starts daemons of its own in homes of its own and speaks HTTP with them, as clients
//! do. `llama-server` is asked the same on the same files where its folder is named. Prompts are
//! words without sense, new ones for each answer, so that no engine has read one before.

mod ask;
mod back;
mod idle;
mod overhead;
mod server;
mod stall;
mod streams;
mod swap;

use std::path::PathBuf;

use serde_json::Value;

use self::server::{Engine, Server};

/// What is measured of which models.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The models: GGUF files. Swaps go between the first two, all else is measured with the first.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// What to measure; not said is all.
    #[arg(long, value_delimiter = ',')]
    parts: Vec<Part>,
    /// The folder of `llama-server`, to be asked the same.
    #[arg(long)]
    llama: Option<PathBuf>,
    /// Threads of each engine; 0 is a thread a core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Times each is measured; the medians are said.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    reps: u32,
    /// Tokens of the long prompts.
    #[arg(long, default_value_t = 16_000)]
    long: usize,
    /// Print JSON, an object a figure.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Eight answers at once on four and on eight sequences.
    Streams,
    /// Short prompts and a running answer beside a long prompt.
    Stall,
    /// Two models of which one fits.
    Swap,
    /// A long conversation after an unload, a kill and a restart.
    Return,
    /// One answer through the daemon and by the engine alone.
    Overhead,
    /// A thousand connections that ask nothing.
    Idle,
}

/// All parts, in the order in which they are measured.
const PARTS: [Part; 6] =
    [Part::Streams, Part::Stall, Part::Swap, Part::Return, Part::Overhead, Part::Idle];

impl Args {
    fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        if self.threads == 0 { cores() } else { self.threads }
    }

    /// Ours, then the peer if it is named.
    fn engines(&self) -> Vec<Engine> {
        let peer = self.llama.iter().map(|folder| Engine::Llama(folder.clone()));
        std::iter::once(Engine::V4).chain(peer).collect()
    }

    /// Starts a server of the first model.
    fn server(&self, engine: &Engine, slots: usize, context: usize) -> Result<Server, String> {
        Server::start(engine, &self.files[0], self.threads(), (slots, context))
    }

    /// Says a figure.
    fn say(&self, text: &str, value: &Value) {
        if self.json {
            println!("{value}");
        } else {
            println!("{text}");
        }
    }
}

/// Measures and prints.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    for part in PARTS {
        if !args.parts.is_empty() && !args.parts.contains(&part) {
            continue;
        }
        match part {
            Part::Streams => streams::run(args)?,
            Part::Stall => stall::run(args)?,
            Part::Swap => swap::run(args)?,
            Part::Return => back::run(args)?,
            Part::Overhead => overhead::run(args)?,
            Part::Idle => idle::run(args)?,
        }
    }
    Ok(())
}
