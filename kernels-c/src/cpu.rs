//! The processor as a [`Device`]: each operation is one or a few jobs of the pool, each share of a
//! job a call of C.

mod attention;
mod blocks;
mod cache;
#[cfg(test)]
mod conformance;
mod experts;
mod gated;
mod input;
mod isa;
mod linear;
mod memory;
mod rotation;

use crate::device::{
    Activations, Attention, Buffer, Device, DeviceError, Experts, GateUp, Input, KvCache, KvShape,
    Linear, Matrix, Result, RmsNorm, Rope, Router, Routing, Span,
};
use crate::pool::Pool;
use crate::quant::Quant;
use isa::{Isa, Rows};
use memory::Spread;

/// Query heads that may share a KV head: the most of [`Attention::n_heads`] over
/// [`KvShape::n_kv_heads`].
pub use attention::QUERY_ROWS as MAX_QUERY_GROUP;
pub use blocks::BLOCK_LAYOUT;
pub use input::HostActivations;
pub use memory::{HostBuffer, HostKv};

/// Floats of a share of the cheap operations: some microseconds, beneath which a thread is not
/// worth waking.
const SHARE_FLOATS: usize = 16 << 10;

/// How to compute.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads; 0 for as many as there are cores that this process may use.
    pub threads: usize,
    /// An instruction set of [`isas`]; the best one when absent.
    pub isa: Option<String>,
    /// Whether products with blocks read activations as floats, not as eight bits: several times
    /// slower, and exact in both factors.
    pub is_exact: bool,
}

/// The instruction sets that this processor has and this build knows, best last.
pub fn isas() -> Vec<&'static str> {
    isa::usable()
}

/// The processor.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    pool: Pool,
    inputs: input::Inputs,
    shares: linear::Shares,
    gated_shares: gated::Shares,
    mixture: experts::Mixture,
    plan: attention::Plan,
    angles: rotation::Angles,
}

impl Cpu {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] for an instruction set that is not there, or when the system
    /// gives no threads.
    pub fn open(options: &CpuOptions) -> Result<Self> {
        let isa = Isa::open(options.isa.as_deref(), options.is_exact)?;
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if options.threads == 0 { cores() } else { options.threads };
        let pool = Pool::new(threads).map_err(|error| DeviceError::Unavailable {
            name: "cpu".to_owned(),
            reason: format!("the system does not give {threads} threads: {error}"),
        })?;
        Ok(Self {
            isa,
            pool,
            inputs: input::Inputs::default(),
            shares: linear::Shares::default(),
            gated_shares: gated::Shares::default(),
            mixture: experts::Mixture::default(),
            plan: attention::Plan::default(),
            angles: rotation::Angles::default(),
        })
    }

    /// Calls `work` with stretches of `0..len` that are multiples of `unit`.
    fn spread(&mut self, len: usize, unit: usize, work: &(dyn Fn(&Isa, usize, usize) + Sync)) {
        let step = (SHARE_FLOATS / unit).max(1) * unit;
        let isa = &self.isa;
        self.pool.run(len.div_ceil(step), &|share, _| {
            work(isa, share * step, len.min((share + 1) * step));
        });
    }
}

impl Device for Cpu {
    fn describe(&self) -> String {
        let exact = if self.isa.takes_whole(Quant::Q8_0) { "" } else { ", exact" };
        format!("cpu ({}, {} threads{exact})", self.isa.name(), self.pool.threads())
    }

    fn set_threads(&mut self, threads: usize) {
        self.pool.set_threads(threads);
    }

    fn buffer(&self, len: usize) -> Result<Buffer> {
        HostBuffer::new(len).map(Buffer::Host)
    }

    fn kv_cache(&self, shape: KvShape, n_blocks: usize) -> Result<KvCache> {
        let data = HostKv::new(&shape, n_blocks)?;
        Ok(KvCache { shape, n_blocks, data })
    }

