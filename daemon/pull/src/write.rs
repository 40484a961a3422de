//! From the network to the disk: a thread that hashes and writes, and the [`Sink`] that a source
//! fills.

use std::{sync::Arc, time::Instant};

use bytes::{Buf as _, Bytes};
use tokio::{
    sync::{OwnedMutexGuard, mpsc, watch},
    task::{JoinHandle, spawn_blocking},
};
use v4_store::{Partial, Store, StoreError};

use crate::{error::PullError, limits, progress::Progress};

/// The right to write a key, shared by the job and its writer thread: the next one gets it when
/// both are done.
pub(crate) type Turn = Arc<OwnedMutexGuard<()>>;

/// Runs a call that blocks.
pub(crate) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, PullError> {
    let outcome = spawn_blocking(call).await.map_err(|_| PullError::Writer)?;
    outcome.map_err(PullError::Store)
}

enum Command {
    Write(Bytes),
    Restart,
}

/// A partial and the thread that writes it. Dropped half-way, the thread syncs what it has and
/// leaves it for the next try.
pub(crate) struct Writer {
    sender: mpsc::Sender<Command>,
    /// `None` once it has ended with an error and told it.
    thread: Option<JoinHandle<Result<Held, StoreError>>>,
    offset: u64,
}

impl Writer {
    /// Opens the partial of a key, going on from what is here.
    pub async fn open(
        store: &Arc<Store>,
        key: &str,
        size: Option<u64>,
        turn: &Turn,
    ) -> Result<Self, PullError> {
        let (store, key) = (Arc::clone(store), key.to_owned());
        let size = size.unwrap_or(limits::FILE_BYTES);
        let turn = Arc::clone(turn);
        let opened =
            blocking(move || Ok(Held { partial: store.partial(&key, Some(size))?, _turn: turn }));
        let held = opened.await?;
        let offset = held.partial.offset();
        let (sender, receiver) = mpsc::channel(limits::PIECES);
        let thread = spawn_blocking(move || write_all(held, receiver));
        Ok(Self { sender, thread: Some(thread), offset })
    }

    /// Bytes that were given to it and those that were here before.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    async fn command(&mut self, command: Command) -> Result<(), PullError> {
        if self.sender.send(command).await.is_ok() {
            return Ok(());
        }
        // The thread takes commands until it fails.
        self.end().await.and(Err(PullError::Writer))
    }

    /// Throws everything away and begins at 0.
    pub async fn restart(&mut self) -> Result<(), PullError> {
        self.offset = 0;
        self.command(Command::Restart).await
    }

    /// Waits until everything is written and synced.
    pub async fn finish(mut self) -> Result<Partial, PullError> {
        // Its end of the channel is what tells the thread that there is no more.
        (self.sender, _) = mpsc::channel(1);
        self.end().await
    }

    /// How the thread ended.
    async fn end(&mut self) -> Result<Partial, PullError> {
        let thread = self.thread.take().ok_or(PullError::Writer)?;
        Ok(thread.await.map_err(|_| PullError::Writer)??.partial)
    }
}

/// A partial and the right to write it. The turn is the last field, so it is given back when the
/// partial is closed, also where a cancelled job leaves both to the thread that opened them.
struct Held {
    partial: Partial,
    _turn: Turn,
}

/// The writer thread.
fn write_all(mut held: Held, mut receiver: mpsc::Receiver<Command>) -> Result<Held, StoreError> {
    let partial = &mut held.partial;
    while let Some(command) = receiver.blocking_recv() {
        match command {
            Command::Write(bytes) => match partial.write(&bytes) {
                Err(error @ StoreError::Length { .. }) => {
                    // A source that has too much has something else: nothing of it is kept.
                    held.partial.discard()?;
                    return Err(error);
                }
                written => written?,
            },
            Command::Restart => partial.restart()?,
        }
    }
    partial.sync()?;
    Ok(held)
}

/// Turns bytes that are here into progress of one file. Progress never goes backwards and is
/// reported a few times a second.
pub(crate) struct Meter<'a> {
    sender: &'a watch::Sender<Progress>,
    file: usize,
    scale: Option<Scale>,
    reported: Option<Instant>,
}

/// An archive's bytes stand for a share of the file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    /// Bytes of the file before this share.
    pub start: u64,
    /// Bytes of the file in this share.
    pub len: u64,
    /// Bytes of the archive.
    pub of: u64,
}

impl Scale {
    /// Bytes of the file that `done` bytes of the archive stand for.
    fn completed(self, done: u64) -> u64 {
        let share = u128::from(self.len) * u128::from(done.min(self.of));
        let share = share / u128::from(self.of.max(1));
        self.start.saturating_add(u64::try_from(share).unwrap_or(self.len))
    }
}

impl<'a> Meter<'a> {
    /// Counts bytes of a file.
    pub fn new(sender: &'a watch::Sender<Progress>, file: usize) -> Self {
        Self { sender, file, scale: None, reported: None }
    }

    /// The same, for another part.
    pub fn again(&self) -> Meter<'a> {
        Meter { sender: self.sender, file: self.file, scale: self.scale, reported: None }
    }

    /// Counts bytes of an archive that stand for a share of the file.
    pub fn scaled(&self, scale: Scale) -> Meter<'a> {
        Meter { sender: self.sender, file: self.file, scale: Some(scale), reported: None }
    }

    /// Bytes of the whole file, where that is known.
    pub fn total(&self) -> Option<u64> {
        self.sender.borrow().files.get(self.file).and_then(|file| file.total)
    }

    /// Reports, unless it did so just now.
    fn at(&mut self, done: u64) {
        let now = Instant::now();
        if self.reported.is_some_and(|then| now - then < limits::PROGRESS_EVERY) {
            return;
        }
        self.reported = Some(now);
        let completed = self.scale.map_or(done, |scale| scale.completed(done));
        self.sender.send_if_modified(|progress| {
            let Some(file) = progress.files.get_mut(self.file) else { return false };
            let completed = completed.min(file.total.unwrap_or(u64::MAX));
            let is_more = completed > file.completed;
            if is_more {
                file.completed = completed;
            }
            is_more
        });
    }
}

/// Where a source puts the bytes of one part.
pub(crate) struct Sink<'a> {
    writer: &'a mut Writer,
    /// Where the part begins in the file.
    base: u64,
    /// Its meter.
    pub meter: Meter<'a>,
}

impl<'a> Sink<'a> {
    /// A sink for the part that begins at `base`.
    pub fn new(writer: &'a mut Writer, base: u64, meter: Meter<'a>) -> Self {
        Self { writer, base, meter }
    }

    /// How many bytes of this part are here, or more where later parts are here too.
    pub fn have(&self) -> u64 {
        self.writer.offset().saturating_sub(self.base)
    }

    /// Takes bytes that begin at `at` in the part; those that are here already are passed over.
    pub async fn write_at(&mut self, at: u64, mut bytes: Bytes) -> Result<(), PullError> {
        let known = self.have().saturating_sub(at).min(bytes.len() as u64);
        let known = usize::try_from(known).expect("at most the length of a slice");
        bytes.advance(known);
        if bytes.is_empty() {
            return Ok(());
        }
        debug_assert_eq!(at + known as u64, self.have(), "a source left a gap");
        self.writer.offset += bytes.len() as u64;
        self.writer.command(Command::Write(bytes)).await?;
        self.meter.at(self.writer.offset);
        Ok(())
    }
}
