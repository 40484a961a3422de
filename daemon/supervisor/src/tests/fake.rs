//! The runner's side: plain blocking code, in a child process.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
    process::abort,
};

use v4_proto::frame::{FromRunner, LENGTHS_BYTES, Lengths, Stage, decode, encode};

use super::*;

/// A further filter for the test harness that matches no test, and so a marker for us.
pub const MARK: &str = "as-a-runner";
/// What a fake model says it takes: what the policy estimates too.
pub const BYTES: u64 = 1 << 30;

pub fn info() -> ModelInfo {
    ModelInfo {
        format: "gguf".into(),
        arch: "fake".into(),
        supported: true,
        quant: "F32".into(),
        n_params: 1,
        context_length: 64,
        embedding_length: 1,
        n_layers: 1,
        weight_bytes: BYTES - limits::SCRATCH_BYTES,
        kv_bytes_per_token: 0,
        layout: Layout::default(),
        abilities: Vec::new(),
    }
}

/// The main function of the fake runner. In a usual run of the tests it does nothing.
#[test]
fn runner() {
    let args: Vec<String> = std::env::args().collect();
    let Some(at) = args.iter().position(|arg| arg == MARK) else { return };
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().expect("standard input");
    let gpus = args[at + 1].strip_prefix("gpus in ").map(PathBuf::from);
    let (socket, model, waiting) = (stdin.into(), String::new(), Vec::new());
    let mut fake = Fake { socket, model, on_gpus: None, gpus, waiting };
    let mut stderr = std::io::stderr();
    match args[at + 1].as_str() {
        "talk" => {
            stderr.write_all(b"first words\nlast words\n").expect("standard error");
            #[expect(clippy::disallowed_methods, reason = "a child that ends with a status")]
            std::process::exit(3);
        }
        "old-protocol" => fake.say(&FromRunner::Hello { protocol: 0, build: "old".into() }),
        _ => fake.say(&FromRunner::Hello { protocol: frame::PROTOCOL, build: frame::BUILD.into() }),
    }
    while let Some(message) = fake.hear() {
        if !fake.obey(message) {
            return;
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a test writes what a driver would say")]
fn inventory_in(path: &std::path::Path) -> Inventory {
    let bytes = std::fs::read(path).expect("the test has written it");
    serde_json::from_slice(&bytes).expect("an inventory")
}

struct Fake {
    socket: UnixStream,
    model: String,
    /// Where it was told to put it.
    on_gpus: Option<frame::OnGpus>,
    /// The file that says which GPUs there are.
    gpus: Option<PathBuf>,
    /// Requests that wait for a cancel or a drain, and what a drain makes them say.
    waiting: Vec<(u64, Option<&'static str>)>,
}

impl Fake {
    fn say(&mut self, message: &FromRunner) {
        let bytes = encode(message, &[]).expect("encodes");
        // The daemon may be gone: then the next read ends this process.
        let _ = self.socket.write_all(&bytes);
    }

    fn hear(&mut self) -> Option<ToRunner> {
        let mut start = [0; LENGTHS_BYTES];
        self.socket.read_exact(&mut start).ok()?;
        let mut header = vec![0; Lengths::parse(start).expect("lengths").header];
        self.socket.read_exact(&mut header).ok()?;
        Some(decode(&header).expect("a message"))
    }

    /// `false` ends the process in order.
    fn obey(&mut self, message: ToRunner) -> bool {
        match message {
            ToRunner::Load { files, options } => {
                self.model = files.weights[0].display().to_string();
                if self.model == "bad" {
                    return self.give_up();
                }
                self.on_gpus = options.on_gpus;
                self.say(&FromRunner::Progress { stage: Stage::Weights, done: 1, total: 2 });
                let context = options.context;
                self.say(&FromRunner::Ready { info: info(), context, memory_bytes: BYTES });
            }
            ToRunner::Inspect { files } => match files.weights[0].to_str() {
                Some("bad") => return self.give_up(),
                Some("abort") => abort(),
                _ => {
                    let inspection = Inspection {
                        info: info(),
                        metadata: serde_json::Map::new(),
                        chat_template: None,
                        tensors: Vec::new(),
                    };
                    self.say(&FromRunner::Info { inspection: Box::new(inspection) });
                }
            },
            ToRunner::Generate { id, request } => {
                let Input::Raw { text } = &request.input else { panic!("a raw prompt") };
                self.answer(id, text);
            }
            ToRunner::Cancel { id } => {
                let before = self.waiting.len();
                self.waiting.retain(|(waiting, _)| *waiting != id);
                if self.waiting.len() < before {
                    self.end(id, Finish::Cancelled);
                }
            }
            ToRunner::Cores { .. } => {}
            ToRunner::Devices => {
                let inventory = self.gpus.as_ref().map(|path| inventory_in(path));
                let inventory = inventory.unwrap_or_default();
                self.say(&FromRunner::Devices { inventory });
            }
            ToRunner::Drain { .. } => {
                for (id, last_words) in std::mem::take(&mut self.waiting) {
                    if let Some(text) = last_words {
                        self.delta(id, text);
                    }
                    let finish = last_words.map_or(Finish::Cancelled, |_| Finish::Stop);
                    self.end(id, finish);
                }
                self.say(&FromRunner::Drained);
                return false;
            }
        }
        true
    }

    fn give_up(&mut self) -> bool {
        self.say(&FromRunner::Fatal { fault: Fault::new(Code::Corrupt, "bad weights") });
        false
    }

    fn delta(&mut self, id: u64, text: &str) {
        let delta = Delta { text: text.into(), ..Delta::default() };
        self.say(&FromRunner::Delta { id, delta });
    }

    fn end(&mut self, id: u64, finish: Finish) {
        let done = Done { finish, usage: Usage::default() };
        self.say(&FromRunner::Done { id, done });
    }

    fn answer(&mut self, id: u64, prompt: &str) {
        if let Some(text) = prompt.strip_prefix("echo ") {
            self.delta(id, text);
        } else if let Some(n) = prompt.strip_prefix("flood ") {
            for _ in 0..n.parse().expect("a number") {
                self.delta(id, "x");
            }
            return self.waiting.push((id, None));
        } else if let Some(n) = prompt.strip_prefix("abort after ") {
            for n in 0..n.parse::<u32>().expect("a number") {
                self.delta(id, &n.to_string());
            }
            abort();
        } else if let Some(path) = prompt.strip_prefix("abort once ") {
            if std::fs::OpenOptions::new().write(true).create_new(true).open(path).is_ok() {
                abort();
            }
            self.delta(id, "survived");
        } else {
            match prompt {
                "which" => self.delta(id, &self.model.clone()),
                "where" => {
                    let text = serde_json::to_string(&self.on_gpus).expect("encodes");
                    self.delta(id, &text);
                }
                "pid" => self.delta(id, &std::process::id().to_string()),
                "wait" => return self.waiting.push((id, None)),
                "wait for echo" => return self.waiting.push((id, Some("finished"))),
                "close and linger" => {
                    self.end(id, Finish::Stop);
                    self.socket.shutdown(Shutdown::Both).expect("an open socket");
                    // The supervisor's kill ends this.
                    return std::thread::park_timeout(PATIENCE);
                }
                "begin and wait" | "begin and hang" => {
                    self.delta(id, "b");
                    return self.waiting.push((id, None));
                }
                other => panic!("what is {other:?}?"),
            }
        }
        self.end(id, Finish::Stop);
    }
}
