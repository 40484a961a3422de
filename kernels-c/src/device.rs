//! The operations a model is made of, and what they work on.
//!
//! Activations are float32, row-major `[rows, width]`, a row a token. Weights are [`Matrix`]:
//! `[rows, cols]` in the file's own block layout, used where they are mapped. The engine's layers
//! are written in these operations once; [`crate::Cpu`] implements them, a GPU will. Wrong shapes
//! are our own mistake and panic; what a device may fail at is a [`DeviceError`].

use std::sync::Arc;

use crate::{Bytes, Quant, ffi};

/// Values of [`KvType::Q8_0`] that share a scale.
const KV_GROUP: usize = ffi::V4_KV_GROUP as usize;

/// What a device can fail at.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No such device, or this build cannot use it.
    #[error("device {name:?} cannot be used: {reason}")]
    Unavailable {
        /// The name asked for.
        name: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The device's memory does not hold it.
    #[error("{needed} bytes of memory are needed for {what}, and the machine does not give them")]
    OutOfMemory {
        /// For what.
        what: &'static str,
        /// Bytes asked for.
        needed: usize,
    },
}

/// The result of an operation.
pub type Result<T = ()> = std::result::Result<T, DeviceError>;

/// A weight matrix `[rows, cols]`, row-major, each row a whole number of quant blocks.
#[derive(Debug, Clone)]
pub struct Matrix {
    quant: Quant,
    rows: usize,
    cols: usize,
    bytes: Bytes,
    tiles: Option<Tiles>,
}

/// Scales that belong to tiles of a matrix, as FP8 has them: the weight at (r, c) is multiplied by
/// the scale of tile (r / height, c / width).
#[derive(Debug, Clone)]
pub struct Tiles {
    height: usize,
    width: usize,
    /// `[tile rows, tile columns]`.
    scales: Arc<[f32]>,
}

impl Tiles {
    /// Rows of a tile.
    pub(crate) fn height(&self) -> usize {
        self.height
    }

    /// Multiplies each column by the scale that it has in row `row`.
    pub(crate) fn scale(&self, row: usize, x: &mut [f32]) {
        let n_tiles = x.len().div_ceil(self.width);
        let scales = &self.scales[row / self.height * n_tiles..][..n_tiles];
        for (scale, x) in scales.iter().zip(x.chunks_mut(self.width)) {
            for x in x {
                *x *= scale;
            }
        }
    }
}

impl Matrix {
    /// A matrix over `bytes`; `None` unless they are exactly `rows` rows of `cols` weights in
    /// `quant`.
    pub fn new(quant: Quant, rows: usize, cols: usize, bytes: Bytes) -> Option<Self> {
        let expected = quant.row_bytes(cols)?.checked_mul(rows)?;
        (bytes.len() == expected).then_some(Self { quant, rows, cols, bytes, tiles: None })
    }

    /// The same weights with a scale for each tile of `[height, width]` of them, `scales` being
    /// `[tile rows, tile columns]`; `None` unless there is one for each, and for weights that are
    /// blocks.
    pub fn with_tiles(self, [height, width]: [usize; 2], scales: Vec<f32>) -> Option<Self> {
        let is_usable = height > 0 && width > 0 && !self.quant.is_blocks();
        let n = is_usable.then(|| self.rows.div_ceil(height) * self.cols.div_ceil(width))?;
        let tiles = Tiles { height, width, scales: scales.into() };
        (tiles.scales.len() == n).then_some(Self { tiles: Some(tiles), ..self })
    }

    /// The block format.
    pub fn quant(&self) -> Quant {
        self.quant
    }

    /// Rows: the width of a product's result.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: the width of a product's input.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The blocks.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The scales of its tiles, where it has any.
    pub(crate) fn tiles(&self) -> Option<&Tiles> {
        self.tiles.as_ref()
    }
}

/// Float32 memory of a device.
#[derive(Debug)]
pub enum Buffer {
    /// Memory of this process.
    Host(crate::cpu::HostBuffer),
}

