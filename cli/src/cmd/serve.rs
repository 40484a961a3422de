//! `v4 serve`: the daemon itself.

use std::error::Error as _;
use std::path::PathBuf;

use v4_daemon::ServeError;

use crate::cmd::World;
use crate::error::Failure;

/// Run the daemon in this terminal
///
/// Other commands start one in the background by themselves; this is for a service manager, or to
/// watch the log.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to serve HTTP: an address, a port (0 takes any free one), or off
    ///
    /// Without it, `V4_LISTEN` says where, else it is 127.0.0.1:11434.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Where models are kept
    ///
    /// Without it, `V4_HOME` says where, else it is ~/.v4.
    #[arg(long, value_name = "FOLDER")]
    home: Option<PathBuf>,
    /// Write the log to a file in the home instead of the standard error
    #[arg(long)]
    background: bool,
    /// Take the place of the daemon that runs on this home, with somebody listening all the time
    ///
    /// It gives up its sockets and its home when nobody uses them, and ends when its last answer
    /// has ended. Where that is not possible it serves on, and this one says why. Where none runs,
    /// this one just serves.
    #[arg(long)]
    replace: bool,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let given = v4_daemon::Given {
        home: args.home.clone(),
        listen: args.listen.clone(),
        background: args.background,
        replace: args.replace,
    };
    let config = v4_daemon::Config::load(&given, world.variable).map_err(failure)?;
    v4_daemon::serve(config).map_err(failure)
}

fn failure(error: ServeError) -> Failure {
    let words = with_causes(&error);
    match error {
        // Of what keeps a store from opening, only another daemon's lock has no cause beneath it.
        ServeError::Store(store) if store.source().is_none() => Failure::HomeTaken(words),
        _ => Failure::Daemon(words),
    }
}

/// An error and what caused it, on one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // A transparent error repeats its source's words.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
