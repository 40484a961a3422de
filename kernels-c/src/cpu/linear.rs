//! Products of activations with weight matrices.
//!
//! The input is quantised once for all parts. Up to [`GEMV_TOKENS`] rows are multiplied straight
//! from the file's blocks, all parts in one job; more rows are worth unpacking a panel of weight
//! rows, which then serves all of them. Both ways round alike (see `v4_gemv_fn` in v4.h), so how a
//! prompt is cut does not change what comes out.

use std::ops::Range;

use super::Cpu;
use super::input::Forms;
use super::isa::{Acts, GEMV_TOKENS, Isa, PANEL_ROWS, Rows};
use super::memory::{Spread, Tile};
use crate::device::{Buffer, Input, Linear, Matrix, Tiles, Weight};
use crate::pool::Scratch;

/// Bytes of weights in a share of a product with few rows: long beside the 50 ns that taking a
/// share costs, short beside the product, so that threads end together.
const SHARE_BYTES: Range<usize> = 8 << 10..256 << 10;
/// Shares a thread of a product with few rows, between those bounds.
const SHARES_A_THREAD: usize = 8;
/// Tokens that use a panel of a product with many rows before other threads unpack it again.
pub(super) const PANEL_TOKENS: usize = 512;
/// Tokens that are multiplied by the scales of a tile at once: beside a panel they fit a second
/// cache.
const SCALED_TOKENS: usize = 48;
/// Floats of a cache line: working memory is divided on its boundaries.
const LINE_FLOATS: usize = 16;

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
    is_added: bool,
    out: Spread<'a, f32>,
}

impl Part<'_> {
    fn compute(&self, isa: &Isa, x: &Acts<'_>, share: &Share, scratch: &mut Scratch) {
        let (n, width) = (share.tokens.len(), share.rows.len());
        let x = x.rows_at(share.tokens.start, n);
        let room_len = room_len(isa, self.weight, n);
        // SAFETY: shares are disjoint in rows or in tokens, and each is taken once.
        let mut out =
            unsafe { self.out.tile(share.tokens.clone(), self.weight.rows(), share.rows.clone()) };
        if !self.is_added {
            self.multiply(isa, &x, &share.rows, &mut out, scratch.floats(room_len));
            return;
        }
        let (room, part) = scratch.floats(room_len + n * width).split_at_mut(room_len);
        let part = Spread::new(part);
        // SAFETY: the only tile of memory that is this thread's own.
        let mut part = unsafe { part.tile(0..n, width, 0..width) };
        self.multiply(isa, &x, &share.rows, &mut part, room);
        for token in 0..n {
            isa.add(out.row(token), part.row(token));
        }
    }

    fn multiply(
        &self,
        isa: &Isa,
        x: &Acts<'_>,
        rows: &Range<usize>,
        out: &mut Tile<'_>,
        room: &mut [f32],
    ) {
        product(isa, Rows::of(self.weight, rows.start, rows.len()), x, out, room);
        finish(out, self.scale, self.bias.map(|bias| &bias[rows.clone()]));
    }
}

/// The product of some rows of a matrix: straight from its blocks for few tokens, else by panels.
/// `room` is as long as [`room_len`] says.
pub(super) fn product(
    isa: &Isa,
    weights: Rows<'_>,
    x: &Acts<'_>,
    out: &mut Tile<'_>,
    room: &mut [f32],
) {
    match weights.tiles() {
        Some(tiles) => product_of_tiles(isa, (weights, tiles), x, out, room),
        None => plain_product(isa, weights, x, out, room),
    }
}

