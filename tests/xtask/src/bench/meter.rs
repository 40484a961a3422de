//! A device that counts and times what another one does.
//!
//! While the meter is off it only passes calls on. While it is on each operation leaves an
//! [`Event`]: what it was, what it read and computed by its arguments, and how long it took. The
//! meter's own time is counted apart.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use v4_kernels::{
    Activations, Attention, Buffer, Device, DeviceError, Experts, GateUp, Input, KvCache, KvShape,
    Linear, Matrix, Quant, RmsNorm, Rope, Router, Routing, Span,
};

use super::limits::Work;

type Result<T = ()> = std::result::Result<T, DeviceError>;

/// A matrix that an operation read, told by where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// The address of its first byte.
    pub address: usize,
    /// Its format.
    pub quant: Quant,
    /// Its rows and columns.
    pub shape: [usize; 2],
}

impl Read {
    fn of(matrix: &Matrix) -> Self {
        Self {
            address: matrix.bytes().as_slice().as_ptr().addr(),
            quant: matrix.quant(),
            shape: [matrix.rows(), matrix.cols()],
        }
    }
}

/// One operation.
#[derive(Debug, Clone)]
pub struct Event {
    /// The method of [`Device`].
    pub op: &'static str,
    /// Its weights, in order.
    pub weights: Vec<Read>,
    /// What tells it from others of its kind when it has no weights: a width or a window.
    pub width: Option<usize>,
    /// What it read and computed.
    pub work: Work,
    /// How long it took.
    pub seconds: f64,
}

/// What the meter has written down.
#[derive(Debug, Default)]
pub struct Log {
    /// The operations, in order.
    pub events: Vec<Event>,
    /// Seconds that writing them down took.
    pub own_seconds: f64,
}

impl Log {
    /// All that was done.
    pub fn work(&self) -> Work {
        let mut sum = Work::default();
        self.events.iter().for_each(|event| sum += event.work);
        sum
    }

    /// Arithmetic with weights.
    pub fn products(&self) -> u64 {
        let is_product = |event: &&Event| ["linear", "gate_up", "experts"].contains(&event.op);
        let products = self.events.iter().filter(is_product);
        products.map(|event| event.work.ops()).sum()
    }
}

/// The switch and the log of a [`Metered`] device.
#[derive(Debug, Clone, Default)]
pub struct Meter {
    is_on: Arc<AtomicBool>,
    log: Arc<Mutex<Log>>,
}

impl Meter {
    /// Writes down what the device does during `work`.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> (T, Log) {
        *self.log() = Log::default();
        self.is_on.store(true, Ordering::Relaxed);
        let done = work();
        self.is_on.store(false, Ordering::Relaxed);
        (done, std::mem::take(&mut *self.log()))
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device under a meter.
pub struct Metered {
    device: Box<dyn Device>,
    meter: Meter,
}

/// An operation that is about to begin, as the meter saw it come.
struct Coming {
    at: Instant,
    event: Event,
}

impl Metered {
    /// Puts `device` under `meter`.
    pub fn new(device: Box<dyn Device>, meter: Meter) -> Self {
        Self { device, meter }
    }

    /// Asks what an operation is, if the meter is on.
    fn coming(&self, what: impl FnOnce() -> Event) -> Option<Coming> {
        let is_on = self.meter.is_on.load(Ordering::Relaxed);
        is_on.then(|| Coming { at: Instant::now(), event: what() })
    }

