//! What would happen to a model and what has, as bodies of v4's own.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use v4_supervisor::policy::{Decision, DeviceLine, Outcome, Parts, Plan, Resident};

use crate::{api::bytes, ops::plan::Why};

#[derive(Serialize)]
struct PlanBody {
    model: String,
    outcome: &'static str,
    reason: Option<String>,
    bytes: Option<Bytes>,
    placement: Option<String>,
    context: u32,
    slots: u32,
    wake_ms: u64,
    is_measured: bool,
    devices: Vec<Device>,
    complaints: Vec<String>,
    loaded: Vec<Loaded>,
}

#[derive(Serialize)]
struct Bytes {
    weights: u64,
    kv: u64,
    scratch: u64,
    total: u64,
}

impl From<Parts> for Bytes {
    fn from(parts: Parts) -> Self {
        let Parts { weights, kv, scratch } = parts;
        Self { weights, kv, scratch, total: parts.total() }
    }
}

#[derive(Serialize)]
struct Device {
    name: String,
    product: Option<String>,
    budget_bytes: u64,
    used_bytes: u64,
    others_bytes: u64,
    /// Why no model lies there.
    reason: Option<&'static str>,
}

impl From<DeviceLine> for Device {
    fn from(it: DeviceLine) -> Self {
        Self {
            name: it.id.to_string(),
            product: it.name,
            budget_bytes: it.budget_bytes,
            used_bytes: it.used_bytes,
            others_bytes: it.others_bytes,
            reason: it.why_not,
        }
    }
}

#[derive(Serialize)]
struct Loaded {
    model: String,
    size: u64,
    bytes: Bytes,
    placement: Option<String>,
    running: usize,
    pinned: bool,
    idle_ms: u64,
    wake_ms: u64,
    probability: f64,
    burden: f64,
    leaves: Option<&'static str>,
    reason: Option<String>,
}

impl From<Resident> for Loaded {
    fn from(it: Resident) -> Self {
        Self {
            model: it.name.to_string(),
            size: it.bytes,
            bytes: it.parts.into(),
            placement: it.place,
            running: it.n_running,
            pinned: it.pinned,
            idle_ms: ms(it.worth.idle),
            wake_ms: ms(it.worth.wake),
            probability: it.worth.probability,
            burden: it.worth.burden(),
            leaves: it.leaves.as_ref().map(Decision::word),
            reason: it.leaves.map(|decision| decision.to_string()),
        }
    }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// `/api/plan`.
pub fn plan(plan: Plan) -> Vec<u8> {
    let reason = match &plan.outcome {
        Outcome::Refuse(fault) => Some(fault.message.clone()),
        Outcome::Wait(decision) => Some(decision.to_string()),
        Outcome::Serve | Outcome::Queue | Outcome::Load => None,
    };
    bytes(&PlanBody {
        model: plan.name.to_string(),
        outcome: plan.outcome.word(),
        reason,
        bytes: plan.parts.map(Bytes::from),
        placement: plan.place,
        context: plan.context,
        slots: plan.slots,
        wake_ms: ms(plan.wake),
        is_measured: plan.is_measured,
        devices: plan.devices.into_iter().map(Device::from).collect(),
        complaints: plan.complaints,
        loaded: plan.resident.into_iter().map(Loaded::from).collect(),
    })
}

#[derive(Serialize)]
struct WhyBody {
    model: String,
    decisions: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    at: Option<String>,
    what: &'static str,
    reason: String,
}

/// `/api/why`.
pub fn why(why: Why) -> Vec<u8> {
    let line = |(at, decision): (_, Decision)| Line {
        at: Timestamp::try_from(at).ok().map(|at| at.to_string()),
        what: decision.word(),
        reason: decision.to_string(),
    };
    let decisions = why.decisions.into_iter().map(line).collect();
    bytes(&WhyBody { model: why.name.to_string(), decisions })
}
