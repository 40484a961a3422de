//! Models that do not fit together, used at the same time by clients that wait for one answer
//! before they ask again: how often they are swapped, and how long everybody waits.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::*;

/// A client that asks, reads the answer, thinks, and asks again.
#[derive(Clone, Copy)]
struct Agent {
    model: (&'static str, u64),
    /// What an answer takes.
    answer: Duration,
    /// Between an answer and the next ask.
    thinks: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Ask(usize),
    Hello(RunnerId),
    Ready(RunnerId, u64),
    End(RunnerId, AskId, usize),
    Exit(RunnerId),
    Tick,
}

/// The clients and the runners, each with the time that it takes.
struct World {
    state: State,
    now: Time,
    agents: Vec<Agent>,
    due: BinaryHeap<Reverse<(Time, Due)>>,
    /// Of each ask, whose it is and when it was asked.
    asks: Vec<(usize, Time)>,
    loads: u32,
    load_time: Duration,
    /// What each agent waited for each answer to begin.
    waits: Vec<Vec<Duration>>,
}

impl World {
    fn new(rules: Rules, load_time: Duration, agents: &[Agent]) -> Self {
        let mut world = Self {
            state: State::new(rules),
            now: secs(0),
            agents: agents.to_vec(),
            due: BinaryHeap::new(),
            asks: Vec::new(),
            loads: 0,
            load_time,
            waits: vec![Vec::new(); agents.len()],
        };
        for agent in 0..agents.len() {
            world.after(Duration::from_millis(agent as u64), Due::Ask(agent));
        }
        world
    }

    fn after(&mut self, time: Duration, due: Due) {
        self.due.push(Reverse((self.now + time, due)));
    }

    fn run(&mut self, until: Time) {
        while let Some(Reverse((at, due))) = self.due.pop() {
            if at > until {
                return;
            }
            self.now = at;
            let event = match due {
                Due::Ask(agent) => self.ask(agent),
                Due::Hello(id) => Event::Started(id),
                Due::Ready(id, bytes) => Event::Loaded { runner: id, bytes },
                Due::End(runner, ask, agent) => {
                    self.after(self.agents[agent].thinks, Due::Ask(agent));
                    Event::Ended { runner, ask }
                }
                Due::Exit(id) => {
                    Event::Gone { runner: id, cause: Cause::Left, begun: BTreeSet::new() }
                }
                Due::Tick => Event::Tick,
            };
            for effect in step(&mut self.state, event, self.now) {
                self.act(effect);
            }
            if let Some(at) = self.state.next_deadline() {
                self.due.push(Reverse((at.max(self.now), Due::Tick)));
            }
        }
    }

    fn ask(&mut self, agent: usize) -> Event {
        let id = self.asks.len() as u64;
        self.asks.push((agent, self.now));
        let (name, mib) = self.agents[agent].model;
        let keep_alive = KeepAlive::For(secs(300));
        let caller = agent.to_string().into();
        let ask = Ask { id, kind: Kind::Generate, keep_alive, caller };
        Event::Ask { ask, target: Box::new(target(name, mib)), hold: Hold::default() }
    }

    fn act(&mut self, effect: Effect) {
        match effect {
            Effect::Spawn(id) => self.after(Duration::ZERO, Due::Hello(id)),
            Effect::Load { runner, model } => {
                self.loads += 1;
                self.after(self.load_time, Due::Ready(runner, model.bytes));
            }
            Effect::Send { runner, ask, .. } => {
                let (agent, asked_at) = self.asks[usize::try_from(ask).expect("an index")];
                self.waits[agent].push(self.now.saturating_sub(asked_at));
                self.after(self.agents[agent].answer, Due::End(runner, ask, agent));
            }
            Effect::Stop { runner, .. } => {
                assert!(self.state.runners[&runner].running.is_empty(), "cut");
                self.after(Duration::ZERO, Due::Exit(runner));
            }
            Effect::Fail { ask, fault } => panic!("#{ask}: {fault}"),
            Effect::Cores { .. } => {}
            other => panic!("{other:?}"),
        }
    }

