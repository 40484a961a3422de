//! Two daemons on one network: one pulls from the other what it has, and checks it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};
use v4_tests::daemon::Daemon;
use v4_tests::home::{Home, file_digest, noise};
use v4_tests::process::{run, v4};
use v4_tests::registry::OneModel;

/// Large enough for ranges and a chain.
const SIZE: usize = 40 << 20;

fn pull(daemon: &Daemon<'_>, body: &Value) -> Vec<Value> {
    daemon.tcp.patient_post("/api/pull", body).lines()
}

fn is_done(lines: &[Value]) -> bool {
    lines.last().is_some_and(|line| line["status"] == "success")
}

#[test]
fn what_a_peer_has_need_not_come_from_far() {
    let registry = OneModel::new(&noise(SIZE));
    let (near, far) = (Home::new(), Home::new());
    let first = Daemon::start(&near);
    let lines = pull(&first, &json!({"model": registry.name()}));
    assert!(is_done(&lines), "{lines:?}");
    registry.take_asked();

    // The far one: the manifest, and a share of the blob that the registry was fast enough for.
    let peer = format!("http://127.0.0.1:{}", first.port());
    let second = Daemon::start_with(&far, &[("V4_PEERS", &peer)]);
    let lines = pull(&second, &json!({"model": registry.name()}));
    assert!(is_done(&lines), "{lines:?}");
    let weights = registry.weights();
    assert_eq!(file_digest(&far.blob(&weights)), weights);
    assert!(registry.take_asked() < SIZE, "the peer brought nothing");
    drop(second);

    // The whole model by its name, from a daemon alone: it is a registry.
    let third = Home::new();
    near.put_golden("tiny", "llama-q4_0.gguf");
    let name = format!("127.0.0.1:{}/library/tiny", first.port());
    let daemon = Daemon::start(&third);
    let lines = pull(&daemon, &json!({"model": name}));
    assert!(is_done(&lines), "{lines:?}");
    let answer = daemon.generate(&json!({"model": name, "prompt": "hi",
        "options": {"num_predict": 2}}));
    assert_eq!(answer["done"], true);
}

#[test]
fn a_peer_whose_blob_is_damaged_or_that_is_not_there_is_passed_over() {
    let registry = OneModel::new(&noise(SIZE));
    let (near, far) = (Home::new(), Home::new());
    let first = Daemon::start(&near);
    assert!(is_done(&pull(&first, &json!({"model": registry.name()}))));
    let weights = registry.weights();
    let path = near.blob(&weights);
    let mut blob = fs::read(&path).expect("a blob");
    blob[9 << 20] ^= 1;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("ours");
    fs::write(&path, &blob).expect("writable");
    registry.take_asked();
    let peers = [format!("http://127.0.0.1:{}", first.port()), "http://127.0.0.1:1".to_owned()];
    let _second = Daemon::start(&far);
    let said = run(
        &mut v4(&far, &["pull", &registry.name(), "--peer", &peers[0], "--peer", &peers[1]]),
        "",
    );
    said.success();
    assert_eq!(file_digest(&far.blob(&weights)), weights);
    assert_eq!(registry.take_asked(), SIZE, "nothing came from a damaged blob");
    let said = run(&mut v4(&far, &["pull", "x/y", "--peer", "nonsense"]), "");
    assert!(said.failure(1).contains("is no address of a v4"), "{said:?}");
}
