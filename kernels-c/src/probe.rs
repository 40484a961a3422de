//! What this machine can do at its best, for `cargo xtask bench` to hold a model's speed against.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::ffi;
use crate::pool::Pool;

/// Words of a share of a read: 1 MiB.
const SHARE_WORDS: usize = 128 << 10;
/// Words that C reads at a time.
const ROUND_WORDS: usize = 64;
/// Rounds of a share of products: some 20 us.
const SHARE_ROUNDS: u64 = 8 << 10;
const SHARES: usize = 1_000;
/// Passes, of which the best counts: what else runs on the machine only makes one slower.
const PASSES: usize = 5;

/// What is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// int8 products, summed in int32.
    Int8,
    /// bfloat16 products, summed in float32.
    Bf16,
    /// float32, fused with the sum where the processor can.
    F32,
}

/// The best of [`PASSES`] timings of `work`, as what it says it did over its seconds.
fn best(mut work: impl FnMut() -> u64) -> f64 {
    let rate = |_| {
        let start = Instant::now();
        let done = work();
        done as f64 / start.elapsed().as_secs_f64()
    };
    (0..PASSES).map(rate).fold(0.0, f64::max)
}

/// Bytes that `pool` reads a second where `parts` lie: memory of one's own or a mapped file, to be
/// larger than the caches if memory is what is meant. A part's ends beyond whole cache lines are
/// left out.
pub fn read_bytes_per_s(pool: &mut Pool, parts: &[&[u8]]) -> f64 {
    let shares: Vec<&[u64]> = parts.iter().flat_map(|part| shares(part)).collect();
    let n_bytes = shares.iter().map(|share| size_of_val(*share) as u64).sum();
    best(|| {
        let sum = AtomicU64::new(0);
        pool.run(shares.len(), &|share, _| {
            let part = shares[share];
            // SAFETY: the length is the slice's, and a multiple of the words of a round.
            let part = unsafe { ffi::v4_probe_read(part.as_ptr(), part.len()) };
            sum.fetch_add(part, Ordering::Relaxed);
        });
        std::hint::black_box(sum.into_inner());
        n_bytes
    })
}

/// Whole rounds of words, in pieces of a share.
fn shares(bytes: &[u8]) -> impl Iterator<Item = &[u64]> {
    // SAFETY: every pattern of bits is a word.
    let (_, words, _) = unsafe { bytes.align_to::<u64>() };
    let whole = words.len() - words.len() % ROUND_WORDS;
    words[..whole].chunks(SHARE_WORDS)
}

/// Products and sums that `pool` makes a second, each counted as one; `None` where the processor
/// has no instruction for them.
pub fn ops_per_s(pool: &mut Pool, kind: Kind) -> Option<f64> {
    let kind = match kind {
        Kind::Int8 => ffi::v4_probe::PROBE_INT8,
        Kind::Bf16 => ffi::v4_probe::PROBE_BF16,
        Kind::F32 => ffi::v4_probe::PROBE_F32,
    };
    let rate = best(|| {
        let done = AtomicU64::new(0);
        pool.run(SHARES, &|_, _| {
            let mut sink = 1;
            // SAFETY: the sink is a place to read and write.
            let ops = unsafe { ffi::v4_probe_multiply(kind, SHARE_ROUNDS, &raw mut sink) };
            std::hint::black_box(sink);
            done.fetch_add(ops, Ordering::Relaxed);
        });
        done.into_inner()
    });
    (rate > 0.0).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_takes_every_whole_round_once() {
        let words: Vec<u64> = (0..SHARE_WORDS as u64 * 2 + 200).collect();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        // Wherever the allocation begins, the words of the slice begin on their own boundary.
        let skip = bytes.as_ptr().align_offset(size_of::<u64>());
        let got: Vec<&[u64]> = shares(&bytes[skip..]).collect();
        let lens: Vec<usize> = got.iter().map(|share| share.len()).collect();
        let whole = 200 - usize::from(skip > 0);
        assert_eq!(lens, [SHARE_WORDS, SHARE_WORDS, whole - whole % ROUND_WORDS]);
        for share in got {
            // SAFETY: the length is the slice's, and a multiple of the words of a round.
            let sum = unsafe { ffi::v4_probe_read(share.as_ptr(), share.len()) };
            assert_eq!(sum, share.iter().fold(0, |sum, word| word.wrapping_add(sum)));
        }
        assert_eq!(shares(&[]).count(), 0);
    }

    #[test]
    fn every_machine_multiplies_int8_and_f32() {
        let mut pool = Pool::new(1).unwrap();
        assert!(ops_per_s(&mut pool, Kind::Int8).is_some_and(f64::is_normal));
        assert!(ops_per_s(&mut pool, Kind::F32).is_some_and(f64::is_normal));
    }
}
