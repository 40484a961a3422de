//! Attention over the cached keys and values.
//!
//! The query heads that share a KV head are worked on together, with as many rows of the batch as
//! make it worth while, so that a key or value is read once for all of them. The cache is walked in
//! tiles of [`TILE`] tokens that begin at multiples of it. A tile is a softmax of its own; tiles
//! are joined in order to chunks, chunks in order to the result (Dao et al. 2022, Milakov and
//! Gimelshein 2018). Where there are few rows, threads take some chunks of them each, and who is
//! last joins them all in the same order: hence a row's result depends neither on the other rows
//! nor on the threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Cpu;
use super::isa::{Isa, Slabs};
use super::memory::{HostKv, SLAB, Spread};
use crate::device::{Attention, Buffer, KvCache, KvShape, KvType, Span};
use crate::pool::Scratch;

/// Tokens of a tile: enough that softmax and join cost little beside them, few enough that the
/// scores of all query rows stay in the second cache.
const TILE: usize = 256;
/// Query rows (rows times heads of the group) that a share works on at most: their outputs stay in
/// the second cache.
pub const QUERY_ROWS: usize = 48;
/// Tiles of a chunk: the least that a thread is sent for.
const CHUNK: usize = 2;
/// Query rows of a share whose chunks may go to several threads: what is kept of a chunk is then
/// small beside what it reads.
const SPLIT_ROWS: usize = 16;
/// Shares a thread, at least, before work is thought to be even.
const SHARES: usize = 8;

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
    /// A part of these rows' tiles: of which joint, and where its first chunk's result goes.
    part: Option<(usize, usize)>,
}

/// Rows whose chunks are in several shares.
#[derive(Debug)]
struct Joint {
    whole: Share,
    n_chunks: usize,
    /// Where the first chunk's result is.
    partial: usize,
    /// Shares that are not done yet.
    missing: AtomicUsize,
}

/// What is to be done for a batch, kept between calls for its memory.
#[derive(Debug, Default)]
pub(super) struct Plan {
    wholes: Vec<Share>,
    shares: Vec<Share>,
    joints: Vec<Joint>,
    /// A chunk's result for each query row: maximum, sum and `head_dim` values.
    partials: Vec<f32>,
}

/// Working memory of a share.
struct Work<'a> {
    queries: &'a mut [f32],
    scores: &'a mut [f32],
    tile: &'a mut [f32],
}

/// The softmax of some tiles, for each query row: maximum, sum and values.
struct State<'a> {
    max_sum: &'a mut [f32],
    values: &'a mut [f32],
}

