//! Starts a daemon in the background when a command needs one and none answers.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use v4_proto::paths;

use crate::client;
use crate::error::Failure;
use crate::place::Place;

/// How long a daemon may take until it accepts connections.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// How long we go on looking after our daemon ended: somebody else's may have won the race for the
/// home and be about to listen.
const RIVAL_DEADLINE: Duration = Duration::from_secs(1);
/// How often we try to connect. An attempt on a socket costs microseconds.
const ATTEMPT_EVERY: Duration = Duration::from_millis(10);
/// Bytes of the daemon's last words that we read.
const LAST_WORDS_BYTES: u64 = 8192;

/// Starts `v4 serve --background` and waits until it accepts connections.
///
/// # Errors
/// [`Failure::Start`] with the daemon's own words, or [`Failure::SlowStart`].
pub async fn daemon(place: &Place) -> Result<(), Failure> {
    let mut child = spawn(&place.home)?;
    let mut end = Instant::now() + READY_DEADLINE;
    let mut is_running = true;
    let mut attempts = interval(ATTEMPT_EVERY);
    attempts.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < end {
        tokio::select! {
            _ = child.wait(), if is_running => {
                is_running = false;
                end = end.min(Instant::now() + RIVAL_DEADLINE);
            }
            _ = attempts.tick() => {
                if client::is_there(&place.target).await {
                    return Ok(());
                }
            }
        }
    }
    if is_running {
        let seconds = READY_DEADLINE.as_secs();
        return Err(Failure::SlowStart { seconds, log: place.home.join(paths::LOG_FILE) });
    }
    Err(Failure::Start(last_words(&mut child, &place.home).await))
}

fn spawn(home: &Path) -> Result<Child, Failure> {
    let system = |source| Failure::System { what: "start the v4 daemon", source };
    let mut command = Command::new(executable().map_err(system)?);
    command
        .arg0("v4")
        .arg("serve")
        .arg("--background")
        .arg("--home")
        .arg(home)
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
async fn last_words(child: &mut Child, home: &Path) -> String {
    let mut words = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // What was read until the deadline is worth showing whatever ended the reading.
        let _ =
            timeout(RIVAL_DEADLINE, stderr.take(LAST_WORDS_BYTES).read_to_end(&mut words)).await;
    }
    let words = String::from_utf8_lossy(&words);
    let said = words.trim().strip_prefix("error: ").unwrap_or(words.trim()).to_owned();
    if said.is_empty() {
        let log = home.join(paths::LOG_FILE);
        return format!("the v4 daemon ended while it started; its log is {}", log.display());
    }
    said
}
