//! The socket to the daemon: taking it over from standard input, reading frames, writing frames.

use std::{
    io::{self, BufReader, Read, Write},
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Instant,
};

use v4_proto::frame::{self, FromRunner, LENGTHS_BYTES, Lengths, Stats, ToRunner};

use crate::{Error, limits};

/// The daemon's socket, which is this process's standard input.
///
/// # Errors
/// [`Error::NotASocket`] when somebody has started the command by hand.
pub fn from_stdin() -> Result<UnixStream, Error> {
    let fd = io::stdin().as_fd().try_clone_to_owned().map_err(Error::NotASocket)?;
    let socket = UnixStream::from(fd);
    socket.peer_addr().map_err(Error::NotASocket)?;
    Ok(socket)
}

/// Writes an error and its causes to standard error, a line each.
pub fn complain(error: &dyn std::error::Error) {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        text.push_str(&error.to_string());
        text.push('\n');
        next = error.source();
    }
    // Without a standard error there is nobody to tell.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Reads frames.
#[derive(Debug)]
pub struct Reader<R>(BufReader<R>);

impl<R: Read> Reader<R> {
    /// Frames of `stream`.
    pub fn new(stream: R) -> Self {
        Self(BufReader::new(stream))
    }

    /// The next message, or `None` at the end of the stream.
    ///
    /// # Errors
    /// [`Error::Socket`] when the stream ends inside a frame, [`Error::Frame`] when it is none.
    pub fn next(&mut self) -> Result<Option<ToRunner>, Error> {
        let mut start = [0; LENGTHS_BYTES];
        let n = loop {
            match self.0.read(&mut start) {
                Ok(0) => return Ok(None),
                Ok(n) => break n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Socket(error)),
            }
        };
        self.0.read_exact(&mut start[n..]).map_err(Error::Socket)?;
        let lengths = Lengths::parse(start)?;
        let header = self.bytes(lengths.header)?;
        self.bytes(lengths.body)?;
        Ok(Some(frame::decode(&header)?))
    }

    /// Exactly `n` bytes; memory grows only with what really comes.
    fn bytes(&mut self, n: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.0.by_ref().take(n as u64).read_to_end(&mut bytes).map_err(Error::Socket)?;
        if bytes.len() < n {
            return Err(Error::Socket(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(bytes)
    }
}

/// What the writer is given.
#[derive(Debug)]
pub enum Out {
    /// A frame.
    Frame(FromRunner),
    /// The last frame: after it the socket is closed in both directions, which ends the reader and
    /// with it the process.
    Last(FromRunner),
}

/// Writes frames until the last one, and `Stats` every second once `stats` has some. The engine may
/// be deep in a step: the heartbeat does not wait for it.
pub fn write(mut socket: UnixStream, frames: &Receiver<Out>, stats: impl Fn() -> Option<Stats>) {
    let mut next_beat = Instant::now() + limits::HEARTBEAT;
    loop {
        let patience = next_beat.saturating_duration_since(Instant::now());
        let (message, is_last) = match frames.recv_timeout(patience) {
            Ok(Out::Frame(message)) => (message, false),
            Ok(Out::Last(message)) => (message, true),
            Err(RecvTimeoutError::Timeout) => {
                next_beat = Instant::now() + limits::HEARTBEAT;
                let Some(stats) = stats() else { continue };
                (FromRunner::Stats(stats), false)
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let is_written = frame::encode(&message, &[])
            .map_err(io::Error::other)
            .and_then(|bytes| socket.write_all(&bytes))
            .is_ok();
        if is_last || !is_written {
            // Nothing more to say: the reader ends, whether the daemon is there or not.
            let _ = socket.shutdown(Shutdown::Both);
            return;
        }
    }
}
