//! What this machine can do at its best, for `cargo xtask bench` to hold a model's speed against.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::ffi;
use crate::pool::Pool;

/// Bytes that are read: far beyond any cache.
const READ_BYTES: usize = 512 << 20;
/// Words of a share: 1 MiB.
const SHARE_WORDS: usize = 128 << 10;
/// Rounds of a share: some 20 us.
const SHARE_ROUNDS: u64 = 8 << 10;
const SHARES: usize = 2_000;
/// Passes, of which the best counts: what else runs on the machine only makes one slower.
const PASSES: usize = 5;

/// The best of [`PASSES`] timings of `work`, as what it says it did over its seconds.
fn best(mut work: impl FnMut() -> u64) -> f64 {
    let rate = |_| {
        let start = Instant::now();
        let done = work();
        done as f64 / start.elapsed().as_secs_f64()
    };
    (0..PASSES).map(rate).fold(0.0, f64::max)
}

/// Bytes of memory that `pool` reads a second.
///
/// # Panics
/// When a sum is not what was written: the memory is broken.
pub fn read_bytes_per_s(pool: &mut Pool) -> f64 {
    let words = vec![1u64; READ_BYTES / size_of::<u64>()];
    best(|| {
        let sum = AtomicU64::new(0);
        pool.run(words.len() / SHARE_WORDS, &|share, _| {
            let part = &words[share * SHARE_WORDS..(share + 1) * SHARE_WORDS];
            // SAFETY: the length is the slice's, and a multiple of the 64 words of a round.
            let part = unsafe { ffi::v4_probe_read(part.as_ptr(), part.len()) };
            sum.fetch_add(part, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), words.len() as u64, "every word was read");
        READ_BYTES as u64
    })
}

/// Products and sums of int8 that `pool` makes a second, each counted as one.
pub fn int8_ops_per_s(pool: &mut Pool) -> f64 {
    best(|| {
        let done = AtomicU64::new(0);
        pool.run(SHARES, &|_, _| {
            let mut sink = 1;
            // SAFETY: the sink is a place to read and write.
            let ops = unsafe { ffi::v4_probe_multiply(SHARE_ROUNDS, &raw mut sink) };
            std::hint::black_box(sink);
            done.fetch_add(ops, Ordering::Relaxed);
        });
        done.into_inner()
    })
}