    fn write(&mut self, from: &[f32], to: &mut Buffer, at: usize) -> Result {
        let Buffer::Host(to) = to;
        to.floats_mut()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn read(&mut self, from: &Buffer, at: usize, to: &mut [f32]) -> Result {
        let Buffer::Host(from) = from;
        to.copy_from_slice(&from.floats()[at..at + to.len()]);
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, ids: &[u32], scale: f32, out: &mut Buffer) -> Result {
        let Buffer::Host(out) = out;
        let cols = table.cols();
        let out = Spread::new(&mut out.floats_mut()[..ids.len() * cols]);
        self.spread(ids.len() * cols, cols, &|isa, from, to| {
            // SAFETY: shares are disjoint.
            let out = unsafe { out.part(from..to) };
            for (id, out) in ids[from / cols..].iter().zip(out.chunks_exact_mut(cols)) {
                isa.dequantize(Rows::of(table, *id as usize, 1), out);
                for value in out {
                    *value *= scale;
                }
            }
        });
        Ok(())
    }

    fn rms_norm(&mut self, norm: &RmsNorm, x: &Buffer, rows: usize, out: &mut Buffer) -> Result {
        let RmsNorm { weight: Buffer::Host(weight), eps } = norm;
        let (Buffer::Host(x), Buffer::Host(out)) = (x, out);
        let (x, weight, n) = (x.floats(), weight.floats(), weight.len());
        let out = Spread::new(&mut out.floats_mut()[..rows * n]);
        self.spread(rows * n, n, &|isa, from, to| {
            // SAFETY: shares are disjoint.
            let out = unsafe { out.part(from..to) };
            for (x, out) in x[from..to].chunks_exact(n).zip(out.chunks_exact_mut(n)) {
                isa.rms_norm(x, weight, *eps, out);
            }
        });
        Ok(())
    }

    fn rms_norm_inplace(&mut self, norm: &RmsNorm, x: &mut Buffer, rows: usize) -> Result {
        let RmsNorm { weight: Buffer::Host(weight), eps } = norm;
        let Buffer::Host(x) = x;
        let (weight, n) = (weight.floats(), weight.len());
        let x = Spread::new(&mut x.floats_mut()[..rows * n]);
        self.spread(rows * n, n, &|isa, from, to| {
            // SAFETY: shares are disjoint.
            let x = unsafe { x.part(from..to) };
            x.chunks_exact_mut(n).for_each(|x| isa.rms_norm_inplace(x, weight, *eps));
        });
        Ok(())
    }

    fn linear(&mut self, input: Input<'_>, rows: usize, parts: &mut [Linear<'_>]) -> Result {
        self.products(input, rows, parts);
        Ok(())
    }

    fn add(&mut self, x: &mut Buffer, y: &Buffer, len: usize) -> Result {
        let (Buffer::Host(x), Buffer::Host(y)) = (x, y);
        let (x, y) = (Spread::new(&mut x.floats_mut()[..len]), &y.floats()[..len]);
        self.spread(len, 16, &|isa, from, to| {
            // SAFETY: shares are disjoint.
            isa.add(unsafe { x.part(from..to) }, &y[from..to]);
        });
        Ok(())
    }

    fn gate_up(
        &mut self,
        input: Input<'_>,
        rows: usize,
        weights: &GateUp<'_>,
        out: &mut Activations,
    ) -> Result {
        self.gate_and_up(input, rows, weights, out);
        Ok(())
    }

    fn route(
        &mut self,
        router: &Router,
        logits: &Buffer,
        rows: usize,
        routing: &mut Routing,
    ) -> Result {
        self.choose(router, logits, rows, routing);
        Ok(())
    }

    fn experts(
        &mut self,
        experts: &Experts,
        x: &Buffer,
        rows: usize,
        routing: &Routing,
        out: &mut Buffer,
    ) -> Result {
        self.mix(experts, (x, rows), routing, out);
        Ok(())
    }

    fn rope(
        &mut self,
        rope: &Rope,
        x: &mut Buffer,
        heads: (usize, usize),
        positions: &[u32],
    ) -> Result {
        self.rotate(rope, x, heads, positions);
        Ok(())
    }

    fn kv_store(
        &mut self,
        kv: &mut KvCache,
        layer: usize,
        k: &Buffer,
        v: &Buffer,
        slots: &[u32],
    ) -> Result {
        let (Buffer::Host(k), Buffer::Host(v)) = (k, v);
        let len = slots.len() * kv.shape.n_kv_heads * kv.shape.head_dim;
        self.store(kv, layer, (&k.floats()[..len], &v.floats()[..len]), slots);
        Ok(())
    }

    fn attention(
        &mut self,
        attention: &Attention<'_>,
        kv: (&KvCache, usize),
        q: &Buffer,
        spans: &[Span<'_>],
        out: &mut Buffer,
    ) -> Result {
        self.attend(attention, kv, q, spans, out);
        Ok(())
    }

    fn gather(&mut self, x: &Buffer, width: usize, rows: &[u32], out: &mut Buffer) -> Result {
        let (Buffer::Host(x), Buffer::Host(out)) = (x, out);
        for (row, out) in rows.iter().zip(out.floats_mut().chunks_exact_mut(width)) {
            out.copy_from_slice(&x.floats()[*row as usize * width..][..width]);
        }
        assert!(rows.len() * width <= out.len(), "room for every row");
        Ok(())
    }

    fn soft_cap(&mut self, x: &mut Buffer, cap: f32, len: usize) -> Result {
        let Buffer::Host(x) = x;
        let x = Spread::new(&mut x.floats_mut()[..len]);
        self.spread(len, 16, &|isa, from, to| {
            // SAFETY: shares are disjoint.
            isa.soft_cap(unsafe { x.part(from..to) }, cap);
        });
        Ok(())
    }

    fn kv_copy(&mut self, kv: &mut KvCache, pairs: &[(u32, u32)]) -> Result {
        Self::copy_blocks(kv, pairs);
        Ok(())
    }
}
