//! The Modelfile language, and the library of models that ships with v4.
//!
//! **Owns** the grammar ([`Modelfile`]: read, checked, written back) and the library ([`library`]):
//! a Modelfile a model name, with the places it can be pulled from, their digests, licence and
//! parameters.
//!
//! **Never** opens a file, asks a network or knows what an engine can do.
//!
//! **Start reading at** [`Directive`], then `modelfiles/README.md` for the language itself.

#![forbid(unsafe_code)]

mod directive;
pub mod library;
mod modelfile;
mod parameter;
mod parse;

pub use directive::{Directive, MessageRole};
pub use modelfile::{File, Modelfile};
pub use parameter::{Parameter, Value};
pub use parse::{LIMIT_BYTES, ParseError, Problem};
