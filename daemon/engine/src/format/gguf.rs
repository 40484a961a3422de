//! GGUF, versions 2 and 3, little endian.
//!
//! A file is a magic, a version, the counts of tensors and metadata entries, the entries, the
//! tensor table, then the tensors, each at a multiple of `general.alignment` from the first. Layout
//! as in ggml's `docs/gguf.md`. Nothing is allocated that the bytes at hand do not bear out.

use std::collections::HashSet;

use v4_kernels::{Bytes, Quant};
use v4_proto::limits;

use super::{Array, File, Format, FormatError, Meta, Tensor, Value, bounded, length, wide};

type Result<T> = std::result::Result<T, FormatError>;

const MAGIC: &[u8] = b"GGUF";
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
const DEFAULT_ALIGNMENT: u64 = 32;

/// One line of a file's tensor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The tensor's name.
    pub name: String,
    /// Its dimensions as GGUF orders them: the contiguous one first.
    pub shape: Vec<u64>,
    /// GGUF's number of its type, known here or not.
    pub type_number: u32,
    /// Where it starts, counted from [`Header::data_start`].
    pub offset: u64,
}

impl Entry {
    /// Weights in it.
    ///
    /// # Errors
    /// [`FormatError::Contradiction`] when they cannot be counted in 64 bits.
    pub fn n_weights(&self) -> Result<u64> {
        self.shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim)).ok_or_else(|| {
            contradiction(format!("tensor {:?} has {:?} weights", self.name, self.shape))
        })
    }

    /// Bytes of it in `quant`.
    fn n_bytes(&self, quant: Quant) -> Result<u64> {
        let cols = self.shape.first().copied().unwrap_or(1);
        let row = quant.row_bytes(length(cols)).map(wide).ok_or_else(|| {
            contradiction(format!(
                "rows of tensor {:?} have {cols} weights, no multiple of a block of {quant}",
                self.name
            ))
        })?;
        self.shape
            .iter()
            .skip(1)
            .try_fold(row, |n, &dim| n.checked_mul(dim))
            .ok_or_else(|| contradiction(format!("tensor {:?} is beyond any size", self.name)))
    }
}

/// All that precedes the tensors of a file.
#[derive(Debug, Clone)]
pub struct Header {
    /// Metadata.
    pub meta: Meta,
    /// The tensor table.
    pub entries: Vec<Entry>,
    /// Where tensors start, in bytes from the start of the file.
    pub data_start: u64,
    alignment: u64,
}

impl Header {
    /// Reads the start of a file.
    ///
    /// # Errors
    /// [`FormatError`] when it is not the start of a GGUF file, or claims what cannot be.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut cursor = Cursor { bytes, at: 0 };
        let (n_tensors, n_entries) = counts(&mut cursor)?;
        let meta = metadata(&mut cursor, n_entries)?;
        let entries = table(&mut cursor, n_tensors)?;
        let alignment = alignment(&meta)?;
        let data_start = wide(cursor.at)
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| contradiction("its alignment is beyond its size".into()))?;
        for entry in &entries {
            if !entry.offset.is_multiple_of(alignment) {
                let Entry { name, offset, .. } = entry;
                return Err(contradiction(format!(
                    "tensor {name:?} starts at {offset}, no multiple of the alignment {alignment}"
                )));
            }
        }
        Ok(Self { meta, entries, data_start, alignment })
    }
}

/// Reads a model: one file, or the shards of one in order.
///
/// # Errors
/// [`FormatError`].
pub fn read(files: &[Bytes]) -> Result<File> {
    let mut file = File { format: Format::Gguf, meta: Meta::default(), tensors: Vec::new() };
    let mut names = HashSet::new();
    for (index, bytes) in files.iter().enumerate() {
        let header = Header::parse(bytes.as_slice())?;
        check_shard(&header.meta, index, files.len())?;
        for tensor in tensors(&header, bytes)? {
            if !names.insert(tensor.name.clone()) {
                let name = tensor.name;
                return Err(FormatError::Shards(format!("tensor {name:?} is in two of them")));
            }
            file.tensors.push(tensor);
        }
        if index == 0 {
            file.meta = header.meta;
        }
    }
    if files.is_empty() {
        return Err(FormatError::Shards("there are none".into()));
    }
    Ok(file)
}

/// Whether a file says that it is shard `index` of `count`.
fn check_shard(meta: &Meta, index: usize, count: usize) -> Result<()> {
    let said_count = meta.u64("split.count").unwrap_or(1).max(1);
    let said_index = meta.u64("split.no").unwrap_or(0);
    if said_count != wide(count) || said_index != wide(index) {
        return Err(FormatError::Shards(format!(
            "file {index} of {count} says it is {said_index} of {said_count}, counted from 0"
        )));
    }
    Ok(())
}

