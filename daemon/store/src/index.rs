//! The index: what is handy to know and can be found out again. Files are the truth; delete this
//! folder and nothing is lost but a little time.
//!
//! sled 0.34 is opened with care, because its own faults must not become ours: a database that
//! cannot be read is healed by dropping its snapshots, else set aside and begun anew. It can also
//! open as empty where rows were lost, so the number of rows is kept in a file beside it.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use v4_proto::{Digest, Inspection, ModelName};

use crate::{
    error::StoreError,
    fs::{self, Fs, Meta},
    limits,
};

/// How an index came up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// As it was left, or new.
    Whole,
    /// Its snapshots were damaged and dropped; all rows are there.
    Healed,
    /// It was damaged and set aside; begun anew.
    Rebuilt,
}

/// The index of one home.
#[derive(Debug)]
pub(crate) struct Index {
    fs: Arc<dyn Fs>,
    folder: PathBuf,
    /// `None` while another daemon has the home. What is read is not there then, and what is
    /// written is lost, which an index may lose.
    rows: RwLock<Option<Rows>>,
    /// Held while rows change, so that the count beside them is true.
    change: Mutex<()>,
}

/// An open database.
#[derive(Debug, Clone)]
struct Rows {
    db: sled::Db,
    inspections: sled::Tree,
    last_use: sled::Tree,
    stamps: sled::Tree,
}

impl Rows {
    fn n(&self) -> usize {
        self.inspections.len() + self.last_use.len() + self.stamps.len()
    }
}

/// A row of the inspections.
#[derive(Serialize, Deserialize)]
struct Inspected<T> {
    version: u32,
    inspection: T,
}

/// Why sled did not open.
enum Refusal {
    /// The files are damaged.
    Corrupt,
    /// sled panicked on them.
    Panic,
    /// Something that a rebuild would not mend.
    Other(sled::Error),
}

impl Index {
    /// Opens the index in `folder`, mending what can be mended.
    pub fn open(fs: &Arc<dyn Fs>, folder: &Path) -> Result<(Self, Opened), StoreError> {
        let failed = |source| StoreError::Index { path: folder.to_path_buf(), source };
        let db_path = folder.join("db");
        let refusal = match Self::try_open_patiently(fs, folder) {
            Ok(index) => return Ok((index, Opened::Whole)),
            Err(Refusal::Other(error)) => return Err(failed(error)),
            Err(refusal) => refusal,
        };
        if matches!(refusal, Refusal::Corrupt) {
            for name in fs.list(&db_path).map_err(StoreError::io("list", &db_path))? {
                if name.starts_with("snap.") {
                    let path = db_path.join(name);
                    fs.remove_file(&path).map_err(StoreError::io("remove", &path))?;
                }
            }
            if let Ok(index) = Self::try_open(fs, folder) {
                return Ok((index, Opened::Healed));
            }
        }
        let aside = folder.join("db.damaged");
        fs.remove_tree(&aside).map_err(StoreError::io("remove", &aside))?;
        fs.rename(&db_path, &aside).map_err(StoreError::io("rename", &db_path))?;
        let rows = rows_path(folder);
        fs.remove_file(&rows).map_err(StoreError::io("remove", &rows))?;
        match Self::try_open(fs, folder) {
            Ok(index) => Ok((index, Opened::Rebuilt)),
            Err(Refusal::Other(error)) => Err(failed(error)),
            Err(Refusal::Corrupt | Refusal::Panic) => {
                Err(failed(sled::Error::ReportableBug("a new index does not open".into())))
            }
        }
    }

    /// Opens what is there. sled gives its lock back on a thread of its own, a moment after the
    /// drop; since the lock on the home keeps other processes out, that moment is waited for.
    fn try_open_patiently(fs: &Arc<dyn Fs>, folder: &Path) -> Result<Self, Refusal> {
        let deadline = Instant::now() + limits::INDEX_LOCK_WAIT;
        loop {
            match Self::try_open(fs, folder) {
                Err(Refusal::Other(sled::Error::Io(error)))
                    if error.kind() == io::ErrorKind::Other && Instant::now() < deadline =>
                {
                    std::thread::park_timeout(limits::INDEX_LOCK_STEP);
                }
                outcome => return outcome,
            }
        }
    }

