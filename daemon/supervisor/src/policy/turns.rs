//! Whose turn it is within the queue of one model.
//!
//! A caller's turn comes by when it was last served, or when it asked if that was later, so one
//! that asks a hundred times waits behind one that asks once. It cannot be kept waiting by
//! newcomers, be they ever so many: their time to wait begins when they ask.

use std::collections::{BTreeMap, VecDeque};

use super::{Caller, Pending, Runner, Time};
use crate::limits;

/// When each caller was last served, as far as it matters to one that waits.
#[derive(Debug, Clone, Default)]
pub(super) struct Turns(BTreeMap<Caller, Time>);

impl Turns {
    /// Takes the ask whose turn it is out of `queue`, of those that `may` go to the runner now.
    pub fn next(
        &self,
        queue: &mut VecDeque<Pending>,
        runner: &Runner,
        may: impl Fn(&Pending) -> bool,
    ) -> Option<Pending> {
        let those = (0..queue.len()).filter(|at| may(&queue[*at]));
        let at = those.min_by_key(|at| self.place(&queue[*at], runner))?;
        queue.remove(at)
    }

    /// What the asks of a queue are ordered by.
    fn place(&self, pending: &Pending, runner: &Runner) -> (Time, Time, u64) {
        let caller = &pending.ask.caller;
        let served = self.0.get(caller).copied().unwrap_or_default();
        let running = runner.running.values().filter(|other| other.ask.caller == *caller);
        let n_running = u32::try_from(running.count()).unwrap_or(u32::MAX);
        let set_back = limits::RUNNING_SETS_BACK.saturating_mul(n_running);
        let turn = pending.turn();
        (turn.max(served).saturating_add(set_back), turn, pending.ask.id)
    }

    /// Books that a caller was served.
    pub fn served(&mut self, caller: &Caller, now: Time) {
        self.0.insert(caller.clone(), now);
    }

    /// Forgets what is older than all who wait.
    pub fn forget(&mut self, queue: &VecDeque<Pending>) {
        match queue.iter().map(Pending::turn).min() {
            Some(oldest) => self.0.retain(|_, at| *at > oldest),
            None => self.0.clear(),
        }
    }
}
