//! Which blocks of the KV cache hold which tokens of which sequence, and those that are kept on
//! disk.

pub mod blocks;
pub mod chain;
pub mod disk;
mod files;
pub mod prefix;
