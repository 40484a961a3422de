//! [`Partial`]: a blob that grows, hashed while it is written, and its way into the store.
//!
//! Beside the data lies a journal: a line for each point up to which the data was synced, with the
//! digest of all bytes before it. A resume hashes what is there and keeps it up to the last point
//! that is true; so a torn write, a lost page or a file that somebody changed costs a part of the
//! download, never a wrong blob.

use std::{
    fmt,
    io::{Read, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest as _, Sha256};
use v4_proto::Digest;

use crate::{
    error::StoreError,
    fs::{self, File, Fs},
    lease::Claim,
    limits,
};

/// Mode of a blob: nobody writes it again.
pub(crate) const BLOB_MODE: u32 = 0o444;
/// Mode of a file that grows.
const PARTIAL_MODE: u32 = 0o600;
/// Ending of a journal's file name.
pub(crate) const JOURNAL_ENDING: &str = ".journal";
/// Bytes of a journal's line: 20 digits, a space, 64 hexadecimal digits, a line feed.
const LINE_BYTES: usize = 86;

/// The digest of some bytes.
pub fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

/// The digest of what a hasher has seen so far.
fn digest_of(hasher: &Sha256) -> Digest {
    Digest::from_bytes(hasher.clone().finalize().into())
}

/// The digest of a file.
pub(crate) fn hash_file(file: &mut dyn File, path: &Path) -> Result<Digest, StoreError> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; limits::CHUNK_BYTES];
    loop {
        match file.read(&mut chunk).map_err(StoreError::io("read", path))? {
            0 => return Ok(digest_of(&hasher)),
            n => hasher.update(&chunk[..n]),
        }
    }
}

/// Where a partial lies and goes.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub fs: Arc<dyn Fs>,
    pub data: PathBuf,
    pub journal: PathBuf,
    pub blobs: PathBuf,
}

impl Place {
    /// Forgets the partial.
    pub fn discard(&self) -> Result<(), StoreError> {
        // The journal goes last: alone it means nothing, while data alone would be kept for ever.
        for path in [&self.data, &self.journal] {
            self.fs.remove_file(path).map_err(StoreError::io("remove", path))?;
        }
        Ok(())
    }
}

/// A blob that grows. Dropping it keeps what was synced; a later [`crate::Store::partial`] with the
/// same key goes on from there.
pub struct Partial {
    place: Place,
    file: Box<dyn File>,
    journal: Box<dyn File>,
    hasher: Sha256,
    offset: u64,
    synced: u64,
    size: Option<u64>,
    claim: Claim,
}

impl fmt::Debug for Partial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, offset, size, .. } = self;
        f.debug_struct("Partial")
            .field("data", &place.data)
            .field("offset", offset)
            .field("size", size)
            .finish_non_exhaustive()
    }
}

/// The longest start of the data that the journal vouches for.
struct Vouched {
    hasher: Sha256,
    offset: u64,
    n_lines: u64,
}

impl Partial {
    /// Opens or makes the partial at `place`. `size` is how many bytes it may have at most.
    pub(crate) fn open(place: Place, size: Option<u64>, claim: Claim) -> Result<Self, StoreError> {
        let fs = &place.fs;
        let is_there = fs.meta(&place.data).map_err(StoreError::io("look at", &place.data))?;
        if is_there.is_some() {
            // A commit that was killed may have left it read-only.
            fs.set_mode(&place.data, PARTIAL_MODE)
                .map_err(StoreError::io("make writable", &place.data))?;
        }
        let mut file = fs.open(&place.data).map_err(StoreError::io("open", &place.data))?;
        let mut journal =
            fs.open(&place.journal).map_err(StoreError::io("open", &place.journal))?;
        let lines = read_journal(journal.as_mut(), &place.journal)?;
        let mut vouched = vouch(file.as_mut(), &place.data, &lines)?;
        if size.is_some_and(|size| vouched.offset > size) {
            vouched = Vouched { hasher: Sha256::new(), offset: 0, n_lines: 0 };
        }
        let journal_len = vouched.n_lines * LINE_BYTES as u64;
        cut(journal.as_mut(), &place.journal, journal_len)?;
        cut(file.as_mut(), &place.data, vouched.offset)?;
        let Vouched { hasher, offset, .. } = vouched;
        Ok(Self { place, file, journal, hasher, offset, synced: offset, size, claim })
    }

