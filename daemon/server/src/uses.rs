//! [`Uses`]: how many requests use the store at this moment, and the gate that they wait at while
//! the store is given to another daemon.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};
use v4_proto::{Code, Fault};

/// Counts those who use the store. Clones are the same count.
#[derive(Debug, Clone)]
pub struct Uses(Arc<watch::Sender<State>>);

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// Requests that are done with the store in a moment.
    short: usize,
    /// Those that work on it for as long as it takes: imports, uploads, checks.
    long: usize,
    gate: Gate,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Gate {
    #[default]
    Open,
    /// It is being given to another daemon.
    Shut,
    /// Another daemon has it.
    Gone,
}

/// A request that uses the store, as long as this lives.
#[derive(Debug)]
pub struct Use {
    uses: Uses,
    is_long: bool,
}

impl Default for Uses {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(State::default())))
    }
}

impl Uses {
    /// One more, when the gate is open.
    ///
    /// # Errors
    /// `overloaded` when another daemon has the store: whoever asks again finds that one.
    pub async fn begin(&self, is_long: bool) -> Result<Use, Fault> {
        let mut state = self.0.subscribe();
        loop {
            let mut gate = Gate::Open;
            self.0.send_modify(|state| {
                gate = state.gate;
                if gate == Gate::Open {
                    *(if is_long { &mut state.long } else { &mut state.short }) += 1;
                }
            });
            match gate {
                Gate::Open => return Ok(Use { uses: self.clone(), is_long }),
                Gate::Gone => return Err(gone()),
                Gate::Shut => {
                    let is_settled = state.wait_for(|state| state.gate != Gate::Shut).await;
                    is_settled.map_err(|_| gone())?;
                }
            }
        }
    }

    /// Whether somebody works on the store for as long as it takes.
    pub fn is_long(&self) -> bool {
        self.0.borrow().long > 0
    }

    /// Shuts the gate as soon as nobody is behind it. `false` when somebody still was after
    /// `patience`; then it is open.
    pub async fn shut(&self, patience: Duration) -> bool {
        let mut state = self.0.subscribe();
        let shut = async {
            loop {
                let is_free = |state: &State| state.short + state.long == 0;
                let is_shut = self.0.send_if_modified(|state| {
                    let is_free = is_free(state);
                    if is_free {
                        state.gate = Gate::Shut;
                    }
                    is_free
                });
                if is_shut {
                    return true;
                }
                // This end of the channel lives as long as the other.
                if state.wait_for(is_free).await.is_err() {
                    return false;
                }
            }
        };
        timeout(patience, shut).await.unwrap_or(false)
    }

    /// Opens the gate.
    pub fn open(&self) {
        self.0.send_modify(|state| state.gate = Gate::Open);
    }

    /// The store is another daemon's.
    pub fn leave(&self) {
        self.0.send_modify(|state| state.gate = Gate::Gone);
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.uses.0.send_modify(|state| {
            *(if self.is_long { &mut state.long } else { &mut state.short }) -= 1;
        });
    }
}

fn gone() -> Fault {
    Fault::new(Code::Overloaded, "this v4 was replaced by a new one; ask again, it has the port")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Duration = Duration::from_millis(20);
    const DEADLINE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn the_gate_waits_for_those_who_are_behind_it_and_holds_up_those_who_come() {
        let uses = Uses::default();
        let one = uses.begin(false).await.expect("open");
        let long = uses.begin(true).await.expect("open");
        assert!(uses.is_long());
        assert!(!uses.shut(MOMENT).await, "somebody is behind it");
        drop(uses.begin(false).await.expect("still open"));
        drop((one, long));
        assert!(!uses.is_long() && uses.shut(DEADLINE).await);
        let late = tokio::spawn({
            let uses = uses.clone();
            async move { uses.begin(false).await.map(drop) }
        });
        tokio::time::sleep(MOMENT).await;
        assert!(!late.is_finished());
        uses.open();
        late.await.expect("no panic").expect("open again");
        assert!(uses.shut(DEADLINE).await);
        uses.leave();
        let fault = uses.begin(false).await.expect_err("gone");
        assert_eq!(fault.code, Code::Overloaded);
    }

    #[tokio::test]
    async fn the_gate_is_shut_when_the_last_one_leaves() {
        let uses = Uses::default();
        let one = uses.begin(false).await.expect("open");
        let shut = tokio::spawn({
            let uses = uses.clone();
            async move { uses.shut(DEADLINE).await }
        });
        tokio::time::sleep(MOMENT).await;
        assert!(!shut.is_finished());
        drop(one);
        assert!(shut.await.expect("no panic"));
    }
}
