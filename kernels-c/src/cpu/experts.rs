//! Mixtures of experts.
//!
//! The rows of a batch are sorted by expert and gathered, so that an expert's weights are read once
//! and multiplied by all its rows: straight from the file's blocks up to [`GEMV_TOKENS`] rows, by
//! panels beyond, as in `linear`. There are two jobs. The first is that of `gated`. A share of the
//! second makes some columns of the result for all rows: it goes through the experts in the order
//! of their numbers and adds what each gives to the rows that chose it, hence a row's sum has one
//! order whatever else is in the batch.

use std::ops::Range;

use super::Cpu;
use super::gated::{Group, Job, Weights};
use super::input::{Forms, HostActivations, Quantized};
use super::isa::{ACT_GROUP, Acts, GEMV_TOKENS, Isa, PANEL_ROWS, SUM_GROUP};
use super::linear::share_bytes;
use super::memory::Spread;
use crate::device::{Buffer, Experts, Input, Router, Routing};
use crate::pool::{Pool, Scratch};

/// Columns of the result in a share are a multiple of this: the widest tile of a product.
const COLUMNS: usize = 16;
/// Bytes gathered by one thread: beneath, waking another costs more.
const GATHER_ALONE: usize = 64 << 10;
/// Rows whose experts are chosen by one thread.
const ROUTE_ALONE: usize = 16;

/// What a batch is made of, kept between calls for its memory.
#[derive(Debug, Default)]
pub(super) struct Mixture {
    groups: Vec<Group>,
    /// Assignments sorted by expert, then by row: the row of each,
    rows: Vec<u32>,
    /// and its weight.
    weights: Vec<f32>,
    /// Where the next row of each expert goes while they are sorted.
    next: Vec<usize>,
    /// The rows of `x` as they are assigned.
    gathered_x: Vec<f32>,
    gathered: Quantized,
    /// `[assignments, feed forward]`: between gate, up and down.
    hidden: HostActivations,
}

impl Mixture {
    /// Sorts the assignments of a batch by expert.
    fn sort(&mut self, routing: &Routing, n_experts: usize) {
        let n_used = routing.n_used;
        self.next.clear();
        self.next.resize(n_experts, 0);
        for &id in &routing.ids {
            self.next[id as usize] += 1;
        }
        self.groups.clear();
        let mut end = 0;
        for (expert, next) in self.next.iter_mut().enumerate() {
            let assigned = end..end + *next;
            (*next, end) = (end, assigned.end);
            if !assigned.is_empty() {
                self.groups.push(Group { expert, assigned });
            }
        }
        self.rows.resize(end, 0);
        self.weights.resize(end, 0.0);
        for (at, (&id, &weight)) in routing.ids.iter().zip(&routing.weights).enumerate() {
            let to = self.next[id as usize];
            self.next[id as usize] += 1;
            self.rows[to] = u32::try_from(at / n_used).expect("rows are counted in 32 bits");
            self.weights[to] = weight;
        }
    }
}

/// The second job.
struct Down<'a> {
    product: Weights<'a>,
    groups: &'a [Group],
    /// Of all groups together.
    rows: &'a [u32],
    weights: &'a [f32],
    hidden: Acts<'a>,
    n_rows: usize,
    out: Spread<'a, f32>,
}

impl Down<'_> {
    /// Columns of the result in a share.
    fn columns(&self, threads: usize) -> usize {
        let [rows, _] = self.product.shape();
        let few = self.groups.iter().all(|group| group.assigned.len() <= GEMV_TOKENS);
        if few {
            let row_bytes = (self.groups.len() * self.product.row_bytes()).max(1);
            let bytes = share_bytes(rows * row_bytes, threads);
            return (bytes / row_bytes).max(1).next_multiple_of(COLUMNS);
        }
        // Half a panel where there would not be enough whole ones.
        if rows / PANEL_ROWS < threads * 2 { COLUMNS } else { PANEL_ROWS }
    }

    fn compute(&self, isa: &Isa, columns: Range<usize>, scratch: &mut Scratch) {
        let (width, [all, _]) = (columns.len(), self.product.shape());
        // SAFETY: shares are disjoint in columns, and each is taken once.
        let mut out = unsafe { self.out.tile(0..self.n_rows, all, columns.clone()) };
        for row in 0..self.n_rows {
            out.row(row).fill(0.0);
        }
        for Group { expert, assigned } in self.groups {
            let n = assigned.len();
            let room_len = self.product.room_len(isa, n);
            let (room, part) = scratch.floats(room_len + n * width).split_at_mut(room_len);
            let part = Spread::new(part);
            // SAFETY: the only tile of memory that is this thread's own.
            let mut part = unsafe { part.tile(0..n, width, 0..width) };
            let x = self.hidden.rows_at(assigned.start, n);
            self.product.compute(isa, (*expert, columns.clone()), &x, &mut part, room);
            for (token, assignment) in assigned.clone().enumerate() {
                let out = out.row(self.rows[assignment] as usize);
                isa.join(out, 1.0, part.row(token), self.weights[assignment]);
            }
        }
    }
}

