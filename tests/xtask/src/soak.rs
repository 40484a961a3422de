//! `cargo xtask soak`: tests that choose random moments, for longer than a test may take.

use std::process::Command;

use crate::{ROOT, ci::must};

/// What is soaked.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, clap::Subcommand)]
enum Part {
    /// The daemon is killed in pulls, at commits, in prunes and in repairs.
    Store {
        /// How often.
        #[arg(long, default_value_t = 200)]
        kills: u32,
    },
}

/// Runs the test of that name with more rounds.
///
/// # Errors
/// It failed.
pub fn run(args: &Args) -> Result<(), String> {
    let Part::Store { kills } = args.part;
    must(Command::new(env!("CARGO")).args(["build", "--package", "v4"]).current_dir(ROOT))?;
    let test = ["test", "--package", "v4-tests", "--test", "it", "soak::", "--", "--nocapture"];
    let mut command = Command::new(env!("CARGO"));
    must(command.args(test).env("V4_SOAK_KILLS", kills.to_string()).current_dir(ROOT))
}
