//! The harness of the process tests.
//!
//! **Owns** temporary homes, real daemons on free ports, a small HTTP client, a loopback package
//! index that can misbehave, a loopback registry that counts, and models made on the spot.
//!
//! **Never** reaches into a process: it sees what a user sees. Nothing in the product knows of it.
//!
//! **Start reading at** [`daemon::Daemon`].

#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::missing_panics_doc,
    clippy::print_stdout,
    reason = "tests read files, print, and panic when something is not as it must be"
)]

pub mod daemon;
pub mod home;
pub mod http;
pub mod index;
pub mod process;
pub mod random;
pub mod registry;
pub mod wheel;

use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long anything in a test may take. Slow machines are slow; hanging for ever is a failure.
pub const DEADLINE: Duration = Duration::from_mins(1);

/// How long a pull of a real model may take.
pub const LONG_DEADLINE: Duration = Duration::from_mins(10);

/// The folder of golden files.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}
