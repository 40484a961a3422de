//! Looks at the whole state and brings it where it should be: requests onto ready runners, wanted
//! models into memory, unused ones out of it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use v4_proto::{Code, Fault, ModelName};

use super::{
    AskId, Blocker, Decision, Effect, Key, Kind, Model, Pending, Phase, Reason, Runner, RunnerId,
    Spread, State, Time, Turn, fail_all, key, reload,
    worth::{self, Victim, Worth},
};
use crate::{KeepAlive, limits};

/// Applies all rules to the state after an event.
pub(super) fn settle(state: &mut State, turn: &mut Turn) {
    let now = turn.now;
    give_up(state, turn);
    promote(state);
    agree(state, turn);
    dispatch(state, turn);
    reload::renew(state, turn);
    make_room(state, turn);
    // Those that no longer have to yield take their work up again.
    dispatch(state, turn);
    expire(state, turn);
    state.names.retain(|_, name| !name.is_forgettable(now));
    keep_spare(state, turn);
}

/// Tells a runner to leave. Its name no longer routes to it; its memory counts until it is gone.
pub(super) fn stop(
    state: &mut State,
    id: RunnerId,
    deadline: Duration,
    reason: Reason,
    turn: &mut Turn,
) {
    let Some(runner) = state.runners.get_mut(&id) else { return };
    if runner.phase == Phase::Stopping {
        return;
    }
    runner.phase = Phase::Stopping;
    if let Some(model) = runner.model.clone() {
        let own = key(&model.target.name);
        let worth = Worth::of(state, &own, &state.runners[&id], turn.now);
        let decision = Decision::Leave { reason: reason.clone(), worth };
        state.history.note(&own, turn.now, decision);
    }
    turn.effects.push(Effect::Stop { runner: id, deadline, reason });
    for name in state.names.values_mut() {
        if name.runner == Some(id) {
            name.runner = None;
        }
        if name.next == Some(id) {
            name.next = None;
        }
    }
}

/// Nobody waits for ever.
fn give_up(state: &mut State, turn: &mut Turn) {
    let now = turn.now;
    for name in state.names.values_mut() {
        let is_late = |at: Time| now.saturating_sub(at) >= limits::QUEUE_WAIT;
        let late: Vec<AskId> = name
            .queue
            .iter()
            .chain(&name.swaps)
            .filter(|pending| is_late(pending.asked_at))
            .map(|pending| pending.ask.id)
            .collect();
        name.queue.retain(|pending| !is_late(pending.asked_at));
        name.swaps.retain(|pending| !is_late(pending.asked_at));
        turn.effects.extend(late.into_iter().map(|ask| Effect::Fail {
            ask,
            fault: Fault::new(
                Code::Overloaded,
                format!(
                    "{} did not become free within {} s; try again later",
                    name.want.target.name,
                    limits::QUEUE_WAIT.as_secs()
                ),
            ),
        }));
    }
}

/// A successor takes the place of a runner that died before it was ready.
fn promote(state: &mut State) {
    for name in state.names.values_mut() {
        if name.runner.is_none() {
            name.runner = name.next.take();
        }
    }
}

/// A name whose runner has the right files needs no swap, nor does one without a runner.
fn agree(state: &mut State, turn: &mut Turn) {
    let now = turn.now;
    for name in state.names.values_mut() {
        let runner = name.runner.and_then(|id| state.runners.get_mut(&id));
        let is_settled = match runner {
            Some(runner) => match &mut runner.model {
                Some(model) if model.files() == name.want.files() => {
                    // The manifest may be a newer one of the same files. Where they lie, and with
                    // how many sequences, is as they were loaded.
                    if model.target != name.want.target {
                        let Model { target, hold, .. } = (*name.want).clone();
                        *model = Arc::new(Model { target, hold, ..(**model).clone() });
                    }
                    runner.phase == Phase::Ready
                }
                _ => false,
            },
            None => name.eager_since.is_none() && name.queue.is_empty(),
        };
        if is_settled {
            for swap in name.swaps.drain(..) {
                let load = now.saturating_sub(swap.asked_at);
                turn.effects.push(Effect::Done { ask: swap.ask.id, load });
            }
        }
    }
}

