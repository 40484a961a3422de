//! Every test that needs more than one crate or a real process, in one binary.

#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "tests read files and the environment, and say what they skip"
)]

mod bad_input;
mod chat;
mod cli;
mod config;
mod crash;
mod gpus;
mod keep;
mod metrics;
mod peer;
mod persist;
mod pull;
mod real;
mod replace;
mod serve;
mod soak;
mod storm;
mod text;
mod tidy;
