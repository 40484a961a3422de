//! A model file's header as metadata and a tensor table. What is read here comes from strangers.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::as_conversions)]

pub mod folder;
pub mod gguf;
pub mod safetensors;
#[cfg(test)]
pub(crate) mod written;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use v4_kernels::{Bytes, Map, Quant};
use v4_proto::{ModelFiles, limits};

use crate::Error;

/// Why bytes are not a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not this format at all.
    #[error("the file is not a {format} model: {reason}")]
    NotThis {
        /// Which format.
        format: &'static str,
        /// What shows it.
        reason: String,
    },
    /// A version or type that this build does not know.
    #[error("the model file uses {what}, which this build does not know")]
    Unknown {
        /// What.
        what: String,
    },
    /// The file ends too early.
    #[error("the model file is truncated: {what} needs {needed} bytes, {available} are left")]
    Truncated {
        /// What was being read.
        what: String,
        /// Bytes it needs.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// The file claims more than any real model has.
    #[error("the model file claims {claimed} for {what}; the limit is {limit}")]
    BeyondLimit {
        /// What.
        what: &'static str,
        /// The claim.
        claimed: u64,
        /// Of [`v4_proto::limits`].
        limit: u64,
    },
    /// The file contradicts itself.
    #[error("the model file contradicts itself: {0}")]
    Contradiction(String),
    /// The files of a model do not belong together.
    #[error("the files of the model do not belong together: {0}")]
    Shards(String),
}

impl FormatError {
    /// Whether the file may be whole, and only this build does not know it.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, FormatError::Unknown { .. })
    }
}

/// One metadata value. Widths of the file are not kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An integer that the file stores without a sign.
    U64(u64),
    /// An integer that the file stores with a sign.
    I64(i64),
    /// A float of either width.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    String(String),
    /// Values of one type.
    Array(Array),
}

/// An array of metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Integers without a sign.
    U64(Vec<u64>),
    /// Integers with a sign.
    I64(Vec<i64>),
    /// Floats.
    F64(Vec<f64>),
    /// Truth values.
    Bool(Vec<bool>),
    /// Texts.
    String(Vec<String>),
    /// Arrays or mixed values; no architecture uses any, so they are not kept.
    Nested,
}

/// A model's metadata: GGUF's key-value pairs, or `config.json` with the names of nested entries
/// joined by dots.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Meta {
    entries: BTreeMap<String, Value>,
}

impl Meta {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// All entries, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Sets an entry; the value it had, if any.
    pub fn insert(&mut self, key: impl Into<String>, value: Value) -> Option<Value> {
        self.entries.insert(key.into(), value)
    }

    /// A text.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// An integer that is not negative, however it is stored.
    pub fn u64(&self, key: &str) -> Option<u64> {
        match *self.get(key)? {
            Value::U64(n) => Some(n),
            Value::I64(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    /// A float, or an integer as one.
    #[expect(clippy::as_conversions, reason = "the nearest float is what is asked for")]
    pub fn f64(&self, key: &str) -> Option<f64> {
        match *self.get(key)? {
            Value::F64(x) => Some(x),
            Value::U64(n) => Some(n as f64),
            Value::I64(n) => Some(n as f64),
            _ => None,
        }
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match *self.get(key)? {
            Value::Bool(yes) => Some(yes),
            _ => None,
        }
    }

    /// An array of texts.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            Value::Array(Array::String(texts)) => Some(texts),
            _ => None,
        }
    }

    /// An array of floats, or of integers as floats.
    #[expect(clippy::as_conversions, reason = "the nearest float is what is asked for")]
    pub fn f64s(&self, key: &str) -> Option<Cow<'_, [f64]>> {
        match self.get(key)? {
            Value::Array(Array::F64(xs)) => Some(Cow::Borrowed(xs)),
            Value::Array(Array::U64(ns)) => Some(ns.iter().map(|&n| n as f64).collect()),
            Value::Array(Array::I64(ns)) => Some(ns.iter().map(|&n| n as f64).collect()),
            _ => None,
        }
    }

    /// An array of integers that all fit an `i64`.
    pub fn i64s(&self, key: &str) -> Option<Vec<i64>> {
        match self.get(key)? {
            Value::Array(Array::I64(ns)) => Some(ns.clone()),
            Value::Array(Array::U64(ns)) => ns.iter().map(|&n| i64::try_from(n).ok()).collect(),
            _ => None,
        }
    }