/// Gives waiting asks to ready runners, callers in turn, up to the slots of each.
/// Those in the background that give way are not counted against others: the runner has them wait.
fn dispatch(state: &mut State, turn: &mut Turn) {
    let now = turn.now;
    for name in state.names.values_mut() {
        let Some(id) = name.runner else { continue };
        let Some(runner) = state.runners.get_mut(&id).filter(|runner| runner.is_open()) else {
            continue;
        };
        let ready_at = runner.ready_at;
        let slots = runner.model.as_ref().map_or(0, |model| model.slots as usize);
        loop {
            let n_running = runner.running.len();
            let n_yielding = runner.running.values().filter(|other| other.yields(now)).count();
            let may = |pending: &Pending| match pending.ask.kind {
                Kind::Load | Kind::Swap => true,
                _ if pending.yields(now) => n_running < slots,
                _ => n_running - n_yielding < slots,
            };
            let Some(mut pending) = name.turns.next(&mut name.queue, runner, may) else { break };
            let ask = pending.ask.id;
            let load = ready_at.saturating_sub(pending.asked_at);
            runner.keep_alive = pending.ask.keep_alive;
            runner.used_at = now;
            runner.unwanted = false;
            if matches!(pending.ask.kind, Kind::Generate | Kind::Background) {
                pending.sent_at = now;
                name.turns.served(&pending.ask.caller, now);
                runner.running.insert(ask, pending);
                turn.effects.push(Effect::Send { runner: id, ask, load });
            } else {
                if runner.running.is_empty() {
                    runner.idle_since = now;
                }
                turn.effects.push(Effect::Done { ask, load });
            }
        }
        name.turns.forget(&name.queue);
    }
}

/// Memory while loads are decided, on each device.
struct Ledger {
    budget: Spread,
    /// Bytes of all runners.
    used: Spread,
    /// Of these, bytes of runners that are on their way out.
    coming: Spread,
    /// Bytes that loads wait for which were decided on earlier.
    promised: Spread,
}

impl Ledger {
    fn of(state: &State) -> Self {
        let coming = state.runners.values().filter(|runner| runner.phase == Phase::Stopping);
        Self {
            budget: state.budgets(),
            used: state.used(),
            coming: coming.map(|runner| &runner.held).fold(state.held_back(), Spread::plus),
            promised: Spread::default(),
        }
    }

    /// Bytes of runners that are not on their way out.
    fn staying(&self) -> Spread {
        self.used.clone().minus(&self.coming)
    }

    /// Bytes that will be there for whoever asks now, after all earlier promises.
    fn later(&self) -> Spread {
        self.budget.clone().minus(&self.staying().plus(&self.promised))
    }

    /// Bytes that are there now and that nobody before waits for.
    fn now(&self) -> Spread {
        self.budget.clone().minus(&self.used).least(&self.later())
    }
}

/// Loads what is wanted, whoever waits longest first. Where memory is short, others are unloaded
/// or drained for it as soon as they have had their quantum.
fn make_room(state: &mut State, turn: &mut Turn) {
    let now = turn.now;
    state.quantum_ends = None;
    for runner in state.runners.values_mut() {
        runner.yielding = false;
    }
    if state.closing {
        return;
    }
    drain_predecessors(state, turn);
    shed(state, turn);
    let mut ledger = Ledger::of(state);
    let mut claimed = BTreeSet::new();
    for key in wanted(state, now) {
        refit(state, &key, turn);
        let Some(name) = state.names.get(&key) else { continue };
        let want = Arc::clone(&name.want);
        let has_runner = name.runner.is_some();
        if !has_runner && name.wanted_since().is_none() {
            continue;
        }
        let foes = foes(state, &key);
        let found = state.find_place(&want, &ledger.now()).filter(|_| foes.is_empty());
        if let Some(placement) = found {
            ledger.used = ledger.used.plus(&placement.spread);
            let bytes = placement.spread.total();
            load(state, &key, Model { bytes, placement, ..(*want).clone() }, turn);
        } else if has_runner {
            replace_later(state, &key, now);
        } else {
            let victims = make_way(state, &key, &want, (&mut ledger, &foes, &claimed), turn);
            claimed.extend(victims);
        }
    }
    drain_predecessors(state, turn);
}

