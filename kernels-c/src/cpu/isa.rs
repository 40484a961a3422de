//! The C functions of one instruction set, each behind the checks that C does not make.

use std::ffi::{CStr, c_void};

use super::memory::{SLAB, Tile};
use crate::device::{Activation, DeviceError, KvType, Result, RopeKind};
use crate::quant::Quant;
use crate::{device, ffi};

/// Tokens of a product straight from the file's blocks at most.
pub(super) const GEMV_TOKENS: usize = ffi::V4_GEMV_TOKENS as usize;
/// Rows of a panel.
pub(super) const PANEL_ROWS: usize = ffi::V4_PANEL_ROWS as usize;
/// Activations that share a scale.
pub(super) const ACT_GROUP: usize = ffi::V4_ACT_GROUP as usize;
/// Activations that share a sum.
pub(super) const SUM_GROUP: usize = ffi::V4_SUM_GROUP as usize;

/// The input of a product: rows of `cols` values, and what `quantize` made of them where the
/// weights are blocks. Either may be empty where no product needs it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Acts<'a> {
    pub(super) cols: usize,
    pub(super) x: &'a [f32],
    pub(super) q: &'a [i8],
    pub(super) d: &'a [f32],
    pub(super) sum: &'a [i16],
}

impl<'a> Acts<'a> {
    /// Tokens.
    pub(super) fn rows(&self) -> usize {
        self.x.len().max(self.q.len()) / self.cols
    }

    /// Rows `first..first + rows`.
    pub(super) fn rows_at(&self, first: usize, rows: usize) -> Acts<'a> {
        let (from, to) = (first * self.cols, (first + rows) * self.cols);
        let quantized = !self.q.is_empty();
        let part = |group: usize| if quantized { from / group..to / group } else { 0..0 };
        Acts {
            cols: self.cols,
            x: if self.x.is_empty() { self.x } else { &self.x[from..to] },
            q: &self.q[part(1)],
            d: &self.d[part(ACT_GROUP)],
            sum: &self.sum[part(SUM_GROUP)],
        }
    }

    /// What C gets, when there is all that a product with `quant` reads.
    fn checked(&self, quant: Quant) -> ffi::v4_act {
        let n = self.rows() * self.cols;
        if quant.is_blocks() {
            assert!(self.cols.is_multiple_of(ACT_GROUP), "{} columns in groups", self.cols);
            assert!(self.q.len() == n && self.d.len() == n / ACT_GROUP);
            assert!(self.sum.len() == n / SUM_GROUP);
        } else {
            assert_eq!(self.x.len(), n, "whole rows of activations");
        }
        ffi::v4_act {
            x: self.x.as_ptr(),
            q: self.q.as_ptr(),
            d: self.d.as_ptr(),
            sum: self.sum.as_ptr(),
            n_tokens: self.rows(),
            cols: self.cols,
        }
    }
}

/// Some rows of a weight matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) quant: Quant,
    pub(super) cols: usize,
    /// Which row of the matrix is the first.
    pub(super) first: usize,
    pub(super) len: usize,
    bytes: &'a [u8],
    tiles: Option<&'a device::Tiles>,
}

impl<'a> Rows<'a> {
    /// Rows `first..first + rows` of `matrix`.
    pub(super) fn of(matrix: &'a device::Matrix, first: usize, rows: usize) -> Self {
        let (quant, cols) = (matrix.quant(), matrix.cols());
        let row_bytes = quant.row_bytes(cols).expect("a Matrix has whole blocks");
        let bytes = &matrix.bytes().as_slice()[first * row_bytes..(first + rows) * row_bytes];
        Self { quant, cols, first, len: rows, bytes, tiles: matrix.tiles() }
    }

    /// Rows `first..first + rows` of these.
    pub(super) fn part(&self, first: usize, rows: usize) -> Self {
        let row_bytes = self.row_bytes();
        let bytes = &self.bytes[first * row_bytes..(first + rows) * row_bytes];
        Self { first: self.first + first, len: rows, bytes, ..*self }
    }

    /// The scales of the matrix' tiles.
    pub(super) fn tiles(&self) -> Option<&'a device::Tiles> {
        self.tiles
    }

    /// What the rows are before their tiles' scales.
    pub(super) fn without_tiles(self) -> Self {
        Self { tiles: None, ..self }
    }

    fn row_bytes(&self) -> usize {
        self.quant.row_bytes(self.cols).expect("a Matrix has whole blocks")
    }
}

