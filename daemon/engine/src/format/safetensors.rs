//! A model folder of Hugging Face: `config.json`, safetensors files, and what is said of the
//! tokenizer.
//!
//! A safetensors file is a `u64` header length, a JSON header that names each tensor's type, shape
//! and byte range, then the bytes. Several files are joined by `model.safetensors.index.json`.

use std::collections::{BTreeSet, HashMap, HashSet};

use serde::Deserialize;
use serde_json::Value as Json;
use v4_kernels::{Bytes, Quant};
use v4_proto::limits;

use super::folder::Folder;
use super::{Array, File, Format, FormatError, Meta, Tensor, Value, bounded, length, wide};
use crate::{Error, tokenizer};

type Result<T> = std::result::Result<T, FormatError>;

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const LENGTH_BYTES: u64 = 8;
/// The type of plain bytes.
const BYTES: &str = "U8";
/// Ends of the names of an MXFP4 tensor's parts, and the bytes of codes that share a scale.
const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";
const GROUP_BYTES: u64 = 16;

/// Reads a folder.
///
/// # Errors
/// [`Error::Open`] when a file is missing, [`Error::Format`] when one makes no sense.
pub fn read_folder(folder: Folder<'_>) -> std::result::Result<File, Error> {
    let meta = metadata(folder)?;
    let mut all = Vec::new();
    let mut names = HashSet::new();
    for shard in shards(folder)? {
        for piece in pieces(&folder.open(&shard)?)? {
            if !names.insert(piece.name.clone()) {
                let name = piece.name;
                let problem = format!("tensor {name:?} is in two of them");
                return Err(FormatError::Shards(problem).into());
            }
            all.push(piece);
        }
    }
    Ok(File { format: Format::Safetensors, meta, tensors: join(all)? })
}

/// The metadata of a folder and the headers of its files, whatever types they have.
///
/// # Errors
/// As [`read_folder`].
pub fn headers(folder: Folder<'_>) -> std::result::Result<(Meta, Vec<(String, Entry)>), Error> {
    let meta = metadata(folder)?;
    let mut entries = Vec::new();
    for shard in shards(folder)? {
        entries.extend(header(folder.open(&shard)?.as_slice())?.0);
    }
    Ok((meta, entries))
}

/// What the folder says beside its weights.
fn metadata(folder: Folder<'_>) -> std::result::Result<Meta, Error> {
    let mut meta = config(&json(folder, CONFIG)?)?;
    tokenizer::json::add(&mut meta, folder)?;
    Ok(meta)
}

/// The names of the folder's safetensors files.
fn shards(folder: Folder<'_>) -> std::result::Result<Vec<String>, Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: serde_json::Map<String, Json>,
    }
    if folder.find(INDEX)?.is_none() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let index: Index = serde_json::from_value(json(folder, INDEX)?)
        .map_err(|error| FormatError::Contradiction(format!("{INDEX}: {error}")))?;
    let mut shards = BTreeSet::new();
    for file in index.weight_map.values() {
        let name = file.as_str().filter(|name| is_plain(name)).ok_or_else(|| {
            FormatError::Contradiction(format!("{INDEX} names {file}, no file of its folder"))
        })?;
        shards.insert(name.to_owned());
    }
    if shards.is_empty() || shards.len() > limits::SHARDS {
        let problem = format!("{INDEX} names {} of them", shards.len());
        return Err(FormatError::Shards(problem).into());
    }
    Ok(shards.into_iter().collect())
}

/// Whether a name stays in its folder.
fn is_plain(name: &str) -> bool {
    !name.starts_with('.') && !name.is_empty() && !name.contains(['/', '\\', '\0'])
}

/// A JSON file of a folder.
///
/// # Errors
/// [`Error::Open`]; [`Error::Format`] where it is none.
pub(crate) fn json(folder: Folder<'_>, name: &str) -> std::result::Result<Json, Error> {
    let map = folder.open(name)?;
    bounded("bytes of a JSON file", wide(map.len()), wide(limits::MODEL_JSON_BYTES))?;
    let json = serde_json::from_slice(map.as_slice())
        .map_err(|error| FormatError::Contradiction(format!("{name}: {error}")))?;
    Ok(json)
}

