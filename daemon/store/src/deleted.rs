//! Names that were deleted and can come back: a manifest moves to `deleted/` and keeps its blobs
//! until the next prune, until room is needed, or until [`limits::DELETED_AGE`] is over.

use std::path::{Path, PathBuf};

use v4_proto::{Digest, ModelName};

use crate::{Entry, Record, Store, StoreError, gc::Tree, limits};

/// The folder in the home, laid out as `manifests/`.
pub(crate) const FOLDER: &str = "deleted";

impl Tree {
    fn deleted_path(&self, name: &ModelName) -> PathBuf {
        self.home.join(FOLDER).join(name.path().join("/"))
    }

    /// The names that can come back.
    pub fn deleted_names(&self) -> Result<Vec<ModelName>, StoreError> {
        self.names_below(&self.home.join(FOLDER))
    }

    /// What a deleted name pointed to. When it was deleted stands in place of when it was made:
    /// the move is the last change of the file.
    pub fn read_deleted(&self, name: &ModelName) -> Result<Option<Record>, StoreError> {
        let path = self.deleted_path(name);
        let meta = self.fs.meta(&path).map_err(StoreError::io("look at", &path))?;
        let Some(meta) = meta.filter(|meta| !meta.is_dir) else { return Ok(None) };
        let read = self.read_manifest_at(name, &path, meta)?;
        Ok(read.map(|(record, _)| Record { modified: meta.changed, ..record }))
    }

    /// Makes the folders above a manifest below `root`; each new one is on the disk before it is
    /// used.
    pub fn create_name_dirs(&self, root: &str, name: &ModelName) -> Result<(), StoreError> {
        let mut folder = self.home.join(root);
        for part in &name.path()[..3] {
            let above = folder.clone();
            folder.push(part);
            if self.fs.create_dir(&folder).map_err(StoreError::io("make", &folder))? {
                self.fs.sync_dir(&above).map_err(StoreError::io("sync", &above))?;
            }
        }
        Ok(())
    }

    /// After a manifest below `root` went: brings that to the disk, and removes the folders above
    /// it that are empty now.
    pub fn remove_name_dirs(&self, root: &str, path: &Path) -> Result<(), StoreError> {
        let root = self.home.join(root);
        for folder in path.ancestors().skip(1).take(4) {
            self.fs.sync_dir(folder).map_err(StoreError::io("sync", folder))?;
            let gone = |folder: &Path| {
                self.fs.remove_empty_dir(folder).map_err(StoreError::io("remove", folder))
            };
            if folder == root || !gone(folder)? {
                break;
            }
        }
        Ok(())
    }

    /// Moves a manifest and brings the move to the disk, the new place first.
    fn move_name(&self, name: &ModelName, from: &str, to: &str) -> Result<(), StoreError> {
        let place = |root: &str| self.home.join(root).join(name.path().join("/"));
        let (old, new) = (place(from), place(to));
        self.create_name_dirs(to, name)?;
        self.fs.rename(&old, &new).map_err(StoreError::io("rename", &old))?;
        let folder = new.parent().unwrap_or(&new);
        self.fs.sync_dir(folder).map_err(StoreError::io("sync", folder))?;
        self.remove_name_dirs(from, &old)
    }

    /// Forgets deleted names: all of them, or those that were deleted longer ago than
    /// [`limits::DELETED_AGE`]. Their blobs go with the next collection, to which the digests are
    /// returned. The caller holds the lock on changes.
    pub fn forget_deleted(&self, all: bool) -> Result<Vec<Digest>, StoreError> {
        let mut free = Vec::new();
        for name in self.deleted_names()? {
            let path = self.deleted_path(&name);
            let record = match self.read_deleted(&name) {
                Ok(record) => record,
                Err(StoreError::Manifest { .. }) => None,
                Err(error) => return Err(error),
            };
            let age = record.as_ref().and_then(|record| record.modified.elapsed().ok());
            if !all && age.is_some_and(|age| age < limits::DELETED_AGE) {
                continue;
            }
            self.fs.remove_file(&path).map_err(StoreError::io("remove", &path))?;
            self.remove_name_dirs(FOLDER, &path)?;
            if let Some(record) = record {
                free.extend(record.manifest.digests());
                self.forget(&record)?;
            }
        }
        Ok(free)
    }