/// What devices offer may have changed since a model was asked for: it gets the best place of now.
/// Where there is none any more, those who wait are told.
fn refit(state: &mut State, key: &Key, turn: &mut Turn) {
    // Where only the host computes, what it offers does not change.
    if !state.devices.all().any(|device| device.gpu.can_compute) {
        return;
    }
    let Some(name) = state.names.get(key) else { return };
    let want = Arc::clone(&name.want);
    let fitted = state.fit(want.target.clone(), want.hold.clone());
    let Some(name) = state.names.get_mut(key) else { return };
    match fitted {
        Ok(model) => name.want = Arc::new(model),
        Err(fault) if name.runner.is_none() => {
            state.history.note(key, turn.now, Decision::Refused { fault: fault.clone() });
            fail_all(name, &fault, turn);
        }
        Err(_) => {}
    }
}

/// Has others leave for the model of `own`, and keeps what it waits for. Those that it counts on.
fn make_way(
    state: &mut State,
    own: &Key,
    want: &Model,
    (ledger, foes, claimed): (&mut Ledger, &BTreeSet<RunnerId>, &BTreeSet<RunnerId>),
    turn: &mut Turn,
) -> Vec<RunnerId> {
    let later = ledger.later();
    let with = |freed: &Spread| state.find_place(want, &later.clone().plus(freed));
    let enough = |freed: &Spread| with(freed).is_some();
    let victims = worth::choose(state, own, (&enough, foes), claimed, turn.now);
    let freed = victims.iter().map(|victim| &victim.held).fold(Spread::default(), Spread::plus);
    let found = with(&freed);
    let spread = found.as_ref().unwrap_or(&want.placement).spread.clone();
    let missing = spread.clone().minus(&later);
    ledger.coming = std::mem::take(&mut ledger.coming).plus(&freed);
    ledger.promised = std::mem::take(&mut ledger.promised).plus(&spread);
    if found.is_some() {
        evict(state, &want.target.name, &victims, turn);
    }
    explain(state, own, (&missing, foes), &victims, turn.now);
    victims.into_iter().map(|victim| victim.runner).collect()
}

/// The runners whose models are never in memory at the same time as that of `key`.
fn foes(state: &State, own: &Key) -> BTreeSet<RunnerId> {
    let excludes = |model: &Model| state.rules.models.exclude(own, &key(&model.target.name));
    state.loaded().filter(|(_, _, model, _)| excludes(model)).map(|(id, ..)| id).collect()
}

/// Has runners leave for the model of a name: idle ones at once, busy ones get nothing new. While
/// one of them has a quantum, all stay.
fn evict(state: &mut State, name: &ModelName, victims: &[Victim], turn: &mut Turn) {
    let held = victims.iter().map(|victim| victim.kept_until).max();
    if let Some(until) = held.filter(|until| *until > turn.now) {
        let soonest = state.quantum_ends.map_or(until, |other| other.min(until));
        state.quantum_ends = Some(soonest);
        return;
    }
    for victim in victims {
        if !victim.is_busy {
            stop(state, victim.runner, limits::STOP, Reason::Room(name.clone()), turn);
        } else if let Some(runner) = state.runners.get_mut(&victim.runner) {
            runner.yielding = true;
            let decision = Decision::Yield { to: name.clone() };
            state.history.note(&key(&victim.name), turn.now, decision);
        }
    }
}

