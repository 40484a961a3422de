//! A runner in this process, spoken to over a socket pair as the daemon does, with an engine that
//! does as its prompts say.

use std::{
    io::{Read as _, Write as _},
    sync::{
        atomic::AtomicU32,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::Instant,
};

use v4_proto::{
    Code, Delta, Done, Event, Finish, Input, Inspection, Inventory, Layout, ModelFiles, ModelInfo,
    SamplingParams, Usage,
    frame::{KvType, LENGTHS_BYTES, Lengths, LoadOptions, Precision, Stage},
};

use super::*;
use backend::{Loaded, OnEvent, OnProgress};

/// Its sequences say in their prompt what happens: a number is so many deltas, then `Done`.
struct Fake;

#[derive(Default)]
struct FakeEngine {
    sequences: Vec<(RequestId, String, u32)>,
    cancelled: Vec<RequestId>,
    threads: u32,
    steps: u64,
    /// Whether it always has work in the background.
    is_restless: bool,
}

/// Told when a restless engine is flushed.
static FLUSHED: Mutex<Option<SyncSender<()>>> = Mutex::new(None);

/// Opened by the test of the heartbeat, so that a step lasts until then.
static GATE: Mutex<Option<Receiver<()>>> = Mutex::new(None);

fn done(finish: Finish) -> Event {
    Event::Done(Done { finish, usage: Usage::default() })
}

impl Backend for Fake {
    type Prepare = ();
    type Sequence = String;
    type Engine = FakeEngine;

    fn devices() -> Inventory {
        // The driver thinks until the test lets it, and answers once.
        N_ASKED.fetch_add(1, Ordering::SeqCst);
        let gate = THINKING.lock().expect("no panic").take();
        let _ = gate.map(|gate| gate.recv_timeout(Duration::from_secs(10)));
        Inventory { complaints: vec!["gpu0: it is lost".into()], ..Inventory::default() }
    }

    fn inspect(files: &ModelFiles) -> Result<Inspection, Fault> {
        let info = Self::load(files, &options(), &mut |_, _, _| {})?.info;
        let mut metadata = serde_json::Map::new();
        if files.weights[0].to_str() == Some("vast") {
            metadata.insert("vast".into(), vast().into());
        }
        Ok(Inspection { info, metadata, chat_template: None, tensors: Vec::new() })
    }

    fn load(
        files: &ModelFiles,
        options: &LoadOptions,
        on_progress: OnProgress<'_>,
    ) -> Result<Loaded<Self>, Fault> {
        match files.weights[0].to_str() {
            Some("bad") => return Err(Fault::new(Code::Corrupt, "bad weights")),
            Some("panic") => panic!("the parser met what it did not expect"),
            _ => {}
        }
        for done in 0..=1000 {
            on_progress(Stage::Weights, done, 1000);
        }
        Ok(Loaded {
            prepare: (),
            engine: FakeEngine {
                is_restless: files.weights[0].to_str() == Some("restless"),
                ..FakeEngine::default()
            },
            info: ModelInfo {
                format: "gguf".into(),
                arch: "fake".into(),
                supported: true,
                quant: "F32".into(),
                n_params: 1,
                context_length: 64,
                embedding_length: 1,
                n_layers: 1,
                weight_bytes: 4,
                kv_bytes_per_token: 4,
                layout: Layout::default(),
                abilities: Vec::new(),
            },
            context: options.context,
            memory_bytes: 7,
        })
    }

    fn prepare((): &(), request: &Generate) -> Result<String, Fault> {
        match &request.input {
            Input::Raw { text } if text == "too long" => {
                Err(Fault::new(Code::ContextOverflow, "too long"))
            }
            Input::Raw { text } if text == "template panic" => panic!("in the template"),
            Input::Raw { text } => Ok(text.clone()),
            _ => Err(Fault::invalid("only raw prompts")),
        }
    }

    fn submit(engine: &mut FakeEngine, id: RequestId, sequence: String) {
        engine.sequences.push((id, sequence, 0));
    }

    fn cancel(engine: &mut FakeEngine, id: RequestId) {
        engine.cancelled.push(id);
    }

    fn set_threads(engine: &mut FakeEngine, threads: u32) {
        engine.threads = threads;
    }

    fn step(engine: &mut FakeEngine, on_event: OnEvent<'_>) -> Result<bool, Fault> {
        engine.steps += 1;
        let mut fault = None;
        let cancelled = std::mem::take(&mut engine.cancelled);
        engine.sequences.retain_mut(|(id, text, n)| {
            if cancelled.contains(id) {
                on_event(*id, done(Finish::Cancelled));
                return false;
            }
            match text.as_str() {
                "panic" => panic!("a kernel's assertion"),
                "broken" => fault = Some(Fault::internal("the device is gone")),
                "silent" => return false,
                "vast" => {
                    on_event(*id, Event::Failed(Fault::invalid(vast())));
                    return false;
                }
                "gate" => {
                    let gate = GATE.lock().expect("the gate").take();
                    gate.expect("the test made one").recv().expect("opened");
                    on_event(*id, done(Finish::Stop));
                    return false;
                }
                _ => {}
            }
            if text == "threads" {
                let text = engine.threads.to_string();
                on_event(*id, Event::Delta(Delta { text, ..Delta::default() }));
                on_event(*id, done(Finish::Stop));
                return false;
            }
            let n_wanted: u32 = text.parse().unwrap_or(u32::MAX);
            if *n == n_wanted {
                on_event(*id, done(Finish::Stop));
                return false;
            }
            *n += 1;
            on_event(*id, Event::Delta(Delta { text: n.to_string(), ..Delta::default() }));
            true
        });
        fault.map_or(Ok(!engine.sequences.is_empty()), Err)
    }

    fn rest(engine: &mut FakeEngine) -> bool {
        engine.is_restless
    }

    fn flush(engine: &mut FakeEngine, _: Duration) {
        let told = FLUSHED.lock().expect("no panic").take_if(|_| engine.is_restless);
        if let Some(told) = told {
            told.send(()).expect("the test waits");
        }
    }

    fn stats(engine: &FakeEngine) -> Stats {
        Stats { steps: engine.steps, ..Stats::default() }
    }
}

/// More than a frame takes.
fn vast() -> String {
    "x".repeat(v4_proto::limits::FRAME_HEADER_BYTES + 1)
}

fn options() -> LoadOptions {
    LoadOptions {
        on_gpus: None,
        context: 64,
        slots: 2,
        threads: 1,
        kv_type: KvType::F16,
        precision: Precision::Fast,
        kv_disk: None,
        isa: None,
    }
}

fn files(path: &str) -> ModelFiles {
    ModelFiles { weights: vec![path.into()], ..ModelFiles::default() }
}

/// The daemon's end. Every wait on it ends after ten seconds.
struct Daemon {
    socket: UnixStream,
    runner: JoinHandle<Result<(), Error>>,
}

impl Daemon {
    fn start<B: Backend>() -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let runner = thread::spawn(move || serve::<B>(theirs));
        let mut daemon = Self { socket: ours, runner };
        let hello = FromRunner::Hello { protocol: frame::PROTOCOL, build: frame::BUILD.into() };
        assert_eq!(daemon.next(), Some(hello));
        daemon
    }

    fn ready<B: Backend>() -> Self {
        let mut daemon = Self::start::<B>();
        daemon.send(&ToRunner::Load { files: files("good"), options: options() });
        let ready = daemon.next_of(|message| matches!(message, FromRunner::Ready { .. }));
        assert!(matches!(ready, FromRunner::Ready { context: 64, memory_bytes: 7, .. }));
        daemon
    }

    fn send(&mut self, message: &ToRunner) {
        let bytes = frame::encode(message, b"ignored").expect("encodes");
        self.socket.write_all(&bytes).expect("the runner reads");
    }

    fn ask(&mut self, id: RequestId, prompt: &str) {
        self.send(&generate(id, Input::Raw { text: prompt.into() }));
    }

    /// The next message, or `None` when the runner has closed the socket.
    fn next(&mut self) -> Option<FromRunner> {
        let mut start = [0; LENGTHS_BYTES];
        match self.socket.read_exact(&mut start) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return None,
            Err(error) => panic!("no message in time: {error}"),
        }
        let lengths = Lengths::parse(start).expect("lengths");
        let mut header = vec![0; lengths.header];
        self.socket.read_exact(&mut header).expect("a header");
        assert_eq!(lengths.body, 0);
        Some(frame::decode(&header).expect("a message"))
    }

    #[track_caller]
    fn next_of(&mut self, is: impl Fn(&FromRunner) -> bool) -> FromRunner {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            match self.next() {
                Some(message) if is(&message) => return message,
                Some(_) => {}
                None => panic!("the runner has closed the socket"),
            }
        }
        panic!("it did not come in time")
    }

    /// All events of requests up to the end of `id`.
    #[track_caller]
    fn events_until_end(&mut self, id: RequestId) -> Vec<(RequestId, Event)> {
        let mut events = Vec::new();
        loop {
            let message = self.next_of(|message| !matches!(message, FromRunner::Stats(_)));
            let (of, event) = match message {
                FromRunner::Delta { id, delta } => (id, Event::Delta(delta)),
                FromRunner::Done { id, done } => (id, Event::Done(done)),
                FromRunner::Failed { id, fault } => (id, Event::Failed(fault)),
                other => panic!("out of place: {other:?}"),
            };
            let is_end = of == id && !matches!(event, Event::Delta(_));
            events.push((of, event));
            if is_end {
                return events;
            }
        }
    }

    #[track_caller]
    fn failed(&mut self, id: RequestId) -> Code {
        match self.events_until_end(id).pop() {
            Some((_, Event::Failed(fault))) => fault.code,
            other => panic!("{other:?}"),
        }
    }

    /// Closes the socket and sees how the runner ends.
    fn leave(self) -> Result<(), Error> {
        drop(self.socket);
        self.runner.join().expect("the reader does not panic")
    }

    /// The runner closes the socket by itself.
    #[track_caller]
    fn left(mut self) -> Result<(), Error> {
        while self.next().is_some() {}
        self.runner.join().expect("the reader does not panic")
    }
}

