//! Attention over the cached keys and values.
//!
//! The query heads that share a KV head are worked on together, with as many rows of the batch as
//! make it worth while, so that a key or value is read once for all of them. The cache is walked in
//! tiles of [`TILE`] tokens that begin at multiples of it. A tile is a softmax of its own; tiles
//! are joined in order (Dao et al. 2022, Milakov and Gimelshein 2018). Where there are few rows,
//! threads take tiles of one row and the results are joined at the end, in the same order: hence a
//! row's result depends neither on the other rows nor on the threads.

use std::ops::Range;

use super::Cpu;
use super::isa::Isa;
use super::memory::{HostKv, Spread};
use crate::device::{Attention, Buffer, KvCache, KvShape, Span};
use crate::pool::Scratch;

/// Tokens of a tile: keys and values of a head of 64 then take 32 KiB, what the first cache holds.
const TILE: usize = 128;
/// Query rows (rows times heads of the group) that a share works on at most: their outputs stay in
/// the second cache.
pub const QUERY_ROWS: usize = 48;
/// Tiles that a share takes when it has too few query rows to be worth more.
const TILES: usize = 4;

/// One layer's cache and what is done with it.
struct Layer<'a> {
    attention: Attention<'a>,
    shape: KvShape,
    n_blocks: usize,
    index: usize,
    data: &'a HostKv,
}

/// Rows of one sequence, one KV head, and the tiles to walk.
#[derive(Debug, Clone)]
struct Share {
    span: usize,
    kv_head: usize,
    rows: Range<usize>,
    tiles: Range<usize>,
    /// Where the tiles' results go when they are joined later.
    partial: Option<usize>,
}

/// Rows whose tiles were computed by several shares, to be joined.
#[derive(Debug, Clone)]
struct Joint {
    span: usize,
    kv_head: usize,
    row: usize,
    n_tiles: usize,
    partial: usize,
}

/// What is to be done for a batch, kept between calls for its memory.
#[derive(Debug, Default)]
pub(super) struct Plan {
    shares: Vec<Share>,
    joints: Vec<Joint>,
    /// A tile's result for each query row: maximum, sum and `head_dim` values.
    partials: Vec<f32>,
}

/// Working memory of a share.
struct Work<'a> {
    queries: &'a mut [f32],
    scores: &'a mut [f32],
    tile: &'a mut [f32],
}

/// The softmax of the tiles so far, for each query row: maximum, sum and values.
struct State<'a> {
    max_sum: &'a mut [f32],
    values: &'a mut [f32],
}