    /// Bytes that are here and hashed: where to go on.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The digest of the bytes so far.
    pub fn digest(&self) -> Digest {
        digest_of(&self.hasher)
    }

    /// Appends bytes. Every few MB they are synced and the journal notes it.
    ///
    /// # Errors
    /// [`StoreError::Length`] beyond the expected size (nothing is written);
    /// [`StoreError::DiskFull`] or [`StoreError::Io`], after which the partial is to be dropped: it
    /// can be resumed at its last synced point.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let end = self.offset.saturating_add(bytes.len() as u64);
        if let Some(expected) = self.size.filter(|size| end > *size) {
            return Err(StoreError::Length { expected, actual: end });
        }
        self.file.write_all(bytes).map_err(StoreError::io("write", &self.place.data))?;
        self.hasher.update(bytes);
        self.offset = end;
        if self.offset - self.synced >= limits::CHECKPOINT_BYTES {
            self.sync()?;
        }
        Ok(())
    }

    /// Brings all bytes to the disk and notes it in the journal.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] or [`StoreError::Io`].
    pub fn sync(&mut self) -> Result<(), StoreError> {
        if self.synced == self.offset {
            return Ok(());
        }
        self.file.sync().map_err(StoreError::io("sync", &self.place.data))?;
        // After the data, never before. The line itself needs no sync: without it, or with a torn
        // one, a resume starts a little earlier.
        let line = format!("{:020} {}\n", self.offset, self.digest().hex());
        let journal = &self.place.journal;
        self.journal.write_all(line.as_bytes()).map_err(StoreError::io("write", journal))?;
        self.synced = self.offset;
        Ok(())
    }

    /// Throws all bytes away and starts at 0 again.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn restart(&mut self) -> Result<(), StoreError> {
        cut(self.journal.as_mut(), &self.place.journal, 0)?;
        cut(self.file.as_mut(), &self.place.data, 0)?;
        (self.hasher, self.offset, self.synced) = (Sha256::new(), 0, 0);
        Ok(())
    }

    /// Removes the partial.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn discard(self) -> Result<(), StoreError> {
        self.place.discard()
    }

    /// Makes it a blob: only when length and digest are as they must be. Otherwise the partial is
    /// removed.
    ///
    /// # Errors
    /// [`StoreError::Length`] or [`StoreError::Digest`] with both digests;
    /// [`StoreError::DiskFull`] or [`StoreError::Io`], after which it can be resumed.
    pub fn commit(mut self, digest: &Digest, size: u64) -> Result<(), StoreError> {
        self.check(digest, size)?;
        let Place { fs, data, journal, blobs } = &self.place;
        fs.set_mode(data, BLOB_MODE).map_err(StoreError::io("make read-only", data))?;
        let blob = blobs.join(blob_name(digest));
        fs.rename(data, &blob).map_err(StoreError::io("rename", data))?;
        fs.sync_dir(blobs).map_err(StoreError::io("sync", blobs))?;
        // The blob is whole and in place; a journal alone is swept at the next start.
        let _ = fs.remove_file(journal);
        Ok(())
    }

    /// Keeps it as a checked file outside the blobs, to be read and then discarded. Length and
    /// digest are checked as for a blob.
    ///
    /// # Errors
    /// As for [`Partial::commit`].
    pub fn stage(mut self, digest: &Digest, size: u64) -> Result<Staged, StoreError> {
        self.check(digest, size)?;
        Ok(Staged { place: self.place, _claim: self.claim })
    }

    /// Syncs and checks; removes the partial when it is not what it must be.
    fn check(&mut self, digest: &Digest, size: u64) -> Result<(), StoreError> {
        let actual = self.digest();
        let wrong = if self.offset != size {
            StoreError::Length { expected: size, actual: self.offset }
        } else if actual != *digest {
            StoreError::Digest { expected: *digest, actual }
        } else {
            return self.sync();
        };
        self.place.discard()?;
        Err(wrong)
    }
}

