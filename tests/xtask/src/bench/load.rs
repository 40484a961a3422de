//! From opening a file to the first token, with the file in the page cache.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;
use v4_engine::format;
use v4_engine::model::Model;
use v4_proto::frame::Stage;

use super::median;
use super::subject::Sequences;
use crate::device::{DeviceArgs, files};

/// What of a load is measured.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model: a GGUF file, or a folder with config.json and safetensors.
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Tokens of the prompt before the first token.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Tokens of context that the cache has room for.
    #[arg(long, default_value_t = 4096)]
    context: usize,
    /// Times it is measured; the medians are said.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    reps: u32,
    #[command(flatten)]
    device: DeviceArgs,
}

/// The stages, in order.
const STAGES: [&str; 5] = ["threads", "header", "bind", "populate", "first step"];

/// What a stage took.
#[derive(Debug, Clone, Copy, Default)]
struct Took {
    seconds: f64,
    faults: f64,
}

/// One load.
struct Load {
    stages: [Took; STAGES.len()],
    /// Bytes resident after it, and those of them that belong to no file.
    resident: u64,
    anonymous: u64,
    file_bytes: u64,
    kv_bytes: u64,
    scratch_bytes: u64,
}

/// A clock of time and minor page faults.
struct Clock {
    at: Instant,
    faults: u64,
}

impl Clock {
    fn start() -> Result<Self, String> {
        Ok(Self { at: Instant::now(), faults: minor_faults()? })
    }

    /// Since the last time.
    fn lap(&mut self) -> Result<Took, String> {
        let now = Self::start()?;
        let took = Took {
            seconds: (now.at - self.at).as_secs_f64(),
            faults: (now.faults - self.faults) as f64,
        };
        *self = now;
        Ok(took)
    }
}

/// Measures and prints.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    // The page cache is warm after this.
    drop(args.device.open(&args.file)?);
    let mut loads = Vec::new();
    for _ in 0..args.reps {
        loads.push(load(args)?);
    }
    let stage = |i: usize| Took {
        seconds: median(loads.iter().map(|load| load.stages[i].seconds).collect()),
        faults: median(loads.iter().map(|load| load.stages[i].faults).collect()),
    };
    let stages: Vec<Took> = (0..STAGES.len()).map(stage).collect();
    let last = loads.last().ok_or("no load was measured")?;
    println!("{}", if args.json { last.json(&stages) } else { last.text(&stages) });
    Ok(())
}

fn load(args: &Args) -> Result<Load, String> {
    let files = files(&args.file);
    let mut clock = Clock::start()?;
    let device = args.device.start()?;
    let threads = clock.lap()?;
    // A model's header is read and bound in one stage; reading alone tells how much is which.
    let file = format::read(&files).map_err(|error| error.to_string())?;
    let header = clock.lap()?;
    let file_bytes = file.tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();
    drop(file);
    let mut clock = Clock::start()?;
    let (mut bound, mut failed) = (Took::default(), None);
    let mut progress = |stage: Stage, done: u64, of: u64| {
        if stage == Stage::Header && done == of {
            match clock.lap() {
                Ok(took) => bound = took,
                Err(error) => failed = Some(error),
            }
        }
    };
    let model = Model::open(&files, device, &mut progress);
    let mut model = model.map_err(|error| error.to_string())?;
    failed.map_or(Ok(()), Err)?;
    let populate = clock.lap()?;
    let kv_bytes = (model.kv_shape().block_bytes()
        * args.context.div_ceil(model.kv_shape().block_tokens)) as u64;
    let mut sequence = Sequences::new(&mut model, 1, 0, args.context)?;
    sequence.feed(args.prompt as usize)?;
    let first_step = clock.lap()?;
    let bind =
        Took { seconds: bound.seconds - header.seconds, faults: bound.faults - header.faults };
    Ok(Load {
        stages: [threads, header, bind, populate, first_step],
        resident: status("VmRSS")?,
        anonymous: status("RssAnon")?,
        file_bytes,
        kv_bytes,
        scratch_bytes: model.scratch_bytes(),
    })
}

impl Load {
    fn json(&self, stages: &[Took]) -> String {
        let stages: serde_json::Map<_, _> = STAGES
            .iter()
            .zip(stages)
            .map(|(name, took)| {
                let took = json!({ "seconds": took.seconds, "minor_faults": took.faults });
                ((*name).to_owned(), took)
            })
            .collect();
        json!({
            "stages": stages,
            "resident_bytes": self.resident, "anonymous_bytes": self.anonymous,
            "weight_bytes": self.file_bytes, "kv_bytes": self.kv_bytes,
            "scratch_bytes": self.scratch_bytes,
        })
        .to_string()
    }

    fn text(&self, stages: &[Took]) -> String {
        use std::fmt::Write as _;

        const MEGA: f64 = 1e6;
        let mut text = String::new();
        let mut sum = Took::default();
        for (name, took) in STAGES.iter().zip(stages) {
            sum.seconds += took.seconds;
            sum.faults += took.faults;
            let (ms, faults) = (1e3 * took.seconds, took.faults);
            writeln!(text, "{name:<12} {ms:10.2} ms {faults:10.0} minor faults")
                .expect("a string takes it");
        }
        let Self { resident, anonymous, file_bytes, kv_bytes, scratch_bytes, .. } = *self;
        text + &format!(
            "first token  {:10.2} ms {:10.0} minor faults\n\
             resident {:.1} MB, {:.1} of it anonymous; \
             weights {:.1} + cache {:.1} + scratch {:.1} MB",
            1e3 * sum.seconds,
            sum.faults,
            resident as f64 / MEGA,
            anonymous as f64 / MEGA,
            file_bytes as f64 / MEGA,
            kv_bytes as f64 / MEGA,
            scratch_bytes as f64 / MEGA,
        )
    }
}

/// Minor page faults of this process so far: field 10 of its `stat` (proc(5)).
fn minor_faults() -> Result<u64, String> {
    let text = std::fs::read_to_string("/proc/self/stat").map_err(|error| error.to_string())?;
    // The name, in brackets, may have blanks; field 3 is the first after it.
    let after = text.rsplit(')').next().unwrap_or_default();
    let field = after.split_whitespace().nth(7).and_then(|field| field.parse().ok());
    field.ok_or_else(|| "/proc/self/stat has no minor faults".to_owned())
}

/// Bytes of an entry of this process' `status`.
fn status(name: &str) -> Result<u64, String> {
    let text = std::fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| format!("/proc/self/status has no {name}"))
}
