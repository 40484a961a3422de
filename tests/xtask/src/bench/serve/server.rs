//! A server of a model: our daemon in a home of its own, or `llama-server`.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use v4_tests::daemon::Daemon;
use v4_tests::home::Home;
use v4_tests::http::Address;

use super::ask::{Asked, Dialect};
use crate::bench::pull::Process;

/// Who serves.
#[derive(Debug, Clone)]
pub enum Engine {
    /// Our daemon: the `v4` beside this program.
    V4,
    /// The `llama-server` of this folder.
    Llama(PathBuf),
}

impl Engine {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Engine::V4 => "v4",
            Engine::Llama(_) => "llama.cpp",
        }
    }
}

/// A server that runs; it ends when this is dropped.
pub struct Server {
    /// Where it is asked.
    pub asked: Asked,
    /// What ends it.
    _running: Box<dyn std::any::Any>,
}

/// What a server may take to come up.
const START: Duration = Duration::from_mins(2);

impl Server {
    /// Starts a server with the model loaded, with so many sequences of so many tokens.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(
        engine: &Engine,
        file: &Path,
        threads: usize,
        (slots, context): (usize, usize),
    ) -> Result<Self, String> {
        match engine {
            Engine::V4 => {
                let home = kept_home();
                let settings = [
                    ("V4_THREADS", threads.to_string()),
                    ("V4_SLOTS", slots.to_string()),
                    ("V4_CONTEXT", context.to_string()),
                    ("V4_KEEP_ALIVE", "-1".to_owned()),
                ];
                let daemon = start(home, &settings);
                let asked = import(&daemon.tcp, file, "one")?;
                asked.ask("hello", 1)?;
                Ok(Self { asked, _running: Box::new(daemon) })
            }
            Engine::Llama(folder) => llama(folder, file, threads, (slots, context)),
        }
    }
}

/// A home that is removed with its models when this is dropped.
pub fn kept_home() -> &'static Home {
    // A daemon borrows its home. What the program leaves is a folder for temporary files.
    Box::leak(Box::new(Home::new()))
}

/// Our daemon with these settings.
pub fn start<'a>(home: &'a Home, settings: &[(&str, String)]) -> Daemon<'a> {
    let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Daemon::start_with(home, &settings)
}

/// Makes a model of a file.
///
/// # Errors
/// The daemon refuses it.
pub fn import(address: &Address, file: &Path, name: &str) -> Result<Asked, String> {
    let path = file.canonicalize().map_err(|error| format!("{}: {error}", file.display()))?;
    let body = json!({ "path": path, "model": name, "stream": false });
    let reply = address.patient_post("/api/import", &body);
    if !reply.text().contains("success") {
        return Err(format!("the daemon does not take {}: {}", path.display(), reply.text()));
    }
    let model = name.to_owned();
    Ok(Asked { is_fresh: false, address: address.clone(), dialect: Dialect::Ollama, model })
}

/// What `/api/ps` says of the models that are loaded.
pub fn loaded(address: &Address) -> Vec<Value> {
    let listing = address.get("/api/ps").json();
    listing["models"].as_array().cloned().unwrap_or_default()
}

fn llama(
    folder: &Path,
    file: &Path,
    threads: usize,
    (slots, context): (usize, usize),
) -> Result<Server, String> {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = free.map_err(|error| error.to_string())?.port().to_string();
    let log = std::env::temp_dir().join(format!("v4-bench-llama-server-{port}.log"));
    let errors = || File::create(&log).map_err(|error| error.to_string());
    let all = (slots * context).to_string();
    let child = Command::new(folder.join("llama-server"))
        .arg("--model")
        .arg(file)
        .args(["--port", &port, "--threads", &threads.to_string(), "--ctx-size", &all])
        .args(["--parallel", &slots.to_string(), "--no-kv-unified", "--cache-ram", "0"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors()?)
        .spawn();
    let mut running = Process(child.map_err(|error| format!("llama-server: {error}"))?);
    let address = Address::Tcp(format!("127.0.0.1:{port}"));
    let end = Instant::now() + START;
    while !(address.connect().is_ok() && address.get("/health").status == 200) {
        let ended = running.0.try_wait().map_err(|error| error.to_string())?;
        if ended.is_some() || Instant::now() > end {
            return Err(format!("llama-server does not start; see {}", log.display()));
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let _ = fs::remove_file(&log);
    let asked = Asked { is_fresh: false, address, dialect: Dialect::Llama, model: String::new() };
    asked.ask("hello", 1)?;
    Ok(Server { asked, _running: Box::new(running) })
}
