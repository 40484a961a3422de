//! Products of activations with weight matrices.
//!
//! The input is quantised once for all parts. Up to [`GEMV_TOKENS`] rows are multiplied straight
//! from the file's blocks, all parts in one job; more rows are worth unpacking a panel of weight
//! rows, which then serves all of them. Both ways round alike (see `v4_gemv_fn` in v4.h), so how a
//! prompt is cut does not change what comes out.

use std::ops::Range;

use super::Cpu;
use super::isa::{ACT_GROUP, Acts, GEMV_TOKENS, Isa, PANEL_ROWS, Rows, SUM_GROUP};
use super::memory::{Spread, Tile};
use crate::device::{Buffer, Linear, Matrix};
use crate::pool::Scratch;

/// Bytes of weights in a share of a product with few rows: long beside the 50 ns that taking a
/// share costs, short beside the product, so that threads end together.
const SHARE_BYTES: Range<usize> = 8 << 10..256 << 10;
/// Shares a thread of a product with few rows, between those bounds.
const SHARES_A_THREAD: usize = 8;
/// Tokens that use a panel of a product with many rows before other threads unpack it again.
pub(super) const PANEL_TOKENS: usize = 512;
/// Activations quantised by one thread: beneath, waking another costs more.
const QUANTIZE_ALONE: usize = 16 << 10;

/// The quantised input of a product, kept between calls.
#[derive(Debug, Default)]
pub(super) struct Quantized {
    pub(super) q: Vec<i8>,
    pub(super) d: Vec<f32>,
    pub(super) sum: Vec<i16>,
}

/// A piece of a product.
#[derive(Debug, Clone)]
struct Share {
    part: usize,
    rows: Range<usize>,
    tokens: Range<usize>,
}

/// What a share needs of a [`Linear`].
struct Part<'a> {
    weight: &'a Matrix,
    bias: Option<&'a [f32]>,
    scale: f32,
    out: Spread<'a, f32>,
}

impl Part<'_> {
    fn compute(&self, isa: &Isa, x: &Acts<'_>, share: &Share, scratch: &mut Scratch) {
        let width = self.weight.rows();
        // SAFETY: shares are disjoint in rows or in tokens, and each is taken once.
        let mut out = unsafe { self.out.tile(share.tokens.clone(), width, share.rows.clone()) };
        let weights = Rows::of(self.weight, share.rows.start, share.rows.len());
        let x = x.rows_at(share.tokens.start, share.tokens.len());
        product(isa, weights, &x, &mut out, scratch.floats(panel_len(isa, self.weight)));
        let bias = self.bias.map(|bias| &bias[share.rows.clone()]);
        finish(&mut out, self.scale, bias);
    }
}

/// The product of some rows of a matrix: straight from its blocks for few tokens, else by panels,
/// for which `panel` is room.
pub(super) fn product(
    isa: &Isa,
    weights: Rows<'_>,
    x: &Acts<'_>,
    out: &mut Tile<'_>,
    panel: &mut [f32],
) {
    if x.rows() <= GEMV_TOKENS {
        isa.gemv(weights, x, out);
        return;
    }
    for first in (0..weights.len).step_by(PANEL_ROWS) {
        let rows = PANEL_ROWS.min(weights.len - first);
        let weights = weights.part(first, rows);
        let mut out = out.columns(first..first + rows);
        if weights.quant.is_blocks() {
            isa.panel(weights, panel);
            isa.gemm_i8(weights.quant, panel, x, &mut out);
        } else {
            let floats = &mut panel[..rows * weights.cols];
            isa.dequantize(weights, floats);
            isa.gemm_f32(floats, x, &mut out);
        }
    }
}

/// Floats of working memory that [`product`] wants for a panel, in whole cache lines.
pub(super) fn panel_len(isa: &Isa, matrix: &Matrix) -> usize {
    let len = if matrix.quant().is_blocks() {
        isa.panel_len(matrix.quant(), matrix.cols())
    } else {
        PANEL_ROWS * matrix.cols()
    };
    len.next_multiple_of(16)
}

/// Bytes of weights in a share of a job that reads `bytes` of them for few tokens.
pub(super) fn share_bytes(bytes: usize, threads: usize) -> usize {
    (bytes / (threads * SHARES_A_THREAD)).clamp(SHARE_BYTES.start, SHARE_BYTES.end)
}

/// `out = out * scale + bias`.
pub(super) fn finish(out: &mut Tile<'_>, scale: f32, bias: Option<&[f32]>) {
    if scale.to_bits() == 1f32.to_bits() && bias.is_none() {
        return;
    }
    for row in 0..out.rows {
        let row = out.row(row);
        for value in row.iter_mut() {
            *value *= scale;
        }
        for (value, bias) in row.iter_mut().zip(bias.into_iter().flatten()) {
            *value += bias;
        }
    }
}

