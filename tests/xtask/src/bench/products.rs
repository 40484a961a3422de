//! The product of each format through [`Device::linear`], without a model.
//!
//! Weights are noise in many matrices that are used in turn, together far beyond the caches, as a
//! model's are.

use std::time::{Duration, Instant};

use serde_json::json;
use v4_kernels::{Buffer, Bytes, Device, Input, Linear, Matrix, Quant, Weight};

use super::limits::{Around, Prober, Work};
use super::meter::product;
use super::noise::Noise;
use super::{GIGA, median};
use crate::device::DeviceArgs;

/// Formats that are measured when none is named.
const QUANTS: [&str; 5] = ["Q4_0", "Q8_0", "Q4_K", "MXFP4", "NVFP4"];
/// Formats that models are made of.
const ALL_QUANTS: [&str; 16] = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL",
    "IQ4_XS", "MXFP4", "NVFP4", "BF16", "F16",
];
/// Different blocks of a matrix; they repeat.
const BLOCKS: usize = 4 << 10;
/// What is timed as one: longer than a turn of the scheduler is long.
const SAMPLE: Duration = Duration::from_millis(20);
/// Samples at least.
const SAMPLES: usize = 3;

/// What of the products is measured.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Formats, with commas.
    #[arg(long, value_delimiter = ',', default_values = QUANTS)]
    quant: Vec<String>,
    /// All formats that models are made of.
    #[arg(long, conflicts_with = "quant")]
    all: bool,
    /// Rows of a matrix: the width of a result; without it 8192x2048 and 2048x8192 are measured.
    #[arg(long, requires = "cols")]
    rows: Option<usize>,
    /// Columns of a matrix: the width of an input.
    #[arg(long, requires = "rows")]
    cols: Option<usize>,
    /// Tokens of an input, with commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 512])]
    tokens: Vec<usize>,
    /// MiB of weights that are used in turn.
    #[arg(long, default_value_t = 1024)]
    mib: usize,
    /// Seconds for each number of tokens.
    #[arg(long, default_value_t = 0.4)]
    seconds: f64,
    /// Print JSON, an object a line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Measures and prints.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    let mut device = args.device.start()?;
    let mut prober = Prober::new(args.device.threads())?;
    let shapes = match args.rows.zip(args.cols) {
        Some(shape) => vec![shape],
        None => vec![(8192, 2048), (2048, 8192)],
    };
    if !args.json {
        println!("{}", device.describe());
        println!(
            "quant    shape       tokens       us     GB/s  of read    Gop/s  of peak  limit share\
             \x20  read GB/s     peak Gop/s"
        );
    }
    let all = ALL_QUANTS.map(str::to_owned);
    for name in if args.all { &all[..] } else { &args.quant } {
        let quant = Quant::from_name(name).ok_or_else(|| format!("no format {name}"))?;
        for &shape in &shapes {
            format(&mut *device, &mut prober, args, (quant, shape))?;
        }
    }
    Ok(())
}

/// All numbers of tokens of a format and a shape.
fn format(
    device: &mut dyn Device,
    prober: &mut Prober,
    args: &Args,
    (quant, shape): (Quant, (usize, usize)),
) -> Result<(), String> {
    let weights = matrices(quant, shape, args.mib << 20)?;
    let (seconds, limits) = prober.around(&[], || {
        let time = |&tokens| {
            seconds(device, &weights, tokens, args.seconds).map_err(|error| error.to_string())
        };
        args.tokens.iter().map(time).collect::<Result<Vec<f64>, String>>()
    })?;
    for (&tokens, &seconds) in args.tokens.iter().zip(&seconds) {
        let line = Line { quant, shape, tokens, seconds, limits };
        println!("{}", if args.json { line.json().to_string() } else { line.text() });
    }
    Ok(())
}

/// Matrices of noise that take `bytes` together.
fn matrices(
    quant: Quant,
    (rows, cols): (usize, usize),
    bytes: usize,
) -> Result<Vec<Matrix>, String> {
    let size = quant.row_bytes(cols).map(|row| row * rows);
    let size = size.ok_or_else(|| format!("{cols} columns are no whole blocks of {quant}"))?;
    let noise = Noise::new(1).blocks(quant, BLOCKS);
    let matrix = |_| {
        let mut bytes = Vec::with_capacity(size + noise.len());
        while bytes.len() < size {
            bytes.extend_from_slice(&noise);
        }
        bytes.truncate(size);
        Matrix::new(quant, rows, cols, Bytes::from_vec(bytes)).expect("its size is as asked")
    };
    Ok((0..bytes.div_ceil(size).max(1)).map(matrix).collect())
}

