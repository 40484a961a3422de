//! The surface of OpenAI's clients: JSON, streams of server-sent events.

pub mod completions;
pub mod decode;
pub mod encode;
pub mod listing;

/// The content type of a stream.
pub const STREAM_TYPE: &str = "text/event-stream";

/// The content type of everything else.
pub const JSON_TYPE: &str = "application/json";
