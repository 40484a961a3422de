//! The rules as tables, then random histories against a world that plays all runners.

use v4_proto::{Ability, Digest, Layout, ModelInfo};

use super::*;

const MIB: u64 = 1 << 20;

fn info(weight_bytes: u64) -> ModelInfo {
    ModelInfo {
        format: "gguf".into(),
        arch: "x".into(),
        supported: true,
        quant: "Q4_0".into(),
        n_params: 1,
        context_length: 1024,
        embedding_length: 1,
        n_layers: 1,
        weight_bytes,
        kv_bytes_per_token: 0,
        layout: Layout::default(),
        abilities: vec![Ability::Completion],
    }
}

/// `a` and `a2` are two versions of the name `a`.
fn target(version: &str, mib: u64) -> Target {
    let name = &version[..1];
    Target {
        name: name.parse().expect("a name"),
        digest: Digest::from_bytes([version.as_bytes()[version.len() - 1]; 32]),
        files: ModelFiles { weights: vec![version.into()], ..ModelFiles::default() },
        blobs: Vec::new(),
        info: Some(info(mib * MIB - limits::SCRATCH_BYTES)),
    }
}

fn rules() -> Rules {
    Rules {
        budget_bytes: 1000 * MIB,
        max_queue: 3,
        slots: 2,
        context: 4096,
        kv_type: KvType::F16,
        threads: 1,
        spare: false,
        keep_alive: KeepAlive::For(secs(300)),
        models: ModelTable::default(),
    }
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn spell(effect: &Effect) -> String {
    match effect {
        Effect::Spawn(runner) => format!("spawn {runner}"),
        Effect::Load { runner, model } => {
            format!("load {runner} {}", model.files().weights[0].display())
        }
        Effect::Send { runner, ask, .. } => format!("send {runner} #{ask}"),
        Effect::Cancel { runner, ask } => format!("cancel {runner} #{ask}"),
        Effect::Cores { runner, threads } => format!("cores {runner} {threads}"),
        Effect::Stop { runner, .. } => format!("stop {runner}"),
        Effect::Done { ask, .. } => format!("done #{ask}"),
        Effect::Fail { ask, fault } => format!("fail #{ask} {:?}", fault.code),
        Effect::Forget(ask) => format!("forget #{ask}"),
    }
}

/// A history told event by event, with what each must lead to.
struct Story {
    state: State,
    now: Time,
}

impl Story {
    fn new(rules: Rules) -> Self {
        Self { state: State::new(rules), now: secs(1) }
    }

    #[track_caller]
    fn on(&mut self, event: Event, expected: &str) {
        let effects = step(&mut self.state, event, self.now);
        let spelled: Vec<String> = effects.iter().map(spell).collect();
        assert_eq!(spelled.join("; "), expected);
    }

    #[track_caller]
    fn ask_as(&mut self, kind: Kind, id: AskId, model: (&str, u64), expected: &str) {
        let ask = Ask { id, kind, keep_alive: KeepAlive::For(secs(300)), caller: "me".into() };
        let target = Box::new(target(model.0, model.1));
        self.on(Event::Ask { ask, target, hold: Hold::default() }, expected);
    }

    #[track_caller]
    fn ask(&mut self, id: AskId, model: (&str, u64), expected: &str) {
        self.ask_as(Kind::Generate, id, model, expected);
    }

    #[track_caller]
    fn started(&mut self, runner: RunnerId, expected: &str) {
        self.on(Event::Started(runner), expected);
    }

    #[track_caller]
    fn loaded(&mut self, runner: RunnerId, mib: u64, expected: &str) {
        self.on(Event::Loaded { runner, bytes: mib * MIB }, expected);
    }

    #[track_caller]
    fn ended(&mut self, runner: RunnerId, ask: AskId, expected: &str) {
        self.on(Event::Ended { runner, ask }, expected);
    }

    #[track_caller]
    fn gone(&mut self, runner: RunnerId, cause: Cause, begun: &[AskId], expected: &str) {
        let begun = begun.iter().copied().collect();
        self.on(Event::Gone { runner, cause, begun }, expected);
    }

    #[track_caller]
    fn after(&mut self, time: Duration, expected: &str) {
        self.now += time;
        self.on(Event::Tick, expected);
    }
}

#[test]
fn the_background_holds_no_place_that_others_want_and_has_its_turn() {
    let mut story = Story::new(Rules { slots: 2, ..rules() });
    let model = ("a", 400);
    story.ask(1, model, "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.ended(1, 1, "");
    for id in [2, 3] {
        story.ask_as(Kind::Background, id, model, &format!("send 1 #{id}"));
    }
    story.ask_as(Kind::Background, 4, model, "");
    // The runner has those in the background wait; of the others there are two at a time.
    story.ask(5, model, "send 1 #5");
    story.ask(6, model, "send 1 #6");
    story.ask(7, model, "");
    story.ended(1, 2, "");
    story.ended(1, 5, "send 1 #7");
    story.ended(1, 6, "");
    story.ended(1, 3, "send 1 #4");
    // One whose turn has come gives way no more: it is before those that came later.
    story.ask_as(Kind::Background, 8, model, "");
    story.after(limits::AGEING, "");
    story.ask(9, model, "");
    story.ended(1, 7, "send 1 #8");
    story.ended(1, 4, "send 1 #9");
}

#[test]
fn a_request_loads_its_model_and_the_keep_alive_unloads_it() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.after(secs(1000), "");
    story.ended(1, 1, "");
    let due = story.state.next_deadline();
    assert_eq!(due, Some(story.now + secs(300)));
    story.after(secs(299), "");
    story.after(secs(1), "stop 1");
    assert_eq!(story.state.used_bytes(), 400 * MIB, "memory counts until the process is gone");
    story.gone(1, Cause::Left, &[], "");
    assert_eq!(story.state.used_bytes(), 0);
    assert!(story.state.names.is_empty(), "nothing is remembered of it");
}

#[test]
fn slots_fill_then_the_queue_then_requests_are_refused() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.ask(2, ("a", 400), "");
    story.ask(3, ("a", 400), "");
    story.ask(4, ("a", 400), "fail #4 Overloaded");
    story.loaded(1, 400, "send 1 #1; send 1 #2");
    story.ask(5, ("a", 400), "");
    story.ask(6, ("a", 400), "");
    story.ask(7, ("a", 400), "fail #7 Overloaded");
    story.on(Event::Left(5), "forget #5");
    story.ended(1, 1, "send 1 #3");
    story.ended(1, 2, "send 1 #6");
    story.on(Event::Left(6), "cancel 1 #6");
    story.on(Event::Left(6), "");
    story.ended(1, 6, "forget #6");
    story.ended(1, 3, "");
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let mut story = Story::new(Rules { slots: 1, max_queue: 2, ..rules() });
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.ask(2, ("a", 400), "");
    story.ask(3, ("a", 400), "");
    let ask = Ask { id: 4, kind: Kind::Load, keep_alive: KeepAlive::Forever, caller: "me".into() };
    let event = Event::Ask { ask, target: Box::new(target("a", 400)), hold: Hold::default() };
    let effects = step(&mut story.state, event, story.now);
    let [Effect::Fail { fault, .. }] = effects.as_slice() else { panic!("{effects:?}") };
    assert_eq!(fault.message, "the queue of a:latest is full (2 requests wait); try again in 3 s");
}

