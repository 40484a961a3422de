//! The files of blocks: the engine's only access to files that are no model's. A folder a model,
//! mode 0700, a file a block, mode 0600, named by its chain. A file is complete or it is refused:
//! it is renamed into place, and a checksum covers what a cut of the power may leave of it. Nothing
//! is synced: what is lost is computed again. Who uses a file sets its time, and the files that
//! were used longest ago go first when all models together have more than the quota.

#![expect(clippy::disallowed_methods, reason = "blocks of the cache are files of the engine alone")]

use std::cmp::Reverse;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::chain::Chain;
use crate::limits;

/// How a file begins.
const MAGIC: &[u8; 8] = b"v4 kv 1\n";
/// The magic, the chain, the number of bytes that follow, their CRC-32 with the chain's.
const HEADER_BYTES: usize = 8 + 32 + 8 + 4;
/// How the name of a file begins that is still being written.
const GROWING: &str = ".growing-";

/// The blocks of one model.
#[derive(Debug)]
pub(super) struct Folder {
    /// Of all models.
    root: PathBuf,
    own: PathBuf,
    /// Bytes that all models together may take.
    quota_bytes: u64,
    /// Bytes of a block.
    block_bytes: usize,
}

/// What came of reading a block.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// Its bytes.
    Whole(Vec<u8>),
    /// There is no such file, or it cannot be read.
    Missing,
    /// What is there is not that block; it was removed.
    Refused,
}

/// A file of a block, as the quota sees it.
struct Kept {
    used: SystemTime,
    /// Of files used together the ends of conversations go first.
    depth: Reverse<usize>,
    path: PathBuf,
    n_bytes: u64,
}

impl Folder {
    /// The folder `name` below `root`, made where it is not there.
    pub fn open(root: &Path, name: &str, quota_bytes: u64, block_bytes: usize) -> io::Result<Self> {
        let own = root.join(name);
        DirBuilder::new().recursive(true).mode(0o700).create(&own)?;
        for folder in [root, &own] {
            // Of somebody else's folder this fails: nothing is read from there.
            fs::set_permissions(folder, Permissions::from_mode(0o700))?;
        }
        Ok(Self { root: root.to_owned(), own, quota_bytes, block_bytes })
    }

    fn path(&self, chain: &Chain, depth: usize) -> PathBuf {
        self.own.join(format!("{chain}-{depth}"))
    }

    /// Whether there is a file for a block.
    pub fn has(&self, chain: &Chain, depth: usize) -> bool {
        fs::metadata(self.path(chain, depth)).is_ok()
    }

    /// Reads a block and counts it as used at `now`.
    pub fn read(&self, chain: &Chain, depth: usize, now: SystemTime) -> Reading {
        let path = self.path(chain, depth);
        match self.read_file(&path, chain, now) {
            Ok(Some(bytes)) => Reading::Whole(bytes),
            Ok(None) => {
                let _ = fs::remove_file(&path);
                Reading::Refused
            }
            Err(_) => Reading::Missing,
        }
    }

    /// The bytes of a file; `None` where it is not what its name says.
    fn read_file(
        &self,
        path: &Path,
        chain: &Chain,
        now: SystemTime,
    ) -> io::Result<Option<Vec<u8>>> {
        let mut file = File::open(path)?;
        file.set_modified(now)?;
        let mut header = [0; HEADER_BYTES];
        match file.read_exact(&mut header) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        let mut bytes = Vec::with_capacity(self.block_bytes + 1);
        // One byte more, so that a file that is too long is seen.
        file.take(self.block_bytes as u64 + 1).read_to_end(&mut bytes)?;
        let is_good = bytes.len() == self.block_bytes && header == header_of(chain, &bytes);
        Ok(is_good.then_some(bytes))
    }

    /// Writes a block where there is no file for it, and counts it as used at `now`. The bytes that
    /// it added.
    pub fn write(
        &self,
        (chain, depth): (&Chain, usize),
        bytes: &[u8],
        now: SystemTime,
    ) -> io::Result<u64> {
        let path = self.path(chain, depth);
        if used(&path, now).is_ok() {
            return Ok(0);
        }
        let growing = self.own.join(format!("{GROWING}{}-{chain}", std::process::id()));
        let written = write_file(&growing, &header_of(chain, bytes), bytes, now)
            .and_then(|()| fs::rename(&growing, &path));
        if written.is_err() {
            // A disk that is full shall not stay so for this.
            let _ = fs::remove_file(&growing);
        }
        written.map(|()| self.file_bytes())
    }

