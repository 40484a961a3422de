//! The surfaces: each turns a dialect's bytes into what is asked and what happens into its bytes.
//! Pure: no input or output, the time is an argument.

pub mod clock;
pub mod json;
pub mod keep_alive;
pub mod ollama;
pub mod openai;
pub mod prometheus;
#[cfg(test)]
mod transcripts;
pub mod turns;

use jiff::Timestamp;
use v4_proto::{Delta, Fault};

use crate::ops::{
    generate::{End, Settled},
    models::Wanted,
};

/// Writes one answer in a dialect. Streamed: any number of `delta`, then `end` or `failed`. Else
/// one `whole`.
pub trait Encode: Send {
    /// The content type of a stream.
    fn stream_type(&self) -> &'static str;
    /// More of the answer; may be empty.
    fn delta(&mut self, delta: Delta, now: Timestamp) -> Vec<u8>;
    /// The end of a stream.
    fn end(&mut self, end: &End, now: Timestamp) -> Vec<u8>;
    /// The end of a stream for a reason that is not the model's.
    fn failed(&mut self, fault: &Fault) -> Vec<u8>;
    /// The answer in one piece, all deltas joined.
    fn whole(&mut self, all: Delta, end: &End, now: Timestamp) -> Vec<u8>;
    /// The answer to a request that asked for no text.
    fn settled(&mut self, settled: Settled, now: Timestamp) -> Vec<u8>;
}

/// A value as one line of JSON.
pub fn line(value: &impl serde::Serialize) -> Vec<u8> {
    let mut bytes = self::bytes(value);
    bytes.push(b'\n');
    bytes
}

/// A value as JSON.
pub fn bytes(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("the answer types have text keys and no fallible fields")
}

/// A model by the name that a client wrote.
///
/// # Errors
/// `invalid` when it is missing or no name.
pub fn wanted(text: Option<&str>) -> Result<Wanted, Fault> {
    let text = text.map(str::trim).filter(|text| !text.is_empty());
    let text = text.ok_or_else(|| Fault::invalid("model is required"))?;
    let name = text.parse();
    let name = name.map_err(|error| Fault::invalid(format!("invalid model name: {error}")))?;
    Ok(Wanted { name, text: text.to_owned() })
}