/// Notes for whom the model of `own` has to wait.
fn explain(
    state: &mut State,
    own: &Key,
    (missing, foes): (&Spread, &BTreeSet<RunnerId>),
    victims: &[Victim],
    now: Time,
) {
    let blockers = state.loaded().filter_map(|(id, runner, model, _)| {
        let victim = victims.iter().find(|victim| victim.runner == id);
        let is_concerned = victim.is_some() || foes.contains(&id);
        let blocker = match (runner.phase, victim) {
            (Phase::Stopping, _) => Blocker::Leaving,
            (Phase::Ready, _) if is_concerned && runner.is_pinned => Blocker::Pinned,
            (Phase::Ready, Some(victim)) if victim.kept_until > now => {
                Blocker::Quantum { left: victim.kept_until.saturating_sub(now) }
            }
            (Phase::Ready, _) if is_concerned || runner.is_draining() => Blocker::Busy,
            (Phase::Ready, _) => return None,
            _ => Blocker::Loading,
        };
        Some((model.target.name.clone(), blocker))
    });
    let blockers = blockers.collect();
    let devices = missing.iter().filter(|_| state.has_choice());
    let on = devices.map(|(device, _)| Arc::clone(device)).collect();
    let missing = missing.total();
    state.history.note(own, now, Decision::Wait { missing, on, blockers });
}

/// Where models take more of a device than they may, idle ones leave, the least worth keeping
/// first: for other programs, from a device that has gone, or because their runners took more than
/// their headers said; of these stays the one that came last.
fn shed(state: &mut State, turn: &mut Turn) {
    let ledger = Ledger::of(state);
    let staying = ledger.staying();
    let mut over = staying.clone().minus(&ledger.budget);
    if over.total() == 0 {
        state.is_shrunk = false;
        return;
    }
    let newest = state.runners.values().map(|runner| runner.ready_at).max();
    // After a person has made the budget smaller it is spared no more than others.
    let newest = newest.filter(|_| !state.is_shrunk);
    let mut idle: Vec<Victim> = state
        .loaded()
        .filter(|(_, runner, ..)| runner.is_idle())
        .map(|(id, runner, model, _)| Victim::of(state, (id, runner, model), turn.now))
        .collect();
    idle.sort_by(Victim::by_worth);
    for victim in idle {
        let Some(runner) = state.runners.get(&victim.runner) else { continue };
        let stays = |reason: &Reason| match reason {
            Reason::Lost(_) => false,
            Reason::Others(_) => runner.is_pinned,
            _ => runner.is_pinned || Some(runner.ready_at) == newest,
        };
        let reason = over
            .iter()
            .filter(|(device, _)| victim.held.of(device) > 0)
            .map(|(device, _)| state.excess(device, staying.of(device)))
            .find(|reason| !stays(reason));
        if let Some(reason) = reason {
            stop(state, victim.runner, limits::STOP, reason, turn);
            over = over.minus(&victim.held);
        }
    }
}

/// The names that want a load now: somebody waits and nothing loads, or the runner has other files.
fn wanted(state: &State, now: Time) -> Vec<Key> {
    let early = |key: &Key| {
        let steps = u32::from(state.rules.models.of(key).priority.abs_diff(i8::MAX));
        limits::PRIORITY_STEP.saturating_mul(steps)
    };
    let mut keys: Vec<((Time, AskId), &Key)> = state
        .names
        .iter()
        .filter_map(|(key, name)| {
            if name.next.is_some() || now < name.retry_at {
                return None;
            }
            let Some(runner) = name.runner.and_then(|id| state.runners.get(&id)) else {
                let (since, ask) = name.wanted_since()?;
                return Some(((since.saturating_add(early(key)), ask), key));
            };
            let model = runner.model.as_ref()?;
            let is_outdated = model.files() != name.want.files() && !runner.leaving;
            is_outdated.then_some(((now.saturating_add(early(key)), AskId::MAX), key))
        })
        .collect();
    keys.sort();
    keys.into_iter().map(|(_, key)| key.clone()).collect()
}