    /// Bytes that may be written before [`Folder::trim`] is due again.
    pub fn allowance(&self) -> u64 {
        let share = self.quota_bytes / limits::QUOTA_SHARE;
        share.max(self.file_bytes()).min(self.quota_bytes)
    }

    /// Bytes of a block's file.
    pub fn file_bytes(&self) -> u64 {
        (HEADER_BYTES + self.block_bytes) as u64
    }

    /// Removes files, least lately used first, until all models' together leave
    /// [`Folder::allowance`] of the quota free.
    pub fn trim(&self) -> io::Result<()> {
        let mut kept = Vec::new();
        for folder in fs::read_dir(&self.root)? {
            let folder = folder?;
            if folder.file_type()?.is_dir() {
                look(&folder.path(), &mut kept)?;
            }
        }
        let most = self.quota_bytes - self.allowance();
        let mut total: u64 = kept.iter().map(|file| file.n_bytes).sum();
        kept.sort_by(|a, b| (a.used, a.depth, &a.path).cmp(&(b.used, b.depth, &b.path)));
        for file in kept {
            if total <= most {
                break;
            }
            // Another runner may have been faster.
            if fs::remove_file(&file.path).is_ok() {
                total -= file.n_bytes;
            }
        }
        Ok(())
    }
}

/// The files of a model's folder; those that a killed process left half-written go.
fn look(folder: &Path, kept: &mut Vec<Kept>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (name, path) = (entry.file_name(), entry.path());
        let name = name.to_string_lossy();
        // It may be gone already: another runner trims too.
        let Ok(meta) = entry.metadata() else { continue };
        let used = meta.modified()?;
        let is_old = || used.elapsed().is_ok_and(|age| age > limits::LEFT_BEHIND);
        if name.starts_with(GROWING) && is_old() {
            fs::remove_file(path)?;
            continue;
        }
        // What has another name is not ours.
        let depth = name.split_once('-').filter(|(chain, _)| chain.len() == 64);
        let depth = depth.and_then(|(_, depth)| depth.parse().ok());
        if let Some(depth) = depth.filter(|_| meta.is_file()) {
            kept.push(Kept { used, depth: Reverse(depth), path, n_bytes: meta.len() });
        }
    }
    Ok(())
}

/// Sets a file's time.
fn used(path: &Path, now: SystemTime) -> io::Result<()> {
    File::open(path)?.set_modified(now)
}

fn write_file(path: &Path, header: &[u8], bytes: &[u8], now: SystemTime) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(header)?;
    file.write_all(bytes)?;
    file.set_modified(now)
}

