//! [`MemoryFs`]: a disk in memory that knows what has reached it, so that the power can be cut.
//!
//! A file's bytes are safe when the file was synced, a name (made, moved or removed) when its
//! folder was. What was not synced may or may not be there after a cut; [`Cut`] says which.

use std::{
    collections::BTreeMap,
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex, MutexGuard},
    time::SystemTime,
};

use v4_store::fs::{File, Fs, Lock, Meta};

/// What a power cut leaves of that which was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Nothing.
    Strict,
    /// The names are as they were, but the bytes behind them are gone.
    NamesSurvive,
    /// The bytes are there, but the names are not.
    BytesSurvive,
    /// The bytes are there, and what was done to the names in `blobs/`, but to no others.
    BlobsSurvive,
}

/// A file or a folder.
#[derive(Debug, Clone)]
enum Node {
    Dir,
    File(usize),
}

#[derive(Debug, Clone, Default)]
struct Bytes {
    now: Vec<u8>,
    safe: Vec<u8>,
}

#[derive(Debug, Clone, Default)]
struct Disk {
    files: Vec<Bytes>,
    now: BTreeMap<PathBuf, Node>,
    safe: BTreeMap<PathBuf, Node>,
    n_changes: usize,
    power_ends_at: usize,
}

impl Disk {
    fn change(&mut self) -> io::Result<()> {
        self.n_changes += 1;
        if self.n_changes >= self.power_ends_at {
            return Err(io::Error::other("the power is gone"));
        }
        Ok(())
    }

    fn file(&self, path: &Path) -> io::Result<usize> {
        match self.now.get(path) {
            Some(Node::File(id)) => Ok(*id),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// When all files were last changed: nothing here asks how old one is, but some ask whether its
/// time is still the same.
static START: LazyLock<SystemTime> = LazyLock::new(SystemTime::now);

/// A disk in memory.
#[derive(Debug, Clone)]
pub struct MemoryFs(Arc<Mutex<Disk>>);

impl MemoryFs {
    /// An empty disk in which `root`'s parents exist, and all is safe.
    pub fn new(root: &Path) -> Self {
        let dirs = root.ancestors().skip(1).map(|path| (path.to_path_buf(), Node::Dir));
        let now: BTreeMap<_, _> = dirs.collect();
        let disk = Disk { safe: now.clone(), now, power_ends_at: usize::MAX, ..Disk::default() };
        Self(Arc::new(Mutex::new(disk)))
    }

    /// A copy whose power ends at the `at`th change, counted from 1: that one and all after it
    /// fail.
    pub fn with_power_until(&self, at: usize) -> Self {
        let disk = Disk { n_changes: 0, power_ends_at: at, ..self.disk().clone() };
        Self(Arc::new(Mutex::new(disk)))
    }

    /// The disk after the power came back.
    pub fn after(&self, cut: Cut) -> Self {
        let mut disk = self.disk().clone();
        if cut != Cut::NamesSurvive {
            let is_blob = |at: &Path| at.parent().is_some_and(|dir| dir.ends_with("blobs"));
            let survives = |at: &Path| cut == Cut::BlobsSurvive && is_blob(at);
            let mut names = disk.safe.clone();
            names.retain(|at, _| !survives(at));
            let blobs = disk.now.iter().filter(|(at, _)| survives(at));
            names.extend(blobs.map(|(at, node)| (at.clone(), node.clone())));
            disk.now = names;
        }
        if matches!(cut, Cut::Strict | Cut::NamesSurvive) {
            for file in &mut disk.files {
                file.now = file.safe.clone();
            }
        }
        disk.safe = disk.now.clone();
        for file in &mut disk.files {
            file.safe = file.now.clone();
        }
        disk.power_ends_at = usize::MAX;
        Self(Arc::new(Mutex::new(disk)))
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }
}

struct MemoryFile {
    fs: MemoryFs,
    id: usize,
    at: usize,
}

impl Read for MemoryFile {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let disk = self.fs.disk();
        let n = disk.files[self.id].now.get(self.at..).unwrap_or_default().read(buf)?;
        self.at += n;
        Ok(n)
    }
}

impl Seek for MemoryFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let SeekFrom::Start(at) = to else { return Err(io::ErrorKind::Unsupported.into()) };
        self.at = usize::try_from(at).unwrap();
        Ok(at)
    }
}

