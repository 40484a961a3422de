//! For tests: a home with models in it, and a runner that does as its prompt says. The runner is
//! this test executable again: the supervisor starts it with the argument `runner`, which the test
//! harness takes as a filter that fits one test only, [`runner_process`].

use std::{
    io::{Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;
use v4_proto::{
    Ability, Delta, Done, Fault, Finish, Generate, Input, Inspection, Inventory, Layout,
    ModelFiles, ModelInfo, ModelName, TensorInfo, ToolCall, Usage,
    frame::{self, BUILD, FromRunner, LENGTHS_BYTES, Lengths, PROTOCOL, ToRunner},
};
use v4_pull::{Catalog, Inspecting, Inspector, Jobs, Origin, PullConfig, Recipe, RecipeFile};
use v4_store::{Layer, Manifest, Role, Store};
use v4_supervisor::{Supervisor, SupervisorConfig};

use crate::{Config, Given, daemon::Daemon, guard::Guard, keys::Keys, routes::Service};

/// A daemon with a home of its own.
pub struct Fixture {
    /// What requests are sent to.
    pub service: Arc<Service>,
    /// The parts behind it.
    pub daemon: Arc<Daemon>,
    home: TempDir,
}

impl Fixture {
    /// An empty home. A body may stall for `body_stall`.
    pub fn new(body_stall: Duration) -> Self {
        Self::with_keys(body_stall, |_| Keys::off())
    }

    /// The same, with the keys that a home has.
    pub fn with_keys(body_stall: Duration, keys: impl FnOnce(&Path) -> Keys) -> Self {
        let home = tempfile::tempdir().expect("a folder");
        let store = Arc::new(Store::open(&home.path().join("home")).expect("a store"));
        let config = SupervisorConfig {
            exe: std::env::current_exe().expect("this test's executable"),
            memory_bytes: Some(1 << 40),
            spare: false,
            ..SupervisorConfig::default()
        };
        let supervisor = Supervisor::start(&config, Arc::clone(&store));
        let shelf = Shelf(home.path().join("weights.gguf"));
        let jobs = Jobs::new(
            Arc::clone(&store),
            Arc::new(shelf),
            Arc::new(Headers),
            PullConfig { registries: Vec::new(), ..PullConfig::default() },
        );
        let keys = Arc::new(keys(home.path()));
        let given = Given { home: Some(home.path().join("home")), ..Given::default() };
        let config = Config::load(&given, |_| None).expect("the defaults");
        let mut daemon = Daemon::new(config, store, jobs, supervisor);
        daemon.keys = keys;
        let daemon = Arc::new(daemon);
        let guard = Guard { checks_host: true, ..Guard::default() };
        let service = Arc::new(Service::new(Arc::clone(&daemon), guard, body_stall));
        Self { service, daemon, home }
    }

    /// Stores a model with these abilities and small roles.
    pub fn store(&self, name: &str, abilities: &[Ability], roles: &[(Role, &str)]) {
        let store = &self.daemon.store;
        let weights = store.put_blob(name.as_bytes()).expect("weights");
        store.put_inspection(&weights, &inspection(abilities)).expect("kept");
        let config = store.put_blob(b"{\"model_format\":\"gguf\"}").expect("a config");
        let mut layers = vec![Layer::new(Role::Model.media_type(), weights, name.len() as u64)];
        for (role, text) in roles {
            let digest = store.put_blob(text.as_bytes()).expect("a role");
            layers.push(Layer::new(role.media_type(), digest, text.len() as u64));
        }
        let manifest = Manifest::new(Layer::new("application/json", config, 23), layers);
        let name: ModelName = name.parse().expect("a name");
        store.put_manifest(&name, &manifest.encode()).expect("a name in the store");
    }

    /// Writes the file that pulls of `shelf` fetch.
    pub fn put_on_shelf(&self, bytes: &[u8]) {
        let mut file =
            v4_store::fs::open_append(&self.home.path().join("weights.gguf")).expect("a file");
        file.write_all(bytes).expect("written");
    }
}

/// What every model's header says here.
pub fn inspection(abilities: &[Ability]) -> Inspection {
    let metadata = json!({
        "general.architecture": "llama",
        "general.name": "Fake",
        "llama.context_length": 2048,
        "tokenizer.chat_template": "{% for m in messages %}{% endfor %}",
        "tokenizer.ggml.tokens": null,
    });
    let Value::Object(metadata) = metadata else { unreachable!("an object literal") };
    Inspection {
        info: ModelInfo {
            format: "gguf".to_owned(),
            arch: "llama".to_owned(),
            supported: true,
            quant: "Q4_1".to_owned(),
            n_params: 134_515_008,
            context_length: 2048,
            embedding_length: 576,
            n_layers: 30,
            weight_bytes: 1000,
            kv_bytes_per_token: 10,
            layout: Layout::default(),
            abilities: abilities.to_vec(),
        },
        metadata,
        chat_template: Some("{% for m in messages %}{% endfor %}".to_owned()),
        tensors: vec![TensorInfo {
            name: "token_embd.weight".to_owned(),
            ty: "Q8_0".to_owned(),
            shape: vec![576, 49152],
        }],
    }
}

/// A catalog with one model, `shelf`, whose weights are a local file.
struct Shelf(PathBuf);

impl Catalog for Shelf {
    fn find(&self, name: &ModelName) -> Option<Recipe> {
        let place = format!("file:{}", self.0.display()).parse().expect("a place");
        let file = RecipeFile {
            role: Role::Model,
            media_type: Role::Model.media_type(),
            digest: None,
            size: None,
            sources: vec![place],
        };
        let license = (Role::License, Role::License.media_type(), "Free.".to_owned());
        let recipe = Recipe {
            name: name.clone(),
            files: vec![file],
            texts: vec![license],
            manifest: None,
            origin: Origin::default(),
        };
        (name.is_library() && name.model() == "shelf").then_some(recipe)
    }

    fn names(&self) -> Vec<String> {
        vec!["shelf".to_owned()]
    }
}

struct Headers;

impl Inspector for Headers {
    fn inspect(&self, _files: ModelFiles) -> Inspecting<'_> {
        Box::pin(async { Ok(inspection(&[Ability::Completion])) })
    }
}

/// Not a test by itself: the body of the process that the supervisor starts. Does nothing in an
/// ordinary run, where the standard input is no socket of a supervisor.
#[test]
fn runner_process() {
    let is_started = std::env::args().nth(1).is_some_and(|word| word == "runner");
    let fd = std::io::stdin().as_fd().try_clone_to_owned().expect("a standard input");
    let socket = UnixStream::from(fd);
    if is_started && socket.peer_addr().is_ok() {
        Actor::new(&socket).run(socket);
    }
}

/// The runner's side of the socket.
struct Actor {
    writer: Arc<Mutex<UnixStream>>,
    /// Requests that were cancelled.
    n_cancelled: Arc<AtomicU32>,
    /// Ends the request that runs for ever.
    stop: Arc<AtomicBool>,
}

impl Actor {
    fn new(socket: &UnixStream) -> Self {
        let writer = socket.try_clone().expect("a second handle");
        Self {
            writer: Arc::new(Mutex::new(writer)),
            n_cancelled: Arc::default(),
            stop: Arc::default(),
        }
    }

    fn run(self, mut socket: UnixStream) {
        self.send(&FromRunner::Hello { protocol: PROTOCOL, build: BUILD.to_owned() });
        while let Some(message) = receive(&mut socket) {
            match message {
                ToRunner::Load { .. } => self.send(&FromRunner::Ready {
                    info: inspection(&[]).info,
                    context: 2048,
                    memory_bytes: 4096,
                }),
                ToRunner::Inspect { .. } => {
                    let inspection = Box::new(inspection(&[Ability::Completion]));
                    self.send(&FromRunner::Info { inspection });
                }
                ToRunner::Generate { id, request } => self.answer(id, &request),
                ToRunner::Cancel { .. } => {
                    self.n_cancelled.fetch_add(1, Ordering::SeqCst);
                    self.stop.store(true, Ordering::SeqCst);
                }
                ToRunner::Cores { .. } => {}
                ToRunner::Devices => {
                    let inventory = Inventory::default();
                    self.send(&FromRunner::Devices { inventory });
                }
                ToRunner::Drain { .. } => return self.send(&FromRunner::Drained),
            }
        }
    }

    fn send(&self, message: &FromRunner) {
        send(&self.writer, message);
    }

    fn answer(&self, id: u64, request: &Generate) {
        let text = match &request.input {
            Input::Chat { messages, .. } => messages.last().map_or("", |last| &last.content),
            Input::Raw { text } => text,
            Input::Tokens { .. } => "",
        };
        let say = |text: &str| {
            let delta = Delta { text: text.to_owned(), ..Delta::default() };
            self.send(&FromRunner::Delta { id, delta });
        };
        match text {
            "fail" => {
                let fault = Fault::invalid("the runner refused");
                return self.send(&FromRunner::Failed { id, fault });
            }
            "fail late" => {
                say("so far");
                let fault = Fault::invalid("the runner refused");
                return self.send(&FromRunner::Failed { id, fault });
            }
            "die" => {
                say("last words");
                std::process::abort();
            }
            "for ever" => return self.for_ever(id),
            "cancelled?" => say(&self.n_cancelled.load(Ordering::SeqCst).to_string()),
            "call" => {
                let arguments = json!({"town": "Ulm"});
                let (id_text, name) = ("call_ab12cd34".to_owned(), "weather".to_owned());
                let call = ToolCall { id: id_text, name, arguments };
                let delta = Delta { tool_calls: vec![call], ..Delta::default() };
                self.send(&FromRunner::Delta { id, delta });
            }
            "echo" => say(&serde_json::to_string(request).expect("JSON")),
            _ => ["Hel", "lo"].iter().for_each(|text| say(text)),
        }
        self.send(&FromRunner::Done { id, done: done(Finish::Stop) });
    }

    /// Speaks until somebody cancels, from a thread of its own.
    fn for_ever(&self, id: u64) {
        let (writer, stop) = (Arc::clone(&self.writer), Arc::clone(&self.stop));
        stop.store(false, Ordering::SeqCst);
        std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                let delta = Delta { text: "again ".to_owned(), ..Delta::default() };
                send(&writer, &FromRunner::Delta { id, delta });
                std::thread::park_timeout(Duration::from_millis(2));
            }
            send(&writer, &FromRunner::Done { id, done: done(Finish::Cancelled) });
        });
    }
}

fn done(finish: Finish) -> Done {
    let usage = Usage {
        prompt_tokens: 9,
        cached_tokens: 0,
        sent_tokens: 9,
        completion_tokens: 2,
        prompt_ns: 10,
        completion_ns: 20,
    };
    Done { finish, usage }
}

fn send(writer: &Mutex<UnixStream>, message: &FromRunner) {
    let bytes = frame::encode(message, &[]).expect("a frame");
    // The supervisor may be gone: then the next read says so.
    drop(writer.lock().expect("no panic").write_all(&bytes));
}

fn receive(socket: &mut UnixStream) -> Option<ToRunner> {
    let mut start = [0; LENGTHS_BYTES];
    socket.read_exact(&mut start).ok()?;
    let lengths = Lengths::parse(start).expect("lengths");
    let mut bytes = vec![0; lengths.header + lengths.body];
    socket.read_exact(&mut bytes).ok()?;
    Some(frame::decode(&bytes[..lengths.header]).expect("a message"))
}