fn header_of(chain: &Chain, bytes: &[u8]) -> [u8; HEADER_BYTES] {
    let mut crc = crc32fast::Hasher::new();
    crc.update(chain.bytes());
    crc.update(bytes);
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..40].copy_from_slice(chain.bytes());
    header[40..48].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    header[48..].copy_from_slice(&crc.finalize().to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const BLOCK: usize = 1000;

    /// A folder that goes with the test.
    pub struct Scratch(pub PathBuf);

    impl Scratch {
        pub fn new(name: &str) -> Self {
            let name = format!("v4-kv-{}-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn chain(n: u32) -> Chain {
        Chain::root(&["test"]).then(&[n])
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds)
    }

    fn whole(n: u8) -> Vec<u8> {
        vec![n; BLOCK]
    }

    #[test]
    fn a_block_is_read_back_and_only_by_its_owner() {
        let scratch = Scratch::new("back");
        let folder = Folder::open(&scratch.0, "m", 1 << 20, BLOCK).expect("a folder");
        assert_eq!(folder.read(&chain(1), 0, at(0)), Reading::Missing);
        assert!(!folder.has(&chain(1), 0));
        let written = folder.write((&chain(1), 0), &whole(7), at(0)).expect("written");
        assert_eq!(written, (BLOCK + HEADER_BYTES) as u64);
        assert_eq!(folder.write((&chain(1), 0), &whole(7), at(5)).expect("there"), 0);
        assert!(folder.has(&chain(1), 0));
        assert_eq!(folder.read(&chain(1), 0, at(9)), Reading::Whole(whole(7)));
        let path = folder.path(&chain(1), 0);
        let mode = |path: &Path| fs::metadata(path).expect("it is").permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&folder.own), mode(&folder.root)), (0o600, 0o700, 0o700));
        assert_eq!(fs::metadata(&path).and_then(|meta| meta.modified()).expect("a time"), at(9));
        // A folder that others could enter is closed.
        fs::set_permissions(&folder.own, Permissions::from_mode(0o755)).expect("ours");
        Folder::open(&scratch.0, "m", 1 << 20, BLOCK).expect("a folder");
        assert_eq!(mode(&folder.own), 0o700);
    }

    #[test]
    fn what_is_not_the_block_is_refused_and_goes() {
        let scratch = Scratch::new("refused");
        let folder = Folder::open(&scratch.0, "m", 1 << 20, BLOCK).expect("a folder");
        let path = folder.path(&chain(1), 0);
        folder.write((&chain(1), 0), &whole(7), at(0)).expect("written");
        let good = fs::read(&path).expect("a file");
        let flip = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            bytes
        };
        let mut bad: Vec<Vec<u8>> = [0, 9, 40, 48, HEADER_BYTES, good.len() - 1].map(flip).into();
        // Cut anywhere, too long, empty, zeros as a power cut leaves them.
        bad.extend([0, 3, HEADER_BYTES, good.len() - 1].map(|n| good[..n].to_vec()));
        bad.push([&good[..], b"x"].concat());
        bad.push(vec![0; good.len()]);
        for bytes in bad {
            fs::write(&path, &bytes).expect("written");
            assert_eq!(folder.read(&chain(1), 0, at(0)), Reading::Refused, "{}", bytes.len());
            assert!(!path.exists(), "it is written anew next time");
        }
        // A good file under another name is another block's.
        fs::write(folder.path(&chain(2), 0), &good).expect("written");
        assert_eq!(folder.read(&chain(2), 0, at(0)), Reading::Refused);
        fs::write(&path, &good).expect("written");
        assert_eq!(folder.read(&chain(1), 0, at(0)), Reading::Whole(whole(7)));
    }

    #[test]
    fn the_quota_is_held_over_all_models_least_lately_used_first() {
        let scratch = Scratch::new("quota");
        let file = (BLOCK + HEADER_BYTES) as u64;
        // Ten files and the one that may be written next.
        let quota = file * 11;
        let open = |name| Folder::open(&scratch.0, name, quota, BLOCK).expect("a folder");
        let (old, new) = (open("old"), open("new"));
        for n in 0..6 {
            old.write((&chain(n), n as usize), &whole(1), at(100)).expect("written");
            new.write((&chain(n), n as usize), &whole(1), at(200)).expect("written");
        }
        let stranger = scratch.0.join("new").join("notes.txt");
        fs::write(&stranger, [0; 5000]).expect("written");
        let growing = |age| {
            let path = scratch.0.join("new").join(format!("{GROWING}{age}"));
            fs::write(&path, b"x").expect("written");
            used(&path, SystemTime::now() - Duration::from_secs(age)).expect("set");
            path
        };
        let (fresh, left) = (growing(1), growing(7200));
        // One of the old conversation was just read.
        assert!(matches!(old.read(&chain(5), 5, at(300)), Reading::Whole(_)));
        new.trim().expect("trimmed");
        let has = |folder: &Folder| -> Vec<u32> {
            (0..6).filter(|&n| folder.has(&chain(n), n as usize)).collect()
        };
        assert_eq!(has(&old), [0, 1, 2, 5], "the ends of the oldest go first");
        assert_eq!(has(&new), [0, 1, 2, 3, 4, 5]);
        assert!(stranger.exists() && fresh.exists() && !left.exists());
        new.trim().expect("trimmed");
        assert_eq!(has(&old).len() + has(&new).len(), 10, "enough is enough");
    }
}