/// `config.json` as metadata: entries of an inner object are joined with a dot.
fn config(json: &Json) -> Result<Meta> {
    let Json::Object(object) = json else {
        return Err(FormatError::Contradiction(format!("{CONFIG} is not an object")));
    };
    let mut meta = Meta::default();
    flatten(&mut meta, "", object)?;
    Ok(meta)
}

fn flatten(meta: &mut Meta, prefix: &str, object: &serde_json::Map<String, Json>) -> Result<()> {
    for (name, json) in object {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match json {
            Json::Null => {}
            Json::Object(inner) => flatten(meta, &key, inner)?,
            Json::Array(items) => {
                meta.insert(key, Value::Array(array(items)));
            }
            Json::Bool(yes) => {
                meta.insert(key, Value::Bool(*yes));
            }
            Json::String(text) => {
                meta.insert(key, Value::String(text.clone()));
            }
            Json::Number(number) => {
                let value = match (number.as_u64(), number.as_i64(), number.as_f64()) {
                    (Some(n), ..) => Value::U64(n),
                    (None, Some(n), _) => Value::I64(n),
                    (None, None, Some(x)) => Value::F64(x),
                    (None, None, None) => {
                        let problem = format!("{CONFIG} has {key:?} as {number}");
                        return Err(FormatError::Contradiction(problem));
                    }
                };
                meta.insert(key, value);
            }
        }
    }
    Ok(())
}

fn array(items: &[Json]) -> Array {
    fn all<T>(items: &[Json], get: impl Fn(&Json) -> Option<T>) -> Option<Vec<T>> {
        items.iter().map(get).collect()
    }
    all(items, Json::as_u64)
        .map(Array::U64)
        .or_else(|| all(items, Json::as_i64).map(Array::I64))
        .or_else(|| all(items, Json::as_f64).map(Array::F64))
        .or_else(|| all(items, Json::as_bool).map(Array::Bool))
        .or_else(|| all(items, |json| json.as_str().map(str::to_owned)).map(Array::String))
        .unwrap_or(Array::Nested)
}

/// One line of a file's header.
#[derive(Debug, Clone, Deserialize)]
pub struct Entry {
    /// The type as the format names it, for example `BF16`.
    pub dtype: String,
    /// Dimensions, outermost first. A scalar has none.
    pub shape: Vec<u64>,
    /// Start and end, counted from the end of the header.
    pub data_offsets: [u64; 2],
}

/// The header of a file: its tensors in the file's order, and where their bytes start.
///
/// # Errors
/// [`FormatError`].
pub fn header(bytes: &[u8]) -> Result<(Vec<(String, Entry)>, u64)> {
    let not_this = |reason: String| FormatError::NotThis { format: "safetensors", reason };
    let Some((start, rest)) = bytes.split_first_chunk() else {
        return Err(not_this(format!("it has {} bytes", bytes.len())));
    };
    let n = u64::from_le_bytes(*start);
    bounded("bytes of the header", n, limits::SAFETENSORS_HEADER_BYTES)?;
    let Some(text) = rest.get(..length(n)) else {
        let (what, available) = ("the header".into(), wide(rest.len()));
        return Err(FormatError::Truncated { what, needed: n, available });
    };
    let object: serde_json::Map<String, Json> =
        serde_json::from_slice(text).map_err(|error| not_this(error.to_string()))?;
    bounded("tensors", wide(object.len()), limits::TENSORS)?;
    let mut entries = Vec::new();
    for (name, json) in object {
        if name == "__metadata__" {
            continue;
        }
        bounded("bytes of a tensor's name", wide(name.len()), limits::TENSOR_NAME_BYTES)?;
        let entry: Entry = serde_json::from_value(json).map_err(|error| {
            FormatError::Contradiction(format!("the header's {name:?}: {error}"))
        })?;
        entries.push((name, entry));
    }
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    Ok((entries, LENGTH_BYTES.saturating_add(n)))
}

/// A line of a header with its bytes.
#[derive(Debug)]
struct Piece {
    name: String,
    /// `None` for plain bytes, which are a tensor only together with others.
    quant: Option<Quant>,
    shape: Vec<u64>,
    bytes: Bytes,
}

/// The tensors of one file.
///
/// # Errors
/// [`FormatError`].
pub fn read(file: &Bytes) -> Result<Vec<Tensor>> {
    join(pieces(file)?)
}

