//! Tokens a second of a model file, over depths and batches.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use super::limits::{Around, Limits, Prober};
use super::meter::Log;
use super::subject::{Sequences, Subject};
use super::{GIGA, median};
use crate::device::DeviceArgs;

/// What of a model is measured.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model: a GGUF file, or a folder with config.json and safetensors.
    #[arg(required = true)]
    file: Option<PathBuf>,
    /// Print JSON, an object a line.
    #[arg(long)]
    pub json: bool,
    /// Say where a step's time goes, an operation a line.
    #[arg(long)]
    pub roofline: bool,
    /// Tokens of a prompt, fed in one batch; 0 leaves it out.
    #[arg(long, default_value_t = 512)]
    pub prefill: usize,
    /// Tokens of an answer, one by one, for each sequence; 0 leaves it out.
    #[arg(long, default_value_t = 64)]
    pub decode: usize,
    /// Tokens of context before either; several with commas.
    #[arg(long, value_delimiter = ',', default_values_t = [0])]
    pub depth: Vec<usize>,
    /// Sequences that decode together; several with commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    pub batch: Vec<usize>,
    /// Times each is measured, after a first that does not count; the median is said.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub reps: u32,
    #[command(flatten)]
    pub device: DeviceArgs,
}

impl Args {
    /// Opens the model.
    ///
    /// # Errors
    /// A sentence.
    pub fn open(&self) -> Result<Subject, String> {
        // Only a subcommand goes without a file, and has arguments of its own.
        let file = self.file.as_ref().ok_or("name a model file; see --help")?;
        Subject::open(file, &self.device)
    }
}

/// Something that was run several times.
struct Timing {
    /// Tokens of one time, of all sequences.
    tokens: usize,
    /// The median of one time.
    seconds: f64,
    /// What one time does.
    log: Log,
}

/// A depth and a batch.
struct Point {
    depth: usize,
    batch: usize,
    prefill: Option<Timing>,
    decode: Option<Timing>,
    limits: Around,
}

/// Measures and prints.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    let mut subject = args.open()?;
    let mut prober = Prober::new(args.device.threads())?;
    let device = subject.model.device_mut().describe();
    if !args.json {
        println!("{device}");
    }
    for &depth in &args.depth {
        for &batch in &args.batch {
            // Prefill does not depend on the batch: it is measured with the first of a depth.
            let prefill = if args.batch.first() == Some(&batch) { args.prefill } else { 0 };
            let point = point(&mut subject, &mut prober, args, (depth, batch, prefill))?;
            println!("{}", if args.json { point.json(&device).to_string() } else { point.text() });
        }
    }
    Ok(())
}

fn point(
    subject: &mut Subject,
    prober: &mut Prober,
    args: &Args,
    (depth, batch, prefill): (usize, usize, usize),
) -> Result<Point, String> {
    let Subject { model, meter, file } = subject;
    let mut time = |n_sequences: usize, chunk: usize, times: usize| -> Result<_, String> {
        if n_sequences * chunk * times == 0 {
            return Ok(None);
        }
        let mut sequences = Sequences::new(model, n_sequences, depth, chunk * times)?;
        let mut once = || {
            sequences.rewind(depth);
            (0..times).try_for_each(|_| sequences.feed(chunk))
        };
        // The first time does not count, so the meter may watch it.
        let (done, log) = meter.during(&mut once);
        done?;
        let mut seconds = Vec::new();
        for _ in 0..args.reps {
            let start = Instant::now();
            once()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        Ok(Some(Timing { tokens: n_sequences * chunk * times, seconds: median(seconds), log }))
    };
    let ((prefill, decode), limits) = prober.around(&Subject::weights(file), || {
        Ok((time(1, prefill, 1)?, time(batch, 1, args.decode)?))
    })?;
    Ok(Point { depth, batch, prefill, decode, limits })
}

impl Timing {
    fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    fn bytes_per_s(&self) -> f64 {
        self.log.work().bytes() as f64 / self.seconds
    }

    /// Arithmetic with weights.
    fn products_per_s(&self) -> f64 {
        self.log.products() as f64 / self.seconds
    }

    /// The least time that the operations take one after the other, as a share of what they took.
    fn share(&self, limits: &Limits) -> f64 {
        let least = self.log.events.iter().map(|event| limits.least(&event.work).0);
        least.sum::<f64>() / self.seconds
    }
}

impl Point {
    fn json(&self, device: &str) -> Value {
        let limits = self.limits.best();
        let prefill = |figure: &dyn Fn(&Timing) -> f64| self.prefill.as_ref().map(figure);
        let decode = |figure: &dyn Fn(&Timing) -> f64| self.decode.as_ref().map(figure);
        json!({
            "device": device,
            "depth": self.depth,
            "batch": self.batch,
            "prefill_tokens_per_s": prefill(&Timing::tokens_per_s),
            "decode_tokens_per_s": decode(&Timing::tokens_per_s),
            "decode_tokens_per_s_each": decode(&|it| it.tokens_per_s() / self.batch as f64),
            "decode_limit_bytes_per_s": decode(&|it| limits.read(&it.log.work())),
            "int8_ops_per_s": limits.int8,
            "decode_bytes_per_s": decode(&Timing::bytes_per_s),
            "decode_share_of_read": decode(&|it| it.bytes_per_s() / limits.read(&it.log.work())),
            "decode_share_of_limits": decode(&|it| it.share(&limits)),
            "prefill_ops_per_s": prefill(&Timing::products_per_s),
            "prefill_share_of_int8": prefill(&|it| it.products_per_s() / limits.int8),
            "prefill_share_of_limits": prefill(&|it| it.share(&limits)),
            "limits_before": self.limits.before.json(),
            "limits_after": self.limits.after.json(),
        })
    }

    fn text(&self) -> String {
        let limits = self.limits.best();
        let prefill = self.prefill.as_ref().map(|it| {
            format!(
                "\n  prefill {:8.1} tokens/s                {:6.1} of {:6.1} Gop/s int8 \
                 ({:3.0} %), {:3.0} % of all limits",
                it.tokens_per_s(),
                it.products_per_s() / GIGA,
                limits.int8 / GIGA,
                100.0 * it.products_per_s() / limits.int8,
                100.0 * it.share(&limits),
            )
        });
        let decode = self.decode.as_ref().map(|it| {
            let read = limits.read(&it.log.work());
            format!(
                "\n  decode  {:8.1} tokens/s, {:6.1} each, {:6.1} of {:6.1} GB/s read ({:3.0} %), \
                 {:3.0} % of all limits",
                it.tokens_per_s(),
                it.tokens_per_s() / self.batch as f64,
                it.bytes_per_s() / GIGA,
                read / GIGA,
                100.0 * it.bytes_per_s() / read,
                100.0 * it.share(&limits),
            )
        });
        format!(
            "depth {:6}  batch {:2}{}{}",
            self.depth,
            self.batch,
            prefill.unwrap_or_default(),
            decode.unwrap_or_default(),
        )
    }
}
