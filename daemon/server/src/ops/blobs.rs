//! Blobs that a client brings: the files of a model that is to be made.

use bytes::Bytes;
use tokio::sync::mpsc;
use v4_proto::{Code, Digest, Fault};
use v4_store::{Need, Room, Store, StoreError};

use crate::{daemon::Daemon, limits};

/// Whether a blob is here.
///
/// # Errors
/// What the store says.
pub async fn is_here(daemon: &Daemon, digest: Digest) -> Result<bool, Fault> {
    Ok(daemon.blocking(move |store| store.blob(&digest)).await?.is_some())
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
