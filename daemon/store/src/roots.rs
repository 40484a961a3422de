//! Other programs' stores, read in place: an Ollama store with its names and blobs, a cache of
//! Hugging Face with its blobs. Nothing in them is ever written, moved or removed.

use std::path::{Path, PathBuf};

use v4_proto::Digest;

use crate::{Store, StoreError, blob, fs, gc::Tree, limits};

/// The file in the home that lists them, a line each.
const FILE: &str = "roots";

/// What kind of store a folder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootKind {
    /// Names and blobs, as Ollama and v4 keep them.
    Ollama,
    /// Repositories, as the libraries of Hugging Face keep them.
    HuggingFace,
}

/// Another program's store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// Where it lies.
    pub path: PathBuf,
    /// What it is.
    pub kind: RootKind,
}

impl Tree {
    /// What kind of store a folder is, if it is one.
    fn kind(&self, path: &Path) -> Result<Option<RootKind>, StoreError> {
        let list = |path: &Path| self.fs.list(path).map_err(StoreError::io("list", path));
        let is_inside = |name: &str| Ok(list(path)?.iter().any(|found| found == name));
        if is_inside("blobs")? && is_inside("manifests")? {
            return Ok(Some(RootKind::Ollama));
        }
        let is_repository = |name: &String| name.starts_with("models--");
        Ok(list(path)?.iter().any(is_repository).then_some(RootKind::HuggingFace))
    }

    /// Reads the list of roots. One that is not there at this moment is passed over.
    pub fn load_roots(&self) -> Result<(), StoreError> {
        let path = self.home.join(FILE);
        if self.fs.meta(&path).map_err(StoreError::io("look at", &path))?.is_none() {
            return Ok(());
        }
        let bytes = fs::read(self.fs.as_ref(), &path, limits::ROOTS_BYTES);
        let bytes = bytes.map_err(StoreError::io("read", &path))?;
        let mut roots = Vec::new();
        for line in String::from_utf8_lossy(&bytes).lines().filter(|line| !line.is_empty()) {
            let path = PathBuf::from(line);
            // A disk that is not mounted now may be at the next start.
            let kind = self.kind(&path).ok().flatten().unwrap_or(RootKind::Ollama);
            roots.push(Root { path, kind });
        }
        *self.roots.write().unwrap_or_else(std::sync::PoisonError::into_inner) = roots;
        Ok(())
    }

    /// The roots.
    pub fn roots(&self) -> Vec<Root> {
        self.roots.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// The folders with names: the home first.
    pub fn name_folders(&self) -> Vec<PathBuf> {
        let roots = self.roots().into_iter().filter(|root| root.kind == RootKind::Ollama);
        std::iter::once(self.home.clone())
            .chain(roots.map(|root| root.path))
            .map(|path| path.join("manifests"))
            .collect()
    }

    /// Where a blob is: in the home, else in a root. The place in the home where it is nowhere.
    pub fn find_blob(&self, digest: &Digest) -> PathBuf {
        let own = self.blob_path(digest);
        let is_file = |path: &Path| matches!(self.fs.meta(path), Ok(Some(meta)) if !meta.is_dir);
        if is_file(&own) {
            return own;
        }
        for root in self.roots() {
            let places: Vec<PathBuf> = match root.kind {
                RootKind::Ollama => vec![root.path.join("blobs").join(blob::blob_name(digest))],
                RootKind::HuggingFace => {
                    let names = self.fs.list(&root.path).unwrap_or_default().into_iter();
                    let repositories = names.filter(|name| name.starts_with("models--"));
                    let blob = |name: String| root.path.join(name).join("blobs").join(digest.hex());
                    repositories.map(blob).collect()
                }
            };
            if let Some(found) = places.into_iter().find(|path| is_file(path)) {
                return found;
            }
        }
        own
    }
}

impl Store {
    /// The other programs' stores that are read in place.
    pub fn roots(&self) -> Vec<Root> {
        self.tree.roots()
    }

    /// Reads another program's store in place from now on. Its names are listed behind those of
    /// this home, and no blob it has is fetched.
    ///
    /// # Errors
    /// [`StoreError::NoRoot`] for a folder that is none; [`StoreError::DiskFull`] or
    /// [`StoreError::Io`].
    pub fn add_root(&self, path: &Path) -> Result<Root, StoreError> {
        let _change = self.lock_changes()?;
        let refused = || StoreError::NoRoot { path: path.to_path_buf() };
        let is_line = path.to_str().is_some_and(|text| !text.contains('\n'));
        if !path.is_absolute() || !is_line || path == self.home() {
            return Err(refused());
        }
        let kind = self.tree.kind(path)?.ok_or_else(refused)?;
        let root = Root { path: path.to_path_buf(), kind };
        let mut roots = self.tree.roots();
        roots.retain(|known| known.path != root.path);
        roots.push(root.clone());
        self.put_roots(roots)?;
        Ok(root)
    }

    /// Reads another program's store no more. Returns whether it was read.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] or [`StoreError::Io`].
    pub fn remove_root(&self, path: &Path) -> Result<bool, StoreError> {
        let _change = self.lock_changes()?;
        let before = self.tree.roots();
        let roots: Vec<Root> = before.iter().filter(|root| root.path != path).cloned().collect();
        let is_known = roots.len() < before.len();
        if is_known {
            self.put_roots(roots)?;
        }
        Ok(is_known)
    }

    fn put_roots(&self, roots: Vec<Root>) -> Result<(), StoreError> {
        let lines = roots.iter().map(|root| format!("{}\n", root.path.display()));
        let lines: String = lines.collect();
        let to = self.home().join(FILE);
        let bytes = lines.as_bytes();
        blob::put_file(self.tree.fs.as_ref(), &self.staging_path(), &to, bytes, 0o600)?;
        *self.tree.roots.write().unwrap_or_else(std::sync::PoisonError::into_inner) = roots;
        Ok(())
    }
}
