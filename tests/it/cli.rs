//! What a person types, and what the terminal shows.

use std::fs;
use std::io::Read as _;
use std::process::Stdio;
use std::thread;

use rustix::process::Signal;
use serde_json::json;
use v4_tests::daemon::Daemon;
use v4_tests::home::{ENDLESS, Home, Model};
use v4_tests::process::{self, run, serving, signal, until, v4};

/// The tiny model of most tests.
const TINY: &str = "llama-q4_0.gguf";

/// Ends the daemon that a command started in the background.
struct Background<'a>(&'a Home);

impl Drop for Background<'_> {
    fn drop(&mut self) {
        for pid in serving(&self.0.path()) {
            signal(pid, Signal::KILL);
        }
    }
}

#[test]
fn the_help_names_every_command_and_a_wrong_one_is_a_usage_error() {
    let home = Home::new();
    let page = run(&mut v4(&home, &["--help"]), "").success().to_owned();
    let keep = [
        "pull", "pulls", "import", "list", "show", "cp", "create", "push", "lock", "rm", "restore",
    ];
    let care = ["du", "fsck", "pin", "prune", "roots"];
    for command in ["run", "ps", "stop", "serve"].into_iter().chain(keep).chain(care) {
        assert!(page.contains(&format!("\n  {command} ")), "{command}: {page}");
    }
    assert!(!page.contains("runner"), "{page}");
    assert_eq!(run(&mut v4(&home, &["lst"]), "").status.code(), Some(2));
    assert_eq!(run(&mut v4(&home, &[]), "").status.code(), Some(2));
    assert!(!home.path().exists(), "neither needs a daemon");
}

#[test]
fn without_a_daemon_ps_and_stop_say_that_none_runs() {
    let home = Home::new();
    let ps = run(&mut v4(&home, &["ps"]), "");
    assert!(ps.success().starts_with("NAME "), "{ps:?}");
    assert!(ps.stderr.contains("no v4 daemon is running"), "{ps:?}");
    let stop = run(&mut v4(&home, &["stop", "m"]), "");
    assert!(stop.failure(1).contains("no v4 daemon is running"));
    assert!(serving(&home.path()).is_empty(), "neither starts one");
    let elsewhere = run(v4(&home, &["list"]).env("V4_HOST", "127.0.0.1:1"), "");
    assert!(elsewhere.failure(1).contains("http://127.0.0.1:1"), "{elsewhere:?}");
}

#[test]
fn the_first_command_starts_one_daemon_however_many_come_first() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let background = Background(&home);
    thread::scope(|scope| {
        let lists: Vec<_> =
            (0..4).map(|_| scope.spawn(|| run(&mut v4(&home, &["list"]), ""))).collect();
        for list in lists {
            let list = list.join().expect("no panic");
            assert!(list.success().contains("tiny:latest"), "{list:?}");
        }
    });
    // Those that found the home taken may still be on their way out.
    let pid = until("one daemon alone", || match serving(&home.path())[..] {
        [pid] => Some(pid),
        _ => None,
    });
    signal(pid, Signal::TERM);
    until("the daemon's end", || serving(&home.path()).is_empty().then_some(()));
    assert!(!home.socket().exists(), "it cleans up behind itself");
    drop(background);
}

#[test]
fn a_command_waits_for_a_daemon_that_is_about_to_end() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let _background = Background(&home);
    let elsewhere = home.beside().join("elsewhere.sock");
    let mut old = v4(&home, &["serve"]).env("V4_SOCKET", &elsewhere).spawn().expect("v4 starts");
    until("the old daemon", || elsewhere.exists().then_some(()));
    thread::scope(|scope| {
        let list = scope.spawn(|| run(&mut v4(&home, &["list"]), ""));
        until("a new daemon", || (!serving(&home.path()).is_empty()).then_some(()));
        until("its end, as the home is taken", || serving(&home.path()).is_empty().then_some(()));
        signal(old.id(), Signal::TERM);
        let list = list.join().expect("no panic");
        assert!(list.success().contains("tiny:latest") && list.stderr.is_empty(), "{list:?}");
    });
    assert!(process::wait(&mut old).success());
}

#[test]
fn why_a_daemon_does_not_start_is_shown_at_once() {
    let home = Home::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("bound");
    let list = run(v4(&home, &["list"]).env("V4_LISTEN", address.to_string()), "");
    let line = list.failure(1);
    assert!(line.contains(&address.port().to_string()) && line.contains("--listen"), "{line}");
    assert_eq!(list.stderr.lines().count(), 1, "{list:?}");
}

