//! Taking a person's file into the store with as few copies as the file system allows.
//!
//! A reflink is a file of our own that shares its bytes with theirs until somebody writes one of
//! them, so it is as safe as a copy and costs nothing. A hard link is the same file under two
//! names: what is written to theirs is written to ours. Therefore it is made only where it is asked
//! for, the file is made read-only, and [`Store::intact`] hashes it again as soon as its times say
//! that it was touched: a changed file is refused, never used, and never written by us either.

use std::{io::Read as _, path::Path, time::UNIX_EPOCH};

use bytes::Bytes;
use v4_proto::Digest;

use crate::{
    Lease, Need, Store, StoreError, blob,
    fs::{File, Meta},
    hash::{self, Linker},
    limits, sha256,
};

/// A file that was taken into the store.
#[derive(Debug)]
pub struct Adopted {
    /// Which blob it is.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// What was done.
    pub how: How,
    /// Keeps the blob until a manifest names it.
    pub lease: Lease,
}

/// Hears how far it is: bytes done, bytes in all.
pub type Told<'a> = &'a mut dyn FnMut(u64, u64);

/// How a file came into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The same bytes were here.
    Here,
    /// It shares its bytes with the person's file until one of them is written.
    Reflinked,
    /// It is the person's file under another name.
    Linked,
    /// It is a copy.
    Copied,
}

impl Store {
    /// Takes a file of the person into the blobs: as a reflink where the file system has them, as a
    /// hard link where `may_link` says so and it can be made, else as a copy. `told` hears how far
    /// its hashing is.
    ///
    /// # Errors
    /// [`StoreError::Space`] or [`StoreError::Quota`] before anything is copied;
    /// [`StoreError::Moved`] when the file changed meanwhile; [`StoreError::DiskFull`] or
    /// [`StoreError::Io`].
    pub fn adopt(
        &self,
        path: &Path,
        may_link: bool,
        told: Told<'_>,
    ) -> Result<Adopted, StoreError> {
        let before = self.file_meta(path)?;
        if let Some(adopted) = self.adopt_in_place(path, before, may_link, told)? {
            return Ok(adopted);
        }
        if self.tree.blobs()?.iter().any(|(_, len)| *len == before.len) {
            let digest = self.hash_of(path, before.len, told)?.0.digest();
            let lease = self.lease(&[digest]);
            if self.is_whole(&digest, before.len) {
                return Ok(Adopted { digest, size: before.len, how: How::Here, lease });
            }
        }
        self.copy(path, before, told)
    }

    /// A reflink or a hard link, hashed and then made a blob. `None` where neither can be made.
    fn adopt_in_place(
        &self,
        path: &Path,
        before: Meta,
        may_link: bool,
        told: Told<'_>,
    ) -> Result<Option<Adopted>, StoreError> {
        let fs = self.tree.fs.as_ref();
        let staging = self.staging_path();
        let how = if fs.clone_file(path, &staging).map_err(StoreError::io("clone", path))? {
            How::Reflinked
        } else if may_link && fs.link(path, &staging).map_err(StoreError::io("link", path))? {
            How::Linked
        } else {
            return Ok(None);
        };
        let hashed = self.hash_of(&staging, before.len, told);
        let taken = hashed
            .and_then(|(linker, file)| self.take(path, &staging, (before, how), (&linker, file)));
        if !matches!(&taken, Ok(Some(taken)) if taken.how == how) {
            // Another name of the person's file, or a clone of it, and nothing else.
            let _ = fs.remove_file(&staging);
        }
        taken
    }

