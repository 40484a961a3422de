//! `cargo xtask bench`: what a model and the kernels do, beside what the machine can do.
//!
//! A step of decode reads every weight once, so memory bounds it; prefill multiplies each weight by
//! many tokens, so arithmetic does. All limits are measured in the same run, with as many threads,
//! and every figure is said as a share of them. Nothing here reaches into the engine: a model runs
//! on a device under a [`meter`].

mod busy;
mod limits;
mod load;
mod meter;
mod noise;
mod peers;
mod products;
mod pull;
mod roofline;
mod serve;
mod speed;
mod subject;

/// Measure a model file: prefill and decode tokens/s beside what this machine can do.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    speed: speed::Args,
}

#[derive(Debug, clap::Subcommand)]
enum Part {
    /// Measure the product of every format, without a model.
    Products(products::Args),
    /// Measure decode beside a process that keeps one core busy.
    Busy(busy::Args),
    /// Measure the way from opening a file to the first token.
    Load(load::Args),
    /// Compare with the engines of others on the same files in the same run.
    Peers(peers::Args),
    /// Measure a pull over loopback beside curl and sha256sum.
    Pull(pull::Args),
    /// Measure what clients see of the daemon, beside another server.
    Serve(serve::Args),
    /// Serve a folder until standard input ends: the other side of `pull`.
    #[command(hide = true)]
    ServeFolder(pull::ServeArgs),
    /// Keep one core busy until standard input ends: the other side of `busy`.
    #[command(hide = true)]
    Spin,
}

/// Measures and prints.
///
/// # Errors
/// A sentence.
pub fn run(args: Args) -> Result<(), String> {
    let Some(part) = args.part else {
        return if args.speed.roofline {
            roofline::run(&args.speed)
        } else {
            speed::run(&args.speed)
        };
    };
    match part {
        Part::Products(args) => products::run(&args),
        Part::Busy(args) => busy::run(&args),
        Part::Load(args) => load::run(&args),
        Part::Peers(args) => peers::run(&args),
        Part::Pull(args) => pull::run(&args),
        Part::Serve(args) => serve::run(&args),
        Part::ServeFolder(args) => pull::serve(args),
        Part::Spin => busy::spin(),
    }
}

/// The middle one of some measurements; of an even number the later of the two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A thousand millions.
const GIGA: f64 = 1e9;