fn generate(id: RequestId, input: Input) -> ToRunner {
    let request = Generate {
        input,
        sampling: SamplingParams::greedy(),
        max_tokens: Some(8),
        stop: Vec::new(),
        context: None,
        truncate: false,
        lane: v4_proto::Lane::default(),
    };
    ToRunner::Generate { id, request: Box::new(request) }
}

#[test]
fn a_request_gets_its_deltas_and_one_end() {
    let mut daemon = Daemon::ready::<Fake>();
    daemon.ask(7, "3");
    let events = daemon.events_until_end(7);
    let texts: Vec<&str> = events
        .iter()
        .filter_map(|(_, event)| match event {
            Event::Delta(delta) => Some(delta.text.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(texts, ["1", "2", "3"]);
    assert_eq!(events.last(), Some(&(7, done(Finish::Stop))));
    daemon.leave().expect("the end of the socket is an order to leave");
}

#[test]
fn threads_are_as_many_as_the_daemon_said_last() {
    let mut daemon = Daemon::ready::<Fake>();
    for threads in [3, 1, 2] {
        daemon.send(&ToRunner::Cores { threads });
        daemon.ask(7, "threads");
        match daemon.events_until_end(7).first() {
            Some((7, Event::Delta(delta))) => assert_eq!(delta.text, threads.to_string()),
            other => panic!("{other:?}"),
        }
    }
    daemon.leave().expect("the end of the socket is an order to leave");
}

#[test]
fn a_load_says_how_far_it_is_but_not_too_often() {
    let mut daemon = Daemon::start::<Fake>();
    daemon.send(&ToRunner::Load { files: files("good"), options: options() });
    let mut n_progress = 0;
    loop {
        match daemon.next().expect("open") {
            FromRunner::Progress { stage: Stage::Weights, total: 1000, .. } => n_progress += 1,
            FromRunner::Ready { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert!((1..100).contains(&n_progress), "{n_progress}");
}

#[test]
fn what_cannot_be_prepared_fails_alone() {
    let mut daemon = Daemon::ready::<Fake>();
    daemon.ask(1, "too long");
    assert_eq!(daemon.failed(1), Code::ContextOverflow);
    daemon.ask(2, "template panic");
    assert_eq!(daemon.failed(2), Code::Internal);
    daemon.ask(3, "1");
    assert_eq!(daemon.events_until_end(3).len(), 2);
}

#[test]
fn a_request_before_the_load_fails() {
    let mut daemon = Daemon::start::<Fake>();
    daemon.ask(1, "1");
    assert_eq!(daemon.failed(1), Code::Internal);
}

#[test]
fn cancel_ends_one_request_and_not_the_other() {
    let mut daemon = Daemon::ready::<Fake>();
    daemon.ask(1, "forever");
    daemon.ask(2, "forever");
    daemon.next_of(|message| matches!(message, FromRunner::Delta { id: 2, .. }));
    daemon.send(&ToRunner::Cancel { id: 99 });
    daemon.send(&ToRunner::Cancel { id: 1 });
    assert_eq!(daemon.events_until_end(1).pop(), Some((1, done(Finish::Cancelled))));
    daemon.next_of(|message| matches!(message, FromRunner::Delta { id: 2, .. }));
}

#[test]
fn a_request_that_the_engine_forgets_gets_an_end() {
    let mut daemon = Daemon::ready::<Fake>();
    daemon.ask(1, "silent");
    assert_eq!(daemon.events_until_end(1), [(1, done(Finish::Cancelled))]);
}

#[test]
fn a_panic_or_a_broken_engine_is_fatal_and_said() {
    for prompt in ["panic", "broken"] {
        let mut daemon = Daemon::ready::<Fake>();
        daemon.ask(1, prompt);
        let fatal = daemon.next_of(|message| matches!(message, FromRunner::Fatal { .. }));
        assert!(matches!(fatal, FromRunner::Fatal { fault } if fault.code == Code::Internal));
        assert!(matches!(daemon.left(), Err(Error::Fatal(_))), "{prompt}");
    }
}

#[test]
fn a_load_or_an_inspection_that_fails_is_fatal_with_its_own_code() {
    for (path, code) in [("bad", Code::Corrupt), ("panic", Code::Internal)] {
        for message in [
            ToRunner::Load { files: files(path), options: options() },
            ToRunner::Inspect { files: files(path) },
        ] {
            let mut daemon = Daemon::start::<Fake>();
            daemon.send(&message);
            let fatal = daemon.next_of(|message| matches!(message, FromRunner::Fatal { .. }));
            assert!(matches!(fatal, FromRunner::Fatal { fault } if fault.code == code));
            assert!(daemon.left().is_err());
        }
    }
}

/// How often a fake driver was asked, and where it waits for its test.
static N_ASKED: AtomicU32 = AtomicU32::new(0);
static THINKING: Mutex<Option<Receiver<()>>> = Mutex::new(None);

#[test]
fn devices_are_told_while_the_driver_of_an_earlier_question_still_thinks() {
    let (think, thinking) = sync_channel(1);
    *THINKING.lock().expect("no panic") = Some(thinking);
    let mut daemon = Daemon::ready::<Fake>();
    daemon.send(&ToRunner::Devices);
    daemon.send(&ToRunner::Devices);
    // Neither the reader nor the engine waits for it.
    daemon.ask(1, "3");
    daemon.next_of(|message| matches!(message, FromRunner::Done { id: 1, .. }));
    think.send(()).expect("the driver waits");
    let told = daemon.next_of(|message| matches!(message, FromRunner::Devices { .. }));
    let FromRunner::Devices { inventory } = told else { panic!("{told:?}") };
    assert_eq!(inventory.complaints, ["gpu0: it is lost"]);
    assert_eq!(N_ASKED.load(Ordering::SeqCst), 1);
}

#[test]
fn inspect_is_answered() {
    let mut daemon = Daemon::start::<Fake>();
    daemon.send(&ToRunner::Inspect { files: files("good") });
    let info = daemon.next_of(|message| matches!(message, FromRunner::Info { .. }));
    assert!(matches!(info, FromRunner::Info { inspection } if inspection.info.arch == "fake"));
}

#[test]
fn an_inspection_too_large_for_a_frame_is_fatal_and_said() {
    let mut daemon = Daemon::start::<Fake>();
    daemon.send(&ToRunner::Inspect { files: files("vast") });
    match daemon.next() {
        Some(FromRunner::Fatal { fault }) => {
            assert_eq!(fault.code, Code::Unsupported);
            assert!(fault.message.contains("too large"), "{fault}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(daemon.left(), Err(Error::Fatal(fault)) if fault.code == Code::Unsupported));
}

#[test]
fn an_event_too_large_for_a_frame_fails_its_request_alone() {
    let mut daemon = Daemon::ready::<Fake>();
    daemon.ask(1, "vast");
    assert_eq!(daemon.failed(1), Code::Internal);
    daemon.ask(2, "1");
    assert_eq!(daemon.events_until_end(2).len(), 2);
}

#[test]
fn a_drain_with_a_deadline_beyond_the_clock_is_a_drain() {
    let (orders, taken) = sync_channel(1);
    let (out, frames) = sync_channel(1);
    let shared = Shared::<Fake> {
        prepare: OnceLock::new(),
        stats: Mutex::new(None),
        failure: OnceLock::new(),
    };
    orders.send(Order::Drain(Duration::MAX)).expect("room");
    Worker::new(taken, out, Arc::new(shared)).run().expect("an end in order");
    assert!(matches!(frames.recv(), Ok(Out::Last(FromRunner::Drained))));
}

#[test]
fn a_drain_finishes_what_runs_and_takes_nothing_new() {
    let mut daemon = Daemon::ready::<Fake>();
    daemon.ask(1, "20000");
    daemon.next_of(|message| matches!(message, FromRunner::Delta { .. }));
    daemon.send(&ToRunner::Drain { deadline_ms: 60_000 });
    daemon.ask(2, "1");
    let events = daemon.events_until_end(1);
    assert_eq!(events.last(), Some(&(1, done(Finish::Stop))));
    let refused = events.iter().find(|(id, _)| *id == 2);
    assert!(
        matches!(refused, Some((2, Event::Failed(fault))) if fault.code == Code::Overloaded),
        "{refused:?}"
    );
    assert_eq!(daemon.next_of(|message| !is_stats(message)), FromRunner::Drained);
    daemon.left().expect("a drain is an end in order");
}

fn is_stats(message: &FromRunner) -> bool {
    matches!(message, FromRunner::Stats(_))
}

#[test]
fn a_drain_past_its_deadline_cancels() {
    let mut daemon = Daemon::ready::<Fake>();
    daemon.ask(1, "forever");
    daemon.next_of(|message| matches!(message, FromRunner::Delta { .. }));
    daemon.send(&ToRunner::Drain { deadline_ms: 0 });
    assert_eq!(daemon.events_until_end(1).pop(), Some((1, done(Finish::Cancelled))));
    daemon.left().expect("a drain is an end in order");
}

#[test]
fn work_in_the_background_yields_to_orders_and_is_finished_by_a_drain() {
    let (flushed, told) = sync_channel(1);
    *FLUSHED.lock().expect("no panic") = Some(flushed);
    let mut daemon = Daemon::start::<Fake>();
    daemon.send(&ToRunner::Load { files: files("restless"), options: options() });
    daemon.next_of(|message| matches!(message, FromRunner::Ready { .. }));
    for id in 1..=3 {
        daemon.ask(id, "2");
        assert_eq!(daemon.events_until_end(id).len(), 3);
    }
    daemon.send(&ToRunner::Drain { deadline_ms: 60_000 });
    daemon.next_of(|message| *message == FromRunner::Drained);
    told.try_recv().expect("it was flushed before it said so");
    daemon.left().expect("a drain is an end in order");
}

#[test]
fn an_idle_drain_ends_at_once() {
    let mut daemon = Daemon::start::<Fake>();
    daemon.send(&ToRunner::Drain { deadline_ms: 60_000 });
    assert_eq!(daemon.next(), Some(FromRunner::Drained));
    daemon.left().expect("a drain is an end in order");
}

#[test]
fn the_heart_beats_while_a_step_lasts() {
    let (open, gate) = sync_channel(1);
    *GATE.lock().expect("the gate") = Some(gate);
    let mut daemon = Daemon::ready::<Fake>();
    daemon.ask(1, "gate");
    daemon.next_of(is_stats);
    daemon.next_of(is_stats);
    open.send(()).expect("the step waits");
    assert_eq!(daemon.events_until_end(1), [(1, done(Finish::Stop))]);
    let stats = daemon.next_of(is_stats);
    assert!(matches!(stats, FromRunner::Stats(Stats { steps: 1, .. })), "{stats:?}");
}

#[test]
fn a_real_model_answers_the_same_twice() {
    let mut daemon = Daemon::start::<engine::Native>();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/gguf/llama-q4_0.gguf");
    daemon.send(&ToRunner::Load { files: files(path), options: options() });
    let ready = daemon.next_of(|message| matches!(message, FromRunner::Ready { .. }));
    assert!(
        matches!(&ready, FromRunner::Ready { info, memory_bytes, .. }
            if info.arch == "llama" && *memory_bytes > info.weight_bytes),
        "{ready:?}"
    );
    let mut texts = Vec::new();
    for id in 1..=2 {
        daemon.send(&generate(id, Input::Tokens { ids: vec![1, 5, 9] }));
        let events = daemon.events_until_end(id);
        let Some((_, Event::Done(end))) = events.last() else { panic!("{events:?}") };
        assert_eq!(end.usage.prompt_tokens, 3);
        assert!(end.finish == Finish::Stop || end.usage.completion_tokens == 8, "{end:?}");
        texts.push(format!("{:?}", &events[..events.len() - 1]).replace("(2,", "(1,"));
    }
    assert_eq!(texts[0], texts[1]);
    let long = Input::Tokens { ids: vec![1; 65] };
    daemon.send(&generate(3, long));
    assert_eq!(daemon.failed(3), Code::ContextOverflow);
    daemon.leave().expect("the end of the socket is an order to leave");
}

#[test]
fn a_file_that_is_no_model_is_refused() {
    let mut daemon = Daemon::start::<engine::Native>();
    daemon.send(&ToRunner::Inspect {
        files: files(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")),
    });
    let fatal = daemon.next_of(|message| matches!(message, FromRunner::Fatal { .. }));
    assert!(
        matches!(&fatal, FromRunner::Fatal { fault } if fault.code == Code::Corrupt),
        "{fatal:?}"
    );
    assert!(daemon.left().is_err());
}

#[test]
fn damaged_frames_are_errors_and_never_a_panic() {
    let frames = [generate(1, Input::Raw { text: "x".into() }), ToRunner::Cancel { id: 1 }];
    let frames = frames.iter().flat_map(|m| frame::encode(m, b"body").expect("encodes"));
    let whole: Vec<u8> = frames.collect();
    let mut seed = 1_u64;
    let mut dice = |n: usize| {
        // An xorshift generator is enough to spread the damage.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % n as u64).expect("below a usize")
    };
    let mut n_errors = 0;
    for _ in 0..5000 {
        let mut bytes = whole.clone();
        for _ in 0..=dice(4) {
            let at = dice(bytes.len());
            bytes[at] = u8::try_from(dice(256)).expect("below 256");
        }
        bytes.truncate(dice(bytes.len() + 1));
        let mut reader = Reader::new(bytes.as_slice());
        while let Some(result) = reader.next().transpose() {
            if result.is_err() {
                n_errors += 1;
                break;
            }
        }
    }
    assert!(n_errors > 100, "the damage does nothing");
}

#[test]
fn what_is_not_a_frame_ends_the_runner() {
    for bytes in [&[0xff; 8][..], &[2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'], &[1, 0, 0]] {
        let mut daemon = Daemon::start::<Fake>();
        daemon.socket.write_all(bytes).expect("the runner reads");
        assert!(daemon.leave().is_err(), "{bytes:?}");
    }
}
