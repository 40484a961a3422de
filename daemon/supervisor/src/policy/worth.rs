//! Which models leave for another one, and when they may be asked to.
//!
//! **What a model is worth.** Bytes times idle time is what memory costs that is kept for it; the
//! time to load it again times how likely that is, is what is lost without it. The models with the
//! highest first over the second leave first.
//!
//! **The quantum.** Two clients that use two models which do not fit together would have each
//! request pay a load. So a model in use keeps its memory, while another waits, for a few times the
//! price of the swap (both loads, as measured): swaps then take a bounded share of the time, and
//! the other waits a bounded time. A model that is idle within its quantum is kept only if it is
//! usually asked for again so soon that a swap would cost more than those who wait lose by waiting:
//! between two turns of an agent it stays, after the last one it leaves.

use std::{cmp::Ordering, collections::BTreeSet, time::Duration};

use super::{Name, Pending, Phase, Runner, RunnerId, State, Time, habit::Habit, key};
use crate::limits;

/// A runner that may have to leave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Victim {
    pub runner: RunnerId,
    /// What it gives back.
    pub bytes: u64,
    /// Whether it has answers to finish.
    pub is_busy: bool,
    /// When its quantum ends; maybe in the past.
    pub kept_until: Time,
    /// (bytes x idle) / (wake time x probability): the higher, the sooner it leaves. MiB and
    /// seconds.
    pub burden: f64,
    /// When it was last given work.
    used_at: Time,
}

impl Victim {
    /// A runner, without regard to its quantum.
    pub fn of(state: &State, id: RunnerId, runner: &Runner, now: Time) -> Self {
        let name = runner.model.as_ref().map(|model| key(&model.target.name)).unwrap_or_default();
        let wake = state.habits.wake(&name, runner.bytes);
        let probability = state.habits.get(&name).map_or(0.0, |habit| habit.probability(now));
        let is_busy = !runner.is_idle();
        let idle = if is_busy { Duration::ZERO } else { now.saturating_sub(runner.used_at()) };
        Self {
            runner: id,
            bytes: runner.bytes,
            is_busy,
            kept_until: Time::ZERO,
            burden: burden(runner.bytes, idle, wake, probability),
            used_at: if is_busy { runner.used_at } else { runner.used_at() },
        }
    }

    /// Those that leave first come first.
    pub fn by_worth(&self, other: &Self) -> Ordering {
        (other.burden.total_cmp(&self.burden))
            .then(self.used_at.cmp(&other.used_at))
            .then(self.runner.cmp(&other.runner))
    }
}

/// (bytes x idle) / (wake time x probability).
fn burden(bytes: u64, idle: Duration, wake: Duration, probability: f64) -> f64 {
    let mib = bytes as f64 / f64::from(1 << 20);
    // A load that took no time at all, or a model that nobody asks for, is worth next to nothing.
    let kept = (wake.as_secs_f64() * probability).max(1e-6);
    mib * idle.as_secs_f64() / kept
}

/// Finds `missing` bytes for the name `wanting` among the other names' runners, but for those that
/// are `claimed` already: idle ones first, then busy ones, then those that have a quantum, the one
/// that ends first before the others; of each kind the least worth keeping first. Fewer bytes where
/// there are no more.
pub(super) fn choose(
    state: &State,
    wanting: &str,
    missing: u64,
    claimed: &BTreeSet<RunnerId>,
    now: Time,
) -> Vec<Victim> {
    let Some(name) = state.names.get(wanting) else { return Vec::new() };
    let is_swapping = |id: RunnerId| state.names.values().any(|name| name.next == Some(id));
    let may_leave = |id: RunnerId, runner: &Runner| {
        runner.phase == Phase::Ready
            && !runner.leaving
            && !claimed.contains(&id)
            && name.runner != Some(id)
            && name.next != Some(id)
            && !is_swapping(id)
    };
    let mut victims: Vec<Victim> = state
        .runners
        .iter()
        .filter(|(id, runner)| may_leave(**id, runner))
        .map(|(id, runner)| Victim {
            kept_until: kept_until(state, runner, (wanting, name), now),
            ..Victim::of(state, *id, runner, now)
        })
        .collect();
    let kind = |victim: &Victim| (victim.kept_until.max(now), victim.is_busy);
    victims.sort_by(|a, b| kind(a).cmp(&kind(b)).then(a.by_worth(b)));
    let mut found = 0_u64;
    let is_needed = |victim: &Victim| {
        let is_needed = found < missing;
        found = found.saturating_add(if is_needed { victim.bytes } else { 0 });
        is_needed
    };
    let mut chosen: Vec<Victim> = victims.into_iter().take_while(is_needed).collect();
    // A large one found late may make others needless: the most worth keeping is let off first.
    for at in (0..chosen.len()).rev() {
        if found.saturating_sub(chosen[at].bytes) >= missing {
            found -= chosen.remove(at).bytes;
        }
    }
    chosen
}

/// Until when a runner keeps its memory although the name `wanting` waits for it; `now` or earlier
/// if it does not.
fn kept_until(state: &State, runner: &Runner, wanting: (&str, &Name), now: Time) -> Time {
    let Some(model) = &runner.model else { return now };
    let own = key(&model.target.name);
    let waits = |name: &Name| name.queue.iter().filter(|pending| !pending.yields(now)).count();
    let n_waiting = u32::try_from(waits(wanting.1)).unwrap_or(u32::MAX);
    let queued = state.names.get(&own).map_or(0, waits);
    let uses = |pending: &Pending| !pending.yields(now);
    let is_used = queued > 0 || runner.running.values().any(uses);
    let is_only_background = !is_used && !runner.running.is_empty();
    if is_only_background && n_waiting > 0 {
        return now;
    }
    let price = state
        .habits
        .wake(wanting.0, wanting.1.want.bytes)
        .saturating_add(state.habits.wake(&own, runner.bytes));
    let quantum = price.saturating_mul(limits::QUANTUM_PRICES).min(limits::QUANTUM_MAX);
    let end = runner.ready_at.saturating_add(quantum);
    if is_used || is_only_background {
        return end;
    }
    // All who wait lose the time that is spent on waiting for the next ask.
    let patience = price / n_waiting.max(1);
    let gap = state.habits.get(&own).and_then(Habit::usual_gap);
    match gap.filter(|gap| *gap <= patience) {
        Some(gap) => end.min(runner.idle_since.saturating_add(patience.min(gap * 2))),
        None => now,
    }
}
