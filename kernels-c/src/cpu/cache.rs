//! Rows of keys and values into the cache.

use super::Cpu;
use super::isa::Isa;
use super::memory::{SLAB, Spread};
use crate::device::{KvCache, KvShape, KvType};

/// Columns that are converted at a time: those that share a scale.
const COLUMNS: usize = crate::ffi::V4_KV_GROUP as usize;

/// Some columns as they are stored.
struct Codes {
    /// `width` bytes a column, little endian.
    bytes: [u8; 2 * COLUMNS],
    width: usize,
    /// Half precision, where the columns have a scale.
    scale: Option<[u8; 2]>,
}

impl Codes {
    /// At most [`COLUMNS`] values. What half precision does not reach becomes the largest that it
    /// does; NaN stays NaN.
    fn of(isa: &Isa, kv_type: KvType, x: &[f32]) -> Self {
        let mut codes = Self { bytes: [0; 2 * COLUMNS], width: 2, scale: None };
        let mut halves = [0; COLUMNS];
        let halves = &mut halves[..x.len()];
        match kv_type {
            KvType::F16 => halves_of(isa, x, halves),
            KvType::Bf16 => halves.iter_mut().zip(x).for_each(|(half, x)| *half = bf16_of(*x)),
            KvType::Q8_0 => {
                let (mut q, mut d, mut sum) = ([0; COLUMNS], [0.0], [0; COLUMNS / 16]);
                isa.quantize(x, &mut q, &mut d, &mut sum);
                halves_of(isa, &d, &mut halves[..1]);
                codes.scale = Some(halves[0].to_le_bytes());
                codes.width = 1;
                codes.bytes.iter_mut().zip(q).for_each(|(byte, q)| *byte = q.to_le_bytes()[0]);
                return codes;
            }
        }
        for (bytes, half) in codes.bytes.chunks_exact_mut(2).zip(halves) {
            bytes.copy_from_slice(&half.to_le_bytes());
        }
        codes
    }
}

/// To half precision, the largest instead of infinity.
fn halves_of(isa: &Isa, x: &[f32], out: &mut [u16]) {
    let mut within = [0.0; COLUMNS];
    let within = &mut within[..x.len()];
    within.iter_mut().zip(x).for_each(|(within, x)| *within = x.clamp(-65504.0, 65504.0));
    isa.f16_from_f32(within, out);
}

/// The upper half of a float, to nearest even.
fn bf16_of(x: f32) -> u16 {
    let bits = x.to_bits();
    let upper = |bits: u32| u16::try_from(bits >> 16).expect("sixteen bits are left");
    if x.is_nan() { upper(bits) | 0x40 } else { upper(bits + 0x7fff + (bits >> 16 & 1)) }
}

/// Where a token's numbers lie in its slab.
struct Token {
    head_dim: usize,
    /// In the slab.
    index: usize,
}

impl Token {
    fn put_key(&self, slab: &mut [u8], column: usize, codes: &Codes, n: usize) {
        // Two bytes of a token, be they a column or a pair of them, are followed by those of the
        // next token.
        let columns = slab[column * SLAB * codes.width..].chunks_exact_mut(SLAB * 2);
        for (column, code) in columns.zip(codes.bytes[..n * codes.width].chunks_exact(2)) {
            column[self.index * 2] = code[0];
            column[self.index * 2 + 1] = code[1];
        }
        self.put_scale(slab, column, codes);
    }

    fn put_value(&self, slab: &mut [u8], column: usize, codes: &Codes, n: usize) {
        if codes.width == 1 {
            // Those of two tokens lie in pairs.
            let pair = self.index / 2 * self.head_dim + column;
            let pairs = slab[pair * 2..].chunks_exact_mut(2).zip(&codes.bytes[..n]);
            pairs.for_each(|(pair, code)| pair[self.index % 2] = *code);
        } else {
            let to = (self.index * self.head_dim + column) * 2;
            slab[to..to + n * 2].copy_from_slice(&codes.bytes[..n * 2]);
        }
        self.put_scale(slab, column, codes);
    }

    fn put_scale(&self, slab: &mut [u8], column: usize, codes: &Codes) {
        if let Some(scale) = codes.scale {
            let to = SLAB * self.head_dim + (column / COLUMNS * SLAB + self.index) * scale.len();
            slab[to..to + scale.len()].copy_from_slice(&scale);
        }
    }
}

impl Cpu {
    /// See [`crate::Device::kv_store`].
    pub(super) fn store(
        &mut self,
        kv: &mut KvCache,
        layer: usize,
        (k, v): (&[f32], &[f32]),
        slots: &[u32],
    ) {
        let KvShape { n_layers, n_kv_heads, head_dim, block_tokens, kv_type } = kv.shape;
        let n_blocks = kv.n_blocks;
        assert!(layer < n_layers);
        assert!(k.len() == slots.len() * n_kv_heads * head_dim && v.len() == k.len());
        let slab_bytes = kv_type.bytes(SLAB * head_dim);
        let (keys, values) = kv.data.both_mut();
        let (keys, values) = (Spread::new(keys), Spread::new(values));
        let isa = &self.isa;
        let store = |row: usize, slot: usize, head: usize| {
            let (block, offset) = (slot / block_tokens, slot % block_tokens);
            assert!(block < n_blocks, "slot {slot} of {n_blocks} blocks");
            let head_at = (layer * n_blocks + block) * n_kv_heads + head;
            let slab = (head_at * block_tokens + offset) / SLAB;
            let slab = slab * slab_bytes..(slab + 1) * slab_bytes;
            // SAFETY: a slab is of one head, and a head is in one share.
            let (keys, values) = unsafe { (keys.part(slab.clone()), values.part(slab)) };
            let token = Token { head_dim, index: offset % SLAB };
            let from = (row * n_kv_heads + head) * head_dim;
            let row = from..from + head_dim;
            let parts = k[row.clone()].chunks(COLUMNS).zip(v[row].chunks(COLUMNS));
            for (at, (k, v)) in parts.enumerate() {
                token.put_key(keys, at * COLUMNS, &Codes::of(isa, kv_type, k), k.len());
                token.put_value(values, at * COLUMNS, &Codes::of(isa, kv_type, v), v.len());
            }
        };
        // A token or a few are not worth waking threads for.
        let shares = if slots.len() < SLAB { 1 } else { n_kv_heads };
        self.pool.run(shares, &|share, _| {
            for (row, &slot) in slots.iter().enumerate() {
                for head in (share..n_kv_heads).step_by(shares) {
                    store(row, slot as usize, head);
                }
            }
        });
    }

    /// See [`crate::Device::kv_copy`].
    pub(super) fn copy_blocks(kv: &mut KvCache, pairs: &[(u32, u32)]) {
        let n_blocks = kv.n_blocks;
        let block = kv.shape.block_bytes() / kv.shape.n_layers / 2;
        let (keys, values) = kv.data.both_mut();
        for &(from, to) in pairs {
            assert!((from as usize) < n_blocks && (to as usize) < n_blocks, "{from} to {to}");
            for layer in 0..kv.shape.n_layers {
                let at = |index: u32| (layer * n_blocks + index as usize) * block;
                keys.copy_within(at(from)..at(from) + block, at(to));
                values.copy_within(at(from)..at(from) + block, at(to));
            }
        }
    }
}