/// The chunks of tiles `tiles`: they begin at multiples of [`CHUNK`].
fn chunks(tiles: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let first = tiles.start / CHUNK;
    (first..tiles.end.div_ceil(CHUNK))
        .map(move |chunk| tiles.start.max(chunk * CHUNK)..tiles.end.min((chunk + 1) * CHUNK))
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

    /// What of tile `tile` the rows of `share` see, from the start of a slab.
    fn tokens(&self, (share, span): (&Share, &Span<'_>), tile: usize) -> Range<usize> {
        let first = self.visible(span, share.rows.start).start / SLAB * SLAB;
        let end = self.visible(span, share.rows.end - 1).end;
        first.max(tile * TILE)..end.min((tile + 1) * TILE)
    }

    /// The stretches of `data` (all keys, or all values) that hold tokens `tokens`, with the token
    /// that each begins at.
    fn stretches<'a>(
        &'a self,
        (share, span): (&'a Share, &'a Span<'_>),
        data: &'a [u8],
        tokens: Range<usize>,
    ) -> impl Iterator<Item = (usize, Slabs<'a>)> + 'a {
        let KvShape { n_kv_heads, head_dim, block_tokens, kv_type, .. } = self.shape;
        let mut at = tokens.start;
        std::iter::from_fn(move || {
            if at >= tokens.end {
                return None;
            }
            let (block, offset) = (span.blocks[at / block_tokens] as usize, at % block_tokens);
            assert!(block < self.n_blocks, "block {block} of {}", self.n_blocks);
            let n_kv = (block_tokens - offset).min(tokens.end - at);
            let head = (self.index * self.n_blocks + block) * n_kv_heads + share.kv_head;
            let from = kv_type.bytes((head * block_tokens + offset) * head_dim);
            let len = kv_type.bytes(n_kv.next_multiple_of(SLAB) * head_dim);
            let slabs = Slabs { kv_type, head_dim, n_kv, bytes: &data[from..from + len] };
            let stretch = (at, slabs);
            at += n_kv;
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
        let (head_dim, begin) = (self.shape.head_dim, tile * TILE);
        let tokens = self.tokens((share, span), tile);
        let (keys, values) = (self.data.keys(), self.data.values());
        let n_queries = work.queries.len() / head_dim;
        let first = |data, tokens| self.stretches((share, span), data, tokens).next();
        let first_values = first(values, tokens.clone());
        let mut stretches = self.stretches((share, span), keys, tokens.clone()).peekable();
        while let Some((at, slabs)) = stretches.next() {
            let next = stretches.peek().or(first_values.as_ref()).map(|(_, slabs)| slabs);
            let scores = (&mut work.scores[at - begin..], TILE);
            isa.attn_scores((work.queries, self.attention.scale), &slabs, scores, next);
        }
        let written = tokens.start - begin..(tokens.end - begin).next_multiple_of(SLAB);
        let mut max_sum = [(0.0, 0.0); QUERY_ROWS];
        for (query, max_sum) in max_sum.iter_mut().take(n_queries).enumerate() {
            let visible = self.visible(span, share.rows.start + query / self.group());
            let scores = &mut work.scores[query * TILE..][written.clone()];
            *max_sum = self.softmax(isa, scores, &visible, begin + written.start);
        }
        work.tile.fill(0.0);
        let after = if tile + 1 < share.tiles.end {
            first(keys, self.tokens((share, span), tile + 1))
        } else {
            None
        };
        let mut stretches = self.stretches((share, span), values, tokens).peekable();
        while let Some((at, slabs)) = stretches.next() {
            let next = stretches.peek().or(after.as_ref()).map(|(_, slabs)| slabs);
            let p = (&work.scores[at - begin..], TILE);
            isa.attn_values(p, &slabs, work.tile, next);
        }
        for (query, values) in work.tile.chunks_exact(head_dim).enumerate() {
            done(query, max_sum[query], values);
        }
    }

    /// Turns the scores of tokens from `first` on into weights, zero for those that are not
    /// visible; gives maximum and sum.
    fn softmax(
        &self,
        isa: &Isa,
        scores: &mut [f32],
        visible: &Range<usize>,
        first: usize,
    ) -> (f32, f32) {
        let from = visible.start.saturating_sub(first).min(scores.len());
        let to = visible.end.saturating_sub(first).min(scores.len());
        if let Some(cap) = self.attention.soft_cap {
            isa.soft_cap(&mut scores[from..to.max(from)], cap);
        }
        scores[..from].fill(f32::NEG_INFINITY);
        scores[to..].fill(f32::NEG_INFINITY);
        isa.softmax_tile(scores)
    }
}

/// Joins a tile's or chunk's result to those before it.
fn join(isa: &Isa, state: &mut [f32], values: &mut [f32], (max, sum): (f32, f32), part: &[f32]) {
    if sum == 0.0 {
        return;
    }
    // The larger maximum keeps its weights.
    let (before, now) =
        if max > state[0] { ((state[0] - max).exp(), 1.0) } else { (1.0, (max - state[0]).exp()) };
    isa.join(values, before, part, now);
    state[0] = state[0].max(max);
    state[1] = state[1] * before + sum * now;
}

/// The state before the first tile.
const NOTHING: [f32; 2] = [f32::NEG_INFINITY, 0.0];

impl State<'_> {
    fn clear(&mut self) {
        self.values.fill(0.0);
        self.max_sum.chunks_exact_mut(2).for_each(|state| state.copy_from_slice(&NOTHING));
    }

    fn join(&mut self, isa: &Isa, query: usize, max_sum: (f32, f32), values: &[f32]) {
        let own = &mut self.values[query * values.len()..][..values.len()];
        join(isa, &mut self.max_sum[query * 2..][..2], own, max_sum, values);
    }

    /// Each query row's maximum and sum, and values.
    fn rows(&self) -> impl Iterator<Item = ((f32, f32), &[f32])> {
        let head_dim = self.values.len() / (self.max_sum.len() / 2);
        let max_sum = self.max_sum.chunks_exact(2).map(|state| (state[0], state[1]));
        max_sum.zip(self.values.chunks_exact(head_dim))
    }
}

impl Plan {
    fn make(&mut self, layer: &Layer<'_>, spans: &[Span<'_>], threads: usize) {
        self.wholes.clear();
        self.shares.clear();
        self.joints.clear();
        let group = layer.group();
        let rows_a_share = (QUERY_ROWS / group).max(1);
        for (index, span) in spans.iter().enumerate() {
            for kv_head in 0..layer.shape.n_kv_heads {
                for first in (0..span.n_rows).step_by(rows_a_share) {
                    let rows = first..span.n_rows.min(first + rows_a_share);
                    let tiles = layer.tiles(span, &rows);
                    self.wholes.push(Share { span: index, kv_head, rows, tiles, part: None });
                }
            }
        }
        let cost = |share: &Share| share.rows.len() * share.tiles.len();
        let total: usize = self.wholes.iter().map(cost).sum();
        let fair = if threads > 1 { total / (threads * SHARES) } else { usize::MAX };
        let mut partial = 0;
        let mut wholes = std::mem::take(&mut self.wholes);
        for share in wholes.drain(..) {
            let n_queries = share.rows.len() * group;
            if cost(&share) > fair && n_queries <= SPLIT_ROWS && share.tiles.len() > CHUNK {
                let chunk_len = n_queries * (2 + layer.shape.head_dim);
                let n_tiles = (fair / share.rows.len()).max(1);
                partial += self.split(share, n_tiles, (partial, chunk_len));
            } else {
                self.shares.push(share);
            }
        }
        self.wholes = wholes;
        if self.partials.len() < partial {
            self.partials.resize(partial, 0.0);
        }
    }

    /// Cuts a share into whole chunks, some `n_tiles` tiles in each part; gives the floats that the
    /// results of its chunks take.
    fn split(
        &mut self,
        whole: Share,
        n_tiles: usize,
        (partial, chunk_len): (usize, usize),
    ) -> usize {
        let joint = self.joints.len();
        let first_share = self.shares.len();
        let mut n_chunks = 0;
        for tiles in chunks(whole.tiles.clone()) {
            match self.shares[first_share..].last_mut() {
                Some(last) if last.tiles.len() < n_tiles => last.tiles.end = tiles.end,
                _ => {
                    let part = Some((joint, partial + n_chunks * chunk_len));
                    self.shares.push(Share { tiles, part, ..whole.clone() });
                }
            }
            n_chunks += 1;
        }
        let missing = AtomicUsize::new(self.shares.len() - first_share);
        self.joints.push(Joint { whole, n_chunks, partial, missing });
        n_chunks * chunk_len
    }
}

/// A batch's queries and where its results go, both `[rows][n_heads][head_dim]`.
struct Batch<'a> {
    layer: Layer<'a>,
    queries: &'a [f32],
    out: Spread<'a, f32>,
    partials: Spread<'a, f32>,
    spans: &'a [Span<'a>],
    joints: &'a [Joint],
}

