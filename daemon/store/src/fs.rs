//! [`Fs`]: every file-system call of the left column. Nothing else in it calls `std::fs`.
//!
//! The store is written against the trait, so that a test can fail or abort at the nth call and
//! can model what a power cut leaves. The free functions at the end are for the few files outside
//! the store that the server needs.

// The one place where these calls are allowed: everybody else comes through here.
#![allow(clippy::disallowed_methods)]

use std::{
    fmt, fs,
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// An open file.
pub trait File: Read + Write + Seek + Send {
    /// Brings the file's bytes and length to the disk.
    ///
    /// # Errors
    /// What the system says.
    fn sync(&mut self) -> io::Result<()>;

    /// Cuts or extends the file.
    ///
    /// # Errors
    /// What the system says.
    fn set_len(&mut self, len: u64) -> io::Result<()>;
}

/// What is known of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Bytes.
    pub len: u64,
    /// When its bytes last changed, as far as nobody set it back.
    pub modified: SystemTime,
    /// When anything of it last changed, this time itself included: nobody can set it back.
    pub changed: SystemTime,
    /// How many names it has.
    pub n_names: u64,
    /// A folder.
    pub is_dir: bool,
}

/// What keeps a lock; dropping it gives the lock back.
pub type Lock = Box<dyn fmt::Debug + Send + Sync>;

/// The file system as the store uses it. Each method is one step that can fail or be the last one
/// before a crash.
pub trait Fs: fmt::Debug + Send + Sync {
    /// Makes a folder of mode 0700. One that exists is left as it is. Returns whether it was made.
    ///
    /// # Errors
    /// What the system says.
    fn create_dir(&self, path: &Path) -> io::Result<bool>;

    /// Opens a file to read and write, making it (mode 0600) where there is none.
    ///
    /// # Errors
    /// What the system says.
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>>;

    /// Opens a file to read.
    ///
    /// # Errors
    /// What the system says.
    fn open_read(&self, path: &Path) -> io::Result<Box<dyn File>>;

    /// Facts of a path, or `None` where nothing is.
    ///
    /// # Errors
    /// What the system says, other than that nothing is there.
    fn meta(&self, path: &Path) -> io::Result<Option<Meta>>;

    /// The names in a folder, sorted; names that are not UTF-8 are left out, since the store makes
    /// none. A folder that is not there is empty.
    ///
    /// # Errors
    /// What the system says.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;

    /// Sets a file's mode bits.
    ///
    /// # Errors
    /// What the system says.
    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()>;

    /// Moves a file or folder within the file system, replacing a file that is there.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes a new file that shares its bytes with another until one of the two is written. Returns
    /// `false`, and leaves nothing, where the file system has no such files.
    ///
    /// # Errors
    /// What the system says of `from`.
    fn clone_file(&self, from: &Path, to: &Path) -> io::Result<bool>;

    /// Gives a file another name. Returns `false` where the file system cannot.
    ///
    /// # Errors
    /// What the system says of `from`.
    fn link(&self, from: &Path, to: &Path) -> io::Result<bool>;

    /// Removes a file. Returns whether there was one.
    ///
    /// # Errors
    /// What the system says.
    fn remove_file(&self, path: &Path) -> io::Result<bool>;

    /// Removes an empty folder. Returns whether it is gone; one that is not empty stays.
    ///
    /// # Errors
    /// What the system says.
    fn remove_empty_dir(&self, path: &Path) -> io::Result<bool>;

    /// Removes a folder with all it holds. Nothing there is no error.
    ///
    /// # Errors
    /// What the system says.
    fn remove_tree(&self, path: &Path) -> io::Result<()>;

    /// Brings a folder's names to the disk.
    ///
    /// # Errors
    /// What the system says.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Bytes that this user may still write to the file system that has `path`.
    ///
    /// # Errors
    /// What the system says.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;

    /// Takes the lock that a file stands for; `None` when somebody else has it.
    ///
    /// # Errors
    /// What the system says.
    fn lock(&self, path: &Path) -> io::Result<Option<Lock>>;
}

