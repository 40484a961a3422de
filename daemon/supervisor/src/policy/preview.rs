//! What would happen if a model was asked for now: a step of the policy on a copy of its state, so
//! that what is said is what is done.

use std::time::Duration;

use v4_proto::{Fault, ModelName};

use super::{
    Ask, AskId, Blocker, Decision, DeviceId, Effect, Event, HOST, Hold, Kind, Model, Rules, State,
    Time, key, step, worth::Worth,
};
use crate::{KeepAlive, Target};

/// Bytes of a model by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Parts {
    /// Weights, by the tensor table.
    pub weights: u64,
    /// Keys and values of all sequences.
    pub kv: u64,
    /// Activations, logits and the process, and what devices need twice.
    pub scratch: u64,
}

impl Parts {
    /// Of a model as it is laid out.
    fn of(rules: &Rules, model: &Model) -> Self {
        let info = model.target.info.as_ref();
        let per_token = info.map_or(0, |info| rules.kv_type.bytes(info.kv_bytes_per_token));
        let tokens = u64::from(model.context) * u64::from(model.slots);
        let weights = info.map_or(0, |info| info.weight_bytes);
        let kv = per_token.saturating_mul(tokens);
        Self { weights, kv, scratch: model.bytes.saturating_sub(weights.saturating_add(kv)) }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv).saturating_add(self.scratch)
    }
}

/// What would come of the ask.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It would be answered at once: the model is loaded and has a free sequence.
    Serve,
    /// It would wait in the model's queue: all its sequences are taken, or it is being loaded.
    Queue,
    /// It would be loaded, at once or as soon as those that leave are gone.
    Load,
    /// It would wait for memory.
    Wait(Decision),
    /// It would be refused.
    Refuse(Fault),
}

impl Outcome {
    /// The outcome in a word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Serve => "serve",
            Self::Queue => "queue",
            Self::Load => "load",
            Self::Wait(_) => "wait",
            Self::Refuse(_) => "refuse",
        }
    }
}

/// A model that is in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Resident {
    /// Its name.
    pub name: ModelName,
    /// Bytes that it takes, as its runner says.
    pub bytes: u64,
    /// By what they were planned for.
    pub parts: Parts,
    /// Where they are, if there is a choice.
    pub place: Option<String>,
    /// Answers that it is giving.
    pub n_running: usize,
    /// Whether it is pinned.
    pub pinned: bool,
    /// What its memory is worth now.
    pub worth: Worth,
    /// Why it would leave.
    pub leaves: Option<Decision>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceLine {
    /// What it is called here.
    pub id: DeviceId,
    /// What it is sold as; nothing for the host.
    pub name: Option<String>,
    /// Bytes that models may take of it.
    pub budget_bytes: u64,
    /// Bytes that are taken or promised.
    pub used_bytes: u64,
    /// Bytes that other programs have; those of the host's are not counted.
    pub others_bytes: u64,
    /// Why no model lies there, if none may.
    pub why_not: Option<&'static str>,
}

/// What would happen.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The model that is asked for.
    pub name: ModelName,
    /// What would come of it.
    pub outcome: Outcome,
    /// Bytes that it needs; nothing where it cannot fit.
    pub parts: Option<Parts>,
    /// Where it would lie, if there is a choice.
    pub place: Option<String>,
    /// Tokens of context a sequence gets, and sequences.
    pub context: u32,
    /// Sequences at a time.
    pub slots: u32,
    /// How long a load takes, as measured or estimated.
    pub wake: Duration,
    /// Whether a load of it was measured.
    pub is_measured: bool,
    /// The host, then the other devices.
    pub devices: Vec<DeviceLine>,
    /// What drivers complain of.
    pub complaints: Vec<String>,
    /// What is in memory, what would leave first.
    pub resident: Vec<Resident>,
}

/// The number of an ask that is none.
const PREVIEW: AskId = AskId::MAX;

