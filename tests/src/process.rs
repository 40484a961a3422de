//! The real `v4`: found, run with a deadline, and its children looked at.

use std::fs;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use v4_proto::Digest;

use crate::DEADLINE;
use crate::home::Home;

/// The `v4` that lies beside this executable, or beside the folder of a test's.
pub fn executable() -> PathBuf {
    let own = std::env::current_exe().expect("the test knows where it is");
    let folders = own.ancestors().skip(1).take(2);
    let v4 = folders.map(|folder| folder.join("v4")).find(|path| path.is_file());
    v4.unwrap_or_else(|| panic!("{} has no v4 beside it: run `cargo build -p v4`", own.display()))
}

/// A command line of `v4` in this home, cut off from the user's own settings.
pub fn v4(home: &Home, args: &[&str]) -> Command {
    let mut command = Command::new(executable());
    command
        .args(args)
        .env_clear()
        .env("HOME", home.beside())
        .env("V4_HOME", home.path())
        .env("V4_LISTEN", "off")
        // A name that the library does not have is looked for nowhere else.
        .env("V4_REGISTRY", "off")
        // Many daemons run side by side here, on few cores.
        .env("V4_THREADS", "1")
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null());
    command
}

/// What a command came to.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to the standard output.
    pub stdout: String,
    /// What it wrote to the standard error.
    pub stderr: String,
}

impl Outcome {
    /// What a command wrote that must have succeeded.
    #[track_caller]
    pub fn success(&self) -> &str {
        assert!(self.status.success(), "{self:?}");
        &self.stdout
    }

    /// The one error line of a command that must have failed with `code`.
    #[track_caller]
    pub fn failure(&self, code: i32) -> &str {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        let line = self.stderr.lines().last().unwrap_or_default();
        line.strip_prefix("error: ").unwrap_or_else(|| panic!("no error line: {self:?}"))
    }
}

/// Runs a command to its end.
pub fn run(command: &mut Command, input: &str) -> Outcome {
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("v4 starts");
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.to_owned();
        thread::spawn(move || stdin.write_all(input.as_bytes()));
    }
    let stdout = collect(child.stdout.take().expect("piped"));
    let stderr = collect(child.stderr.take().expect("piped"));
    let end = Instant::now() + DEADLINE;
    let text = |from: &Receiver<String>| from.recv_timeout(end - Instant::now());
    match (text(&stdout), text(&stderr)) {
        (Ok(stdout), Ok(stderr)) => Outcome { status: wait(&mut child), stdout, stderr },
        (stdout, stderr) => {
            let _ = child.kill();
            panic!("{command:?} did not end: {stdout:?} {stderr:?}");
        }
    }
}

fn collect(mut from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = sync_channel(1);
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        sender.send(String::from_utf8_lossy(&bytes).into_owned())
    });
    receiver
}

/// Waits for a child that must end within [`DEADLINE`].
pub fn wait(child: &mut Child) -> ExitStatus {
    let (sender, receiver) = sync_channel(1);
    let pid = child.id();
    thread::scope(|scope| {
        scope.spawn(|| sender.send(child.wait()));
        receiver.recv_timeout(DEADLINE).unwrap_or_else(|_| {
            signal(pid, Signal::KILL);
            panic!("the process {pid} did not end")
        })
    })
    .expect("a child can be waited for")
}

/// Sends a signal.
pub fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    // It may have ended by itself, which is what most signals here are for.
    let _ = kill_process(pid, signal);
}

/// The living children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    let is_child = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // After the name in parentheses: state, then the parent.
        let mut rest = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let state = rest.next().unwrap_or("Z");
        state != "Z" && rest.next().and_then(|word| word.parse().ok()) == Some(parent)
    };
    let entries = fs::read_dir("/proc").expect("procfs");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(is_child).collect()
}

/// Bytes of an entry of a process' `/proc/PID/status`, such as `VmRSS`; `None` once it has ended.
pub fn memory(pid: u32, entry: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(entry)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// The runner among the children of `daemon` that has this blob mapped.
pub fn runner(daemon: u32, weights: &Digest) -> Option<u32> {
    children(daemon).into_iter().find(|pid| {
        fs::read_to_string(format!("/proc/{pid}/maps"))
            .is_ok_and(|maps| maps.contains(&weights.hex()))
    })
}

/// How often a state is looked at that announces itself in no other way.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Waits until `state` gives something, by looking again and again until [`DEADLINE`].
#[track_caller]
pub fn until<T>(what: &str, mut state: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = state() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        thread::park_timeout(LOOK_EVERY);
    }
}

/// The daemons that were started in the background for this home.
pub fn serving(home: &Path) -> Vec<u32> {
    let home = home.as_os_str().as_encoded_bytes();
    let is_serving = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        words.contains(&b"serve".as_slice()) && words.contains(&home)
    };
    let entries = fs::read_dir("/proc").expect("procfs");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(is_serving).collect()
}
