//! Golden vectors, and how far logits are from them. Shared by the test binaries of this crate,
//! none of which uses all of it.

#![allow(dead_code)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use v4_engine::format::safetensors;
use v4_kernels::Map;

/// Where the vectors lie; their README says how they were made.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

/// The arrays of a safetensors file of any type.
pub struct Vectors {
    map: Arc<Map>,
    arrays: HashMap<String, (safetensors::Entry, u64)>,
}

impl Vectors {
    pub fn open(path: &Path) -> Self {
        let map = Map::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (entries, start) = safetensors::header(map.as_slice()).expect("golden files are whole");
        let arrays = entries.into_iter().map(|(name, entry)| (name, (entry, start))).collect();
        Self { map, arrays }
    }

    fn words(&self, name: &str, dtype: &str) -> impl Iterator<Item = [u8; 4]> {
        let (entry, start) = &self.arrays[name];
        assert_eq!(entry.dtype, dtype, "{name}");
        let [from, to] = entry.data_offsets.map(|at| usize::try_from(start + at).expect("fits"));
        let words = self.map.as_slice()[from..to].chunks_exact(4);
        words.map(|word| word.try_into().expect("four bytes"))
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.words(name, "F32").map(f32::from_le_bytes).collect()
    }

    pub fn ints(&self, name: &str) -> Vec<u32> {
        let int = |word| u32::try_from(i32::from_le_bytes(word)).expect("ids are not negative");
        self.words(name, "I32").map(int).collect()
    }

    pub fn width(&self, name: &str) -> usize {
        let last = *self.arrays[name].0.shape.last().expect("an array");
        usize::try_from(last).expect("fits")
    }
}

/// How far rows of logits are from the golden ones.
#[derive(Debug, Default)]
pub struct Distance {
    pub max_abs: f32,
    pub mean_kl: f64,
    pub median_kl: f64,
    pub max_kl: f64,
    /// Share of rows with the same likeliest token.
    pub top1: f64,
    /// The same, but a token counts as well that the golden row has nearer than [`TIE`] to its
    /// likeliest.
    pub top1_or_tie: f64,
}

/// Logits so near are one to half precision in keys and values.
const TIE: f32 = 1e-2;

/// Compares `[rows, width]` with the golden rows.
pub fn distance(found: &[f32], golden: &[f32], width: usize) -> Distance {
    assert_eq!(found.len(), golden.len());
    let n = golden.len() / width;
    let mut all = Distance::default();
    let (mut same, mut near, mut kls) = (0, 0, Vec::with_capacity(n));
    for (found, golden) in found.chunks(width).zip(golden.chunks(width)) {
        let differences = found.iter().zip(golden).map(|(a, b)| (a - b).abs());
        // NaN must not pass: `max` would drop it.
        all.max_abs = differences.fold(all.max_abs, |max, d| if d <= max { max } else { d });
        let kl = kl(golden, found);
        all.mean_kl += kl / n as f64;
        all.max_kl = all.max_kl.max(kl);
        kls.push(kl);
        let (chosen, best) = (argmax(found), argmax(golden));
        same += usize::from(chosen == best);
        near += usize::from(golden[best as usize] - golden[chosen as usize] < TIE);
    }
    kls.sort_by(f64::total_cmp);
    all.median_kl = kls[n / 2];
    all.top1 = same as f64 / n as f64;
    all.top1_or_tie = near as f64 / n as f64;
    all
}

/// The likeliest token; the first of equals.
pub fn argmax(row: &[f32]) -> u32 {
    let best = (0..row.len()).reduce(|best, i| if row[i] > row[best] { i } else { best });
    u32::try_from(best.expect("a row has values")).expect("a vocabulary has 32 bits")
}

/// `log(sum(e^x))`.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
    f64::from(max) + sum.ln()
}

fn kl(golden: &[f32], found: &[f32]) -> f64 {
    let (a, b) = (log_sum_exp(golden), log_sum_exp(found));
    let terms = golden.iter().zip(found).map(|(&g, &f)| {
        let (log_p, log_q) = (f64::from(g) - a, f64::from(f) - b);
        log_p.exp() * (log_p - log_q)
    });
    terms.sum()
}