impl Buffer {
    /// Floats it holds.
    pub fn len(&self) -> usize {
        match self {
            Buffer::Host(host) => host.len(),
        }
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KvType {
    /// IEEE half precision; what is beyond its range (65504) is kept as the largest of it.
    #[default]
    F16,
    /// The upper half of a float: the range of one, 8 bits of precision.
    Bf16,
    /// Bytes, 32 of a head with a half-precision scale: GGUF's `Q8_0`, 34 bytes for 32 values. Half
    /// the memory, and half of what a step reads.
    Q8_0,
}

impl KvType {
    /// All of them.
    pub const ALL: [KvType; 3] = [KvType::F16, KvType::Bf16, KvType::Q8_0];

    /// The name that settings use.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::Bf16 => "bf16",
            KvType::Q8_0 => "q8_0",
        }
    }

    /// The one of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Values of a head that share a scale: heads are whole groups.
    pub fn group(self) -> usize {
        match self {
            KvType::F16 | KvType::Bf16 => 1,
            KvType::Q8_0 => KV_GROUP,
        }
    }

    /// Bytes of `n` values, whole groups.
    pub fn bytes(self, n: usize) -> usize {
        match self {
            KvType::F16 | KvType::Bf16 => 2 * n,
            KvType::Q8_0 => n + n / KV_GROUP * size_of::<u16>(),
        }
    }
}

/// The shape of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers that keep keys and values.
    pub n_layers: usize,
    /// Heads of keys and values.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens of a block; a multiple of 16 where there are blocks.
    pub block_tokens: usize,
    /// How keys and values are stored.
    pub kv_type: KvType,
}

impl KvShape {
    /// Bytes of keys and values together for one block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.kv_type.bytes(2 * self.n_layers * self.n_kv_heads * self.head_dim * self.block_tokens)
    }
}

/// Keys and values of all sequences, in blocks. Within a layer and a block each head's keys (and
/// values) lie together, `[layer][block][kv head]`, in an order that is the device's own.
#[derive(Debug)]
pub struct KvCache {
    /// Its shape.
    pub shape: KvShape,
    /// How many blocks there are.
    pub n_blocks: usize,
    /// The storage.
    pub(crate) data: crate::cpu::HostKv,
}

/// A root mean square norm (Zhang and Sennrich 2019): `x / sqrt(mean(x^2) + eps) * weight` for each
/// row as wide as the weight.
#[derive(Debug)]
pub struct RmsNorm {
    /// `[width]`.
    pub weight: Buffer,
    /// Added to the mean square.
    pub eps: f32,
}

/// What products read: a row a token.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// Floats `[rows, width]`.
    Plain(&'a Buffer),
    /// What the norm makes of them.
    Normed(&'a Buffer, &'a RmsNorm),
    /// What [`Device::gate_up`] made.
    Ready(&'a Activations),
}

/// Rows that only products read, in the form that they read it: floats, or whole numbers with
/// scales.
#[derive(Debug, Default)]
pub struct Activations(pub(crate) crate::cpu::HostActivations);

/// A weight with what belongs to it: `x W^T * scale + bias`.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    /// `[out width, in width]`.
    pub matrix: &'a Matrix,
    /// `[out width]`.
    pub bias: Option<&'a Buffer>,
    /// Of a whole tensor, as NVFP4 may have one; else 1.
    pub scale: f32,
}

/// One product of an input.
#[derive(Debug)]
pub struct Linear<'a> {
    /// With what.
    pub weight: Weight<'a>,
    /// `[rows, out width]`.
    pub out: &'a mut Buffer,
    /// Whether the product is added to what is in `out`, or takes its place.
    pub is_added: bool,
}

/// The first half of a gated feed-forward: `activation(gate(x)) * up(x)`.
#[derive(Debug, Clone, Copy)]
pub struct GateUp<'a> {
    /// `[feed forward, in width]`.
    pub gate: Weight<'a>,
    /// `[feed forward, in width]`.
    pub up: Weight<'a>,
    /// Of the gate.
    pub activation: Activation,
    /// The matrix whose product reads the result: its format decides what that is made of.
    pub reader: &'a Matrix,
}

