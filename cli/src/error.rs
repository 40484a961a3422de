//! [`Failure`]: why a command ended badly, in one line that says what to do.

use std::io;
use std::path::PathBuf;

use http::StatusCode;
use v4_proto::name::NameError;

use crate::place::Target;

/// Why a command ended badly.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The daemon refused, in its own words.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// The daemon's sentence.
        message: String,
    },
    /// The daemon said in the middle of an answer that it cannot go on.
    #[error("{0}")]
    Broken(String),
    /// Nobody answers and we may not start anybody.
    #[error("no v4 daemon answers at {0}; start it there with `v4 serve`, or correct V4_HOST")]
    NobodyThere(Target),
    /// Nobody answers, and the command has no use for a fresh daemon.
    #[error("no v4 daemon is running, so no model is loaded")]
    NotRunning,
    /// The background daemon did not come up, in its own words.
    #[error("{0}")]
    Start(String),
    /// The background daemon neither came up nor ended.
    #[error("the v4 daemon did not answer within {seconds} s; its log is {}", log.display())]
    SlowStart {
        /// How long we waited.
        seconds: u64,
        /// Where the daemon writes.
        log: PathBuf,
    },
    /// The connection broke in the middle.
    #[error("the connection to the v4 daemon broke ({0}); try again, its log says more")]
    Lost(String),
    /// The daemon did not answer in time.
    #[error("the v4 daemon did not answer within {0} s; see what it does with `v4 ps`")]
    Silent(u64),
    /// A model name that cannot be one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The person stopped the answer. Its shell wants to know; the person knows.
    #[error("stopped")]
    Stopped,
    /// Something typed that cannot be meant.
    #[error("{0}")]
    Wrong(String),
    /// There is no home to put anything in.
    #[error("this user has no home directory; say where v4 may live with V4_HOME=/some/folder")]
    Homeless,
    /// The standard output cannot be written.
    #[error("cannot write the output: {0}")]
    Output(io::Error),
    /// Whoever read our output has left, as `head` does. Not worth a word.
    #[error("the reader of the output left")]
    ReaderLeft,
    /// A file that the person named cannot be read or written.
    #[error("cannot use {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The standard input cannot be read.
    #[error("cannot read the input: {0}")]
    Input(io::Error),
    /// The system refused something basic.
    #[error("cannot {what}: {source}")]
    System {
        /// What we tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The daemon itself ended badly.
    #[error("{0}")]
    Daemon(String),
    /// Another daemon has the home, in the daemon's words.
    #[error("{0}")]
    HomeTaken(String),
}

impl Failure {
    /// A failure of writing output, where a closed pipe is an ordinary end.
    pub fn output(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Failure::ReaderLeft
        } else {
            Failure::Output(error)
        }
    }

    /// Whether the daemon said that there is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Failure::Refused { status: StatusCode::NOT_FOUND, .. })
    }
}