impl Layer<'_> {
    /// Query heads of a KV head.
    fn group(&self) -> usize {
        self.attention.n_heads / self.shape.n_kv_heads
    }

    /// The sinks of `kv_head`'s group, if there are any.
    fn sinks(&self, kv_head: usize) -> &[f32] {
        let group = self.group();
        self.attention.sinks.map_or(&[][..], |Buffer::Host(sinks)| {
            &sinks.floats()[kv_head * group..(kv_head + 1) * group]
        })
    }

    /// Where the heads of `kv_head`'s group of one row lie in queries and results.
    fn heads(&self, row: usize, kv_head: usize) -> Range<usize> {
        let width = self.group() * self.shape.head_dim;
        let from = (row * self.shape.n_kv_heads + kv_head) * width;
        from..from + width
    }

    /// The positions that row `row` of `span` sees.
    fn visible(&self, span: &Span<'_>, row: usize) -> Range<usize> {
        let end = span.kv_len - span.n_rows + row + 1;
        let window = self.attention.window.unwrap_or(usize::MAX);
        end.saturating_sub(window)..end
    }

    /// The tiles that rows `rows` of `span` see.
    fn tiles(&self, span: &Span<'_>, rows: &Range<usize>) -> Range<usize> {
        let first = self.visible(span, rows.start).start / TILE;
        first..self.visible(span, rows.end - 1).end.div_ceil(TILE)
    }

    /// The stretches of tokens `tokens` that lie together, as (offset in the tile, where in keys or
    /// values).
    fn stretches<'a>(
        &'a self,
        share: &'a Share,
        blocks: &'a [u32],
        tokens: Range<usize>,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
        let KvShape { n_kv_heads, head_dim, block_tokens, .. } = self.shape;
        let begin = tokens.start;
        let mut at = begin;
        std::iter::from_fn(move || {
            if at >= tokens.end {
                return None;
            }
            let (block, offset) = (blocks[at / block_tokens] as usize, at % block_tokens);
            assert!(block < self.n_blocks, "block {block} of {}", self.n_blocks);
            let n = (block_tokens - offset).min(tokens.end - at);
            let head = (self.index * self.n_blocks + block) * n_kv_heads + share.kv_head;
            let from = (head * block_tokens + offset) * head_dim;
            let stretch = (at - begin, from..from + n * head_dim);
            at += n;
            Some(stretch)
        })
    }

    /// One tile for all query rows of the share: leaves each one's values in `work.tile` and gives
    /// its (maximum, sum) to `done`.
    fn tile(
        &self,
        isa: &Isa,
        (share, span): (&Share, &Span<'_>),
        tile: usize,
        work: &mut Work<'_>,
        mut done: impl FnMut(usize, (f32, f32), &[f32]),
    ) {
        let head_dim = self.shape.head_dim;
        let end = self.visible(span, share.rows.end - 1).end;
        let tokens = tile * TILE..end.min((tile + 1) * TILE);
        let begin = tokens.start;
        let n_queries = work.queries.len() / head_dim;
        for (at, keys) in self.stretches(share, span.blocks, tokens.clone()) {
            let (scores, keys) = (&mut work.scores[at..], &self.data.keys()[keys]);
            isa.attn_scores((work.queries, keys), head_dim, self.attention.scale, scores, TILE);
        }
        let mut max_sum = [(0.0, 0.0); QUERY_ROWS];
        for (query, max_sum) in max_sum.iter_mut().take(n_queries).enumerate() {
            let visible = self.visible(span, share.rows.start + query / self.group());
            let scores = &mut work.scores[query * TILE..][..TILE];
            let from = visible.start.saturating_sub(begin).min(TILE);
            let to = visible.end.saturating_sub(begin).min(TILE);
            if let Some(cap) = self.attention.soft_cap {
                isa.soft_cap(&mut scores[from..to.max(from)], cap);
            }
            scores[..from].fill(f32::NEG_INFINITY);
            scores[to..].fill(f32::NEG_INFINITY);
            *max_sum = isa.softmax_tile(scores);
        }
        work.tile.fill(0.0);
        for (at, values) in self.stretches(share, span.blocks, tokens) {
            let p = (&work.scores[at..], TILE);
            isa.attn_values(p, &self.data.values()[values], head_dim, work.tile);
        }
        for (query, values) in work.tile.chunks_exact(head_dim).enumerate() {
            done(query, max_sum[query], values);
        }
    }
}

/// Joins a tile's result to those before it.
fn join(isa: &Isa, state: &mut [f32], values: &mut [f32], (max, sum): (f32, f32), tile: &[f32]) {
    if sum == 0.0 {
        return;
    }
    let larger = state[0].max(max);
    let (before, now) = ((state[0] - larger).exp(), (max - larger).exp());
    isa.join(values, before, tile, now);
    state[0] = larger;
    state[1] = state[1] * before + sum * now;
}

/// The state before the first tile.
const NOTHING: [f32; 2] = [f32::NEG_INFINITY, 0.0];

impl Plan {
    fn make(&mut self, layer: &Layer<'_>, spans: &[Span<'_>], threads: usize) {
        self.shares.clear();
        self.joints.clear();
        let group = layer.group();
        let rows_a_share = (QUERY_ROWS / group).max(1);
        let width = 2 + layer.shape.head_dim;
        let mut partial = 0;
        for (index, span) in spans.iter().enumerate() {
            for kv_head in 0..layer.shape.n_kv_heads {
                for first in (0..span.n_rows).step_by(rows_a_share) {
                    let rows = first..span.n_rows.min(first + rows_a_share);
                    let tiles = layer.tiles(span, &rows);
                    let share = Share { span: index, kv_head, rows, tiles, partial: None };
                    if share.rows.len() == 1 && share.tiles.len() > TILES && threads > 1 {
                        partial += self.split(&share, partial, group * width);
                    } else {
                        self.shares.push(share);
                    }
                }
            }
        }
        if self.partials.len() < partial {
            self.partials.resize(partial, 0.0);
        }
    }

    /// Cuts a share of one row into shares of some tiles; gives the floats that their results take.
    fn split(&mut self, share: &Share, partial: usize, tile_len: usize) -> usize {
        let n_tiles = share.tiles.len();
        for first in (0..n_tiles).step_by(TILES) {
            let from = share.tiles.start + first;
            let tiles = from..share.tiles.end.min(from + TILES);
            let partial = Some(partial + first * tile_len);
            self.shares.push(Share { tiles, partial, ..share.clone() });
        }
        let Share { span, kv_head, .. } = *share;
        self.joints.push(Joint { span, kv_head, row: share.rows.start, n_tiles, partial });
        n_tiles * tile_len
    }
}