impl Write for MemoryFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut disk = self.fs.disk();
        disk.change()?;
        let bytes = &mut disk.files[self.id].now;
        bytes.resize(bytes.len().max(self.at + buf.len()), 0);
        bytes[self.at..self.at + buf.len()].copy_from_slice(buf);
        self.at += buf.len();
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl File for MemoryFile {
    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.fs.disk();
        disk.change()?;
        let file = &mut disk.files[self.id];
        file.safe = file.now.clone();
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        let mut disk = self.fs.disk();
        disk.change()?;
        disk.files[self.id].now.resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }
}

impl Fs for MemoryFs {
    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        let mut disk = self.disk();
        disk.change()?;
        Ok(disk.now.insert(path.to_path_buf(), Node::Dir).is_none())
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let mut disk = self.disk();
        let known = disk.file(path).ok();
        let id = if let Some(id) = known {
            id
        } else {
            disk.change()?;
            let id = disk.files.len();
            disk.files.push(Bytes::default());
            disk.now.insert(path.to_path_buf(), Node::File(id));
            id
        };
        Ok(Box::new(MemoryFile { fs: self.clone(), id, at: 0 }))
    }

    fn open_read(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let id = self.disk().file(path)?;
        Ok(Box::new(MemoryFile { fs: self.clone(), id, at: 0 }))
    }

    fn meta(&self, path: &Path) -> io::Result<Option<Meta>> {
        let disk = self.disk();
        let modified = *START;
        Ok(disk.now.get(path).map(|node| match node {
            Node::Dir => Meta { len: 0, modified, changed: modified, n_names: 1, is_dir: true },
            Node::File(id) => {
                let is_it = |node: &&Node| matches!(node, Node::File(other) if other == id);
                let n_names = disk.now.values().filter(is_it).count() as u64;
                let len = disk.files[*id].now.len() as u64;
                Meta { len, modified, changed: modified, n_names, is_dir: false }
            }
        }))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let disk = self.disk();
        let inside = disk.now.keys().filter(|at| at.parent() == Some(path));
        let names = inside.filter_map(|at| at.file_name()?.to_str());
        Ok(names.map(str::to_owned).collect())
    }

    fn set_mode(&self, path: &Path, _mode: u32) -> io::Result<()> {
        let mut disk = self.disk();
        disk.file(path)?;
        disk.change()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.file(from)?;
        disk.change()?;
        let node = disk.now.remove(from).ok_or(io::ErrorKind::NotFound)?;
        disk.now.insert(to.to_path_buf(), node);
        Ok(())
    }

    fn clone_file(&self, _from: &Path, _to: &Path) -> io::Result<bool> {
        Ok(false)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<bool> {
        let mut disk = self.disk();
        let id = disk.file(from)?;
        disk.change()?;
        disk.now.insert(to.to_path_buf(), Node::File(id));
        Ok(true)
    }

    fn remove_file(&self, path: &Path) -> io::Result<bool> {
        let mut disk = self.disk();
        disk.change()?;
        Ok(disk.now.remove(path).is_some())
    }

    fn remove_empty_dir(&self, path: &Path) -> io::Result<bool> {
        let mut disk = self.disk();
        disk.change()?;
        let is_empty = !disk.now.keys().any(|at| at.parent() == Some(path));
        if is_empty {
            disk.now.remove(path);
        }
        Ok(is_empty)
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.change()?;
        disk.now.retain(|at, _| !at.starts_with(path));
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.change()?;
        let is_inside = |at: &Path| at.parent() == Some(path);
        // A folder that is gone takes what was in it along.
        let gone: Vec<PathBuf> = disk
            .safe
            .keys()
            .filter(|at| is_inside(at) && !disk.now.contains_key(*at))
            .cloned()
            .collect();
        disk.safe.retain(|at, _| !gone.iter().any(|gone| at.starts_with(gone)));
        let here: Vec<(PathBuf, Node)> = disk
            .now
            .iter()
            .filter(|(at, _)| is_inside(at))
            .map(|(at, node)| (at.clone(), node.clone()))
            .collect();
        disk.safe.extend(here);
        Ok(())
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn lock(&self, _path: &Path) -> io::Result<Option<Lock>> {
        Ok(Some(Box::new(())))
    }
}
