//! Rules that change while models are loaded: what counts at once, and what with the next load.

use std::sync::Arc;

use super::{Decision, Key, Model, Phase, Reason, Rules, Runner, RunnerId, State, Turn, key, plan};
use crate::limits;

/// Takes new rules. What is looked up in each step counts in this one; what a runner was loaded
/// with is noted, and [`renew`] has it loaded again when it is idle.
pub(super) fn rules(state: &mut State, rules: Rules, turn: &mut Turn) {
    let before = std::mem::replace(&mut state.rules, rules);
    state.is_shrunk |= state.rules.budget_bytes < before.budget_bytes;
    let loaded: Vec<(RunnerId, Key, Arc<Model>)> = state
        .runners
        .iter()
        .filter(|(_, runner)| runner.phase != Phase::Stopping)
        .filter_map(|(id, runner)| {
            let model = runner.model.clone()?;
            Some((*id, key(&model.target.name), model))
        })
        .collect();
    for (id, own, model) in loaded {
        let keep_alive =
            |rules: &Rules| rules.models.of(&own).keep_alive.unwrap_or(rules.keep_alive);
        let (old, new) = (keep_alive(&before), keep_alive(&state.rules));
        let is_pinned = state.rules.models.of(&own).pinned;
        if let Some(runner) = state.runners.get_mut(&id) {
            runner.is_pinned = is_pinned;
            // One that a request has asked for keeps what it asked for.
            if runner.keep_alive == old {
                runner.keep_alive = new;
            }
        }
        if shape(&before, &own) != shape(&state.rules, &own) {
            reshape(state, id, &own, &model, turn);
        }
    }
}

/// Tokens of context and sequences that the rules wish for a model.
fn shape(rules: &Rules, own: &Key) -> (u32, u32) {
    let of = rules.models.of(own);
    (of.context.unwrap_or(rules.context), of.slots.unwrap_or(rules.slots))
}

/// The runner of a name was loaded with other figures than it would be now.
fn reshape(state: &mut State, id: RunnerId, own: &Key, model: &Model, turn: &mut Turn) {
    // One that does not fit any more is refused when it is asked for, with the figures.
    let Ok(want) = state.fit(model.target.clone(), model.hold.clone()) else { return };
    let differs = (want.context, want.slots) != (model.context, model.slots);
    let Some(runner) = state.runners.get_mut(&id) else { return };
    runner.is_outdated = differs;
    let Some(name) = state.names.get_mut(own) else { return };
    if differs && name.want.files() == model.files() {
        let decision = Decision::Outdated { context: want.context, slots: want.slots };
        state.history.note(own, turn.now, decision);
        name.want = Arc::new(want);
    }
}

/// Loads models again whose figures have changed, as soon as nobody uses them.
pub(super) fn renew(state: &mut State, turn: &mut Turn) {
    // One whose time is over need not be loaded again.
    let stays = |runner: &Runner| runner.expires().is_none_or(|at| at > turn.now);
    let outdated: Vec<RunnerId> = state
        .runners
        .iter()
        .filter(|(_, runner)| runner.is_outdated && runner.is_idle() && !runner.unwanted)
        .filter(|(_, runner)| stays(runner))
        .map(|(id, _)| *id)
        .collect();
    for id in outdated {
        let Some(keep_alive) = state.runners.get(&id).map(|runner| runner.keep_alive) else {
            continue;
        };
        for name in state.names.values_mut().filter(|name| name.runner == Some(id)) {
            name.eager_since = Some(turn.now);
            name.inherited = Some(keep_alive);
        }
        plan::stop(state, id, limits::STOP, Reason::Settings, turn);
    }
}