impl Cpu {
    /// See [`crate::Device::experts`].
    pub(super) fn mix(
        &mut self,
        experts: &Experts,
        (x, rows): (&Buffer, usize),
        routing: &Routing,
        out: &mut Buffer,
    ) {
        assert_eq!(routing.ids.len(), rows * routing.n_used, "a routing of these rows");
        if rows == 0 {
            return;
        }
        let Experts { gate, up, down, activation } = experts;
        let [width, cols] = [gate.matrices[0].rows(), gate.matrices[0].cols()];
        let Self { isa, pool, mixture, .. } = self;
        mixture.sort(routing, gate.matrices.len());
        let forms = Forms::of(isa, [&gate.matrices[0], &up.matrices[0]]);
        let x = self.inputs.prepare((isa, pool), Input::Plain(x), [rows, cols], forms);
        let Mixture { groups, rows: assigned, weights, gathered_x, gathered, hidden, .. } = mixture;
        // A batch of one row has one for all groups.
        let x = if rows == 1 {
            x
        } else {
            gathered_x.resize(if forms.floats { assigned.len() * cols } else { 0 }, 0.0);
            gathered.resize(assigned.len() * cols, forms.whole);
            gather(pool, &x, assigned, (gathered_x, gathered), forms)
        };
        hidden.resize(isa, [assigned.len(), width], &down.matrices[0]);
        let both = [gate, up].map(|part| Weights::of(part, [width, cols]));
        let job = Job::new(both, *activation, (groups, x), hidden);
        job.run(isa, pool, &mut self.gated_shares);
        let Buffer::Host(out) = out;
        let job = Down {
            product: Weights::of(down, [cols, width]),
            groups,
            rows: assigned,
            weights,
            hidden: hidden.acts(),
            n_rows: rows,
            out: Spread::new(&mut out.floats_mut()[..rows * cols]),
        };
        let step = job.columns(pool.threads());
        pool.run(cols.div_ceil(step), &|share, scratch| {
            job.compute(isa, share * step..cols.min((share + 1) * step), scratch);
        });
    }

    /// See [`crate::Device::route`].
    pub(super) fn choose(
        &mut self,
        router: &Router,
        logits: &Buffer,
        rows: usize,
        routing: &mut Routing,
    ) {
        let Router { n_experts, n_used, .. } = *router;
        assert!(0 < n_used && n_used <= n_experts, "{n_used} of {n_experts} experts");
        let Buffer::Host(logits) = logits;
        let logits = &logits.floats()[..rows * n_experts];
        routing.n_used = n_used;
        routing.ids.resize(rows * n_used, 0);
        routing.weights.resize(rows * n_used, 0.0);
        let (ids, weights) = (Spread::new(&mut routing.ids), Spread::new(&mut routing.weights));
        self.pool.run(rows.div_ceil(ROUTE_ALONE), &|share, _| {
            for row in share * ROUTE_ALONE..rows.min((share + 1) * ROUTE_ALONE) {
                let to = row * n_used..(row + 1) * n_used;
                // SAFETY: shares are disjoint.
                let (ids, weights) = unsafe { (ids.part(to.clone()), weights.part(to)) };
                choose_row(router, &logits[row * n_experts..][..n_experts], ids, weights);
            }
        });
    }
}

