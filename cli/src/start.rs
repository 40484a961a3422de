//! Starts a daemon in the background when a command needs one and none answers.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use v4_proto::paths;

use crate::client;
use crate::error::Failure;
use crate::place::{Place, Target};

/// The status of a daemon that ended because another has its home.
pub const TAKEN: u8 = 75;

/// How long it may take until a daemon accepts connections. One that is ending keeps the home for
/// up to 17 s, until its answers and then its runners have ended; as much again and more is for the
/// fresh one on a cold disk.
const READY_DEADLINE: Duration = Duration::from_secs(40);
/// How long we go on looking after our daemon ended, before we start another or give up: somebody
/// else's may have won the race for the home and be about to listen.
const RIVAL_DEADLINE: Duration = Duration::from_secs(1);
/// How often we try to connect. An attempt on a socket costs microseconds.
const ATTEMPT_EVERY: Duration = Duration::from_millis(10);
/// Bytes of the daemon's last words that we read.
const LAST_WORDS_BYTES: u64 = 8192;

/// Starts `v4 serve --background` and waits until it accepts connections. While another daemon has
/// the home, it is either about to listen or about to end: then we look and start again.
///
/// # Errors
/// [`Failure::Start`] with the daemon's own words, or [`Failure::SlowStart`].
pub async fn daemon(place: &Place) -> Result<(), Failure> {
    let end = Instant::now() + READY_DEADLINE;
    loop {
        let mut child = spawn(place)?;
        let ended = tokio::select! {
            () = answers(&place.target) => return Ok(()),
            ended = child.wait() => ended,
            () = sleep_until(end) => {
                let seconds = READY_DEADLINE.as_secs();
                return Err(Failure::SlowStart { seconds, log: place.log.clone() });
            }
        };
        if timeout(RIVAL_DEADLINE, answers(&place.target)).await.is_ok() {
            return Ok(());
        }
        let is_taken = ended.is_ok_and(|status| status.code() == Some(TAKEN.into()));
        if !is_taken || Instant::now() >= end {
            return Err(Failure::Start(last_words(&mut child, &place.log).await));
        }
    }
}

/// Ends when somebody accepts connections at `target`.
async fn answers(target: &Target) {
    let mut attempts = interval(ATTEMPT_EVERY);
    attempts.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        attempts.tick().await;
        if client::is_there(target).await {
            return;
        }
    }
}

fn spawn(place: &Place) -> Result<Child, Failure> {
    let system = |source| Failure::System { what: "start the v4 daemon", source };
    let mut command = Command::new(executable().map_err(system)?);
    if let Target::Socket(socket) = &place.target {
        command.env(paths::SOCKET_VARIABLE, socket);
    }
    if place.log != place.home.join(paths::LOG_FILE) {
        command.env(paths::LOG_VARIABLE, &place.log);
    }
    command
        .arg0("v4")
        .arg("serve")
        .arg("--background")
        .arg("--home")
        .arg(&place.home)
        // A daemon that outlives the terminal must not keep a folder of it busy, nor get its
        // Ctrl-C.
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command.spawn().map_err(system)
}

/// The file of this very process: a daemon of another version would be a surprise, and the file may
/// have been replaced since.
fn executable() -> io::Result<PathBuf> {
    let own = Path::new("/proc/self/exe");
    if own.exists() { Ok(own.to_owned()) } else { std::env::current_exe() }
}

/// What the daemon wrote before it ended, without the `error: ` that we put in front again.
async fn last_words(child: &mut Child, log: &Path) -> String {
    let mut words = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // What was read until the deadline is worth showing whatever ended the reading.
        let _ =
            timeout(RIVAL_DEADLINE, stderr.take(LAST_WORDS_BYTES).read_to_end(&mut words)).await;
    }
    let words = String::from_utf8_lossy(&words);
    let said = words.trim().strip_prefix("error: ").unwrap_or(words.trim()).to_owned();
    if said.is_empty() {
        return format!("the v4 daemon ended while it started; its log is {}", log.display());
    }
    said
}