#[test]
fn the_spare_runner_takes_the_load_and_is_replaced_when_it_is_done() {
    let mut story = Story::new(Rules { spare: true, ..rules() });
    story.after(secs(0), "spawn 1");
    story.started(1, "");
    story.ask(1, ("a", 400), "load 1 a");
    story.loaded(1, 400, "send 1 #1; spawn 2");
    story.gone(2, Cause::Died, &[], "");
    story.after(secs(1), "spawn 3");
    story.gone(3, Cause::Died, &[], "");
    story.after(secs(1), "");
    story.after(secs(1), "spawn 4");
}

#[test]
fn the_longest_idle_model_makes_room() {
    let mut story = Story::new(rules());
    for (n, model) in [(1, "a"), (2, "b")] {
        story.ask(n, (model, 400), &format!("spawn {n}"));
        story.started(n, &format!("load {n} {model}"));
        story.loaded(n, 400, &format!("send {n} #{n}"));
        story.now += secs(1);
    }
    story.ended(2, 2, "");
    story.now += secs(1);
    story.ended(1, 1, "");
    // b has been idle for longer, although a was loaded first.
    story.ask(3, ("c", 400), "stop 2");
    story.gone(2, Cause::Left, &[], "spawn 3");
    story.started(3, "load 3 c");
    story.loaded(3, 400, "send 3 #3");
}

