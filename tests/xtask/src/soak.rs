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
    /// The daemon has clients that hang up, models that do not fit together and runners that die.
    Serve {
        /// How long.
        #[arg(long, default_value_t = 30)]
        minutes: u32,
    },
}

/// Runs the test of that name with more rounds.
///
/// # Errors
/// It failed.
pub fn run(args: &Args) -> Result<(), String> {
    let (filter, variable, value) = match args.part {
        Part::Store { kills } => ("soak::", "V4_SOAK_KILLS", kills),
        Part::Serve { minutes } => ("storm::", "V4_STORM_SECONDS", 60 * minutes),
    };
    must(Command::new(env!("CARGO")).args(["build", "--package", "v4"]).current_dir(ROOT))?;
    let test = ["test", "--package", "v4-tests", "--test", "it", filter, "--", "--nocapture"];
    let mut command = Command::new(env!("CARGO"));
    must(command.args(test).env(variable, value.to_string()).current_dir(ROOT))
}
