//! What is counted, of all parts of the daemon.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use http::Method;
use v4_store::Usage;
use v4_supervisor::Figures;

use crate::{daemon::Daemon, ops::care};

/// What stands for a path that is no route, and for a method that none has.
pub const OTHER: &str = "other";

/// What requests are counted by. All three are from closed lists, so a client cannot make more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asked {
    /// The method.
    pub method: &'static str,
    /// The path of the route.
    pub route: &'static str,
    /// The status of the answer.
    pub status: u16,
}

/// How often what was asked. The lock is taken once a request, for one addition.
#[derive(Debug, Default)]
pub struct Requests(Mutex<BTreeMap<Asked, u64>>);

impl Requests {
    /// Counts one.
    pub fn count(&self, method: &Method, route: &'static str, status: u16) {
        let known = [
            Method::GET,
            Method::HEAD,
            Method::POST,
            Method::PUT,
            Method::PATCH,
            Method::DELETE,
            Method::OPTIONS,
        ];
        let words = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
        let word = known.iter().position(|one| one == method).map_or(OTHER, |at| words[at]);
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(Asked { method: word, route, status }).or_default() += 1;
    }

    fn read(&self) -> Vec<(Asked, u64)> {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|(asked, n)| (*asked, *n)).collect()
    }
}

/// All figures at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Models and memory.
    pub figures: Figures,
    /// Requests since the start.
    pub requests: Vec<(Asked, u64)>,
    /// The disk; `None` where the store could not be read.
    pub usage: Option<Usage>,
    /// Pulls that run.
    pub n_pulls: usize,
    /// Bytes that pulls took since the start.
    pub pull_bytes: u64,
    /// Spans that no collector got.
    pub spans_dropped: u64,
}

/// Reads everything. That the store cannot be read is in the log and costs its figures alone.
pub async fn read(daemon: &Daemon) -> Snapshot {
    Snapshot {
        figures: daemon.supervisor.figures().await,
        requests: daemon.requests.read(),
        usage: care::usage(daemon).await.ok(),
        n_pulls: daemon.jobs.list().len(),
        pull_bytes: daemon.jobs.bytes(),
        spans_dropped: daemon.exporter.as_ref().map_or(0, |exporter| exporter.dropped()),
    }
}
