//! What is said of single models, and what a plan and a history say.

use super::*;

fn with(models: &[(&str, ModelRules)]) -> Story {
    let models = models.iter().map(|(name, rules)| ((*name).to_owned(), rules.clone()));
    Story::new(Rules { models: ModelTable::new(models), ..rules() })
}

/// Loads a model in runner `id` and has it answer once.
fn load(story: &mut Story, id: u64, name: &'static str, mib: u64) {
    story.ask(id, (name, mib), &format!("spawn {id}"));
    story.started(id, &format!("load {id} {name}"));
    story.loaded(id, mib, &format!("send {id} #{id}"));
    story.ended(id, id, "");
    story.now += secs(10);
}

#[test]
fn a_pinned_model_stays_and_what_does_not_fit_beside_it_is_refused() {
    let pinned = ModelRules { pinned: true, ..ModelRules::default() };
    let mut story = with(&[("a", pinned)]);
    load(&mut story, 1, "a", 400);
    load(&mut story, 2, "b", 400);
    story.ask(3, ("c", 500), "stop 2");
    story.gone(2, Cause::Left, &[], "spawn 3");
    story.ask(4, ("d", 700), "fail #4 OutOfMemory");
    story.after(secs(290), "");
    assert_eq!(story.state.runners[&1].expires(), None);
    // Only who says its name gets it out.
    story.on(Event::Unload("a".parse().expect("a name")), "stop 1");
}

#[test]
fn limits_are_those_of_the_model() {
    let own = ModelRules {
        max_queue: Some(1),
        slots: Some(1),
        context: Some(64),
        keep_alive: Some(KeepAlive::Forever),
        ..ModelRules::default()
    };
    let mut story = with(&[("a*", own)]);
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    let model = story.state.runners[&1].model.clone().expect("loaded");
    assert_eq!((model.slots, model.context), (1, 64));
    story.ask(2, ("a", 400), "");
    story.ask(3, ("a", 400), "fail #3 Overloaded");
    let name = |text: &str| -> ModelName { text.parse().expect("a name") };
    assert_eq!(story.state.keep_alive(&name("a")), KeepAlive::Forever);
    assert_eq!(story.state.keep_alive(&name("b")), KeepAlive::For(secs(300)));
}

#[test]
fn a_higher_priority_needs_no_quantum_and_leaves_last() {
    let high = ModelRules { priority: 1, ..ModelRules::default() };
    let mut story = with(&[("a", high)]);
    load(&mut story, 1, "a", 400);
    load(&mut story, 2, "b", 300);
    // a is the longer idle and the larger.
    story.ask(3, ("c", 500), "stop 2");
    story.gone(2, Cause::Left, &[], "spawn 3");
    story.started(3, "load 3 c");
    story.now += secs(5);
    story.loaded(3, 500, "send 3 #3");
    story.on(Event::Unload("a".parse().expect("a name")), "stop 1");
    story.gone(1, Cause::Left, &[], "");
    // c is in use and within its quantum.
    story.ask(4, ("a", 600), "");
    story.ask(5, ("c", 500), "");
    story.ended(3, 3, "stop 3");
}

#[test]
fn a_longer_wait_outweighs_a_priority() {
    let high = ModelRules { priority: 1, ..ModelRules::default() };
    for (pause, first) in [(limits::PRIORITY_STEP / 2, "c"), (limits::PRIORITY_STEP * 2, "b")] {
        let mut story = with(&[("c", high.clone())]);
        story.ask(1, ("a", 900), "spawn 1");
        story.ask(2, ("b", 900), "");
        story.now += pause;
        story.ask(3, ("c", 900), "");
        story.started(1, "load 1 a");
        story.loaded(1, 900, "send 1 #1");
        story.now += limits::QUANTUM_MAX;
        story.ended(1, 1, "stop 1");
        story.gone(1, Cause::Left, &[], "spawn 2");
        story.started(2, &format!("load 2 {first}"));
    }
}

#[test]
fn models_of_one_group_do_not_leave_for_each_other_and_are_used_together() {
    let group = ModelRules { group: Some("agent".into()), ..ModelRules::default() };
    let mut story = with(&[("a", group.clone()), ("b", group)]);
    load(&mut story, 1, "a", 400);
    load(&mut story, 2, "c", 300);
    // a is the longer idle and the larger, and it is b's mate.
    story.ask(3, ("b", 500), "stop 2");
    story.gone(2, Cause::Left, &[], "spawn 3");
    story.started(3, "load 3 b");
    story.loaded(3, 500, "send 3 #3");
    // As long as b is in use, a is not idle.
    let worth = Worth::of(&story.state, "a:latest", &story.state.runners[&1], story.now);
    assert_eq!(worth.idle, Duration::ZERO);
}