/// The function of a gated feed-forward.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `x / (1 + e^(-alpha x))` of the gate cut to at most `limit`, by one more than the other
    /// factor cut to `-limit..=limit`.
    ClampedSwish {
        /// Of the gate.
        alpha: f32,
        /// Of both.
        limit: f32,
    },
}

/// One of the three products of all the experts of a layer.
#[derive(Debug)]
pub struct ExpertWeights {
    /// `[out width, in width]` for each expert, all of one shape and format.
    pub matrices: Vec<Matrix>,
    /// `[experts, out width]`.
    pub bias: Option<Buffer>,
    /// Multiplies an expert's product before the bias, a number for each.
    pub scales: Vec<f32>,
}

/// The experts of a layer (Shazeer et al. 2017), each a gated feed-forward:
/// `down(activation(gate(x)) * up(x))`.
#[derive(Debug)]
pub struct Experts {
    /// `[feed forward, in width]`.
    pub gate: ExpertWeights,
    /// `[feed forward, in width]`.
    pub up: ExpertWeights,
    /// `[in width, feed forward]`.
    pub down: ExpertWeights,
    /// Of the gate.
    pub activation: Activation,
}

/// How a row's experts are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Router {
    /// Experts there are.
    pub n_experts: usize,
    /// Experts that a row goes to.
    pub n_used: usize,
    /// Whether the weights of a row are a softmax over the experts chosen; else over all.
    pub is_normalised: bool,
}

/// Which experts each row goes to, and with which weights. What a row's experts give is added up
/// in the order of their numbers, whatever else is in the batch.
#[derive(Debug, Default)]
pub struct Routing {
    /// Experts of a row.
    pub(crate) n_used: usize,
    /// `[rows, n_used]`, ascending within a row.
    pub(crate) ids: Vec<u32>,
    /// `[rows, n_used]`.
    pub(crate) weights: Vec<f32>,
}

impl Routing {
    /// The experts of all rows and their weights, both `[rows, n_used]`.
    pub fn chosen(&self) -> (&[u32], &[f32]) {
        (&self.ids, &self.weights)
    }
}

/// Which values of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeKind {
    /// Neighbours: (0, 1), (2, 3), ... GGUF's llama layout.
    Adjacent,
    /// Halves: (0, n/2), (1, n/2 + 1), ... The layout of Hugging Face.
    Halves,
}

/// A rotary position embedding (Su et al. 2021).
#[derive(Debug, Clone)]
pub struct Rope {
    /// Pairing.
    pub kind: RopeKind,
    /// One angle a position for each pair, scaling of long contexts included: `[rotary width / 2]`.
    /// Values beyond the rotary width stay as they are.
    pub inv_freq: Vec<f32>,
    /// Multiplies sine and cosine (`YaRN`); 1 without.
    pub magnitude: f32,
}

/// What one sequence contributes to a batch.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// Its first row in the batch; not before the end of the span before it.
    pub first_row: usize,
    /// Its rows: consecutive positions that end at `kv_len - 1`.
    pub n_rows: usize,
    /// Tokens of the sequence in the cache, these rows included.
    pub kv_len: usize,
    /// The physical blocks that hold them, in order.
    pub blocks: &'a [u32],
}

/// The constants of an attention layer.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Query heads; a multiple of the KV heads.
    pub n_heads: usize,
    /// Multiplies query times key.
    pub scale: f32,
    /// A token sees itself and at most `window - 1` before it.
    pub window: Option<usize>,
    /// `cap * tanh(score / cap)` before the softmax.
    pub soft_cap: Option<f32>,
    /// `[n_heads]`: for each query head a score that joins its softmax and has no value (Xiao et
    /// al. 2024).
    pub sinks: Option<&'a Buffer>,
}

/// A device: where weights are read and activations live. An operation fails only as the device
/// itself does, with a [`DeviceError`].
#[allow(clippy::missing_errors_doc, reason = "said once, above")]
pub trait Device: Send {
    /// The device and what it computes with, for people: `cpu (avx512, 2 threads)`.
    fn describe(&self) -> String;

    /// Computes with at most this many threads from now on: others need the cores.
    fn set_threads(&mut self, _threads: usize) {}

    /// `len` zeros.
    fn buffer(&self, len: usize) -> Result<Buffer>;