    fn longest_wait(&self) -> Duration {
        self.waits.iter().flatten().copied().max().unwrap_or_default()
    }
}

const QUICK: Duration = Duration::from_millis(500);

fn agent(name: &'static str, answer: u64, thinks: Duration) -> Agent {
    Agent { model: (name, 600), answer: secs(answer), thinks }
}

#[test]
fn two_agents_on_two_models_cost_one_swap_a_quantum_and_not_one_a_request() {
    let agents = [agent("a", 2, QUICK), agent("b", 2, QUICK)];
    let mut world = World::new(rules(), secs(3), &agents);
    world.run(secs(600));
    let n_answers = world.waits.iter().map(Vec::len).sum::<usize>();
    // A quantum is four times both loads, 24 s, and a round is two of them and two loads.
    assert!((20..=24).contains(&world.loads), "{} loads", world.loads);
    assert!(n_answers > 180, "{n_answers} answers");
    let price = secs(6);
    assert!(world.longest_wait() <= price * limits::QUANTUM_PRICES + secs(3 + 2 + 3), "{world}");
}

#[test]
fn a_model_that_is_not_asked_for_again_leaves_at_once() {
    // The first asks every minute: longer than a swap takes. The other need not wait for it.
    let agents = [agent("a", 2, secs(60)), agent("b", 2, QUICK)];
    let mut world = World::new(rules(), secs(3), &agents);
    world.run(secs(600));
    let waits = &world.waits[1];
    let slow = waits.iter().filter(|wait| **wait > secs(2 + 3 + 3)).count();
    assert_eq!(slow, 0, "{waits:?}");
    assert!(waits.len() > 150, "{}", waits.len());
}

#[test]
fn three_models_and_many_clients_all_have_their_turn_in_bounded_time() {
    let agents: Vec<Agent> = (0..12)
        .map(|n| agent(["a", "b", "c"][n % 3], 1 + n as u64 % 4, secs(n as u64 % 3)))
        .collect();
    let mut world = World::new(Rules { max_queue: 9, ..rules() }, secs(5), &agents);
    world.run(secs(1200));
    // Two others each have a quantum, a load and an answer that drains; then one's own queue.
    let bound = (limits::QUANTUM_MAX.min(secs(40)) + secs(5 + 4)) * 3;
    assert!(world.longest_wait() <= bound, "{:?}", world.longest_wait());
    assert!(world.waits.iter().all(|waits| waits.len() > 20), "{world}");
    assert!(world.loads < 40, "{}", world.loads);
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let longest = self.waits.iter().map(|waits| (waits.len(), waits.iter().max()));
        write!(
            f,
            "{} loads; answers and longest waits: {:?}",
            self.loads,
            longest.collect::<Vec<_>>()
        )
    }
}

#[test]
fn one_model_in_use_is_kept_from_another_for_its_quantum_and_no_longer() {
    let mut story = Story::new(rules());
    story.ask(1, ("a", 600), "spawn 1");
    story.started(1, "load 1 a");
    story.now += secs(2);
    story.loaded(1, 600, "send 1 #1");
    story.now += secs(1);
    // b has never been loaded: its 600 MiB are thought to take 0.586 s. The price is 2.586 s.
    story.ask(2, ("b", 600), "");
    story.ask(3, ("a", 600), "send 1 #3");
    story.ended(1, 1, "");
    let quantum = (secs(2) + Duration::from_secs_f64(600.0 / 1024.0)) * limits::QUANTUM_PRICES;
    let end = story.state.runners[&1].ready_at + quantum;
    assert_eq!(story.state.next_deadline(), Some(end));
    story.ask(4, ("a", 600), "send 1 #4");
    story.now = end;
    story.after(Duration::ZERO, "");
    // Now it takes nothing new, and leaves when it has answered.
    story.ask(5, ("a", 600), "");
    story.ended(1, 3, "");
    story.ended(1, 4, "stop 1");
}

#[test]
fn who_does_not_wait_for_the_answer_does_not_keep_the_memory() {
    let mut story = Story::new(rules());
    story.ask_as(Kind::Background, 1, ("a", 600), "spawn 1");
    story.started(1, "load 1 a");
    story.now += secs(2);
    story.loaded(1, 600, "send 1 #1");
    story.ask(2, ("b", 600), "");
    story.ask_as(Kind::Background, 3, ("a", 600), "");
    story.ended(1, 1, "stop 1");
    story.gone(1, Cause::Left, &[], "spawn 2");
}