#[test]
fn no_more_is_evicted_than_needed() {
    let mut story = Story::new(rules());
    for (n, model, mib, pause) in [(1, "a", 200, 200), (2, "b", 700, 10)] {
        story.ask(n, (model, mib), &format!("spawn {n}"));
        story.started(n, &format!("load {n} {model}"));
        story.loaded(n, mib, &format!("send {n} #{n}"));
        story.ended(n, n, "");
        story.now += secs(pause);
    }
    // a is the longest idle, but b alone is enough.
    story.ask(3, ("c", 600), "stop 2");
}

#[test]
fn a_busy_model_drains_and_is_not_cut() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 800), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 800, "send 1 #1");
    story.now += limits::QUANTUM_MAX;
    story.ask(2, ("b", 800), "");
    story.ask(3, ("a", 800), "");
    assert!(story.state.runners[&1].is_draining());
    story.ended(1, 1, "stop 1");
    story.gone(1, Cause::Left, &[], "spawn 2");
    story.started(2, "load 2 b");
    // b gets its turn before a, which waits since earlier than b is ready, takes the memory back.
    story.loaded(2, 800, "send 2 #2");
    story.ended(2, 2, "stop 2");
    story.gone(2, Cause::Left, &[], "spawn 3");
    story.started(3, "load 3 a");
    story.loaded(3, 800, "send 3 #3");
}

#[test]
fn a_drain_ends_when_nobody_needs_the_memory_any_more() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 800), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 800, "send 1 #1");
    story.now += limits::QUANTUM_MAX;
    story.ask(2, ("b", 800), "");
    story.ask(3, ("a", 800), "");
    story.on(Event::Left(2), "forget #2; send 1 #3");
}

#[test]
fn a_model_that_cannot_fit_is_refused_and_fewer_slots_are_tried_first() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 1001), "fail #1 OutOfMemory");
    let mut fits_once = target("b", 500);
    fits_once.info.as_mut().expect("set").kv_bytes_per_token = 400 * MIB / 1024;
    let model = State::new(rules()).fit(fits_once.clone(), Hold::default()).expect("one fits");
    assert_eq!((model.slots, model.context, model.bytes), (1, 1024, 900 * MIB));
    let smaller = Rules { kv_type: KvType::Q8_0, ..rules() };
    let model = State::new(smaller).fit(fits_once, Hold::default()).expect("both sequences fit");
    assert_eq!((model.slots, model.bytes), (2, 925 * MIB));
}

#[test]
fn a_death_retries_what_has_no_token_yet_and_fails_the_rest() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.ask(2, ("a", 400), "send 1 #2");
    story.ask(3, ("a", 400), "");
    story.gone(1, Cause::Died, &[1], "fail #1 RunnerDied");
    assert_eq!(story.state.next_deadline(), Some(story.now + secs(1)));
    story.after(secs(1), "spawn 2");
    story.started(2, "load 2 a");
    story.loaded(2, 400, "send 2 #2; send 2 #3");
    // Once is enough.
    story.gone(2, Cause::Died, &[], "fail #2 RunnerDied");
    story.after(secs(1), "");
    story.after(secs(1), "spawn 3");
}

#[test]
fn three_deaths_put_a_model_out_of_service_for_a_while() {
    let mut story = Story::new(rules());
    for n in 1..=3 {
        story.ask(n, ("a", 400), &format!("spawn {n}"));
        story.started(n, &format!("load {n} a"));
        story.loaded(n, 400, &format!("send {n} #{n}"));
        story.gone(n, Cause::Died, &[n], &format!("fail #{n} RunnerDied"));
        story.now += secs(60);
    }
    story.ask(4, ("a", 400), "fail #4 Overloaded");
    // Another model, and other files of this one, are not concerned.
    story.ask(5, ("b", 400), "spawn 4");
    story.now += secs(240);
    story.ask(6, ("a", 400), "spawn 5");
}