/// What would happen if `target`, whose header is known, was asked for `now`.
pub fn preview(state: &State, target: &Target, now: Time) -> Plan {
    let mut copy = state.clone();
    // Time that has passed without an event is not the ask's doing.
    step(&mut copy, Event::Tick, now);
    let ask = Ask {
        id: PREVIEW,
        kind: Kind::Generate,
        keep_alive: KeepAlive::Forever,
        caller: "v4 plan".into(),
    };
    let own = key(&target.name);
    let before = copy.clone();
    let event = Event::Ask { ask, target: Box::new(target.clone()), hold: Hold::default() };
    let effects = step(&mut copy, event, now);
    let model = state.fit(target.clone(), Hold::default()).ok();
    let loads =
        copy.names.get(&own).and_then(|name| copy.runners.get(&name.runner?)?.model.clone());
    let place = loads.as_deref().or(model.as_ref()).and_then(|model| state.place_of(model));
    let habit = state.habits.get(&own);
    Plan {
        name: target.name.clone(),
        outcome: outcome(&before, &copy, &own, &effects),
        parts: model.as_ref().map(|model| Parts::of(&state.rules, model)),
        place,
        context: model.as_ref().map_or(0, |model| model.context),
        slots: model.as_ref().map_or(0, |model| model.slots),
        wake: state.habits.wake(&own, model.as_ref().map_or(0, |model| model.bytes)),
        is_measured: habit.is_some_and(super::habit::Habit::is_measured),
        devices: devices(state),
        complaints: state.devices.complaints().to_vec(),
        resident: residents(state, &copy, &effects, now),
    }
}

fn devices(state: &State) -> Vec<DeviceLine> {
    let used = state.used();
    let host = DeviceLine {
        id: HOST.into(),
        name: None,
        budget_bytes: state.budget_bytes(),
        used_bytes: used.of(HOST),
        others_bytes: 0,
        why_not: None,
    };
    let gpus = state.devices.all().map(|device| DeviceLine {
        id: device.id.clone(),
        name: Some(device.gpu.name.clone()),
        budget_bytes: device.budget_bytes(),
        used_bytes: used.of(&device.id),
        others_bytes: device.others_bytes(),
        why_not: device.why_not(),
    });
    std::iter::once(host).chain(gpus).collect()
}

/// What came of the ask, by what it led to and where its name stands.
fn outcome(before: &State, after: &State, own: &str, effects: &[Effect]) -> Outcome {
    for effect in effects {
        match effect {
            Effect::Fail { ask: PREVIEW, fault } => return Outcome::Refuse(fault.clone()),
            Effect::Send { ask: PREVIEW, .. } => return Outcome::Serve,
            _ => {}
        }
    }
    let runner = |state: &State| state.names.get(own).and_then(|name| name.runner);
    if let Some(id) = runner(after) {
        let is_there = runner(before) == Some(id);
        return if is_there { Outcome::Queue } else { Outcome::Load };
    }
    match after.history.of(own).next_back() {
        Some((_, wait @ Decision::Wait { blockers, .. })) => {
            let leaves = |(_, blocker): &(ModelName, Blocker)| *blocker == Blocker::Leaving;
            let is_soon = blockers.iter().all(leaves);
            if is_soon { Outcome::Load } else { Outcome::Wait(wait.clone()) }
        }
        // Its process died a moment ago: it is loaded when the pause is over.
        _ => Outcome::Queue,
    }
}

/// What is in memory, what leaves first in front; then by what it is worth, the least first.
fn residents(state: &State, after: &State, effects: &[Effect], now: Time) -> Vec<Resident> {
    let mut residents: Vec<Resident> = state
        .loaded()
        .map(|(id, runner, model, _)| {
            let own = key(&model.target.name);
            let worth = Worth::of(state, &own, runner, now);
            let stops = effects.iter().find_map(|effect| match effect {
                Effect::Stop { runner, reason, .. } if *runner == id => Some(reason.clone()),
                _ => None,
            });
            let yields = after.runners.get(&id).is_some_and(|after| after.yielding);
            let leaves = match stops {
                Some(reason) => Some(Decision::Leave { reason, worth }),
                None if yields && !runner.yielding => {
                    after.history.of(&own).next_back().map(|(_, decision)| decision.clone())
                }
                None => None,
            };
            Resident {
                name: model.target.name.clone(),
                bytes: runner.bytes,
                parts: Parts::of(&state.rules, model),
                place: state.place_of(model),
                n_running: runner.n_running(),
                pinned: state.rules.models.of(&own).pinned,
                worth,
                leaves,
            }
        })
        .collect();
    residents.sort_by(|a, b| {
        let leaves = |it: &Resident| it.leaves.is_none();
        leaves(a).cmp(&leaves(b)).then(b.worth.burden().total_cmp(&a.worth.burden()))
    });
    residents
}
