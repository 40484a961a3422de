//! Looking after a store: what each name costs, what is damaged, what nobody needs, where a model
//! came from.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    io::Read as _,
    path::PathBuf,
};

use v4_proto::{Digest, ModelName};

use crate::{Store, StoreError, blob, fs, gc::Tree, hash::Chain, limits};

/// What a name costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cost {
    /// The name.
    pub name: ModelName,
    /// Bytes of blobs that no other name has: what removing it frees.
    pub own_bytes: u64,
    /// Bytes of blobs that other names have too.
    pub shared_bytes: u64,
}

/// What a store costs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// The names, the largest first.
    pub names: Vec<Cost>,
    /// Bytes of blobs that no name has: what [`Store::prune`] frees.
    pub orphan_bytes: u64,
    /// Bytes of blobs that only deleted names have: what [`Store::prune`] frees, too.
    pub deleted_bytes: u64,
    /// Bytes of downloads that are not done.
    pub partial_bytes: u64,
    /// Bytes of keys and values of idle conversations, which runners keep.
    pub kv_bytes: u64,
    /// Bytes of everything, each once.
    pub total_bytes: u64,
}

/// Something that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Whose.
    pub name: ModelName,
    /// Which blob; `None` is the manifest itself.
    pub blob: Option<Digest>,
    /// What is wrong, and what to do.
    pub what: String,
}