    /// An empty KV cache of `n_blocks` blocks. [`DeviceError::Unavailable`] when heads are not
    /// whole groups of the type.
    fn kv_cache(&self, shape: KvShape, n_blocks: usize) -> Result<KvCache>;

    /// Copies `from` to `to[at..]`.
    fn write(&mut self, from: &[f32], to: &mut Buffer, at: usize) -> Result;

    /// Copies `from[at..]` to `to`.
    fn read(&mut self, from: &Buffer, at: usize, to: &mut [f32]) -> Result;

    /// `out[i] = scale * table[ids[i]]`, `[ids, table.cols]`. Ids are below `table.rows`.
    fn embed(&mut self, table: &Matrix, ids: &[u32], scale: f32, out: &mut Buffer) -> Result;

    /// The norm of `rows` rows, each a token or a head.
    fn rms_norm(&mut self, norm: &RmsNorm, x: &Buffer, rows: usize, out: &mut Buffer) -> Result;

    /// [`Device::rms_norm`] in place.
    fn rms_norm_inplace(&mut self, norm: &RmsNorm, x: &mut Buffer, rows: usize) -> Result;

    /// Several products of one input of `rows` rows: query, key and value read it once.
    fn linear(&mut self, input: Input<'_>, rows: usize, parts: &mut [Linear<'_>]) -> Result;

    /// `x[..len] += y[..len]`.
    fn add(&mut self, x: &mut Buffer, y: &Buffer, len: usize) -> Result;

    /// `activation(gate(input)) * up(input)` of `rows` rows, ready for the product that follows.
    fn gate_up(
        &mut self,
        input: Input<'_>,
        rows: usize,
        weights: &GateUp<'_>,
        out: &mut Activations,
    ) -> Result;

    /// Chooses each row's experts: those of its `n_used` largest logits, `logits` being
    /// `[rows, n_experts]`. Of equal logits the one of the lower number is larger.
    fn route(
        &mut self,
        router: &Router,
        logits: &Buffer,
        rows: usize,
        routing: &mut Routing,
    ) -> Result;

    /// What the chosen experts make of `x` `[rows, in width]`, times their weights, added up: into
    /// `out` `[rows, in width]`. The result of a row does not depend on what else is in the batch,
    /// nor on the thread count.
    fn experts(
        &mut self,
        experts: &Experts,
        x: &Buffer,
        rows: usize,
        routing: &Routing,
        out: &mut Buffer,
    ) -> Result;

    /// Rotates `x` `[positions, n_heads, head_dim]` in place; `heads` is (`n_heads`, `head_dim`).
    fn rope(
        &mut self,
        rope: &Rope,
        x: &mut Buffer,
        heads: (usize, usize),
        positions: &[u32],
    ) -> Result;

    /// Stores row i of `k` and `v` `[slots, n_kv_heads, head_dim]` in `layer` at slot `slots[i]`
    /// (`block * block_tokens + offset`).
    fn kv_store(
        &mut self,
        kv: &mut KvCache,
        layer: usize,
        k: &Buffer,
        v: &Buffer,
        slots: &[u32],
    ) -> Result;

    /// Causal attention of `q` `[rows, n_heads, head_dim]` over the cache, a span a sequence, into
    /// `out` (same shape). The result of a row does not depend on what else is in the batch, nor on
    /// the thread count.
    fn attention(
        &mut self,
        attention: &Attention<'_>,
        kv: (&KvCache, usize),
        q: &Buffer,
        spans: &[Span<'_>],
        out: &mut Buffer,
    ) -> Result;

    /// Copies rows `rows` of `x` (each `width` wide) to the start of `out`.
    fn gather(&mut self, x: &Buffer, width: usize, rows: &[u32], out: &mut Buffer) -> Result;

    /// `x[..len] = cap * tanh(x[..len] / cap)`.
    fn soft_cap(&mut self, x: &mut Buffer, cap: f32, len: usize) -> Result;

    /// Copies whole blocks of the cache over all layers: `pairs` of (from, to).
    fn kv_copy(&mut self, kv: &mut KvCache, pairs: &[(u32, u32)]) -> Result;
}