/// The median seconds of a product.
fn seconds(
    device: &mut dyn Device,
    weights: &[Matrix],
    tokens: usize,
    budget: f64,
) -> Result<f64, v4_kernels::DeviceError> {
    let (rows, cols) = (weights[0].rows(), weights[0].cols());
    let mut x = device.buffer(tokens * cols)?;
    let mut out = device.buffer(tokens * rows)?;
    device.write(&Noise::new(4).floats(tokens * cols), &mut x, 0)?;
    let product = |device: &mut dyn Device, weight: &Matrix, out: &mut Buffer| {
        let weight = Weight { matrix: weight, bias: None, scale: 1.0 };
        let part = Linear { weight, out, is_added: false };
        device.linear(Input::Plain(&x), tokens, &mut [part])
    };
    product(device, &weights[0], &mut out)?;
    let mut samples = Vec::new();
    let mut next = weights.iter().cycle().skip(1);
    let begin = Instant::now();
    while samples.len() < SAMPLES || begin.elapsed().as_secs_f64() < budget {
        let start = Instant::now();
        let mut n = 0;
        while start.elapsed() < SAMPLE {
            product(device, next.next().expect("it goes round"), &mut out)?;
            n += 1;
        }
        samples.push(start.elapsed().as_secs_f64() / f64::from(n));
    }
    Ok(median(samples))
}

struct Line {
    quant: Quant,
    shape: (usize, usize),
    tokens: usize,
    seconds: f64,
    limits: Around,
}

impl Line {
    fn work(&self) -> Work {
        let (rows, cols) = self.shape;
        let bytes = self.quant.row_bytes(cols).unwrap_or_default() * rows;
        let input = self.tokens * cols * size_of::<f32>();
        Work {
            weights: bytes as u64,
            own: input as u64,
            ..product(self.quant, rows * cols, self.tokens)
        }
    }

    /// The peak of its arithmetic, which is of one kind.
    fn peak(&self) -> f64 {
        let arithmetic = Work { weights: 0, own: 0, ..self.work() };
        arithmetic.ops() as f64 / self.limits.best().least(&arithmetic).0
    }

    fn json(&self) -> serde_json::Value {
        let (work, limits) = (self.work(), self.limits.best());
        let (least, bound) = limits.least(&work);
        json!({
            "quant": self.quant.name(), "rows": self.shape.0, "cols": self.shape.1,
            "tokens": self.tokens, "seconds": self.seconds,
            "bytes_per_s": work.bytes() as f64 / self.seconds,
            "share_of_read": work.bytes() as f64 / self.seconds / limits.read(&work),
            "ops_per_s": work.ops() as f64 / self.seconds,
            "share_of_peak": work.ops() as f64 / self.seconds / self.peak(),
            "bound": bound.name(), "share_of_limit": least / self.seconds,
            "limits_before": self.limits.before.json(), "limits_after": self.limits.after.json(),
        })
    }

    fn text(&self) -> String {
        let (work, limits) = (self.work(), self.limits.best());
        let (least, bound) = limits.least(&work);
        let (bytes, ops) = (work.bytes() as f64 / self.seconds, work.ops() as f64 / self.seconds);
        format!(
            "{:<8} {:<11} {:>6} {:8.1} {:8.2}  {:5.1} % {:8.1}  {:5.1} %  {:<5} {:3.0} %\
             \x20{:12.1} {:14.1}",
            self.quant.name(),
            format!("{}x{}", self.shape.0, self.shape.1),
            self.tokens,
            self.seconds * 1e6,
            bytes / GIGA,
            100.0 * bytes / limits.read(&work),
            ops / GIGA,
            100.0 * ops / self.peak(),
            bound.name(),
            100.0 * least / self.seconds,
            limits.read(&work) / GIGA,
            self.peak() / GIGA,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_take_what_was_asked_for() {
        let all = matrices(Quant::Q6_K, (32, 512), 100_000).unwrap();
        assert_eq!(all.len(), 8);
        assert!(all.iter().all(|matrix| matrix.bytes().len() == 32 * 420));
        assert!(matrices(Quant::Q6_K, (32, 500), 1).is_err());
    }
}
