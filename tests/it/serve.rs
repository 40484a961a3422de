//! The daemon's life: start, limits, end.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::mpsc::sync_channel;
use std::thread;

use rustix::process::Signal;
use serde_json::{Value, json};
use v4_tests::DEADLINE;
use v4_tests::daemon::Daemon;
use v4_tests::home::{ENDLESS, Home};
use v4_tests::process::{self, run, until, v4};

const TINY: &str = "llama-q4_0.gguf";

/// A request whose answer goes on for minutes.
fn endless() -> Value {
    json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": -1, "temperature": 0}})
}

#[test]
fn it_serves_tcp_and_a_private_socket() {
    let home = Home::new();
    let daemon = Daemon::start(&home);
    for address in [&daemon.tcp, &daemon.unix] {
        assert_eq!(address.get("/").text(), "Ollama is running");
        assert_eq!(address.request("HEAD", "/", b"").status, 200);
        assert_eq!(address.get("/api/tags").expect(200), json!({"models": []}));
        assert_eq!(address.get("/nowhere").status, 404);
        assert_eq!(address.get("/api/chat").status, 405);
    }
    let mode = |path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode(home.socket()), 0o600);
    assert_eq!(mode(home.path()), 0o700);
}

#[test]
fn a_second_daemon_on_one_home_is_refused_and_harms_nothing() {
    let home = Home::new();
    let daemon = Daemon::start(&home);
    let second = run(&mut v4(&home, &["serve", "--listen", "127.0.0.1:0"]), "");
    // A status of its own, so that a command that starts a daemon knows to wait for the old one.
    assert!(second.failure(75).contains(&*home.path().to_string_lossy()), "{second:?}");
    assert_eq!(daemon.unix.get("/").status, 200);
    assert_eq!(daemon.tcp.get("/").status, 200);
}

#[test]
fn a_taken_port_is_named_with_the_switch_that_changes_it() {
    let home = Home::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    let refused = run(&mut v4(&home, &["serve", "--listen", &address]), "");
    let line = refused.failure(1);
    assert!(line.contains(address.rsplit(':').next().expect("a port")), "{line}");
    assert!(line.contains("--listen"), "{line}");
    // The home is free again.
    drop(taken);
    drop(Daemon::start(&home));
}

#[test]
fn settings_that_cannot_be_meant_are_named() {
    let home = Home::new();
    let wrong = run(v4(&home, &["serve"]).env("V4_CONTEXT", "many"), "");
    assert!(wrong.failure(1).contains("V4_CONTEXT"), "{wrong:?}");
    let wrong = run(&mut v4(&home, &["serve", "--listen", "nowhere"]), "");
    assert!(wrong.failure(1).contains("--listen"), "{wrong:?}");
}