#[test]
fn the_queue_of_a_quarantined_model_is_told() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.gone(1, Cause::Died, &[], "");
    story.after(secs(1), "spawn 2");
    story.started(2, "load 2 a");
    story.gone(2, Cause::Died, &[], "");
    story.after(secs(2), "spawn 3");
    story.started(3, "load 3 a");
    story.gone(3, Cause::Died, &[], "fail #1 Overloaded");
}

#[test]
fn a_load_that_is_refused_tells_everybody_who_waits() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.ask_as(Kind::Load, 2, ("a", 400), "");
    story.started(1, "load 1 a");
    let cause = Cause::Refused(Fault::new(Code::Corrupt, "no"));
    story.gone(1, cause, &[], "fail #1 Corrupt; fail #2 Corrupt");
    story.ask(3, ("a", 400), "spawn 2");
}

#[test]
fn a_swap_loads_beside_where_both_fit() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.ask_as(Kind::Swap, 2, ("a2", 400), "spawn 2");
    story.started(2, "load 2 a2");
    // Until the new one is ready, the old one serves, also those who have not heard of the new.
    story.ask(3, ("a", 400), "send 1 #3");
    story.loaded(2, 400, "done #2; stop 1");
    story.ask(4, ("a2", 400), "send 2 #4");
    story.ended(1, 1, "");
    // Its deadline has passed before the first token of #3: the new one takes that over.
    story.gone(1, Cause::Left, &[], "send 2 #3");
}

#[test]
fn a_swap_that_does_not_fit_beside_goes_after() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 600), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 600, "send 1 #1");
    story.ask_as(Kind::Swap, 2, ("a2", 600), "");
    story.ask(3, ("a2", 600), "");
    story.ended(1, 1, "stop 1");
    story.gone(1, Cause::Left, &[], "spawn 2");
    story.started(2, "load 2 a2");
    // It fails: the old one comes back for those who wait.
    let cause = Cause::Refused(Fault::new(Code::Corrupt, "no"));
    story.gone(2, cause, &[], "fail #2 Corrupt; spawn 3");
    story.started(3, "load 3 a");
    story.loaded(3, 600, "send 3 #3");
    // The name points back for a while; a swap that is asked for tries again at once.
    story.ask(4, ("a2", 600), "send 3 #4");
    let error = story.state.loaded().next().and_then(|(_, _, _, error)| error).cloned();
    assert_eq!(error.map(|fault| fault.code), Some(Code::Corrupt));
    story.ended(3, 3, "");
    story.ended(3, 4, "");
    story.ask_as(Kind::Swap, 5, ("a2", 600), "stop 3");
    story.gone(3, Cause::Left, &[], "spawn 4");
    story.started(4, "load 4 a2");
    story.loaded(4, 600, "done #5");
    let error = story.state.loaded().next().and_then(|(_, _, _, error)| error).cloned();
    assert_eq!(error, None);
}

#[test]
fn an_old_request_does_not_turn_a_finished_swap_back() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.ended(1, 1, "");
    story.ask_as(Kind::Swap, 2, ("a2", 400), "spawn 2");
    story.started(2, "load 2 a2");
    story.loaded(2, 400, "done #2; stop 1");
    story.gone(1, Cause::Left, &[], "");
    story.ask(3, ("a", 400), "send 2 #3");
    story.ended(2, 3, "");
    // A swap may, and whoever comes later means what it says.
    story.ask_as(Kind::Swap, 4, ("a", 400), "spawn 3");
    story.started(3, "load 3 a");
    story.loaded(3, 400, "done #4; stop 2");
    story.gone(2, Cause::Left, &[], "");
    story.now += limits::STALE_ASK;
    story.ask(5, ("a2", 400), "send 3 #5; spawn 4");
}

#[test]
fn a_swap_goes_on_when_the_old_one_dies() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.ended(1, 1, "");
    story.ask_as(Kind::Swap, 2, ("a2", 400), "spawn 2");
    story.started(2, "load 2 a2");
    // The successor takes its place: the swap is done when that is ready, not before.
    story.gone(1, Cause::Died, &[], "");
    story.loaded(2, 400, "done #2");
}