impl Batch<'_> {
    fn compute(&self, isa: &Isa, share: &Share, scratch: &mut Scratch) {
        let (layer, head_dim) = (&self.layer, self.layer.shape.head_dim);
        let n_queries = share.rows.len() * layer.group();
        let floats = scratch.floats(n_queries * (4 * head_dim + TILE + 4));
        let (queries, floats) = floats.split_at_mut(n_queries * head_dim);
        let (tile, floats) = floats.split_at_mut(n_queries * head_dim);
        let (scores, floats) = floats.split_at_mut(n_queries * TILE);
        let (chunk, whole) = floats.split_at_mut(n_queries * (head_dim + 2));
        let [mut chunk, mut whole] = [chunk, whole].map(|floats| {
            let (values, max_sum) = floats.split_at_mut(n_queries * head_dim);
            State { max_sum, values }
        });
        let width = layer.group() * head_dim;
        let first_row = self.spans[share.span].first_row;
        for (row, queries) in share.rows.clone().zip(queries.chunks_exact_mut(width)) {
            let heads = layer.heads(first_row + row, share.kv_head);
            if layer.shape.kv_type == KvType::Q8_0 {
                isa.attn_query(&self.queries[heads], head_dim, queries);
            } else {
                queries.copy_from_slice(&self.queries[heads]);
            }
        }
        let mut work = Work { queries, scores, tile };
        if let Some((joint, mut at)) = share.part {
            for tiles in chunks(share.tiles.clone()) {
                self.walk(isa, share, tiles, (&mut work, &mut chunk));
                at = self.leave(&chunk, at);
            }
            let joint = &self.joints[joint];
            // Who writes the last part sees what the others wrote before they counted down.
            if joint.missing.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.join(isa, joint, &mut whole);
                self.finish(&joint.whole, &whole);
            }
            return;
        }
        whole.clear();
        for tiles in chunks(share.tiles.clone()) {
            self.walk(isa, share, tiles, (&mut work, &mut chunk));
            for (query, (max_sum, values)) in chunk.rows().enumerate() {
                whole.join(isa, query, max_sum, values);
            }
        }
        self.finish(share, &whole);
    }

    /// The tiles of one chunk.
    fn walk(
        &self,
        isa: &Isa,
        share: &Share,
        tiles: Range<usize>,
        (work, chunk): (&mut Work<'_>, &mut State<'_>),
    ) {
        chunk.clear();
        let with = (share, &self.spans[share.span]);
        for tile in tiles {
            self.layer.tile(isa, with, tile, work, |query, max_sum, values| {
                chunk.join(isa, query, max_sum, values);
            });
        }
    }

    /// Leaves a chunk's result at `at` of the partials; gives where the next one's is.
    fn leave(&self, chunk: &State<'_>, at: usize) -> usize {
        let width = 2 + self.layer.shape.head_dim;
        let end = at + chunk.max_sum.len() / 2 * width;
        // SAFETY: each chunk of a joint has its own place and is in one share.
        let place = unsafe { self.partials.part(at..end) };
        for (place, ((max, sum), values)) in place.chunks_exact_mut(width).zip(chunk.rows()) {
            place[0] = max;
            place[1] = sum;
            place[2..].copy_from_slice(values);
        }
        end
    }

    /// Joins the chunks of some rows, which are all there.
    fn join(&self, isa: &Isa, joint: &Joint, whole: &mut State<'_>) {
        let width = 2 + self.layer.shape.head_dim;
        let n_queries = whole.max_sum.len() / 2;
        let len = joint.n_chunks * n_queries * width;
        // SAFETY: the shares that wrote these are done with them, and each joint has its own.
        let partials = unsafe { self.partials.part(joint.partial..joint.partial + len) };
        whole.clear();
        for chunk in partials.chunks_exact(n_queries * width) {
            for (query, part) in chunk.chunks_exact(width).enumerate() {
                whole.join(isa, query, (part[0], part[1]), &part[2..]);
            }
        }
    }

    /// Divides by the sums, into the result. A sink is a score more in its head's sum.
    fn finish(&self, share: &Share, whole: &State<'_>) {
        let (layer, head_dim) = (&self.layer, self.layer.shape.head_dim);
        let first_row = self.spans[share.span].first_row;
        let (sinks, mut rows) = (layer.sinks(share.kv_head), whole.rows());
        for row in share.rows.clone() {
            let heads = layer.heads(first_row + row, share.kv_head);
            // SAFETY: spans share no rows, as `attend` has seen: each row and KV head is finished
            // by one share, its own or the last one of its joint.
            let out = unsafe { self.out.part(heads) };
            let heads = out.chunks_exact_mut(head_dim).zip(rows.by_ref());
            for (head, (out, ((max, sum), values))) in heads.enumerate() {
                let sink = sinks.get(head).map_or(0.0, |sink| (sink - max).exp());
                let factor = 1.0 / (sum + sink);
                out.iter_mut().zip(values).for_each(|(out, value)| *out = value * factor);
            }
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
        let Plan { shares, joints, partials, .. } = &mut self.plan;
        let batch = Batch {
            layer,
            queries: q.floats(),
            out: Spread::new(out.floats_mut()),
            partials: Spread::new(partials),
            spans,
            joints,
        };
        let isa = &self.isa;
        self.pool.run(shares.len(), &|share, scratch| {
            batch.compute(isa, &shares[share], scratch);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::Random;
    use super::super::{CpuOptions, isas};
    use super::*;
    use crate::device::{Device, DeviceError};
    use crate::quant::{Quant, dequantize};

    /// A sequence of a batch: tokens in the cache, and how many of them are rows.
    type Sequence = (usize, usize);

    #[derive(Debug)]
    struct Case {
        shape: KvShape,
        attention: Attention<'static>,
        sequences: Vec<Sequence>,
    }

    impl Case {
        fn new(n_heads: usize, n_kv_heads: usize, head_dim: usize, sequences: &[Sequence]) -> Self {
            let block_tokens = 32;
            let kv_type = KvType::F16;
            let shape = KvShape { n_layers: 2, n_kv_heads, head_dim, block_tokens, kv_type };
            let attention =
                Attention { n_heads, scale: 0.3, window: None, soft_cap: None, sinks: None };
            Self { shape, attention, sequences: sequences.to_vec() }
        }

        fn stored_as(&self, kv_type: KvType) -> Self {
            let shape = KvShape { kv_type, ..self.shape };
            Self { shape, attention: self.attention, sequences: self.sequences.clone() }
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
            let options =
                CpuOptions { threads, isa: Some(isa.to_owned()), ..CpuOptions::default() };
            let mut cpu = Cpu::open(&options).unwrap();
            let block_tokens = self.shape.block_tokens;
            let needed = |(len, _): &Sequence| len.div_ceil(block_tokens);
            let n_blocks = self.sequences.iter().map(needed).sum::<usize>() + 1;
            let mut kv = cpu.kv_cache(self.shape, n_blocks).unwrap();
            // What others left in the cache must not be seen.
            let all: Vec<u32> = (0..).take(n_blocks * block_tokens).collect();
            let row = self.shape.n_kv_heads * self.shape.head_dim;
            let nans = filled(&mut cpu, &vec![f32::NAN; all.len() * row]);
            cpu.kv_store(&mut kv, 1, &nans, &nans, &all).unwrap();
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

        /// How far arithmetic may be from the formula on what is stored. Bytes are multiplied by
        /// weights and queries of fifteen bits.
        fn tolerance(&self) -> f64 {
            if self.shape.kv_type == KvType::Q8_0 { 1e-3 } else { 3e-5 }
        }

        /// What a row of keys or values is once it is stored.
        fn stored(&self, row: &[f32]) -> Vec<f32> {
            match self.shape.kv_type {
                KvType::F16 => halves(row),
                KvType::Bf16 => {
                    let rounded = |x: &f32| {
                        let ulp = x.abs().log2().floor().exp2() / 128.0;
                        if *x == 0.0 { 0.0 } else { (x / ulp).round_ties_even() * ulp }
                    };
                    row.iter().map(rounded).collect()
                }
                KvType::Q8_0 => {
                    let max = |group: &[f32]| group.iter().fold(0f32, |max, x| max.max(x.abs()));
                    let maxima: Vec<f32> = row.chunks(32).map(max).collect();
                    let scales = halves(&maxima.iter().map(|max| max / 127.0).collect::<Vec<_>>());
                    let value = |(at, x): (usize, &f32)| {
                        let code = (x * (127.0 / maxima[at / 32])).round_ties_even();
                        if maxima[at / 32] == 0.0 { 0.0 } else { code * scales[at / 32] }
                    };
                    row.iter().enumerate().map(value).collect()
                }
            }
        }

        /// The same as the formula says it.
        fn naive(&self) -> Vec<f64> {
            let Attention { n_heads, scale, window, soft_cap, .. } = self.attention;
            let head_dim = self.shape.head_dim;
            let group = n_heads / self.shape.n_kv_heads;
            let mut out = Vec::new();
            for (index, &(kv_len, n_rows)) in self.sequences.iter().enumerate() {
                let stored = |token| {
                    let [q, k, v] = self.token(index, token);
                    [q, self.stored(&k), self.stored(&v)]
                };
                let tokens: Vec<_> = (0..kv_len).map(stored).collect();
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

    /// The nearest numbers of half precision.
    fn halves(x: &[f32]) -> Vec<f32> {
        let (mut bits, mut values) = (vec![0; x.len()], vec![0.0; x.len()]);
        Isa::open(Some("portable"), false).unwrap().f16_from_f32(x, &mut bits);
        let bytes: Vec<u8> = bits.iter().flat_map(|half| half.to_le_bytes()).collect();
        dequantize(Quant::F16, &bytes, &mut values);
        values
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
        let shapes = [
            Case::new(3, 1, 64, &[(1, 1), (2, 2), (17, 5), (130, 130), (129, 1), (128, 1)]),
            Case::new(14, 2, 64, &[(700, 1), (650, 3), (520, 20)]),
            Case::new(4, 1, 256, &[(140, 70), (600, 1)]),
            Case::new(2, 2, 24, &[(64, 64), (65, 1), (1100, 1)]),
            Case::new(5, 5, 80, &[(90, 33)]),
            capped,
            windowed(Case::new(4, 2, 64, &[(400, 400), (600, 1), (601, 17)]), 100),
            windowed(Case::new(4, 2, 64, &[(40, 40), (1000, 1)]), 1),
            windowed(Case::new(4, 4, 32, &[(2000, 1)]), 900),
            Case::new(16, 2, 96, &[(1300, 1), (70, 9)]),
            Case::new(17, 1, 32, &[(530, 1), (33, 33)]),
            Case::new(10, 2, 64, &[(1030, 2), (1029, 1)]),
            windowed(Case::new(6, 1, 128, &[(600, 1), (620, 4)]), 128),
        ];
        let kinds = |case: &Case| {
            let whole = |kind: &KvType| case.shape.head_dim.is_multiple_of(kind.group());
            let kinds = KvType::ALL.into_iter().filter(whole);
            kinds.map(|kind| case.stored_as(kind)).collect::<Vec<_>>()
        };
        shapes.iter().flat_map(kinds).collect()
    }

    #[test]
    fn attention_is_as_the_formula_says() {
        for case in cases() {
            let expected = case.naive();
            for isa in isas() {
                for threads in [1, 3] {
                    let got = case.run(isa, threads);
                    assert_eq!(got.len(), expected.len());
                    for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
                        let error = (f64::from(*got) - expected).abs();
                        assert!(
                            error < case.tolerance(),
                            "{case:?} {isa} at {at}: {got} {expected}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_depends_on_no_other_row_nor_on_threads() {
        for case in cases() {
            for isa in isas().into_iter().filter(|isa| *isa != "portable") {
                let all = case.run(isa, 1);
                assert!(all == case.run(isa, 4), "{case:?} {isa}: threads");
                // The last row of each sequence in a batch of single rows.
                let width = case.attention.n_heads * case.shape.head_dim;
                let single = case.sequences.iter().map(|(len, _)| (*len, 1)).collect();
                let alone = Case { sequences: single, ..case }.run(isa, 2);
                let mut end = 0;
                for ((_, n_rows), alone) in case.sequences.iter().zip(alone.chunks_exact(width)) {
                    end += n_rows * width;
                    assert!(all[end - width..end] == *alone, "{case:?} {isa}: rows");
                }
            }
        }
    }

    #[test]
    fn what_half_precision_does_not_reach_is_kept_as_its_largest() {
        for isa in isas() {
            let mut cpu = Cpu::open(&CpuOptions {
                threads: 1,
                isa: Some(isa.to_owned()),
                ..CpuOptions::default()
            })
            .unwrap();
            for (kv_type, most) in [(KvType::F16, 65504.0), (KvType::Q8_0, 127.0 * 65504.0)] {
                let shape = Case::new(1, 1, 32, &[]).stored_as(kv_type).shape;
                let mut kv = cpu.kv_cache(shape, 1).unwrap();
                let large = filled(&mut cpu, &[-1e9; 32]);
                cpu.kv_store(&mut kv, 0, &large, &large, &[0]).unwrap();
                let (q, mut out) = (filled(&mut cpu, &[1.0; 32]), cpu.buffer(32).unwrap());
                let spans = [Span { first_row: 0, n_rows: 1, kv_len: 1, blocks: &[0] }];
                let constants =
                    Attention { n_heads: 1, scale: 1.0, window: None, soft_cap: None, sinks: None };
                cpu.attention(&constants, (&kv, 0), &q, &spans, &mut out).unwrap();
                let Buffer::Host(out) = out;
                assert!(out.floats().iter().all(|x| (x / most + 1.0).abs() < 1e-6), "{isa}");
            }
        }
    }

    #[test]
    fn a_head_that_is_no_whole_group_is_refused() {
        let cpu =
            Cpu::open(&CpuOptions { threads: 1, isa: None, ..CpuOptions::default() }).unwrap();
        let shape = Case::new(2, 2, 24, &[]).stored_as(KvType::Q8_0).shape;
        let refused = cpu.kv_cache(shape, 1).unwrap_err();
        assert!(matches!(refused, DeviceError::Unavailable { .. }), "{refused}");
    }

    /// Attends to spans of (first row, rows) with two heads in buffers of four rows.
    fn attend_to(rows: &[(usize, usize)]) {
        let Case { shape, attention, .. } = Case::new(2, 1, 8, &[]);
        let mut cpu =
            Cpu::open(&CpuOptions { threads: 2, isa: None, ..CpuOptions::default() }).unwrap();
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
}
