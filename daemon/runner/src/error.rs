//! Why a runner ends other than in order.

use std::io;

use v4_proto::{Fault, frame::FrameError};

/// Why a runner ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Standard input is not the daemon's socket.
    #[error(
        "`v4 runner` is started by `v4 serve`, with a socket as its standard input; run `v4 serve`"
    )]
    NotASocket(#[source] io::Error),
    /// The socket failed.
    #[error("the socket to the daemon failed: {0}")]
    Socket(#[source] io::Error),
    /// The daemon sent bytes that are not a frame.
    #[error("the daemon sent what is not a frame: {0}")]
    Frame(#[from] FrameError),
    /// A thread could not be started.
    #[error("a thread could not be started: {0}")]
    Thread(#[source] io::Error),
    /// The load failed or the engine broke; the daemon has been told.
    #[error("{0}")]
    Fatal(Fault),
}
