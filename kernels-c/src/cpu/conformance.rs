//! One test body for every instruction set this processor has: all operations, formats and shapes
//! against plain arithmetic in f64, and against each other.

use super::isa::{ACT_GROUP, Acts, GEMV_TOKENS, Isa, PANEL_ROWS, Rows, SUM_GROUP};
use super::memory::Spread;
use super::{Cpu, CpuOptions, isas};
use crate::device::{
    Activation, Activations, Attention, Buffer, Device, GateUp, Input, KvShape, KvType, Linear,
    Matrix, RmsNorm, Rope, RopeKind, Span, Weight,
};
use crate::map::Bytes;
use crate::quant::{Quant, dequantize};

/// A reproducible source of numbers (Marsaglia's xorshift).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[5]
    }

    /// Within -1 and 1, more often small.
    pub(super) fn real(&mut self) -> f32 {
        let part = |bits: u64| (bits & 0xffff) as f32 / 32768.0 - 1.0;
        let bits = self.next();
        part(bits >> 16) * part(bits >> 40)
    }

    pub(super) fn reals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.real()).collect()
    }
}

/// Rows of random blocks whose values are numbers of a moderate size.
pub(super) fn weights(random: &mut Random, quant: Quant, rows: usize, cols: usize) -> Matrix {
    let n_blocks = rows * cols / quant.block_len();
    let mut bytes = Vec::new();
    let mut values = vec![0.0; quant.block_len()];
    for _ in 0..n_blocks {
        loop {
            let block: Vec<u8> = (0..quant.block_bytes()).map(|_| random.byte()).collect();
            dequantize(quant, &block, &mut values);
            if values.iter().all(|value| value.abs() < 1e4) {
                bytes.extend(block);
                break;
            }
        }
    }
    Matrix::new(quant, rows, cols, at_the_end(&bytes)).unwrap()
}

/// The bytes at the exact end of their allocation, so that a sanitizer sees a read beyond them, and
/// at an odd address, for a file's blocks are aligned to nothing.
fn at_the_end(bytes: &[u8]) -> Bytes {
    let mut all = Vec::with_capacity(bytes.len() + 1);
    all.push(0);
    all.extend_from_slice(bytes);
    Bytes::from_vec(all).slice(1..bytes.len() + 1).unwrap()
}

pub(super) fn values(matrix: &Matrix) -> Vec<f32> {
    let mut out = vec![0.0; matrix.rows() * matrix.cols()];
    dequantize(matrix.quant(), matrix.bytes().as_slice(), &mut out);
    out
}

/// Activations and what an instruction set's `quantize` makes of them.
struct Sample {
    cols: usize,
    x: Vec<f32>,
    q: Vec<i8>,
    d: Vec<f32>,
    sum: Vec<i16>,
}

impl Sample {
    fn new(isa: &Isa, x: Vec<f32>, cols: usize) -> Self {
        let n = x.len() / ACT_GROUP * ACT_GROUP;
        let (mut q, mut d) = (vec![0; n], vec![0.0; n / ACT_GROUP]);
        let mut sum = vec![0; n / SUM_GROUP];
        isa.quantize(&x[..n], &mut q, &mut d, &mut sum);
        Self { cols, x, q, d, sum }
    }

    fn acts(&self) -> Acts<'_> {
        Acts { cols: self.cols, x: &self.x, q: &self.q, d: &self.d, sum: &self.sum }
    }

    fn floats_only(&self) -> Acts<'_> {
        Acts { q: &[], d: &[], sum: &[], ..self.acts() }
    }

    fn tokens(&self) -> usize {
        self.x.len() / self.cols
    }

    /// What the quantised activations stand for.
    fn restored(&self) -> Vec<f64> {
        let restored = |(i, q): (usize, &i8)| f64::from(*q) * f64::from(self.d[i / ACT_GROUP]);
        self.q.iter().enumerate().map(restored).collect()
    }
}

/// `[tokens][rows]`, both ways that an instruction set has.
fn products(isa: &Isa, matrix: &Matrix, input: &Sample) -> (Vec<f32>, Vec<f32>) {
    let (rows, tokens) = (matrix.rows(), input.tokens());
    let blocks = matrix.quant().is_blocks();
    let acts = if blocks { input.acts() } else { input.floats_only() };
    let (mut direct, mut tiled) = (vec![f32::NAN; tokens * rows], vec![f32::NAN; tokens * rows]);
    let out = Spread::new(&mut direct);
    for first in (0..tokens).step_by(GEMV_TOKENS) {
        let n = GEMV_TOKENS.min(tokens - first);
        // SAFETY: one tile at a time.
        let mut tile = unsafe { out.tile(first..first + n, rows, 0..rows) };
        isa.gemv(Rows::of(matrix, 0, rows), &acts.rows_at(first, n), &mut tile);
    }
    let out = Spread::new(&mut tiled);
    let mut scratch = crate::pool::Scratch::default();
    for first in (0..rows).step_by(PANEL_ROWS) {
        let part = Rows::of(matrix, first, PANEL_ROWS.min(rows - first));
        // SAFETY: one tile at a time.
        let mut tile = unsafe { out.tile(0..tokens, rows, first..first + part.len) };
        if blocks {
            let panel = scratch.floats(isa.panel_len(part.quant, part.cols));
            isa.panel(part, panel);
            isa.gemm_i8(part.quant, panel, &acts, &mut tile);
        } else {
            let floats = scratch.floats(part.len * part.cols);
            isa.dequantize(part, floats);
            isa.gemm_f32(floats, &acts, &mut tile);
        }
    }
    (direct, tiled)
}

