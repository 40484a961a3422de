//! Attention with grouped heads (Ainslie et al. 2023) over a KV cache in blocks.

use v4_kernels::{Attention as Constants, Buffer, Device, Input, KvCache, RmsNorm, Rope, Span};

use super::linear::Weight;
use crate::Error;

/// The attention of one layer.
#[derive(Debug)]
pub(crate) struct Attention {
    /// `[heads * head, embedding]`.
    pub query: Weight,
    /// `[kv heads * head, embedding]`.
    pub key: Weight,
    /// `[kv heads * head, embedding]`.
    pub value: Weight,
    /// `[embedding, heads * head]`.
    pub output: Weight,
    /// Of each head of the query, before it rotates.
    pub query_norm: Option<RmsNorm>,
    /// Of each head of the key, before it rotates.
    pub key_norm: Option<RmsNorm>,
    /// Width of a head.
    pub head_dim: usize,
    /// `[heads]`: scores that join the softmax without a value.
    pub sinks: Option<Buffer>,
    /// Heads, scale, window and cap; the sinks are added.
    pub constants: Constants<'static>,
}

/// Where the rows of a layer belong.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// A position a row.
    pub positions: &'a [u32],
    /// A slot of the cache a row.
    pub slots: &'a [u32],
    /// A span a sequence.
    pub spans: &'a [Span<'a>],
}

/// Room for attention.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// `[rows, heads * head]`.
    pub query: Buffer,
    /// `[rows, kv heads * head]`.
    pub key: Buffer,
    /// `[rows, kv heads * head]`.
    pub value: Buffer,
    /// `[rows, heads * head]`: the result of [`Attention::mix`].
    pub mixed: Buffer,
}

impl Attention {
    /// Makes query, key and value of an input `[rows, embedding]` and turns them; they stay in
    /// `scratch`.
    pub fn project(
        &self,
        device: &mut dyn Device,
        input: Input<'_>,
        (rope, place): (&Rope, Place<'_>),
        scratch: &mut Scratch,
    ) -> Result<(), Error> {
        let rows = place.positions.len();
        let Scratch { query, key, value, .. } = scratch;
        let mut parts = [self.query.part(query), self.key.part(key), self.value.part(value)];
        device.linear(input, rows, &mut parts)?;
        let n_kv_heads = self.key.matrix.rows() / self.head_dim;
        if let Some(norm) = &self.query_norm {
            device.rms_norm_inplace(norm, query, rows * self.constants.n_heads)?;
        }
        if let Some(norm) = &self.key_norm {
            device.rms_norm_inplace(norm, key, rows * n_kv_heads)?;
        }
        let heads = (self.constants.n_heads, self.head_dim);
        device.rope(rope, query, heads, place.positions)?;
        device.rope(rope, key, (n_kv_heads, self.head_dim), place.positions)?;
        Ok(())
    }

    /// Stores what [`Attention::project`] made and mixes values into `scratch.mixed`.
    pub fn mix(
        &self,
        device: &mut dyn Device,
        (kv, layer): (&mut KvCache, usize),
        place: Place<'_>,
        scratch: &mut Scratch,
    ) -> Result<(), Error> {
        let Scratch { query, key, value, mixed } = scratch;
        device.kv_store(kv, layer, key, value, place.slots)?;
        let constants = Constants { sinks: self.sinks.as_ref(), ..self.constants };
        device.attention(&constants, (kv, layer), query, place.spans, mixed)?;
        Ok(())
    }
}
