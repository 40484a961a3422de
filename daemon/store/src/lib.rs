//! The store of one home: blobs by digest, names that point to them, and what may be deleted.
//!
//! **Owns** everything below `$V4_HOME` and every file-system call of the left column ([`fs::Fs`]).
//! `blobs/` and `manifests/` are byte for byte the tree that Ollama keeps. Every change is in the
//! order data, sync, rename, sync of the folder, then the manifest the same way, then the index:
//! whenever the process or the machine stops, each name points to whole blobs.
//!
//! **Never** talks to a network, reads a weight file's inside, or is async: callers on an async
//! runtime hand its calls to the blocking pool. Nothing in the index is the only copy.
//!
//! **Start reading at** [`Store`], then [`blob::Partial`].

#![forbid(unsafe_code)]

mod adopt;
pub mod blob;
mod care;
mod deleted;
mod error;
pub mod fs;
mod gc;
mod hash;
mod index;
mod lease;
pub mod limits;
pub mod manifest;
mod quota;
mod ranges;
mod roots;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

pub use adopt::{Adopted, How};
pub use blob::{Partial, Staged};
pub use care::{Cost, Damage, Usage};
pub use error::{ManifestError, StoreError, human};
pub use hash::{Chain, sha256};
pub use index::Opened;
pub use lease::Lease;
pub use manifest::{Entry, Layer, Manifest, Record, Role};
pub use quota::{Need, Quota, Room};
pub use ranges::Ranges;
pub use roots::{Root, RootKind};
use v4_proto::{Digest, Inspection, ModelName};

use crate::{
    blob::Place,
    fs::{Fs, RealFs},
    gc::Tree,
    index::Index,
};

/// Start of the names of files that are being put; whatever bears it at start is left over.
const STAGING: &str = "put-";

/// The folder of a home in which runners keep keys and values, a folder for each weights blob. Only
/// runners look into it; here it is removed with the blob.
pub const KV_FOLDER: &str = "kv";

/// The store of one home. Blocking; share it as `Arc<Store>`.
#[derive(Debug)]
pub struct Store {
    tree: Arc<Tree>,
    index_opened: Opened,
    next_staging: AtomicU64,
    quota: Mutex<Quota>,
    /// Held while a blob is hashed for [`Store::intact`]: who waits finds it done.
    hashing: Mutex<()>,
}

impl Store {
    /// Opens the store of a home, making the tree where there is none.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another daemon has this home; otherwise what the disk says.
    pub fn open(home: &Path) -> Result<Self, StoreError> {
        fs::bind_dir(home).map_err(StoreError::io("make", home))?;
        Self::open_with(home, Arc::new(RealFs))
    }

    /// [`Store::open`] on another file system, for tests. The index is on the real one in any
    /// case.
    ///
    /// # Errors
    /// As for [`Store::open`].
    pub fn open_with(home: &Path, fs: Arc<dyn Fs>) -> Result<Self, StoreError> {
        fs.create_dir(home).map_err(StoreError::io("make", home))?;
        let lock = fs.lock(&home.join("lock")).map_err(StoreError::io("lock", home))?;
        let lock = lock.ok_or_else(|| StoreError::Locked { home: home.to_path_buf() })?;
        for name in ["blobs", "chains", "origins", "partial", "manifests", deleted::FOLDER, "index"]
        {
            let path = home.join(name);
            fs.create_dir(&path).map_err(StoreError::io("make", &path))?;
        }
        fs.sync_dir(home).map_err(StoreError::io("sync", home))?;
        let (index, index_opened) = Index::open(&fs, &home.join("index"))?;
        let tree = Tree {
            home: home.to_path_buf(),
            fs,
            index,
            claims: lease::Shared::default(),
            change: Mutex::new(()),
            roots: RwLock::default(),
            lock: Mutex::new(Some(lock)),
        };
        tree.load_roots()?;
        tree.sweep_partials()?;
        tree.forget_deleted(false)?;
        tree.collect_orphans()?;
        Ok(Self {
            tree: Arc::new(tree),
            index_opened,
            next_staging: AtomicU64::new(0),
            quota: Mutex::default(),
            hashing: Mutex::new(()),
        })
    }

