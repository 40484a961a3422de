//! Processes that die, and what others notice of it. The signals come from outside: there is no
//! hook in the product.

use std::fs;
use std::thread;

use rustix::process::Signal;
use serde_json::{Value, json};
use v4_tests::daemon::Daemon;
use v4_tests::home::{ENDLESS, Home};
use v4_tests::process::{self, signal, until};

const TINY: &str = "llama-q4_0.gguf";

fn endless(name: &str) -> Value {
    json!({"model": name, "prompt": "hi", "options": {"num_predict": -1, "temperature": 0}})
}

fn short(name: &str) -> Value {
    json!({"model": name, "prompt": "hi", "options": {"num_predict": 4}})
}

/// Strikes the runner of a model in mid-stream while another model answers.
fn strike(what: Signal) {
    let home = Home::new();
    let weights = home.put_endless("victim");
    home.put_golden("other", "gemma3-q5_0.gguf");
    let daemon = Daemon::start_with(&home, &[ENDLESS]);
    daemon.generate(&short("other"));
    daemon.generate(&short("victim"));
    let runner = daemon.runner(&weights);

    thread::scope(|scope| {
        let mut stream = daemon.tcp.stream("/api/generate", &endless("victim"));
        assert_eq!(stream.status, 200);
        assert!(stream.json().is_some_and(|line| line["done"] == false), "it streams");
        let other = scope.spawn(|| daemon.generate(&short("other")));
        signal(runner, what);
        let mut last = Value::Null;
        while let Some(line) = stream.json() {
            last = line;
        }
        assert!(last["error"].is_string(), "the stream ends with an error event: {last}");
        assert_eq!(other.join().expect("no panic")["done"], true);
    });

    // The same in the other surface.
    let body = json!({"model": "victim", "messages": [{"role": "user", "content": "hi"}],
                      "stream": true, "temperature": 0});
    until("the dead runner to be gone", || {
        (!process::children(daemon.pid()).contains(&runner)).then_some(())
    });
    assert_eq!(daemon.generate(&short("victim"))["done"], true, "the next request works");
    let runner = daemon.runner(&weights);
    let mut stream = daemon.tcp.stream("/v1/chat/completions", &body);
    assert!(stream.line().expect("an event").is_some_and(|line| line.starts_with("data: ")));
    signal(runner, what);
    let rest = String::from_utf8_lossy(&stream.whole().body).into_owned();
    assert!(rest.contains("\"error\""), "{rest}");
    assert_eq!(daemon.generate(&short("other"))["done"], true);
}

#[test]
fn a_killed_runner_takes_only_its_own_answers_with_it() {
    strike(Signal::KILL);
}

#[test]
fn an_aborted_runner_takes_only_its_own_answers_with_it() {
    strike(Signal::ABORT);
}

#[test]
fn a_runner_that_hangs_is_noticed_and_replaced() {
    let home = Home::new();
    let weights = home.put_endless("tiny");
    let daemon = Daemon::start_with(&home, &[ENDLESS]);
    daemon.generate(&short("tiny"));
    let runner = daemon.runner(&weights);
    let mut stream = daemon.tcp.stream("/api/generate", &endless("tiny"));
    assert!(stream.json().is_some());
    signal(runner, Signal::STOP);
    let mut last = Value::Null;
    while let Some(line) = stream.json() {
        last = line;
    }
    assert!(last["error"].is_string(), "{last}");
    assert_eq!(daemon.generate(&short("tiny"))["done"], true);
    assert_ne!(daemon.runner(&weights), runner);
}

#[test]
fn a_blob_that_was_cut_short_is_an_error_and_harms_nobody() {
    let home = Home::new();
    let weights = home.put_golden("cut", TINY);
    home.put_golden("other", "gemma3-q5_0.gguf");
    let blob = fs::read(home.blob(&weights)).expect("a blob");
    fs::write(home.blob(&weights), &blob[..blob.len() / 2]).expect("writable");
    let daemon = Daemon::start(&home);
    let refused = daemon.tcp.post("/api/generate", &short("cut"));
    assert_eq!(refused.status, 500, "{}", refused.text());
    assert!(!refused.error(500).is_empty());
    assert_eq!(daemon.generate(&short("other"))["done"], true);
    // Mended, it works without a restart of the daemon.
    fs::write(home.blob(&weights), &blob).expect("writable");
    until("an answer", || {
        let mut body = short("cut");
        body["stream"] = false.into();
        (daemon.tcp.post("/api/generate", &body).status == 200).then_some(())
    });
}

#[test]
fn a_blob_that_is_cut_short_while_it_is_in_use_harms_nobody_else() {
    let home = Home::new();
    let weights = home.put_endless("cut");
    home.put_golden("other", "gemma3-q5_0.gguf");
    let daemon = Daemon::start_with(&home, &[ENDLESS]);
    daemon.generate(&short("other"));
    daemon.generate(&short("cut"));
    let runner = daemon.runner(&weights);
    let mut stream = daemon.tcp.stream("/api/generate", &endless("cut"));
    assert!(stream.json().is_some());
    let file = fs::OpenOptions::new().write(true).open(home.blob(&weights));
    file.expect("the blob").set_len(4096).expect("cut");
    let mut last = Value::Null;
    while let Some(line) = stream.json() {
        last = line;
    }
    assert!(last["error"].is_string(), "{last}");
    until("the runner's end", || {
        (!process::children(daemon.pid()).contains(&runner)).then_some(())
    });
    assert_eq!(daemon.generate(&short("other"))["done"], true);
}

#[test]
fn a_blob_that_changed_on_disk_is_named_with_the_remedy() {
    let home = Home::new();
    let weights = home.put_golden("changed", TINY);
    home.put_golden("other", "gemma3-q5_0.gguf");
    let daemon = Daemon::start(&home);
    assert_eq!(daemon.generate(&short("changed"))["done"], true);
    let good = fs::read(home.blob(&weights)).expect("a blob");
    let mut damages = vec![Some(good[..good.len() / 2].to_vec())];
    // The same length, and only weights: nothing that a header could tell.
    let mut blob = good.clone();
    let tail = blob.len() / 2;
    blob[tail..].iter_mut().for_each(|byte| *byte ^= 0x5a);
    damages.push(Some(blob));
    damages.push(None);
    for damage in damages {
        fs::remove_file(home.blob(&weights)).expect("a blob");
        if let Some(damage) = damage {
            fs::write(home.blob(&weights), damage).expect("writable");
        }
        let refused = daemon.tcp.post("/api/generate", &short("changed"));
        assert_eq!(refused.status, 500, "{}", refused.text());
        assert!(refused.text().contains("v4 pull changed"), "{}", refused.text());
        fs::write(home.blob(&weights), &good)
            .or_else(|_| {
                fs::remove_file(home.blob(&weights))?;
                fs::write(home.blob(&weights), &good)
            })
            .expect("writable");
    }
    assert_eq!(daemon.generate(&short("changed"))["done"], true);
    assert_eq!(daemon.generate(&short("other"))["done"], true);
}