/// Asserts that `got` is `[tokens][rows]` of `w x`, within `tolerance` of the sum of the
/// magnitudes.
fn assert_product(got: &[f32], weights: &[f32], x: &[f64], cols: usize, what: &str) {
    let rows = weights.len() / cols;
    for (at, got) in got.iter().enumerate() {
        let (token, row) = (at / rows, at % rows);
        let (mut sum, mut size) = (0.0, 0.0);
        for i in 0..cols {
            let term = f64::from(weights[row * cols + i]) * x[token * cols + i];
            sum += term;
            size += term.abs();
        }
        let error = (f64::from(*got) - sum).abs();
        assert!(error <= 4e-6 * size + 1e-30, "{what} token {token} row {row}: {got} not {sum}");
    }
}

fn open(name: &str) -> Isa {
    Isa::open(Some(name), false).unwrap()
}

pub(super) fn assert_same(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(a.to_bits() == b.to_bits() || (*a == 0.0 && *b == 0.0), "{what} at {i}: {a} {b}");
    }
}

/// (rows, blocks of a row, tokens)
fn shapes(quant: Quant) -> Vec<(usize, usize, usize)> {
    let mut shapes = vec![(1, 1, 1), (5, 3, 9), (33, 2, 17), (50, 1, 33), (16, 5, 8)];
    shapes.extend((1..=8).map(|tokens| (19, 3, tokens)));
    if quant.block_len() < 256 {
        shapes.extend([(17, 4, 5), (32, 6, 6), (3, 70, 13), (64, 7, 7)]);
    } else {
        shapes.push((35, 9, 13));
    }
    if !quant.is_blocks() {
        shapes.extend([(7, 100, 11), (4, 31, 8), (9, 16, 6)]);
    }
    shapes
}