    /// Does the operation.
    fn run(
        &mut self,
        coming: Option<Coming>,
        op: impl FnOnce(&mut dyn Device) -> Result,
    ) -> Result {
        let Some(Coming { at, mut event }) = coming else { return op(&mut *self.device) };
        let start = Instant::now();
        let done = op(&mut *self.device);
        let end = Instant::now();
        event.seconds = (end - start).as_secs_f64();
        let mut log = self.meter.log();
        log.events.push(event);
        log.own_seconds += (start - at + end.elapsed()).as_secs_f64();
        done
    }
}

/// An operation without weights that reads `n_read` floats, for which it does `ops` operations.
fn plain(op: &'static str, n_read: usize, ops: usize) -> Event {
    let work = Work { own: floats(n_read), f32: ops as u64, ..Work::default() };
    Event { op, weights: Vec::new(), width: None, work, seconds: 0.0 }
}

/// The same on rows of `width`.
fn wide(op: &'static str, width: usize, n_read: usize, ops: usize) -> Event {
    Event { width: Some(width), ..plain(op, n_read, ops) }
}

fn floats(n: usize) -> u64 {
    (n * size_of::<f32>()) as u64
}

/// Operations of one product and sum a weight and token, by the arithmetic the format asks for.
pub fn product(quant: Quant, n_weights: usize, tokens: usize) -> Work {
    let ops = 2 * n_weights as u64 * tokens as u64;
    let none = Work::default();
    match quant {
        quant if quant.is_blocks() => Work { int8: ops, ..none },
        Quant::BF16 => Work { bf16: ops, ..none },
        _ => Work { f32: ops, ..none },
    }
}

/// Products of one input of `rows` rows.
fn products(op: &'static str, rows: usize, matrices: &[&Matrix]) -> Event {
    let cols = matrices.first().map_or(0, |matrix| matrix.cols());
    let mut work = Work { own: floats(rows * cols), ..Work::default() };
    for matrix in matrices {
        work.weights += matrix.bytes().len() as u64;
        work += product(matrix.quant(), matrix.rows() * matrix.cols(), rows);
    }
    let weights = matrices.iter().map(|matrix| Read::of(matrix)).collect();
    Event { op, weights, width: None, work, seconds: 0.0 }
}

/// The weights of an expert are read once, whatever the rows that go to it.
fn experts(experts: &Experts, rows: usize, routing: &Routing) -> Event {
    let (ids, _) = routing.chosen();
    let mut distinct = ids.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    let parts = [&experts.gate, &experts.up, &experts.down].map(|part| &part.matrices[0]);
    let mut work = Work { own: floats(rows * parts[0].cols()), ..Work::default() };
    for matrix in parts {
        work.weights += (distinct.len() * matrix.bytes().len()) as u64;
        work += product(matrix.quant(), matrix.rows() * matrix.cols(), ids.len());
    }
    Event { op: "experts", weights: parts.map(Read::of).to_vec(), width: None, work, seconds: 0.0 }
}

/// Each row multiplies its heads with the keys it sees and their weights with the values; a key and
/// a value are read once a span.
fn attention(attention: &Attention<'_>, shape: &KvShape, spans: &[Span<'_>]) -> Event {
    let n_values = attention.n_heads * shape.head_dim;
    let a_token = shape.kv_type.bytes(2 * shape.n_kv_heads * shape.head_dim);
    let mut work = Work::default();
    for span in spans {
        let window = attention.window.unwrap_or(usize::MAX);
        let first = span.kv_len - span.n_rows;
        let seen: usize = (first..span.kv_len).map(|position| window.min(position + 1)).sum();
        let read = span.kv_len.min(window.saturating_add(span.n_rows - 1));
        work.f32 += (4 * n_values * seen) as u64;
        work.own += (a_token * read) as u64 + floats(span.n_rows * n_values);
    }
    Event { op: "attention", weights: Vec::new(), width: attention.window, work, seconds: 0.0 }
}

impl Device for Metered {
    fn describe(&self) -> String {
        self.device.describe()
    }

    fn set_threads(&mut self, threads: usize) {
        self.device.set_threads(threads);
    }

    fn buffer(&self, len: usize) -> Result<Buffer> {
        self.device.buffer(len)
    }

    fn kv_cache(&self, shape: KvShape, n_blocks: usize) -> Result<KvCache> {
        self.device.kv_cache(shape, n_blocks)
    }

    fn write(&mut self, from: &[f32], to: &mut Buffer, at: usize) -> Result {
        let coming = self.coming(|| plain("write", from.len(), 0));
        self.run(coming, |device| device.write(from, to, at))
    }

    fn read(&mut self, from: &Buffer, at: usize, to: &mut [f32]) -> Result {
        let coming = self.coming(|| plain("read", to.len(), 0));
        self.run(coming, |device| device.read(from, at, to))
    }

    fn embed(&mut self, table: &Matrix, ids: &[u32], scale: f32, out: &mut Buffer) -> Result {
        let coming = self.coming(|| {
            let row_bytes = table.bytes().len() / table.rows().max(1);
            let f32 = (ids.len() * table.cols()) as u64;
            let work = Work { weights: (ids.len() * row_bytes) as u64, f32, ..Work::default() };
            Event { op: "embed", weights: vec![Read::of(table)], width: None, work, seconds: 0.0 }
        });
        self.run(coming, |device| device.embed(table, ids, scale, out))
    }

    fn rms_norm(&mut self, norm: &RmsNorm, x: &Buffer, rows: usize, out: &mut Buffer) -> Result {
        let n = norm.weight.len();
        let coming = self.coming(|| wide("rms_norm", n, (rows + 1) * n, 4 * rows * n));
        self.run(coming, |device| device.rms_norm(norm, x, rows, out))
    }