#[test]
fn a_successor_takes_the_keep_alive_over() {
    for mib in [400, 600] {
        let mut story = Story::new(rules());
        let ask =
            Ask { id: 1, kind: Kind::Load, keep_alive: KeepAlive::Forever, caller: "me".into() };
        let event = Event::Ask { ask, target: Box::new(target("a", mib)), hold: Hold::default() };
        story.on(event, "spawn 1");
        story.started(1, "load 1 a");
        story.loaded(1, mib, "done #1");
        if mib == 400 {
            story.ask_as(Kind::Swap, 2, ("a2", mib), "spawn 2");
        } else {
            story.ask_as(Kind::Swap, 2, ("a2", mib), "stop 1");
            story.gone(1, Cause::Left, &[], "spawn 2");
        }
        story.started(2, "load 2 a2");
        step(&mut story.state, Event::Loaded { runner: 2, bytes: mib * MIB }, story.now);
        assert_eq!(story.state.runners[&2].expires(), None, "{mib}");
    }
}

#[test]
fn a_swap_that_fails_beside_leaves_the_old_one_in_service() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.ended(1, 1, "");
    story.ask(2, ("a2", 400), "send 1 #2; spawn 2");
    story.started(2, "load 2 a2");
    story.gone(2, Cause::Died, &[], "");
    story.ended(1, 2, "");
    story.ask(3, ("a2", 400), "send 1 #3");
    story.now += limits::BACKOFF_LAST;
    story.ask(4, ("a2", 400), "send 1 #4; spawn 3");
}

#[test]
fn a_swap_of_nothing_or_to_the_same_files_is_done_at_once() {
    let mut story = Story::new(rules());
    story.ask_as(Kind::Swap, 1, ("a", 400), "done #1");
    story.ask(2, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.ask_as(Kind::Swap, 3, ("a", 400), "");
    story.loaded(1, 400, "done #3; send 1 #2");
    story.ask_as(Kind::Swap, 4, ("a", 400), "done #4");
}

#[test]
fn unload_waits_for_running_answers() {
    let mut story = Story::new(rules());
    let name: ModelName = "A".parse().expect("a name");
    story.on(Event::Unload(name.clone()), "");
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.on(Event::Unload(name), "");
    story.ended(1, 1, "stop 1");
}

#[test]
fn nobody_waits_for_ever() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    assert_eq!(story.state.next_deadline(), Some(story.now + limits::QUEUE_WAIT));
    // Asked for too late, the deadline is still told.
    story.now += limits::QUEUE_WAIT;
    assert_eq!(story.state.next_deadline(), Some(story.now));
    story.after(secs(0), "fail #1 Overloaded");
    assert_eq!(story.state.next_deadline(), None);
}

#[test]
fn a_shutdown_refuses_what_waits_and_drains_what_runs() {
    let mut story = Story::new(Rules { spare: true, slots: 1, ..rules() });
    story.after(secs(0), "spawn 1");
    story.started(1, "");
    story.ask(1, ("a", 400), "load 1 a");
    story.loaded(1, 400, "send 1 #1; spawn 2");
    story.ask(2, ("a", 400), "");
    let shutdown = Event::Shutdown { deadline: secs(5) };
    story.on(shutdown, "fail #2 Overloaded; stop 1; stop 2");
    story.ask(3, ("a", 400), "fail #3 Overloaded");
    story.gone(2, Cause::Left, &[], "");
    assert!(!story.state.is_over());
    story.gone(1, Cause::Left, &[], "fail #1 Overloaded");
    assert!(story.state.is_over());
}

#[test]
fn a_runner_that_takes_more_than_its_header_said_is_paid_by_idle_ones() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 400), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 400, "send 1 #1");
    story.ended(1, 1, "");
    story.now += secs(1);
    story.ask(2, ("b", 400), "spawn 2");
    story.started(2, "load 2 b");
    story.loaded(2, 700, "send 2 #2; stop 1");
}

#[test]
fn cores_are_divided_among_those_that_answer() {
    let mut story = Story::new(Rules { threads: 5, ..rules() });
    story.ask(1, ("a", 300), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 300, "send 1 #1");
    story.ask(2, ("b", 300), "spawn 2");
    story.started(2, "load 2 b");
    story.loaded(2, 300, "send 2 #2; cores 1 3; cores 2 2");
    story.ask(3, ("a", 300), "send 1 #3");
    story.ended(1, 1, "");
    // Idle, it gives its cores to the other, and has its share again with its next answer.
    story.ended(1, 3, "cores 2 5");
    story.ask(4, ("a", 300), "send 1 #4; cores 2 2");
    story.gone(2, Cause::Died, &[2], "fail #2 RunnerDied; cores 1 5");
}

