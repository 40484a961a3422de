//! What was decided for each model and why, in words: the last of it, for `v4 why`.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    time::Duration,
};

use v4_proto::{Fault, ModelName};

use super::{
    DeviceId, Key, Reason, Time,
    worth::{Mib, Secs, Worth},
};
use crate::limits;

/// What keeps a model from being loaded.
#[derive(Debug, Clone, PartialEq)]
pub enum Blocker {
    /// It is in use, and its quantum is not over yet.
    Quantum {
        /// How much of it is left.
        left: Duration,
    },
    /// It finishes its answers and takes nothing new.
    Busy,
    /// It was told to leave, and its process has not ended yet.
    Leaving,
    /// It is being loaded itself.
    Loading,
    /// It is pinned.
    Pinned,
}

/// One decision.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Its load begins.
    Load {
        /// Bytes that it is thought to need.
        bytes: u64,
        /// Bytes that were free.
        free: u64,
        /// Whether it takes over from what the name meant before.
        replaces: bool,
        /// Where it lies, if there is a choice.
        place: Option<String>,
    },
    /// It is ready.
    Ready {
        /// Bytes that it takes.
        bytes: u64,
        /// How long the load took.
        took: Duration,
    },
    /// It has to wait for memory.
    Wait {
        /// Bytes that are missing.
        missing: u64,
        /// On which devices, if there is a choice.
        on: Vec<DeviceId>,
        /// For whom.
        blockers: Vec<(ModelName, Blocker)>,
    },
    /// It gets nothing new, for another model waits for its memory.
    Yield {
        /// Which.
        to: ModelName,
    },
    /// It is told to leave.
    Leave {
        /// Why.
        reason: Reason,
        /// What it was worth.
        worth: Worth,
    },
    /// The settings give it other figures than it was loaded with.
    Outdated {
        /// Tokens of context a sequence gets then.
        context: u32,
        /// Sequences at a time then.
        slots: u32,
    },
    /// Its process ended without being told to.
    Died,
    /// Its load failed, or an ask for it was refused.
    Refused {
        /// Why.
        fault: Fault,
    },
}

impl Decision {
    /// The decision in a word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Load { .. } => "load",
            Self::Ready { .. } => "ready",
            Self::Wait { .. } => "wait",
            Self::Yield { .. } => "yield",
            Self::Leave { .. } => "unload",
            Self::Outdated { .. } => "outdated",
            Self::Died => "died",
            Self::Refused { .. } => "refused",
        }
    }

    /// Whether it says nothing new after `before`: who waits for the same as a moment ago waits on.
    fn repeats(&self, before: &Self) -> bool {
        match (self, before) {
            (Self::Wait { blockers: a, .. }, Self::Wait { blockers: b, .. }) => {
                let kinds = |blockers: &[(ModelName, Blocker)]| -> Vec<_> {
                    let kind = |it: &Blocker| std::mem::discriminant(it);
                    blockers.iter().map(|(name, it)| (name.clone(), kind(it))).collect()
                };
                kinds(a) == kinds(b)
            }
            (a, b) => a == b,
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load { bytes, free, replaces, place } => {
                let why = if *replaces {
                    "to take over from what the name meant before"
                } else {
                    "somebody asked for it"
                };
                let place = place.as_ref().map(|place| format!(" {place}")).unwrap_or_default();
                write!(
                    f,
                    "is loaded{place}, {why}: it needs {}, and {} were free",
                    Mib(*bytes),
                    Mib(*free)
                )
            }
            Self::Ready { bytes, took } => {
                write!(f, "is ready after {}: it takes {}", Secs(*took), Mib(*bytes))
            }
            Self::Wait { missing, on, blockers } => {
                write!(f, "waits for {}", Mib(*missing))?;
                for (n, device) in on.iter().enumerate() {
                    write!(f, " {} {device}", if n == 0 { "on" } else { "and" })?;
                }
                for (n, (name, blocker)) in blockers.iter().enumerate() {
                    let joint = if n == 0 { ':' } else { ';' };
                    write!(f, "{joint} {name} {blocker}")?;
                }
                Ok(())
            }
            Self::Yield { to } => {
                write!(f, "finishes its answers and takes nothing new: {to} waits for its memory")
            }
            Self::Leave { reason, worth } => leave(f, reason, worth),
            Self::Outdated { context, slots } => write!(
                f,
                "is to have {context} tokens of context and {slots} sequence(s) by its settings: it is \
                 loaded again when nobody uses it"
            ),
            Self::Died => f.write_str("its process ended without being told to"),
            Self::Refused { fault } => write!(f, "was refused: {}", fault.message),
        }
    }
}

