//! The model that is measured, under a meter, with names for where its weights lie.

use std::collections::BTreeMap;
use std::path::Path;

use v4_engine::format::{self, File};
use v4_engine::model::{Batch, Model};
use v4_kernels::{KvCache, Span};

use super::meter::{Meter, Metered, Read};
use super::noise::Noise;
use crate::device::{DeviceArgs, files};

/// Tokens whose noise is stored in the cache at a time.
const FILL_TOKENS: usize = 256;

/// A model on a metered device.
pub struct Subject {
    /// The model.
    pub model: Model,
    /// The meter of its device.
    pub meter: Meter,
    /// Its file, for the names and places of its tensors.
    pub file: File,
}

impl Subject {
    /// Opens a model file.
    ///
    /// # Errors
    /// A sentence.
    pub fn open(path: &Path, device: &DeviceArgs) -> Result<Self, String> {
        let meter = Meter::default();
        let device = Box::new(Metered::new(device.start()?, meter.clone()));
        let file = format::read(&files(path)).map_err(|error| error.to_string())?;
        let model = Model::new(&file, device).map_err(|error| error.to_string())?;
        for tensor in &file.tensors {
            tensor.bytes.populate().map_err(|error| error.to_string())?;
        }
        Ok(Self { model, meter, file })
    }

    /// The bytes of its tensors.
    pub fn weights(file: &File) -> Vec<&[u8]> {
        file.tensors.iter().map(|tensor| tensor.bytes.as_slice()).collect()
    }
}

/// Which tensor lies where.
pub struct Names(BTreeMap<usize, (usize, String)>);

impl Names {
    /// Of a file's tensors.
    pub fn of(file: &File) -> Self {
        let place = |tensor: &format::Tensor| {
            let bytes = tensor.bytes.as_slice();
            let start = bytes.as_ptr().addr();
            (start, (start + bytes.len(), short(&tensor.name)))
        };
        Self(file.tensors.iter().map(place).collect())
    }

    /// What a matrix is called: the tensor it is, or is a part of; else its shape.
    pub fn name(&self, read: &Read) -> String {
        let before = self.0.range(..=read.address).next_back();
        match before {
            Some((_, (end, name))) if read.address < *end => name.clone(),
            _ => format!("[{}x{}]", read.shape[0], read.shape[1]),
        }
    }
}

/// A tensor's name within its layer: `attn_q` of `blk.7.attn_q.weight`.
fn short(name: &str) -> String {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    name.rsplit('.').next().unwrap_or(name).to_owned()
}

/// Several sequences of one length that go on together.
pub struct Sequences<'a> {
    model: &'a mut Model,
    kv: KvCache,
    /// The blocks of each.
    blocks: Vec<Vec<u32>>,
    kv_len: usize,
    noise: Noise,
    logits: Vec<f32>,
}

/// A number that is counted in 32 bits.
fn index(n: usize) -> u32 {
    u32::try_from(n).expect("rows, blocks and positions are counted in 32 bits")
}

impl<'a> Sequences<'a> {
    /// `n` sequences with `depth` tokens in the cache and room for `more`.
    ///
    /// The tokens in the cache are noise that no layer has computed: what attention costs does not
    /// depend on the values it reads, and thousands of tokens would take minutes.
    ///
    /// # Errors
    /// A sentence.
    pub fn new(model: &'a mut Model, n: usize, depth: usize, more: usize) -> Result<Self, String> {
        let shape = model.kv_shape();
        let a_sequence = (depth + more).div_ceil(shape.block_tokens);
        let blocks = (0..n).map(|i| (i * a_sequence..(i + 1) * a_sequence).map(index).collect());
        let blocks = blocks.collect();
        let kv = model.device_mut().kv_cache(shape, n * a_sequence);
        let kv = kv.map_err(|error| error.to_string())?;
        let (noise, logits) = (Noise::new(2), Vec::new());
        let mut all = Self { model, kv, blocks, kv_len: depth, noise, logits };
        all.fill(depth).map_err(|error| error.to_string())?;
        Ok(all)
    }

    fn fill(&mut self, depth: usize) -> Result<(), v4_kernels::DeviceError> {
        let shape = self.kv.shape;
        let width = shape.n_kv_heads * shape.head_dim;
        let mut noise = Noise::new(3);
        let device = self.model.device_mut();
        let (mut k, mut v) =
            (device.buffer(FILL_TOKENS * width)?, device.buffer(FILL_TOKENS * width)?);
        device.write(&noise.floats(k.len()), &mut k, 0)?;
        device.write(&noise.floats(v.len()), &mut v, 0)?;
        for blocks in &self.blocks {
            let slots: Vec<u32> =
                (0..depth).map(|at| slot(blocks, at, shape.block_tokens)).collect();
            for part in slots.chunks(FILL_TOKENS) {
                for layer in 0..shape.n_layers {
                    device.kv_store(&mut self.kv, layer, &k, &v, part)?;
                }
            }
        }
        Ok(())
    }

    /// Runs the next `n` tokens of each sequence in one batch and reads the logits of the last.
    ///
    /// # Errors
    /// A sentence.
    pub fn feed(&mut self, n: usize) -> Result<(), String> {
        let (first, n_sequences) = (self.kv_len, self.blocks.len());
        self.kv_len += n;
        let tokens = self.next_tokens(n * n_sequences);
        let (kv_len, block_tokens) = (self.kv_len, self.kv.shape.block_tokens);
        let (mut positions, mut slots, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        for (i, blocks) in self.blocks.iter().enumerate() {
            positions.extend((first..kv_len).map(index));
            slots.extend((first..kv_len).map(|at| slot(blocks, at, block_tokens)));
            spans.push(Span { first_row: i * n, n_rows: n, kv_len, blocks });
        }
        let logit_rows: Vec<u32> = (1..=n_sequences).map(|i| index(i * n - 1)).collect();
        let batch = Batch {
            tokens: &tokens,
            positions: &positions,
            slots: &slots,
            spans: &spans,
            logit_rows: &logit_rows,
        };
        let done = self.model.forward(&mut self.kv, &batch, &mut self.logits);
        done.map_err(|error| error.to_string())
    }

    /// Tokens from all over the vocabulary.
    fn next_tokens(&mut self, n: usize) -> Vec<u32> {
        let vocabulary = self.model.vocabulary() as u64;
        let token = |word: u64| u32::try_from(word % vocabulary);
        (0..n).map(|_| token(self.noise.word()).expect("a vocabulary has 32 bits")).collect()
    }

    /// Forgets all but the first `kv_len` tokens.
    pub fn rewind(&mut self, kv_len: usize) {
        self.kv_len = self.kv_len.min(kv_len);
    }
}

/// Where the token at a position of a sequence is stored.
fn slot(blocks: &[u32], position: usize, block_tokens: usize) -> u32 {
    blocks[position / block_tokens] * index(block_tokens) + index(position % block_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_called_by_its_place_in_a_layer() {
        assert_eq!(short("blk.7.attn_q.weight"), "attn_q");
        assert_eq!(short("model.layers.0.mlp.gate_proj.weight"), "gate_proj");
        assert_eq!(short("output"), "output");
    }

    #[test]
    fn slots_follow_the_blocks() {
        assert_eq!([0, 15, 16].map(|at| slot(&[4, 2], at, 16)), [64, 79, 32]);
    }
}
