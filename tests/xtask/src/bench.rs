//! `cargo xtask bench`: tokens a second of a model file, beside what the machine can do.
//!
//! A step of decode reads every weight once, so memory bounds it; prefill multiplies each weight by
//! many tokens, so int8 arithmetic does. Both bounds are measured in the same run, with as many
//! threads, and the model's speed is said as shares of them.

use std::path::PathBuf;
use std::time::Instant;

use v4_engine::model::{Alone, Model};
use v4_kernels::{pool::Pool, probe};

use crate::logits::DeviceArgs;

/// Measure a model file: prefill and decode tokens/s beside what this machine can do.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model: a GGUF file, or a folder with config.json and safetensors.
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Tokens of the prompt, fed in one batch into an empty cache.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prefill: u32,
    /// Tokens that follow one by one, also from an empty cache.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    decode: u32,
    /// Times each is measured, after a first that does not count; the median is said.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    reps: u32,
    #[command(flatten)]
    device: DeviceArgs,
}

/// What was measured.
struct Figures {
    device: String,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    read_bytes_per_s: f64,
    int8_ops_per_s: f64,
    decode_bytes_per_s: f64,
    prefill_ops_per_s: f64,
}

/// Measures and prints.
///
/// # Errors
/// A sentence.
pub fn run(args: Args) -> Result<(), String> {
    let Args { file, json, prefill, decode, reps, device } = args;
    let mut model = device.open(&file)?;
    let threads = device.threads();
    let mut pool = Pool::new(threads).map_err(|error| error.to_string())?;
    let read_bytes_per_s = probe::read_bytes_per_s(&mut pool);
    let int8_ops_per_s = probe::int8_ops_per_s(&mut pool);
    drop(pool);
    let prefill_s = seconds(&mut model, prefill, reps, |alone, tokens| {
        let last = u32::try_from(tokens.len()).expect("a count of 32 bits") - 1;
        alone.feed(tokens, &[last], &mut Vec::new())
    })?;
    let decode_s = seconds(&mut model, decode, reps, |alone, tokens| {
        let mut logits = Vec::new();
        tokens.iter().try_for_each(|token| alone.feed(&[*token], &[0], &mut logits))
    })?;
    let cost = model.cost();
    let prefill_tokens_per_s = f64::from(prefill) / prefill_s;
    let decode_tokens_per_s = f64::from(decode) / decode_s;
    let products = cost.block_weights * u64::from(prefill) + cost.output_weights;
    let figures = Figures {
        device: model.device_mut().describe(),
        prefill_tokens_per_s,
        decode_tokens_per_s,
        read_bytes_per_s,
        int8_ops_per_s,
        decode_bytes_per_s: cost.weight_bytes as f64 * decode_tokens_per_s,
        // A product and a sum a weight.
        prefill_ops_per_s: 2.0 * products as f64 / prefill_s,
    };
    println!("{}", if json { figures.json() } else { figures.text() });
    Ok(())
}

/// The median seconds of running `n` tokens from an empty cache.
fn seconds(
    model: &mut Model,
    n: u32,
    reps: u32,
    work: impl Fn(&mut Alone<'_>, &[u32]) -> Result<(), v4_engine::Error>,
) -> Result<f64, String> {
    let tokens = tokens(n, model.vocabulary());
    let mut alone = Alone::new(model, tokens.len()).map_err(|error| error.to_string())?;
    let mut times = Vec::new();
    for rep in 0..=reps {
        alone.rewind(0);
        let start = Instant::now();
        work(&mut alone, &tokens).map_err(|error| error.to_string())?;
        if rep > 0 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Tokens from all over the vocabulary, the same in every run.
fn tokens(n: u32, vocabulary: usize) -> Vec<u32> {
    // Knuth's multiplicative hash spreads the numbers.
    let spread = |i: u32| i.wrapping_mul(2_654_435_761) as usize % vocabulary;
    (1..=n).map(|i| u32::try_from(spread(i)).expect("a vocabulary has 32 bits")).collect()
}

impl Figures {
    fn decode_share(&self) -> f64 {
        self.decode_bytes_per_s / self.read_bytes_per_s
    }

    fn prefill_share(&self) -> f64 {
        self.prefill_ops_per_s / self.int8_ops_per_s
    }

    fn json(&self) -> String {
        let json = serde_json::json!({
            "device": self.device,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "read_bytes_per_s": self.read_bytes_per_s,
            "int8_ops_per_s": self.int8_ops_per_s,
            "decode_bytes_per_s": self.decode_bytes_per_s,
            "decode_share_of_read": self.decode_share(),
            "prefill_ops_per_s": self.prefill_ops_per_s,
            "prefill_share_of_int8": self.prefill_share(),
        });
        json.to_string()
    }

    fn text(&self) -> String {
        const GIGA: f64 = 1e9;
        format!(
            "{}\n\
             prefill {:8.1} tokens/s  {:7.1} of {:.1} Gop/s int8 ({:.0} %)\n\
             decode  {:8.1} tokens/s  {:7.1} of {:.1} GB/s read ({:.0} %)",
            self.device,
            self.prefill_tokens_per_s,
            self.prefill_ops_per_s / GIGA,
            self.int8_ops_per_s / GIGA,
            100.0 * self.prefill_share(),
            self.decode_tokens_per_s,
            self.decode_bytes_per_s / GIGA,
            self.read_bytes_per_s / GIGA,
            100.0 * self.decode_share(),
        )
    }
}