/// Where tiles have scales, a row of them is multiplied by activations that are scaled for it, as
/// many times fewer numbers than weights as a tile is high.
fn product_of_tiles(
    isa: &Isa,
    (weights, tiles): (Rows<'_>, &Tiles),
    x: &Acts<'_>,
    out: &mut Tile<'_>,
    room: &mut [f32],
) {
    let (scaled, room) = room.split_at_mut(scaled_len(x.rows(), x.cols));
    let mut first = 0;
    while first < weights.len {
        let row = weights.first + first;
        let end = weights.len.min(first + tiles.height() - row % tiles.height());
        let part = weights.part(first, end - first).without_tiles();
        for token in (0..x.rows()).step_by(SCALED_TOKENS) {
            let tokens = token..x.rows().min(token + SCALED_TOKENS);
            let x = x.rows_at(token, tokens.len());
            let scaled = &mut scaled[..x.x.len()];
            scaled.copy_from_slice(x.x);
            scaled.chunks_exact_mut(x.cols).for_each(|x| tiles.scale(row, x));
            let x = Acts { x: scaled, ..x };
            plain_product(isa, part, &x, &mut out.part(tokens, first..end), room);
        }
        first = end;
    }
}

fn plain_product(isa: &Isa, weights: Rows<'_>, x: &Acts<'_>, out: &mut Tile<'_>, room: &mut [f32]) {
    let is_whole = isa.takes_whole(weights.quant);
    if x.rows() <= GEMV_TOKENS && (is_whole || !weights.quant.is_blocks()) {
        isa.gemv(weights, x, out);
        return;
    }
    for first in (0..weights.len).step_by(PANEL_ROWS) {
        let rows = PANEL_ROWS.min(weights.len - first);
        let weights = weights.part(first, rows);
        let mut out = out.part(0..x.rows(), first..first + rows);
        if is_whole {
            isa.panel(weights, room);
            isa.gemm_i8(weights.quant, room, x, &mut out);
        } else {
            let floats = &mut room[..rows * weights.cols];
            isa.dequantize(weights, floats);
            isa.gemm_f32(floats, x, &mut out);
        }
    }
}

/// Floats of working memory that [`product`] wants for `tokens` rows, in whole cache lines.
pub(super) fn room_len(isa: &Isa, matrix: &Matrix, tokens: usize) -> usize {
    let panel = if isa.takes_whole(matrix.quant()) {
        isa.panel_len(matrix.quant(), matrix.cols())
    } else {
        PANEL_ROWS * matrix.cols()
    };
    let scaled = matrix.tiles().map_or(0, |_| scaled_len(tokens, matrix.cols()));
    panel.next_multiple_of(LINE_FLOATS) + scaled
}

fn scaled_len(tokens: usize, cols: usize) -> usize {
    (tokens.min(SCALED_TOKENS) * cols).next_multiple_of(LINE_FLOATS)
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
    pub(super) fn products(&mut self, input: Input<'_>, rows: usize, parts: &mut [Linear<'_>]) {
        let Some(first) = parts.first() else { return };
        if rows == 0 {
            return;
        }
        let cols = first.weight.matrix.cols();
        let matrices = || parts.iter().map(|part| part.weight.matrix);
        assert!(matrices().all(|matrix| matrix.cols() == cols), "one input for all parts");
        let forms = Forms::of(&self.isa, matrices());
        let Self { isa, pool, inputs, shares, .. } = self;
        let acts = inputs.prepare((isa, pool), input, [rows, cols], forms);
        let parts: Vec<Part<'_>> = parts.iter_mut().map(|part| checked(part, rows)).collect();
        plan(&parts, rows, pool.threads(), &mut shares.0);
        let shares = &shares.0;
        pool.run(shares.len(), &|share, scratch| {
            let share = &shares[share];
            parts[share.part].compute(isa, &acts, share, scratch);
        });
    }
}

/// The plan of shares, kept between calls for its memory.
#[derive(Debug, Default)]
pub(super) struct Shares(Vec<Share>);

fn checked<'a>(part: &'a mut Linear<'_>, rows: usize) -> Part<'a> {
    let Linear { weight: Weight { matrix, bias, scale }, out, is_added } = part;
    let width = matrix.rows();
    let Buffer::Host(out) = &mut **out;
    let bias = bias.map(|Buffer::Host(bias)| {
        assert_eq!(bias.len(), width, "a bias for each row of the weight");
        bias.floats()
    });
    let out = Spread::new(&mut out.floats_mut()[..rows * width]);
    Part { weight: matrix, bias, scale: *scale, is_added: *is_added, out }
}