fn pieces(file: &Bytes) -> Result<Vec<Piece>> {
    let (entries, data_start) = header(file.as_slice())?;
    let mut pieces = Vec::with_capacity(entries.len());
    let mut end_before = 0;
    for (name, entry) in entries {
        let [start, end] = entry.data_offsets;
        if start < end_before || end < start {
            let problem = format!("tensor {name:?} overlaps another or ends before it starts");
            return Err(FormatError::Contradiction(problem));
        }
        end_before = end;
        pieces.push(piece(file, name, entry, data_start)?);
    }
    let end = data_start.saturating_add(end_before);
    if end < wide(file.len()) {
        let spare = wide(file.len()).saturating_sub(end);
        return Err(FormatError::Contradiction(format!("{spare} bytes follow its last tensor")));
    }
    Ok(pieces)
}

fn piece(file: &Bytes, name: String, entry: Entry, data_start: u64) -> Result<Piece> {
    let [start, end] = entry.data_offsets;
    let quant = quant(&entry.dtype);
    if quant.is_none() && entry.dtype != BYTES {
        return Err(unknown(&entry.dtype, &name));
    }
    let item_bytes = wide(quant.map_or(1, Quant::block_bytes));
    let expected = entry.shape.iter().try_fold(item_bytes, |n, &dim| n.checked_mul(dim));
    if expected != end.checked_sub(start) {
        return Err(FormatError::Contradiction(format!(
            "tensor {name:?} is {:?} of {} in {} bytes",
            entry.shape,
            entry.dtype,
            end.saturating_sub(start)
        )));
    }
    let [from, to] = [start, end].map(|offset| length(data_start.saturating_add(offset)));
    let Some(bytes) = file.slice(from..to) else {
        return Err(FormatError::Truncated {
            what: format!("tensor {name:?}"),
            needed: end.saturating_sub(start),
            available: wide(file.len().saturating_sub(from)),
        });
    };
    Ok(Piece { name, quant, shape: entry.shape, bytes })
}

fn unknown(dtype: &str, name: &str) -> FormatError {
    FormatError::Unknown { what: format!("type {dtype} for tensor {name:?}") }
}

/// Makes tensors of pieces. Plain bytes are the blocks and the scales of one MXFP4 tensor, by their
/// names: blocks `[.., groups, 16]`, scales `[.., groups]`, a group being 32 weights.
fn join(pieces: Vec<Piece>) -> Result<Vec<Tensor>> {
    let mut tensors = Vec::with_capacity(pieces.len());
    let (mut blocks, mut scales) = (Vec::new(), HashMap::new());
    for Piece { name, quant, shape, bytes } in pieces {
        if let Some(quant) = quant {
            tensors.push(Tensor { name, quant, shape, bytes, scales: None });
        } else if let Some(of) = name.strip_suffix(SCALES) {
            scales.insert(of.to_owned(), (shape, bytes));
        } else if let Some(of) = name.strip_suffix(BLOCKS) {
            blocks.push((of.to_owned(), shape, bytes));
        } else {
            return Err(unknown(BYTES, &name));
        }
    }
    for (name, mut shape, bytes) in blocks {
        let Some((scale_shape, scales)) = scales.remove(&name) else {
            return Err(FormatError::Contradiction(format!("{name}{BLOCKS} has no scales")));
        };
        let group_bytes = shape.pop();
        if group_bytes != Some(GROUP_BYTES) || shape != scale_shape {
            let problem = format!("{name}{SCALES} {scale_shape:?} do not fit its blocks");
            return Err(FormatError::Contradiction(problem));
        }
        if let Some(last) = shape.last_mut() {
            *last = last.saturating_mul(wide(Quant::MXFP4.block_len()));
        }
        tensors.push(Tensor { name, quant: Quant::MXFP4, shape, bytes, scales: Some(scales) });
    }
    match scales.keys().min() {
        Some(name) => Err(FormatError::Contradiction(format!("{name}{SCALES} has no blocks"))),
        None => Ok(tensors),
    }
}

/// The types that kernels read in place.
fn quant(dtype: &str) -> Option<Quant> {
    match dtype {
        "F32" => Some(Quant::F32),
        "F16" => Some(Quant::F16),
        "BF16" => Some(Quant::BF16),
        "F8_E4M3" => Some(Quant::F8_E4M3),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
