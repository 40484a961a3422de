//! Hashing: of small things at once, of a file that is being written on a thread of its own.
//!
//! SHA-256 is a chain: what it has seen so far is 32 bytes, and each block turns them into the next
//! 32. So one pass over a file gives its digest and, for nothing, a link for every
//! [`limits::CHUNK_LINK_BYTES`]: with the links on both sides of a chunk, the chunk can be checked
//! alone. They are kept beside a blob ([`Chain`]) to find out which part of it is damaged.

use std::{
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
};

use bytes::Bytes;
use sha2::{
    Digest as _, Sha256,
    digest::common::hazmat::{SerializableState as _, SerializedState},
};
use v4_proto::Digest;

use crate::{
    error::StoreError,
    fs::{File, Fs},
    limits,
};

/// Bytes of a link.
const LINK_BYTES: usize = 32;

/// The digest of some bytes.
pub fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

/// Hashes bytes in order and notes a link after each whole chunk.
#[derive(Clone)]
pub(crate) struct Linker {
    hasher: Sha256,
    len: u64,
    links: Vec<[u8; LINK_BYTES]>,
}

impl Linker {
    pub fn new() -> Self {
        Self { hasher: Sha256::new(), len: 0, links: Vec::new() }
    }

    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = limits::CHUNK_LINK_BYTES - self.len % limits::CHUNK_LINK_BYTES;
            let n = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(n);
            self.hasher.update(now);
            self.len += n as u64;
            if self.len.is_multiple_of(limits::CHUNK_LINK_BYTES) {
                self.links.push(link(&self.hasher));
            }
            bytes = later;
        }
    }

    /// The digest of all bytes so far.
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.hasher.clone().finalize().into())
    }

    /// The links so far.
    pub fn chain(&self) -> Chain {
        Chain(self.links.clone())
    }
}

/// What a hasher has seen, at the end of a block.
fn link(hasher: &Sha256) -> [u8; LINK_BYTES] {
    let state = hasher.serialize();
    std::array::from_fn(|i| state[i])
}

/// A hasher that goes on after `len` bytes with this link; `len` is whole blocks.
fn hasher_after(link: &[u8; LINK_BYTES], len: u64) -> Option<Sha256> {
    const BLOCK: u64 = 64;
    let mut state = SerializedState::<Sha256>::default();
    state[..LINK_BYTES].copy_from_slice(link);
    state[LINK_BYTES..LINK_BYTES + 8].copy_from_slice(&(len / BLOCK).to_le_bytes());
    Sha256::deserialize(&state).ok()
}

/// The links of a blob, one for each of its whole chunks. They are trusted, since they were made
/// while the digest was.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain(Vec<[u8; LINK_BYTES]>);

impl Chain {
    /// The bytes of a file that holds it.
    pub fn encode(&self) -> Vec<u8> {
        self.0.concat()
    }

    /// The links of a blob of `size` bytes; `None` where these are too few or too many.
    pub fn decode(bytes: &[u8], size: u64) -> Option<Self> {
        let links: Vec<[u8; LINK_BYTES]> =
            bytes.chunks_exact(LINK_BYTES).filter_map(|link| link.try_into().ok()).collect();
        let is_right = links.len() as u64 == size / limits::CHUNK_LINK_BYTES
            && bytes.len() == links.len() * LINK_BYTES;
        is_right.then_some(Self(links))
    }

    /// Whether there is nothing to tell chunks apart by.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the bytes of chunk `i` (and, of the last one, all to the end of the blob) are right.
    pub(crate) fn checks(&self, i: usize, chunk: &[u8], size: u64, digest: &Digest) -> bool {
        let start = i as u64 * limits::CHUNK_LINK_BYTES;
        let hasher = match i.checked_sub(1) {
            None => Some(Sha256::new()),
            Some(before) => self.0.get(before).and_then(|link| hasher_after(link, start)),
        };
        let Some(mut hasher) = hasher else { return false };
        hasher.update(chunk);
        match self.0.get(i) {
            Some(expected) if start + (chunk.len() as u64) < size => link(&hasher) == *expected,
            _ => Digest::from_bytes(hasher.finalize().into()) == *digest,
        }
    }
}

/// What the thread is given.
enum Feed {
    /// The next bytes.
    Bytes(Bytes),
    /// The next bytes are in the file, up to here.
    UpTo(u64),
    /// Everything so far is to be told.
    Ask(SyncSender<Linker>),
}

/// A thread that hashes a file in order while it is written in any order.
pub(crate) struct Follower {
    sender: SyncSender<Feed>,
    thread: Option<JoinHandle<io::Result<()>>>,
    path: PathBuf,
    /// Bytes given to the thread.
    fed: u64,
}

impl Follower {
    /// Starts at byte 0 of the file at `path`.
    pub fn start(fs: &Arc<dyn Fs>, path: &Path) -> Result<Self, StoreError> {
        let file = fs.open_read(path).map_err(StoreError::io("open", path))?;
        let (sender, receiver) = sync_channel(limits::HASH_QUEUE);
        let thread = thread::Builder::new()
            .name("v4-hash".to_owned())
            .spawn(move || follow(file, &receiver))
            .map_err(StoreError::io("start a thread to hash", path))?;
        Ok(Self { sender, thread: Some(thread), path: path.to_path_buf(), fed: 0 })
    }

