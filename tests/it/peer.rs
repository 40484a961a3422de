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

/// Makes a key on the machine of a daemon.
fn key(home: &Home, name: &str, scope: &str) -> String {
    let said = run(&mut v4(home, &["keys", "add", name, "--scope", scope]), "");
    said.success().trim().to_owned()
}

#[test]
fn a_peer_with_keys_sends_to_who_has_one_and_others_are_told() {
    let registry = OneModel::new(&noise(SIZE));
    let near = Home::new();
    let first = Daemon::start(&near);
    assert!(is_done(&pull(&first, &json!({"model": registry.name()}))));
    let (read, weights) = (key(&near, "far", "read"), registry.weights());
    let host = format!("127.0.0.1:{}", first.port());

    // With the key the blob comes from there.
    let far = Home::new();
    registry.take_asked();
    let second = Daemon::start_with(&far, &[("V4_PEERS", &format!("http://{read}@{host}"))]);
    let lines = pull(&second, &json!({"model": registry.name()}));
    assert!(is_done(&lines), "{lines:?}");
    assert_eq!(file_digest(&far.blob(&weights)), weights);
    assert!(registry.take_asked() < SIZE, "the peer brought nothing");
    let is_told =
        |lines: &[Value]| lines.iter().any(|line| line["status"].to_string().contains("refuses"));
    assert!(!is_told(&lines), "{lines:?}");

    // Without one, and with a wrong one, all of it comes from the registry, and that is said.
    for peer in [format!("http://{host}"), format!("http://v4-wrong@{host}")] {
        let other = Home::new();
        let third = Daemon::start_with(&other, &[("V4_PEERS", &peer)]);
        let lines = pull(&third, &json!({"model": registry.name()}));
        assert!(is_done(&lines) && is_told(&lines), "{peer}: {lines:?}");
        assert!(!lines.iter().any(|line| line["status"].to_string().contains("v4-wrong")));
        assert_eq!(file_digest(&other.blob(&weights)), weights);
        assert_eq!(registry.take_asked(), SIZE, "{peer}");
    }

    // The whole model by name, with the credentials of `docker login`: user and key.
    near.put_golden("tiny", "llama-q4_0.gguf");
    let (name, fourth) = (format!("{host}/library/tiny"), Home::new());
    let daemon = Daemon::start(&fourth);
    let refused = pull(&daemon, &json!({"model": name})).pop().expect("a line");
    assert!(refused["error"].to_string().contains("docker login"), "{refused}");
    let auth = base64(format!("me:{read}").as_bytes());
    let docker = fourth.beside().join(".docker");
    fs::create_dir_all(&docker).expect("a writable folder");
    let file = json!({"auths": {host: {"auth": auth}}}).to_string();
    fs::write(docker.join("config.json"), file).expect("a writable folder");
    assert!(is_done(&pull(&daemon, &json!({"model": name}))));
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let group = three.iter().fold(0_u32, |all, byte| all << 8 | u32::from(*byte));
        let group = group << (8 * (3 - three.len()));
        for i in 0..4 {
            let digit = DIGITS[(group >> (18 - 6 * i)) as usize & 63] as char;
            text.push(if i <= three.len() { digit } else { '=' });
        }
    }
    text
}

#[test]
fn keys_open_the_daemon_over_tcp_and_count_at_once() {
    let home = Home::new();
    home.put_golden("tiny", "llama-q4_0.gguf");
    let daemon = Daemon::start(&home);
    daemon.tcp.get("/api/tags").expect(200);
    let (read, user) = (key(&home, "nas", "read"), key(&home, "desk", "use"));
    let file = fs::read_to_string(home.path().join("keys")).expect("a file of keys");
    assert!(!file.contains(&read) && file.contains("nas read sha256:"), "{file}");
    assert!(daemon.tcp.get("/api/tags").error(401).contains("wants a key"));
    assert_eq!(daemon.tcp.get("/").status, 200);
    daemon.unix.get("/api/tags").expect(200);
    let ask = |header: &str, path: &str| daemon.tcp.request_with(header, "GET", path, b"").status;
    assert_eq!(ask(&format!("Authorization: Bearer {read}\r\n"), "/api/tags"), 200);
    assert_eq!(ask(&format!("Authorization: Bearer {read}\r\n"), "/api/ps"), 403);
    assert_eq!(ask(&format!("x-api-key: {user}\r\n"), "/api/ps"), 200);
    let refused = daemon.tcp.get("/v2/");
    assert_eq!(
        (refused.status, refused.field("www-authenticate")),
        (401, Some("Basic realm=\"v4\""))
    );

    // The commands of another machine.
    let host = format!("http://127.0.0.1:{}", daemon.port());
    let elsewhere = |key: &str, args: &[&str]| {
        run(v4(&home, args).env("V4_HOST", &host).env("V4_KEY", key), "")
    };
    assert!(elsewhere(&user, &["list"]).success().contains("tiny"));
    assert!(elsewhere("", &["list"]).failure(1).contains("wants a key"));
    assert!(elsewhere("v4-no", &["list"]).failure(1).contains("not known here"));
    assert!(elsewhere(&user, &["rm", "tiny"]).failure(1).contains("needs admin"));
    let table = run(&mut v4(&home, &["keys"]), "");
    assert!(table.success().contains("desk    use"), "{table:?}");

    // Removed by the command: at once. By hand: a moment later.
    run(&mut v4(&home, &["keys", "rm", "desk"]), "").success();
    assert_eq!(ask(&format!("x-api-key: {user}\r\n"), "/api/tags"), 401);
    fs::write(home.path().join("keys"), "").expect("a writable file");
    let open = || (daemon.tcp.get("/api/tags").status == 200).then_some(());
    v4_tests::process::until("the keys to be read again", open);
}

#[test]
fn a_daemon_on_the_network_answers_nobody_without_a_key() {
    let home = Home::new();
    let daemon = Daemon::start_with(&home, &[("V4_LISTEN", "0.0.0.0:0")]);
    let tcp = v4_tests::http::Address::Tcp(format!("127.0.0.1:{}", daemon.port()));
    assert!(tcp.get("/api/tags").error(401).contains("has no keys yet"));
    assert!(daemon.log().contains("nobody is answered over TCP"));
    let text = key(&home, "a", "use");
    let header = format!("Authorization: Bearer {text}\r\n");
    assert_eq!(tcp.request_with(&header, "GET", "/api/tags", b"").status, 200);
    drop(daemon);
    let open = [("V4_LISTEN", "0.0.0.0:0"), ("V4_KEYS", "off")];
    let daemon = Daemon::start_with(&home, &open);
    let tcp = v4_tests::http::Address::Tcp(format!("127.0.0.1:{}", daemon.port()));
    tcp.get("/api/tags").expect(200);
}
