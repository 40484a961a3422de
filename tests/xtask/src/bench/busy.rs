//! Decode while another process wants a core.
//!
//! The rule: all threads beside one busy core are not slower than one thread alone.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::json;

use super::median;
use super::subject::{Sequences, Subject};
use crate::device::DeviceArgs;

/// What is measured beside a busy core.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model: a GGUF file, or a folder with config.json and safetensors.
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Tokens that are decoded one by one from an empty cache.
    #[arg(long, default_value_t = 64)]
    decode: usize,
    /// Times each is measured, in turn; the median is said.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    reps: u32,
    #[command(flatten)]
    device: DeviceArgs,
}

/// A process that spins; it ends with its standard input.
struct Hog(Child);

impl Hog {
    fn start() -> Result<Self, String> {
        let this = std::env::current_exe().map_err(|error| error.to_string())?;
        let child = Command::new(this).args(["bench", "spin"]).stdin(Stdio::piped()).spawn();
        child.map(Hog).map_err(|error| error.to_string())
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        if let Err(error) = self.0.wait() {
            eprintln!("the busy process did not end: {error}");
        }
    }
}

/// Spins until standard input ends.
///
/// # Errors
/// Standard input cannot be read.
pub fn spin() -> Result<(), String> {
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                std::hint::black_box(&is_done);
            }
        });
        let ended = std::io::stdin().read_to_end(&mut Vec::new());
        is_done.store(true, Ordering::Relaxed);
        ended.map(drop).map_err(|error| error.to_string())
    })
}

/// Measures and prints.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    let threads = args.device.threads();
    let mut one = Subject::open(&args.file, &args.device.with_threads(1))?;
    let mut all = Subject::open(&args.file, &args.device.with_threads(threads))?;
    let mut rates = [Vec::new(), Vec::new(), Vec::new()];
    for rep in 0..=args.reps {
        let mut figures = [decode(&mut one, args.decode)?, decode(&mut all, args.decode)?, 0.0];
        let hog = Hog::start()?;
        figures[2] = decode(&mut all, args.decode)?;
        drop(hog);
        if rep > 0 {
            rates.iter_mut().zip(figures).for_each(|(rates, figure)| rates.push(figure));
        }
    }
    let [alone, together, beside] = rates.map(median);
    let line = if args.json {
        json!({
            "threads": threads,
            "one_thread_tokens_per_s": alone,
            "all_threads_tokens_per_s": together,
            "all_threads_beside_busy_core_tokens_per_s": beside,
            "holds": beside >= alone,
        })
        .to_string()
    } else {
        let holds = if beside >= alone { "holds" } else { "is broken" };
        format!(
            "1 thread alone             {alone:8.1} tokens/s\n\
             {threads} threads alone            {together:8.1} tokens/s\n\
             {threads} threads, one core busy   {beside:8.1} tokens/s, {:.2} of 1 thread: the rule \
             (not less than 1) {holds}",
            beside / alone
        )
    };
    println!("{line}");
    Ok(())
}

/// Tokens a second of `n` tokens from an empty cache.
fn decode(subject: &mut Subject, n: usize) -> Result<f64, String> {
    let mut sequence = Sequences::new(&mut subject.model, 1, 0, n)?;
    let start = Instant::now();
    (0..n).try_for_each(|_| sequence.feed(1))?;
    Ok(n as f64 / start.elapsed().as_secs_f64())
}
