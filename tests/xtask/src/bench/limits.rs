//! What the machine can do, and how long a piece of work takes at least.

use v4_kernels::pool::Pool;
use v4_kernels::probe::{self, Kind};

/// Bytes of our own memory that are read: far beyond any cache.
const OWN_BYTES: usize = 1 << 30;

/// Bytes and arithmetic of an operation; a product and a sum are two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Bytes it reads of weights, which lie where the model's files are mapped.
    pub weights: u64,
    /// Bytes it reads of our own memory: keys and values, and its input once.
    pub own: u64,
    /// int8 products and sums.
    pub int8: u64,
    /// Products of bfloat16 weights, and their sums.
    pub bf16: u64,
    /// All other arithmetic.
    pub f32: u64,
}

impl Work {
    /// All bytes.
    pub fn bytes(&self) -> u64 {
        self.weights + self.own
    }

    /// All arithmetic.
    pub fn ops(&self) -> u64 {
        self.int8 + self.bf16 + self.f32
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.weights += other.weights;
        self.own += other.own;
        self.int8 += other.int8;
        self.bf16 += other.bf16;
        self.f32 += other.f32;
    }
}

/// What a piece of work waits for at its best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Reading memory.
    Read,
    /// Arithmetic, mostly of this kind.
    Ops(Kind),
}

impl Bound {
    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Bound::Read => "read",
            Bound::Ops(kind) => kind_name(kind),
        }
    }
}

/// A word for a kind of arithmetic.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Int8 => "int8",
        Kind::Bf16 => "bf16",
        Kind::F32 => "fp32",
    }
}

/// Rates a second.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Bytes read of ordinary anonymous memory.
    pub read_own: f64,
    /// Bytes read where the model's files are mapped, when there is a model.
    pub read_map: f64,
    /// int8 products and sums.
    pub int8: f64,
    /// bfloat16 products and sums; 0 where the processor has no instruction for them.
    pub bf16: f64,
    /// float32 products and sums.
    pub f32: f64,
}

impl Limits {
    /// The better of each: noise only makes a limit lower.
    pub fn best(self, other: Self) -> Self {
        Self {
            read_own: self.read_own.max(other.read_own),
            read_map: self.read_map.max(other.read_map),
            int8: self.int8.max(other.int8),
            bf16: self.bf16.max(other.bf16),
            f32: self.f32.max(other.f32),
        }
    }

    /// The least seconds of reading: weights where they are mapped, all else as our own memory.
    /// Without a mapping weights are our own memory too.
    pub fn read_seconds(&self, work: &Work) -> f64 {
        let mapped = if self.read_map > 0.0 { self.read_map } else { self.read_own };
        work.weights as f64 / mapped + work.own as f64 / self.read_own
    }

    /// Bytes of `work` that can be read a second.
    pub fn read(&self, work: &Work) -> f64 {
        work.bytes() as f64 / self.read_seconds(work)
    }

    /// The rate of a kind of arithmetic. Products of bfloat16 may be made in float32, which some
    /// processors do faster.
    pub fn ops(&self, kind: Kind) -> f64 {
        match kind {
            Kind::Int8 => self.int8,
            Kind::Bf16 => self.bf16.max(self.f32),
            Kind::F32 => self.f32,
        }
    }

    /// The least seconds that `work` takes, and what it waits for: reading and arithmetic go on
    /// beside each other.
    pub fn least(&self, work: &Work) -> (f64, Bound) {
        let read = self.read_seconds(work);
        let kinds = [(Kind::Int8, work.int8), (Kind::Bf16, work.bf16), (Kind::F32, work.f32)];
        let (mut ops, mut most) = (0.0, (0.0, Kind::F32));
        for (kind, n) in kinds {
            let seconds = n as f64 / self.ops(kind);
            ops += seconds;
            if seconds > most.0 {
                most = (seconds, kind);
            }
        }
        if read >= ops { (read, Bound::Read) } else { (ops, Bound::Ops(most.1)) }
    }

    /// As JSON, under the names of the fields.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "read_own_bytes_per_s": self.read_own,
            "read_map_bytes_per_s": self.read_map,
            "int8_ops_per_s": self.int8,
            "bf16_ops_per_s": self.bf16,
            "f32_ops_per_s": self.f32,
        })
    }
}