/// The rows of `x` as they are assigned.
fn gather<'a>(
    pool: &mut Pool,
    x: &Acts<'_>,
    assigned: &[u32],
    (to_x, to): (&'a mut [f32], &'a mut Quantized),
    forms: Forms,
) -> Acts<'a> {
    let cols = x.cols;
    let spread_x = Spread::new(to_x);
    let (to_q, to_d) = (Spread::new(&mut to.q), Spread::new(&mut to.d));
    let to_sum = Spread::new(&mut to.sum);
    let step = (GATHER_ALONE / cols).max(1);
    pool.run(assigned.len().div_ceil(step), &|share, _| {
        for (to, row) in assigned.iter().enumerate().skip(share * step).take(step) {
            let row = *row as usize;
            // SAFETY: shares are disjoint, and each assignment has a row of its own.
            unsafe {
                if forms.floats {
                    copy_row(x.x, row, &spread_x, to, cols);
                }
                if forms.whole {
                    copy_row(x.q, row, &to_q, to, cols);
                    copy_row(x.d, row, &to_d, to, cols / ACT_GROUP);
                    copy_row(x.sum, row, &to_sum, to, cols / SUM_GROUP);
                }
            }
        }
    });
    Acts { cols, x: to_x, q: &to.q, d: &to.d, sum: &to.sum }
}

/// Copies row `row` of `from` to row `to_row` of `to`, both `width` wide.
///
/// # Safety
/// Nothing else refers to that row of `to`.
unsafe fn copy_row<T: Copy>(
    from: &[T],
    row: usize,
    to: &Spread<'_, T>,
    to_row: usize,
    width: usize,
) {
    // SAFETY: as the caller promises.
    let to = unsafe { to.part(to_row * width..(to_row + 1) * width) };
    to.copy_from_slice(&from[row * width..(row + 1) * width]);
}

