//! What a pull says of itself while it runs.

use v4_proto::{Digest, Fault};

/// What a pull is doing.
#[derive(Debug, Clone, PartialEq)]
pub enum Stage {
    /// Finding out what to fetch.
    Manifest,
    /// Fetching the file of this number in [`Progress::files`].
    File(usize),
    /// Waiting: it was told to, or for the reason that is said.
    Paused(Option<String>),
    /// Reading the model's header in a process of its own.
    Verifying,
    /// Making the name point to it.
    Writing,
    /// The name is there.
    Done {
        /// The digest of its manifest.
        digest: Digest,
        /// Why this build cannot run it, where that is so; it is kept all the same.
        unsupported: Option<String>,
    },
    /// Another daemon goes on with it.
    Moved,
    /// It failed; what came so far is kept for the next try.
    Failed(Fault),
}

/// How far one file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileProgress {
    /// The digest it must have, where that is known.
    pub digest: Option<Digest>,
    /// Bytes in all, where that is known.
    pub total: Option<u64>,
    /// Bytes that are here. Never goes backwards.
    pub completed: u64,
    /// Whether it is in the store, checked.
    pub is_done: bool,
    /// Who sends it, once somebody does: a host, or `this machine`.
    pub source: Option<String>,
}

/// How far a pull is: all of it, so that whoever comes late or looks seldom misses nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// All files, in the order of the recipe; empty until they are known.
    pub files: Vec<FileProgress>,
    /// What a person should know though the pull goes on, such as a peer that wants a key. Each is
    /// there once.
    pub notes: Vec<String>,
}

impl Progress {
    /// At the start.
    pub(crate) fn first() -> Self {
        Self { stage: Stage::Manifest, files: Vec::new(), notes: Vec::new() }
    }

    /// Whether nothing will change any more.
    pub fn is_last(&self) -> bool {
        matches!(self.stage, Stage::Done { .. } | Stage::Moved | Stage::Failed(_))
    }
}