    /// Bytes that are hashed or about to be.
    pub fn fed(&self) -> u64 {
        self.fed
    }

    /// Gives the next bytes unless the thread is behind: then they are read from the file later.
    pub fn offer(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        let len = bytes.len() as u64;
        self.try_feed(Feed::Bytes(bytes), len)
    }

    /// The file is written up to `end`; the thread may read it, if it is not behind.
    pub fn reach(&mut self, end: u64) -> Result<(), StoreError> {
        let len = end.saturating_sub(self.fed);
        if len == 0 { Ok(()) } else { self.try_feed(Feed::UpTo(end), len) }
    }

    fn try_feed(&mut self, feed: Feed, len: u64) -> Result<(), StoreError> {
        match self.sender.try_send(feed) {
            Ok(()) => self.fed += len,
            Err(TrySendError::Full(_)) => {}
            Err(TrySendError::Disconnected(_)) => return Err(self.failure()),
        }
        Ok(())
    }

    /// Waits until everything up to `end` is hashed, and tells what came of it.
    pub fn finish(&mut self, end: u64) -> Result<Linker, StoreError> {
        let (sender, receiver) = sync_channel(1);
        let fed = self.sender.send(Feed::UpTo(end)).and_then(|()| {
            self.fed = end;
            self.sender.send(Feed::Ask(sender))
        });
        match (fed, receiver.recv()) {
            (Ok(()), Ok(linker)) => Ok(linker),
            _ => Err(self.failure()),
        }
    }

    /// Why the thread ended.
    fn failure(&mut self) -> StoreError {
        let outcome = self.thread.take().map(JoinHandle::join);
        let error = match outcome {
            Some(Ok(Err(error))) => error,
            _ => io::Error::other("the thread that hashes it ended early"),
        };
        StoreError::io("read", &self.path)(error)
    }
}

/// The thread: hashes what it is given, until nobody can give it more.
fn follow(mut file: Box<dyn File>, receiver: &Receiver<Feed>) -> io::Result<()> {
    let mut linker = Linker::new();
    let mut chunk = Vec::new();
    while let Ok(feed) = receiver.recv() {
        match feed {
            Feed::Bytes(bytes) => linker.update(&bytes),
            Feed::UpTo(end) if end > linker.len => {
                chunk.resize(limits::CHUNK_BYTES, 0);
                file.seek(SeekFrom::Start(linker.len))?;
                while linker.len < end {
                    let want = usize::try_from(end - linker.len).unwrap_or(usize::MAX);
                    let n = file.read(&mut chunk[..want.min(limits::CHUNK_BYTES)])?;
                    if n == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    linker.update(&chunk[..n]);
                }
            }
            Feed::UpTo(_) => {}
            // Who asked may have left.
            Feed::Ask(sender) => drop(sender.send(linker.clone())),
        }
    }
    Ok(())
}

/// The digest and the links of a file.
pub(crate) fn hash_file(file: &mut dyn File, path: &Path) -> Result<Linker, StoreError> {
    hash_told(file, path, &mut |_| {})
}

/// The same; `told` hears how many bytes are hashed.
pub(crate) fn hash_told(
    file: &mut dyn File,
    path: &Path,
    told: &mut dyn FnMut(u64),
) -> Result<Linker, StoreError> {
    let mut linker = Linker::new();
    let mut chunk = vec![0; limits::CHUNK_BYTES];
    loop {
        match file.read(&mut chunk).map_err(StoreError::io("read", path))? {
            0 => return Ok(linker),
            n => linker.update(&chunk[..n]),
        }
        told(linker.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_checked_alone_by_the_links_beside_it() {
        let chunk = usize::try_from(limits::CHUNK_LINK_BYTES).unwrap();
        let mut bytes: Vec<u8> =
            (0_u32..).flat_map(u32::to_le_bytes).take(2 * chunk + 1000).collect();
        let size = bytes.len() as u64;
        let mut linker = Linker::new();
        bytes.chunks(77_777).for_each(|piece| linker.update(piece));
        assert_eq!(linker.digest(), sha256(&bytes));
        let (chain, digest) = (linker.chain(), linker.digest());
        assert_eq!(Chain::decode(&chain.encode(), size), Some(chain.clone()));
        assert_eq!(Chain::decode(&chain.encode(), size + limits::CHUNK_LINK_BYTES), None);
        bytes[chunk + 5] ^= 1;
        let right: Vec<bool> = bytes
            .chunks(chunk)
            .enumerate()
            .map(|(i, chunk)| chain.checks(i, chunk, size, &digest))
            .collect();
        assert_eq!(right, [true, false, true]);
    }

    #[test]
    fn the_last_link_of_whole_chunks_gives_way_to_the_digest() {
        let chunk = usize::try_from(limits::CHUNK_LINK_BYTES).unwrap();
        let bytes = vec![3; 2 * chunk];
        let mut linker = Linker::new();
        linker.update(&bytes);
        let (chain, digest) = (linker.chain(), linker.digest());
        for (i, part) in bytes.chunks(chunk).enumerate() {
            assert!(chain.checks(i, part, bytes.len() as u64, &digest), "chunk {i}");
        }
    }
}
