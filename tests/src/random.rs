//! Moments and choices that are the same in every run.

use std::time::Duration;

/// A generator (Marsaglia 2003, xorshift64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Begins with a seed that is not zero.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below another.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound.max(1)
    }

    /// A moment within a time.
    pub fn within(&mut self, time: Duration) -> Duration {
        let micros = u64::try_from(time.as_micros()).expect("a short time");
        Duration::from_micros(self.below(micros))
    }
}
