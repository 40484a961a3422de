//! A daemon under mixed load for a while: clients of two models that do not fit together, some of
//! whom hang up in the middle, and runners that are killed. Whatever happens, each request ends
//! with an answer or an error, nothing is left waiting, and memory stays where it was.
//!
//! `cargo xtask soak serve --minutes 30` does for longer what the test does for seconds.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use v4_proto::Digest;
use v4_tests::daemon::Daemon;
use v4_tests::home::Home;
use v4_tests::process::{self, until};
use v4_tests::random::Random;

/// How long; not said is a few seconds.
const SECONDS: &str = "V4_STORM_SECONDS";
const FEW: u64 = 8;
/// Clients at a time.
const CLIENTS: u64 = 6;
/// A model whose runner dies three times within five minutes is given up, so those of the two
/// models are killed in turn, no closer than this; in a short storm, two or three times in all.
const KILL_EVERY: Duration = Duration::from_secs(110);
/// Storms that are as long are held to [`GROWTH`]; in a short one caches still fill.
const LONG: Duration = Duration::from_mins(5);
/// How much more memory the daemon may have at the end than after a fifth of the time.
const GROWTH: f64 = 1.02;

/// How requests ended.
#[derive(Debug, Default)]
struct Ends {
    answered: AtomicU64,
    failed: AtomicU64,
    hung_up: AtomicU64,
    /// Ended without an end and without an error.
    lost: AtomicU64,
}

#[test]
fn a_storm_of_requests_loses_none_and_leaves_nothing_behind() {
    let seconds = std::env::var(SECONDS).ok().and_then(|text| text.parse().ok()).unwrap_or(FEW);
    let time = Duration::from_secs(seconds);
    let home = Home::new();
    let models =
        [home.put_golden("one", "llama-q4_0.gguf"), home.put_golden("two", "gemma3-q5_0.gguf")];
    // One model at a time fits.
    let daemon = Daemon::start_with(&home, &[("V4_MEMORY", "140M"), ("V4_LOG", "warn")]);
    let (is_over, ends) = (AtomicBool::new(false), Ends::default());
    let (kills, [early, late]) = thread::scope(|scope| {
        for seed in 0..CLIENTS {
            let (daemon, is_over, ends) = (&daemon, &is_over, &ends);
            scope.spawn(move || {
                let mut random = Random::new(seed * 0x9e37_79b9 + 1);
                while !is_over.load(Relaxed) {
                    ask(daemon, &mut random, ends);
                }
            });
        }
        let figures = watch(&daemon, &models, time);
        is_over.store(true, Relaxed);
        figures
    });
    println!("{ends:?}, {kills} runners killed, {early:.1} then {late:.1} MB resident");
    assert_eq!(ends.lost.into_inner(), 0, "each request ends with an answer or an error");
    assert!(ends.answered.into_inner() > 0 && ends.hung_up.into_inner() > 0);
    assert!(time < LONG || late <= early * GROWTH, "{early:.1} MB grew to {late:.1}");
    until("the end of all requests", || is_quiet(&daemon).then_some(()));
    for name in ["one", "two"] {
        let body =
            json!({"model": name, "prompt": "hi", "raw": true, "options": {"num_predict": 1}});
        assert_eq!(daemon.generate(&body)["done"], true);
    }
}

/// One request of a client: short or long, watched to its end or not.
fn ask(daemon: &Daemon, random: &mut Random, ends: &Ends) {
    let name = if random.below(3) == 0 { "two" } else { "one" };
    let words = 1 + random.below(120);
    let prompt: Vec<String> = (0..words).map(|_| format!("word{}", random.below(50))).collect();
    let body = json!({
        "model": name, "prompt": prompt.join(" "), "raw": true,
        "options": {"num_predict": 1 + random.below(60), "temperature": 0.8, "seed": words},
    });
    let patience = if random.below(4) == 0 { random.below(6) } else { u64::MAX };
    let mut stream = daemon.tcp.stream("/api/generate", &body);
    for _ in 0..patience {
        let Ok(Some(line)) = stream.line() else {
            ends.lost.fetch_add(1, Relaxed);
            return;
        };
        let event: Value = serde_json::from_str(&line).expect("lines are JSON");
        if !event["error"].is_null() {
            ends.failed.fetch_add(1, Relaxed);
            return;
        }
        if event["done"] == true {
            ends.answered.fetch_add(1, Relaxed);
            return;
        }
    }
    ends.hung_up.fetch_add(1, Relaxed);
}

/// Kills runners for that time; how many, and the daemon's MB after a fifth of it and at its end.
fn watch(daemon: &Daemon, models: &[Digest; 2], time: Duration) -> (usize, [f64; 2]) {
    let (begin, mut kills, mut early) = (Instant::now(), 0, None);
    let every = KILL_EVERY.min(time / 3);
    while begin.elapsed() < time {
        thread::park_timeout(Duration::from_millis(100));
        if begin.elapsed() > time / 5 && early.is_none() {
            early = Some(resident(daemon.pid()));
        }
        let is_due = begin.elapsed() > every * u32::try_from(kills + 1).expect("few");
        if let Some(runner) = process::runner(daemon.pid(), &models[kills % 2]).filter(|_| is_due) {
            process::signal(runner, Signal::KILL);
            kills += 1;
        }
    }
    (kills, [early.expect("a fifth of the time is over"), resident(daemon.pid())])
}

/// Whether no request runs or waits.
fn is_quiet(daemon: &Daemon) -> bool {
    let page = daemon.tcp.get("/metrics").text();
    let figures = page.lines().filter(|line| {
        line.starts_with("vllm:num_requests_running")
            || line.starts_with("vllm:num_requests_waiting")
    });
    figures.filter_map(|line| line.rsplit(' ').next()).all(|figure| figure == "0")
}

/// MB of a process that are in memory.
fn resident(pid: u32) -> f64 {
    process::memory(pid, "VmRSS").expect("the daemon runs") as f64 / 1e6
}