/// A whole, checked file that is not a blob: an archive on its way to its members.
#[derive(Debug)]
pub struct Staged {
    place: Place,
    _claim: Claim,
}

impl Staged {
    /// Opens it to read.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(&self) -> Result<Box<dyn File>, StoreError> {
        let path = &self.place.data;
        self.place.fs.open_read(path).map_err(StoreError::io("open", path))
    }

    /// Removes it. Dropping it instead leaves it for a later [`crate::Store::partial`] or
    /// [`crate::Store::discard`].
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn discard(self) -> Result<(), StoreError> {
        self.place.discard()
    }
}

/// The file name of a blob.
pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("sha256-{}", digest.hex())
}

/// Cuts a file and puts its cursor at the end.
fn cut(file: &mut dyn File, path: &Path, len: u64) -> Result<(), StoreError> {
    file.set_len(len).map_err(StoreError::io("cut", path))?;
    file.seek(SeekFrom::Start(len)).map_err(StoreError::io("seek in", path))?;
    Ok(())
}

/// The lines of a journal, up to the first that is not one.
fn read_journal(journal: &mut dyn File, path: &Path) -> Result<Vec<(u64, Digest)>, StoreError> {
    let mut bytes = Vec::new();
    let limit = limits::JOURNAL_BYTES as u64;
    journal.take(limit).read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
    let parse = |line: &[u8]| {
        let (offset, digest) = std::str::from_utf8(line).ok()?.trim_end().split_once(' ')?;
        Some((offset.parse().ok()?, Digest::from_hex(digest).ok()?))
    };
    Ok(bytes.chunks_exact(LINE_BYTES).map_while(parse).collect())
}

/// Hashes the data and finds the last point of the journal that is true of it.
fn vouch(file: &mut dyn File, path: &Path, lines: &[(u64, Digest)]) -> Result<Vouched, StoreError> {
    let mut hasher = Sha256::new();
    let mut vouched = Vouched { hasher: hasher.clone(), offset: 0, n_lines: 0 };
    let mut chunk = vec![0; if lines.is_empty() { 0 } else { limits::CHUNK_BYTES }];
    let mut offset = 0;
    for (end, digest) in lines {
        while offset < *end {
            let want = usize::try_from(*end - offset).unwrap_or(usize::MAX).min(chunk.len());
            let n = file.read(&mut chunk[..want]).map_err(StoreError::io("read", path))?;
            if n == 0 {
                return Ok(vouched);
            }
            hasher.update(&chunk[..n]);
            offset += n as u64;
        }
        if offset != *end || digest_of(&hasher) != *digest {
            return Ok(vouched);
        }
        vouched = Vouched { hasher: hasher.clone(), offset, n_lines: vouched.n_lines + 1 };
    }
    Ok(vouched)
}

/// Writes a whole small file so that a crash leaves either the old one or the new one.
pub(crate) fn put_file(
    fs: &dyn Fs,
    staging: &Path,
    to: &Path,
    bytes: &[u8],
    mode: u32,
) -> Result<(), StoreError> {
    let mut file = fs.open(staging).map_err(StoreError::io("open", staging))?;
    cut(file.as_mut(), staging, 0)?;
    file.write_all(bytes).map_err(StoreError::io("write", staging))?;
    file.sync().map_err(StoreError::io("sync", staging))?;
    drop(file);
    fs.set_mode(staging, mode).map_err(StoreError::io("set the mode of", staging))?;
    fs.rename(staging, to).map_err(StoreError::io("rename", staging))?;
    let folder = to.parent().unwrap_or(to);
    fs.sync_dir(folder).map_err(StoreError::io("sync", folder))
}

/// Reads a blob and checks it.
pub(crate) fn read_checked(
    fs: &dyn Fs,
    path: &Path,
    digest: &Digest,
    max_bytes: usize,
) -> Result<Vec<u8>, StoreError> {
    let bytes = fs::read(fs, path, max_bytes).map_err(StoreError::io("read", path))?;
    let actual = sha256(&bytes);
    if actual == *digest {
        Ok(bytes)
    } else {
        Err(StoreError::Digest { expected: *digest, actual })
    }
}