#[test]
fn each_runner_has_a_core_even_where_there_are_too_few() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 300), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 300, "send 1 #1");
    story.ask(2, ("b", 300), "spawn 2");
    story.started(2, "load 2 b");
    story.loaded(2, 300, "send 2 #2");
}

mod gpus;
mod places;
mod reload;
mod rules;
mod swaps;

mod random {
    //! Random histories: the world plays clients and runners in any order that real ones could.

    use std::collections::HashMap;

    use super::*;

    /// A small generator with a good mix (splitmix64), so that a failing seed can be run again.
    struct Dice(u64);

    impl Dice {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        fn below(&mut self, n: usize) -> usize {
            usize::try_from(self.next() % n as u64).expect("below a usize")
        }
    }

    #[derive(Default)]
    struct Process {
        started: bool,
        loading: Option<u64>,
        running: BTreeMap<AskId, bool>,
        threads: u32,
        stopping: bool,
    }

    const THREADS: u32 = 4;

    struct World {
        state: State,
        now: Time,
        dice: Dice,
        processes: BTreeMap<RunnerId, Process>,
        /// Ends by ask; every ask must get exactly one.
        ends: HashMap<AskId, u32>,
        next_ask: AskId,
    }

    const MODELS: [(&str, u64); 6] =
        [("a", 300), ("a2", 350), ("b", 450), ("c", 600), ("d", 900), ("e", 1100)];

    impl World {
        fn new(seed: u64) -> Self {
            let spare = seed.is_multiple_of(2);
            Self {
                state: State::new(Rules { spare, threads: THREADS, ..rules() }),
                now: secs(1),
                dice: Dice(seed),
                processes: BTreeMap::new(),
                ends: HashMap::new(),
                next_ask: 1,
            }
        }

        fn feed(&mut self, event: Event) {
            let busy: Vec<RunnerId> = self
                .processes
                .iter()
                .filter(|(_, process)| !process.running.is_empty())
                .map(|(id, _)| *id)
                .collect();
            let may_cut = matches!(event, Event::Shutdown { .. } | Event::Loaded { .. });
            for effect in step(&mut self.state, event, self.now) {
                match effect {
                    Effect::Spawn(id) => {
                        let process = Process { threads: THREADS, ..Process::default() };
                        assert!(self.processes.insert(id, process).is_none());
                    }
                    Effect::Load { runner, model } => {
                        let process = self.processes.get_mut(&runner).expect("a live runner");
                        assert!(process.started && process.loading.is_none());
                        process.loading = Some(model.bytes);
                    }
                    Effect::Send { runner, ask, .. } => {
                        let process = self.processes.get_mut(&runner).expect("a live runner");
                        assert!(!process.stopping, "work for a runner that was told to leave");
                        process.running.insert(ask, false);
                        assert!(process.running.len() <= 2, "more than the slots");
                    }
                    Effect::Cores { runner, threads } => {
                        self.processes.get_mut(&runner).expect("a live runner").threads = threads;
                    }
                    Effect::Cancel { runner, ask } => {
                        assert!(self.processes[&runner].running.contains_key(&ask));
                    }
                    Effect::Stop { runner, .. } => {
                        assert!(may_cut || !busy.contains(&runner), "a busy runner was evicted");
                        let process = self.processes.get_mut(&runner).expect("a live runner");
                        assert!(!process.stopping);
                        process.stopping = true;
                    }
                    Effect::Done { ask, .. } | Effect::Fail { ask, .. } | Effect::Forget(ask) => {
                        *self.ends.get_mut(&ask).expect("asked") += 1;
                    }
                }
            }
            self.check();
        }

        fn check(&self) {
            assert!(self.state.used_bytes() <= 1000 * MIB, "over budget");
            // Those that a runner's death gave back, and one newcomer each.
            let (slots, callers) = (2, 3);
            for name in self.state.names.values() {
                let n_waiting = name.queue.len() + name.swaps.len();
                assert!(n_waiting <= 3 + slots + callers, "queue bound");
            }
            assert!(self.ends.values().all(|n| *n <= 1), "two ends");
            let busy = self.processes.values().filter(|process| !process.running.is_empty());
            let shares: Vec<u32> = busy.map(|process| process.threads).collect();
            let n = u32::try_from(shares.len()).expect("few");
            assert!(shares.iter().all(|threads| *threads > 0), "{shares:?}");
            let is_fair = n == 0 || shares.iter().sum::<u32>() == THREADS.max(n);
            assert!(is_fair, "{shares:?}");
        }