    /// Makes a blob of a staged link that was hashed. `None` where the file is somebody else's, who
    /// alone may make it read-only.
    fn take(
        &self,
        path: &Path,
        staging: &Path,
        (before, how): (Meta, How),
        (linker, mut file): (&Linker, Box<dyn File>),
    ) -> Result<Option<Adopted>, StoreError> {
        let fs = self.tree.fs.as_ref();
        let (now, digest) = (self.file_meta(staging)?, linker.digest());
        let is_same = |now: Meta| (now.len, now.modified) == (before.len, before.modified);
        if how == How::Linked && !is_same(now) {
            return Err(StoreError::Moved { path: path.to_path_buf() });
        }
        let lease = self.lease(&[digest]);
        let size = now.len;
        if self.is_whole(&digest, size) {
            return Ok(Some(Adopted { digest, size, how: How::Here, lease }));
        }
        match fs.set_mode(staging, blob::BLOB_MODE) {
            Err(_) if how == How::Linked => return Ok(None),
            outcome => outcome.map_err(StoreError::io("make read-only", path))?,
        }
        file.sync().map_err(StoreError::io("sync", staging))?;
        let blob = self.tree.blob_path(&digest);
        fs.rename(staging, &blob).map_err(StoreError::io("rename", staging))?;
        let folder = blob.parent().unwrap_or(&blob);
        fs.sync_dir(folder).map_err(StoreError::io("sync", folder))?;
        self.put_chain(&digest, linker);
        // Who writes a linked file while it is taken in must not be vouched for: a time that is
        // still the same says that nobody did, unless it is so young that another write may have it
        // too. Without a note the blob is hashed again before it is used.
        let is_old = before.modified.elapsed().is_ok_and(|age| age > limits::SETTLED);
        let now = self.file_meta(&blob)?;
        if how == How::Reflinked || is_old && is_same(now) {
            let _ = self.tree.index.put_stamp(&digest, &now);
        }
        Ok(Some(Adopted { digest, size, how, lease }))
    }

    /// Copies a file into the blobs, hashing on the way. What is broken off goes on where it was.
    fn copy(&self, path: &Path, meta: Meta, told: Told<'_>) -> Result<Adopted, StoreError> {
        let since = meta.modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let what = format!("{}\n{}\n{since}", path.display(), meta.len);
        let key = format!("import-{}", sha256(what.as_bytes()).hex());
        let _room = self.make_room(vec![Need { key: key.clone(), size: meta.len }])?;
        let mut partial = self.partial(&key, Some(meta.len))?;
        let fs = self.tree.fs.as_ref();
        let mut file = fs.open_read(path).map_err(StoreError::io("open", path))?;
        let mut at = partial.offset();
        file.seek(std::io::SeekFrom::Start(at)).map_err(StoreError::io("seek in", path))?;
        loop {
            let mut chunk = Vec::new();
            let mut part = file.as_mut().take(limits::CHUNK_BYTES as u64);
            let n = part.read_to_end(&mut chunk).map_err(StoreError::io("read", path))?;
            if n == 0 {
                break;
            }
            partial.write_at(at, Bytes::from(chunk))?;
            at += n as u64;
            told(at, meta.len);
        }
        let digest = partial.digest()?;
        let now = self.file_meta(path)?;
        if at != meta.len || (now.len, now.modified) != (meta.len, meta.modified) {
            partial.discard()?;
            return Err(StoreError::Moved { path: path.to_path_buf() });
        }
        let lease = self.lease(&[digest]);
        partial.commit(&digest, at)?;
        self.note_intact(&digest);
        Ok(Adopted { digest, size: at, how: How::Copied, lease })
    }

    /// Whether a blob of this digest is here and right, in this home or in a root.
    fn is_whole(&self, digest: &Digest, size: u64) -> bool {
        self.blob(digest).is_ok_and(|found| found == Some(size)) && self.intact(digest).is_ok()
    }

    /// Hashes a file of `len` bytes.
    fn hash_of(
        &self,
        path: &Path,
        len: u64,
        told: Told<'_>,
    ) -> Result<(Linker, Box<dyn File>), StoreError> {
        let mut file = self.tree.fs.open_read(path).map_err(StoreError::io("open", path))?;
        let linker = hash::hash_told(file.as_mut(), path, &mut |done| told(done, len))?;
        Ok((linker, file))
    }

    /// What is known of a file of the person.
    fn file_meta(&self, path: &Path) -> Result<Meta, StoreError> {
        let meta = self.tree.fs.meta(path).map_err(StoreError::io("look at", path))?;
        let absent = || StoreError::io("read", path)(std::io::ErrorKind::NotFound.into());
        meta.filter(|meta| !meta.is_dir).ok_or_else(absent)
    }

    /// Keeps what tells a damaged part of a blob from the rest. Without it a damaged blob is
    /// fetched whole.
    fn put_chain(&self, digest: &Digest, linker: &Linker) {
        let chain = linker.chain();
        if !chain.is_empty() {
            let to = self.tree.chain_path(digest);
            let bytes = chain.encode();
            let staging = self.staging_path();
            let _ = blob::put_file(self.tree.fs.as_ref(), &staging, &to, &bytes, 0o600);
        }
    }
}
