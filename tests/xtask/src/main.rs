//! The project's own tasks, in Rust: `cargo xtask ci`, `bench`, `soak`, `logits`, `bindings`,
//! `golden`.
//!
//! **Owns** what a developer runs by hand and what `.ci/run` calls.
//!
//! **Never** is part of the shipped binary, and no test depends on it.
//!
//! **Start reading at** [`Task`], then the file of that name.

#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a developer's tool reads files, the environment and prints"
)]

mod bench;
mod bindings;
mod ci;
mod device;
mod golden;
mod kernels;
mod logits;
mod soak;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Tasks of the v4 repository")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Every check of the repository: formatting, lints, house rules, bindings, real models.
    Ci(ci::Args),
    /// Measure a model file: prefill and decode tokens/s beside what this machine can do.
    Bench(bench::Args),
    /// Write the logits of given token ids, to hold the engine against any reference.
    Logits(logits::Args),
    /// Kill the daemon at random moments and look at what is left.
    Soak(soak::Args),
    /// Remake kernels-c/src/ffi.rs with bindgen (needs libclang), or compare with --check.
    Bindings(bindings::Args),
    /// Remake the pages that are made from the code, or compare with --check.
    Golden(golden::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Ci(args) => ci::run(args),
        Task::Bench(args) => bench::run(args),
        Task::Logits(args) => logits::run(args),
        Task::Soak(args) => soak::run(&args),
        Task::Bindings(args) => bindings::run(args),
        Task::Golden(args) => golden::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}
