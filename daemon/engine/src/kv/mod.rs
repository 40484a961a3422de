//! Which blocks of the KV cache hold which tokens of which sequence.

pub mod blocks;
pub mod prefix;
