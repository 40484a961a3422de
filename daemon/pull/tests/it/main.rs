//! Pulls over loopback, from servers that behave and servers that do not.

// A test that fails may panic, wherever it does.
#![allow(missing_docs, clippy::unwrap_used)]

mod archive;
// Shared with the store's tests, which use the rest of it.
#[allow(dead_code)]
#[path = "../../../store/tests/it/fault_fs.rs"]
mod fault_fs;
mod hf;
mod http;
mod jobs;
mod kill;
mod push;
mod pypi;
mod ranges;
mod registry;
mod server;
mod signature;
mod team;
mod world;
