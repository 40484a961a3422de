//! [`Tree`]: the files of a home, and deleting those that nobody needs.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use v4_proto::{Digest, ModelName};

use crate::{
    Manifest, Record, STAGING, blob,
    error::{ManifestError, StoreError},
    fs::{self, Fs, Lock, Meta},
    index::Index,
    lease, limits,
    roots::Root,
    sha256,
};

/// The files of a home and who needs them. Leases know it too, so that the last one on a blob can
/// collect it.
#[derive(Debug)]
pub(crate) struct Tree {
    pub home: PathBuf,
    pub fs: Arc<dyn Fs>,
    pub index: Index,
    pub claims: lease::Shared,
    /// Held while a name or the set of blobs changes. Taken before the claims.
    pub change: Mutex<()>,
    /// Other programs' stores.
    pub roots: RwLock<Vec<Root>>,
    /// The lock of the home; `None` while another daemon has it. The last field: given back when
    /// all else is closed.
    pub lock: Mutex<Option<Lock>>,
}

impl Tree {
    /// Whether this process has the home.
    pub fn is_ours(&self) -> bool {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Where a blob of this home lies, if it is here.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.home.join("blobs").join(blob::blob_name(digest))
    }

    /// Where the chain of a blob lies, if it has one.
    pub fn chain_path(&self, digest: &Digest) -> PathBuf {
        self.home.join("chains").join(blob::blob_name(digest))
    }

    /// Where a runner of a blob keeps keys and values, if it does.
    pub fn kv_path(&self, digest: &Digest) -> PathBuf {
        self.home.join(crate::KV_FOLDER).join(blob::blob_name(digest))
    }

    /// Where a manifest of this home lies, if it is here.
    pub fn manifest_path(&self, name: &ModelName) -> PathBuf {
        self.home.join("manifests").join(name.path().join("/"))
    }

    /// Where the manifest of a name lies, in this home or in a root, and what is known of the file.
    pub fn find_manifest(&self, name: &ModelName) -> Result<Option<(PathBuf, Meta)>, StoreError> {
        for folder in self.name_folders() {
            let path = folder.join(name.path().join("/"));
            let meta = self.fs.meta(&path).map_err(StoreError::io("look at", &path))?;
            if let Some(meta) = meta.filter(|meta| !meta.is_dir) {
                return Ok(Some((path, meta)));
            }
        }
        Ok(None)
    }

    /// Deletes those of `candidates` that no manifest names and nobody has leased. The others, and
    /// what cannot be deleted now, are remembered and go with the last lease or the next
    /// collection. The caller holds the lock on changes.
    ///
    /// A manifest that cannot be read may name anything, so then nothing is deleted.
    pub fn collect(&self, candidates: &[Digest]) -> Result<(), StoreError> {
        self.claims.lock().doomed.extend(candidates);
        if !self.is_ours() {
            // They are another daemon's to collect.
            return Ok(());
        }
        let Some([named, deleted]) = self.named_blobs()? else { return Ok(()) };
        // Held to the end: a lease taken meanwhile waits, and then finds the blob gone or safe.
        let mut claims = self.claims.lock();
        let free: Vec<Digest> =
            claims.doomed.iter().filter(|digest| !claims.is_leased(digest)).copied().collect();
        let mut outcome = Ok(());
        for digest in free {
            if !named.contains(&digest) {
                // Who removes a model wants the conversations with it gone, also where the model
                // could come back.
                let _ = self.fs.remove_tree(&self.kv_path(&digest));
            }
            if !named.contains(&digest) && !deleted.contains(&digest) {
                let path = self.blob_path(&digest);
                if let Err(error) = self.fs.remove_file(&path) {
                    outcome = outcome.and(Err(StoreError::io("remove", &path)(error)));
                    continue;
                }
                // Without its blob it means nothing, and it is small.
                let _ = self.fs.remove_file(&self.chain_path(&digest));
                // A row too many is no loss, and on a full disk the index cannot be written.
                let _ = self.index.remove_blob(&digest);
            }
            claims.doomed.remove(&digest);
        }
        outcome
    }

    /// Deletes blobs that no manifest has named for [`limits::ORPHAN_AGE`], at start.
    pub fn collect_orphans(&self) -> Result<(), StoreError> {
        let folder = self.home.join("blobs");
        let mut orphans = Vec::new();
        for name in self.fs.list(&folder).map_err(StoreError::io("list", &folder))? {
            let Ok(digest) = name.parse::<Digest>() else { continue };
            if name != blob::blob_name(&digest) {
                continue;
            }
            if self.is_older(&folder.join(&name), limits::ORPHAN_AGE)? {
                orphans.push(digest);
            }
        }
        self.collect(&orphans)
    }