/// Keys, or values, of one head: `n_kv` tokens from the start of a slab.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slabs<'a> {
    pub(super) kv_type: KvType,
    pub(super) head_dim: usize,
    pub(super) n_kv: usize,
    /// Whole slabs.
    pub(super) bytes: &'a [u8],
}

impl Slabs<'_> {
    fn kind(&self) -> usize {
        let kind = match self.kv_type {
            KvType::F16 => ffi::v4_kv::KV_F16,
            KvType::Bf16 => ffi::v4_kv::KV_BF16,
            KvType::Q8_0 => ffi::v4_kv::KV_Q8_0,
        };
        kind.0 as usize
    }

    fn check(&self) {
        let tokens = self.n_kv.next_multiple_of(SLAB);
        assert!(self.head_dim.is_multiple_of(self.kv_type.group()));
        assert_eq!(self.bytes.len(), self.kv_type.bytes(tokens * self.head_dim));
    }

    fn start(&self) -> *const c_void {
        self.bytes.as_ptr().cast()
    }

    /// Where `next` starts, if there is one that is as long as this.
    fn next(&self, next: Option<&Slabs<'_>>) -> *const c_void {
        let as_long = next.filter(|next| next.bytes.len() >= self.bytes.len());
        as_long.map_or(std::ptr::null(), Slabs::start)
    }
}

/// A table of functions. Slots are never empty but at numbers that no format has.
pub(super) struct Isa {
    name: &'static str,
    table: ffi::v4_isa,
    is_exact: bool,
}

// SAFETY: the table is pointers to functions without state and to a literal.
unsafe impl Send for Isa {}
// SAFETY: see above.
unsafe impl Sync for Isa {}

impl std::fmt::Debug for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Isa").field(&self.name).finish()
    }
}

/// The name of entry `index` of the list and whether this processor can run it.
fn entry(index: usize) -> Option<(&'static str, bool)> {
    // SAFETY: any index may be asked for; a name is a literal ended by zero.
    unsafe {
        let name = ffi::v4_isa_name(index);
        if name.is_null() {
            return None;
        }
        let name = CStr::from_ptr(name).to_str().expect("names of instruction sets are ASCII");
        Some((name, ffi::v4_isa_usable(index) == ffi::v4_status::OK))
    }
}

/// The instruction sets that this processor has and this build knows, best last.
pub(super) fn usable() -> Vec<&'static str> {
    let usable = |(name, usable)| if usable { Some(name) } else { None };
    (0..).map_while(entry).filter_map(usable).collect()
}