/// The tensors of a file, each within it and none over another.
fn tensors(header: &Header, file: &Bytes) -> Result<Vec<Tensor>> {
    let file_bytes = wide(file.len());
    let mut extents = Vec::with_capacity(header.entries.len());
    let mut tensors = Vec::with_capacity(header.entries.len());
    for entry in &header.entries {
        let quant = Quant::from_gguf(entry.type_number).ok_or_else(|| FormatError::Unknown {
            what: format!("type {} for tensor {:?}", entry.type_number, entry.name),
        })?;
        let n_bytes = entry.n_bytes(quant)?;
        let start = header.data_start.checked_add(entry.offset);
        let end = start.and_then(|start| start.checked_add(n_bytes));
        let (Some(start), Some(end)) = (start, end.filter(|&end| end <= file_bytes)) else {
            return Err(FormatError::Truncated {
                what: format!("tensor {:?}", entry.name),
                needed: n_bytes,
                available: file_bytes.saturating_sub(start.unwrap_or(file_bytes)),
            });
        };
        extents.push((start, end, entry.name.as_str()));
        let bytes = file
            .slice(length(start)..length(end))
            .expect("the range was compared with the file's length");
        let shape = entry.shape.iter().rev().copied().collect();
        tensors.push(Tensor { name: entry.name.clone(), quant, shape, bytes, scales: None });
    }
    let end = check_extents(extents)?.max(header.data_start);
    let spare = file_bytes.saturating_sub(end);
    if spare >= header.alignment && end > header.data_start {
        return Err(contradiction(format!("{spare} bytes follow its last tensor")));
    }
    Ok(tensors)
}

/// Where the last extent ends; an error where two overlap.
fn check_extents(mut extents: Vec<(u64, u64, &str)>) -> Result<u64> {
    extents.sort_unstable();
    let mut end = 0;
    let mut before = "";
    for (start, its_end, name) in extents {
        if start < end {
            return Err(contradiction(format!("tensors {before:?} and {name:?} overlap")));
        }
        (end, before) = (its_end, name);
    }
    Ok(end)
}

fn contradiction(what: String) -> FormatError {
    FormatError::Contradiction(what)
}

/// Magic, version, then the counts of tensors and of metadata entries.
fn counts(cursor: &mut Cursor<'_>) -> Result<(u64, u64)> {
    let not_this = |reason: String| FormatError::NotThis { format: "GGUF", reason };
    let magic = cursor.take(4, "the magic").unwrap_or_default();
    if magic != MAGIC {
        return Err(not_this(format!("it starts with {:?}", String::from_utf8_lossy(magic))));
    }
    let version = cursor.u32("the version")?;
    if VERSIONS.contains(&version.swap_bytes()) {
        return Err(FormatError::Unknown { what: "GGUF in big endian".into() });
    }
    if !VERSIONS.contains(&version) {
        return Err(FormatError::Unknown { what: format!("GGUF version {version}") });
    }
    let n_tensors = bounded("tensors", cursor.u64("the tensor count")?, limits::TENSORS)?;
    let n_entries = cursor.u64("the metadata count")?;
    let n_entries = bounded("metadata entries", n_entries, limits::META_ENTRIES)?;
    Ok((n_tensors, n_entries))
}

fn metadata(cursor: &mut Cursor<'_>, n_entries: u64) -> Result<Meta> {
    let mut meta = Meta::default();
    for _ in 0..n_entries {
        let key = cursor.string("a metadata key", limits::META_KEY_BYTES)?;
        let kind = cursor.u32("the type of a metadata value")?;
        let value = value(cursor, kind, &key)?;
        bounded("bytes of metadata", wide(cursor.at), limits::META_BYTES)?;
        if meta.get(&key).is_some() {
            return Err(contradiction(format!("metadata {key:?} is there twice")));
        }
        meta.insert(key, value);
    }
    Ok(meta)
}

/// The numbers of value types.
mod kind {
    pub(super) const U8: u32 = 0;
    pub(super) const I8: u32 = 1;
    pub(super) const U16: u32 = 2;
    pub(super) const I16: u32 = 3;
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const STRING: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
    pub(super) const U64: u32 = 10;
    pub(super) const I64: u32 = 11;
    pub(super) const F64: u32 = 12;
}

fn value(cursor: &mut Cursor<'_>, kind: u32, key: &str) -> Result<Value> {
    Ok(match kind {
        kind::STRING => Value::String(cursor.string(key, limits::META_STRING_BYTES)?),
        kind::BOOL => Value::Bool(cursor.bool(key)?),
        kind::ARRAY => Value::Array(array(cursor, key, 0)?),
        kind::F32 | kind::F64 => Value::F64(cursor.float(kind, key)?),
        kind::I8 | kind::I16 | kind::I32 | kind::I64 => Value::I64(cursor.signed(kind, key)?),
        _ => Value::U64(cursor.unsigned(kind, key)?),
    })
}