    /// Opens what is there and reads all of it once.
    fn try_open(fs: &Arc<dyn Fs>, folder: &Path) -> Result<Self, Refusal> {
        let open = || -> sled::Result<(sled::Db, usize)> {
            let db = sled::Config::new()
                .path(folder.join("db"))
                .cache_capacity(limits::INDEX_CACHE_BYTES)
                .flush_every_ms(None)
                .open()?;
            let mut n_rows = 0;
            for name in db.tree_names() {
                for row in &db.open_tree(name)? {
                    row?;
                    n_rows += 1;
                }
            }
            Ok((db, n_rows))
        };
        let (db, n_rows) = match catch_unwind(AssertUnwindSafe(open)) {
            Ok(Ok(opened)) => opened,
            Ok(Err(sled::Error::Io(error))) => {
                let is_damage = matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData
                );
                return Err(if is_damage {
                    Refusal::Corrupt
                } else {
                    Refusal::Other(error.into())
                });
            }
            Ok(Err(_)) => return Err(Refusal::Corrupt),
            Err(_) => return Err(Refusal::Panic),
        };
        // Fewer rows than were counted is loss that sled did not see. More is a crash between row
        // and count.
        if n_rows < read_rows(fs.as_ref(), folder) {
            return Err(Refusal::Panic);
        }
        let inspections = db.open_tree("inspections").map_err(Refusal::Other)?;
        let last_use = db.open_tree("last_use").map_err(Refusal::Other)?;
        let stamps = db.open_tree("stamps").map_err(Refusal::Other)?;
        let (fs, folder) = (Arc::clone(fs), folder.to_path_buf());
        let rows = RwLock::new(Some(Rows { db, inspections, last_use, stamps }));
        Ok(Self { fs, folder, rows, change: Mutex::new(()) })
    }

    /// Closes the database, so that another daemon can open it.
    pub fn close(&self) {
        // Whoever changes a row now ends first.
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = self.rows.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(rows) = rows {
            // Rows that are lost are found out again.
            let _ = rows.db.flush();
        }
    }

    /// Opens the database again after [`Index::close`].
    pub fn reopen(&self) -> Result<(), StoreError> {
        let (fresh, _) = Self::open(&self.fs, &self.folder)?;
        let rows = fresh.rows.into_inner().unwrap_or_else(PoisonError::into_inner);
        *self.rows.write().unwrap_or_else(PoisonError::into_inner) = rows;
        Ok(())
    }

    /// The database, while it is open. sled's handles are cheap to clone.
    fn rows(&self) -> Option<Rows> {
        self.rows.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The cached inspection of a blob. A row that cannot be read, or says what another version of
    /// v4 looked for, is no row.
    pub fn inspection(&self, digest: &Digest) -> Option<Inspection> {
        let bytes = self.rows()?.inspections.get(digest.as_bytes()).ok().flatten()?;
        let row: Inspected<Inspection> = serde_json::from_slice(&bytes).ok()?;
        (row.version == Inspection::VERSION).then_some(row.inspection)
    }

    /// Keeps the inspection of a blob.
    pub fn put_inspection(&self, digest: &Digest, value: &Inspection) -> Result<(), StoreError> {
        let row = Inspected { version: Inspection::VERSION, inspection: value };
        let bytes = serde_json::to_vec(&row).expect("an inspection has string keys only");
        if bytes.len() > limits::INSPECTION_BYTES {
            return Ok(());
        }
        self.insert(|rows| &rows.inspections, digest.as_bytes(), &bytes)
    }

    /// Forgets a blob that is gone.
    pub fn remove_blob(&self, digest: &Digest) -> Result<(), StoreError> {
        self.remove(|rows| &rows.inspections, digest.as_bytes())?;
        self.remove(|rows| &rows.stamps, digest.as_bytes())
    }

    /// Forgets the inspection of several files together, which is kept under a digest of its own.
    pub fn remove_inspection_of_many(
        &self,
        key: &Digest,
        manifest: &crate::Manifest,
    ) -> Result<(), StoreError> {
        if manifest.digests().contains(key) {
            return Ok(());
        }
        self.remove(|rows| &rows.inspections, key.as_bytes())
    }

    /// Whether a blob's file looked like this when its bytes were last known to be right.
    pub fn is_stamped(&self, digest: &Digest, meta: &Meta) -> bool {
        let rows = self.rows();
        let known = rows.and_then(|rows| rows.stamps.get(digest.as_bytes()).ok().flatten());
        known.is_some_and(|known| known.as_ref() == stamp(meta))
    }

    /// Notes what a blob's file looks like while its bytes are known to be right.
    pub fn put_stamp(&self, digest: &Digest, meta: &Meta) -> Result<(), StoreError> {
        self.insert(|rows| &rows.stamps, digest.as_bytes(), &stamp(meta))
    }

    /// When a name was last used, if it is known.
    pub fn last_use(&self, name: &ModelName) -> Option<SystemTime> {
        let bytes = self.rows()?.last_use.get(name.to_string()).ok().flatten()?;
        let millis = u64::from_le_bytes(bytes.as_ref().try_into().ok()?);
        UNIX_EPOCH.checked_add(Duration::from_millis(millis))
    }

    /// Notes that a name is used now.
    pub fn touch(&self, name: &ModelName, now: SystemTime) -> Result<(), StoreError> {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        self.insert(|rows| &rows.last_use, name.to_string().as_bytes(), &millis.to_le_bytes())
    }

    /// Forgets a name.
    pub fn remove_name(&self, name: &ModelName) -> Result<(), StoreError> {
        self.remove(|rows| &rows.last_use, name.to_string().as_bytes())
    }

    /// The row first, the count after it: a crash between them leaves a row too many, which is no
    /// loss.
    fn insert(
        &self,
        tree: fn(&Rows) -> &sled::Tree,
        key: &[u8],
        value: &[u8],
    ) -> Result<(), StoreError> {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(rows) = self.rows() else { return Ok(()) };
        let is_new = tree(&rows).insert(key, value).map_err(self.failed())?.is_none();
        if is_new {
            rows.db.flush().map_err(self.failed())?;
            // sled's flush hands the bytes to the system; the sync brings them to the disk.
            let path = self.folder.join("db").join("db");
            let file = self.fs.open(&path).and_then(|mut file| file.sync());
            file.map_err(StoreError::io("sync", &path))?;
            self.write_rows(rows.n())?;
        }
        Ok(())
    }

    /// The count first, the row after it, for the same reason.
    fn remove(&self, tree: fn(&Rows) -> &sled::Tree, key: &[u8]) -> Result<(), StoreError> {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(rows) = self.rows() else { return Ok(()) };
        let tree = tree(&rows);
        if tree.contains_key(key).map_err(self.failed())? {
            self.write_rows(rows.n().saturating_sub(1))?;
            tree.remove(key).map_err(self.failed())?;
        }
        Ok(())
    }

    fn write_rows(&self, n_rows: usize) -> Result<(), StoreError> {
        let staging = self.folder.join("rows.new");
        let bytes = n_rows.to_string();
        let to = rows_path(&self.folder);
        crate::blob::put_file(self.fs.as_ref(), &staging, &to, bytes.as_bytes(), 0o600)
    }

    fn failed(&self) -> impl FnOnce(sled::Error) -> StoreError {
        let path = self.folder.clone();
        move |source| StoreError::Index { path, source }
    }
}