    /// Gives the home to another daemon: names and blobs can still be read here, and nothing can be
    /// changed until [`Store::take_back`]. Whoever writes must have ended: partials are not waited
    /// for.
    pub fn hand_over(&self) {
        let _change = self.tree.change.lock().unwrap_or_else(PoisonError::into_inner);
        self.tree.index.close();
        *self.tree.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether somebody writes a partial.
    pub fn is_written(&self) -> bool {
        self.tree.claims.lock().is_written()
    }

    /// Takes the home again that was given away.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another daemon has it by now; what the disk says.
    pub fn take_back(&self) -> Result<(), StoreError> {
        let (tree, home) = (&self.tree, &self.tree.home);
        let _change = tree.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = tree.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if held.is_some() {
            return Ok(());
        }
        let lock = tree.fs.lock(&home.join("lock")).map_err(StoreError::io("lock", home))?;
        let lock = lock.ok_or_else(|| StoreError::Locked { home: home.clone() })?;
        tree.index.reopen()?;
        *held = Some(lock);
        Ok(())
    }

    /// The home.
    pub fn home(&self) -> &Path {
        &self.tree.home
    }

    /// How the index came up, for the log.
    pub fn index_opened(&self) -> Opened {
        self.index_opened
    }

    /// All names, newest first. A manifest that cannot be read is left out here; [`Store::find`]
    /// says what is wrong with it.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn names(&self) -> Result<Vec<Entry>, StoreError> {
        let names = self.tree.manifest_names()?;
        entries(names.iter().map(|name| self.tree.read_record(name)))
    }

    /// What a name points to. Letter case does not count.
    ///
    /// # Errors
    /// [`StoreError::Manifest`] when it is there but cannot be read; [`StoreError::Io`].
    pub fn find(&self, name: &ModelName) -> Result<Option<Record>, StoreError> {
        match self.stored_name(name)? {
            Some(name) => self.tree.read_record(&name),
            None => Ok(None),
        }
    }

    /// What a name points to, and the manifest's own bytes.
    ///
    /// # Errors
    /// As for [`Store::find`].
    pub fn manifest(&self, name: &ModelName) -> Result<Option<(Record, Vec<u8>)>, StoreError> {
        let Some(name) = self.stored_name(name)? else { return Ok(None) };
        self.tree.read_manifest(&name)
    }

    /// Makes a name point to a manifest, in one step: a reader sees the old one or the new one.
    /// Blobs that only the old one named are collected. Returns the manifest's digest.
    ///
    /// # Errors
    /// [`StoreError::Manifest`] when the bytes are none; [`StoreError::Missing`] when a blob it
    /// names is not here; [`StoreError::DiskFull`] or [`StoreError::Io`], with the old one in
    /// place.
    pub fn put_manifest(&self, name: &ModelName, bytes: &[u8]) -> Result<Digest, StoreError> {
        let manifest = Manifest::parse(bytes)
            .map_err(|source| StoreError::Manifest { name: Box::new(name.clone()), source })?;
        let _change = self.lock_changes()?;
        for layer in manifest.blobs() {
            if self.blob(&layer.digest)? != Some(layer.size) {
                return Err(StoreError::Missing(layer.digest));
            }
        }
        let name = self.stored_name(name)?.unwrap_or_else(|| name.clone());
        let before = match self.tree.read_record(&name) {
            Ok(record) => record.map(|record| record.manifest.digests()).unwrap_or_default(),
            Err(StoreError::Manifest { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        self.tree.create_name_dirs("manifests", &name)?;
        blob::put_file(
            self.tree.fs.as_ref(),
            &self.staging_path(),
            &self.tree.manifest_path(&name),
            bytes,
            0o644,
        )?;
        // The name is new on the disk; what the old one left goes with a later collection at worst.
        let _ = self.tree.collect(&before);
        Ok(sha256(bytes))
    }

    /// Removes a name for good, and the blobs that no other name needs and nobody has leased.
    /// Returns whether there was one. Needs no free space, so it works on a full disk.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn remove(&self, name: &ModelName) -> Result<bool, StoreError> {
        let _change = self.lock_changes()?;
        let Some(name) = self.stored_name(name)? else { return Ok(false) };
        let record = match self.tree.read_record(&name) {
            Ok(record) => record,
            Err(StoreError::Manifest { .. }) => None,
            Err(error) => return Err(error),
        };
        let before = record.as_ref().map(|record| record.manifest.digests()).unwrap_or_default();
        let path = self.tree.manifest_path(&name);
        if !self.tree.fs.remove_file(&path).map_err(StoreError::io("remove", &path))? {
            return Err(StoreError::ReadOnly { name: Box::new(name) });
        }
        // The name must be gone for good before its blobs go.
        self.tree.remove_name_dirs("manifests", &path)?;
        self.tree.collect(&before)?;
        match record {
            Some(record) => self.tree.forget(&record)?,
            // A row too many is no loss, and on a full disk the index cannot be written.
            None => drop(self.tree.index.remove_name(&name)),
        }
        Ok(true)
    }

    /// The size of a blob, or `None` where it is not here.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn blob(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        Ok(self.blob_meta(digest)?.map(|meta| meta.len))
    }

    fn blob_meta(&self, digest: &Digest) -> Result<Option<fs::Meta>, StoreError> {
        let path = self.blob_path(digest);
        let meta = self.tree.fs.meta(&path).map_err(StoreError::io("look at", &path))?;
        Ok(meta.filter(|meta| !meta.is_dir))
    }

    /// Where a blob lies, if it is here: in this home, or in a root.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.tree.find_blob(digest)
    }