/// A batch's queries and where its results go, both `[rows][n_heads][head_dim]`.
struct Batch<'a> {
    queries: &'a [f32],
    out: Spread<'a, f32>,
    partials: Spread<'a, f32>,
    spans: &'a [Span<'a>],
}

impl Batch<'_> {
    fn compute(&self, isa: &Isa, layer: &Layer<'_>, share: &Share, scratch: &mut Scratch) {
        let (span, head_dim) = (&self.spans[share.span], layer.shape.head_dim);
        let n_queries = share.rows.len() * layer.group();
        let scratch = scratch.floats(n_queries * (3 * head_dim + TILE + 2));
        let (queries, scratch) = scratch.split_at_mut(n_queries * head_dim);
        let (tile, scratch) = scratch.split_at_mut(n_queries * head_dim);
        let (scores, scratch) = scratch.split_at_mut(n_queries * TILE);
        let (values, max_sum) = scratch.split_at_mut(n_queries * head_dim);
        let width = layer.group() * head_dim;
        for (row, queries) in share.rows.clone().zip(queries.chunks_exact_mut(width)) {
            let heads = layer.heads(span.first_row + row, share.kv_head);
            queries.copy_from_slice(&self.queries[heads]);
        }
        let mut work = Work { queries, scores, tile };
        if share.partial.is_some() {
            self.compute_apart(isa, layer, share, &mut work);
            return;
        }
        values.fill(0.0);
        max_sum.chunks_exact_mut(2).for_each(|state| state.copy_from_slice(&NOTHING));
        let state = State { max_sum, values };
        for tile in share.tiles.clone() {
            layer.tile(isa, (share, span), tile, &mut work, |query, max_sum, tile| {
                let values = &mut state.values[query * head_dim..][..head_dim];
                join(isa, &mut state.max_sum[query * 2..][..2], values, max_sum, tile);
            });
        }
        for (at, row) in share.rows.clone().enumerate() {
            let heads = layer.heads(span.first_row + row, share.kv_head);
            // SAFETY: spans share no rows, as `attend` has seen: each row and KV head is in one
            // share, and in no joint.
            let out = unsafe { self.out.part(heads) };
            let max_sum = &state.max_sum[at * 2 * layer.group()..];
            let values = &state.values[at * width..][..width];
            divide(values, max_sum, layer.sinks(share.kv_head), head_dim, out);
        }
    }

    /// Leaves the result of each tile in `partials`, to be joined when all are there.
    fn compute_apart(&self, isa: &Isa, layer: &Layer<'_>, share: &Share, work: &mut Work<'_>) {
        let width = 2 + layer.shape.head_dim;
        let mut at = share.partial.expect("the caller looked");
        for tile in share.tiles.clone() {
            let share = (share, &self.spans[share.span]);
            layer.tile(isa, share, tile, work, |_, (max, sum), values| {
                // SAFETY: each tile of a joint has its own place and is in one share.
                let place = unsafe { self.partials.part(at..at + width) };
                place[0] = max;
                place[1] = sum;
                place[2..].copy_from_slice(values);
                at += width;
            });
        }
    }

    /// Joins the tiles of one row and KV head.
    fn join(&self, isa: &Isa, layer: &Layer<'_>, joint: &Joint, scratch: &mut Scratch) {
        let (head_dim, group) = (layer.shape.head_dim, layer.group());
        let span = &self.spans[joint.span];
        let (width, values) = (2 + head_dim, scratch.floats(head_dim));
        // SAFETY: the shares that wrote these are done, and each joint has its own.
        let partials = unsafe {
            self.partials.part(joint.partial..joint.partial + joint.n_tiles * group * width)
        };
        let heads = layer.heads(span.first_row + joint.row, joint.kv_head);
        // SAFETY: spans share no rows, as `attend` has seen: each row and KV head is in one joint,
        // and in no share that writes here.
        let out = unsafe { self.out.part(heads) };
        for (query, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let mut state = NOTHING;
            values.fill(0.0);
            for tile in partials.chunks_exact(group * width) {
                let tile = &tile[query * width..][..width];
                join(isa, &mut state, values, (tile[0], tile[1]), &tile[2..]);
            }
            let sinks = layer.sinks(joint.kv_head).get(query..).unwrap_or_default();
            divide(values, &state, sinks, head_dim, out);
        }
    }
}