    /// Forgets what is told of a manifest that no name has any more.
    pub fn forget(&self, record: &Record) -> Result<(), StoreError> {
        let Record { name, digest, manifest, .. } = record;
        let is_it = |found: Result<Option<Record>, StoreError>| {
            found.ok().flatten().is_some_and(|found| found.digest == *digest)
        };
        let mut names = self.manifest_names()?.into_iter();
        let mut deleted = self.deleted_names()?.into_iter();
        let is_needed = names.any(|name| is_it(self.read_record(&name)))
            || deleted.any(|name| is_it(self.read_deleted(&name)));
        // Rows and files too many are no loss, and on a full disk the index cannot be written.
        if !is_needed {
            let _ = self.fs.remove_file(&self.origin_path(digest));
            if let Some(key) = manifest.inspection_key() {
                let _ = self.index.remove_inspection_of_many(&key, manifest);
            }
        }
        let _ = self.index.remove_name(name);
        Ok(())
    }
}

impl Store {
    /// Deletes a name so that [`Store::restore`] can bring it back. Returns whether there was one.
    /// On a disk that has no room for a folder it is removed for good instead, since that is what a
    /// full disk needs.
    ///
    /// # Errors
    /// [`StoreError::ReadOnly`] for a name of a root; [`StoreError::Io`].
    pub fn delete(&self, name: &ModelName) -> Result<bool, StoreError> {
        let change = self.lock_changes()?;
        let Some(name) = self.stored_name(name)? else { return Ok(false) };
        let path = self.tree.manifest_path(&name);
        if self.tree.fs.meta(&path).map_err(StoreError::io("look at", &path))?.is_none() {
            return Err(StoreError::ReadOnly { name: Box::new(name) });
        }
        let now = self.tree.read_record(&name);
        if let Err(StoreError::Manifest { .. }) = now {
            // It names nothing that could come back, and would protect every blob.
            drop(change);
            return self.remove(&name);
        }
        let before = self.tree.read_deleted(&name).ok().flatten();
        match self.tree.move_name(&name, "manifests", FOLDER) {
            Ok(()) => {
                let records = before.into_iter().chain(now.ok().flatten());
                let digests: Vec<Digest> =
                    records.flat_map(|record| record.manifest.digests()).collect();
                self.tree.collect(&digests)?;
                Ok(true)
            }
            Err(StoreError::DiskFull { .. }) => {
                drop(change);
                self.remove(&name)
            }
            Err(error) => Err(error),
        }
    }

    /// The names that can come back, the last deleted first; [`Entry::modified`] says when they
    /// were deleted.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn deleted(&self) -> Result<Vec<Entry>, StoreError> {
        let names = self.tree.deleted_names()?;
        crate::entries(names.iter().map(|name| self.tree.read_deleted(name)))
    }

    /// Brings a deleted name back. Returns whether there was one.
    ///
    /// # Errors
    /// [`StoreError::Taken`] when the name is used again by now; [`StoreError::DiskFull`] or
    /// [`StoreError::Io`].
    pub fn restore(&self, name: &ModelName) -> Result<bool, StoreError> {
        let _change = self.lock_changes()?;
        let deleted = self.tree.deleted_names()?;
        let Some(found) = deleted.into_iter().find(|deleted| deleted.matches(name)) else {
            return Ok(false);
        };
        if self.stored_name(&found)?.is_some() {
            return Err(StoreError::Taken { name: Box::new(found) });
        }
        self.tree.move_name(&found, FOLDER, "manifests")?;
        Ok(true)
    }
}