#[test]
fn one_caller_with_a_hundred_asks_does_not_starve_another() {
    let mut story = Story::new(Rules { slots: 2, max_queue: 200, ..rules() });
    let ask = |story: &mut Story, id, caller: &str, expected: &str| {
        let keep_alive = KeepAlive::For(secs(300));
        let ask = Ask { id, kind: Kind::Generate, keep_alive, caller: caller.into() };
        let target = Box::new(target("a", 600));
        story.on(Event::Ask { ask, target, hold: Hold::default() }, expected);
    };
    ask(&mut story, 1, "greedy", "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 600, "send 1 #1");
    ask(&mut story, 2, "greedy", "send 1 #2");
    for id in 3..=100 {
        ask(&mut story, id, "greedy", "");
    }
    story.now += secs(1);
    ask(&mut story, 101, "modest", "");
    ask(&mut story, 102, "modest", "");
    // One of the modest, whose turn it is, then one each.
    story.ended(1, 1, "send 1 #101");
    story.now += secs(1);
    story.ended(1, 2, "send 1 #3");
    story.ended(1, 101, "send 1 #102");
    story.ended(1, 102, "send 1 #4");
}

#[test]
fn callers_take_turns_for_one_sequence() {
    let mut story = Story::new(Rules { slots: 1, max_queue: 200, ..rules() });
    let ask = |story: &mut Story, id, caller: &str, expected: &str| {
        let keep_alive = KeepAlive::For(secs(300));
        let ask = Ask { id, kind: Kind::Generate, keep_alive, caller: caller.into() };
        let target = Box::new(target("a", 600));
        story.on(Event::Ask { ask, target, hold: Hold::default() }, expected);
    };
    ask(&mut story, 1, "greedy", "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 600, "send 1 #1");
    for id in 2..10 {
        ask(&mut story, id, "greedy", "");
    }
    story.now += secs(1);
    for id in 20..22 {
        ask(&mut story, id, "modest", "");
    }
    let mut running = 1;
    for expected in [2, 20, 3, 21, 4, 5] {
        story.now += secs(1);
        story.ended(1, running, &format!("send 1 #{expected}"));
        running = expected;
    }
}

#[test]
fn newcomers_do_not_keep_one_waiting_who_was_there_before() {
    let mut story = Story::new(Rules { slots: 1, max_queue: 200, ..rules() });
    story.ask(1, ("a", 600), "spawn 1");
    story.started(1, "load 1 a");
    story.loaded(1, 600, "send 1 #1");
    story.ask(2, ("a", 600), "");
    story.ask(3, ("a", 600), "");
    let mut served = BTreeSet::new();
    let mut running = 1;
    for id in 4..24 {
        // Somebody new each second, and an answer ends each second.
        story.now += secs(1);
        let ask = Ask {
            id,
            kind: Kind::Generate,
            keep_alive: KeepAlive::Forever,
            caller: id.to_string().into(),
        };
        let target = Box::new(target("a", 600));
        step(&mut story.state, Event::Ask { ask, target, hold: Hold::default() }, story.now);
        let ended = Event::Ended { runner: 1, ask: running };
        for effect in step(&mut story.state, ended, story.now) {
            if let Effect::Send { ask, .. } = effect {
                running = ask;
                served.insert(ask);
            }
        }
    }
    assert!(served.contains(&2) && served.contains(&3), "{served:?}");
}

#[test]
fn a_queue_that_one_caller_has_filled_has_room_for_another() {
    let mut story = Story::new(Rules { slots: 1, max_queue: 2, ..rules() });
    let mut id = 0;
    let mut ask = |caller: &str| {
        id += 1;
        let keep_alive = KeepAlive::Forever;
        let ask = Ask { id, kind: Kind::Generate, keep_alive, caller: caller.into() };
        let target = Box::new(target("a", 600));
        let event = Event::Ask { ask, target, hold: Hold::default() };
        let effects = step(&mut story.state, event, story.now);
        !effects.iter().any(|effect| matches!(effect, Effect::Fail { .. }))
    };
    assert_eq!([ask("x"), ask("x"), ask("x")], [true, true, false]);
    assert_eq!([ask("y"), ask("y")], [true, false]);
    // As many newcomers as there are places for, then no more.
    let taken = (0..100).filter(|n| ask(&format!("z{n}"))).count();
    assert_eq!(taken, limits::NEWCOMERS - 1);
}

#[test]
fn what_is_slow_to_load_and_often_used_stays_before_what_is_not() {
    let mut story = Story::new(rules());
    // a takes ten seconds to load and is asked for ten times, b takes one and is asked for once.
    for (id, model, load, n) in [(1, "a", 10, 10), (2, "b", 1, 1)] {
        story.ask(id * 100, (model, 400), &format!("spawn {id}"));
        story.started(id, &format!("load {id} {model}"));
        story.now += secs(load);
        story.loaded(id, 400, &format!("send {id} #{}", id * 100));
        story.ended(id, id * 100, "");
        for more in 1..n {
            story.now += secs(1);
            story.ask(id * 100 + more, (model, 400), &format!("send {id} #{}", id * 100 + more));
            story.ended(id, id * 100 + more, "");
        }
    }
    story.now += secs(30);
    // a has been idle for longer.
    story.ask(300, ("c", 400), "stop 2");
}
