//! A real daemon on a temporary home and a free port.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use rustix::process::Signal;
use serde_json::Value;
use v4_proto::Digest;

use crate::home::Home;
use crate::http::Address;
use crate::process::{self, until};

/// A daemon that is killed when it is dropped.
pub struct Daemon<'a> {
    /// Its home.
    pub home: &'a Home,
    /// Where it serves TCP.
    pub tcp: Address,
    /// Where it serves its unix socket.
    pub unix: Address,
    child: Child,
    log: PathBuf,
}

impl<'a> Daemon<'a> {
    /// Starts one with the default settings.
    pub fn start(home: &'a Home) -> Self {
        Self::start_with(home, &[])
    }

    /// Starts one with these variables, and waits until it accepts connections.
    #[track_caller]
    pub fn start_with(home: &'a Home, variables: &[(&str, &str)]) -> Self {
        let mut command = process::v4(home, &["serve"]);
        command.env("V4_LISTEN", "127.0.0.1:0").envs(variables.iter().copied());
        Self::spawn(home, &mut command)
            .unwrap_or_else(|| panic!("the daemon did not start: {}", log(home)))
    }

    /// Starts a daemon by any command line. `None` when it ended instead of getting ready.
    pub fn spawn(home: &'a Home, command: &mut Command) -> Option<Self> {
        let log_file = log_file(home);
        let errors = File::create(&log_file).expect("a writable folder");
        let mut child = command.stdout(Stdio::null()).stderr(errors).spawn().expect("v4 starts");
        let unix = Address::unix(&home.socket());
        // It has ended, or it answers. A connection is not enough: what a killed daemon was about
        // to start may hold its socket for a moment.
        let is_ready = until("the daemon's start", || {
            let ended = child.try_wait().expect("a child can be asked");
            ended.map(|_| false).or_else(|| unix.answers().then_some(true))
        });
        if !is_ready {
            return None;
        }
        let listen = unix.get("/api/version").expect(200)["v4"]["listen"].clone();
        let tcp = Address::Tcp(listen.as_str().unwrap_or_default().to_owned());
        Some(Self { home, tcp, unix, child, log: log_file })
    }

    /// Starts another one that takes the place of the one that runs, and waits until it has. `None`
    /// when it ended instead; then its words are in the second part.
    pub fn replacing(home: &'a Home, variables: &[(&str, &str)]) -> (Option<Self>, String) {
        let successor = Successor::start(home, variables);
        successor.settle(home)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The port it serves TCP on.
    pub fn port(&self) -> u16 {
        let Address::Tcp(address) = &self.tcp else { unreachable!("made in spawn") };
        address.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
    }

    /// The process of the runner that has these weights mapped; waits for it.
    pub fn runner(&self, weights: &Digest) -> u32 {
        until("a runner", || process::runner(self.pid(), weights))
    }

    /// The names of the models that are loaded.
    pub fn loaded(&self) -> Vec<String> {
        let listing = self.tcp.get("/api/ps").expect(200);
        let models = listing["models"].as_array().expect("a list").clone();
        models.iter().map(|model| model["name"].as_str().expect("a name").to_owned()).collect()
    }

    /// Asks for a whole answer of `/api/generate`.
    #[track_caller]
    pub fn generate(&self, body: &Value) -> Value {
        let mut body = body.clone();
        body["stream"] = false.into();
        self.tcp.post("/api/generate", &body).expect(200)
    }

    /// What it wrote to its log.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has ended by itself.
    pub fn ended(mut self) -> ExitStatus {
        process::wait(&mut self.child)
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_none()
    }

    /// Asks it to end, as a service manager does.
    pub fn stop(mut self) -> ExitStatus {
        process::signal(self.pid(), Signal::TERM);
        process::wait(&mut self.child)
    }

    /// Ends it without a word.
    pub fn kill(mut self) -> ExitStatus {
        process::signal(self.pid(), Signal::KILL);
        process::wait(&mut self.child)
    }
}

/// A daemon that is about to take the place of another.
pub struct Successor {
    child: Child,
    log: PathBuf,
}

impl Successor {
    /// Starts it.
    pub fn start(home: &Home, variables: &[(&str, &str)]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = home.beside().join(format!("log.{number}"));
        let errors = File::create(&log).expect("a writable folder");
        let mut command = process::v4(home, &["serve", "--replace"]);
        command.env("V4_LISTEN", "127.0.0.1:0").envs(variables.iter().copied());
        let child = command.stdout(Stdio::null()).stderr(errors).spawn().expect("v4 starts");
        Self { child, log }
    }

    /// Whether it has said that it serves.
    pub fn is_ready(&self) -> bool {
        self.words().contains(" ready ")
    }

    fn words(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends it without a word. Gives whether it had said before that it serves.
    pub fn kill(mut self) -> bool {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.is_ready()
    }

    /// Waits until it serves, or has ended.
    pub fn settle(mut self, home: &Home) -> (Option<Daemon<'_>>, String) {
        let is_ready = until("a successor", || {
            let ended = self.child.try_wait().expect("a child can be asked");
            ended.map(|_| false).or_else(|| self.is_ready().then_some(true))
        });
        let words = self.words();
        if !is_ready {
            return (None, words);
        }
        let unix = Address::unix(&home.socket());
        let listen = unix.get("/api/version").expect(200)["v4"]["listen"].clone();
        let tcp = Address::Tcp(listen.as_str().unwrap_or_default().to_owned());
        (Some(Daemon { home, tcp, unix, child: self.child, log: self.log }), words)
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            // Shown with the failed test.
            println!("the daemon's log:\n{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log_file(home: &Home) -> PathBuf {
    home.beside().join("log")
}

fn log(home: &Home) -> String {
    fs::read_to_string(log_file(home)).unwrap_or_default()
}
