//! What goes wrong between a model's bytes and its text.

use std::path::PathBuf;

use v4_kernels::DeviceError;
use v4_proto::{Code, Fault};

use crate::format::FormatError;

/// What goes wrong in the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A model's file cannot be opened.
    #[error("cannot open {path}: {source}", path = path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The disk fails to give the weights.
    #[error("the model's weights cannot be read: {source}")]
    Read {
        /// Why.
        source: std::io::Error,
    },
    /// A model's bytes are not what their format says.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The architecture is not one of [`crate::arch::ALL`].
    #[error("the model's architecture {arch:?} is not supported; this build runs {supported}")]
    UnknownArch {
        /// As the file names it.
        arch: String,
        /// The names this build knows, for people.
        supported: String,
    },
    /// The architecture is known, but this file asks for something of it that is not.
    #[error("the model needs {what}, which this build does not support")]
    Unsupported {
        /// What it asks for.
        what: String,
    },
    /// A metadata entry is missing or makes no sense.
    #[error("the model's metadata {key:?} {problem}")]
    Metadata {
        /// Its key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor that the architecture needs is not there.
    #[error("the model has no tensor {name:?}")]
    MissingTensor {
        /// The first of its names.
        name: String,
    },
    /// A tensor has another shape than the metadata says, or a type that its place cannot take.
    #[error("the model's tensor {name:?} is {found}, where {expected:?} is needed")]
    TensorShape {
        /// Its name.
        name: String,
        /// Its dimensions, outermost first, and its type.
        found: String,
        /// The dimensions that the metadata makes of it.
        expected: Vec<u64>,
    },
    /// A tensor that nothing uses: the model is not what its architecture says.
    #[error("the model has a tensor {name:?} that its architecture does not use")]
    UnboundTensor {
        /// Its name.
        name: String,
    },
    /// The folder for blocks of the KV cache cannot be used.
    #[error("keys and values are not kept in {path}: {source}", path = path.display())]
    KvDisk {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl Error {
    /// What a client may be told.
    pub fn fault(&self) -> Fault {
        let code = match self {
            Error::Open { .. } | Error::Read { .. } | Error::KvDisk { .. } => Code::Disk,
            Error::Format(error) if error.is_unsupported() => Code::Unsupported,
            Error::Format(_)
            | Error::Metadata { .. }
            | Error::MissingTensor { .. }
            | Error::TensorShape { .. } => Code::Corrupt,
            Error::UnknownArch { .. }
            | Error::Unsupported { .. }
            | Error::UnboundTensor { .. }
            | Error::Device(DeviceError::Unavailable { .. }) => Code::Unsupported,
            Error::Device(DeviceError::OutOfMemory { .. }) => Code::OutOfMemory,
        };
        Fault::new(code, self.to_string())
    }

    /// A metadata entry that is not there.
    pub(crate) fn missing(key: impl Into<String>) -> Self {
        Self::metadata(key, "is missing")
    }

    /// A metadata entry that makes no sense.
    pub(crate) fn metadata(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Metadata { key: key.into(), problem: problem.into() }
    }

    /// Something this build cannot do.
    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }
}
