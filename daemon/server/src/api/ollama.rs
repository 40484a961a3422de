//! The surface of Ollama's own clients: JSON, streams of one JSON object a line.

pub mod decode;
pub mod encode;
pub mod listing;
pub mod plan;
pub mod show;

/// The version that clients are told at `/api/version`: the level of Ollama's interface that this
/// surface answers as. Some agents refuse to talk to less than 0.13.4.
pub const COMPATIBLE_WITH: &str = "0.34.0";

/// The content type of a stream.
pub const STREAM_TYPE: &str = "application/x-ndjson";

/// The content type of everything else.
pub const JSON_TYPE: &str = "application/json; charset=utf-8";
