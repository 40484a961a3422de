//! The supervisor against real processes: this test executable runs itself as a runner that does as
//! its files and prompts say.

use std::{future::Future, path::PathBuf, time::Instant};

use tempfile::TempDir;
use tokio::time::timeout;
use v4_proto::{Delta, Done, Event, Finish, Gpu, Input, Inventory, Layout, SamplingParams, Usage};

use super::*;
use v4_store::{Layer, Manifest};

mod fake;

/// A state that a test waits for comes within this, also on a machine with much to do.
const PATIENCE: Duration = Duration::from_secs(30);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("in time")
}

/// Waits until `check` says yes.
async fn until<F: Future<Output = bool>>(what: &str, check: impl Fn() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !check().await {
        assert!(Instant::now() < deadline, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn launch(scenario: &str) -> Launch {
    let args = ["tests::fake::runner", "--exact", "--nocapture", fake::MARK, scenario];
    Launch {
        exe: std::env::current_exe().expect("this test").into(),
        args: args.iter().map(Into::into).collect(),
        heartbeat: limits::HEARTBEAT,
    }
}

fn config() -> SupervisorConfig {
    SupervisorConfig { memory_bytes: Some(2 << 30), slots: 2, ..SupervisorConfig::default() }
}

struct Setup {
    supervisor: Supervisor,
    home: TempDir,
}

impl Setup {
    fn new(config: &SupervisorConfig, launch: Launch) -> Self {
        let home = tempfile::tempdir().expect("a folder");
        let store = Arc::new(Store::open(home.path()).expect("a store"));
        Self { supervisor: Supervisor::start_with(config, store, launch), home }
    }

    fn normal() -> Self {
        Self::new(&config(), launch("normal"))
    }

    async fn ask(&self, model: &str, prompt: &str) -> Result<Answer, Fault> {
        soon(self.supervisor.generate(&target(model), request(prompt), Terms::default())).await
    }

    /// The whole text, and how it ended.
    async fn tell(&self, model: &str, prompt: &str) -> (String, Event) {
        match self.ask(model, prompt).await {
            Ok(mut answer) => read(&mut answer).await,
            Err(fault) => (String::new(), Event::Failed(fault)),
        }
    }
}

/// `a` and `a2` are two versions of the name `a`; a fake model takes 1 GiB.
fn target(version: &str) -> Target {
    Target {
        name: version[..1].parse().expect("a name"),
        digest: Digest::from_bytes([version.as_bytes()[version.len() - 1]; 32]),
        files: ModelFiles { weights: vec![version.into()], ..ModelFiles::default() },
        blobs: Vec::new(),
        info: Some(fake::info()),
    }
}

fn request(prompt: &str) -> Generate {
    Generate {
        input: Input::Raw { text: prompt.into() },
        sampling: SamplingParams::greedy(),
        max_tokens: None,
        stop: Vec::new(),
        context: None,
        truncate: false,
        lane: v4_proto::Lane::default(),
    }
}

async fn read(answer: &mut Answer) -> (String, Event) {
    let mut text = String::new();
    loop {
        match soon(answer.next()).await.expect("an end before the end") {
            Event::Delta(delta) => text += &delta.text,
            end => {
                assert_eq!(soon(answer.next()).await, None);
                return (text, end);
            }
        }
    }
}

fn done(finish: Finish) -> Event {
    Event::Done(Done { finish, usage: Usage::default() })
}

#[track_caller]
fn code(event: &Event) -> Code {
    match event {
        Event::Failed(fault) => fault.code,
        other => panic!("{other:?} is no fault"),
    }
}

fn is_alive(pid: &str) -> bool {
    // A zombie has no executable any more.
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

fn signal(name: &str, pid: &str) {
    let status = std::process::Command::new("kill").args([name, pid]).status();
    assert!(status.expect("kill is there").success());
}

#[tokio::test]
async fn a_model_is_loaded_once_listed_and_unloaded() {
    let setup = Setup::normal();
    let mut first = setup.ask("a", "echo hi there").await.expect("an answer");
    assert!(first.load_ns() > 0);
    assert_eq!(read(&mut first).await, ("hi there".into(), done(Finish::Stop)));
    let second = setup.ask("a", "echo x").await.expect("an answer");
    assert_eq!(second.load_ns(), 0);
    let busy = setup.supervisor.ps().await;
    assert!(busy[0].expires.is_some(), "a busy model does not stay for ever");
    drop(second);
    let centuries = Some(KeepAlive::For(Duration::MAX));
    let terms = Terms { keep_alive: centuries, ..Terms::default() };
    setup.supervisor.load(&target("b"), terms).await.expect("loads");

    let ps = setup.supervisor.ps().await;
    let names: Vec<String> = ps.iter().map(|line| line.name.to_string()).collect();
    assert_eq!(names, ["b:latest", "a:latest"]);
    assert!(ps.iter().all(|line| line.state == State::Ready && line.size_bytes == fake::BYTES));
    assert_eq!(ps[0].expires, None);

    let name: ModelName = "a".parse().expect("a name");
    assert!(setup.supervisor.unload(&name).await);
    until("the end of a", async || setup.supervisor.ps().await.len() == 1).await;
    assert!(!setup.supervisor.unload(&name).await);
}

#[tokio::test]
async fn a_keep_alive_of_zero_unloads_after_the_answer() {
    let setup = Setup::normal();
    let keep_alive = Some(KeepAlive::For(Duration::ZERO));
    let terms = Terms { keep_alive, ..Terms::default() };
    let target = target("a");
    let asked = setup.supervisor.generate(&target, request("echo hi"), terms);
    let mut answer = soon(asked).await.expect("an answer");
    assert_eq!(read(&mut answer).await.0, "hi");
    until("the end of a", async || setup.supervisor.ps().await.is_empty()).await;
}

#[tokio::test]
async fn another_protocol_is_a_fault_and_not_a_guess() {
    let setup = Setup::new(&config(), launch("old-protocol"));
    assert_eq!(code(&setup.tell("a", "echo hi").await.1), Code::RunnerDied);
    let inspected = soon(setup.supervisor.inspect(target("a").files)).await;
    assert_eq!(inspected.expect_err("a fault").code, Code::RunnerDied);
}

#[tokio::test]
async fn an_executable_that_is_not_there_is_said_at_once() {
    let missing = Launch { exe: "/nonexistent/v4".into(), ..launch("normal") };
    let setup = Setup::new(&config(), missing);
    assert_eq!(code(&setup.tell("a", "echo hi").await.1), Code::Internal);
}

#[tokio::test]
async fn an_abort_in_mid_stream_ends_that_answer_only() {
    let setup = Setup::normal();
    let mut other = setup.ask("b", "wait").await.expect("an answer");
    let (text, end) = setup.tell("a", "abort after 2").await;
    assert_eq!((text.as_str(), code(&end)), ("01", Code::RunnerDied));
    // The next request works, and the other model has noticed nothing.
    assert_eq!(setup.tell("a", "echo again").await, ("again".into(), done(Finish::Stop)));
    assert_eq!(setup.tell("b", "echo b").await.0, "b");
    assert!(timeout(Duration::ZERO, other.next()).await.is_err());
}

#[tokio::test]
async fn a_kill_from_outside_in_mid_stream_ends_the_answer() {
    let setup = Setup::normal();
    let pid = setup.tell("a", "pid").await.0;
    let mut answer = setup.ask("a", "begin and wait").await.expect("an answer");
    assert!(matches!(soon(answer.next()).await, Some(Event::Delta(_))));
    signal("-KILL", &pid);
    assert_eq!(code(&read(&mut answer).await.1), Code::RunnerDied);
    assert!(!is_alive(&pid));
    assert_eq!(setup.tell("a", "echo again").await.0, "again");
}

#[tokio::test]
async fn a_death_before_the_first_token_is_tried_once_more() {
    let setup = Setup::normal();
    let mark = setup.home.path().join("once");
    let prompt = format!("abort once {}", mark.display());
    assert_eq!(setup.tell("a", &prompt).await, ("survived".into(), done(Finish::Stop)));
    assert!(mark.exists());
    // Once, not for ever.
    assert_eq!(code(&setup.tell("b", "abort after 0").await.1), Code::RunnerDied);
}

#[tokio::test]
async fn a_request_that_meets_a_dying_runner_goes_to_the_next() {
    let setup = Setup::normal();
    // The socket ends at once, the process only when it is killed.
    assert_eq!(setup.tell("a", "close and linger").await.1, done(Finish::Stop));
    for _ in 0..2 {
        let (one, two) = tokio::join!(setup.tell("a", "echo 1"), setup.tell("a", "echo 2"));
        assert_eq!(one, ("1".into(), done(Finish::Stop)));
        assert_eq!(two, ("2".into(), done(Finish::Stop)));
    }
}

#[tokio::test]
async fn what_a_link_has_not_read_at_its_end_is_given_back() {
    let (commands, inbox) = mpsc::channel(1);
    let (reports, mut reported) = mpsc::channel(1);
    let (route, _waiting) = answer::route(Vec::new(), metrics::Meter::new(Arc::default()));
    commands.try_send(link::Command::Generate { id: 7, route }).expect("room");
    tokio::spawn(link::run(1, launch("old-protocol"), inbox, reports));
    let Some((1, link::Report::Gone { unfinished, .. })) = soon(reported.recv()).await else {
        panic!("an end was to come")
    };
    let given_back: Vec<_> = unfinished.iter().map(|cut| (cut.id, cut.begun)).collect();
    assert_eq!(given_back, [(7, false)]);
}

#[tokio::test]
async fn three_deaths_put_the_model_out_of_service() {
    let setup = Setup::normal();
    // Each dies twice: by itself and once more for the request that had no token.
    assert_eq!(code(&setup.tell("a", "abort after 0").await.1), Code::RunnerDied);
    assert_eq!(code(&setup.tell("a", "abort after 0").await.1), Code::Overloaded);
    assert_eq!(code(&setup.tell("a", "echo hi").await.1), Code::Overloaded);
    assert_eq!(setup.tell("b", "echo hi").await.0, "hi");
}

#[tokio::test]
async fn a_runner_that_hangs_is_killed() {
    for how in ["silent", "stopped"] {
        let heartbeat = Duration::from_millis(300);
        let setup = Setup::new(&config(), Launch { heartbeat, ..launch("normal") });
        let pid = setup.tell("a", "pid").await.0;
        let mut answer = setup.ask("a", "begin and hang").await.expect("an answer");
        assert!(matches!(soon(answer.next()).await, Some(Event::Delta(_))));
        if how == "stopped" {
            signal("-STOP", &pid);
        }
        assert_eq!(code(&read(&mut answer).await.1), Code::RunnerDied, "{how}");
        assert!(!is_alive(&pid), "{how}");
    }
}

#[tokio::test]
async fn a_slow_client_is_cut_and_the_others_do_not_wait() {
    let setup = Setup::normal();
    let n_deltas = limits::EVENTS_PER_REQUEST + 10;
    let mut slow = setup.ask("a", &format!("flood {n_deltas}")).await.expect("an answer");
    assert_eq!(setup.tell("a", "echo other").await.0, "other");
    let (text, end) = read(&mut slow).await;
    assert_eq!((text.len(), code(&end)), (limits::EVENTS_PER_REQUEST, Code::SlowClient));
    // Its slots are free again: the runner has heard the cancel.
    let (a, b) = tokio::join!(setup.tell("a", "echo a"), setup.tell("a", "echo b"));
    assert_eq!((a.0.as_str(), b.0.as_str()), ("a", "b"));
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_a_client_that_leaves_makes_room() {
    let config = SupervisorConfig { slots: 1, max_queue: 1, ..config() };
    let setup = Setup::new(&config, launch("normal"));
    let running = setup.ask("a", "wait").await.expect("an answer");
    let waits = setup.ask("a", "echo second");
    tokio::pin!(waits);
    assert!(timeout(Duration::from_millis(50), waits.as_mut()).await.is_err());
    let refused = setup.ask("a", "echo third").await.map(drop);
    assert_eq!(refused.expect_err("refused").code, Code::Overloaded);
    drop(running);
    let mut second = waits.await.expect("an answer");
    assert_eq!(read(&mut second).await.0, "second");
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_is_forgotten() {
    let config = SupervisorConfig { slots: 1, max_queue: 1, ..config() };
    let setup = Setup::new(&config, launch("normal"));
    let running = setup.ask("a", "wait").await.expect("an answer");
    let gave_up = timeout(Duration::from_millis(50), setup.ask("a", "echo second")).await;
    assert!(gave_up.is_err());
    until("the free place", async || {
        // Refusal is at once; an ask that waits has found the place.
        timeout(Duration::from_millis(50), setup.ask("a", "echo third")).await.is_err()
    })
    .await;
    drop(running);
    until("an answer", async || setup.tell("a", "echo fourth").await.0 == "fourth").await;
}

#[tokio::test]
async fn a_load_that_fails_says_why_to_everybody() {
    let setup = Setup::normal();
    let (one, two) = tokio::join!(setup.tell("bad", "echo 1"), setup.tell("bad", "echo 2"));
    assert_eq!((code(&one.1), code(&two.1)), (Code::Corrupt, Code::Corrupt));
    let loaded = soon(setup.supervisor.load(&target("bad"), Terms::default())).await;
    assert_eq!(loaded.expect_err("a fault").code, Code::Corrupt);
    assert!(setup.supervisor.ps().await.is_empty());
}

#[tokio::test]
async fn two_models_that_do_not_fit_together_take_turns() {
    let config = SupervisorConfig { memory_bytes: Some(fake::BYTES * 3 / 2), ..config() };
    let setup = Setup::new(&config, launch("normal"));
    for model in ["a", "b", "a", "b"] {
        assert_eq!(setup.tell(model, "which").await.0, model);
        let ready = setup.supervisor.ps().await;
        let ready = ready.iter().filter(|line| line.state == State::Ready);
        assert_eq!(ready.map(|line| line.name.model()).collect::<Vec<_>>(), [model]);
    }
}

#[tokio::test]
async fn a_model_larger_than_the_memory_is_refused() {
    let config = SupervisorConfig { memory_bytes: Some(fake::BYTES / 2), ..config() };
    let setup = Setup::new(&config, launch("normal"));
    assert_eq!(code(&setup.tell("a", "which").await.1), Code::OutOfMemory);
}

#[tokio::test]
async fn a_retag_swaps_without_a_gap_and_running_answers_go_on() {
    let setup = Setup::normal();
    assert_eq!(soon(setup.supervisor.retag(&target("a"))).await, Ok(false));
    let mut old = setup.ask("a", "wait for echo").await.expect("an answer");
    assert_eq!(soon(setup.supervisor.retag(&target("a2"))).await, Ok(true));
    assert_eq!(setup.tell("a2", "which").await.0, "a2");
    // The old runner was told to drain and finishes what it has.
    assert_eq!(read(&mut old).await, ("finished".into(), done(Finish::Stop)));
    until("one a", async || setup.supervisor.ps().await.len() == 1).await;
}

#[tokio::test]
async fn a_retag_that_fails_leaves_the_old_one_and_says_so() {
    let setup = Setup::normal();
    assert_eq!(setup.tell("a", "which").await.0, "a");
    let mut bad = target("a2");
    bad.files.weights = vec!["bad".into()];
    let failed = soon(setup.supervisor.retag(&bad)).await;
    assert_eq!(failed.expect_err("a fault").code, Code::Corrupt);
    assert_eq!(setup.tell("a", "which").await.0, "a");
    let ps = setup.supervisor.ps().await;
    assert_eq!(ps[0].error.as_ref().map(|fault| fault.code), Some(Code::Corrupt));
}

#[tokio::test]
async fn shutdown_drains_and_refuses() {
    let setup = Setup::normal();
    let pid = setup.tell("a", "pid").await.0;
    let mut running = setup.ask("a", "wait").await.expect("an answer");
    soon(setup.supervisor.shutdown(Duration::from_secs(5))).await;
    assert_eq!(read(&mut running).await.1, done(Finish::Cancelled));
    assert!(!is_alive(&pid));
    assert_eq!(code(&setup.tell("a", "echo hi").await.1), Code::Overloaded);
}

#[tokio::test]
async fn runners_end_with_their_supervisor() {
    let setup = Setup::normal();
    let pid = setup.tell("a", "pid").await.0;
    assert!(is_alive(&pid));
    drop(setup);
    until("the runner's end", async || !is_alive(&pid)).await;
}

#[tokio::test]
async fn inspect_answers_or_says_what_the_file_did() {
    let setup = Setup::normal();
    let inspect = |path: &str| {
        setup.supervisor.inspect(ModelFiles { weights: vec![path.into()], ..ModelFiles::default() })
    };
    assert_eq!(soon(inspect("a")).await.expect("facts").info, fake::info());
    assert_eq!(soon(inspect("bad")).await.expect_err("a fault").code, Code::Corrupt);
    assert_eq!(soon(inspect("abort")).await.expect_err("a fault").code, Code::RunnerDied);
    // A target whose figures are not known is inspected on the way.
    let target = Target { info: None, ..target("a") };
    let mut answer =
        soon(setup.supervisor.generate(&target, request("which"), Terms::default())).await;
    assert_eq!(read(answer.as_mut().expect("an answer")).await.0, "a");
}

#[tokio::test]
async fn blobs_are_leased_as_long_as_the_model_is_loaded() {
    let setup = Setup::normal();
    let store = Arc::clone(&setup.supervisor.shared.store);
    let weights = store.put_blob(b"weights").expect("a blob");
    let layer = |digest, size| Layer::new("application/vnd.ollama.image.model", digest, size);
    let put = |name: &str, layers| {
        let config = store.put_blob(b"{}").expect("a blob");
        let manifest = Manifest::new(layer(config, 2), layers);
        let name: ModelName = name.parse().expect("a name");
        store.put_manifest(&name, &manifest.encode()).expect("a manifest");
        name
    };
    let name = put("a", vec![layer(weights, 7)]);
    let target = Target { blobs: vec![weights], ..target("a") };
    soon(setup.supervisor.load(&target, Terms::default())).await.expect("loads");
    assert!(store.remove(&name).expect("removes"));
    assert!(store.blob(&weights).expect("a size").is_some(), "a loaded model keeps its blobs");

    setup.supervisor.unload(&name).await;
    until("the end of a", async || setup.supervisor.ps().await.is_empty()).await;
    // What was spared goes with the next collection.
    let other = put("other", Vec::new());
    assert!(store.remove(&other).expect("removes"));
    assert_eq!(store.blob(&weights).expect("a size"), None);
}

#[tokio::test]
async fn the_last_lines_of_a_dead_process_are_kept() {
    let (process, socket) = launch("talk").spawn().expect("starts");
    let ending = soon(process.end(PATIENCE)).await;
    drop(socket);
    assert_eq!(ending.status.expect("a status").code(), Some(3));
    assert!(ending.last_lines.ends_with("first words\nlast words"), "{}", ending.last_lines);
}

#[tokio::test]
async fn an_orphan_ends_with_its_socket() {
    let (process, socket) = launch("normal").spawn().expect("starts");
    drop(socket);
    let ending = soon(process.end(PATIENCE)).await;
    assert!(ending.status.expect("a status").success(), "{}", ending.last_lines);
}

#[test]
fn a_default_runner_is_this_executable() {
    let launch = Launch::of(&PathBuf::from("/proc/self/exe"));
    assert_eq!((launch.exe.to_str(), launch.args.len()), (Some("/proc/self/exe"), 1));
}

/// A driver's words in a file: one GPU, of which so much is in use.
#[expect(clippy::disallowed_methods, reason = "a test writes what a driver would say")]
fn tell_of_a_gpu(folder: &std::path::Path, used_bytes: u64, can_compute: bool) {
    let gpu = Gpu {
        index: 0,
        name: "Double".into(),
        uuid: "GPU-double".into(),
        total_bytes: 4 << 30,
        used_bytes,
        capability: [9, 0],
        can_compute,
    };
    let inventory = Inventory { gpus: vec![gpu], ..Inventory::default() };
    let bytes = serde_json::to_vec(&inventory).expect("encodes");
    let fresh = folder.join("fresh");
    std::fs::write(&fresh, bytes).expect("written");
    std::fs::rename(fresh, folder.join("gpus.json")).expect("replaced");
}

/// A supervisor that knows of that GPU.
async fn with_a_gpu(folder: &std::path::Path) -> Setup {
    let scenario = format!("gpus in {}", folder.join("gpus.json").display());
    let setup = Setup::new(&config(), launch(&scenario));
    let supervisor = &setup.supervisor;
    let knows =
        || async { supervisor.plan(&target("a")).await.expect("a plan").devices.len() == 2 };
    until("the inventory", knows).await;
    setup
}

#[tokio::test]
async fn a_gpu_that_runners_do_not_compute_on_has_no_model() {
    let folder = tempfile::tempdir().expect("a folder");
    tell_of_a_gpu(folder.path(), 0, false);
    let setup = with_a_gpu(folder.path()).await;
    assert_eq!(setup.tell("a", "where").await.0, "null");
    let loaded = soon(setup.supervisor.ps()).await.remove(0);
    assert_eq!((loaded.place, loaded.gpu_bytes), (None, 0));
    let plan = setup.supervisor.plan(&target("a")).await.expect("a plan");
    assert_eq!(plan.devices[1].why_not, Some("this build of v4 has no kernels for it"));
}

#[tokio::test]
async fn a_gpu_that_runners_compute_on_has_models_until_somebody_else_needs_it() {
    let folder = tempfile::tempdir().expect("a folder");
    tell_of_a_gpu(folder.path(), 0, true);
    let setup = with_a_gpu(folder.path()).await;
    let expected = r#"{"shares":[{"uuid":"GPU-double","layers":[0,0]}],"experts_from":0}"#;
    assert_eq!(setup.tell("a", "where").await.0, expected);
    let loaded = soon(setup.supervisor.ps()).await.remove(0);
    assert_eq!(
        (loaded.place.as_deref(), loaded.gpu_bytes),
        (Some("on gpu0"), fake::BYTES - SCRATCH)
    );
    tell_of_a_gpu(folder.path(), 4 << 30, true);
    let supervisor = &setup.supervisor;
    until("the model's end", || async { supervisor.ps().await.is_empty() }).await;
    let why = supervisor.why(&"a".parse().expect("a name")).await.expect("words");
    let words: Vec<String> = why.iter().map(|(_, decision)| decision.to_string()).collect();
    let expected = "is unloaded: other programs need the memory of gpu0";
    assert!(words.iter().any(|it| it == expected), "{words:?}");
    // While nothing is loaded nobody looks. Who asks then gets what is so now.
    tell_of_a_gpu(folder.path(), 0, true);
    tokio::time::sleep(limits::DEVICES_POLL + Duration::from_millis(100)).await;
    let (text, _) = setup.tell("a", "where").await;
    assert!(text.contains("GPU-double"), "{text}");
}

/// What the process of a model takes of the host's memory.
const SCRATCH: u64 = limits::SCRATCH_BYTES;