/// Limits measured before something and after it.
#[derive(Debug, Clone, Copy)]
pub struct Around {
    /// Before.
    pub before: Limits,
    /// After.
    pub after: Limits,
}

impl Around {
    /// The better of each.
    pub fn best(&self) -> Limits {
        self.before.best(self.after)
    }

    /// Both, a limit a line.
    pub fn text(&self) -> String {
        const GIGA: f64 = 1e9;
        let line = |name: &str, unit: &str, rate: fn(&Limits) -> f64| {
            let (before, after) = (rate(&self.before) / GIGA, rate(&self.after) / GIGA);
            format!("  {name:<24} {before:8.1} {after:8.1} {unit}\n")
        };
        let mut text = format!("limits{:29} before    after\n", "")
            + &line("read of own memory", "GB/s", |limits| limits.read_own);
        if self.best().read_map > 0.0 {
            text += &line("read of this mapping", "GB/s", |limits| limits.read_map);
        }
        text + &line("int8", "Gop/s", |limits| limits.int8)
            + &line("bf16", "Gop/s", |limits| limits.bf16)
            + &line("fp32", "Gop/s", |limits| limits.f32)
    }
}

/// Measures limits, with as many threads as the device has.
pub struct Prober {
    pool: Pool,
    own: Vec<u8>,
}

impl Prober {
    /// With `threads`.
    ///
    /// # Errors
    /// A sentence.
    pub fn new(threads: usize) -> Result<Self, String> {
        let pool = Pool::new(threads).map_err(|error| error.to_string())?;
        // Not zero: pages that were never written are all one page.
        Ok(Self { pool, own: vec![1; OWN_BYTES] })
    }

    /// Measures; `mapped` is where the model's weights lie, or nothing.
    pub fn measure(&mut self, mapped: &[&[u8]]) -> Limits {
        let pool = &mut self.pool;
        let mut ops = |kind| probe::ops_per_s(pool, kind).unwrap_or_default();
        let (int8, bf16, f32) = (ops(Kind::Int8), ops(Kind::Bf16), ops(Kind::F32));
        Limits {
            read_own: probe::read_bytes_per_s(pool, &[&self.own]),
            read_map: match mapped {
                [] => 0.0,
                parts => probe::read_bytes_per_s(pool, parts),
            },
            int8,
            bf16,
            f32,
        }
    }

    /// Measures before and after `work`.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn around<T>(
        &mut self,
        mapped: &[&[u8]],
        work: impl FnOnce() -> Result<T, String>,
    ) -> Result<(T, Around), String> {
        let before = self.measure(mapped);
        let done = work()?;
        Ok((done, Around { before, after: self.measure(mapped) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_waits_for_reading_or_for_the_sum_of_its_arithmetic() {
        let limits = Limits { read_own: 10.0, read_map: 20.0, int8: 100.0, bf16: 50.0, f32: 10.0 };
        let work = Work { weights: 40, own: 0, int8: 100, bf16: 0, f32: 5 };
        assert_eq!(limits.least(&work), (2.0, Bound::Read));
        let work = Work { weights: 20, ..work };
        assert_eq!(limits.least(&work), (1.5, Bound::Ops(Kind::Int8)));
        assert_eq!(limits.least(&Work::default()), (0.0, Bound::Read));
        let slower = Limits { read_own: 30.0, int8: 1.0, ..limits };
        let best = limits.best(slower);
        assert_eq!((best.read_own, best.read_map, best.int8), (30.0, 20.0, 100.0));
    }

    #[test]
    fn weights_are_read_where_they_are_mapped_and_all_else_as_own_memory() {
        let limits = Limits { read_own: 10.0, read_map: 20.0, ..Limits::default() };
        let work = Work { weights: 60, own: 20, ..Work::default() };
        assert_eq!((limits.read_seconds(&work), limits.read(&work)), (5.0, 16.0));
        let unmapped = Limits { read_map: 0.0, ..limits };
        assert_eq!((unmapped.read_seconds(&work), unmapped.read(&work)), (8.0, 10.0));
    }
}
