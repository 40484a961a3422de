//! What an operation does, in domain words; no dialect.

pub mod blobs;
pub mod care;
pub mod create;
pub mod generate;
pub mod import;
pub mod metrics;
pub mod models;
pub mod plan;
pub mod ps;
pub mod pull;
