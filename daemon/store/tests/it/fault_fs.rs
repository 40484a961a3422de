//! [`FaultFs`]: the real file system, but full after some bytes, or with the nth change as the
//! last thing the process does.

use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use v4_store::fs::{File, Fs, Lock, Meta, RealFs};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// At the nth change the process aborts; a write has done its first half. What is only looked
    /// at or read is no change.
    Abort,
    /// A write beyond so many bytes fails, and so do all after it until [`FaultFs::heal`].
    DiskFull,
    /// What was looked at is gone when it is opened to read.
    Vanish,
    /// No file can be removed.
    Stuck,
}

#[derive(Debug)]
struct State {
    fault: Fault,
    /// Changes, or bytes written.
    n: AtomicU64,
    at: AtomicU64,
}

/// The real file system with a fault in it.
#[derive(Debug, Clone)]
pub struct FaultFs(Arc<State>);

impl FaultFs {
    /// The fault happens at the `at`th change, counted from 1, or after `at` bytes.
    pub fn new(fault: Fault, at: u64) -> Self {
        Self(Arc::new(State { fault, n: AtomicU64::new(0), at: AtomicU64::new(at) }))
    }

    /// From now on, the fault happens after `n` more.
    pub fn fail_after(&self, n: u64) {
        self.0.at.store(self.0.n.load(Ordering::SeqCst) + n, Ordering::SeqCst);
    }

    /// No more faults.
    pub fn heal(&self) {
        self.0.at.store(u64::MAX, Ordering::SeqCst);
    }

    /// Whether the fault happens, `n` further on.
    fn is_time(&self, n: u64) -> bool {
        let before = self.0.n.fetch_add(n, Ordering::SeqCst);
        let at = self.0.at.load(Ordering::SeqCst);
        match self.0.fault {
            Fault::Abort => before + n == at,
            Fault::DiskFull | Fault::Vanish | Fault::Stuck => before + n > at,
        }
    }

    fn change(&self) {
        if self.0.fault == Fault::Abort && self.is_time(1) {
            std::process::abort();
        }
    }
}

struct FaultFile {
    inner: Box<dyn File>,
    fs: FaultFs,
}

impl Read for FaultFile {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buf)
    }
}

impl Seek for FaultFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

impl Write for FaultFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self.fs.0.fault {
            Fault::Abort if self.fs.is_time(1) => {
                self.inner.write_all(&buf[..buf.len() / 2])?;
                std::process::abort()
            }
            Fault::DiskFull if self.fs.is_time(buf.len() as u64) => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => self.inner.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl File for FaultFile {
    fn sync(&mut self) -> io::Result<()> {
        self.fs.change();
        self.inner.sync()
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        self.fs.change();
        self.inner.set_len(len)
    }
}

impl Fs for FaultFs {
    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        self.change();
        RealFs.create_dir(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        self.change();
        Ok(Box::new(FaultFile { inner: RealFs.open(path)?, fs: self.clone() }))
    }

    fn open_read(&self, path: &Path) -> io::Result<Box<dyn File>> {
        if self.0.fault == Fault::Vanish && self.is_time(1) {
            return Err(io::ErrorKind::NotFound.into());
        }
        RealFs.open_read(path)
    }

    fn meta(&self, path: &Path) -> io::Result<Option<Meta>> {
        RealFs.meta(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        RealFs.list(path)
    }

    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        self.change();
        RealFs.set_mode(path, mode)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change();
        RealFs.rename(from, to)
    }

    fn clone_file(&self, from: &Path, to: &Path) -> io::Result<bool> {
        self.change();
        RealFs.clone_file(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<bool> {
        self.change();
        RealFs.link(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<bool> {
        self.change();
        if self.0.fault == Fault::Stuck && self.is_time(1) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        RealFs.remove_file(path)
    }

    fn remove_empty_dir(&self, path: &Path) -> io::Result<bool> {
        self.change();
        RealFs.remove_empty_dir(path)
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        self.change();
        RealFs.remove_tree(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.change();
        RealFs.sync_dir(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let at = self.0.at.load(Ordering::SeqCst);
        if self.0.fault == Fault::DiskFull && at != u64::MAX {
            return Ok(at.saturating_sub(self.0.n.load(Ordering::SeqCst)));
        }
        RealFs.free_bytes(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Lock>> {
        RealFs.lock(path)
    }
}
