//! Rules that change while models are loaded.

use super::*;

fn with_model(name: &str, own: ModelRules) -> Rules {
    Rules { models: ModelTable::new([(name.to_owned(), own)]), ..rules() }
}

/// A model that is loaded and idle.
fn loaded() -> Story {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.on(Event::Ended { runner: 1, ask: 1 }, "");
    story
}

fn change(rules: Rules) -> Event {
    Event::Rules(Box::new(rules))
}

#[test]
fn the_same_rules_change_nothing() {
    let mut story = loaded();
    story.on(change(rules()), "");
    story.ask(2, ("a", 400), "send 1 #2");
}

#[test]
fn a_model_with_another_context_is_loaded_again_when_it_is_idle() {
    let mut story = loaded();
    story.ask(2, ("a", 400), "send 1 #2");
    let own = ModelRules { context: Some(64), slots: Some(1), ..ModelRules::default() };
    story.on(change(with_model("a", own)), "");
    let said = |story: &Story| {
        let all = story.state.decisions(&"a".parse().expect("a name"));
        all.map(|(_, decision)| decision.to_string()).last().expect("one")
    };
    assert!(said(&story).starts_with("is to have 64 tokens of context and 1 sequence"));
    story.on(Event::Ended { runner: 1, ask: 2 }, "stop 1; spawn 2");
    story.started(2, "load 2 a");
    let model = story.state.runners[&2].model.clone().expect("chosen");
    assert_eq!((model.context, model.slots), (64, 1));
    story.on(Event::Gone { runner: 1, cause: Cause::Left, begun: BTreeSet::new() }, "");
    story.loaded(2, 400, "");
    story.ask(3, ("a", 400), "send 2 #3");
    // It is not loaded a third time.
    story.on(Event::Ended { runner: 2, ask: 3 }, "");
}

#[test]
fn queue_keep_alive_and_pins_count_at_once() {
    let mut story = loaded();
    let own = ModelRules {
        pinned: true,
        max_queue: Some(0),
        keep_alive: Some(KeepAlive::For(secs(5))),
        ..ModelRules::default()
    };
    story.on(change(with_model("a", own.clone())), "");
    story.now = secs(100);
    story.on(Event::Tick, "");
    story.on(change(with_model("a", ModelRules { pinned: false, ..own })), "stop 1");
}

#[test]
fn beyond_a_smaller_budget_models_leave_when_they_are_idle() {
    let mut story = loaded();
    story.ask(2, ("a", 400), "send 1 #2");
    story.on(change(Rules { budget_bytes: 300 * MIB, ..rules() }), "");
    story.on(Event::Ended { runner: 1, ask: 2 }, "stop 1");
    story.on(Event::Gone { runner: 1, cause: Cause::Left, begun: BTreeSet::new() }, "");
    story.ask(3, ("a", 400), "fail #3 OutOfMemory");
    story.on(change(rules()), "");
    story.ask(4, ("a", 400), "spawn 2");
}

#[test]
fn what_another_process_holds_is_given_to_no_model_and_waited_for() {
    let mut story = Story::new(rules());
    story.on(Event::HoldBack(700 * MIB), "");
    story.ask(1, ("a", 400), "");
    assert_eq!(story.state.used_bytes(), 700 * MIB);
    story.on(Event::HoldBack(600 * MIB), "spawn 1");
    story.ask(2, ("b", 300), "");
    story.on(Event::HoldBack(0), "spawn 2");
}
