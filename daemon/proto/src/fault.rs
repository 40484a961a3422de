//! [`Fault`]: what crosses a process boundary or reaches a client when something went wrong.

use serde::{Deserialize, Serialize};

/// What kind of thing went wrong. The list is closed: a new entry does not compile until
/// `server::error` has given it a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The model, blob or route asked for does not exist.
    NotFound,
    /// The request cannot be understood or contradicts itself.
    Invalid,
    /// A key is wanted, and none that is known came with the request.
    Unauthorized,
    /// The key is known, but its scope does not reach so far.
    Forbidden,
    /// The prompt does not fit the model's context.
    ContextOverflow,
    /// The queue of this model is full; come back later.
    Overloaded,
    /// The model does not fit the memory there is.
    OutOfMemory,
    /// The file or the wish is understood but not supported.
    Unsupported,
    /// Stored or received bytes are not what they must be.
    Corrupt,
    /// The model's process ended in the middle of the work.
    RunnerDied,
    /// The client did not take its events.
    SlowClient,
    /// The client left, or somebody stopped the work.
    Cancelled,
    /// A source on the network failed.
    Upstream,
    /// The local disk failed or is full.
    Disk,
    /// Our own mistake.
    Internal,
}

impl Code {
    /// Every code, for tables and tests.
    pub const ALL: [Code; 15] = [
        Code::NotFound,
        Code::Invalid,
        Code::Unauthorized,
        Code::Forbidden,
        Code::ContextOverflow,
        Code::Overloaded,
        Code::OutOfMemory,
        Code::Unsupported,
        Code::Corrupt,
        Code::RunnerDied,
        Code::SlowClient,
        Code::Cancelled,
        Code::Upstream,
        Code::Disk,
        Code::Internal,
    ];
}

/// A failure fit for a stranger: a code from a closed list and one sentence that says what to do.
/// The chain of causes stays in the log of the process where it happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// What kind of thing went wrong.
    pub code: Code,
    /// One clear sentence for a person.
    pub message: String,
}

impl Fault {
    /// A fault of `code` with its sentence.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The request cannot be understood.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::Invalid, message)
    }

    /// Our own mistake.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }
}
