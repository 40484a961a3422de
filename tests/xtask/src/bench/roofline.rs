//! Where the time of a step goes: a line an operation, beside the limit that binds it.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::{Value, json};

use super::limits::{Around, Limits, Prober, Work};
use super::meter::{Event, Log};
use super::speed::Args;
use super::subject::{Names, Sequences, Subject};
use super::{GIGA, median};

/// Steps that are made before those that count.
const WARM_STEPS: usize = 2;

/// What tells lines apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    op: &'static str,
    what: String,
    quant: String,
}

/// An operation of a step, summed over layers.
struct Line {
    key: Key,
    calls: usize,
    work: Work,
    /// The least seconds that the calls take one by one, and what most of them wait for.
    least: f64,
    bound: &'static str,
    seconds: f64,
}

/// A kind of step, measured.
struct Step {
    /// `decode` or `prefill`.
    name: &'static str,
    depth: usize,
    batch: usize,
    tokens: usize,
    lines: Vec<Line>,
    /// The median of a step without the meter's own time.
    wall: f64,
    /// What of it no operation explains.
    rest: f64,
    limits: Around,
}

/// The logs of several steps of one kind, each with its wall time.
type Steps = Vec<(f64, Log)>;

/// Measures and prints.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    let mut subject = args.open()?;
    let mut prober = Prober::new(args.device.threads())?;
    if !args.json {
        println!("{}", subject.model.device_mut().describe());
    }
    for &depth in &args.depth {
        for &batch in &args.batch {
            if args.decode > 0 {
                let plan = Plan { depth, batch, chunk: 1, steps: args.decode };
                plan.measure("decode", &mut subject, &mut prober)?.print(args.json);
            }
        }
        if args.prefill > 0 {
            let plan = Plan { depth, batch: 1, chunk: args.prefill, steps: args.reps as usize };
            plan.measure("prefill", &mut subject, &mut prober)?.print(args.json);
        }
    }
    Ok(())
}

/// Steps of `chunk` tokens of `batch` sequences, all at the same depth.
#[derive(Clone, Copy)]
struct Plan {
    depth: usize,
    batch: usize,
    chunk: usize,
    steps: usize,
}

impl Plan {
    fn measure(
        self,
        name: &'static str,
        subject: &mut Subject,
        prober: &mut Prober,
    ) -> Result<Step, String> {
        let Self { depth, batch, chunk, .. } = self;
        let names = Names::of(&subject.file);
        let Subject { model, meter, file } = subject;
        let (steps, limits) = prober.around(&Subject::weights(file), || {
            let mut sequences = Sequences::new(model, batch, depth, chunk)?;
            let mut steps = Steps::new();
            for step in 0..WARM_STEPS + self.steps {
                sequences.rewind(depth);
                let start = Instant::now();
                let (done, log) = meter.during(|| sequences.feed(chunk));
                let wall = start.elapsed().as_secs_f64() - log.own_seconds;
                done?;
                if step >= WARM_STEPS {
                    steps.push((wall, log));
                }
            }
            Ok(steps)
        })?;
        let lines = lines(&steps, &names, &limits.best());
        let rest = |(wall, log): &(f64, Log)| {
            wall - log.events.iter().map(|event| event.seconds).sum::<f64>()
        };
        let rest = median(steps.iter().map(rest).collect());
        let wall = median(steps.iter().map(|(wall, _)| *wall).collect());
        Ok(Step { name, depth, batch, tokens: batch * chunk, lines, wall, rest, limits })
    }
}

/// A line an operation, the longest first: all but the times from the first step, times as medians
/// of all.
fn lines(steps: &Steps, names: &Names, limits: &Limits) -> Vec<Line> {
    let mut times: BTreeMap<Key, Vec<f64>> = BTreeMap::new();
    for (_, log) in steps {
        let mut sums: BTreeMap<Key, f64> = BTreeMap::new();
        for event in &log.events {
            *sums.entry(key(event, names)).or_default() += event.seconds;
        }
        for (key, seconds) in sums {
            times.entry(key).or_default().push(seconds);
        }
    }
    let first = steps.first().map_or(&[][..], |(_, log)| &log.events);
    let mut lines: Vec<Line> = times
        .into_iter()
        .map(|(key, seconds)| {
            let events = first.iter().filter(|event| self::key(event, names) == key);
            line(key.clone(), events, median(seconds), limits)
        })
        .collect();
    lines.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    lines
}

