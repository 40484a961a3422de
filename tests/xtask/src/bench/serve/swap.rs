//! Two models in the page cache of which one fits: from a request to its first token.

use std::fs;

use serde_json::json;
use v4_tests::daemon::Daemon;
use v4_tests::process::children;

use super::Args;
use super::ask::{Asked, words};
use super::server::{import, kept_home, loaded, start};
use crate::bench::median;

/// Words of a prompt.
const WORDS: usize = 16;
/// Units of the times in `/proc/PID/stat`, a second (proc(5); 100 on every Linux that v4 runs on).
const TICKS: f64 = 100.0;

/// One swap.
struct Swap {
    /// From the request to the first token, with the swap and without.
    cold: f64,
    hot: f64,
    /// Page faults of the runner at its first token, and its seconds in the kernel.
    faults: f64,
    kernel: f64,
}

/// Measures ours.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    let Some(other) = args.files.get(1) else {
        eprintln!("swap: skipped, for it takes two files");
        return Ok(());
    };
    let home = kept_home();
    let settings = |memory: u64| {
        let memory = format!("{}M", memory >> 20);
        let mut settings = vec![
            ("V4_THREADS", args.threads().to_string()),
            ("V4_KEEP_ALIVE", "-1".to_owned()),
            ("V4_CONTEXT", "4096".to_owned()),
        ];
        settings.extend((memory != "0M").then_some(("V4_MEMORY", memory)));
        settings
    };
    let daemon = start(home, &settings(0));
    let mut larger = 0;
    for (file, name) in [(&args.files[0], "one"), (other, "two")] {
        let asked = import(&daemon.tcp, file, name)?;
        asked.ask("hello", 1)?;
        let sizes = loaded(&daemon.tcp).into_iter().filter_map(|model| model["size"].as_u64());
        larger = larger.max(sizes.max().unwrap_or(0));
    }
    drop(daemon);
    let daemon = start(home, &settings(larger + larger / 8));
    let mut swaps = [Vec::new(), Vec::new()];
    for i in 0..=args.reps {
        for (name, swaps) in ["one", "two"].into_iter().zip(&mut swaps) {
            let swap = swap(&daemon, name, u64::from(i))?;
            // In the first round the memory was empty.
            if i > 0 {
                swaps.push(swap);
            }
        }
    }
    for (file, swaps) in args.files.iter().zip(&swaps) {
        let of = |figure: fn(&Swap) -> f64| median(swaps.iter().map(figure).collect());
        let (cold, hot) = (of(|swap| swap.cold), of(|swap| swap.hot));
        let (faults, kernel) = (of(|swap| swap.faults), of(|swap| swap.kernel));
        let model = file.file_stem().unwrap_or_default().to_string_lossy();
        args.say(
            &format!(
                "swap     v4         to {model}: first token {:.0} ms, {:.0} beyond its prefill; \
                 the runner had {faults:.0} page faults and {:.0} ms in the kernel",
                1e3 * cold,
                1e3 * (cold - hot),
                1e3 * kernel,
            ),
            &json!({
                "part": "swap", "engine": "v4", "model": model, "first_token_s": cold,
                "hot_first_token_s": hot, "page_faults": faults, "kernel_s": kernel,
            }),
        );
    }
    Ok(())
}

fn swap(daemon: &Daemon, model: &str, round: u64) -> Result<Swap, String> {
    let asked = Asked {
        is_fresh: false,
        address: daemon.tcp.clone(),
        dialect: super::ask::Dialect::Ollama,
        model: model.to_owned(),
    };
    let cold = asked.ask(&words(WORDS, 2 * round), 1)?.first();
    let (faults, kernel) = runner_cost(daemon.pid());
    let hot = asked.ask(&words(WORDS, 2 * round + 1), 1)?.first();
    Ok(Swap { cold, hot, faults, kernel })
}

/// Page faults and seconds in the kernel of the runner with most of both: fields 10, 12 and 15 of
/// its `stat`. The others are spare ones that have done nothing, or about to end.
fn runner_cost(daemon: u32) -> (f64, f64) {
    let cost = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in brackets, may have blanks; field 3 is the first after it.
        let after = text.rsplit(')').next()?;
        let fields: Vec<f64> =
            after.split_whitespace().map_while(|word| word.parse().ok().or(Some(0.0))).collect();
        Some((fields.get(7)? + fields.get(9)?, fields.get(12)? / TICKS))
    };
    let costs = children(daemon).into_iter().filter_map(cost);
    costs.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((0.0, 0.0))
}
