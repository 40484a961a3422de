//! The list of commands. Each is a file with `Args` (whose first comment is its help) and `run`.

use clap::{Args as _, Command, FromArgMatches as _};

use crate::error::Failure;
use crate::place::Variable;

/// What a command is given beside its arguments.
pub struct World {
    /// How to look up an environment variable.
    pub variable: Variable,
}

/// Declares the commands, in the groups and the order that `--help` shows them in.
macro_rules! commands {
    ($($group:literal { $($name:ident),* $(,)? })*) => {
        $($(pub mod $name;)*)*

        /// The groups of `--help` and the commands in each. The group without a title is hidden.
        pub const GROUPS: &[(&str, &[&str])] = &[$(($group, &[$(stringify!($name)),*])),*];

        /// Adds every command to `cli`.
        pub fn declare(cli: Command) -> Command {
            cli$($(.subcommand(
                $name::Args::augment_args(Command::new(stringify!($name)))
                    .hide($group.is_empty())
            ))*)*
        }

        /// Runs the command that was matched.
        ///
        /// # Errors
        /// The command's own.
        pub fn run(matched: &clap::ArgMatches, world: &World) -> Result<(), Failure> {
            match matched.subcommand() {
                $($(Some((stringify!($name), matched)) => {
                    let args = $name::Args::from_arg_matches(matched)
                        .map_err(|error| Failure::Wrong(error.to_string()))?;
                    $name::run(&args, world)
                })*)*
                _ => unreachable!("clap demands one of the declared commands"),
            }
        }
    };
}

commands! {
    "Use a model" { run, ps, plan, why, stop }
    "Keep models" { pull, pulls, import, list, show, cp, create, push, lock, rm, restore }
    "Look after models" { du, fsck, pin, prune, roots }
    "Serve" { serve, config, keys }
    "" { runner }
}