impl Isa {
    /// The best one, or the one named. When `is_exact`, products with blocks read floats too.
    pub(super) fn open(name: Option<&str>, is_exact: bool) -> Result<Self> {
        let usable = usable();
        let name = name.unwrap_or_else(|| usable.last().expect("portable runs everywhere"));
        let unavailable =
            |reason| DeviceError::Unavailable { name: format!("cpu ({name})"), reason };
        let wanted = (0..).map_while(entry).enumerate().find(|(_, (entry, _))| *entry == name);
        let Some((index, (name, _))) = wanted else {
            return Err(unavailable(format!(
                "there is none of that name; try {}",
                usable.join(", ")
            )));
        };
        let mut table = std::mem::MaybeUninit::uninit();
        // SAFETY: the table is written when the answer is V4_OK, and read only then.
        let table = unsafe {
            if ffi::v4_isa_open(index, table.as_mut_ptr()) != ffi::v4_status::OK {
                let reason = format!("this processor lacks it; it has {}", usable.join(", "));
                return Err(unavailable(reason));
            }
            table.assume_init()
        };
        Ok(Self { name, table, is_exact })
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Whether products with weights of this format read their input as whole numbers.
    pub(super) fn takes_whole(&self, quant: Quant) -> bool {
        quant.is_blocks() && !self.is_exact
    }

    /// Product straight from the file's blocks: `out = x W^T`.
    pub(super) fn gemv(&self, weights: Rows<'_>, x: &Acts<'_>, out: &mut Tile<'_>) {
        assert!(x.rows() <= GEMV_TOKENS && x.cols == weights.cols);
        assert!(out.rows == x.rows() && out.columns == weights.len);
        let act = x.checked(weights.quant);
        let gemv = self.table.gemv[weights.quant.number() as usize].expect(FILLED);
        // SAFETY: as asserted: the bytes are `rows` rows of `cols` weights, `out` is
        // `[tokens][rows]`.
        unsafe {
            gemv(
                weights.bytes.as_ptr().cast(),
                weights.row_bytes(),
                weights.len,
                &raw const act,
                out.start,
                out.stride,
            );
        }
    }

    /// Floats that a panel of a block format takes.
    pub(super) fn panel_len(&self, quant: Quant, cols: usize) -> usize {
        assert!(quant.is_blocks());
        let panel_bytes = self.table.panel_bytes.expect(FILLED);
        // SAFETY: a pure function of a known format.
        unsafe { panel_bytes(quant.number(), cols) }.div_ceil(size_of::<f32>())
    }

    /// Unpacks at most [`PANEL_ROWS`] rows to a panel.
    pub(super) fn panel(&self, weights: Rows<'_>, panel: &mut [f32]) {
        assert!(weights.len <= PANEL_ROWS);
        assert!(panel.len() >= self.panel_len(weights.quant, weights.cols));
        assert_eq!(panel.as_ptr().addr() % ffi::V4_ALIGN as usize, 0);
        let unpack = self.table.panel[weights.quant.number() as usize].expect(FILLED);
        // SAFETY: as asserted: the bytes are `rows` rows of `cols` weights, the panel is long
        // enough and aligned.
        unsafe {
            unpack(
                weights.bytes.as_ptr().cast(),
                weights.row_bytes(),
                weights.len,
                weights.cols,
                panel.as_mut_ptr().cast(),
            );
        }
    }

    /// Product with a panel made by [`Isa::panel`] of `out.columns` rows of `quant`.
    pub(super) fn gemm_i8(&self, quant: Quant, panel: &[f32], x: &Acts<'_>, out: &mut Tile<'_>) {
        assert!(panel.len() >= self.panel_len(quant, x.cols) && out.columns <= PANEL_ROWS);
        assert_eq!(panel.as_ptr().addr() % ffi::V4_ALIGN as usize, 0);
        assert_eq!(out.rows, x.rows());
        let act = x.checked(quant);
        let gemm = self.table.gemm_i8.expect(FILLED);
        // SAFETY: as asserted: the panel is as long as one of these rows is, `out` is
        // `[tokens][rows]`.
        unsafe {
            gemm(
                quant.number(),
                panel.as_ptr().cast(),
                out.columns,
                &raw const act,
                out.start,
                out.stride,
            );
        }
    }

    /// Product with weights that are floats already: `[out.columns][x.cols]`.
    pub(super) fn gemm_f32(&self, weights: &[f32], x: &Acts<'_>, out: &mut Tile<'_>) {
        assert!(weights.len() == out.columns * x.cols && out.rows == x.rows());
        let act = x.checked(Quant::F32);
        let gemm = self.table.gemm_f32.expect(FILLED);
        // SAFETY: as asserted.
        unsafe { gemm(weights.as_ptr(), out.columns, &raw const act, out.start, out.stride) }
    }

    /// Rows of weights to floats.
    pub(super) fn dequantize(&self, weights: Rows<'_>, out: &mut [f32]) {
        assert_eq!(out.len(), weights.len * weights.cols);
        let dequantize = self.table.dequant_row[weights.quant.number() as usize].expect(FILLED);
        let rows = weights.bytes.chunks_exact(weights.row_bytes());
        for (index, (row, out)) in rows.zip(out.chunks_exact_mut(weights.cols)).enumerate() {
            // SAFETY: `row` is a row of `cols` weights, `out` has `cols` floats.
            unsafe { dequantize(row.as_ptr().cast(), weights.cols, out.as_mut_ptr()) }
            if let Some(tiles) = weights.tiles {
                tiles.scale(weights.first + index, out);
            }
        }
    }

    /// Rows of activations to int8.
    pub(super) fn quantize(&self, x: &[f32], q: &mut [i8], d: &mut [f32], sum: &mut [i16]) {
        assert!(x.len().is_multiple_of(ACT_GROUP) && q.len() == x.len());
        assert!(d.len() == x.len() / ACT_GROUP && sum.len() == x.len() / SUM_GROUP);
        let quantize = self.table.quantize.expect(FILLED);
        // SAFETY: as asserted. A group is quantised by itself, so several rows may be passed as
        // one.
        unsafe { quantize(x.as_ptr(), x.len(), q.as_mut_ptr(), d.as_mut_ptr(), sum.as_mut_ptr()) }
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight`, a row.
    pub(super) fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == weight.len() && out.len() == x.len());
        let norm = self.table.rms_norm.expect(FILLED);
        // SAFETY: as asserted.
        unsafe { norm(x.as_ptr(), weight.as_ptr(), x.len(), eps, out.as_mut_ptr()) }
    }

    /// [`Isa::rms_norm`] in place.
    pub(super) fn rms_norm_inplace(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        assert_eq!(x.len(), weight.len());
        let norm = self.table.rms_norm.expect(FILLED);
        let start = x.as_mut_ptr();
        // SAFETY: as asserted; the function allows `out` to be `x`.
        unsafe { norm(start, weight.as_ptr(), x.len(), eps, start) }
    }

    /// Turns the heads of one position.
    pub(super) fn rope(
        &self,
        kind: RopeKind,
        x: &mut [f32],
        head_dim: usize,
        (cos, sin): (&[f32], &[f32]),
    ) {
        assert!(x.len().is_multiple_of(head_dim));
        assert!(cos.len() == sin.len() && 2 * cos.len() <= head_dim);
        let kind = match kind {
            RopeKind::Adjacent => ffi::v4_rope::ROPE_ADJACENT,
            RopeKind::Halves => ffi::v4_rope::ROPE_HALVES,
        };
        let (rope, n_heads) = (self.table.rope.expect(FILLED), x.len() / head_dim);
        let x = x.as_mut_ptr();
        // SAFETY: as asserted.
        unsafe { rope(kind, x, n_heads, head_dim, cos.as_ptr(), sin.as_ptr(), cos.len()) }
    }

    /// Queries for keys in bytes; `out` is as long as `q`, and what is in it is for
    /// [`Isa::attn_scores`] alone.
    pub(super) fn attn_query(&self, q: &[f32], head_dim: usize, out: &mut [f32]) {
        assert!(q.len() == out.len() && q.len().is_multiple_of(head_dim));
        assert!(head_dim.is_multiple_of(KvType::Q8_0.group()));
        let query = self.table.attn_query.expect(FILLED);
        // SAFETY: as asserted.
        unsafe { query(q.as_ptr(), q.len() / head_dim, head_dim, out.as_mut_ptr()) }
    }

    /// `scores[i][j] = scale * q[i] k[j]` for the `n_kv` tokens whose slabs are `k`; rows of
    /// `scores` are `stride` apart and written to the end of the last slab. `next` is what will be
    /// read then.
    pub(super) fn attn_scores(
        &self,
        (q, scale): (&[f32], f32),
        k: &Slabs<'_>,
        (scores, stride): (&mut [f32], usize),
        next: Option<&Slabs<'_>>,
    ) {
        let n_q = q.len() / k.head_dim;
        k.check();
        let written = k.n_kv.next_multiple_of(SLAB);
        assert!(q.len() == n_q * k.head_dim && n_q > 0);
        assert!(written <= stride && scores.len() >= (n_q - 1) * stride + written);
        let product = self.table.attn_scores[k.kind()].expect(FILLED);
        let (slabs, scores, next) = (k.start(), scores.as_mut_ptr(), k.next(next));
        // SAFETY: as asserted; `next` is NULL or as many bytes as these slabs.
        unsafe {
            product(q.as_ptr(), n_q, slabs, k.n_kv, k.head_dim, scale, scores, stride, next);
        }
    }

    /// `x = e^(x - max x)`; gives the maximum and the sum.
    pub(super) fn softmax_tile(&self, x: &mut [f32]) -> (f32, f32) {
        assert!(!x.is_empty());
        let (mut max, mut sum) = (0.0, 0.0);
        let softmax = self.table.softmax_tile.expect(FILLED);
        // SAFETY: as asserted.
        unsafe { softmax(x.as_mut_ptr(), x.len(), &raw mut max, &raw mut sum) };
        (max, sum)
    }

    /// `out[i] += sum of p[i][j] * v[j]` for the `n_kv` tokens whose slabs are `v`; rows of `p` are
    /// `stride` apart. `next` is what will be read then.
    pub(super) fn attn_values(
        &self,
        (p, stride): (&[f32], usize),
        v: &Slabs<'_>,
        out: &mut [f32],
        next: Option<&Slabs<'_>>,
    ) {
        let n_q = out.len() / v.head_dim;
        v.check();
        assert!(out.len() == n_q * v.head_dim && n_q > 0);
        assert!(v.n_kv <= ffi::V4_KV_TOKENS as usize);
        assert!(v.n_kv <= stride && p.len() >= (n_q - 1) * stride + v.n_kv);
        let product = self.table.attn_values[v.kind()].expect(FILLED);
        let (slabs, out, next) = (v.start(), out.as_mut_ptr(), v.next(next));
        // SAFETY: as asserted; `next` is NULL or as many bytes as these slabs.
        unsafe { product(p.as_ptr(), n_q, stride, slabs, v.n_kv, v.head_dim, out, next) }
    }

    /// `x = a x + b y`.
    pub(super) fn join(&self, x: &mut [f32], a: f32, y: &[f32], b: f32) {
        assert_eq!(x.len(), y.len());
        let join = self.table.join.expect(FILLED);
        // SAFETY: as asserted.
        unsafe { join(x.as_mut_ptr(), a, y.as_ptr(), b, x.len()) }
    }

    /// `gate = activation(gate) * up`.
    pub(super) fn gated(&self, activation: Activation, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len());
        let kind = match activation {
            Activation::Silu => ffi::v4_activation::SILU,
            Activation::GeluTanh => ffi::v4_activation::GELU_TANH,
            Activation::ClampedSwish { alpha, limit } => {
                return self.gated_clamped((alpha, limit), gate, up);
            }
        };
        let gated = self.table.gated.expect(FILLED);
        // SAFETY: as asserted.
        unsafe { gated(kind, gate.as_mut_ptr(), up.as_ptr(), gate.len()) }
    }

    /// [`Activation::ClampedSwish`] by way of [`Activation::Silu`]: `g / (1 + e^(-alpha g))` is
    /// `silu(alpha g) / alpha`.
    fn gated_clamped(&self, (alpha, limit): (f32, f32), gate: &mut [f32], up: &[f32]) {
        /// Values at a time: both stay in the first cache.
        const PART: usize = 512;
        let mut factors = [0.0; PART];
        for (gate, up) in gate.chunks_mut(PART).zip(up.chunks(PART)) {
            let factors = &mut factors[..up.len()];
            for ((gate, up), factor) in gate.iter_mut().zip(up).zip(factors.iter_mut()) {
                // NaN stays NaN: `min` and `max` would drop it.
                *gate = alpha * if *gate > limit { limit } else { *gate };
                *factor = (up.clamp(-limit, limit) + 1.0) / alpha;
            }
            self.gated(Activation::Silu, gate, factors);
        }
    }

    /// `x = cap tanh(x / cap)`.
    pub(super) fn soft_cap(&self, x: &mut [f32], cap: f32) {
        let soft_cap = self.table.soft_cap.expect(FILLED);
        // SAFETY: the length is the slice's.
        unsafe { soft_cap(x.as_mut_ptr(), x.len(), cap) }
    }

    /// `x += y`.
    pub(super) fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len());
        let add = self.table.add.expect(FILLED);
        // SAFETY: as asserted.
        unsafe { add(x.as_mut_ptr(), y.as_ptr(), x.len()) }
    }

    /// To half precision.
    pub(super) fn f16_from_f32(&self, x: &[f32], out: &mut [u16]) {
        assert_eq!(x.len(), out.len());
        let convert = self.table.f16_from_f32.expect(FILLED);
        // SAFETY: as asserted.
        unsafe { convert(x.as_ptr(), x.len(), out.as_mut_ptr()) }
    }
}

/// Why no slot is empty: `v4_isa_open` fills each from the entries before, and the first has all.
const FILLED: &str = "an opened table has every slot";
