//! `v4`, the one binary: a thin HTTP client of the daemon, and the daemon itself behind `serve`.
//!
//! **Owns** what a person types and reads: commands, tables, progress, the chat prompt; and
//! starting a daemon in the background when a command needs one.
//!
//! **Never** touches the store, a model file or a runner. Only `cmd/serve.rs` and `cmd/runner.rs`
//! name the daemon.
//!
//! **Start reading at** [`cmd`], the list of commands, then `cmd/run.rs`.

#![forbid(unsafe_code)]

mod answer;
mod client;
mod cmd;
mod error;
mod files;
mod help;
mod human;
mod output;
mod place;
mod pulling;
mod repl;
mod start;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;

use crate::cmd::World;
use crate::error::Failure;

/// What a shell expects of a program that Ctrl-C ended: 128 and the number of the signal.
const STOPPED: u8 = 130;
/// What a shell expects of a program that was called wrongly.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let matched = match help::command().try_get_matches() {
        Ok(matched) => matched,
        Err(error) => {
            let asked = [ErrorKind::DisplayHelp, ErrorKind::DisplayVersion].contains(&error.kind());
            // A reader that left early has seen enough.
            let _ = error.print();
            return if asked { ExitCode::SUCCESS } else { ExitCode::from(USAGE) };
        }
    };
    match cmd::run(&matched, &World { variable }) {
        Ok(()) | Err(Failure::ReaderLeft) => ExitCode::SUCCESS,
        Err(Failure::Stopped) => ExitCode::from(STOPPED),
        Err(failure) => {
            output::note(&format!("error: {failure}"));
            match failure {
                Failure::HomeTaken(_) => ExitCode::from(start::TAKEN),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// The only look at the environment in this crate.
#[expect(clippy::disallowed_methods, reason = "this is the place it is read at")]
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}
