//! Traces of asks, replayed with a simulated clock by v4's policy and by two that others have: how
//! often models are loaded, and how long asks wait. The figures of `docs/performance.md` are what
//! this prints:
//!
//! `cargo test -p v4-supervisor --test replay -- --nocapture`
//!
//! `make.py` beside this file makes the traces. A line of one is an ask: when, by whom, of which
//! model, and how many seconds the answer takes. `12.5` is a time; `+1.2` is so long after the
//! caller's last answer.

#![allow(clippy::print_stdout, reason = "the figures are what it is for")]

mod others;
mod trace;
mod v4;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use others::{Others, Rule};
use trace::{Trace, When};
use v4::V4;

/// A time since the beginning of the trace.
type Time = Duration;

/// What happens to a scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// The ask of that line of the trace arrives.
    Arrives(usize),
    /// A runner has its model.
    Loaded(u64),
    /// A runner has ended an answer.
    Ended(u64, usize),
    /// A runner that was told to leave is gone.
    Gone(u64),
    /// Time has passed.
    Tick,
}

/// What a scheduler does.
enum Do {
    /// Loads a model of the trace in a new runner.
    Load(u64, String),
    /// Has a runner answer an ask.
    Answer(u64, usize),
    /// Has an idle runner leave.
    Unload(u64),
}

/// Decides which model is in memory.
trait Scheduler {
    fn on(&mut self, what: What, now: Time) -> Vec<Do>;
    /// When it wants to be told that time has passed.
    fn deadline(&self) -> Option<Time>;
}

/// The end of a runner's process.
const EXIT: Duration = Duration::from_millis(50);
/// Sequences of one model at a time.
const SLOTS: usize = 4;

/// What came of a trace.
#[derive(Debug)]
struct Figures {
    loads: usize,
    /// From the ask to the begin of its answer, the shortest first.
    waits: Vec<Duration>,
    end: Time,
}

impl Figures {
    fn mean_s(&self) -> f64 {
        self.waits.iter().sum::<Duration>().as_secs_f64() / self.waits.len() as f64
    }

    fn share_s(&self, percent: usize) -> f64 {
        let at = (self.waits.len() * percent).div_ceil(100).max(1) - 1;
        self.waits[at].as_secs_f64()
    }
}

fn replay(trace: &Trace, scheduler: &mut dyn Scheduler) -> Figures {
    let mut due: BinaryHeap<Reverse<(Time, What)>> = BinaryHeap::new();
    let mut later: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (at, ask) in trace.asks.iter().enumerate() {
        match ask.when {
            When::At(time) => due.push(Reverse((time, What::Arrives(at)))),
            When::After(_) => later.entry(&ask.caller).or_default().insert(0, at),
        }
    }
    let mut asked = vec![Duration::ZERO; trace.asks.len()];
    let mut figures = Figures { loads: 0, waits: Vec::new(), end: Duration::ZERO };
    let mut n_ended = 0;
    while n_ended < trace.asks.len() {
        let Reverse((now, what)) = due.pop().expect("a scheduler that does nothing any more");
        match what {
            What::Arrives(at) => asked[at] = now,
            What::Ended(_, at) => {
                n_ended += 1;
                figures.end = now;
                let next = later.get_mut(trace.asks[at].caller.as_str()).and_then(Vec::pop);
                if let Some(next) = next {
                    let When::After(gap) = trace.asks[next].when else { unreachable!() };
                    due.push(Reverse((now + gap, What::Arrives(next))));
                }
            }
            _ => {}
        }
        for order in scheduler.on(what, now) {
            match order {
                Do::Load(runner, model) => {
                    figures.loads += 1;
                    due.push(Reverse((now + trace.models[&model].load, What::Loaded(runner))));
                }
                Do::Answer(runner, at) => {
                    figures.waits.push(now.saturating_sub(asked[at]));
                    due.push(Reverse((now + trace.asks[at].answer, What::Ended(runner, at))));
                }
                Do::Unload(runner) => due.push(Reverse((now + EXIT, What::Gone(runner)))),
            }
        }
        if let Some(at) = scheduler.deadline() {
            due.push(Reverse((at.max(now), What::Tick)));
        }
    }
    figures.waits.sort_unstable();
    figures
}

/// v4, the least recently used of so many models, and the shortest keep-alive.
fn all(name: &str, text: &str) -> [Figures; 3] {
    let trace = Trace::parse(text);
    let v4 = replay(&trace, &mut V4::new(&trace));
    let n = trace.fit_together();
    let lru = replay(&trace, &mut Others::new(&trace, Rule::LeastRecent { n }));
    let ollama = replay(&trace, &mut Others::new(&trace, Rule::ShortestKeepAlive));
    println!("\n{name}: {} asks", trace.asks.len());
    println!("| policy | loads | mean wait | p50 | p95 | longest | done after |");
    println!("|---|---|---|---|---|---|---|");
    let names =
        ["v4".to_owned(), format!("LRU, at most {n} loaded"), "shortest keep-alive".to_owned()];
    let all = [v4, lru, ollama];
    for (name, figures) in names.iter().zip(&all) {
        println!(
            "| {name} | {} | {:.1} s | {:.1} s | {:.1} s | {:.1} s | {:.0} s |",
            figures.loads,
            figures.mean_s(),
            figures.share_s(50),
            figures.share_s(95),
            figures.share_s(100),
            figures.end.as_secs_f64(),
        );
    }
    all
}

/// Fewer loads and a lower 95th percentile of the wait than both others.
#[track_caller]
fn is_better([v4, lru, ollama]: &[Figures; 3]) {
    for other in [lru, ollama] {
        assert!(v4.loads < other.loads, "{} loads against {}", v4.loads, other.loads);
        assert!(
            v4.share_s(95) < other.share_s(95),
            "{} against {}",
            v4.share_s(95),
            other.share_s(95)
        );
        assert!(v4.mean_s() < other.mean_s(), "{} against {}", v4.mean_s(), other.mean_s());
    }
}

#[test]
fn a_team_of_agents() {
    is_better(&all("team", include_str!("team.trace")));
}

#[test]
fn a_morning() {
    is_better(&all("morning", include_str!("morning.trace")));
}

#[test]
fn bursts() {
    is_better(&all("bursts", include_str!("bursts.trace")));
}

#[test]
fn a_pair_of_agents() {
    // Each has one ask at a time, so the few that meet the other's quantum wait longer than all do
    // who pay a swap each: what is bought with it is the mean, and the time until all is done.
    let [v4, lru, ollama] = &all("pair", include_str!("pair.trace"));
    for other in [lru, ollama] {
        assert!(v4.loads * 2 < other.loads, "{} loads against {}", v4.loads, other.loads);
        assert!(v4.mean_s() < other.mean_s(), "{} against {}", v4.mean_s(), other.mean_s());
        assert!(v4.end < other.end, "{:?} against {:?}", v4.end, other.end);
    }
    // A quantum, both loads, and an answer that began before its end.
    assert!(v4.share_s(100) < 4.0 * 5.8 + 5.8 + 15.0, "{}", v4.share_s(100));
}
