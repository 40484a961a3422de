//! Blobs that a client brings: the files of a model that is to be made.

use std::{
    io::{Read as _, Seek as _, SeekFrom},
    ops::Range,
};

use bytes::Bytes;
use futures_util::Stream;
use tokio::sync::mpsc;
use v4_proto::{Code, Digest, Fault};
use v4_store::{
    Lease, Need, Room, Store, StoreError,
    fs::{File, Fs as _, RealFs},
};

use crate::{daemon::Daemon, limits};

/// Whether a blob is here.
///
/// # Errors
/// What the store says.
pub async fn is_here(daemon: &Daemon, digest: Digest) -> Result<bool, Fault> {
    Ok(daemon.blocking(move |store| store.blob(&digest)).await?.is_some())
}

/// A blob that is read, and stays while it is.
pub struct Open {
    /// Its bytes.
    pub size: u64,
    file: Box<dyn File>,
    _lease: Lease,
}

/// Opens a blob to be sent; `None` where it is not here. One that is damaged is not sent.
///
/// # Errors
/// `corrupt` for one that is damaged; what the store says.
pub async fn open(daemon: &Daemon, digest: Digest) -> Result<Option<Open>, Fault> {
    let lease = daemon.store.lease(&[digest]);
    let opened = daemon.blocking(move |store| {
        let Some(size) = store.blob(&digest)? else { return Ok(None) };
        store.intact(&digest)?;
        Ok(RealFs.open_read(&store.blob_path(&digest)).ok().map(|file| (size, file)))
    });
    Ok(opened.await?.map(|(size, file)| Open { size, file, _lease: lease }))
}

impl Open {
    /// The bytes of a range. A file that fails ends it early, which the client sees.
    pub fn read(self, range: Range<u64>) -> impl Stream<Item = Bytes> + Send {
        futures_util::stream::unfold((self, range), async |(mut open, range)| {
            let len = (range.end - range.start).min(limits::SEND_BYTES);
            if len == 0 {
                return None;
            }
            let read = tokio::task::spawn_blocking(move || {
                let mut bytes = Vec::new();
                let file = &mut open.file;
                file.seek(SeekFrom::Start(range.start)).ok()?;
                file.take(len).read_to_end(&mut bytes).ok()?;
                let next = range.start + bytes.len() as u64..range.end;
                (!bytes.is_empty()).then_some((Bytes::from(bytes), (open, next)))
            });
            read.await.ok().flatten()
        })
    }
}

/// What tells the parts of a blob apart, where that is kept.
///
/// # Errors
/// What the store says.
pub async fn chain(daemon: &Daemon, digest: Digest) -> Result<Option<Vec<u8>>, Fault> {
    let chain = daemon.blocking(move |store| match store.blob(&digest)? {
        Some(size) => store.chain(&digest, size),
        None => Ok(None),
    });
    Ok(chain.await?.map(|chain| chain.encode()))
}

/// Makes room for a blob of so many bytes.
///
/// # Errors
/// `disk`, with what would make room.
pub async fn make_room(daemon: &Daemon, digest: Digest, size: u64) -> Result<Room, Fault> {
    let need = Need { key: key(&digest), size };
    let room = daemon.blocking(move |store| store.make_room(vec![need])).await?;
    if !room.gone.is_empty() {
        tracing::info!(names = ?room.gone, "removed to stay within the quota");
    }
    Ok(room)
}

/// The key of a blob that comes.
fn key(digest: &Digest) -> String {
    format!("sha256-{}", digest.hex())
}

/// Takes a blob as it comes. Dropping the sender before [`Taking::end`] keeps nothing.
pub struct Taking {
    sender: mpsc::Sender<Bytes>,
    work: tokio::task::JoinHandle<Result<(), StoreError>>,
}

/// Begins to take a blob.
pub fn take(daemon: &Daemon, digest: Digest) -> Taking {
    let (sender, receiver) = mpsc::channel(limits::BLOB_PIECES);
    let store = std::sync::Arc::clone(&daemon.store);
    let work = tokio::task::spawn_blocking(move || write(&store, &digest, receiver));
    Taking { sender, work }
}

impl Taking {
    /// More of it. That the writer ended is told by [`Taking::end`].
    pub async fn piece(&self, bytes: Bytes) -> bool {
        self.sender.send(bytes).await.is_ok()
    }

    /// Waits until it is a blob.
    ///
    /// # Errors
    /// `invalid` when the bytes have another digest; what the store says.
    pub async fn end(self) -> Result<(), Fault> {
        let Self { sender, work } = self;
        // An empty piece is the end: a client that breaks off sends none.
        let _ = sender.send(Bytes::new()).await;
        drop(sender);
        let done = work.await.map_err(|error| {
            tracing::error!(%error, "the writer of a blob panicked");
            Fault::internal("v4 made a mistake; its log has the details")
        })?;
        done.map_err(|error| match error {
            StoreError::Digest { expected, actual } => Fault::invalid(format!(
                "digest mismatch, expected \"{expected}\", got \"{actual}\""
            )),
            StoreError::Busy(_) => Fault::new(
                Code::Overloaded,
                "this blob is on its way already; try again when that is done",
            ),
            error => error.fault(),
        })
    }
}

/// Writes what comes, until the empty piece.
fn write(
    store: &Store,
    digest: &Digest,
    mut pieces: mpsc::Receiver<Bytes>,
) -> Result<(), StoreError> {
    let mut partial = store.partial(&key(digest), None)?;
    let mut at = 0;
    while let Some(piece) = pieces.blocking_recv() {
        if piece.is_empty() {
            partial.commit(digest, at)?;
            store.note_intact(digest);
            return Ok(());
        }
        let len = piece.len() as u64;
        partial.write_at(at, piece)?;
        at += len;
    }
    partial.discard()
}