/// `out = values / sum` for the query rows of one token, a sink being a score more in its row's
/// sum.
fn divide(values: &[f32], max_sum: &[f32], sinks: &[f32], head_dim: usize, out: &mut [f32]) {
    let rows = values.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
    for (head, ((values, out), state)) in rows.zip(max_sum.chunks_exact(2)).enumerate() {
        let sink = sinks.get(head).map_or(0.0, |sink| (sink - state[0]).exp());
        let factor = 1.0 / (state[1] + sink);
        for (out, value) in out.iter_mut().zip(values) {
            *out = value * factor;
        }
    }
}

impl Cpu {
    /// See [`crate::Device::attention`].
    pub(super) fn attend(
        &mut self,
        attention: &Attention<'_>,
        (kv, index): (&KvCache, usize),
        q: &Buffer,
        spans: &[Span<'_>],
        out: &mut Buffer,
    ) {
        let (shape, n_blocks) = (kv.shape, kv.n_blocks);
        assert!(index < shape.n_layers && attention.n_heads.is_multiple_of(shape.n_kv_heads));
        assert!(attention.n_heads / shape.n_kv_heads <= QUERY_ROWS, "heads of a KV head");
        assert!(attention.sinks.is_none_or(|sinks| sinks.len() == attention.n_heads));
        let rows = q.len().min(out.len()) / (attention.n_heads * shape.head_dim);
        let mut end = 0;
        for (index, span) in spans.iter().enumerate() {
            // `Batch` hands out rows of `out` on the strength of this.
            let first = span.first_row;
            let before = "where the last one ends";
            assert!(first >= end, "span {index} begins at row {first}, before row {end} {before}");
            end = first.checked_add(span.n_rows).expect("a batch has fewer rows than a usize");
            assert!(end <= rows, "span {index} ends at row {end} of {rows}");
            assert!(span.n_rows <= span.kv_len);
            assert!(span.kv_len <= span.blocks.len() * shape.block_tokens);
        }
        let layer = Layer { attention: *attention, shape, n_blocks, index, data: &kv.data };
        let (Buffer::Host(q), Buffer::Host(out)) = (q, out);
        self.plan.make(&layer, spans, self.pool.threads());
        let Plan { shares, joints, partials } = &mut self.plan;
        let batch = Batch {
            queries: q.floats(),
            out: Spread::new(out.floats_mut()),
            partials: Spread::new(partials),
            spans,
        };
        let isa = &self.isa;
        self.pool.run(shares.len(), &|share, scratch| {
            batch.compute(isa, &layer, &shares[share], scratch);
        });
        self.pool.run(joints.len(), &|joint, scratch| {
            batch.join(isa, &layer, &joints[joint], scratch);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::Random;
    use super::super::{CpuOptions, isas};
    use super::*;
    use crate::device::{Device, KvType};

    /// A sequence of a batch: tokens in the cache, and how many of them are rows.
    type Sequence = (usize, usize);

    struct Case {
        shape: KvShape,
        attention: Attention<'static>,
        sequences: Vec<Sequence>,
    }

    impl Case {
        fn new(n_heads: usize, n_kv_heads: usize, head_dim: usize, sequences: &[Sequence]) -> Self {
            let block_tokens = 16;
            let kv_type = KvType::F16;
            let shape = KvShape { n_layers: 2, n_kv_heads, head_dim, block_tokens, kv_type };
            let attention =
                Attention { n_heads, scale: 0.3, window: None, soft_cap: None, sinks: None };
            Self { shape, attention, sequences: sequences.to_vec() }
        }

        /// Queries, keys and values of token `token` of sequence `sequence`; the same whatever the
        /// batch.
        fn token(&self, sequence: usize, token: usize) -> [Vec<f32>; 3] {
            let mut random = Random::new((sequence * 100_003 + token) as u64 + 1);
            let kv = self.shape.n_kv_heads * self.shape.head_dim;
            [self.attention.n_heads * self.shape.head_dim, kv, kv].map(|n| {
                // Half-precision numbers, so that storing them loses nothing.
                random.reals(n).iter().map(|x| (4.0 * x * 256.0).round() / 256.0).collect()
            })
        }

        /// The rows of the batch by `Cpu`.
        fn run(&self, isa: &str, threads: usize) -> Vec<f32> {
            let options = CpuOptions { threads, isa: Some(isa.to_owned()) };
            let mut cpu = Cpu::open(&options).unwrap();
            let block_tokens = self.shape.block_tokens;
            let needed = |(len, _): &Sequence| len.div_ceil(block_tokens);
            let n_blocks = self.sequences.iter().map(needed).sum::<usize>() + 1;
            let mut kv = cpu.kv_cache(self.shape, n_blocks).unwrap();
            // Blocks in no order.
            let mut free: Vec<u32> = (0..).take(n_blocks).collect();
            free.sort_unstable_by_key(|block| block * 7919 % 101);
            let tables: Vec<Vec<u32>> =
                self.sequences.iter().map(|s| free.split_off(free.len() - needed(s))).collect();
            let (mut queries, mut spans, mut first_row) = (Vec::new(), Vec::new(), 0);
            for (index, &(kv_len, n_rows)) in self.sequences.iter().enumerate() {
                let (mut keys, mut values, mut slots) = (Vec::new(), Vec::new(), Vec::new());
                for token in 0..kv_len {
                    let [q, k, v] = self.token(index, token);
                    keys.extend(k);
                    values.extend(v);
                    let block = tables[index][token / block_tokens] as usize;
                    let slot = block * block_tokens + token % block_tokens;
                    slots.push(u32::try_from(slot).unwrap());
                    if token >= kv_len - n_rows {
                        queries.extend(q);
                    }
                }
                let k = filled(&mut cpu, &keys);
                let v = filled(&mut cpu, &values);
                cpu.kv_store(&mut kv, 1, &k, &v, &slots).unwrap();
                spans.push(Span { first_row, n_rows, kv_len, blocks: &tables[index] });
                first_row += n_rows;
            }
            let q = filled(&mut cpu, &queries);
            let mut out = cpu.buffer(queries.len()).unwrap();
            cpu.attention(&self.attention, (&kv, 1), &q, &spans, &mut out).unwrap();
            let Buffer::Host(out) = out;
            out.floats().to_vec()
        }

        /// The same as the formula says it.
        fn naive(&self) -> Vec<f64> {
            let Attention { n_heads, scale, window, soft_cap, .. } = self.attention;
            let head_dim = self.shape.head_dim;
            let group = n_heads / self.shape.n_kv_heads;
            let mut out = Vec::new();
            for (index, &(kv_len, n_rows)) in self.sequences.iter().enumerate() {
                let tokens: Vec<_> = (0..kv_len).map(|token| self.token(index, token)).collect();
                for row in kv_len - n_rows..kv_len {
                    let from = (row + 1).saturating_sub(window.unwrap_or(usize::MAX));
                    for head in 0..n_heads {
                        let at = head / group * head_dim;
                        let q = &tokens[row][0][head * head_dim..][..head_dim];
                        let weight = |token: usize| {
                            let k = &tokens[token][1][at..at + head_dim];
                            let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(q * k)).sum();
                            let score = dot * f64::from(scale);
                            match soft_cap.map(f64::from) {
                                Some(cap) => (cap * (score / cap).tanh()).exp(),
                                None => score.exp(),
                            }
                        };
                        let weights: Vec<f64> = (from..=row).map(weight).collect();
                        let total: f64 = weights.iter().sum();
                        out.extend((0..head_dim).map(|c| {
                            let value =
                                |(i, w): (usize, &f64)| w * f64::from(tokens[from + i][2][at + c]);
                            weights.iter().enumerate().map(value).sum::<f64>() / total
                        }));
                    }
                }
            }
            out
        }
    }

    fn filled(cpu: &mut Cpu, values: &[f32]) -> Buffer {
        let mut buffer = cpu.buffer(values.len()).unwrap();
        cpu.write(values, &mut buffer, 0).unwrap();
        buffer
    }

    fn cases() -> Vec<Case> {
        let windowed = |mut case: Case, window| {
            case.attention.window = Some(window);
            case
        };
        let mut capped = Case::new(2, 1, 40, &[(30, 30), (300, 2)]);
        capped.attention.soft_cap = Some(2.5);
        vec![
            Case::new(3, 1, 64, &[(1, 1), (2, 2), (17, 5), (130, 130), (129, 1), (128, 1)]),
            Case::new(14, 2, 64, &[(700, 1), (650, 3), (520, 20)]),
            Case::new(4, 1, 256, &[(140, 70), (600, 1)]),
            Case::new(2, 2, 24, &[(64, 64), (65, 1), (1100, 1)]),
            Case::new(5, 5, 80, &[(90, 33)]),
            capped,
            windowed(Case::new(4, 2, 64, &[(400, 400), (600, 1), (601, 17)]), 100),
            windowed(Case::new(4, 2, 64, &[(40, 40), (1000, 1)]), 1),
            windowed(Case::new(4, 4, 32, &[(2000, 1)]), 900),
        ]
    }

    #[test]
    fn attention_is_as_the_formula_says() {
        for (number, case) in cases().iter().enumerate() {
            let expected = case.naive();
            for isa in isas() {
                for threads in [1, 3] {
                    let got = case.run(isa, threads);
                    assert_eq!(got.len(), expected.len());
                    for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
                        let error = (f64::from(*got) - expected).abs();
                        assert!(error < 3e-5, "case {number} {isa} at {at}: {got} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_depends_on_no_other_row_nor_on_threads() {
        for (number, case) in cases().into_iter().enumerate() {
            for isa in isas().into_iter().filter(|isa| *isa != "portable") {
                let all = case.run(isa, 1);
                assert!(all == case.run(isa, 4), "case {number} {isa}: threads");
                // The last row of each sequence in a batch of single rows.
                let width = case.attention.n_heads * case.shape.head_dim;
                let single = case.sequences.iter().map(|(len, _)| (*len, 1)).collect();
                let alone = Case { sequences: single, ..case_of(&case) }.run(isa, 2);
                let mut end = 0;
                for ((_, n_rows), alone) in case.sequences.iter().zip(alone.chunks_exact(width)) {
                    end += n_rows * width;
                    assert!(all[end - width..end] == *alone, "case {number} {isa}: rows");
                }
            }
        }
    }

    /// Attends to spans of (first row, rows) with two heads in buffers of four rows.
    fn attend_to(rows: &[(usize, usize)]) {
        let Case { shape, attention, .. } = Case::new(2, 1, 8, &[]);
        let mut cpu = Cpu::open(&CpuOptions { threads: 2, isa: None }).unwrap();
        let kv = cpu.kv_cache(shape, 1).unwrap();
        let q = cpu.buffer(4 * 2 * 8).unwrap();
        let mut out = cpu.buffer(4 * 2 * 8).unwrap();
        let span = |&(first_row, n_rows)| Span { first_row, n_rows, kv_len: 16, blocks: &[0] };
        let spans: Vec<_> = rows.iter().map(span).collect();
        cpu.attention(&attention, (&kv, 0), &q, &spans, &mut out).unwrap();
    }

    #[test]
    fn spans_may_leave_rows_out() {
        attend_to(&[(0, 1), (2, 1), (3, 1)]);
    }

    #[test]
    #[should_panic(expected = "span 1 begins at row 0, before row 1 where the last one ends")]
    fn spans_that_share_rows_are_refused() {
        attend_to(&[(0, 1), (0, 1)]);
    }

    #[test]
    #[should_panic(expected = "span 1 ends at row 5 of 4")]
    fn a_span_beyond_the_buffer_is_refused() {
        attend_to(&[(0, 1), (1, 4)]);
    }

    fn case_of(case: &Case) -> Case {
        Case { shape: case.shape, attention: case.attention, sequences: Vec::new() }
    }
}
