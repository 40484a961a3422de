//! Model files made in tests: good ones, and bad ones that no writer would make.

#![allow(clippy::as_conversions, clippy::arithmetic_side_effects, reason = "these bytes are ours")]

use v4_kernels::Quant;

use super::{Array, Value};

/// A GGUF file that is being written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gguf {
    entries: Vec<(String, Vec<u8>)>,
    tensors: Vec<Written>,
}

#[derive(Debug, Clone)]
struct Written {
    name: String,
    number: u32,
    shape: Vec<u64>,
    bytes: Vec<u8>,
    offset: Option<u64>,
}

const ALIGNMENT: usize = 32;

impl Gguf {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds an entry, in the widest type of its kind.
    pub(crate) fn meta(self, key: &str, value: &Value) -> Self {
        self.raw_meta(key, &encode(value))
    }

    /// Adds an entry: the number of its type, then its bytes.
    pub(crate) fn raw_meta(mut self, key: &str, bytes: &[u8]) -> Self {
        self.entries.push((key.to_owned(), bytes.to_vec()));
        self
    }

    /// Adds a tensor; `shape` is in GGUF's order.
    pub(crate) fn tensor(self, name: &str, quant: Quant, shape: &[u64], bytes: &[u8]) -> Self {
        self.raw_tensor(name, quant.number(), shape, bytes)
    }

    /// Adds a tensor of any type.
    pub(crate) fn raw_tensor(
        mut self,
        name: &str,
        number: u32,
        shape: &[u64],
        bytes: &[u8],
    ) -> Self {
        let (name, shape, bytes) = (name.to_owned(), shape.to_vec(), bytes.to_vec());
        self.tensors.push(Written { name, number, shape, bytes, offset: None });
        self
    }

    /// Lies about where tensor `index` is.
    pub(crate) fn at(mut self, index: usize, offset: u64) -> Self {
        self.tensors[index].offset = Some(offset);
        self
    }

    /// The file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            string(&mut out, key);
            out.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            string(&mut out, &tensor.name);
            let n_dims = u32::try_from(tensor.shape.len()).expect("few dimensions");
            out.extend(n_dims.to_le_bytes());
            for dim in &tensor.shape {
                out.extend(dim.to_le_bytes());
            }
            out.extend(tensor.number.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(data);
        out
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The number of a value's type, then its bytes.
fn encode(value: &Value) -> Vec<u8> {
    fn array<T>(number: u32, items: &[T], mut item: impl FnMut(&mut Vec<u8>, &T)) -> Vec<u8> {
        let mut out = 9u32.to_le_bytes().to_vec();
        out.extend(number.to_le_bytes());
        out.extend((items.len() as u64).to_le_bytes());
        for it in items {
            item(&mut out, it);
        }
        out
    }
    let plain = |number: u32, bytes: &[u8]| [&number.to_le_bytes()[..], bytes].concat();
    match value {
        Value::U64(n) => plain(10, &n.to_le_bytes()),
        Value::I64(n) => plain(11, &n.to_le_bytes()),
        Value::F64(x) => plain(12, &x.to_le_bytes()),
        Value::Bool(yes) => plain(7, &[u8::from(*yes)]),
        Value::String(text) => {
            let mut out = 8u32.to_le_bytes().to_vec();
            string(&mut out, text);
            out
        }
        Value::Array(Array::U64(all)) => array(10, all, |out, n| out.extend(n.to_le_bytes())),
        Value::Array(Array::I64(all)) => array(11, all, |out, n| out.extend(n.to_le_bytes())),
        Value::Array(Array::F64(all)) => array(12, all, |out, x| out.extend(x.to_le_bytes())),
        Value::Array(Array::Bool(all)) => array(7, all, |out, yes| out.push(u8::from(*yes))),
        Value::Array(Array::String(all)) => array(8, all, |out, text| string(out, text)),
        Value::Array(Array::Nested) => unreachable!("no test writes one through this"),
    }
}

/// Numbers that are the same in every run (xorshift64, Marsaglia 2003).
#[derive(Debug)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    /// One of `0..n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % n as u64).expect("below a usize")
    }
}