/// The successor does not fit beside the runner: that one drains first.
fn replace_later(state: &mut State, key: &Key, now: Time) {
    let Some(name) = state.names.get_mut(key) else { return };
    let Some(runner) = name.runner.and_then(|id| state.runners.get_mut(&id)) else { return };
    runner.leaving = true;
    name.eager_since = Some(now);
    name.inherited = Some(runner.keep_alive);
    if runner.phase == Phase::Ready {
        name.fallback.clone_from(&runner.model);
    }
}

/// Runners that make place for their own successor leave when their answers have ended.
fn drain_predecessors(state: &mut State, turn: &mut Turn) {
    let done: Vec<RunnerId> = state
        .runners
        .iter()
        .filter(|(_, runner)| runner.leaving && runner.running.is_empty())
        .map(|(id, _)| *id)
        .collect();
    for id in done {
        stop(state, id, limits::STOP, Reason::Replaced, turn);
    }
}

/// Starts a load: in the spare runner, else in one that starts, else in a new one.
fn load(state: &mut State, key: &Key, model: Model, turn: &mut Turn) {
    let now = turn.now;
    let model = Arc::new(model);
    let free = state.budgets().minus(&state.used());
    let on = model.placement.spread.iter().map(|(device, _)| free.of(device));
    let free = on.fold(0, u64::saturating_add);
    let place = state.place_of(&model);
    let is_pinned = state.is_pinned(&model);
    let id = state.free_runner().unwrap_or_else(|| spawn(state, turn));
    let Some(name) = state.names.get_mut(key) else { return };
    let replaces = name.runner.is_some();
    let bytes = model.bytes;
    state.history.note(key, now, Decision::Load { bytes, free, replaces, place });
    match name.runner {
        None => name.runner = Some(id),
        Some(old) => {
            name.next = Some(id);
            if let Some(old) = state.runners.get(&old) {
                name.inherited = Some(old.keep_alive);
                name.fallback.clone_from(&old.model);
            }
        }
    }
    let keep_alive = name.inherited.unwrap_or(state.rules.keep_alive);
    let Some(runner) = state.runners.get_mut(&id) else { return };
    runner.bytes = model.bytes;
    runner.held = model.placement.spread.clone();
    runner.keep_alive = keep_alive;
    runner.used_at = now;
    runner.load_began = now;
    runner.is_pinned = is_pinned;
    runner.model = Some(Arc::clone(&model));
    if runner.phase == Phase::Spare {
        runner.phase = Phase::Loading;
        turn.effects.push(Effect::Load { runner: id, model });
    }
}

/// Unloads what nobody has asked for within its keep-alive.
fn expire(state: &mut State, turn: &mut Turn) {
    let now = turn.now;
    let is_waited_for =
        |id: RunnerId| state.names.values().any(|n| n.runner == Some(id) && !n.queue.is_empty());
    let expired: Vec<(RunnerId, bool)> = state
        .runners
        .iter()
        .filter(|(id, runner)| runner.expires().is_some_and(|at| at <= now) && !is_waited_for(**id))
        .map(|(id, runner)| (*id, runner.unwanted))
        .collect();
    for (id, is_unwanted) in expired {
        let reason = if is_unwanted { Reason::Asked } else { Reason::Idle };
        stop(state, id, limits::STOP, reason, turn);
    }
}

/// Keeps one runner started, but not while a load needs the cores.
fn keep_spare(state: &mut State, turn: &mut Turn) {
    let now = turn.now;
    let loads = |runner: &Runner| runner.phase == Phase::Loading;
    let is_due = state.rules.spare && !state.closing && now >= state.spare_retry_at;
    if is_due && state.free_runner().is_none() && !state.runners.values().any(loads) {
        spawn(state, turn);
    }
}

fn spawn(state: &mut State, turn: &mut Turn) -> RunnerId {
    let id = state.next_runner;
    state.next_runner += 1;
    let threads = state.rules.threads;
    state.runners.insert(id, Runner { keep_alive: KeepAlive::Forever, ..Runner::new(threads) });
    turn.effects.push(Effect::Spawn(id));
    id
}
