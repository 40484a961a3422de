//! Conversations go on from disk, whatever ended the process that had them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};
use v4_tests::daemon::Daemon;
use v4_tests::home::Home;
use v4_tests::process::{run, signal, until, v4};

const TINY: &str = "llama-q4_0.gguf";

/// Tokens of a block: what is known of a prompt is whole blocks.
const BLOCK: u64 = 64;

/// A conversation of some hundred tokens, and what the model says next.
pub fn turn(daemon: &Daemon<'_>, topic: &str) -> Turn {
    let text = format!("{topic}: one two three four five six seven eight nine ten. ").repeat(8);
    let body = json!({"model": "tiny", "temperature": 0, "max_tokens": 12,
                      "messages": [{"role": "user", "content": text}]});
    let answer = daemon.tcp.post("/v1/chat/completions", &body).expect(200);
    let count = |pointer: &str| answer.pointer(pointer).and_then(Value::as_u64).expect(pointer);
    Turn {
        prompt: count("/usage/prompt_tokens"),
        cached: count("/usage/prompt_tokens_details/cached_tokens"),
        text: answer["choices"][0]["message"]["content"].as_str().expect("a text").to_owned(),
    }
}

#[derive(Debug)]
pub struct Turn {
    prompt: u64,
    cached: u64,
    text: String,
}

impl Turn {
    /// The most that can be known of its prompt: the last token is always computed.
    fn whole_blocks(&self) -> u64 {
        (self.prompt - 1) / BLOCK
    }

    /// Holds it against the same turn, computed whole.
    #[track_caller]
    pub fn continues(&self, computed: &Turn) {
        assert_eq!((self.prompt, &self.text), (computed.prompt, &computed.text));
        assert_eq!(self.cached, self.whole_blocks() * BLOCK);
    }
}

fn files(home: &Home) -> Vec<PathBuf> {
    let list = |path: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(path).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
    };
    list(&home.path().join("kv")).iter().flat_map(|folder| list(folder)).collect()
}

/// Waits for the blocks of so many turns.
pub fn written(home: &Home, turns: &[&Turn]) {
    let n: u64 = turns.iter().map(|turn| turn.whole_blocks()).sum();
    until("the blocks on disk", || (files(home).len() as u64 >= n).then_some(()));
}

#[test]
fn a_conversation_outlives_its_runner_and_its_daemon() {
    let home = Home::new();
    let weights = home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let first = turn(&daemon, "first");
    assert!(first.cached == 0 && first.whole_blocks() >= 3, "{first:?}");
    written(&home, &[&first]);

    // The runner is killed: the next one goes on.
    let runner = daemon.runner(&weights);
    signal(runner, Signal::KILL);
    until("another runner", || {
        let again = turn(&daemon, "first");
        again.continues(&first);
        (daemon.runner(&weights) != runner).then_some(())
    });
    // The daemon is killed, with a second conversation on disk.
    let second = turn(&daemon, "second");
    assert_eq!(second.cached, 0);
    written(&home, &[&first, &second]);
    daemon.kill();
    let daemon = Daemon::start(&home);
    turn(&daemon, "second").continues(&second);
    turn(&daemon, "first").continues(&first);

    // An end in order waits for what is not yet written; so does an unloading.
    let third = turn(&daemon, "third");
    assert!(daemon.stop().success());
    let daemon = Daemon::start(&home);
    turn(&daemon, "third").continues(&third);
    let fourth = turn(&daemon, "fourth");
    daemon.tcp.post("/api/generate", &json!({"model": "tiny", "keep_alive": 0})).expect(200);
    until("the unloading", || daemon.loaded().is_empty().then_some(()));
    turn(&daemon, "fourth").continues(&fourth);
}

#[test]
fn blocks_are_private_and_go_with_their_model() {
    let home = Home::new();
    let weights = home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let first = turn(&daemon, "first");
    written(&home, &[&first]);
    let mode = |path: &Path| fs::metadata(path).expect("it is").permissions().mode() & 0o777;
    let folder = home.path().join("kv").join(format!("sha256-{}", weights.hex()));
    assert_eq!((mode(&home.path().join("kv")), mode(&folder)), (0o700, 0o700));
    assert!(files(&home).iter().all(|file| mode(file) == 0o600 && file.starts_with(&folder)));
    run(&mut v4(&home, &["rm", "tiny"]), "").success();
    until("the end of the folder", || (!folder.exists()).then_some(()));
}

#[test]
fn what_is_damaged_or_of_another_model_is_computed_again() {
    let home = Home::new();
    let weights = home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let first = turn(&daemon, "first");
    written(&home, &[&first]);
    daemon.kill();
    for file in files(&home) {
        let mut bytes = fs::read(&file).expect("a block");
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        fs::write(&file, bytes).expect("writable");
    }
    let daemon = Daemon::start(&home);
    let again = turn(&daemon, "first");
    assert_eq!((again.cached, &again.text), (0, &first.text));
    written(&home, &[&first]);
    daemon.kill();
    // Whole blocks, moved to where another model looks for its own.
    let (kv, other) = (home.path().join("kv"), home.put_golden("tiny", "llama-f16.gguf"));
    let folder = |digest: &v4_proto::Digest| kv.join(format!("sha256-{}", digest.hex()));
    fs::rename(folder(&weights), folder(&other)).expect("moved");
    let daemon = Daemon::start(&home);
    assert_eq!(turn(&daemon, "first").cached, 0);
}

#[test]
fn the_setting_bounds_it_or_turns_it_off() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let daemon = Daemon::start_with(&home, &[("V4_KV_DISK", "off")]);
    let first = turn(&daemon, "first");
    assert!(daemon.stop().success());
    assert!(!home.path().join("kv").exists());
    let daemon = Daemon::start_with(&home, &[("V4_KV_DISK", "off")]);
    assert_eq!(turn(&daemon, "first").cached, 0);
    assert!(daemon.stop().success());

    // Room for a few blocks.
    let daemon = Daemon::start(&home);
    assert_eq!(turn(&daemon, "first").text, first.text);
    assert!(daemon.stop().success());
    let block = fs::metadata(&files(&home)[0]).expect("a block").len();
    let quota = (block * 4).to_string();
    let daemon = Daemon::start_with(&home, &[("V4_KV_DISK", &quota)]);
    for topic in ["first", "second", "third"] {
        turn(&daemon, topic);
    }
    assert!(daemon.stop().success());
    let n_bytes: u64 = files(&home).iter().map(|file| file.metadata().expect("it is").len()).sum();
    assert!(n_bytes > 0 && n_bytes <= block * 4, "{n_bytes} of blocks of {block}");
}
