//! From the network to the disk: a thread that hashes and writes, and the [`Sink`] that a source
//! fills.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use bytes::Bytes;
use tokio::{
    sync::{OwnedMutexGuard, mpsc, watch},
    task::{JoinHandle, spawn_blocking},
};
use v4_store::{Partial, Ranges, Store, StoreError};

use crate::{
    error::PullError,
    limits,
    pace::Pace,
    progress::Progress,
    recipe::{Location, Part},
    source::peer,
};

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
    Write(u64, Bytes),
    Restart,
}

/// A partial and the thread that writes it. Dropped half-way, the thread syncs what it has and
/// leaves it for the next try.
pub(crate) struct Writer {
    sender: mpsc::Sender<Command>,
    thread: JoinHandle<Result<Held, StoreError>>,
    /// What is here, and what is on its way to the disk.
    here: Mutex<Ranges>,
    /// Bytes it may have.
    size: u64,
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
        Ok(Self::over(opened.await?, size))
    }

    /// Goes on with a partial that is open.
    pub fn again(partial: Partial, size: u64, turn: &Turn) -> Self {
        Self::over(Held { partial, _turn: Arc::clone(turn) }, size)
    }

    fn over(held: Held, size: u64) -> Self {
        let here = Mutex::new(held.partial.here().clone());
        let (sender, receiver) = mpsc::channel(limits::PIECES);
        let thread = spawn_blocking(move || write_all(held, receiver));
        Self { sender, thread, here, size }
    }

    fn here(&self) -> MutexGuard<'_, Ranges> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes from the start without a gap.
    pub fn offset(&self) -> u64 {
        self.here().reach(0)
    }

    /// The bytes that are here.
    pub fn ranges(&self) -> Ranges {
        self.here().clone()
    }

    /// Bytes in all.
    pub fn total(&self) -> u64 {
        self.here().total()
    }

    /// What is missing of `within`.
    pub fn gaps(&self, within: Range<u64>) -> Vec<Range<u64>> {
        self.here().gaps(within)
    }

    /// Tells the thread. That it has ended is all that is known here; [`Writer::finish`] tells why.
    async fn command(&self, command: Command) -> Result<(), PullError> {
        self.sender.send(command).await.map_err(|_| PullError::Writer)
    }

    /// Takes bytes at their place; those that are here already are passed over. A source that has
    /// too much has something else: nothing of it is kept.
    pub async fn write_at(&self, at: u64, bytes: Bytes) -> Result<(), PullError> {
        let range = at..at.saturating_add(bytes.len() as u64);
        if range.end > self.size {
            self.restart().await?;
            let (expected, actual) = (self.size, range.end);
            return Err(StoreError::Length { expected, actual }.into());
        }
        if self.gaps(range.clone()).is_empty() {
            return Ok(());
        }
        self.command(Command::Write(at, bytes)).await?;
        self.here().add(range);
        Ok(())
    }

    /// Throws everything away and begins at 0.
    pub async fn restart(&self) -> Result<(), PullError> {
        *self.here() = Ranges::default();
        self.command(Command::Restart).await
    }

    /// Waits until everything is written and synced.
    pub async fn finish(self) -> Result<Partial, PullError> {
        let Self { sender, thread, .. } = self;
        // Its end of the channel is what tells the thread that there is no more.
        drop(sender);
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
            Command::Write(at, bytes) => partial.write_at(at, bytes)?,
            Command::Restart => partial.restart()?,
        }
    }
    partial.sync()?;
    Ok(held)
}

/// Turns bytes that are here into progress of one file, and holds them to the pace. Progress never
/// goes backwards and is reported a few times a second.
pub(crate) struct Meter<'a> {
    sender: &'a watch::Sender<Progress>,
    paces: [&'a Pace; 2],
    file: usize,
    scale: Option<Scale>,
    reported: Mutex<Option<Instant>>,
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
    pub fn new(sender: &'a watch::Sender<Progress>, paces: [&'a Pace; 2], file: usize) -> Self {
        Self { sender, paces, file, scale: None, reported: Mutex::default() }
    }

    /// The same, for another part.
    pub fn again(&self) -> Meter<'a> {
        Meter { scale: self.scale, ..Meter::new(self.sender, self.paces, self.file) }
    }

    /// Counts bytes of an archive that stand for a share of the file.
    pub fn scaled(&self, scale: Scale) -> Meter<'a> {
        Meter { scale: Some(scale), ..self.again() }
    }

    /// Bytes of the whole file, where that is known.
    pub fn total(&self) -> Option<u64> {
        self.sender.borrow().files.get(self.file).and_then(|file| file.total)
    }

    /// Says who sends the file.
    pub fn source(&self, who: String) {
        self.sender.send_if_modified(|progress| {
            let Some(file) = progress.files.get_mut(self.file) else { return false };
            let is_new = file.source.as_ref() != Some(&who);
            file.source = Some(who);
            is_new
        });
    }

    /// Says something that a person should know, once.
    pub fn note(&self, text: String) {
        self.sender.send_if_modified(|progress| {
            let is_new = !progress.notes.contains(&text) && progress.notes.len() < limits::NOTES;
            if is_new {
                progress.notes.push(text);
            }
            is_new
        });
    }

    /// Says that a peer wants a key, where it is one.
    pub fn note_refusal(&self, location: &Location) {
        if let [Part::Peer(blob)] = location.parts() {
            self.note(peer::refusal(blob));
        }
    }

    /// Waits until so many bytes may come.
    async fn pace(&self, n: u64) {
        for pace in self.paces {
            pace.take(n).await;
        }
    }

    /// Reports, unless it did so just now.
    fn at(&self, done: u64) {
        let now = Instant::now();
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.is_some_and(|then| now - then < limits::PROGRESS_EVERY) {
            return;
        }
        *reported = Some(now);
        drop(reported);
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
    writer: &'a Writer,
    /// Where the part begins in the file.
    base: u64,
    /// Its meter.
    pub meter: Meter<'a>,
}

impl<'a> Sink<'a> {
    /// A sink for the part that begins at `base`.
    pub fn new(writer: &'a Writer, base: u64, meter: Meter<'a>) -> Self {
        let sink = Self { writer, base, meter };
        if writer.total() > 0 {
            sink.meter.at(writer.total());
        }
        sink
    }

    /// How many bytes of this part are here from its start, or more where later parts are here too.
    pub fn have(&self) -> u64 {
        self.writer.here().reach(self.base).saturating_sub(self.base)
    }

    /// What is missing of the part's first `size` bytes.
    pub fn gaps(&self, size: u64) -> Vec<Range<u64>> {
        let gaps = self.writer.gaps(self.base..self.base.saturating_add(size));
        gaps.into_iter().map(|gap| gap.start - self.base..gap.end - self.base).collect()
    }

    /// Takes bytes that begin at `at` in the part; those that are here already are passed over.
    pub async fn write_at(&self, at: u64, bytes: Bytes) -> Result<(), PullError> {
        self.meter.pace(bytes.len() as u64).await;
        self.writer.write_at(self.base + at, bytes).await?;
        self.meter.at(self.writer.total());
        Ok(())
    }
}
