//! Deleting blobs that no name needs.

use std::{collections::BTreeSet, time::SystemTime};

use v4_proto::Digest;

use crate::{Store, blob, error::StoreError, limits};

impl Store {
    /// Deletes those of `candidates` that no manifest names and nobody has leased. Leased ones are
    /// remembered and go with the next collection. The caller holds the lock on changes.
    ///
    /// A manifest that cannot be read may name anything, so then nothing is deleted.
    pub(crate) fn collect(&self, candidates: &[Digest]) -> Result<(), StoreError> {
        let Some(named) = self.named_blobs()? else { return Ok(()) };
        // Held to the end: a lease taken meanwhile waits, and then finds the blob gone or safe.
        let mut claims = self.claims.lock();
        let doomed = std::mem::take(&mut claims.doomed);
        for digest in doomed.into_iter().chain(candidates.iter().copied()) {
            if named.contains(&digest) {
                continue;
            }
            if claims.is_leased(&digest) {
                claims.doomed.insert(digest);
                continue;
            }
            let path = self.blob_path(&digest);
            self.fs.remove_file(&path).map_err(StoreError::io("remove", &path))?;
            self.index.remove_inspection(&digest)?;
        }
        Ok(())
    }

    /// Deletes blobs that no manifest has named for [`limits::ORPHAN_AGE`], at start.
    pub(crate) fn collect_orphans(&self) -> Result<(), StoreError> {
        let folder = self.home.join("blobs");
        let now = SystemTime::now();
        let mut orphans = Vec::new();
        for name in self.fs.list(&folder).map_err(StoreError::io("list", &folder))? {
            let Ok(digest) = name.parse::<Digest>() else { continue };
            if name != blob::blob_name(&digest) {
                continue;
            }
            let path = folder.join(&name);
            let meta = self.fs.meta(&path).map_err(StoreError::io("look at", &path))?;
            let age = meta.and_then(|meta| now.duration_since(meta.modified).ok());
            if age.is_some_and(|age| age > limits::ORPHAN_AGE) {
                orphans.push(digest);
            }
        }
        self.collect(&orphans)
    }

    /// The blobs that manifests name, or `None` when one of them cannot be read.
    fn named_blobs(&self) -> Result<Option<BTreeSet<Digest>>, StoreError> {
        let mut named = BTreeSet::new();
        for name in self.manifest_names()? {
            match self.read_record(&name) {
                Ok(Some(record)) => named.extend(record.manifest.digests()),
                Ok(None) => {}
                Err(StoreError::Manifest { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(named))
    }
}
