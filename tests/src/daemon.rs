//! A real daemon on a temporary home and a free port.

use std::fs::{self, File};
use std::process::{Child, Command, ExitStatus, Stdio};
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
        let errors = File::create(log_file(home)).expect("a writable folder");
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
        Some(Self { home, tcp, unix, child })
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
        log(self.home)
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

fn log_file(home: &Home) -> std::path::PathBuf {
    home.beside().join("log")
}

fn log(home: &Home) -> String {
    fs::read_to_string(log_file(home)).unwrap_or_default()
}
