//! The store as its users see it: what it keeps, what it refuses, and what is left of it when the
//! process or the machine stops.

// A test that fails may panic, wherever it does.
#![allow(missing_docs, clippy::unwrap_used)]

mod behaviour;
mod crash;
// Shared with the tests of v4-pull, which use the rest of it.
#[allow(dead_code)]
mod fault_fs;
mod index;
mod keep;
mod memory_fs;
mod power;
mod story;
