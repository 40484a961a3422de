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

use std::{cmp::Ordering, collections::BTreeSet, fmt, time::Duration};

use v4_proto::ModelName;

use super::{Model, Name, Phase, Runner, RunnerId, Spread, State, Time, habit::Habit, key};
use crate::limits;

/// What a model's memory is worth: the figures of (bytes x idle) / (wake time x probability).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Worth {
    /// Bytes that it would give back.
    pub bytes: u64,
    /// How long nobody has used it, nor another of its group.
    pub idle: Duration,
    /// How long it takes to load it again.
    pub wake: Duration,
    /// How likely it is asked for within [`limits::FORESIGHT`].
    pub probability: f64,
}

impl Worth {
    /// Of a runner with the model `own`.
    pub(super) fn of(state: &State, own: &str, runner: &Runner, now: Time) -> Self {
        let is_mate = |other: &&Runner| {
            let model = other.model.as_ref();
            model.is_some_and(|it| state.rules.models.together(own, &key(&it.target.name)))
        };
        let mates = state.runners.values().filter(is_mate);
        let used = |it: &Runner| if it.running.is_empty() { it.used_at() } else { now };
        let used_at = mates.map(used).chain([used(runner)]).max().unwrap_or(now);
        Self {
            bytes: runner.bytes,
            idle: now.saturating_sub(used_at),
            wake: state.habits.wake(own, runner.bytes),
            probability: state.habits.get(own).map_or(0.0, |habit| habit.probability(now)),
        }
    }

    /// (bytes x idle) / (wake time x probability) in MiB, and in seconds: the higher, the sooner it
    /// leaves.
    pub fn burden(&self) -> f64 {
        let mib = self.bytes as f64 / f64::from(1 << 20);
        // A load that took no time, or a model that nobody asks for, is worth next to nothing.
        mib * self.idle.as_secs_f64() / (self.wake.as_secs_f64() * self.probability).max(1e-6)
    }
}

impl fmt::Display for Worth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} idle for {}, against {} to load it again and {:.0} % that it is asked for within {} \
             minutes",
            Mib(self.bytes),
            Secs(self.idle),
            Secs(self.wake),
            self.probability * 100.0,
            limits::FORESIGHT.as_secs() / 60,
        )
    }
}

/// Bytes as a person reads them.
pub(super) struct Mib(pub u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0.div_ceil(1 << 20))
    }
}

/// A time as a person reads it.
pub(super) struct Secs(pub Duration);

impl fmt::Display for Secs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} s", self.0.as_secs_f64())
    }
}

/// A runner that may have to leave.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Victim {
    pub runner: RunnerId,
    pub name: ModelName,
    /// What it gives back.
    pub held: Spread,
    /// Whether it has answers to finish.
    pub is_busy: bool,
    /// When its quantum ends; maybe in the past.
    pub kept_until: Time,
    priority: i8,
    burden: f64,
    /// When it was last given work.
    used_at: Time,
}

impl Victim {
    /// A runner and its model, without regard to its quantum.
    pub fn of(state: &State, (id, runner, model): (RunnerId, &Runner, &Model), now: Time) -> Self {
        let own = key(&model.target.name);
        let is_busy = !runner.is_idle();
        Self {
            runner: id,
            name: model.target.name.clone(),
            held: runner.held.clone(),
            is_busy,
            kept_until: Time::ZERO,
            priority: state.rules.models.of(&own).priority,
            burden: Worth::of(state, &own, runner, now).burden(),
            used_at: if is_busy { runner.used_at } else { runner.used_at() },
        }
    }

    /// Those that leave first come first.
    pub fn by_worth(&self, other: &Self) -> Ordering {
        (self.priority.cmp(&other.priority))
            .then(other.burden.total_cmp(&self.burden))
            .then(self.used_at.cmp(&other.used_at))
            .then(self.runner.cmp(&other.runner))
    }
}

/// Whether the memory that is given back makes the place that somebody waits for.
pub(super) type Enough<'a> = &'a dyn Fn(&Spread) -> bool;

