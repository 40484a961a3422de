//! What can go wrong in the store.

use std::{
    io,
    path::{Path, PathBuf},
};

use v4_proto::{Code, Digest, Fault, ModelName};

/// What went wrong in the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another daemon has this home.
    #[error(
        "another v4 serve runs on {}; stop it, or give this one its own home with V4_HOME",
        home.display()
    )]
    Locked {
        /// The home.
        home: PathBuf,
    },
    /// The home was given to the daemon that replaces this one.
    #[error("this v4 is being replaced by a new one; try again in a moment")]
    HandedOver,
    /// The disk is full, or a quota is used up.
    #[error("the disk is full at {}; free some space and try again, nothing is lost", path.display())]
    DiskFull {
        /// The file that could not grow.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is not enough room for what is to come.
    #[error(
        "{} more are needed and the disk has {} free; make room, for example with `v4 rm`, and try \
         again",
        human(*needed),
        human(*free)
    )]
    Space {
        /// Bytes that are to be written.
        needed: u64,
        /// Bytes that may be.
        free: u64,
    },
    /// The home would have more bytes than it may.
    #[error(
        "{} more are needed and V4_QUOTA leaves the home {} of {}; {advice}",
        human(*needed),
        human(*left),
        human(*quota)
    )]
    Quota {
        /// Bytes that are to be written.
        needed: u64,
        /// Bytes that may be.
        left: u64,
        /// Bytes the home may have.
        quota: u64,
        /// What would make room.
        advice: String,
    },
    /// A file of the person changed while it was taken in.
    #[error("{} changed while it was read; try again when nobody writes it", path.display())]
    Moved {
        /// Which.
        path: PathBuf,
    },
    /// A name is there again, so the deleted one cannot come back.
    #[error("there is another '{name}' by now; remove it or give it another name first")]
    Taken {
        /// Which.
        name: Box<ModelName>,
    },
    /// Another failure of the file system.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Bytes are not those that the digest names.
    #[error("the bytes have the digest {actual}, expected was {expected}")]
    Digest {
        /// The digest that was asked for.
        expected: Digest,
        /// The digest that the bytes have.
        actual: Digest,
    },
    /// There are fewer or more bytes than there must be.
    #[error("there are {actual} bytes, expected were {expected}")]
    Length {
        /// How many there must be.
        expected: u64,
        /// How many there are.
        actual: u64,
    },
    /// A blob that a manifest names is not in the store, or has another size.
    #[error("the blob {0} is missing or damaged; pull the model again")]
    Missing(Digest),
    /// A manifest's bytes cannot be understood.
    #[error("the manifest of {name} cannot be read ({source}); pull the model again")]
    Manifest {
        /// Whose.
        name: Box<ModelName>,
        /// Why.
        source: ManifestError,
    },
    /// A name of another program's store, which is only read here.
    #[error(
        "'{name}' lies in the store of another program; remove it there, or forget that store with \
         `v4 roots remove PATH`"
    )]
    ReadOnly {
        /// Which.
        name: Box<ModelName>,
    },
    /// A folder that is no store of another program.
    #[error(
        "{} is neither an Ollama store (it would have blobs and manifests) nor a cache of Hugging \
         Face (it would have models--…)",
        path.display()
    )]
    NoRoot {
        /// Which.
        path: PathBuf,
    },
    /// Another writer has this partial.
    #[error("the partial {0} is being written already")]
    Busy(String),
    /// A partial's key that is not a file name.
    #[error("{0:?} cannot be the key of a partial")]
    Key(String),
    /// The index failed in a way that a rebuild does not mend.
    #[error("the index at {} failed: {source}", path.display())]
    Index {
        /// Where it lies.
        path: PathBuf,
        /// What it says.
        source: sled::Error,
    },
}

/// Why bytes are not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// More bytes than a manifest may have.
    #[error("it has more than {} bytes", crate::limits::MANIFEST_BYTES)]
    TooLong,
    /// Not the JSON of a manifest.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// The sizes of its parts add up to more than there can be.
    #[error("its sizes are beyond 64 bits")]
    Sizes,
}

impl StoreError {
    /// Wraps what the system said about `path`.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| {
            let path = path.to_path_buf();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Self::DiskFull { path, source }
                }
                _ => Self::Io { what, path, source },
            }
        }
    }

    /// The same for a client.
    pub fn fault(&self) -> Fault {
        let code = match self {
            Self::Locked { .. }
            | Self::DiskFull { .. }
            | Self::Space { .. }
            | Self::Quota { .. }
            | Self::Io { .. }
            | Self::Index { .. } => Code::Disk,
            Self::Digest { .. }
            | Self::Length { .. }
            | Self::Missing(_)
            | Self::Manifest { .. } => Code::Corrupt,
            Self::ReadOnly { .. }
            | Self::NoRoot { .. }
            | Self::Moved { .. }
            | Self::Taken { .. } => Code::Invalid,
            Self::HandedOver => Code::Overloaded,
            Self::Busy(_) | Self::Key(_) => Code::Internal,
        };
        Fault::new(code, self.to_string())
    }
}

/// Bytes as people write them.
pub fn human(n: u64) -> String {
    let units =
        [(1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "KB")];
    let unit = units.into_iter().find(|(size, _)| n >= *size);
    unit.map_or_else(
        || format!("{n} B"),
        |(size, word)| format!("{:.1} {word}", n as f64 / size as f64),
    )
}