        /// An end that the runner gives: by the policy's word only if the client has left.
        fn end_by_runner(&mut self, runner: RunnerId, ask: AskId) {
            let process = self.processes.get_mut(&runner).expect("a live runner");
            process.running.remove(&ask);
            let before = self.ends[&ask];
            self.feed(Event::Ended { runner, ask });
            let end = self.ends.get_mut(&ask).expect("asked");
            if *end == before {
                *end += 1;
            }
            assert_eq!(*end, 1);
        }

        fn pick_runner(&mut self, is: impl Fn(&Process) -> bool) -> Option<RunnerId> {
            let ids: Vec<RunnerId> =
                self.processes.iter().filter(|(_, p)| is(p)).map(|(id, _)| *id).collect();
            (!ids.is_empty()).then(|| ids[self.dice.below(ids.len())])
        }

        fn kill(&mut self, runner: RunnerId, cause: Cause) {
            let process = self.processes.remove(&runner).expect("a live runner");
            let begun = process.running.iter().filter(|(_, begun)| **begun);
            let begun = begun.map(|(ask, _)| *ask).collect();
            self.feed(Event::Gone { runner, cause, begun });
        }

        fn ask(&mut self) {
            let (version, mib) = MODELS[self.dice.below(MODELS.len())];
            let id = self.next_ask;
            self.next_ask += 1;
            self.ends.insert(id, 0);
            let kind = [Kind::Generate, Kind::Generate, Kind::Generate, Kind::Load, Kind::Swap]
                [self.dice.below(5)];
            let times = [0, 1, 30, 300];
            let keep_alive = KeepAlive::For(secs(times[self.dice.below(4)]));
            let caller = ["x", "y", "z"][self.dice.below(3)].into();
            let ask = Ask { id, kind, keep_alive, caller };
            let target = Box::new(target(version, mib));
            self.feed(Event::Ask { ask, target, hold: Hold::default() });
        }

        fn turn(&mut self) {
            self.now += Duration::from_millis(self.dice.next() % 2000);
            match self.dice.below(16) {
                0..=4 => self.ask(),
                5 => {
                    let ask = 1 + self.dice.next() % self.next_ask;
                    self.feed(Event::Left(ask));
                }
                6..=7 => {
                    if let Some(id) = self.pick_runner(|p| !p.started) {
                        self.processes.get_mut(&id).expect("picked").started = true;
                        self.feed(Event::Started(id));
                    }
                }
                8..=9 => {
                    if let Some(id) = self.pick_runner(|p| p.loading.is_some() && !p.stopping) {
                        self.finish_load(id);
                    }
                }
                10..=12 => {
                    if let Some(id) = self.pick_runner(|p| !p.running.is_empty()) {
                        self.progress(id);
                    }
                }
                13 => {
                    if let Some(id) = self.pick_runner(|p| p.stopping && p.running.is_empty()) {
                        self.kill(id, Cause::Left);
                    }
                }
                14 => {
                    if let Some(id) = self.pick_runner(|_| true) {
                        let cause = match self.dice.below(4) {
                            0 => Cause::Refused(Fault::new(Code::Corrupt, "no")),
                            _ => Cause::Died,
                        };
                        self.kill(id, cause);
                    }
                }
                _ => {
                    let name = ["a", "b", "c", "d"][self.dice.below(4)];
                    self.feed(Event::Unload(name.parse().expect("a name")));
                }
            }
        }

        fn finish_load(&mut self, id: RunnerId) {
            let bytes = self.processes.get_mut(&id).expect("picked").loading.take();
            self.feed(Event::Loaded { runner: id, bytes: bytes.expect("loading") });
        }

        fn progress(&mut self, id: RunnerId) {
            let process = self.processes.get_mut(&id).expect("picked");
            let asks: Vec<AskId> = process.running.keys().copied().collect();
            let ask = asks[self.dice.below(asks.len())];
            let begun = process.running.get_mut(&ask).expect("picked");
            if *begun {
                self.end_by_runner(id, ask);
            } else {
                *begun = true;
            }
        }

