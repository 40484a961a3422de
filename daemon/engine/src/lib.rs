//! Bytes to tokens, tokens to logits, logits to text.
//!
//! **Owns** the formats of model files, the architectures, tokenizers, chat dialects, sampling, the
//! KV blocks and the loop that steps sequences.
//!
//! **Never** opens a socket, reads a path it was not given, or knows a request's surface (Ollama,
//! OpenAI). Arithmetic lives behind [`v4_kernels::Device`].
//!
//! **Start reading at** [`model::Model`], then [`step`], then [`arch`].

#![forbid(unsafe_code)]

pub mod arch;
mod devices;
pub mod dialect;
mod error;
pub mod format;
mod inspect;
pub mod kv;
mod layers;
mod limits;
pub mod load;
pub mod model;
pub mod prepare;
pub mod sample;
pub mod schedule;
pub mod speculate;
pub mod step;
pub mod text;
pub mod tokenizer;
mod weights;

pub use devices::devices;
pub use error::Error;
pub use inspect::inspect;