fn line<'a>(
    key: Key,
    events: impl Iterator<Item = &'a Event>,
    seconds: f64,
    limits: &Limits,
) -> Line {
    let (mut calls, mut work, mut least) = (0, Work::default(), 0.0);
    for event in events {
        calls += 1;
        work += event.work;
        least += limits.least(&event.work).0;
    }
    let bound = limits.least(&work).1.name();
    Line { key, calls, work, least, bound, seconds }
}

/// What an event is counted under: its operation with the names and formats of its weights, the
/// layer left out.
fn key(event: &Event, names: &Names) -> Key {
    let joined = |parts: Vec<String>| {
        let mut parts = parts;
        parts.dedup();
        parts.join("+")
    };
    let what = joined(event.weights.iter().map(|read| names.name(read)).collect());
    let quant = joined(event.weights.iter().map(|read| read.quant.to_string()).collect());
    let what = match (event.width, event.op) {
        (Some(window), "attention") => format!("window {window}"),
        (Some(width), _) => format!("[{width}]"),
        (None, _) => what,
    };
    Key { op: event.op, what, quant }
}

impl Step {
    fn print(&self, json: bool) {
        if json {
            self.json().iter().for_each(|line| println!("{line}"));
        } else {
            println!("\n{}", self.text());
        }
    }

    fn json(&self) -> Vec<Value> {
        let lines = self.lines.iter().map(|line| {
            json!({
                "step": self.name, "depth": self.depth, "batch": self.batch,
                "op": line.key.op, "what": line.key.what, "quant": line.key.quant,
                "calls": line.calls, "bytes": line.work.bytes(), "ops": line.work.ops(),
                "seconds": line.seconds, "bound": line.bound, "least_seconds": line.least,
            })
        });
        let sum: f64 = self.lines.iter().map(|line| line.seconds).sum();
        let least: f64 = self.lines.iter().map(|line| line.least).sum();
        let step = json!({
            "step": self.name, "depth": self.depth, "batch": self.batch, "tokens": self.tokens,
            "wall_seconds": self.wall, "ops_seconds": sum, "rest_seconds": self.rest,
            "least_seconds": least, "share_of_limits": least / self.wall,
            "limits_before": self.limits.before.json(), "limits_after": self.limits.after.json(),
        });
        lines.chain([step]).collect()
    }

    fn text(&self) -> String {
        let Self { name, depth, batch, tokens, wall, .. } = self;
        let each = *tokens as f64 / wall;
        let mut text = format!(
            "{name} at depth {depth}, batch {batch}: {:.3} ms, {each:.1} tokens/s\n{}\n\
             operation        weights                        quant         calls       MB      Mop\
             \x20       us      %     GB/s    Gop/s  limit share\n",
            1e3 * wall,
            self.limits.text(),
        );
        let mut sum = Sum::default();
        for line in &self.lines {
            let Line { key, calls, work, least, bound, seconds } = line;
            sum.add(work, *least, *seconds);
            let head = format!("{:<16} {:<30} {:<12} {calls:>6}", key.op, key.what, key.quant);
            text += &row(&head, work, (*seconds, *wall), (bound, *least));
        }
        let head = format!("{:<16} {:<50}", "sum", "");
        text += &row(&head, &sum.work, (sum.seconds, *wall), ("all", sum.least));
        let rest = format!("{:<16} {:<50}", "unexplained rest", "");
        text += &row(&rest, &Work::default(), (self.rest, *wall), ("", 0.0));
        text + &format!(
            "the least of all operations is {:.1} % of the step",
            100.0 * sum.least / wall
        )
    }
}

#[derive(Default)]
struct Sum {
    work: Work,
    least: f64,
    seconds: f64,
}

impl Sum {
    fn add(&mut self, work: &Work, least: f64, seconds: f64) {
        self.work += *work;
        self.least += least;
        self.seconds += seconds;
    }
}

fn row(
    head: &str,
    work: &Work,
    (seconds, wall): (f64, f64),
    (bound, least): (&str, f64),
) -> String {
    const MEGA: f64 = 1e6;
    format!(
        "{head} {:8.2} {:8.1} {:8.1} {:5.1}  {:7.1}  {:7.1}  {bound:<5} {:4.0} %\n",
        work.bytes() as f64 / MEGA,
        work.ops() as f64 / MEGA,
        seconds * MEGA,
        100.0 * seconds / wall,
        work.bytes() as f64 / seconds / GIGA,
        work.ops() as f64 / seconds / GIGA,
        100.0 * least / seconds,
    )
}
