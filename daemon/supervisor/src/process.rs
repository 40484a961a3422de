//! One runner process: our own executable, a socket as its standard input, its standard error kept
//! in a ring.

use std::{
    collections::VecDeque,
    ffi::OsString,
    io,
    os::fd::OwnedFd,
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::AsyncReadExt as _,
    net::UnixStream,
    process::{Child, ChildStderr, Command},
    task::JoinHandle,
    time::timeout,
};

use crate::{Error, limits};

/// How a runner is started.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    pub exe: OsString,
    pub args: Vec<OsString>,
    /// No sign of life for so long with work in flight is a hang.
    pub heartbeat: Duration,
}

impl Launch {
    /// The hidden command of our own executable.
    pub fn of(exe: &Path) -> Self {
        Self { exe: exe.into(), args: vec!["runner".into()], heartbeat: limits::HEARTBEAT }
    }

    /// Starts a process. It is killed when what is returned is dropped.
    pub fn spawn(&self) -> Result<(Process, UnixStream), Error> {
        let failed = |source| Error::Spawn { exe: self.exe.display().to_string(), source };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let ours = UnixStream::from_std(ours).map_err(failed)?;
        let mut child = Command::new(&self.exe)
            // What a list of processes shows.
            .arg0("v4")
            .args(&self.args)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A Ctrl-C at the terminal is for the daemon: it lets its runners finish.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let ring = Arc::new(Mutex::new(Ring::default()));
        let stderr = child.stderr.take().expect("standard error was asked for as a pipe");
        let drain = tokio::spawn(drain(stderr, Arc::clone(&ring)));
        Ok((Process { child, ring, drain }, ours))
    }
}

/// A child and the last bytes of its standard error.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    ring: Arc<Mutex<Ring>>,
    drain: JoinHandle<()>,
}

/// How a process ended, for the log.
#[derive(Debug)]
pub(crate) struct Ending {
    pub status: io::Result<ExitStatus>,
    /// The last lines of its standard error.
    pub last_lines: String,
}

impl Process {
    /// The process number, as long as it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for the end until `patience` is over, then kills.
    pub async fn end(mut self, patience: Duration) -> Ending {
        let status = match timeout(patience, self.child.wait()).await {
            Ok(status) => status,
            Err(_) => match self.child.start_kill() {
                // SIGKILL cannot be refused; the wait is for the kernel.
                Ok(()) => self.child.wait().await,
                Err(error) => Err(error),
            },
        };
        if timeout(limits::STDERR_END, &mut self.drain).await.is_err() {
            self.drain.abort();
        }
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        Ending { status, last_lines: ring.last_lines(limits::STDERR_LINES) }
    }
}

async fn drain(mut stderr: ChildStderr, ring: Arc<Mutex<Ring>>) {
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = stderr.read(&mut buffer).await {
        ring.lock().unwrap_or_else(PoisonError::into_inner).push(&buffer[..n]);
    }
}

/// The last [`limits::STDERR_BYTES`] of a stream.
#[derive(Debug, Default)]
struct Ring(VecDeque<u8>);

impl Ring {
    fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(limits::STDERR_BYTES)..];
        let over = (self.0.len() + bytes.len()).saturating_sub(limits::STDERR_BYTES);
        self.0.drain(..over);
        self.0.extend(bytes);
    }

    fn last_lines(&self, n_lines: usize) -> String {
        let (a, b) = self.0.as_slices();
        let text = [a, b].concat();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(n_lines)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_bytes() {
        let mut ring = Ring::default();
        for n in 0..20_000 {
            ring.push(format!("line {n}\n").as_bytes());
        }
        assert_eq!(ring.0.len(), limits::STDERR_BYTES);
        assert_eq!(ring.last_lines(2), "line 19998\nline 19999");
        ring.push(&vec![b'x'; limits::STDERR_BYTES + 5]);
        assert_eq!(ring.last_lines(9), "x".repeat(limits::STDERR_BYTES));
    }
}
