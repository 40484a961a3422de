//! What can go wrong between the supervisor and a runner's process.

use std::{io, time::Duration};

use v4_proto::{Code, Fault, frame::FrameError};

/// Why a runner could not be started, spoken with, or is gone.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process could not be started.
    #[error("a runner could not be started from {exe}")]
    Spawn {
        /// The executable.
        exe: String,
        /// Why.
        source: io::Error,
    },
    /// The socket failed.
    #[error("the socket of a runner failed")]
    Socket(#[source] io::Error),
    /// The runner sent bytes that are not a frame.
    #[error("a runner sent what is not a frame")]
    Frame(#[from] FrameError),
    /// The first frame was not a `Hello` of our protocol and build.
    #[error("a runner speaks protocol {protocol} of build {build:?}, not ours")]
    Handshake {
        /// Its protocol number.
        protocol: u32,
        /// Its build.
        build: String,
    },
    /// A frame came where it has no place.
    #[error("a runner sent a frame out of place: {0}")]
    OutOfPlace(&'static str),
    /// The runner did not do something in time.
    #[error("a runner did not {what} within {limit:?}")]
    TooLate {
        /// What.
        what: &'static str,
        /// The bound.
        limit: Duration,
    },
    /// The process ended by itself.
    #[error("a runner ended: {0}")]
    Ended(String),
    /// The runner said that it cannot go on.
    #[error("a runner gave up: {0}")]
    Fatal(Fault),
}

impl Error {
    /// What a client is told.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Fatal(fault) => fault.clone(),
            Self::Spawn { .. } => Fault::internal(
                "v4 could not start a process for the model; the daemon's log says why",
            ),
            _ => Fault::new(
                Code::RunnerDied,
                "the model's process ended; the daemon's log has its last lines",
            ),
        }
    }
}
