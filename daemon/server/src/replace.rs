//! One daemon takes the place of another without a moment in which nobody listens (`v4 serve
//! --replace`).
//!
//! The new one asks the old one, over its unix socket, to meet it at a socket of its own. There the
//! old one offers its listeners, as descriptors that both then have; a connection that comes while
//! neither accepts waits in the system. The lock of the home says whose turn it is: the old one
//! gives it back when nobody uses the store, the new one takes it. Until the new one has said that
//! it serves, the old one takes everything up again when it hears no more of it.
//!
//! | from the old one | from the new one |
//! |---|---|
//! | `Offer`, with the listeners | `Ready` |
//! | `Released`: the home is free | `Serving`: it accepts |
//! | `Memory`, `Connection`, until its last answer has ended | |
//!
//! A connection that is idle changes over too: its client does not notice. Nothing is written here
//! that a version must keep: a different [`PROTOCOL`] is refused before anything was touched.

mod channel;
mod client;
pub mod give;
pub mod relay;
pub mod take;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

pub use channel::Channel;

/// What the two say to each other. Changes with each change of a message.
pub const PROTOCOL: u32 = 1;

/// What a new daemon asks for at `/api/replace`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`PROTOCOL`] of the new one.
    pub protocol: u32,
    /// The home that it will serve.
    pub home: String,
    /// Its process, which is in the name of its socket.
    pub pid: u32,
}

/// What is said at the new one's socket, a packet a message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// The listeners are with this packet: the unix socket's, then that of TCP.
    Offer {
        /// The version of the old one.
        version: String,
        /// Where it serves TCP.
        tcp: Option<SocketAddr>,
        /// Bytes that models may take.
        budget_bytes: u64,
        /// Whether the unix socket is a service manager's, so that its file stays.
        keeps_socket: bool,
    },
    /// The new one has all it needs but the home.
    Ready,
    /// The home is free.
    Released(Estate),
    /// The new one accepts connections; the old one does not any more.
    Serving,
    /// Bytes that the old one's models hold.
    Memory {
        /// How many.
        bytes: u64,
    },
    /// A connection is with this packet, and after the message what was read of it.
    Connection {
        /// Whether it is one of TCP.
        is_tcp: bool,
    },
    /// The handover ends here, and why.
    Stopped {
        /// A sentence.
        why: String,
    },
}

/// What the old one leaves.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Estate {
    /// Bytes that its models hold.
    memory_bytes: u64,
    /// The models that are loaded, the one used last first.
    models: Vec<String>,
    /// Pulls that the new one goes on with.
    pulls: Vec<v4_pull::Order>,
}

/// Why a handover ended early.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The other side said why.
    #[error("{0}")]
    Said(String),
    /// The other side left.
    #[error("the other v4 hung up before it {0}")]
    HungUp(&'static str),
    /// The other side said nothing.
    #[error("the other v4 did not {what} within {seconds} s")]
    Late {
        /// What it should have done.
        what: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// What it says cannot be understood.
    #[error("the other v4 said something out of place: {0}")]
    OutOfPlace(String),
    /// The socket between the two failed.
    #[error("the socket between the old v4 and the new one failed: {0}")]
    Socket(#[from] std::io::Error),
    /// The home cannot be used.
    #[error(transparent)]
    Store(#[from] v4_store::StoreError),
}