fn array(cursor: &mut Cursor<'_>, key: &str, depth: u32) -> Result<Array> {
    let kind = cursor.u32(key)?;
    let n = bounded("items of a metadata array", cursor.u64(key)?, limits::META_ARRAY_ITEMS)?;
    let needed = n.saturating_mul(least_bytes(kind));
    if needed > cursor.left() {
        let what = format!("metadata {key:?}");
        return Err(FormatError::Truncated { what, needed, available: cursor.left() });
    }
    Ok(match kind {
        kind::STRING => {
            Array::String(collect(n, || cursor.string(key, limits::META_STRING_BYTES))?)
        }
        kind::BOOL => Array::Bool(collect(n, || cursor.bool(key))?),
        kind::F32 | kind::F64 => Array::F64(collect(n, || cursor.float(kind, key))?),
        kind::I8 | kind::I16 | kind::I32 | kind::I64 => {
            Array::I64(collect(n, || cursor.signed(kind, key))?)
        }
        kind::ARRAY => {
            let depth = depth.saturating_add(1);
            bounded("nested metadata arrays", depth.into(), limits::META_ARRAY_DEPTH.into())?;
            for _ in 0..n {
                array(cursor, key, depth)?;
            }
            Array::Nested
        }
        _ => Array::U64(collect(n, || cursor.unsigned(kind, key))?),
    })
}

fn collect<T>(n: u64, mut next: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
    (0..n).map(|_| next()).collect()
}

/// The fewest bytes that an array's item can have.
fn least_bytes(kind: u32) -> u64 {
    match kind {
        kind::U16 | kind::I16 => 2,
        kind::U32 | kind::I32 | kind::F32 => 4,
        kind::U64 | kind::I64 | kind::F64 | kind::STRING => 8,
        kind::ARRAY => 12,
        _ => 1,
    }
}

fn table(cursor: &mut Cursor<'_>, n_tensors: u64) -> Result<Vec<Entry>> {
    let mut names = HashSet::new();
    let mut entries = Vec::new();
    for _ in 0..n_tensors {
        let name = cursor.string("a tensor's name", limits::TENSOR_NAME_BYTES)?;
        let n_dims = cursor.u32(&name)?;
        bounded("dimensions of a tensor", n_dims.into(), limits::TENSOR_DIMS.into())?;
        let shape = collect(n_dims.into(), || cursor.u64(&name))?;
        if shape.is_empty() || shape.contains(&0) {
            return Err(contradiction(format!("tensor {name:?} has the dimensions {shape:?}")));
        }
        let type_number = cursor.u32(&name)?;
        let offset = cursor.u64(&name)?;
        bounded("bytes of metadata and tensor table", wide(cursor.at), limits::META_BYTES)?;
        if !names.insert(name.clone()) {
            return Err(contradiction(format!("tensor {name:?} is there twice")));
        }
        entries.push(Entry { name, shape, type_number, offset });
    }
    Ok(entries)
}

fn alignment(meta: &Meta) -> Result<u64> {
    const KEY: &str = "general.alignment";
    let alignment = match meta.get(KEY) {
        None => DEFAULT_ALIGNMENT,
        Some(value) => meta
            .u64(KEY)
            .filter(|n| n.is_power_of_two())
            .ok_or_else(|| contradiction(format!("{KEY} is {value:?}, no power of two")))?,
    };
    bounded("the alignment of tensors", alignment, limits::TENSOR_ALIGNMENT)
}

/// A place in a file's bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> u64 {
        wide(self.bytes.len().saturating_sub(self.at))
    }

    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8]> {
        let end = self.at.checked_add(length(n));
        let taken = end.and_then(|end| Some((end, self.bytes.get(self.at..end)?)));
        let Some((end, taken)) = taken else {
            let what = format!("{what:?}");
            return Err(FormatError::Truncated { what, needed: n, available: self.left() });
        };
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let taken = self.take(wide(N), what)?;
        Ok(taken.try_into().expect("take gives as many bytes as were asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn unsigned(&mut self, kind: u32, what: &str) -> Result<u64> {
        Ok(match kind {
            kind::U8 => u8::from_le_bytes(self.array(what)?).into(),
            kind::U16 => u16::from_le_bytes(self.array(what)?).into(),
            kind::U32 => self.u32(what)?.into(),
            kind::U64 => self.u64(what)?,
            _ => {
                let what = format!("type {kind} for the metadata {what:?}");
                return Err(FormatError::Unknown { what });
            }
        })
    }

    fn signed(&mut self, kind: u32, what: &str) -> Result<i64> {
        Ok(match kind {
            kind::I8 => i8::from_le_bytes(self.array(what)?).into(),
            kind::I16 => i16::from_le_bytes(self.array(what)?).into(),
            kind::I32 => i32::from_le_bytes(self.array(what)?).into(),
            _ => i64::from_le_bytes(self.array(what)?),
        })
    }

    fn float(&mut self, kind: u32, what: &str) -> Result<f64> {
        Ok(match kind {
            kind::F32 => f32::from_le_bytes(self.array(what)?).into(),
            _ => f64::from_le_bytes(self.array(what)?),
        })
    }

    fn bool(&mut self, what: &str) -> Result<bool> {
        match self.array(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(contradiction(format!("{what:?} is {other}, neither true nor false"))),
        }
    }

    fn string(&mut self, what: &str, limit: u64) -> Result<String> {
        let n = bounded("bytes of a name or text", self.u64(what)?, limit)?;
        let bytes = self.take(n, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(contradiction(format!("the text of {what:?} is not UTF-8"))),
        }
    }
}

#[cfg(test)]
mod tests;