    fn rms_norm_inplace(&mut self, norm: &RmsNorm, x: &mut Buffer, rows: usize) -> Result {
        let n = norm.weight.len();
        let coming = self.coming(|| wide("rms_norm_inplace", n, (rows + 1) * n, 4 * rows * n));
        self.run(coming, |device| device.rms_norm_inplace(norm, x, rows))
    }

    fn linear(&mut self, input: Input<'_>, rows: usize, parts: &mut [Linear<'_>]) -> Result {
        let coming = self.coming(|| {
            let matrices: Vec<&Matrix> = parts.iter().map(|part| part.weight.matrix).collect();
            products("linear", rows, &matrices)
        });
        self.run(coming, |device| device.linear(input, rows, parts))
    }

    fn add(&mut self, x: &mut Buffer, y: &Buffer, len: usize) -> Result {
        let coming = self.coming(|| plain("add", 2 * len, len));
        self.run(coming, |device| device.add(x, y, len))
    }

    fn gate_up(
        &mut self,
        input: Input<'_>,
        rows: usize,
        weights: &GateUp<'_>,
        out: &mut Activations,
    ) -> Result {
        let coming =
            self.coming(|| products("gate_up", rows, &[weights.gate.matrix, weights.up.matrix]));
        self.run(coming, |device| device.gate_up(input, rows, weights, out))
    }

    fn route(
        &mut self,
        router: &Router,
        logits: &Buffer,
        rows: usize,
        routing: &mut Routing,
    ) -> Result {
        let n = rows * router.n_experts;
        // Each logit is held against those chosen so far.
        let coming = self.coming(|| wide("route", router.n_experts, n, n));
        self.run(coming, |device| device.route(router, logits, rows, routing))
    }

    fn experts(
        &mut self,
        all: &Experts,
        x: &Buffer,
        rows: usize,
        routing: &Routing,
        out: &mut Buffer,
    ) -> Result {
        let coming = self.coming(|| experts(all, rows, routing));
        self.run(coming, |device| device.experts(all, x, rows, routing, out))
    }

    fn rope(
        &mut self,
        rope: &Rope,
        x: &mut Buffer,
        heads: (usize, usize),
        positions: &[u32],
    ) -> Result {
        let width = heads.0 * heads.1;
        let n = width * positions.len();
        let coming = self.coming(|| wide("rope", width, n, 3 * n));
        self.run(coming, |device| device.rope(rope, x, heads, positions))
    }

    fn kv_store(
        &mut self,
        kv: &mut KvCache,
        layer: usize,
        k: &Buffer,
        v: &Buffer,
        slots: &[u32],
    ) -> Result {
        let width = kv.shape.n_kv_heads * kv.shape.head_dim;
        let n = 2 * width * slots.len();
        let coming = self.coming(|| wide("kv_store", width, n, n));
        self.run(coming, |device| device.kv_store(kv, layer, k, v, slots))
    }

    fn attention(
        &mut self,
        constants: &Attention<'_>,
        kv: (&KvCache, usize),
        q: &Buffer,
        spans: &[Span<'_>],
        out: &mut Buffer,
    ) -> Result {
        let coming = self.coming(|| attention(constants, &kv.0.shape, spans));
        self.run(coming, |device| device.attention(constants, kv, q, spans, out))
    }

    fn gather(&mut self, x: &Buffer, width: usize, rows: &[u32], out: &mut Buffer) -> Result {
        let coming = self.coming(|| wide("gather", width, rows.len() * width, 0));
        self.run(coming, |device| device.gather(x, width, rows, out))
    }

    fn soft_cap(&mut self, x: &mut Buffer, cap: f32, len: usize) -> Result {
        let coming = self.coming(|| plain("soft_cap", len, 3 * len));
        self.run(coming, |device| device.soft_cap(x, cap, len))
    }

    fn kv_copy(&mut self, kv: &mut KvCache, pairs: &[(u32, u32)]) -> Result {
        let coming = self.coming(|| {
            let own = (kv.shape.block_bytes() * pairs.len()) as u64;
            let work = Work { own, ..Work::default() };
            Event { op: "kv_copy", weights: Vec::new(), width: None, work, seconds: 0.0 }
        });
        self.run(coming, |device| device.kv_copy(kv, pairs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use v4_kernels::{Activation, Bytes, Cpu, ExpertWeights, KvType, Weight, cpu::CpuOptions};

    #[test]
    fn attention_reads_what_each_span_sees() {
        let shape = KvShape {
            n_layers: 1,
            n_kv_heads: 2,
            head_dim: 8,
            block_tokens: 16,
            kv_type: KvType::F16,
        };
        let constants =
            Attention { n_heads: 4, scale: 1.0, window: None, soft_cap: None, sinks: None };
        // Rows at positions 7, 8 and 9 see 8, 9 and 10 tokens.
        let spans = [Span { first_row: 0, n_rows: 3, kv_len: 10, blocks: &[0] }];
        let token = 2 * 2 * 8 * 2;
        let input = 3 * 32 * 4;
        let all = attention(&constants, &shape, &spans).work;
        assert_eq!((all.own, all.f32), (10 * token + input, 4 * 32 * 27));
        let window = Attention { window: Some(4), ..constants };
        let some = attention(&window, &shape, &spans).work;
        assert_eq!((some.own, some.f32), (6 * token + input, 4 * 32 * 12));
    }

    #[test]
    fn an_expert_is_read_once_and_multiplied_by_the_rows_that_chose_it() {
        let mut cpu =
            Cpu::open(&CpuOptions { threads: 1, isa: None, ..CpuOptions::default() }).unwrap();
        let part = |rows: usize, cols: usize| {
            let bytes = Bytes::from_vec(vec![0; rows * Quant::Q8_0.row_bytes(cols).unwrap()]);
            let matrix = Matrix::new(Quant::Q8_0, rows, cols, bytes).unwrap();
            ExpertWeights { matrices: vec![matrix; 4], bias: None, scales: vec![1.0; 4] }
        };
        let (gate, up, down) = (part(64, 32), part(64, 32), part(32, 64));
        let all = Experts { gate, up, down, activation: Activation::Silu };
        let mut logits = cpu.buffer(3 * 4).unwrap();
        // Expert 1 is the choice of all three rows, expert 3 of the last two.
        cpu.write(&[2.0, 5.0, 0.0, 0.0, 0.0, 5.0, 0.0, 2.0, 0.0, 5.0, 0.0, 2.0], &mut logits, 0)
            .unwrap();
        let (mut routing, router) =
            (Routing::default(), Router { n_experts: 4, n_used: 2, is_normalised: true });
        cpu.route(&router, &logits, 3, &mut routing).unwrap();
        let event = experts(&all, 3, &routing);
        assert_eq!(event.work.int8, 2 * 3 * (64 * 32) * 6);
        assert_eq!((event.work.weights, event.work.own), (3 * 3 * (64 * 34), 3 * 32 * 4));
    }

    #[test]
    fn a_meter_writes_down_products_while_it_is_on() {
        let cpu =
            Cpu::open(&CpuOptions { threads: 1, isa: None, ..CpuOptions::default() }).unwrap();
        let meter = Meter::default();
        let mut device = Metered::new(Box::new(cpu), meter.clone());
        let matrix = |quant: Quant| {
            let bytes = vec![0; 64 * quant.row_bytes(32).unwrap()];
            Matrix::new(quant, 64, 32, Bytes::from_vec(bytes)).unwrap()
        };
        let weights = [matrix(Quant::Q4_0), matrix(Quant::F32)];
        let x = device.buffer(2 * 32).unwrap();
        let mut outs = [device.buffer(2 * 64).unwrap(), device.buffer(2 * 64).unwrap()];
        let mut product = |device: &mut Metered| {
            let mut parts: Vec<Linear<'_>> = weights
                .iter()
                .zip(&mut outs)
                .map(|(matrix, out)| {
                    let weight = Weight { matrix, bias: None, scale: 1.0 };
                    Linear { weight, out, is_added: false }
                })
                .collect();
            device.linear(Input::Plain(&x), 2, &mut parts).unwrap();
        };
        product(&mut device);
        let ((), log) = meter.during(|| product(&mut device));
        product(&mut device);
        let [event] = log.events.as_slice() else { panic!("one event: {log:?}") };
        let ops = 2 * 64 * 32 * 2;
        let (read, own) = (64 * (18 + 128), 2 * 32 * 4);
        assert_eq!(event.work, Work { weights: read, own, int8: ops, bf16: 0, f32: ops });
        assert_eq!(event.weights[1].address, weights[1].bytes().as_slice().as_ptr().addr());
        assert!(event.seconds > 0.0 && log.products() == 2 * ops);
        let ((), log) = meter.during(|| ());
        assert_eq!(log.work(), Work::default());
    }
}