    /// The blobs that manifests name, and those that names which can come back do; `None` when one
    /// of the former cannot be read.
    fn named_blobs(&self) -> Result<Option<[BTreeSet<Digest>; 2]>, StoreError> {
        let (mut named, mut deleted) = (BTreeSet::new(), BTreeSet::new());
        // A root's names need nothing of this home.
        for name in self.names_below(&self.home.join("manifests"))? {
            match self.read_record(&name) {
                Ok(Some(record)) => named.extend(record.manifest.digests()),
                Ok(None) => {}
                Err(StoreError::Manifest { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        for name in self.deleted_names()? {
            match self.read_deleted(&name) {
                Ok(Some(record)) => deleted.extend(record.manifest.digests()),
                // One that cannot be read cannot come back.
                Ok(None) | Err(StoreError::Manifest { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Some([named, deleted]))
    }

    /// Whether a file was last written longer ago than `age`.
    fn is_older(&self, path: &Path, age: Duration) -> Result<bool, StoreError> {
        let meta = self.fs.meta(path).map_err(StoreError::io("look at", path))?;
        let since = meta.and_then(|meta| SystemTime::now().duration_since(meta.modified).ok());
        Ok(since.is_some_and(|since| since > age))
    }

    /// The names of all manifests, in this home and in the roots, each once.
    pub fn manifest_names(&self) -> Result<Vec<ModelName>, StoreError> {
        let mut names: Vec<ModelName> = Vec::new();
        for folder in self.name_folders() {
            for name in self.names_below(&folder)? {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        Ok(names)
    }

    /// The names of all files in a tree of manifests.
    pub fn names_below(&self, root: &Path) -> Result<Vec<ModelName>, StoreError> {
        let mut paths = vec![Vec::new()];
        for _ in 0..4 {
            let mut below = Vec::new();
            for parts in paths {
                let folder = root.join(parts.join("/"));
                for name in self.fs.list(&folder).map_err(StoreError::io("list", &folder))? {
                    below.push([parts.as_slice(), &[name]].concat());
                }
            }
            paths = below;
        }
        let parse = |parts: Vec<String>| {
            let [host, namespace, model, tag] = parts.as_slice() else { return None };
            ModelName::from_path([host, namespace, model, tag]).ok()
        };
        Ok(paths.into_iter().filter_map(parse).collect())
    }

    /// What a name as it is stored points to.
    pub fn read_record(&self, name: &ModelName) -> Result<Option<Record>, StoreError> {
        Ok(self.read_manifest(name)?.map(|(record, _)| record))
    }

    /// The same with the manifest's own bytes.
    pub fn read_manifest(&self, name: &ModelName) -> Result<Option<(Record, Vec<u8>)>, StoreError> {
        let Some((path, meta)) = self.find_manifest(name)? else { return Ok(None) };
        self.read_manifest_at(name, &path, meta)
    }

    /// The same of a file that is known.
    pub fn read_manifest_at(
        &self,
        name: &ModelName,
        path: &Path,
        meta: Meta,
    ) -> Result<Option<(Record, Vec<u8>)>, StoreError> {
        let failed = |source| StoreError::Manifest { name: Box::new(name.clone()), source };
        if meta.len > limits::MANIFEST_BYTES as u64 {
            return Err(failed(ManifestError::TooLong));
        }
        let bytes = match fs::read(self.fs.as_ref(), path, limits::MANIFEST_BYTES) {
            Ok(bytes) => bytes,
            // Removed since it was looked at.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("read", path)(error)),
        };
        let manifest = Manifest::parse(&bytes).map_err(failed)?;
        let (name, modified) = (name.clone(), meta.modified);
        Ok(Some((Record { name, digest: sha256(&bytes), manifest, modified }, bytes)))
    }

    /// Removes what a killed process left half put, journals without data, and partials that
    /// nobody went on with for [`limits::PARTIAL_AGE`], at start.
    pub fn sweep_partials(&self) -> Result<(), StoreError> {
        let folder = self.home.join("partial");
        let mut names = self.fs.list(&folder).map_err(StoreError::io("list", &folder))?;
        let mut left_over = Vec::new();
        for name in &names {
            let is_data = !name.ends_with(blob::JOURNAL_ENDING);
            if name.starts_with(STAGING)
                || is_data && self.is_older(&folder.join(name), limits::PARTIAL_AGE)?
            {
                left_over.push(name.clone());
            }
        }
        names.retain(|name| !left_over.contains(name));
        let is_alone = |name: &&String| {
            let data = name.strip_suffix(blob::JOURNAL_ENDING);
            data.is_some_and(|data| !names.iter().any(|other| other == data))
        };
        // After the data: a journal alone means nothing.
        left_over.extend(names.iter().filter(is_alone).cloned());
        for name in left_over {
            let path = folder.join(name);
            self.fs.remove_file(&path).map_err(StoreError::io("remove", &path))?;
        }
        Ok(())
    }
}