impl Store {
    /// What each name costs and what nobody needs.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let tree = &self.tree;
        let mut users: BTreeMap<Digest, BTreeSet<ModelName>> = BTreeMap::new();
        for name in tree.manifest_names()? {
            match tree.read_record(&name) {
                Ok(Some(record)) => {
                    for digest in record.manifest.digests() {
                        users.entry(digest).or_default().insert(name.clone());
                    }
                }
                Ok(None) | Err(StoreError::Manifest { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let mut deleted = BTreeSet::new();
        for name in tree.deleted_names()? {
            match tree.read_deleted(&name) {
                Ok(record) => deleted.extend(record.iter().flat_map(|one| one.manifest.digests())),
                Err(StoreError::Manifest { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let mut usage = Usage::default();
        let mut costs: BTreeMap<&ModelName, (u64, u64)> = BTreeMap::new();
        for (digest, len) in tree.blobs()? {
            usage.total_bytes += len;
            let Some(names) = users.get(&digest) else {
                let is_deleted = deleted.contains(&digest);
                *if is_deleted { &mut usage.deleted_bytes } else { &mut usage.orphan_bytes } += len;
                continue;
            };
            for name in names {
                let (own, shared) = costs.entry(name).or_default();
                *if names.len() == 1 { own } else { shared } += len;
            }
        }
        let cost = |(name, (own_bytes, shared_bytes)): (&ModelName, (u64, u64))| Cost {
            name: name.clone(),
            own_bytes,
            shared_bytes,
        };
        usage.names = costs.into_iter().map(cost).collect();
        usage.names.sort_by_key(|cost| std::cmp::Reverse(cost.own_bytes + cost.shared_bytes));
        let folder = tree.home.join("partial");
        for name in tree.fs.list(&folder).map_err(StoreError::io("list", &folder))? {
            usage.partial_bytes += tree.len(&folder.join(name))?.unwrap_or(0);
        }
        usage.kv_bytes = tree.kv_bytes()?;
        usage.total_bytes += usage.partial_bytes + usage.kv_bytes;
        Ok(usage)
    }

    /// Removes the blobs that no name has and nobody uses, however young, those of deleted names
    /// among them, which cannot come back then; and with `partials` the downloads that nobody goes
    /// on with at this moment. Returns the bytes that came free. Where a manifest cannot be read no
    /// blob is removed, since it may name any.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn prune(&self, partials: bool) -> Result<u64, StoreError> {
        let tree = &self.tree;
        let change = self.lock_changes()?;
        let before: u64 = tree.blobs()?.into_iter().map(|(_, len)| len).sum();
        tree.forget_deleted(true)?;
        let all: Vec<Digest> = tree.blobs()?.into_iter().map(|(digest, _)| digest).collect();
        tree.collect(&all)?;
        let after: u64 = tree.blobs()?.into_iter().map(|(_, len)| len).sum();
        drop(change);
        let mut freed = before.saturating_sub(after);
        let folder = tree.home.join("partial");
        for name in tree.fs.list(&folder).map_err(StoreError::io("list", &folder))? {
            let is_data = !name.ends_with(blob::JOURNAL_ENDING);
            if !partials || !is_data || name.starts_with(crate::STAGING) {
                continue;
            }
            let len = tree.len(&folder.join(&name))?.unwrap_or(0);
            if self.discard(&name)? {
                freed += len;
            }
        }
        Ok(freed)
    }

    /// Reads every manifest and hashes every blob that one names. `told` is given each blob before
    /// it is hashed, with its bytes.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the disk fails in another way than by wrong bytes.
    pub fn check(&self, mut told: impl FnMut(&Digest, u64)) -> Result<Vec<Damage>, StoreError> {
        let mut damages = Vec::new();
        let mut known: BTreeMap<Digest, Option<String>> = BTreeMap::new();
        for name in self.tree.manifest_names()? {
            let record = match self.tree.read_record(&name) {
                Ok(Some(record)) => record,
                Ok(None) => continue,
                Err(error @ StoreError::Manifest { .. }) => {
                    damages.push(Damage { name, blob: None, what: error.to_string() });
                    continue;
                }
                Err(error) => return Err(error),
            };
            for layer in record.manifest.blobs() {
                let digest = layer.digest;
                let damage = match known.entry(digest) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(new) => {
                        told(&digest, layer.size);
                        new.insert(self.damage(&digest, layer.size)?)
                    }
                };
                if let Some(what) = damage.clone() {
                    damages.push(Damage { name: name.clone(), blob: Some(digest), what });
                }
            }
        }
        Ok(damages)
    }

    /// What is wrong with a blob.
    fn damage(&self, digest: &Digest, size: u64) -> Result<Option<String>, StoreError> {
        match self.blob(digest)? {
            None => return Ok(Some("is missing".to_owned())),
            Some(len) if len != size => {
                return Ok(Some(format!("has {len} bytes instead of {size}")));
            }
            Some(_) => {}
        }
        match self.verify(digest) {
            Ok(()) => {
                self.note_intact(digest);
                Ok(None)
            }
            Err(StoreError::Digest { .. }) => {
                let bad = self.good_chunks(digest)?.iter().filter(|chunk| chunk.is_none()).count();
                Ok(Some(match bad {
                    0 => "has other bytes than its digest says".to_owned(),
                    n => format!("has {n} damaged part(s) of 8 MiB"),
                }))
            }
            Err(StoreError::Missing(_)) => Ok(Some("is missing".to_owned())),
            Err(error) => Err(error),
        }
    }

    /// Makes a damaged blob a partial of its undamaged parts, so that a pull fetches the others
    /// alone. Returns the bytes that were saved; none where no chain tells the parts apart, or a
    /// partial is there already.
    ///
    /// # Errors
    /// [`StoreError::Key`] never; [`StoreError::DiskFull`] or [`StoreError::Io`].
    pub fn salvage(&self, digest: &Digest) -> Result<u64, StoreError> {
        let key = blob::blob_name(digest);
        if self.partial_bytes(&key)? > 0 {
            return Ok(0);
        }
        if self.blob_path(digest) != self.tree.blob_path(digest) {
            // It is another program's.
            return Ok(0);
        }
        let (place, _claim) = match self.claim(&key) {
            Ok(claimed) => claimed,
            Err(StoreError::Busy(_)) => return Ok(0),
            Err(error) => return Err(error),
        };
        let path = self.blob_path(digest);
        let meta = self.tree.fs.meta(&path).map_err(StoreError::io("look at", &path))?;
        if meta.is_some_and(|meta| meta.n_names > 1) {
            // It is a hard link to a person's file, which is not ours to mend.
            return Ok(0);
        }
        let good: Vec<blob::Piece> = self.good_chunks(digest)?.into_iter().flatten().collect();
        let saved = good.iter().map(|piece| piece.range.end - piece.range.start).sum();
        if saved > 0 {
            let _change = self.lock_changes()?;
            blob::begin(&place, &path, &good)?;
        }
        Ok(saved)
    }

    /// The parts of a blob: `None` for one that is damaged. Empty where nothing tells them apart.
    fn good_chunks(&self, digest: &Digest) -> Result<Vec<Option<blob::Piece>>, StoreError> {
        let tree = &self.tree;
        let path = self.blob_path(digest);
        let Some(size) = self.blob(digest)? else { return Ok(Vec::new()) };
        let Some(chain) = tree.chain(digest, size)? else { return Ok(Vec::new()) };
        let mut file = tree.fs.open_read(&path).map_err(StoreError::io("open", &path))?;
        let mut chunks = Vec::new();
        let mut start = 0;
        while start < size {
            let end = size.min(start + limits::CHUNK_LINK_BYTES);
            let mut chunk = Vec::new();
            let mut part = file.as_mut().take(end - start);
            part.read_to_end(&mut chunk).map_err(StoreError::io("read", &path))?;
            let is_good = chain.checks(chunks.len(), &chunk, size, digest);
            chunks.push(is_good.then(|| blob::Piece::of(start, &chunk)));
            start = end;
        }
        Ok(chunks)
    }

    /// Keeps what is known of where a manifest came from: a small JSON text.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] or [`StoreError::Io`]; the model is whole without it.
    pub fn put_origin(&self, manifest: &Digest, json: &[u8]) -> Result<(), StoreError> {
        let to = self.tree.origin_path(manifest);
        blob::put_file(self.tree.fs.as_ref(), &self.staging_path(), &to, json, 0o600)
    }

    /// What is known of where a manifest came from.
    pub fn origin(&self, manifest: &Digest) -> Option<Vec<u8>> {
        let path = self.tree.origin_path(manifest);
        fs::read(self.tree.fs.as_ref(), &path, limits::ORIGIN_BYTES).ok()
    }
}

impl Tree {
    /// Where it is told where a manifest came from.
    pub fn origin_path(&self, manifest: &Digest) -> PathBuf {
        self.home.join("origins").join(blob::blob_name(manifest))
    }

    /// Bytes of a file, where it is there.
    fn len(&self, path: &std::path::Path) -> Result<Option<u64>, StoreError> {
        let meta = self.fs.meta(path).map_err(StoreError::io("look at", path))?;
        Ok(meta.map(|meta| meta.len))
    }

    /// Bytes of keys and values, of all models together. Runners write and remove them meanwhile.
    fn kv_bytes(&self) -> Result<u64, StoreError> {
        let root = self.home.join(crate::KV_FOLDER);
        let mut bytes = 0;
        for model in self.fs.list(&root).map_err(StoreError::io("list", &root))? {
            let folder = root.join(model);
            for name in self.fs.list(&folder).map_err(StoreError::io("list", &folder))? {
                bytes += self.len(&folder.join(name))?.unwrap_or(0);
            }
        }
        Ok(bytes)
    }

    /// All blobs with their bytes.
    pub fn blobs(&self) -> Result<Vec<(Digest, u64)>, StoreError> {
        let folder = self.home.join("blobs");
        let mut blobs = Vec::new();
        for name in self.fs.list(&folder).map_err(StoreError::io("list", &folder))? {
            let Ok(digest) = name.parse::<Digest>() else { continue };
            if let Some(len) = self.len(&folder.join(&name))? {
                blobs.push((digest, len));
            }
        }
        Ok(blobs)
    }

    /// The chain of a blob, where there is one that fits.
    pub fn chain(&self, digest: &Digest, size: u64) -> Result<Option<Chain>, StoreError> {
        let path = self.chain_path(digest);
        if self.len(&path)?.is_none() {
            return Ok(None);
        }
        let bytes = fs::read(self.fs.as_ref(), &path, limits::CHAIN_BYTES);
        let bytes = bytes.map_err(StoreError::io("read", &path))?;
        Ok(Chain::decode(&bytes, size).filter(|chain| !chain.is_empty()))
    }
}
