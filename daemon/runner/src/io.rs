//! The socket to the daemon: taking it over from standard input, reading frames, writing frames.

use std::{
    io::{self, BufReader, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Instant,
};

use v4_proto::{
    Code, Fault,
    frame::{self, FrameError, FromRunner, LENGTHS_BYTES, Lengths, Stats, ToRunner},
    limits::FRAME_HEADER_BYTES,
};

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
/// be deep in a step: the heartbeat does not wait for it. Nothing is left to say when it returns.
///
/// # Errors
/// The fault that was said in place of a message that is no frame and of no request.
pub fn write(
    mut socket: &UnixStream,
    frames: &Receiver<Out>,
    stats: impl Fn() -> Option<Stats>,
) -> Result<(), Fault> {
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
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        let (bytes, fatal) = match frame::encode(&message, &[]) {
            Ok(bytes) => (bytes, None),
            Err(error) => instead_of(&message, &error),
        };
        let is_written = socket.write_all(&bytes).is_ok();
        if let Some(fault) = fatal {
            return Err(fault);
        }
        if is_last || !is_written {
            return Ok(());
        }
    }
}

/// The frame that says that `message` is none, and its fault where it ends the process: a request
/// fails alone.
fn instead_of(message: &FromRunner, error: &FrameError) -> (Vec<u8>, Option<Fault>) {
    let (said, fatal) = match message {
        FromRunner::Delta { id, .. }
        | FromRunner::Done { id, .. }
        | FromRunner::Failed { id, .. } => {
            let fault = Fault::internal(format!("a part of the answer {}", why(error)));
            (FromRunner::Failed { id: *id, fault }, None)
        }
        _ => {
            let text = format!("what the model's files say of it {}", why(error));
            let fault = Fault::new(Code::Unsupported, text);
            (FromRunner::Fatal { fault: fault.clone() }, Some(fault))
        }
    };
    (frame::encode(&said, &[]).expect("a sentence is a frame"), fatal)
}

/// The rest of a sentence: why something is no frame.
fn why(error: &FrameError) -> String {
    match error {
        FrameError::TooLong { header, .. } => {
            let limit = FRAME_HEADER_BYTES;
            format!("is too large: {header} bytes where at most {limit} can be passed on")
        }
        FrameError::Header(error) => format!("cannot be passed on: {error}"),
    }
}