#[test]
fn it_ends_when_told_and_begins_again_with_everything() {
    let home = Home::new();
    let weights = home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    daemon.generate(&json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": 1}}));
    let runner = daemon.runner(&weights);
    let parent = daemon.pid();
    assert!(daemon.stop().success());
    until("the runner's end", || (!process::children(parent).contains(&runner)).then_some(()));
    assert!(!fs::exists(format!("/proc/{runner}")).unwrap_or(false), "an orphan runner");
    assert!(!home.socket().exists());
    let daemon = Daemon::start(&home);
    assert_eq!(daemon.tcp.get("/api/tags").expect(200)["models"][0]["name"], "tiny:latest");
}

#[test]
fn the_first_signal_lets_answers_end_and_the_second_does_not() {
    let home = Home::new();
    home.put_endless("tiny");
    let daemon = Daemon::start_with(&home, &[ENDLESS]);
    let mut stream = daemon.tcp.stream("/api/generate", &endless());
    assert!(stream.json().is_some(), "it runs");
    process::signal(daemon.pid(), Signal::TERM);
    until("the listener's end", || daemon.tcp.connect().is_err().then_some(()));
    assert!(stream.json().is_some_and(|line| line["done"] == false), "it goes on");
    assert!(daemon.stop().success());
    // Whatever was on its way arrives, then the stream ends: with a word, or cut off.
    let mut last = String::new();
    while let Ok(Some(line)) = stream.line() {
        last = line;
    }
    assert!(!last.contains("\"done_reason\":\"stop\""), "{last}");
    drop(Daemon::start(&home));
}

#[test]
fn a_killed_daemon_leaves_no_runner_and_a_usable_home() {
    let home = Home::new();
    let weights = home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    daemon.generate(&json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": 1}}));
    let runner = daemon.runner(&weights);
    daemon.kill();
    until("the runner's end", || {
        (!fs::exists(format!("/proc/{runner}")).unwrap_or(true)).then_some(())
    });
    assert!(home.socket().exists(), "nobody could remove it");
    let daemon = Daemon::start(&home);
    let answer = json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": 1}});
    assert_eq!(daemon.generate(&answer)["done"], true);
}

#[test]
fn a_full_queue_is_refused_at_once() {
    let home = Home::new();
    home.put_endless("tiny");
    let limits = [("V4_SLOTS", "1"), ("V4_MAX_QUEUE", "1"), ENDLESS];
    let daemon = Daemon::start_with(&home, &limits);
    let long = endless();
    let mut running = daemon.tcp.stream("/api/generate", &long);
    assert!(running.json().is_some(), "it runs");
    // Of three more, one may wait: the two others are refused while it does.
    let (sender, replies) = sync_channel(3);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let options = json!({"num_predict": 1});
                let short = json!({"model": "tiny", "prompt": "hi", "options": options});
                sender.send(daemon.tcp.post("/api/generate", &short))
            });
        }
        for _ in 0..2 {
            let refused = replies.recv_timeout(DEADLINE).expect("a refusal");
            assert!(refused.error(503).contains("is full"), "{}", refused.text());
        }
        // The one that ran is cancelled, and the one that waited has its turn.
        drop(running);
        let answered = replies.recv_timeout(DEADLINE).expect("an answer");
        assert_eq!(answered.status, 200, "{}", answered.text());
    });
}

#[test]
fn a_model_leaves_memory_when_its_time_is_over() {
    let home = Home::new();
    let weights = home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let ask = |keep_alive| {
        let options = json!({"num_predict": 1});
        json!({"model": "tiny", "prompt": "hi", "keep_alive": keep_alive, "options": options})
    };
    daemon.generate(&ask(json!(-1)));
    assert_eq!(daemon.loaded(), ["tiny:latest"]);
    daemon.generate(&ask(json!(0)));
    until("an empty list", || daemon.loaded().is_empty().then_some(()));
    until("the runner's end", || process::runner(daemon.pid(), &weights).is_none().then_some(()));
    // Loaded and unloaded by name alone, as clients do it.
    let load = daemon.tcp.post("/api/generate", &json!({"model": "tiny"}));
    assert_eq!(load.expect(200)["done_reason"], "load");
    assert_eq!(daemon.loaded(), ["tiny:latest"]);
    let unload = daemon.tcp.post("/api/generate", &json!({"model": "tiny", "keep_alive": 0}));
    assert_eq!(unload.expect(200)["done_reason"], "unload");
    until("an empty list", || daemon.loaded().is_empty().then_some(()));
}

#[test]
fn models_that_do_not_fit_together_take_turns() {
    let home = Home::new();
    home.put_golden("one", TINY);
    home.put_golden("two", "gemma3-q5_0.gguf");
    let ask = |name: &str| json!({"model": name, "prompt": "hi", "options": {"num_predict": 1}});
    // Before a model is loaded, some 130 MB are put aside for it; afterwards it is known that these
    // tiny ones need less. So two fit into 1 GB, and one at a time into 140 MB.
    let large = Daemon::start_with(&home, &[("V4_MEMORY", "1G")]);
    large.generate(&ask("one"));
    large.generate(&ask("two"));
    assert_eq!(large.loaded().len(), 2);
    drop(large);

    let small = Daemon::start_with(&home, &[("V4_MEMORY", "140M")]);
    small.generate(&ask("one"));
    small.generate(&ask("two"));
    assert_eq!(small.loaded(), ["two:latest"]);
    small.generate(&ask("one"));
    assert_eq!(small.loaded(), ["one:latest"]);
    drop(small);

    let tiny = Daemon::start_with(&home, &[("V4_MEMORY", "100K")]);
    let refused = tiny.tcp.post("/api/generate", &ask("one"));
    assert_eq!(refused.expect(500)["code"], "out_of_memory");
}