/// Length and times of a file, as bytes to compare.
fn stamp(meta: &Meta) -> [u8; 40] {
    let mut bytes = [0; 40];
    let nanos = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let (len, times) = bytes.split_at_mut(8);
    let (modified, changed) = times.split_at_mut(16);
    len.copy_from_slice(&meta.len.to_le_bytes());
    modified.copy_from_slice(&nanos(meta.modified).to_le_bytes());
    changed.copy_from_slice(&nanos(meta.changed).to_le_bytes());
    bytes
}

fn rows_path(folder: &Path) -> PathBuf {
    folder.join("rows")
}

/// The rows there were at the last count; 0 where nobody counted.
fn read_rows(fs: &dyn Fs, folder: &Path) -> usize {
    let bytes = fs::read(fs, &rows_path(folder), 32).unwrap_or_default();
    std::str::from_utf8(&bytes).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use v4_proto::{Layout, ModelInfo};

    use super::*;
    use crate::fs::RealFs;

    #[test]
    fn what_another_version_looked_for_is_looked_for_again() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let fs: Arc<dyn Fs> = Arc::new(RealFs);
        let (index, _) = Index::open(&fs, folder.path()).expect("opens");
        let info = ModelInfo {
            format: "gguf".into(),
            arch: "x".into(),
            supported: true,
            quant: "Q8_0".into(),
            n_params: 1,
            context_length: 2,
            embedding_length: 3,
            n_layers: 4,
            weight_bytes: 5,
            kv_bytes_per_token: 6,
            layout: Layout::default(),
            abilities: Vec::new(),
        };
        let metadata = serde_json::Map::new();
        let inspection = Inspection { info, metadata, chat_template: None, tensors: Vec::new() };
        let digest = crate::sha256(b"x");
        index.put_inspection(&digest, &inspection).expect("is kept");
        assert_eq!(index.inspection(&digest), Some(inspection.clone()));
        let version = Inspection::VERSION + 1;
        let later = serde_json::to_vec(&Inspected { version, inspection: &inspection });
        let before = serde_json::to_vec(&inspection);
        for row in [later, before] {
            let row = row.expect("encodes");
            index.insert(|rows| &rows.inspections, digest.as_bytes(), &row).expect("is kept");
            assert_eq!(index.inspection(&digest), None);
        }
    }
}