        /// Lets everything that can happen happen, without new asks or deaths.
        fn settle(&mut self) {
            for _ in 0..10_000 {
                if let Some(id) = self.pick_runner(|p| !p.started) {
                    self.processes.get_mut(&id).expect("picked").started = true;
                    self.feed(Event::Started(id));
                } else if let Some(id) = self.pick_runner(|p| p.loading.is_some() && !p.stopping) {
                    self.finish_load(id);
                } else if let Some(id) = self.pick_runner(|p| !p.running.is_empty()) {
                    self.progress(id);
                } else if let Some(id) = self.pick_runner(|p| p.stopping) {
                    self.kill(id, Cause::Left);
                } else if let Some(due) = self.state.next_deadline() {
                    self.now = self.now.max(due);
                    self.feed(Event::Tick);
                } else {
                    return;
                }
            }
            panic!("the world does not come to rest");
        }
    }

    #[test]
    fn random_histories_keep_the_rules() {
        for seed in 0..300 {
            let mut world = World::new(seed);
            for _ in 0..400 {
                world.turn();
            }
            world.settle();
            let open: Vec<_> = world.ends.iter().filter(|(_, n)| **n != 1).collect();
            assert!(open.is_empty(), "seed {seed}: asks without an end: {open:?}");
            let spares = usize::from(seed % 2 == 0);
            assert_eq!(world.processes.len(), spares, "seed {seed}: runners left over");
            world.now += limits::DEATH_WINDOW;
            world.feed(Event::Tick);
            assert!(world.state.names.is_empty(), "seed {seed}: names left over");
        }
    }
}

/// `a` with 600 MiB in runner 1, loaded and idle since second 1.
fn idle() -> Story {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 600), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 600, "send 1 #1");
    story.ended(1, 1, "");
    story
}

/// Why runners are told to leave.
fn reasons(effects: Vec<Effect>) -> Vec<(RunnerId, Reason)> {
    let reason = |effect| match effect {
        Effect::Stop { runner, reason, .. } => Some((runner, reason)),
        _ => None,
    };
    effects.into_iter().filter_map(reason).collect()
}

#[test]
fn a_runner_is_told_to_leave_for_a_reason() {
    let ask = |version: &str, kind| Event::Ask {
        ask: Ask { id: 9, kind, keep_alive: KeepAlive::Forever, caller: "me".into() },
        target: Box::new(target(version, 600)),
        hold: Hold::default(),
    };
    let name = |text: &str| -> ModelName { text.parse().expect("a name") };
    let table = [
        (Event::Tick, 301, Reason::Idle),
        (Event::Unload(name("a")), 2, Reason::Asked),
        (ask("b", Kind::Generate), 2, Reason::Room(name("b"))),
        (ask("a2", Kind::Swap), 2, Reason::Replaced),
        (Event::Shutdown { deadline: Duration::ZERO }, 2, Reason::Shutdown),
    ];
    for (event, at, reason) in table {
        assert!(Reason::WORDS.contains(&reason.word()));
        let effects = step(&mut idle().state, event, secs(at));
        assert_eq!(reasons(effects), [(1, reason)]);
    }
    // What a runner says it takes is what counts, and may be more than its header said.
    for (mib, expected) in [(300, vec![]), (500, vec![(1, Reason::OverBudget)])] {
        let mut story = idle();
        story.ask(2, ("b", 300), "spawn 2");
        story.started(2, "load 2 b");
        let loaded = Event::Loaded { runner: 2, bytes: mib * MIB };
        assert_eq!(reasons(step(&mut story.state, loaded, secs(2))), expected);
    }
}

#[test]
fn who_asks_for_an_unwanted_model_wants_it_again() {
    let mut story = idle();
    // It is in use when somebody wants it out of memory, and asked for once more before it leaves.
    story.ask(2, ("a", 600), "send 1 #2");
    story.on(Event::Unload("a".parse().expect("a name")), "");
    story.ask(3, ("a", 600), "send 1 #3");
    story.ended(1, 2, "");
    story.ended(1, 3, "");
    let effects = step(&mut story.state, Event::Tick, secs(400));
    assert_eq!(reasons(effects), [(1, Reason::Idle)]);
}
