//! What strangers send: names, bodies, files, and clients that do not behave.

use std::fs;
use std::io::{Read as _, Write as _};

use serde_json::{Value, json};
use v4_tests::daemon::Daemon;
use v4_tests::home::{ENDLESS, Home, Model};
use v4_tests::process::until;

const TINY: &str = "llama-q4_0.gguf";

fn works(daemon: &Daemon<'_>) {
    let body = json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": 2}});
    assert_eq!(daemon.generate(&body)["done"], true, "other requests go on");
}

#[test]
fn names_that_cannot_be_are_refused_everywhere() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let long = "a".repeat(10_000);
    let names = ["..", "../../etc/passwd", "a b", "a/b/c/d/e", "tiny:", "ä", "a\0b", &long];
    for name in names {
        for path in ["/api/generate", "/api/chat", "/api/show", "/api/pull"] {
            let reply = daemon.tcp.post(path, &json!({"model": name, "stream": false}));
            assert_eq!(reply.status, 400, "{path} {name:.20}: {}", reply.text());
            assert!(!reply.error(400).is_empty());
        }
        let body = json!({ "model": name }).to_string();
        let reply = daemon.tcp.request("DELETE", "/api/delete", body.as_bytes());
        assert_eq!(reply.status, 400, "{}", reply.text());
    }
    for path in ["/api/generate", "/api/chat", "/api/show"] {
        let reply = daemon.tcp.post(path, &json!({"model": "missing"}));
        assert!(reply.error(404).contains("'missing' not found"), "{}", reply.text());
    }
    works(&daemon);
}

#[test]
fn json_that_is_deep_huge_or_wrong_is_a_clear_refusal() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let deep = format!(
        "{{\"model\":\"tiny\",\"options\":{}1{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let wrong = [
        "",
        "{",
        "null",
        "[]",
        "{\"model\":7}",
        "{\"model\":\"tiny\",\"prompt\":7}",
        "{\"model\":\"tiny\",\"messages\":\"x\"}",
        "{\"model\":\"tiny\",\"prompt\":\"x\",\"options\":{\"seed\":\"x\"}}",
        "\u{feff}\u{0}",
        &deep,
    ];
    for body in wrong {
        for path in ["/api/chat", "/api/generate", "/v1/chat/completions", "/api/show"] {
            let reply = daemon.tcp.request("POST", path, body.as_bytes());
            let is_read = path == "/api/show" && body.starts_with("{\"model\":\"tiny\"");
            // An endpoint does not look at fields that it does not have.
            let may_pass = is_read || reply.status == 200;
            assert!(reply.status == 400 || may_pass, "{path} {body:.60}: {}", reply.status);
            if body == deep || body.len() < 10 {
                assert_eq!(reply.status, 400, "{path} {body:.60}: {}", reply.text());
                assert!(!reply.error(400).is_empty());
            }
        }
    }
    works(&daemon);
}

#[test]
fn a_body_beyond_the_limit_is_refused_before_it_is_read() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let mut wire = daemon.tcp.connect().expect("a connection");
    let head = "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n";
    wire.write_all(head.as_bytes()).expect("sent");
    let mut first = [0; 12];
    wire.read_exact(&mut first).expect("an answer before the body");
    assert_eq!(String::from_utf8_lossy(&first), "HTTP/1.1 413");
    works(&daemon);
}

#[test]
fn a_client_that_sends_nothing_or_takes_nothing_stops_nobody() {
    let home = Home::new();
    home.put_endless("tiny");
    let daemon = Daemon::start_with(&home, &[ENDLESS]);
    let silent: Vec<_> = (0..32).map(|_| daemon.tcp.connect().expect("a connection")).collect();
    // It asks for an endless answer and reads none of it.
    let options = json!({"num_predict": -1, "temperature": 0});
    let long = json!({"model": "tiny", "prompt": "hi", "options": options});
    let stalled = daemon.tcp.stream("/api/generate", &long);
    works(&daemon);
    drop((silent, stalled));
    works(&daemon);
}

/// Files that are no model, each with what is wrong with it.
fn broken() -> Vec<(&'static str, Vec<u8>)> {
    let tiny = fs::read(v4_tests::golden().join("gguf").join(TINY)).expect("a golden file");
    let with = |at: usize, bytes: &[u8]| {
        let mut file = tiny.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let mut state = 0x9e37_79b9_u32;
    let random = (0..65_536).map(|_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    });
    vec![
        ("empty", Vec::new()),
        ("magic-only", b"GGUF".to_vec()),
        ("header-cut", tiny[..100].to_vec()),
        ("data-cut", tiny[..tiny.len() - 1000].to_vec()),
        ("other-version", with(4, &99_u32.to_le_bytes())),
        ("tensors-huge", with(8, &u64::MAX.to_le_bytes())),
        ("metadata-huge", with(16, &u64::MAX.to_le_bytes())),
        ("key-huge", with(24, &u64::MAX.to_le_bytes())),
        ("random", random.collect()),
        ("text", b"<html>not a model</html>".repeat(100)),
    ]
}

#[test]
fn a_file_that_is_no_model_is_refused_and_harms_nobody() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let files = broken();
    for (name, weights) in &files {
        home.put(&Model { name, weights: weights.clone(), params: Value::Null });
    }
    let daemon = Daemon::start(&home);
    for (name, _) in &files {
        let reply = daemon.tcp.post("/api/generate", &json!({"model": name, "prompt": "hi"}));
        assert!((400..=503).contains(&reply.status), "{name}: {}", reply.text());
        let said = reply.error(reply.status);
        assert!(!said.contains("unexpectedly") && !said.contains("panic"), "{name}: {said}");
        let show = daemon.tcp.post("/api/show", &json!({"model": name}));
        assert!(show.status < 600 && !show.body.is_empty(), "{name}");
    }
    assert_eq!(daemon.tcp.get("/api/tags").status, 200);
    works(&daemon);
}

#[test]
fn manifests_that_cannot_be_read_hide_nothing_else() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    for (name, text) in [("junk", "{"), ("empty", ""), ("odd", "{\"layers\":7}")] {
        let path = home.manifest(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("writable");
        fs::write(path, text).expect("writable");
    }
    let daemon = Daemon::start(&home);
    let tags = daemon.tcp.get("/api/tags").expect(200);
    let names: Vec<&Value> =
        tags["models"].as_array().expect("a list").iter().map(|m| &m["name"]).collect();
    assert!(names.contains(&&json!("tiny:latest")), "{tags}");
    let reply = daemon.tcp.post("/api/generate", &json!({"model": "junk", "prompt": "hi"}));
    assert!(reply.status >= 400, "{}", reply.text());
    works(&daemon);
    until("a listing", || (daemon.tcp.get("/v1/models").status == 200).then_some(()));
}
