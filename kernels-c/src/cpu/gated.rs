//! The first half of gated feed-forwards: gate, up and what the activation makes of them are one
//! job, whose shares leave it in the form that the next product reads. A dense layer is one group
//! of rows; a mixture of experts is a group for each expert that was chosen.

use std::ops::Range;

use super::Cpu;
use super::input::{Forms, HostActivations, QuantizedSpread};
use super::isa::{ACT_GROUP, Acts, GEMV_TOKENS, Isa, PANEL_ROWS, Rows};
use super::linear::{PANEL_TOKENS, finish, product, room_len, share_bytes};
use super::memory::{Spread, Tile};
use crate::device::{
    Activation, Activations, Buffer, ExpertWeights, GateUp, Input, Matrix, Weight,
};
use crate::pool::Scratch;

/// The rows of one matrix among those of all.
#[derive(Debug, Clone)]
pub(super) struct Group {
    /// Which of the matrices.
    pub(super) expert: usize,
    /// Which of the rows.
    pub(super) assigned: Range<usize>,
}

/// A piece of the job.
#[derive(Debug, Clone)]
struct Share {
    group: usize,
    /// Of gate and up.
    rows: Range<usize>,
    /// Of the group.
    tokens: Range<usize>,
}

/// The plan of shares, kept between calls for its memory.
#[derive(Debug, Default)]
pub(super) struct Shares(Vec<Share>);

impl Shares {
    /// Cuts gate and up into shares. `row_bytes` is what a row of each takes together.
    fn plan(&mut self, groups: &[Group], width: usize, row_bytes: usize, threads: usize) {
        self.0.clear();
        // Whole groups of activations for the product that follows.
        let bytes = share_bytes(groups.len() * width * row_bytes, threads);
        let few_rows = (bytes / row_bytes.max(1)).max(1).next_multiple_of(ACT_GROUP);
        for (group, Group { assigned, .. }) in groups.iter().enumerate() {
            let n = assigned.len();
            let step = if n <= GEMV_TOKENS { few_rows } else { PANEL_ROWS };
            for first in (0..width).step_by(step) {
                let rows = first..width.min(first + step);
                for token in (0..n).step_by(PANEL_TOKENS) {
                    let tokens = token..n.min(token + PANEL_TOKENS);
                    self.0.push(Share { group, rows: rows.clone(), tokens });
                }
            }
        }
    }
}

/// One of the products of all groups, checked.
pub(super) struct Weights<'a> {
    matrices: &'a [Matrix],
    bias: Option<&'a [f32]>,
    scales: &'a [f32],
}

impl<'a> Weights<'a> {
    pub(super) fn of(weights: &'a ExpertWeights, [rows, cols]: [usize; 2]) -> Self {
        let ExpertWeights { matrices, bias, scales } = weights;
        let first = &matrices[0];
        let is_same =
            |m: &Matrix| [m.rows(), m.cols()] == [rows, cols] && m.quant() == first.quant();
        assert!(matrices.iter().all(is_same), "experts of one shape and format");
        assert_eq!(scales.len(), matrices.len(), "a scale for each expert");
        let bias = bias.as_ref().map(|Buffer::Host(bias)| bias.floats());
        assert!(bias.is_none_or(|bias| bias.len() == matrices.len() * rows), "a bias a row");
        Self { matrices, bias, scales }
    }

    /// A single matrix.
    fn single(weight: &'a Weight<'a>) -> Self {
        let Weight { matrix, bias, scale } = weight;
        let bias = bias.map(|Buffer::Host(bias)| bias.floats());
        assert!(bias.is_none_or(|bias| bias.len() == matrix.rows()), "a bias a row");
        Self { matrices: std::slice::from_ref(matrix), bias, scales: std::slice::from_ref(scale) }
    }

    pub(super) fn shape(&self) -> [usize; 2] {
        [self.matrices[0].rows(), self.matrices[0].cols()]
    }

    pub(super) fn row_bytes(&self) -> usize {
        self.matrices[0].bytes().len() / self.matrices[0].rows().max(1)
    }

    /// Floats of working memory for `tokens` rows.
    pub(super) fn room_len(&self, isa: &Isa, tokens: usize) -> usize {
        room_len(isa, &self.matrices[0], tokens)
    }

    /// Rows `rows` of `expert`'s product with `x`.
    pub(super) fn compute(
        &self,
        isa: &Isa,
        (expert, rows): (usize, Range<usize>),
        x: &Acts<'_>,
        out: &mut Tile<'_>,
        room: &mut [f32],
    ) {
        let matrix = &self.matrices[expert];
        product(isa, Rows::of(matrix, rows.start, rows.len()), x, out, room);
        let first = expert * matrix.rows();
        let bias = self.bias.map(|bias| &bias[first + rows.start..first + rows.end]);
        finish(out, self.scales[expert], bias);
    }
}