/// Reads a whole file of at most `max_bytes`.
///
/// # Errors
/// What the system says; [`io::ErrorKind::FileTooLarge`] beyond `max_bytes`.
pub fn read(fs: &dyn Fs, path: &Path, max_bytes: usize) -> io::Result<Vec<u8>> {
    let limit = u64::try_from(max_bytes).unwrap_or(u64::MAX - 1);
    // Manifests and their small roles are read for every request, each in one go.
    let mut bytes = Vec::with_capacity(max_bytes.min(4 << 10));
    fs.open_read(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() > max_bytes {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// The real file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealFs;

impl File for fs::File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        fs::File::set_len(self, len)
    }
}

impl Fs for RealFs {
    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        Ok(Box::new(options.open(path)?))
    }

    fn open_read(&self, path: &Path) -> io::Result<Box<dyn File>> {
        Ok(Box::new(fs::File::open(path)?))
    }

    fn meta(&self, path: &Path) -> io::Result<Option<Meta>> {
        match fs::metadata(path) {
            Ok(meta) => Ok(Some(Meta {
                len: meta.len(),
                modified: meta.modified()?,
                changed: changed(&meta),
                n_names: meta.nlink(),
                is_dir: meta.is_dir(),
            })),
            Err(error) => is_absent(&error).then_some(None).ok_or(error),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let items = match fs::read_dir(path) {
            Ok(items) => items,
            Err(error) => return is_absent(&error).then(Vec::new).ok_or(error),
        };
        let mut names = Vec::new();
        for item in items {
            names.extend(item?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }

    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn clone_file(&self, from: &Path, to: &Path) -> io::Result<bool> {
        let from = fs::File::open(from)?;
        let mut options = fs::OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(to)?;
        let is_cloned = rustix::fs::ioctl_ficlone(&file, &from).is_ok();
        if !is_cloned {
            fs::remove_file(to)?;
        }
        Ok(is_cloned)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<bool> {
        // A link to a symbolic link would be none to the bytes.
        let from = fs::canonicalize(from)?;
        Ok(fs::hard_link(from, to).is_ok())
    }

    fn remove_file(&self, path: &Path) -> io::Result<bool> {
        match fs::remove_file(path) {
            Ok(()) => Ok(true),
            Err(error) => is_absent(&error).then_some(false).ok_or(error),
        }
    }

    fn remove_empty_dir(&self, path: &Path) -> io::Result<bool> {
        match fs::remove_dir(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(false),
            Err(error) => is_absent(&error).then_some(true).ok_or(error),
        }
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        match fs::remove_dir_all(path) {
            Err(error) if !is_absent(&error) => Err(error),
            _ => Ok(()),
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        fs::File::open(path)?.sync_all()
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Lock>> {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(Held(file)))),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

/// A lock that is held.
#[derive(Debug)]
struct Held(fs::File);

impl Drop for Held {
    /// Gives the lock back now. Closing the file would not do: a process that is started at this
    /// moment has a copy of it until it becomes another program, and the lock lives as long as any
    /// copy.
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

/// When anything of a file last changed.
fn changed(meta: &fs::Metadata) -> SystemTime {
    let nanos = u64::try_from(meta.ctime_nsec()).unwrap_or(0);
    let since = u64::try_from(meta.ctime()).map(Duration::from_secs).unwrap_or_default();
    UNIX_EPOCH + since + Duration::from_nanos(nanos)
}

/// Whether an error says that nothing is at the path.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Opens a file of mode 0600 to append to, for a log.
///
/// # Errors
/// What the system says.
pub fn open_append(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// Makes a folder of mode 0700 with the parents it needs, for a socket or a home. One that exists
/// is left as it is.
///
/// # Errors
/// What the system says.
pub fn bind_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Removes a socket that a daemon left behind. Nothing there is no error; anything that is not a
/// socket stays.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] where something else is; otherwise what the system says.
pub fn remove_socket(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => fs::remove_file(path),
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if is_absent(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a socket usable by its owner alone (mode 0600).
///
/// # Errors
/// What the system says.
pub fn set_private(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
}

/// How many descriptors this process may have open, after its own limit was raised to `wanted` as
/// far as the system lets it.
pub fn descriptors(wanted: u64) -> u64 {
    use rustix::process::{Resource, getrlimit, setrlimit};

    let mut limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX).min(wanted);
    if limit.current.is_some_and(|current| current < most) {
        limit.current = Some(most);
        // What is refused leaves it as it was.
        let _ = setrlimit(Resource::Nofile, limit);
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Replaces a small file of mode 0600 in one step: a reader sees the old bytes or the new ones.
///
/// # Errors
/// What the system says; then the old bytes are there.
pub fn replace_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    bind_dir(folder)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let staging = folder.join(name);
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&staging)?;
    // What a crash left there may have another mode.
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&staging, path)?;
    fs::File::open(folder)?.sync_all()
}