#[test]
fn models_that_exclude_each_other_are_never_in_memory_together() {
    let rules_of_a = ModelRules { excludes: vec!["b".into()], ..ModelRules::default() };
    let mut story = with(&[("a", rules_of_a)]);
    load(&mut story, 1, "a", 200);
    load(&mut story, 2, "c", 200);
    story.ask(3, ("b", 200), "stop 1");
    story.gone(1, Cause::Left, &[], "spawn 3");
    story.ask(4, ("a", 200), "");
    story.started(3, "load 3 b");
    story.loaded(3, 200, "send 3 #3");
    story.now += limits::QUANTUM_MAX;
    story.ended(3, 3, "stop 3");
    story.gone(3, Cause::Left, &[], "spawn 4");
}

/// What a plan for `mib` of `name` says.
fn plan(story: &Story, name: &str, mib: u64) -> Plan {
    preview(&story.state, &target(name, mib), story.now)
}

#[test]
fn a_plan_is_what_happens_and_changes_nothing() {
    let mut story = Story::new(rules());
    assert_eq!(plan(&story, "a", 400).outcome, Outcome::Load);
    load(&mut story, 1, "a", 400);
    load(&mut story, 2, "b", 500);
    assert_eq!(plan(&story, "a", 400).outcome, Outcome::Serve);
    let larger = plan(&story, "c", 300);
    assert_eq!(larger.outcome, Outcome::Load);
    assert_eq!(larger.parts.expect("it fits").total(), 300 * MIB);
    let host = &larger.devices[0];
    assert_eq!((host.budget_bytes, host.used_bytes), (1000 * MIB, 900 * MIB));
    let leaves: Vec<_> = larger.resident.iter().filter(|it| it.leaves.is_some()).collect();
    assert_eq!(leaves.len(), 1);
    assert_eq!(leaves[0].name.to_string(), "a:latest");
    let words = leaves[0].leaves.as_ref().expect("it leaves").to_string();
    assert!(words.starts_with("is unloaded to make room for c:latest: 400 MiB idle for 20.0 s"));
    assert!(matches!(plan(&story, "d", 1001).outcome, Outcome::Refuse(_)));
    // All of that was a plan: it is still so, and then it is done.
    story.ask(3, ("c", 300), "stop 1");
    assert_eq!(plan(&story, "c", 300).outcome, Outcome::Load);
    story.gone(1, Cause::Left, &[], "spawn 3");
    assert_eq!(plan(&story, "c", 300).outcome, Outcome::Queue);
    story.started(3, "load 3 c");
    story.loaded(3, 300, "send 3 #3");
    story.ask(4, ("c", 300), "send 3 #4");
    assert_eq!(plan(&story, "c", 300).outcome, Outcome::Queue);
}

#[test]
fn a_plan_says_for_whom_one_would_wait() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 800), "spawn 1");
    story.started(1, "load 1 a");
    story.now += secs(2);
    story.loaded(1, 800, "send 1 #1");
    let Outcome::Wait(wait) = plan(&story, "b", 800).outcome else { panic!("a has a quantum") };
    let words = wait.to_string();
    assert!(
        words.starts_with("waits for 600 MiB: a:latest is in use and keeps its memory for 11.1 s")
    );
    story.now += limits::QUANTUM_MAX;
    let Outcome::Wait(wait) = plan(&story, "b", 800).outcome else { panic!("a is busy") };
    assert_eq!(wait.to_string(), "waits for 600 MiB: a:latest finishes its answers");
}

#[test]
fn a_history_says_what_was_done_and_why() {
    let mut story = Story::new(rules());
    load(&mut story, 1, "a", 800);
    story.ask(2, ("b", 800), "stop 1");
    story.gone(1, Cause::Left, &[], "spawn 2");
    story.started(2, "load 2 b");
    story.gone(2, Cause::Died, &[], "");
    let words = |story: &Story, name: &str| -> Vec<&'static str> {
        let name: ModelName = name.parse().expect("a name");
        story.state.decisions(&name).map(|(_, decision)| decision.word()).collect()
    };
    assert_eq!(words(&story, "A"), ["load", "ready", "unload"]);
    assert_eq!(words(&story, "b"), ["wait", "load", "died"]);
    story.ask(3, ("c", 2000), "fail #3 OutOfMemory");
    assert_eq!(words(&story, "c"), ["refused"]);
    assert_eq!(words(&story, "d"), [""; 0]);
}