/// The job.
pub(super) struct Job<'a> {
    gate: Weights<'a>,
    up: Weights<'a>,
    activation: Activation,
    groups: &'a [Group],
    /// Of all groups, or one row that is every group's.
    x: Acts<'a>,
    /// What is made, either as floats or quantised.
    floats: Option<Spread<'a, f32>>,
    quantized: QuantizedSpread<'a>,
}

impl<'a> Job<'a> {
    /// Of the rows `x` for matrices that `groups` name, into `out`, which is as long.
    pub(super) fn new(
        [gate, up]: [Weights<'a>; 2],
        activation: Activation,
        (groups, x): (&'a [Group], Acts<'a>),
        out: &'a mut HostActivations,
    ) -> Self {
        assert_eq!(gate.shape(), up.shape(), "gate and up of one shape");
        let HostActivations { x: floats, quantized, .. } = out;
        let floats = (!floats.is_empty()).then(|| Spread::new(floats));
        Self { gate, up, activation, groups, x, floats, quantized: quantized.spread() }
    }

    /// Does it on the threads of the pool.
    pub(super) fn run(&self, isa: &Isa, pool: &mut crate::pool::Pool, shares: &mut Shares) {
        let [width, _] = self.gate.shape();
        let row_bytes = self.gate.row_bytes() + self.up.row_bytes();
        shares.plan(self.groups, width, row_bytes, pool.threads());
        pool.run(shares.0.len(), &|share, scratch| self.compute(isa, &shares.0[share], scratch));
    }

    fn compute(&self, isa: &Isa, share: &Share, scratch: &mut Scratch) {
        let Group { expert, assigned } = &self.groups[share.group];
        let (n, width) = (share.tokens.len(), share.rows.len());
        let first = assigned.start + share.tokens.start;
        let x = self.x.rows_at(if self.x.rows() == 1 { 0 } else { first }, n);
        let room_len = self.gate.room_len(isa, n).max(self.up.room_len(isa, n));
        let (room, tiles) = scratch.floats(room_len + 2 * n * width).split_at_mut(room_len);
        let (gate, up) = tiles.split_at_mut(n * width);
        let (gate, up) = (Spread::new(gate), Spread::new(up));
        // SAFETY: the only tiles of memory that is this thread's own.
        let (mut gate, mut up) =
            unsafe { (gate.tile(0..n, width, 0..width), up.tile(0..n, width, 0..width)) };
        let of = (*expert, share.rows.clone());
        self.gate.compute(isa, of.clone(), &x, &mut gate, room);
        self.up.compute(isa, of, &x, &mut up, room);
        for token in 0..n {
            let gate = gate.row(token);
            isa.gated(self.activation, gate, up.row(token));
            self.keep(isa, gate, (first + token) * self.gate.shape()[0] + share.rows.start);
        }
    }

    /// Puts a part of a row to where value `from` is.
    fn keep(&self, isa: &Isa, x: &[f32], from: usize) {
        // SAFETY: shares are disjoint in rows of the input or of the weights, each is taken once,
        // and where they are quantised they are whole groups.
        unsafe {
            match &self.floats {
                Some(floats) => floats.part(from..from + x.len()).copy_from_slice(x),
                None => self.quantized.quantize(isa, x, from),
            }
        }
    }
}

impl Cpu {
    /// See [`crate::Device::gate_up`].
    pub(super) fn gate_and_up(
        &mut self,
        input: Input<'_>,
        rows: usize,
        weights: &GateUp<'_>,
        out: &mut Activations,
    ) {
        let GateUp { gate, up, activation, reader } = weights;
        let [width, cols] = [gate.matrix.rows(), gate.matrix.cols()];
        assert_eq!(reader.cols(), width, "a product that reads this");
        out.0.resize(&self.isa, [rows, width], reader);
        if rows == 0 {
            return;
        }
        let forms = Forms::of(&self.isa, [gate.matrix, up.matrix]);
        let x = self.inputs.prepare((&self.isa, &mut self.pool), input, [rows, cols], forms);
        let groups = [Group { expert: 0, assigned: 0..rows }];
        let both = [Weights::single(gate), Weights::single(up)];
        let job = Job::new(both, *activation, (&groups, x), &mut out.0);
        job.run(&self.isa, &mut self.pool, &mut self.gated_shares);
    }
}