    /// The bytes of a small blob, checked against the digest.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Digest`] when it changed on disk, or
    /// [`StoreError::Io`], also beyond `max_bytes`.
    pub fn read_blob(&self, digest: &Digest, max_bytes: usize) -> Result<Vec<u8>, StoreError> {
        if self.blob(digest)?.is_none() {
            return Err(StoreError::Missing(*digest));
        }
        blob::read_checked(self.tree.fs.as_ref(), &self.blob_path(digest), digest, max_bytes)
    }

    /// What tells the parts of a blob apart, where that is kept: the blob itself need not be here.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn chain(&self, digest: &Digest, size: u64) -> Result<Option<Chain>, StoreError> {
        self.tree.chain(digest, size)
    }

    /// Stores a small blob.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] or [`StoreError::Io`].
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = sha256(bytes);
        if self.blob(&digest)? != Some(bytes.len() as u64) {
            blob::put_file(
                self.tree.fs.as_ref(),
                &self.staging_path(),
                &self.tree.blob_path(&digest),
                bytes,
                blob::BLOB_MODE,
            )?;
        }
        Ok(digest)
    }

    /// Hashes a blob again.
    ///
    /// # Errors
    /// [`StoreError::Missing`]; [`StoreError::Digest`] when it changed on disk; [`StoreError::Io`].
    pub fn verify(&self, digest: &Digest) -> Result<(), StoreError> {
        if self.blob(digest)?.is_none() {
            return Err(StoreError::Missing(*digest));
        }
        let path = self.blob_path(digest);
        let mut file = self.tree.fs.open_read(&path).map_err(StoreError::io("open", &path))?;
        let actual = hash::hash_file(file.as_mut(), &path)?.digest();
        if actual == *digest {
            Ok(())
        } else {
            Err(StoreError::Digest { expected: *digest, actual })
        }
    }

    /// Makes sure that a blob is what its digest says. It is hashed again only where its file has
    /// another length or time than when it was last known to be right, so this is cheap enough to
    /// be asked before every use.
    ///
    /// # Errors
    /// As for [`Store::verify`].
    pub fn intact(&self, digest: &Digest) -> Result<(), StoreError> {
        let is_stamped = || -> Result<bool, StoreError> {
            let meta = self.blob_meta(digest)?.ok_or(StoreError::Missing(*digest))?;
            Ok(self.tree.index.is_stamped(digest, &meta))
        };
        if is_stamped()? {
            return Ok(());
        }
        let _hashing = self.hashing.lock().unwrap_or_else(PoisonError::into_inner);
        if is_stamped()? {
            return Ok(());
        }
        let before = self.blob_meta(digest)?.ok_or(StoreError::Missing(*digest))?;
        self.verify(digest)?;
        // Without the note it is hashed again next time, which is no failure.
        let _ = self.tree.index.put_stamp(digest, &before);
        Ok(())
    }

    /// Notes that a blob's bytes have just been hashed on their way here, for [`Store::intact`].
    pub fn note_intact(&self, digest: &Digest) {
        if let Ok(Some(meta)) = self.blob_meta(digest) {
            let _ = self.tree.index.put_stamp(digest, &meta);
        }
    }

    /// Protects blobs, here or yet to come, until the lease is dropped. What should have gone
    /// meanwhile goes then.
    pub fn lease(&self, digests: &[Digest]) -> Lease {
        Lease::new(&self.tree, digests)
    }

    /// Opens a partial: a new one, or one that was begun under this key and is hashed again. `size`
    /// is how many bytes it may have.
    ///
    /// # Errors
    /// [`StoreError::Busy`] when somebody writes it; [`StoreError::Key`]; [`StoreError::DiskFull`]
    /// or [`StoreError::Io`].
    pub fn partial(&self, key: &str, size: Option<u64>) -> Result<Partial, StoreError> {
        let (place, claim) = self.claim(key)?;
        Partial::open(place, size, claim)
    }

    /// Bytes that the partial of a key has, as its journal says: at least what a resume finds, less
    /// what turns out damaged.
    ///
    /// # Errors
    /// [`StoreError::Key`] or [`StoreError::Io`].
    pub fn partial_bytes(&self, key: &str) -> Result<u64, StoreError> {
        blob::noted_bytes(&self.place(key)?)
    }

    /// Bytes that may still be written to the disk of this home.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        let home = &self.tree.home;
        self.tree.fs.free_bytes(home).map_err(StoreError::io("tell the free space at", home))
    }

    /// Removes the partial of a key without opening it. Returns whether it is gone: one that
    /// somebody writes or reads stays.
    ///
    /// # Errors
    /// [`StoreError::Key`] or [`StoreError::Io`].
    pub fn discard(&self, key: &str) -> Result<bool, StoreError> {
        match self.claim(key) {
            Ok((place, _claim)) => place.discard().map(|()| true),
            Err(StoreError::Busy(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What a header said when it was last read, if that is still known.
    pub fn inspection(&self, digest: &Digest) -> Option<Inspection> {
        self.tree.index.inspection(digest)
    }

    /// Keeps what a header says.
    ///
    /// # Errors
    /// [`StoreError::Index`], [`StoreError::DiskFull`] or [`StoreError::Io`]; the store is whole
    /// without it.
    pub fn put_inspection(&self, digest: &Digest, value: &Inspection) -> Result<(), StoreError> {
        self.tree.index.put_inspection(digest, value)
    }

    /// When a name was last used, if that is known.
    pub fn last_use(&self, name: &ModelName) -> Option<SystemTime> {
        self.tree.index.last_use(name)
    }

    /// Notes that a name is used now.
    ///
    /// # Errors
    /// As for [`Store::put_inspection`].
    pub fn touch(&self, name: &ModelName) -> Result<(), StoreError> {
        self.tree.index.touch(name, SystemTime::now())
    }

    /// Where the partial of a key lies, and the right to change it.
    fn claim(&self, key: &str) -> Result<(Place, lease::Claim), StoreError> {
        let place = self.place(key)?;
        if !self.tree.is_ours() {
            return Err(StoreError::HandedOver);
        }
        let claim = self.tree.claims.claim(key).ok_or_else(|| StoreError::Busy(key.to_owned()))?;
        Ok((place, claim))
    }

    /// Where the partial of a key lies.
    fn place(&self, key: &str) -> Result<Place, StoreError> {
        let is_valid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if key.is_empty()
            || key.len() > limits::KEY_CHARS
            || key.starts_with(STAGING)
            || !key.chars().all(is_valid)
        {
            return Err(StoreError::Key(key.chars().take(80).collect()));
        }
        let folder = self.tree.home.join("partial");
        Ok(Place {
            fs: Arc::clone(&self.tree.fs),
            data: folder.join(key),
            journal: folder.join(format!("{key}{}", blob::JOURNAL_ENDING)),
            blobs: self.tree.home.join("blobs"),
            chains: self.tree.home.join("chains"),
        })
    }

    /// The right to change names, as long as the home is ours.
    fn lock_changes(&self) -> Result<std::sync::MutexGuard<'_, ()>, StoreError> {
        let change = self.tree.change.lock().unwrap_or_else(PoisonError::into_inner);
        if self.tree.is_ours() { Ok(change) } else { Err(StoreError::HandedOver) }
    }

    /// A file name of its own for bytes that are being put. The lock on the home makes a counter
    /// enough.
    fn staging_path(&self) -> PathBuf {
        let n = self.next_staging.fetch_add(1, Ordering::Relaxed);
        self.tree.home.join("partial").join(format!("{STAGING}{n}"))
    }

    /// The name as it is stored, which may differ in letter case.
    fn stored_name(&self, name: &ModelName) -> Result<Option<ModelName>, StoreError> {
        if self.tree.find_manifest(name)?.is_some() {
            return Ok(Some(name.clone()));
        }
        Ok(self.tree.manifest_names()?.into_iter().find(|stored| stored.matches(name)))
    }
}

/// What was read, newest first, without the manifests that are damaged.
fn entries(
    records: impl Iterator<Item = Result<Option<Record>, StoreError>>,
) -> Result<Vec<Entry>, StoreError> {
    let mut entries = Vec::new();
    for record in records {
        match record {
            Ok(Some(Record { name, digest, manifest, modified })) => {
                let size_bytes = manifest.size_bytes();
                entries.push(Entry { name, digest, size_bytes, modified });
            }
            Ok(None) | Err(StoreError::Manifest { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    entries.sort_by(|a, b| b.modified.cmp(&a.modified).then_with(|| a.name.cmp(&b.name)));
    Ok(entries)
}