/// Cuts the product of all parts with `tokens` rows into shares.
fn plan(parts: &[Part<'_>], tokens: usize, threads: usize, shares: &mut Vec<Share>) {
    shares.clear();
    let bytes: usize = parts.iter().map(|part| part.weight.bytes().len()).sum();
    let share_bytes = share_bytes(bytes, threads);
    for (index, part) in parts.iter().enumerate() {
        let n_rows = part.weight.rows();
        let row_bytes = (part.weight.bytes().len() / n_rows.max(1)).max(1);
        let (step, token_step) = if tokens <= GEMV_TOKENS {
            ((share_bytes / row_bytes).max(1).next_multiple_of(PANEL_ROWS / 2), tokens)
        } else {
            (PANEL_ROWS, PANEL_TOKENS)
        };
        for first in (0..n_rows).step_by(step) {
            let rows = first..n_rows.min(first + step);
            for token in (0..tokens).step_by(token_step.max(1)) {
                let tokens = token..tokens.min(token + token_step);
                shares.push(Share { part: index, rows: rows.clone(), tokens });
            }
        }
    }
}

impl Cpu {
    /// See [`crate::Device::linear`].
    pub(super) fn products(&mut self, x: &Buffer, rows: usize, parts: &mut [Linear<'_>]) {
        let Some(first) = parts.first() else { return };
        if rows == 0 {
            return;
        }
        let cols = first.weight.cols();
        assert!(parts.iter().all(|part| part.weight.cols() == cols), "one input for all parts");
        let Buffer::Host(x) = x;
        let x = &x.floats()[..rows * cols];
        if parts.iter().any(|part| part.weight.quant().is_blocks()) {
            self.quantize(x, cols);
        } else {
            self.quantized.clear();
        }
        let parts: Vec<Part<'_>> = parts.iter_mut().map(|part| checked(part, rows)).collect();
        plan(&parts, rows, self.pool.threads(), &mut self.shares.0);
        let Quantized { q, d, sum } = &self.quantized;
        let (isa, shares) = (&self.isa, &self.shares.0);
        let acts = Acts { cols, x, q, d, sum };
        self.pool.run(shares.len(), &|share, scratch| {
            let share = &shares[share];
            parts[share.part].compute(isa, &acts, share, scratch);
        });
    }

    /// Fills `self.quantized` with rows of `cols` values.
    pub(super) fn quantize(&mut self, x: &[f32], cols: usize) {
        assert!(cols.is_multiple_of(ACT_GROUP), "{cols} columns are no whole groups");
        let Quantized { q, d, sum } = &mut self.quantized;
        q.resize(x.len(), 0);
        d.resize(x.len() / ACT_GROUP, 0.0);
        sum.resize(x.len() / SUM_GROUP, 0);
        if x.len() <= QUANTIZE_ALONE {
            self.isa.quantize(x, q, d, sum);
            return;
        }
        let (q, d, sum) = (Spread::new(q), Spread::new(d), Spread::new(sum));
        let step = QUANTIZE_ALONE / 2;
        let isa = &self.isa;
        self.pool.run(x.len().div_ceil(step), &|share, _| {
            let (from, to) = (share * step, x.len().min((share + 1) * step));
            // SAFETY: shares are disjoint: `step` is a multiple of both groups.
            let (q, d, sum) = unsafe {
                (
                    q.part(from..to),
                    d.part(from / ACT_GROUP..to / ACT_GROUP),
                    sum.part(from / SUM_GROUP..to / SUM_GROUP),
                )
            };
            isa.quantize(&x[from..to], q, d, sum);
        });
    }
}

/// The plan of shares, kept between calls for its memory.
#[derive(Debug, Default)]
pub(super) struct Shares(Vec<Share>);

impl Quantized {
    pub(super) fn clear(&mut self) {
        self.q.clear();
        self.d.clear();
        self.sum.clear();
    }
}

fn checked<'a>(part: &'a mut Linear<'_>, rows: usize) -> Part<'a> {
    let width = part.weight.rows();
    let Buffer::Host(out) = &mut *part.out;
    let bias = part.bias.map(|Buffer::Host(bias)| {
        assert_eq!(bias.len(), width, "a bias for each row of the weight");
        bias.floats()
    });
    let out = Spread::new(&mut out.floats_mut()[..rows * width]);
    Part { weight: part.weight, bias, scale: part.scale, out }
}