    /// An array of truth values.
    pub fn bools(&self, key: &str) -> Option<&[bool]> {
        match self.get(key)? {
            Value::Array(Array::Bool(all)) => Some(all),
            _ => None,
        }
    }
}

/// Which format a model's files have. It decides the names of metadata and tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One GGUF file, or the shards of one.
    Gguf,
    /// A folder of Hugging Face: `config.json` and safetensors files.
    Safetensors,
}

impl Format {
    /// The word of [`v4_proto::ModelInfo::format`].
    pub fn name(self) -> &'static str {
        match self {
            Format::Gguf => "gguf",
            Format::Safetensors => "safetensors",
        }
    }
}

/// One tensor of a model.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its block format.
    pub quant: Quant,
    /// Its dimensions, outermost first, as rows and columns are said; GGUF stores them reversed.
    pub shape: Vec<u64>,
    /// Its blocks.
    pub bytes: Bytes,
    /// The scales of its blocks where the file keeps them apart: MXFP4 of Hugging Face, a byte for
    /// each 16 of [`Tensor::bytes`]. [`Tensor::blocks`] puts them together.
    pub scales: Option<Bytes>,
}

impl Tensor {
    /// Bytes it takes in the file.
    pub fn n_bytes(&self) -> u64 {
        wide(self.bytes.len()).saturating_add(self.scales.as_ref().map_or(0, |s| wide(s.len())))
    }

    /// Its blocks as [`Tensor::quant`] lays them out: where the file has them, but where it keeps
    /// scales apart, in memory of our own. There, byte k of a block holds weight 2k low and 2k + 1
    /// high.
    pub fn blocks(&self) -> Bytes {
        let Some(scales) = &self.scales else { return self.bytes.clone() };
        let (codes, _) = self.bytes.as_slice().as_chunks::<16>();
        let mut blocks = Vec::with_capacity(self.bytes.len().saturating_add(scales.len()));
        for (codes, scale) in codes.iter().zip(scales.as_slice()) {
            let (first, second) = codes.split_at(8);
            blocks.push(*scale);
            for (first, second) in first.iter().zip(second) {
                blocks.extend([first & 15 | second << 4, first >> 4 | second & 0xf0]);
            }
        }
        Bytes::from_vec(blocks)
    }
}

/// A model's files, read.
#[derive(Debug)]
pub struct File {
    /// Which format they have.
    pub format: Format,
    /// Metadata.
    pub meta: Meta,
    /// Tensors, in the files' order.
    pub tensors: Vec<Tensor>,
}

/// Reads the headers of a model's files: GGUF shards in order, or one folder of Hugging Face.
///
/// # Errors
/// [`Error::Open`] and [`Error::Format`].
pub fn read(files: &ModelFiles) -> Result<File, Error> {
    match folder::Folder::of(files) {
        Some(folder) => safetensors::read_folder(folder),
        None => Ok(gguf::read(&open_all(&files.weights)?)?),
    }
}

/// Maps the files of a GGUF model.
pub(crate) fn open_all(paths: &[PathBuf]) -> Result<Vec<Bytes>, Error> {
    if paths.len() > limits::SHARDS {
        return Err(FormatError::Shards(format!("there are {} files", paths.len())).into());
    }
    paths.iter().map(|path| open(path)).collect()
}

/// Maps a file.
pub(crate) fn open(path: &Path) -> Result<Bytes, Error> {
    let map = Map::open(path).map_err(|source| Error::Open { path: path.to_owned(), source })?;
    let whole = 0..map.len();
    Ok(Bytes::from_map(map, whole).expect("a map has its own range"))
}

/// A length of the file's own as one of this machine. Beyond `usize` is beyond every file.
pub(crate) fn length(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// A length of this machine as one of a file.
pub(crate) fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// Fails where a claim is beyond its limit.
pub(crate) fn bounded(what: &'static str, claimed: u64, limit: u64) -> Result<u64, FormatError> {
    if claimed > limit {
        return Err(FormatError::BeyondLimit { what, claimed, limit });
    }
    Ok(claimed)
}