#[test]
fn products_of_every_format_are_right_and_the_same_everywhere() {
    let portable = open("portable");
    let mut random = Random::new(1);
    for quant in Quant::all() {
        for (rows, blocks, tokens) in shapes(quant) {
            let cols = blocks * quant.block_len();
            let matrix = weights(&mut random, quant, rows, cols);
            let x = random.reals(tokens * cols);
            let input = Sample::new(&portable, x, cols);
            let reals = values(&matrix);
            let expected = products(&portable, &matrix, &input).0;
            for name in isas() {
                let isa = open(name);
                let what = format!("{name} {quant} {rows}x{cols} x {tokens}");
                let (direct, tiled) = products(&isa, &matrix, &input);
                if quant.is_blocks() {
                    assert_product(&direct, &reals, &input.restored(), cols, &what);
                    assert_same(&direct, &expected, &format!("{what} gemv"));
                    assert_same(&tiled, &expected, &format!("{what} gemm"));
                } else {
                    let x: Vec<f64> = input.x.iter().copied().map(f64::from).collect();
                    assert_product(&direct, &reals, &x, cols, &what);
                    assert_product(&tiled, &reals, &x, cols, &what);
                    if name != "portable" {
                        assert_same(&direct, &tiled, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn eight_bits_of_activation_are_near_the_exact_product() {
    let mut random = Random::new(2);
    let (rows, cols) = (64, 512);
    for name in isas() {
        let isa = open(name);
        for quant in Quant::all().filter(|quant| quant.is_blocks()) {
            let matrix = weights(&mut random, quant, rows, cols);
            let input = Sample::new(&isa, random.reals(cols), cols);
            let (got, reals) = (products(&isa, &matrix, &input).0, values(&matrix));
            let (mut error, mut size) = (0.0, 0.0);
            for (row, got) in reals.chunks_exact(cols).zip(got) {
                let pairs = row.iter().zip(&input.x);
                let exact: f64 = pairs.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                error += (f64::from(got) - exact).powi(2);
                size += exact.powi(2);
            }
            assert!((error / size).sqrt() < 0.03, "{name} {quant}: {}", (error / size).sqrt());
        }
    }
}

/// A row a scale byte, each with all sixteen codes in each nibble of each scale's bytes.
fn fp4(quant: Quant) -> Matrix {
    let mut bytes = Vec::new();
    for scale in 0..=255u8 {
        for turn in 0..2u8 {
            let code = |j: u8| ((j + 8 * turn) % 16) | ((15 - j) << 4);
            if quant == Quant::MXFP4 {
                bytes.push(scale);
                bytes.extend((0..16).map(code));
            } else {
                bytes.extend([scale; 4]);
                bytes.extend((0..32).map(|j| code(j % 16)));
            }
        }
    }
    Matrix::new(quant, 256, 2 * quant.block_len(), Bytes::from_vec(bytes)).unwrap()
}

#[test]
fn fp4_is_right_for_all_codes_and_scales() {
    let portable = open("portable");
    for quant in [Quant::MXFP4, Quant::NVFP4] {
        let matrix = fp4(quant);
        let (cols, reals) = (matrix.cols(), values(&matrix));
        // Each token has a one where the others have none.
        let x = (0..cols * cols).map(|i| f32::from(u8::from(i / cols == i % cols))).collect();
        let input = Sample::new(&portable, x, cols);
        for name in isas() {
            let (direct, tiled) = products(&open(name), &matrix, &input);
            for (at, (direct, tiled)) in direct.iter().zip(&tiled).enumerate() {
                let (token, row) = (at / 256, at % 256);
                let exact = f64::from(reals[row * cols + token]);
                // 127 times the doubled weight must be a float.
                if exact.abs() < f64::from(f32::MAX) / 512.0 {
                    let bound = 2e-7 * exact.abs() + 1e-44;
                    let what = format!("{name} {quant} scale {row} weight {token}");
                    assert!(
                        (f64::from(*direct) - exact).abs() <= bound,
                        "{what}: {direct} {exact}"
                    );
                    assert!((f64::from(*tiled) - exact).abs() <= bound, "{what}: {tiled} {exact}");
                }
            }
        }
    }
}

#[test]
fn activations_are_quantised_the_same_everywhere() {
    let mut random = Random::new(3);
    let mut x = random.reals(32 * 40);
    x[64..96].fill(0.0);
    x[96] = 1e30;
    x[130] = -1e-30;
    let portable = Sample::new(&open("portable"), x.clone(), 32);
    for (group, d) in x.chunks_exact(32).zip(&portable.d) {
        let max = group.iter().fold(0f32, |max, value| max.max(value.abs()));
        assert!((f64::from(max) / 127.0 - f64::from(*d)).abs() <= 1e-7 * f64::from(*d));
    }
    for name in isas() {
        let input = Sample::new(&open(name), x.clone(), 32);
        assert_eq!(input.q, portable.q, "{name}");
        assert_same(&input.d, &portable.d, name);
        assert_eq!(input.sum, portable.sum, "{name}");
        let sums = input.q.chunks_exact(16).map(|q| q.iter().map(|q| i16::from(*q)).sum::<i16>());
        assert!(sums.eq(input.sum.iter().copied()), "{name}");
    }
}

#[test]
fn damaged_and_tiny_activations_are_quantised_the_same_everywhere() {
    let mut random = Random::new(10);
    let reals = random.reals(32);
    let group = |places: &[usize], value: f32| {
        let mut group = reals.clone();
        for &place in places {
            group[place] = value;
        }
        group
    };
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let mut damaged = vec![vec![nan; 32], vec![-inf; 32]];
    for place in 0..32 {
        let all = [nan, -nan, inf, -inf, f32::from_bits(0x7f80_0001), f32::from_bits(u32::MAX)];
        damaged.extend(all.map(|value| group(&[place], value)));
    }
    damaged.push(group(&[0, 9, 31], nan));
    let tiny = [3.7e-37, 1e-38, 1e-44, 0.0].map(|size: f32| vec![-size; 32]);
    for name in isas() {
        let isa = open(name);
        for group in &damaged {
            let input = Sample::new(&isa, group.clone(), 32);
            assert_eq!(input.d[0].to_bits(), f32::NAN.to_bits(), "{name} {group:?}");
            assert_eq!((input.q, input.sum), (vec![0; 32], vec![0; 2]), "{name} {group:?}");
        }
        for group in &tiny {
            let input = Sample::new(&isa, group.clone(), 32);
            assert_eq!(input.d[0].to_bits(), (group[0].abs() / 127.0).to_bits(), "{name}");
            assert_eq!((input.q, input.sum), (vec![0; 32], vec![0; 2]), "{name} {group:?}");
        }
        let least = Sample::new(&isa, vec![3.8e-37; 32], 32);
        assert_eq!((least.q, least.sum), (vec![127; 32], vec![16 * 127; 2]), "{name}");
    }
}

#[test]
fn a_damaged_activation_damages_its_own_row_of_a_product() {
    let mut random = Random::new(11);
    for quant in Quant::all() {
        let (cols, rows, tokens) = (2 * quant.block_len().max(32), 19, 9);
        let matrix = weights(&mut random, quant, rows, cols);
        let mut x = random.reals(tokens * cols);
        x[4 * cols + 37] = f32::NAN;
        for name in isas() {
            let input = Sample::new(&open(name), x.clone(), cols);
            let (direct, tiled) = products(&open(name), &matrix, &input);
            for (at, (direct, tiled)) in direct.iter().zip(&tiled).enumerate() {
                let is_damaged = at / rows == 4;
                assert_eq!(direct.is_nan(), is_damaged, "{name} {quant} gemv at {at}");
                assert_eq!(tiled.is_nan(), is_damaged, "{name} {quant} gemm at {at}");
            }
        }
    }
}

fn assert_near(got: &[f32], expected: impl IntoIterator<Item = f64>, bound: f64, what: &str) {
    let mut n = 0;
    for (i, expected) in expected.into_iter().enumerate() {
        let error = (f64::from(got[i]) - expected).abs();
        assert!(error <= bound * (1e-3 + expected.abs()), "{what} at {i}: {} {expected}", got[i]);
        n += 1;
    }
    assert_eq!(n, got.len(), "{what}");
}

fn wide(value: f32) -> f64 {
    f64::from(value)
}

#[test]
fn cheap_operations_are_right() {
    let mut random = Random::new(4);
    for name in isas() {
        let isa = open(name);
        for n in [1, 2, 15, 16, 17, 31, 33, 64, 100, 576, 1000] {
            let x: Vec<f32> = random.reals(n).iter().map(|x| 12.0 * x).collect();
            let y = random.reals(n);
            let what = format!("{name} {n}");

            let mut sum = x.clone();
            isa.add(&mut sum, &y);
            assert_near(&sum, x.iter().zip(&y).map(|(&x, &y)| wide(x) + wide(y)), 1e-6, &what);

            let mut joined = x.clone();
            isa.join(&mut joined, 0.5, &y, -3.0);
            let expected = x.iter().zip(&y).map(|(&x, &y)| 0.5 * wide(x) - 3.0 * wide(y));
            assert_near(&joined, expected, 1e-3, &what);

            let mean = x.iter().map(|&x| wide(x).powi(2)).sum::<f64>() / n as f64;
            let factor = 1.0 / (mean + 1e-5).sqrt();
            let expected = x.iter().zip(&y).map(|(&x, &y)| wide(x) * factor * wide(y));
            let mut norm = vec![0.0; n];
            isa.rms_norm(&x, &y, 1e-5, &mut norm);
            assert_near(&norm, expected.clone(), 2e-6, &what);
            let mut norm = x.clone();
            isa.rms_norm_inplace(&mut norm, &y, 1e-5);
            assert_near(&norm, expected, 2e-6, &what);

            let mut gate = x.clone();
            isa.gated(Activation::Silu, &mut gate, &y);
            let silu = |x: f64| x / (1.0 + (-x).exp());
            assert_near(
                &gate,
                x.iter().zip(&y).map(|(&x, &y)| silu(wide(x)) * wide(y)),
                3e-6,
                &what,
            );

            let mut gate = x.clone();
            isa.gated(Activation::GeluTanh, &mut gate, &y);
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let gelu = |x: f64| 0.5 * x * (1.0 + (root * (x + 0.044_715 * x * x * x)).tanh());
            let expected = x.iter().zip(&y).map(|(&x, &y)| gelu(wide(x)) * wide(y));
            // 1 + tanh of the plain form cancels where gelu is nearly 0.
            assert_near(&gate, expected, 2e-4, &what);

            let mut capped = x.clone();
            isa.soft_cap(&mut capped, 5.0);
            assert_near(&capped, x.iter().map(|&x| 5.0 * (wide(x) / 5.0).tanh()), 3e-4, &what);
        }
    }
}

#[test]
fn extremes_do_not_become_nan() {
    let x = [-1e4, -200.0, -104.0, -90.0, -0.0, 0.0, 88.0, 90.0, 1e4, f32::MIN, f32::MAX];
    for name in isas() {
        let isa = open(name);
        let mut gate = x;
        isa.gated(Activation::Silu, &mut gate, &[1.0; 11]);
        for (&x, gate) in x.iter().zip(gate) {
            let silu = wide(x) / (1.0 + (-wide(x)).exp());
            assert!((wide(gate) - silu).abs() <= 1e-6 * silu.abs() + 1e-30, "{name} {x}: {gate}");
        }
        let mut capped = x;
        isa.soft_cap(&mut capped, 30.0);
        assert!(capped.iter().all(|value| value.abs() <= 30.0), "{name} {capped:?}");
    }
}

#[test]
fn a_softmax_of_a_tile_is_right() {
    let mut random = Random::new(5);
    for name in isas() {
        let isa = open(name);
        for n in [1, 7, 16, 40, 128] {
            let mut x: Vec<f32> = random.reals(n).iter().map(|x| 50.0 * x).collect();
            x[n / 2] = f32::NEG_INFINITY;
            x[0] = 3.0;
            let before = x.clone();
            let (max, sum) = isa.softmax_tile(&mut x);
            let largest = before.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max.to_bits(), largest.to_bits(), "{name} {n}");
            let exact = |x: &f32| (wide(*x) - wide(largest)).exp();
            for (got, x) in x.iter().zip(&before) {
                let error = (wide(*got) - exact(x)).abs();
                assert!(error <= 6e-6 * exact(x) + 1e-37, "{name} {x}: {got} {}", exact(x));
            }
            let total: f64 = before.iter().map(exact).sum();
            assert!((wide(sum) - total).abs() <= 6e-6 * total, "{name} {n}: {sum} {total}");
        }
        let mut nothing = [f32::NEG_INFINITY; 20];
        assert_eq!(isa.softmax_tile(&mut nothing), (f32::NEG_INFINITY, 0.0), "{name}");
        assert!(nothing.iter().all(|value| value.to_bits() == 0), "{name}");
    }
}

#[test]
fn a_nan_score_stays_nan() {
    let mut random = Random::new(12);
    for name in isas() {
        let isa = open(name);
        for (n, place) in [(1, 0), (7, 3), (40, 0), (40, 39), (128, 5), (128, 127)] {
            let mut x = random.reals(n);
            x[place] = f32::NAN;
            let others = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut capped = x.clone();
            isa.soft_cap(&mut capped, 5.0);
            let (max, sum) = isa.softmax_tile(&mut x);
            assert_eq!(max.to_bits(), others.to_bits(), "{name} {n} {place}");
            assert!(sum.is_nan(), "{name} {n} {place}: {sum}");
            for (at, (x, capped)) in x.iter().zip(&capped).enumerate() {
                assert_eq!(x.is_nan(), at == place, "{name} {n} {place}: {x} at {at}");
                assert_eq!(capped.is_nan(), at == place, "{name} {n} {place}: {capped} at {at}");
            }
        }
    }
}

#[test]
fn half_precision_rounds_the_same_everywhere() {
    let portable = open("portable");
    let mut random = Random::new(6);
    let mut x: Vec<f32> = (0..4000)
        .map(|_| f32::from_bits(u32::from_le_bytes([(); 4].map(|()| random.byte()))))
        .collect();
    x.extend((0..4000).map(|_| random.real() * 1e-5));
    x.extend([65504.0, 65519.9, 65520.0, f32::INFINITY, 2e-8, 3e-8, 6e-8, -0.0]);
    x.retain(|x| !x.is_nan());
    let mut expected = vec![0; x.len()];
    portable.f16_from_f32(&x, &mut expected);
    for name in isas() {
        let mut got = vec![0; x.len()];
        open(name).f16_from_f32(&x, &mut got);
        assert_eq!(got, expected, "{name}");
    }
}

pub(super) fn cpu(isa: &str, threads: usize) -> Cpu {
    Cpu::open(&CpuOptions { threads, isa: Some(isa.to_owned()), ..CpuOptions::default() }).unwrap()
}

pub(super) fn buffer(cpu: &mut Cpu, values: &[f32]) -> Buffer {
    let mut buffer = cpu.buffer(values.len()).unwrap();
    cpu.write(values, &mut buffer, 0).unwrap();
    buffer
}

pub(super) fn floats(cpu: &mut Cpu, buffer: &Buffer) -> Vec<f32> {
    let mut out = vec![0.0; buffer.len()];
    cpu.read(buffer, 0, &mut out).unwrap();
    out
}

#[test]
fn rotations_are_right() {
    let mut random = Random::new(7);
    let positions = [0, 1, 2, 77, 5000];
    for name in isas() {
        for (kind, n_heads, head_dim, n_pairs) in [
            (RopeKind::Adjacent, 3, 64, 32),
            (RopeKind::Halves, 2, 64, 32),
            (RopeKind::Halves, 1, 80, 20),
            (RopeKind::Adjacent, 2, 22, 9),
            (RopeKind::Halves, 5, 6, 3),
        ] {
            let inv_freq = (0..n_pairs).map(|i| 0.7f32.powi(i)).collect::<Vec<_>>();
            let rope = Rope { kind, inv_freq, magnitude: 1.25 };
            let mut cpu = cpu(name, 2);
            let x = random.reals(positions.len() * n_heads * head_dim);
            let mut turned = buffer(&mut cpu, &x);
            cpu.rope(&rope, &mut turned, (n_heads, head_dim), &positions).unwrap();
            let mut expected: Vec<f64> = x.iter().copied().map(wide).collect();
            let n_pairs = rope.inv_freq.len();
            for (at, head) in expected.chunks_exact_mut(head_dim).enumerate() {
                for (pair, inv_freq) in rope.inv_freq.iter().enumerate() {
                    let angle = f64::from(positions[at / n_heads] as f32 * inv_freq);
                    let (sin, cos) = angle.sin_cos();
                    let (a, b) = match kind {
                        RopeKind::Adjacent => (2 * pair, 2 * pair + 1),
                        RopeKind::Halves => (pair, pair + n_pairs),
                    };
                    let (x, y) = (head[a] * 1.25, head[b] * 1.25);
                    (head[a], head[b]) = (x * cos - y * sin, x * sin + y * cos);
                }
            }
            let turned = floats(&mut cpu, &turned);
            assert_near(&turned, expected, 1e-3, &format!("{name} {kind:?} {head_dim}"));
        }
    }
}

/// What `Device::linear` gives for `rows` rows of x.
fn linear(cpu: &mut Cpu, x: &[f32], rows: usize, matrices: &[(Matrix, Vec<f32>)]) -> Vec<Vec<f32>> {
    let x = buffer(cpu, x);
    let mut rest: Vec<_> = matrices
        .iter()
        .map(|(matrix, bias)| {
            let out = cpu.buffer(rows * matrix.rows()).unwrap();
            (matrix, (!bias.is_empty()).then(|| buffer(cpu, bias)), out)
        })
        .collect();
    let mut parts: Vec<_> = rest
        .iter_mut()
        .map(|(matrix, bias, out)| {
            let weight = Weight { matrix, bias: bias.as_ref(), scale: 0.5 };
            Linear { weight, out, is_added: false }
        })
        .collect();
    cpu.linear(Input::Plain(&x), rows, &mut parts).unwrap();
    rest.iter().map(|(_, _, out)| floats(cpu, out)).collect()
}

#[test]
fn a_row_of_a_product_depends_on_no_other_row_nor_on_threads() {
    let mut random = Random::new(8);
    let (cols, rows) = (288, 37);
    let mut matrices: Vec<(Matrix, Vec<f32>)> = Vec::new();
    for (quant, width) in
        [(Quant::Q4_0, 100), (Quant::Q8_0, 33), (Quant::NVFP4, 64), (Quant::F16, 50)]
    {
        // A multiple of NVFP4's 64 would hide ragged groups from the others.
        if cols % quant.block_len() == 0 {
            let bias = if width == 33 { random.reals(width) } else { Vec::new() };
            matrices.push((weights(&mut random, quant, width, cols), bias));
        }
    }
    let x = random.reals(rows * cols);
    for name in isas().into_iter().filter(|name| *name != "portable") {
        let all = linear(&mut cpu(name, 1), &x, rows, &matrices);
        let again = linear(&mut cpu(name, 5), &x, rows, &matrices);
        assert_eq!(all, again, "{name}");
        for (first, n) in [(0, 1), (36, 1), (3, 8), (10, 9)] {
            let part = linear(&mut cpu(name, 3), &x[first * cols..][..n * cols], n, &matrices);
            for (i, (all, part)) in all.iter().zip(&part).enumerate() {
                let width = matrices[i].0.rows();
                assert_same(part, &all[first * width..][..n * width], &format!("{name} {n}"));
            }
        }
        let (matrix, bias) = &matrices[1];
        let plain = &linear(&mut cpu(name, 2), &x, rows, &[(matrix.clone(), Vec::new())])[0];
        for (at, (with, plain)) in all[1].iter().zip(plain).enumerate() {
            assert_eq!(with.to_bits(), (plain + bias[at % matrix.rows()]).to_bits(), "{name} {at}");
        }
    }
}

/// A matrix of FP8 with a scale for each tile, and what its weights are.
fn tiled(random: &mut Random, rows: usize, cols: usize, tile: [usize; 2]) -> (Matrix, Vec<f32>) {
    let matrix = weights(random, Quant::F8_E4M3, rows, cols);
    let [n_rows, n_cols] = [rows.div_ceil(tile[0]), cols.div_ceil(tile[1])];
    let scales: Vec<f32> = (0..n_rows * n_cols).map(|_| 0.01 + random.real().abs()).collect();
    let mut values = values(&matrix);
    for (at, value) in values.iter_mut().enumerate() {
        let (row, col) = (at / cols, at % cols);
        *value *= scales[row / tile[0] * n_cols + col / tile[1]];
    }
    (matrix.with_tiles(tile, scales).unwrap(), values)
}

#[test]
fn scales_of_tiles_belong_to_their_weights() {
    let mut random = Random::new(21);
    for (rows, cols, tile) in [(300, 200, [128, 128]), (70, 96, [16, 32]), (5, 33, [128, 128])] {
        let (matrix, values) = tiled(&mut random, rows, cols, tile);
        for name in isas() {
            let tokens = 70;
            let x = random.reals(tokens * cols);
            let all = &linear(&mut cpu(name, 3), &x, tokens, &[(matrix.clone(), Vec::new())])[0];
            let doubled: Vec<f32> = all.iter().map(|y| 2.0 * y).collect();
            let reals: Vec<f64> = x.iter().copied().map(f64::from).collect();
            assert_product(&doubled, &values, &reals, cols, name);
            if name != "portable" {
                for (first, n) in [(0, 1), (61, 9)] {
                    let part = &x[first * cols..][..n * cols];
                    let part = &linear(&mut cpu(name, 2), part, n, &[(matrix.clone(), vec![])])[0];
                    assert_same(part, &all[first * rows..][..n * rows], name);
                }
            }
            let mut cpu = cpu(name, 2);
            let mut out = cpu.buffer(3 * cols).unwrap();
            let last = u32::try_from(rows - 1).unwrap();
            cpu.embed(&matrix, &[0, last, 3], 1.0, &mut out).unwrap();
            for (id, row) in [0, rows - 1, 3].iter().zip(floats(&mut cpu, &out).chunks(cols)) {
                assert_eq!(row, &values[id * cols..][..cols], "{name} row {id}");
            }
        }
    }
    let scales = |n| vec![1.0; n];
    let plain = |quant| weights(&mut Random::new(1), quant, 4, 64);
    assert!(plain(Quant::F8_E4M3).with_tiles([2, 32], scales(4)).is_some());
    assert!(plain(Quant::F8_E4M3).with_tiles([2, 32], scales(5)).is_none());
    assert!(plain(Quant::F8_E4M3).with_tiles([0, 32], scales(4)).is_none());
    assert!(plain(Quant::Q8_0).with_tiles([2, 32], scales(4)).is_none());
}

/// With `is_exact` nothing is rounded but sums.
#[test]
fn exact_products_read_floats() {
    let mut random = Random::new(22);
    for name in isas() {
        for quant in Quant::all().filter(|quant| quant.is_blocks()) {
            let (rows, cols) = (37, 2 * quant.block_len());
            let matrix = weights(&mut random, quant, rows, cols);
            let x = random.reals(11 * cols);
            let options = CpuOptions { threads: 2, isa: Some(name.to_owned()), is_exact: true };
            let mut cpu = Cpu::open(&options).unwrap();
            let matrices = [(matrix.clone(), Vec::new())];
            let all = &linear(&mut cpu, &x, 11, &matrices)[0];
            let doubled: Vec<f32> = all.iter().map(|y| 2.0 * y).collect();
            let reals: Vec<f64> = x.iter().copied().map(f64::from).collect();
            assert_product(&doubled, &values(&matrix), &reals, cols, &format!("{name} {quant}"));
            let one = &linear(&mut cpu, &x[..cols], 1, &matrices)[0];
            assert_same(one, &all[..rows], &format!("{name} {quant}"));
        }
    }
}

/// A norm before a product, an activation between two and a sum after one give the same bits
/// whether they are fused or not.
#[test]
fn fused_operations_are_what_they_are_made_of() {
    let mut random = Random::new(23);
    let formats = [
        [Quant::Q4_0, Quant::Q4_0, Quant::Q6_K],
        [Quant::MXFP4, Quant::F16, Quant::Q8_0],
        [Quant::BF16, Quant::Q8_0, Quant::F32],
        [Quant::F32; 3],
    ];
    for name in isas().into_iter().filter(|name| *name != "portable") {
        for (quants, rows) in formats.into_iter().flat_map(|quants| [1, 7, 65].map(|n| (quants, n)))
        {
            let what = format!("{name} {quants:?} {rows} rows");
            let (cols, width) = (96, 512);
            let [gate, up] = [0, 1].map(|i| weights(&mut random, quants[i], width, cols));
            let down = weights(&mut random, quants[2], cols, width);
            let mut cpu = cpu(name, 3);
            let x = buffer(&mut cpu, &random.reals(rows * cols));
            let bias = buffer(&mut cpu, &random.reals(width));
            let norm = RmsNorm { weight: buffer(&mut cpu, &random.reals(cols)), eps: 1e-5 };
            let before = random.reals(rows * cols);
            let gate = Weight { matrix: &gate, bias: Some(&bias), scale: 0.5 };
            let up = Weight { matrix: &up, bias: None, scale: 1.0 };
            let down = Weight { matrix: &down, bias: None, scale: 1.0 };
            let product = |cpu: &mut Cpu, input: Input<'_>, weight: Weight<'_>| {
                let mut out = cpu.buffer(rows * weight.matrix.rows()).unwrap();
                let part = Linear { weight, out: &mut out, is_added: false };
                cpu.linear(input, rows, &mut [part]).unwrap();
                floats(cpu, &out)
            };

            let mut normed = cpu.buffer(rows * cols).unwrap();
            cpu.rms_norm(&norm, &x, rows, &mut normed).unwrap();
            let mut gated = product(&mut cpu, Input::Plain(&normed), gate);
            let same = product(&mut cpu, Input::Normed(&x, &norm), gate);
            assert_same(&same, &gated, &what);
            let factors = product(&mut cpu, Input::Plain(&normed), up);
            for (gate, up) in gated.chunks_mut(width).zip(factors.chunks(width)) {
                cpu.isa.gated(Activation::Silu, gate, up);
            }
            let gated = buffer(&mut cpu, &gated);
            let expected = product(&mut cpu, Input::Plain(&gated), down);

            let all = GateUp { gate, up, activation: Activation::Silu, reader: down.matrix };
            let mut ready = Activations::default();
            cpu.gate_up(Input::Normed(&x, &norm), rows, &all, &mut ready).unwrap();
            assert_same(&product(&mut cpu, Input::Ready(&ready), down), &expected, &what);

            let mut sum = buffer(&mut cpu, &before);
            let part = Linear { weight: down, out: &mut sum, is_added: true };
            cpu.linear(Input::Ready(&ready), rows, &mut [part]).unwrap();
            let expected: Vec<f32> = before.iter().zip(&expected).map(|(a, b)| a + b).collect();
            assert_same(&floats(&mut cpu, &sum), &expected, &what);
        }
    }
}

#[test]
fn embeddings_are_rows_of_the_table() {
    let mut random = Random::new(9);
    for quant in Quant::all() {
        let table = weights(&mut random, quant, 20, 256);
        let reals = values(&table);
        for name in isas() {
            let mut cpu = cpu(name, 2);
            let mut out = cpu.buffer(3 * 256).unwrap();
            cpu.embed(&table, &[19, 0, 7], 2.0, &mut out).unwrap();
            let got = floats(&mut cpu, &out);
            for (row, got) in [19, 0, 7].into_iter().zip(got.chunks_exact(256)) {
                let expected = reals[row * 256..][..256].iter().map(|&value| 2.0 * wide(value));
                assert_near(got, expected, 0.0, &format!("{name} {quant}"));
            }
        }
    }
}

#[test]
fn sinks_join_the_softmax_without_a_value() {
    let (n_heads, n_kv_heads, head_dim, n_tokens) = (4, 2, 32, 900);
    let shape =
        KvShape { n_layers: 1, n_kv_heads, head_dim, block_tokens: 64, kv_type: KvType::F16 };
    let mut random = Random::new(12);
    let [k, v] = [0, 1].map(|_| random.reals(n_tokens * n_kv_heads * head_dim));
    // The last one's is larger than any score.
    let sinks = [-1.0, 0.5, 3.0, 20.0];
    for (name, n_rows) in isas().into_iter().flat_map(|name| [(name, 1), (name, 3)]) {
        let q = random.reals(n_rows * n_heads * head_dim);
        let mut cpu = cpu(name, 2);
        let mut kv = cpu.kv_cache(shape, 15).unwrap();
        let (k, v) = (buffer(&mut cpu, &k), buffer(&mut cpu, &v));
        let slots: Vec<u32> = (0..).take(n_tokens).collect();
        cpu.kv_store(&mut kv, 0, &k, &v, &slots).unwrap();
        let blocks: Vec<u32> = (0..15).collect();
        let spans = [Span { first_row: 0, n_rows, kv_len: n_tokens, blocks: &blocks }];
        let sinks_on_device = buffer(&mut cpu, &sinks);
        let q = buffer(&mut cpu, &q);
        let mut run = |sinks| {
            let constants = Attention { n_heads, scale: 1.0, window: None, soft_cap: None, sinks };
            let mut out = cpu.buffer(n_rows * n_heads * head_dim).unwrap();
            cpu.attention(&constants, (&kv, 0), &q, &spans, &mut out).unwrap();
            floats(&mut cpu, &out)
        };
        let (with, without) = (run(Some(&sinks_on_device)), run(None));
        let [q, k] = [&q, &k].map(|Buffer::Host(it)| it.floats().to_vec());
        for row in 0..n_rows {
            for (head, sink) in sinks.iter().enumerate() {
                let at = (row * n_heads + head) * head_dim;
                let visible = n_tokens - n_rows + row + 1;
                let score = |token: usize| {
                    let k = &k[(token * n_kv_heads + head / 2) * head_dim..][..head_dim];
                    let dot: f64 =
                        q[at..][..head_dim].iter().zip(k).map(|(q, k)| wide(q * k)).sum();
                    dot.exp()
                };
                let sum: f64 = (0..visible).map(score).sum();
                let share = sum / (sum + wide(*sink).exp());
                let expected = without[at..][..head_dim].iter().map(|x| share * wide(*x));
                let what = format!("{name} row {row} head {head}");
                assert_near(&with[at..][..head_dim], expected, 2e-3, &what);
            }
        }
    }
}