/// The largest logits of a row, and their weights, ascending by expert.
fn choose_row(router: &Router, logits: &[f32], ids: &mut [u32], weights: &mut [f32]) {
    // `weights` holds the logits of `ids`, largest first, as long as experts are looked at. The
    // order is total, so that even NaN chooses as many experts as there must be.
    let mut n = 0;
    for (id, &logit) in (0u32..).zip(logits) {
        let place = weights[..n].partition_point(|before| before.total_cmp(&logit).is_ge());
        if place == ids.len() {
            continue;
        }
        n = ids.len().min(n + 1);
        ids.copy_within(place..n - 1, place + 1);
        weights.copy_within(place..n - 1, place + 1);
        (ids[place], weights[place]) = (id, logit);
    }
    let max = weights[0];
    ids.sort_unstable();
    for (weight, id) in weights.iter_mut().zip(ids.iter()) {
        *weight = (logits[*id as usize] - max).exp();
    }
    let sum: f32 = if router.is_normalised {
        weights.iter().sum()
    } else {
        logits.iter().map(|logit| (logit - max).exp()).sum()
    };
    for weight in weights {
        *weight /= sum;
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{Random, assert_same, buffer, cpu, floats, values, weights};
    use super::super::isas;
    use super::*;
    use crate::device::{Activation, Device, ExpertWeights, Linear, Matrix, Weight};
    use crate::quant::Quant;

    /// Experts of some formats and shapes.
    struct Case {
        /// Of gate, up and down.
        quants: [Quant; 3],
        /// In width and feed forward.
        shape: [usize; 2],
        n_experts: usize,
        n_used: usize,
        has_bias: bool,
        activation: Activation,
    }

    const CLAMPED: Activation = Activation::ClampedSwish { alpha: 1.702, limit: 0.5 };

    fn cases() -> Vec<Case> {
        let case = |quants, shape, [n_experts, n_used]: [usize; 2]| {
            let (has_bias, activation) = (false, Activation::Silu);
            Case { quants, shape, n_experts, n_used, has_bias, activation }
        };
        let with = |case, activation| Case { has_bias: true, activation, ..case };
        vec![
            case([Quant::F32; 3], [24, 17], [3, 2]),
            with(case([Quant::F32, Quant::F16, Quant::BF16], [40, 70], [8, 3]), CLAMPED),
            case([Quant::Q4_0; 3], [64, 96], [5, 5]),
            with(case([Quant::MXFP4; 3], [96, 160], [8, 4]), CLAMPED),
            case([Quant::Q4_K, Quant::Q4_K, Quant::Q6_K], [256, 512], [6, 2]),
            with(case([Quant::Q8_0, Quant::BF16, Quant::Q5_1], [160, 64], [4, 1]), CLAMPED),
            with(case([Quant::Q8_0; 3], [32, 32], [2, 1]), Activation::GeluTanh),
            case([Quant::NVFP4, Quant::Q4_0, Quant::F32], [64, 64], [40, 7]),
        ]
    }

    impl Case {
        /// A part of the experts, of products of a moderate size.
        fn part(&self, cpu: &mut Cpu, part: usize, [rows, cols]: [usize; 2]) -> ExpertWeights {
            let mut random = Random::new(part as u64 + 17);
            let quant = self.quants[part];
            let matrix = |_| weights(&mut random, quant, rows, cols);
            let matrices: Vec<_> = (0..self.n_experts).map(matrix).collect();
            let scale = |matrix: &Matrix| {
                let squares: f64 = values(matrix).iter().map(|x| f64::from(*x).powi(2)).sum();
                (rows as f64 / squares.max(1e-9)).sqrt()
            };
            #[expect(clippy::cast_possible_truncation, reason = "any number will do")]
            let scales = matrices.iter().map(|matrix| scale(matrix) as f32).collect();
            let bias = random.reals(self.n_experts * rows);
            ExpertWeights { scales, matrices, bias: self.has_bias.then(|| buffer(cpu, &bias)) }
        }

        fn experts(&self, cpu: &mut Cpu) -> Experts {
            let [cols, width] = self.shape;
            Experts {
                gate: self.part(cpu, 0, [width, cols]),
                up: self.part(cpu, 1, [width, cols]),
                down: self.part(cpu, 2, [cols, width]),
                activation: self.activation,
            }
        }

        /// Row `row` of the input, and its logits; the same whatever the batch.
        fn row(&self, row: usize) -> (Vec<f32>, Vec<f32>) {
            let mut random = Random::new(row as u64 + 99);
            let x = random.reals(self.shape[0]);
            // Every third row likes the first experts, so that some have many rows.
            let likes = |id: usize| if row.is_multiple_of(3) { 4.0 - id as f32 } else { 0.0 };
            let logits = random.reals(self.n_experts);
            (x, logits.iter().enumerate().map(|(id, logit)| logit + likes(id)).collect())
        }

        fn routing(&self, cpu: &mut Cpu, rows: &Range<usize>) -> Routing {
            let Self { n_experts, n_used, .. } = *self;
            let router = Router { n_experts, n_used, is_normalised: true };
            let logits: Vec<f32> = rows.clone().flat_map(|row| self.row(row).1).collect();
            let (logits, mut routing) = (buffer(cpu, &logits), Routing::default());
            cpu.route(&router, &logits, rows.len(), &mut routing).unwrap();
            routing
        }

        /// What the operation gives for some rows in one batch.
        fn run(&self, cpu: &mut Cpu, experts: &Experts, rows: Range<usize>) -> Vec<f32> {
            let x: Vec<f32> = rows.clone().flat_map(|row| self.row(row).0).collect();
            let (x, routing) = (buffer(cpu, &x), self.routing(cpu, &rows));
            let mut out = buffer(cpu, &vec![f32::NAN; rows.len() * self.shape[0]]);
            cpu.experts(experts, &x, rows.len(), &routing, &mut out).unwrap();
            floats(cpu, &out)
        }

        /// The same for one row by the device's other operations.
        fn composed(&self, cpu: &mut Cpu, experts: &Experts, row: usize) -> Vec<f32> {
            let x = buffer(cpu, &self.row(row).0);
            let routing = self.routing(cpu, &(row..row + 1));
            let mut sum = vec![0.0; self.shape[0]];
            for (&id, &weight) in routing.ids.iter().zip(&routing.weights) {
                let Experts { gate, up, down, activation } = experts;
                let mut gated = linear(cpu, gate, id, &x);
                let factor = linear(cpu, up, id, &x);
                let (Buffer::Host(to), Buffer::Host(factor)) = (&mut gated, &factor);
                cpu.isa.gated(*activation, to.floats_mut(), factor.floats());
                let part = linear(cpu, down, id, &gated);
                let part = floats(cpu, &part);
                cpu.isa.join(&mut sum, 1.0, &part, weight);
            }
            sum
        }

        /// The same as the formula says it, of the values that the matrices stand for.
        fn naive(&self, experts: &Experts, routing: &Routing, row: usize) -> Vec<f64> {
            let x: Vec<f64> = self.row(row).0.iter().copied().map(f64::from).collect();
            let mut sum = vec![0.0; self.shape[0]];
            for (&id, &weight) in routing.ids.iter().zip(&routing.weights) {
                let Experts { gate, up, down, activation } = experts;
                let (gate, up) = (naive_linear(gate, id, &x), naive_linear(up, id, &x));
                let gated = gate.iter().zip(up).map(|(&gate, up)| match *activation {
                    Activation::Silu => gate / (1.0 + (-gate).exp()) * up,
                    Activation::GeluTanh => {
                        let root = (2.0 / std::f64::consts::PI).sqrt();
                        0.5 * gate * (1.0 + (root * (gate + 0.044_715 * gate.powi(3))).tanh()) * up
                    }
                    Activation::ClampedSwish { alpha, limit } => {
                        let (alpha, limit) = (f64::from(alpha), f64::from(limit));
                        let gate = gate.min(limit);
                        gate / (1.0 + (-alpha * gate).exp()) * (up.clamp(-limit, limit) + 1.0)
                    }
                });
                let part = naive_linear(down, id, &gated.collect::<Vec<_>>());
                sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += f64::from(weight) * x);
            }
            sum
        }
    }

    /// Expert `id`'s product with one row.
    fn linear(cpu: &mut Cpu, part: &ExpertWeights, id: u32, x: &Buffer) -> Buffer {
        let id = id as usize;
        let (matrix, scale) = (&part.matrices[id], part.scales[id]);
        let n = matrix.rows();
        let bias = part.bias.as_ref().map(|bias| floats(cpu, bias)[id * n..][..n].to_vec());
        let bias = bias.map(|bias| buffer(cpu, &bias));
        let mut out = cpu.buffer(n).unwrap();
        let weight = Weight { matrix, bias: bias.as_ref(), scale };
        let product = Linear { weight, out: &mut out, is_added: false };
        cpu.linear(Input::Plain(x), 1, &mut [product]).unwrap();
        out
    }

    fn naive_linear(part: &ExpertWeights, id: u32, x: &[f64]) -> Vec<f64> {
        let id = id as usize;
        let n = part.matrices[id].rows();
        let bias = part.bias.as_ref().map(|Buffer::Host(bias)| &bias.floats()[id * n..][..n]);
        let rows = values(&part.matrices[id]);
        let row = |(row, weights): (usize, &[f32])| {
            let sum: f64 = weights.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
            sum * f64::from(part.scales[id]) + bias.map_or(0.0, |bias| f64::from(bias[row]))
        };
        rows.chunks_exact(x.len()).enumerate().map(row).collect()
    }

    #[test]
    fn experts_are_as_the_formula_says() {
        for (number, case) in cases().iter().enumerate() {
            for isa in isas() {
                let mut cpu = cpu(isa, 2);
                let experts = case.experts(&mut cpu);
                let got = case.run(&mut cpu, &experts, 0..31);
                let (mut error, mut size) = (0.0, 0.0);
                for (row, got) in got.chunks_exact(case.shape[0]).enumerate() {
                    let routing = case.routing(&mut cpu, &(row..row + 1));
                    for (got, exact) in got.iter().zip(case.naive(&experts, &routing, row)) {
                        error += (f64::from(*got) - exact).powi(2);
                        size += exact.powi(2);
                    }
                }
                // Activations of eight bits, or of floats.
                let any_blocks = case.quants.iter().any(|quant| quant.is_blocks());
                let bound = if any_blocks { 2e-2 } else { 1e-6 };
                let found = (error / size).sqrt();
                assert!(found < bound, "case {number} {isa}: {found}");
            }
        }
    }

    #[test]
    fn a_row_depends_on_no_other_row_nor_on_threads_and_is_what_products_make() {
        for (number, case) in cases().iter().enumerate() {
            for isa in isas().into_iter().filter(|isa| *isa != "portable") {
                let width = case.shape[0];
                let mut cpu = cpu(isa, 1);
                let experts = case.experts(&mut cpu);
                let all = case.run(&mut cpu, &experts, 0..70);
                for threads in [2, 5, 64] {
                    let again = case.run(&mut self::cpu(isa, threads), &experts, 0..70);
                    assert_same(&again, &all, &format!("case {number} {isa} {threads} threads"));
                }
                for rows in [0..1, 5..6, 0..2, 60..70, 30..64] {
                    let part = case.run(&mut self::cpu(isa, 3), &experts, rows.clone());
                    let expected = &all[rows.start * width..rows.end * width];
                    assert_same(&part, expected, &format!("case {number} {isa} {rows:?}"));
                }
                for row in [0, 1, 33, 69] {
                    let composed = case.composed(&mut cpu, &experts, row);
                    let what = format!("case {number} {isa} row {row}");
                    assert_same(&composed, &all[row * width..][..width], &what);
                }
            }
        }
    }

    fn chosen(router: &Router, logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let mut cpu = cpu("portable", 2);
        let (mut routing, rows) = (Routing::default(), logits.len() / router.n_experts);
        let logits = buffer(&mut cpu, logits);
        cpu.route(router, &logits, rows, &mut routing).unwrap();
        (routing.ids, routing.weights)
    }

    #[test]
    fn the_largest_logits_choose_and_the_lower_number_wins_a_tie() {
        let router = Router { n_experts: 5, n_used: 2, is_normalised: true };
        let (ids, weights) = chosen(&router, &[1.0, 3.0, 3.0, 3.0, 0.0, 2.0, 7.0, 1.0, 7.5, -1.0]);
        assert_eq!(ids, [1, 2, 1, 3]);
        let e = 0.5f32.exp();
        assert_eq!(weights[..2], [0.5, 0.5]);
        assert!((weights[2] - 1.0 / (1.0 + e)).abs() < 1e-6, "{weights:?}");
        assert!((weights[2] + weights[3] - 1.0).abs() < 1e-6, "{weights:?}");
        let over_all = Router { is_normalised: false, ..router };
        let (_, weights) = chosen(&over_all, &[1.0, 3.0, 3.0, 3.0, 0.0]);
        let expected = 1.0 / (3.0 + (-2f32).exp() + (-3f32).exp());
        assert!(weights.iter().all(|weight| (weight - expected).abs() < 1e-6), "{weights:?}");
    }

    #[test]
    fn as_many_experts_are_chosen_as_there_must_be_whatever_the_logits() {
        let mut random = Random::new(5);
        for n_experts in [1, 2, 8, 33, 128] {
            for n_used in [1, 2, 8, n_experts].into_iter().filter(|n| *n <= n_experts) {
                let router = Router { n_experts, n_used, is_normalised: true };
                // Many of them equal; some are no numbers.
                let mut logits: Vec<f32> =
                    (0..50 * n_experts).map(|_| (random.real() * 8.0).round()).collect();
                logits[..n_experts].fill(f32::NAN);
                logits[n_experts] = f32::NAN;
                logits[2 * n_experts] = f32::NEG_INFINITY;
                let (ids, weights) = chosen(&router, &logits);
                let rows = ids.chunks_exact(n_used).zip(weights.chunks_exact(n_used));
                for (row, (ids, weights)) in rows.enumerate() {
                    let logits = &logits[row * n_experts..][..n_experts];
                    let mut best: Vec<u32> = (0..).take(n_experts).collect();
                    best.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
                    best.truncate(n_used);
                    best.sort_unstable();
                    assert_eq!(ids, best, "row {row} of {n_experts}");
                    let sum: f32 = weights.iter().sum();
                    let has_numbers = row > 2 || n_experts > 1 && row == 2;
                    assert!(!has_numbers || (sum - 1.0).abs() < 1e-5, "row {row}: {sum}");
                }
            }
        }
    }
}
