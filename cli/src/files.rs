//! Files that a person names: read to be hashed, and sent to the daemon.

// What belongs to the daemon is none of this crate's business; these are the person's own.
#![expect(clippy::disallowed_methods, reason = "files of the person, not of the store")]

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use sha2::{Digest as _, Sha256};
use v4_proto::Digest;

use crate::error::Failure;

/// Bytes read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// The text of a small file.
///
/// # Errors
/// [`Failure::File`].
pub fn text(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|source| failed(path, source))
}

/// Writes a small file, whole or not at all.
///
/// # Errors
/// [`Failure::File`].
pub fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let mut staging = path.as_os_str().to_owned();
    staging.push(".new");
    let written = std::fs::write(&staging, text).and_then(|()| std::fs::rename(&staging, path));
    written.map_err(|source| Failure::File { path: path.to_owned(), source })
}

/// The names of the files in a folder, sorted; those that are not UTF-8 are left out.
///
/// # Errors
/// [`Failure::File`].
pub fn list(folder: &Path) -> Result<Vec<String>, Failure> {
    let read = || -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            // What a symbolic link leads to counts.
            if entry.path().is_file() {
                names.extend(entry.file_name().into_string());
            }
        }
        names.sort();
        Ok(names)
    };
    read().map_err(|source| failed(folder, source))
}

/// Whether a path is a file, or a folder.
pub fn kind(path: &Path) -> Option<Kind> {
    let meta = std::fs::metadata(path).ok()?;
    Some(if meta.is_dir() { Kind::Folder } else { Kind::File })
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes.
    File,
    /// Other files.
    Folder,
}

/// The digest of a file.
///
/// # Errors
/// [`Failure::File`].
pub fn digest(path: &Path) -> Result<Digest, Failure> {
    let mut file = File::open(path).map_err(|source| failed(path, source))?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk).map_err(|source| failed(path, source))? {
            0 => return Ok(Digest::from_bytes(hash.finalize().into())),
            n => hash.update(&chunk[..n]),
        }
    }
}

/// A file as the body of a request.
pub struct Upload {
    file: File,
    left: u64,
}

impl Upload {
    /// The whole file.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let open = || -> io::Result<Self> {
            let mut file = File::open(path)?;
            let left = file.seek(io::SeekFrom::End(0))?;
            file.rewind()?;
            Ok(Self { file, left })
        };
        open().map_err(|source| failed(path, source))
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        if this.left == 0 {
            return Poll::Ready(None);
        }
        let want = usize::try_from(this.left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let mut chunk = vec![0; want];
        Poll::Ready(Some(match this.file.read_exact(&mut chunk) {
            Ok(()) => {
                this.left -= want as u64;
                Ok(Frame::data(chunk.into()))
            }
            Err(error) => Err(error),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

fn failed(path: &Path, source: io::Error) -> Failure {
    Failure::File { path: path.to_owned(), source }
}