#[test]
fn a_prompt_gets_one_answer() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let _daemon = Daemon::start(&home);
    let ask = ["run", "tiny", "hello", "world", "--num-predict", "8", "--temperature", "0"];
    let first = run(&mut v4(&home, &ask), "");
    assert!(first.success().ends_with('\n') && first.stdout.len() > 1, "{first:?}");
    assert_eq!(first.stderr, "");
    let second = run(v4(&home, &ask).arg("--verbose"), "");
    assert_eq!(second.success(), first.success(), "the likeliest words are the same ones");
    assert!(second.stderr.contains("eval count:           8 token(s)"), "{second:?}");

    let piped = ["run", "tiny", "--num-predict", "4", "--seed", "7"];
    let answer = run(&mut v4(&home, &piped), "some text\n");
    assert!(answer.success().len() > 1, "{answer:?}");
    let nothing = run(&mut v4(&home, &piped), "");
    assert!(nothing.failure(1).contains("nothing to ask"), "{nothing:?}");
}

#[test]
fn a_reader_that_leaves_ends_the_answer_quietly() {
    let home = Home::new();
    home.put_endless("tiny");
    let daemon = Daemon::start_with(&home, &[ENDLESS]);
    let mut child = v4(&home, &["run", "tiny", "hello", "--temperature", "0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("v4 starts");
    let mut stdout = child.stdout.take().expect("piped");
    stdout.read_exact(&mut [0]).expect("an answer");
    drop(stdout);
    let status = process::wait(&mut child);
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("text");
    assert_eq!((status.code(), stderr.as_str()), (Some(0), ""));
    drop(daemon);
}

#[test]
fn models_are_listed_shown_stopped_and_removed() {
    let home = Home::new();
    let weights = fs::read(v4_tests::golden().join("gguf").join(TINY)).expect("a golden file");
    let params = json!({"temperature": 0.5, "stop": ["<|eot_id|>"]});
    let blob = home.put(&Model { name: "me/tiny:v1", weights, params });
    let daemon = Daemon::start(&home);
    let v4 = |args: &[&str]| run(&mut v4(&home, args), "");

    let list = v4(&["list"]);
    let row = list.success().lines().nth(1).unwrap_or_default();
    assert!(row.starts_with("me/tiny:v1 ") && row.contains("1 MB"), "{list:?}");
    assert_eq!(v4(&["ls", "other"]).success().lines().count(), 1);

    let show = v4(&["show", "me/tiny:v1"]);
    for part in ["  Model\n    architecture        llama\n", "  Capabilities\n    completion\n"] {
        assert!(show.success().contains(part), "{}", show.stdout);
    }
    assert!(show.success().contains("temperature    0.5"), "{}", show.stdout);
    let verbose = v4(&["show", "-v", "me/tiny:v1"]);
    assert!(verbose.success().contains("    blk.0.attn_q.weight "), "{}", verbose.stdout);
    assert!(v4(&["show", "--modelfile", "me/tiny:v1"]).success().contains("FROM "));
    assert!(v4(&["show", "--template", "me/tiny:v1"]).success().contains("messages"));
    assert_eq!(v4(&["show", "--template", "--system", "me/tiny:v1"]).status.code(), Some(2));

    v4(&["run", "me/tiny:v1", "hi", "--num-predict", "1"]).success();
    let ps = v4(&["ps"]);
    assert!(ps.success().contains("100% CPU"), "{ps:?}");
    assert!(ps.success().contains("4 minutes from now"), "{ps:?}");
    v4(&["stop", "me/tiny:v1"]).success();
    until("the runner's end", || process::runner(daemon.pid(), &blob).is_none().then_some(()));
    assert!(v4(&["stop", "me/tiny:v1"]).failure(1).contains("couldn't find model"));

    assert_eq!(v4(&["rm", "me/tiny:v1"]).success(), "deleted 'me/tiny:v1'\n");
    assert!(home.blob(&blob).exists(), "it can come back");
    v4(&["prune"]).success();
    assert!(!home.blob(&blob).exists(), "nothing else uses it");
    assert!(v4(&["rm", "me/tiny:v1"]).failure(1).contains("not found"));
    assert!(v4(&["show", "me/tiny:v1"]).failure(1).contains("not found"));
}

#[test]
fn a_model_is_made_copied_looked_after_and_removed() {
    let home = Home::new();
    let daemon = Daemon::start(&home);
    let v4 = |args: &[&str]| run(&mut v4(&home, args), "");
    let folder = home.beside().join("made");
    fs::create_dir(&folder).expect("a writable folder");
    fs::copy(v4_tests::golden().join("gguf").join(TINY), folder.join("tiny.gguf")).expect("a copy");
    let modelfile = folder.join("Modelfile");
    let text = "FROM ./tiny.gguf\nPARAMETER temperature 0\nSYSTEM be brief\nLICENSE mine\n";
    fs::write(&modelfile, text).expect("a writable folder");
    let file = modelfile.to_str().expect("a path");

    let create = v4(&["create", "mine", "-f", file]);
    create.success();
    for line in ["parsing GGUF", "creating new layer sha256:", "writing manifest", "success"] {
        assert!(create.stderr.contains(line), "{line}: {create:?}");
    }
    assert!(v4(&["show", "mine"]).success().contains("be brief"));
    assert!(v4(&["show", "--provenance", "mine"]).success().contains("made on this machine"));
    assert!(v4(&["run", "mine", "hi", "--num-predict", "2"]).success().len() > 1);

    // On top of it another, which has all blobs but its texts in common.
    fs::write(&modelfile, "FROM mine\nSYSTEM be long\n").expect("a writable folder");
    v4(&["create", "me/other", "-f", file]).success();
    assert_eq!(
        v4(&["cp", "me/other", "third"]).success(),
        "copied 'me/other:latest' to 'third:latest'\n"
    );
    let du = v4(&["du"]);
    assert!(du.success().contains("me/other:latest    0 B"), "{du:?}");
    assert!(v4(&["fsck"]).stderr.ends_with("success\n"));
    assert_eq!(v4(&["prune"]).success(), "freed 0 B\n");

    let lock = folder.join("v4.lock");
    let lock = lock.to_str().expect("a path");
    assert!(v4(&["lock", "mine", "-f", lock]).success().ends_with("holds 1 model(s)\n"));
    assert!(fs::read_to_string(lock).expect("it").contains("\"digest\": \"sha256:"));
    v4(&["pull", &format!("--locked={lock}")]).success();
    assert!(v4(&["lock", "nothing", "-f", lock]).failure(1).contains("v4 pull nothing"));

    let blobs = home.blobs();
    let largest = blobs.iter().max_by_key(|digest| home.blob(digest).metadata().expect("it").len());
    fs::remove_file(home.blob(largest.expect("a blob"))).expect("a writable home");
    let fsck = v4(&["fsck"]);
    assert!(fsck.failure(1).contains("v4 fsck --repair"), "{fsck:?}");
    assert!(fsck.stderr.contains("mine:latest: the blob"), "{fsck:?}");
    for model in ["mine", "me/other", "third"] {
        v4(&["rm", model]).success();
    }
    v4(&["prune"]).success();
    assert!(home.blobs().is_empty(), "nothing needs them");

    fs::write(&modelfile, "FROM ./missing.gguf\n").expect("a writable folder");
    assert!(v4(&["create", "mine", "-f", file]).failure(1).contains("there is no file"));
    fs::write(&modelfile, "FROM x\nBAKE 7\n").expect("a writable folder");
    assert!(v4(&["create", "mine", "-f", file]).failure(1).contains("(line 2)"));
    assert!(v4(&["create", "mine", "-f", "nowhere"]).failure(1).contains("cannot use nowhere"));
    assert!(v4(&["cp", "nothing", "mine"]).failure(1).contains("not found"));
    assert_eq!(daemon.tcp.get("/api/tags").expect(200), json!({"models": []}));
}

#[test]
fn a_daemon_elsewhere_is_used_by_its_address() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let other = Home::new();
    let host = format!("http://127.0.0.1:{}", daemon.port());
    let list = run(v4(&other, &["list"]).env("V4_HOST", &host), "");
    assert!(list.success().contains("tiny:latest"), "{list:?}");
    assert!(!other.path().exists());
}

#[test]
fn names_that_cannot_be_are_refused_before_anything_starts() {
    let home = Home::new();
    let long = "a".repeat(10_000);
    for name in ["../x", "a b", "", &long] {
        for command in ["run", "pull", "show", "stop", "rm"] {
            let outcome = run(&mut v4(&home, &[command, name]), "");
            assert!(outcome.failure(1).contains("name"), "{outcome:?}");
        }
    }
    assert!(!home.path().exists());
}
