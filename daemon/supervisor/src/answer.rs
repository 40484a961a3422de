//! One request's way back: bounded deltas, then one end that always finds room.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use v4_proto::{Code, Delta, Event, Fault};

use crate::{limits, metrics::Meter};

/// The events of one request. Dropping it cancels the request.
#[derive(Debug)]
pub struct Answer {
    deltas: mpsc::Receiver<Delta>,
    /// Travels beside the deltas, so that a full buffer cannot keep the end back.
    end: Option<oneshot::Receiver<Event>>,
    load_ns: u64,
    _alive: Alive,
}

/// Held by whoever still wants the answer; its end is noticed by the other half.
pub(crate) type Alive = oneshot::Sender<std::convert::Infallible>;

impl Answer {
    /// The next event, or `None` after the one that ended the stream.
    pub async fn next(&mut self) -> Option<Event> {
        if let Some(delta) = self.deltas.recv().await {
            return Some(Event::Delta(delta));
        }
        let end = self.end.take()?.await;
        Some(end.unwrap_or_else(|_| Event::Failed(gone())))
    }

    /// Nanoseconds that the request waited for the model to be loaded; 0 where it was.
    pub fn load_ns(&self) -> u64 {
        self.load_ns
    }
}

/// What a client is told when the supervisor itself has ended.
pub(crate) fn gone() -> Fault {
    Fault::new(Code::Overloaded, "v4 is shutting down; try again when it has started")
}

/// A request is on a runner, or a load is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Begun {
    pub load_ns: u64,
}

/// The writing half: with the owner while the request waits, with a link while it runs.
#[derive(Debug)]
pub(crate) struct Route {
    /// The encoded `Generate` frame, kept until the first delta so that a fresh runner can be
    /// asked again.
    pub frame: Arc<[u8]>,
    pub deltas: mpsc::Sender<Delta>,
    pub end: oneshot::Sender<Event>,
    pub meter: Meter,
}

/// The reading half while the request waits.
#[derive(Debug)]
pub(crate) struct Waiting {
    deltas: mpsc::Receiver<Delta>,
    end: oneshot::Receiver<Event>,
}

/// Both halves of a new request.
pub(crate) fn route(frame: Vec<u8>, meter: Meter) -> (Route, Waiting) {
    let (deltas, deltas_out) = mpsc::channel(limits::EVENTS_PER_REQUEST);
    let (end, end_out) = oneshot::channel();
    let route = Route { frame: frame.into(), deltas, end, meter };
    (route, Waiting { deltas: deltas_out, end: end_out })
}

impl Waiting {
    pub fn begin(self, begun: Begun, alive: Alive) -> Answer {
        let Self { deltas, end } = self;
        Answer { deltas, end: Some(end), load_ns: begun.load_ns, _alive: alive }
    }
}