/// Whether a runner may be told to leave for the sake of another name's model.
pub(super) fn may_leave(state: &State, id: RunnerId, runner: &Runner) -> bool {
    let is_pinned = runner.model.as_ref().is_some_and(|model| state.is_pinned(model));
    runner.phase == Phase::Ready
        && !runner.leaving
        && !is_pinned
        && !state.names.values().any(|name| name.next == Some(id))
}

/// Finds memory for the name `wanting`, until what is given back is `enough`, among the other
/// names' runners, but for those that are `claimed` already: first of all its `foes`, with which it
/// is never in memory, then idle ones first, then busy ones, then those that have a quantum, the
/// one that ends first before the others; of each kind the least worth keeping first. All there are
/// where that is not enough.
pub(super) fn choose(
    state: &State,
    wanting: &str,
    (enough, foes): (Enough<'_>, &BTreeSet<RunnerId>),
    claimed: &BTreeSet<RunnerId>,
    now: Time,
) -> Vec<Victim> {
    let Some(name) = state.names.get(wanting) else { return Vec::new() };
    let mut victims: Vec<Victim> = state
        .loaded()
        .filter(|(id, runner, ..)| !claimed.contains(id) && may_leave(state, *id, runner))
        .filter(|(id, ..)| name.runner != Some(*id) && name.next != Some(*id))
        .map(|(id, runner, model, _)| Victim {
            kept_until: kept_until(state, (runner, model), (wanting, name), now),
            ..Victim::of(state, (id, runner, model), now)
        })
        .collect();
    let is_mate = |victim: &Victim| state.rules.models.together(wanting, &key(&victim.name));
    let kind = |victim: &Victim| (is_mate(victim), victim.kept_until.max(now), victim.is_busy);
    victims.sort_by(|a, b| kind(a).cmp(&kind(b)).then_with(|| a.by_worth(b)));
    victims.sort_by_key(|victim| !foes.contains(&victim.runner));
    let mut found = Spread::default();
    let mut is_enough = enough(&found);
    let is_needed = |victim: &Victim| {
        let is_needed = !is_enough || foes.contains(&victim.runner);
        if is_needed {
            found = std::mem::take(&mut found).plus(&victim.held);
            is_enough = is_enough || enough(&found);
        }
        is_needed
    };
    let mut chosen: Vec<Victim> = victims.into_iter().take_while(is_needed).collect();
    // A large one found late may make others needless, as one on the right device does: the most
    // worth keeping is let off first.
    for at in (0..chosen.len()).rev() {
        let without = found.clone().minus(&chosen[at].held);
        if !foes.contains(&chosen[at].runner) && enough(&without) {
            found = without;
            chosen.remove(at);
        }
    }
    chosen
}

/// Until when a runner keeps its memory although the name `wanting` waits for it; `now` or earlier
/// if it does not.
pub(super) fn kept_until(
    state: &State,
    (runner, model): (&Runner, &Model),
    (wanting, name): (&str, &Name),
    now: Time,
) -> Time {
    let own = key(&model.target.name);
    let (rules, habits) = (&state.rules.models, &state.habits);
    if rules.of(wanting).priority > rules.of(&own).priority {
        return now;
    }
    let waits = |name: &Name| name.queue.iter().filter(|pending| !pending.yields(now)).count();
    let n_waiting = u32::try_from(waits(name)).unwrap_or(u32::MAX);
    let queued = state.names.get(&own).map_or(0, waits);
    let is_used = queued > 0 || runner.running.values().any(|pending| !pending.yields(now));
    let is_only_background = !is_used && !runner.running.is_empty();
    if is_only_background && n_waiting > 0 {
        return now;
    }
    let price =
        habits.wake(wanting, name.want.bytes).saturating_add(habits.wake(&own, runner.bytes));
    let quantum = price.saturating_mul(limits::QUANTUM_PRICES).min(limits::QUANTUM_MAX);
    let end = runner.ready_at.saturating_add(quantum);
    if is_used || is_only_background {
        return end;
    }
    // All who wait lose the time that is spent on waiting for the next ask.
    let patience = price / n_waiting.max(1);
    match habits.get(&own).and_then(Habit::usual_gap).filter(|gap| *gap <= patience) {
        Some(gap) => end.min(runner.idle_since.saturating_add(patience.min(gap * 2))),
        None => now,
    }
}