fn leave(f: &mut fmt::Formatter<'_>, reason: &Reason, worth: &Worth) -> fmt::Result {
    match reason {
        Reason::Idle => {
            write!(f, "is unloaded: nobody asked for it within its keep-alive")
        }
        Reason::Asked => f.write_str("is unloaded: somebody asked for that"),
        Reason::Room(name) => write!(f, "is unloaded to make room for {name}: {worth}"),
        Reason::OverBudget => {
            write!(f, "is unloaded, for models take more than they said they would: {worth}")
        }
        Reason::Others(device) => {
            write!(f, "is unloaded: other programs need the memory of {device}")
        }
        Reason::Lost(device) => write!(f, "is unloaded: {device} has gone"),
        Reason::Settings => f.write_str("is unloaded: it is loaded again as its settings say now"),
        Reason::Replaced => f.write_str("is unloaded: what its name means now takes over"),
        Reason::Shutdown => f.write_str("is unloaded: the daemon ends"),
    }
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quantum { left } => {
                write!(f, "is in use and keeps its memory for {} more", Secs(*left))
            }
            Self::Busy => f.write_str("finishes its answers"),
            Self::Leaving => f.write_str("is on its way out"),
            Self::Loading => f.write_str("is being loaded itself"),
            Self::Pinned => f.write_str("is pinned"),
        }
    }
}

/// The last decisions of each model.
#[derive(Debug, Clone, Default)]
pub(super) struct History(BTreeMap<Key, VecDeque<(Time, Decision)>>);

impl History {
    /// Books a decision, if it is another than the last one.
    pub fn note(&mut self, key: &Key, now: Time, decision: Decision) {
        if !self.0.contains_key(key) && self.0.len() >= limits::REMEMBERED_MODELS {
            let last = |ring: &VecDeque<(Time, Decision)>| ring.back().map(|(at, _)| *at);
            let oldest = self.0.iter().min_by_key(|(_, ring)| last(ring));
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.0.remove(&oldest);
            }
        }
        let ring = self.0.entry(key.clone()).or_default();
        match ring.back_mut() {
            Some((_, before)) if decision.repeats(before) => *before = decision,
            _ => ring.push_back((now, decision)),
        }
        if ring.len() > limits::REMEMBERED_DECISIONS {
            ring.pop_front();
        }
    }

    /// The last decisions of a model, the oldest first.
    pub fn of<'a>(
        &'a self,
        key: &str,
    ) -> impl DoubleEndedIterator<Item = &'a (Time, Decision)> + use<'a> {
        self.0.get(key).into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ModelName {
        text.parse().expect("a name")
    }

    #[test]
    fn every_decision_is_a_sentence_with_its_figures() {
        let worth = Worth {
            bytes: 800 << 20,
            idle: Duration::from_secs(90),
            wake: Duration::from_millis(2300),
            probability: 0.345,
        };
        let leave = |reason| Decision::Leave { reason, worth };
        let quantum = Blocker::Quantum { left: Duration::from_secs(12) };
        let table = [
            (
                Decision::Load {
                    bytes: (812 << 20) - 1,
                    free: 1 << 30,
                    replaces: false,
                    place: None,
                },
                "is loaded, somebody asked for it: it needs 812 MiB, and 1024 MiB were free",
            ),
            (
                Decision::Wait {
                    on: Vec::new(),
                    missing: 300 << 20,
                    blockers: vec![(name("b"), quantum), (name("c"), Blocker::Busy)],
                },
                "waits for 300 MiB: b:latest is in use and keeps its memory for 12.0 s more; c:latest \
                 finishes its answers",
            ),
            (
                leave(Reason::Room(name("b"))),
                "is unloaded to make room for b:latest: 800 MiB idle for 90.0 s, against 2.3 s to load \
                 it again and 34 % that it is asked for within 5 minutes",
            ),
            (leave(Reason::Idle), "is unloaded: nobody asked for it within its keep-alive"),
        ];
        for (decision, words) in table {
            assert_eq!(decision.to_string(), words);
        }
    }

    #[test]
    fn what_repeats_is_one_line_and_there_are_so_many_lines() {
        let mut history = History::default();
        let a = "a:latest".to_owned();
        let wait = |left| Decision::Wait {
            on: Vec::new(),
            missing: 1,
            blockers: vec![(name("b"), Blocker::Quantum { left: Duration::from_secs(left) })],
        };
        history.note(&a, Duration::from_secs(1), wait(9));
        history.note(&a, Duration::from_secs(2), wait(8));
        let lines: Vec<_> = history.of(&a).cloned().collect();
        assert_eq!(lines, [(Duration::from_secs(1), wait(8))], "since when, and what is left");
        for n in 0..limits::REMEMBERED_DECISIONS as u64 {
            history.note(
                &a,
                Duration::from_secs(n),
                Decision::Load { bytes: n, free: 0, replaces: false, place: None },
            );
        }
        assert_eq!(history.of(&a).count(), limits::REMEMBERED_DECISIONS);
        assert!(history.of(&a).all(|(_, it)| it.word() == "load"));
    }

    #[test]
    fn the_model_of_which_nothing_was_decided_for_longest_is_forgotten() {
        let mut history = History::default();
        for n in 0..=limits::REMEMBERED_MODELS {
            history.note(&n.to_string(), Duration::from_secs(n as u64), Decision::Died);
        }
        assert_eq!(history.of("0").count(), 0);
        assert_eq!(history.of("1").count(), 1);
    }
}
