//! Our engine and others on the same files in the same run, as a table.
//!
//! Rounds: each engine once, one after the other, every run a process of its own, so that a machine
//! that drifts is slow for all of them. The first round does not count: in it each setting of an
//! engine is tried, and the best one of each figure goes on.

mod engine;

use std::path::{Path, PathBuf};

use engine::{Column, Engine, Kind, Setting};
use serde_json::json;

use super::limits::{Around, Prober};
use super::median;
use crate::device::DeviceArgs;

/// What is compared with whom.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The models: GGUF files.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// The folder of llama.cpp's programs.
    #[arg(long)]
    llama: Option<PathBuf>,
    /// The folder of `ik_llama.cpp`'s programs.
    #[arg(long)]
    ik: Option<PathBuf>,
    /// A prompt of 512 tokens. All figures are measured where none is named.
    #[arg(long)]
    prefill: bool,
    /// An answer of 64 tokens.
    #[arg(long)]
    decode: bool,
    /// An answer of 16 tokens after 4096.
    #[arg(long)]
    depth: bool,
    /// Answers of 24 tokens to eight prompts of 64, together.
    #[arg(long)]
    batch: bool,
    /// Rounds that count, after a first that does not; the median is said.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    reps: u32,
    /// Print JSON, an object a figure.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Args {
    /// The figures to measure.
    fn columns(&self) -> Vec<Column> {
        let all = [
            (self.prefill, Column::Prefill),
            (self.decode, Column::Decode),
            (self.depth, Column::Depth),
            (self.batch, Column::Batch),
        ];
        let is_all = all.iter().all(|(is_named, _)| !is_named);
        let named = all.into_iter().filter(|(is_named, _)| is_all || *is_named);
        named.map(|(_, column)| column).collect()
    }

    /// Ours first.
    fn engines(&self) -> Result<Vec<Engine>, String> {
        let threads = self.device.threads();
        let mut engines = vec![Engine::ours(threads, self.device.arguments())?];
        for (kind, folder) in [(Kind::Llama, &self.llama), (Kind::Ik, &self.ik)] {
            if let Some(folder) = folder {
                engines.push(Engine::peer(kind, folder, threads)?);
            }
        }
        Ok(engines)
    }
}

/// An engine with a setting, and what it has to measure.
#[derive(Debug, Clone)]
struct Candidate {
    engine: usize,
    setting: Setting,
    /// The figures it measures, each with what was measured.
    figures: Vec<(Column, Vec<f64>)>,
    /// Why it measures no more.
    failed: Option<String>,
}

/// What an engine did: its figure and the setting, or why there is none.
type Figure = Result<(f64, Setting), String>;

/// Measures and prints.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    let (columns, engines) = (args.columns(), args.engines()?);
    let limits = || Ok::<_, String>(Prober::new(args.device.threads())?.measure(&[]));
    let before = limits()?;
    if !args.json {
        println!("{}", head(&columns));
    }
    for file in &args.files {
        let path = file.canonicalize().map_err(|error| format!("{}: {error}", file.display()))?;
        let mut figures: Vec<Vec<Figure>> = engines.iter().map(|_| Vec::new()).collect();
        for part in parts(&columns) {
            let candidates = measure(&engines, &path, part, args.reps);
            for (engine, figures) in figures.iter_mut().enumerate() {
                figures.extend(part.iter().map(|&column| figure(&candidates, engine, column)));
            }
        }
        let model = file.file_stem().unwrap_or_default().to_string_lossy();
        for (engine, theirs) in engines.iter().zip(&figures) {
            if args.json {
                json_lines(&model, engine.name(), &columns, theirs);
            } else {
                println!("{}", row(&model, engine.name(), theirs, &figures[0]));
            }
        }
    }
    let limits = Around { before, after: limits()? };
    if args.json {
        println!(
            "{}",
            json!({ "limits_before": before.json(), "limits_after": limits.after.json() })
        );
    } else {
        println!("\n{}", limits.text());
    }
    Ok(())
}

/// Columns that one run of a program measures: prefill and decode go together.
fn parts(columns: &[Column]) -> impl Iterator<Item = &[Column]> {
    let is_short = |column: &Column| matches!(column, Column::Prefill | Column::Decode);
    columns.chunk_by(move |a, b| is_short(a) && is_short(b))
}

/// All rounds of the columns of one part.
fn measure(engines: &[Engine], file: &Path, part: &[Column], reps: u32) -> Vec<Candidate> {
    let figures: Vec<_> = part.iter().map(|&column| (column, Vec::new())).collect();
    let mut candidates = Vec::new();
    for (engine, it) in engines.iter().enumerate() {
        candidates.extend(it.settings(part).iter().map(|&setting| Candidate {
            engine,
            setting,
            figures: figures.clone(),
            failed: None,
        }));
    }
    for round in 0..=reps {
        for candidate in &mut candidates {
            candidate.measure(&engines[candidate.engine], file);
        }
        if round == 0 {
            keep_best(&mut candidates);
        }
    }
    candidates
}

impl Candidate {
    fn measure(&mut self, engine: &Engine, file: &Path) {
        if self.failed.is_some() || self.figures.is_empty() {
            return;
        }
        let columns: Vec<Column> = self.figures.iter().map(|(column, _)| *column).collect();
        match engine.run(file, &columns, self.setting) {
            Ok(rates) => {
                let figures = self.figures.iter_mut().zip(rates);
                figures.for_each(|((_, rates), rate)| rates.push(rate));
            }
            Err(error) => self.failed = Some(error),
        }
    }

    /// What it measures of a column.
    fn rate(&self, column: Column) -> Option<f64> {
        let (_, rates) = self.figures.iter().find(|(it, _)| *it == column)?;
        (self.failed.is_none() && !rates.is_empty()).then(|| median(rates.clone()))
    }
}

/// Leaves each figure to the setting of an engine that was best at it, and forgets what was
/// measured.
fn keep_best(candidates: &mut [Candidate]) {
    let tried = candidates.to_vec();
    for (i, candidate) in candidates.iter_mut().enumerate() {
        let engine = candidate.engine;
        candidate.figures.retain(|(column, _)| best(&tried, engine, *column) == Some(i));
        candidate.figures.iter_mut().for_each(|(_, rates)| rates.clear());
    }
}

/// The candidate of an engine that is best at a column.
fn best(candidates: &[Candidate], engine: usize, column: Column) -> Option<usize> {
    let rates = candidates.iter().enumerate().filter(|(_, it)| it.engine == engine);
    let rates = rates.filter_map(|(i, it)| Some((i, it.rate(column)?)));
    rates.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
}

/// What an engine did in all rounds.
fn figure(candidates: &[Candidate], engine: usize, column: Column) -> Figure {
    let of_engine = || candidates.iter().filter(|it| it.engine == engine);
    if let Some(it) = best(candidates, engine, column).map(|i| &candidates[i]) {
        return it.rate(column).map(|rate| (rate, it.setting)).ok_or_else(String::new);
    }
    Err(of_engine().find_map(|it| it.failed.clone()).unwrap_or_default())
}

/// The head of the table.
fn head(columns: &[Column]) -> String {
    let names: Vec<&str> = columns.iter().map(|column| column.name()).collect();
    let lines = "---|".repeat(columns.len());
    format!("| model | engine | {} |\n|---|---|{lines}", names.join(" | "))
}

/// A row: tokens a second, how much faster ours is, and the setting.
fn row(model: &str, engine: &str, figures: &[Figure], ours: &[Figure]) -> String {
    let cell = |(figure, ours): (&Figure, &Figure)| match (figure, ours) {
        (Err(why), _) => format!("cannot load ({why})"),
        (Ok((rate, [])), _) => format!("{rate:.1}"),
        (Ok((rate, setting)), Ok((ours, _))) => {
            format!("{rate:.1}, v4 {:.2}x ({})", ours / rate, setting.join(" "))
        }
        (Ok((rate, setting)), Err(_)) => format!("{rate:.1} ({})", setting.join(" ")),
    };
    let cells: Vec<String> = figures.iter().zip(ours).map(cell).collect();
    format!("| {model} | {engine} | {} |", cells.join(" | "))
}

fn json_lines(model: &str, engine: &str, columns: &[Column], figures: &[Figure]) {
    for (column, figure) in columns.iter().zip(figures) {
        let line = match figure {
            Ok((rate, setting)) => json!({
                "model": model, "engine": engine, "figure": column.name(),
                "tokens_per_s": rate, "setting": setting.join(" "),
            }),
            Err(why) => json!({
                "model": model, "engine": engine, "figure": column.name(), "cannot_load": why,
            }),
        };
        println!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: Setting = &["-rtr", "1"];
    const OFF: Setting = &["-rtr", "0"];

    fn candidate(engine: usize, setting: Setting, prefill: f64, decode: f64) -> Candidate {
        let figures = vec![(Column::Prefill, vec![prefill]), (Column::Decode, vec![decode])];
        Candidate { engine, setting, figures, failed: None }
    }

    #[test]
    fn each_figure_goes_on_with_the_best_setting_of_its_engine() {
        let mut all = vec![
            candidate(0, &[], 1.0, 1.0),
            candidate(1, OFF, 9.0, 4.0),
            candidate(1, ON, 8.0, 5.0),
        ];
        keep_best(&mut all);
        let left = |i: usize| all[i].figures.clone();
        assert_eq!(left(0), [(Column::Prefill, vec![]), (Column::Decode, vec![])]);
        assert_eq!(left(1), [(Column::Prefill, vec![])]);
        assert_eq!(left(2), [(Column::Decode, vec![])]);
        all[2].figures[0].1.extend([3.0, 7.0, 6.0]);
        assert_eq!(figure(&all, 1, Column::Decode), Ok((6.0, ON)));
    }

    #[test]
    fn an_engine_that_fails_in_every_setting_cannot_load() {
        let failed = |setting| Candidate {
            failed: Some("signal: 8".to_owned()),
            ..candidate(1, setting, 1.0, 1.0)
        };
        let mut all = vec![failed(OFF), failed(ON)];
        keep_best(&mut all);
        assert_eq!(figure(&all, 1, Column::Decode), Err("signal: 8".to_owned()));
        let mut all = vec![failed(OFF), candidate(1, ON, 2.0, 2.0)];
        keep_best(&mut all);
        all[1].measure_as([2.0, 3.0]);
        assert_eq!(figure(&all, 1, Column::Decode), Ok((3.0, ON)));
    }

    impl Candidate {
        fn measure_as(&mut self, rates: [f64; 2]) {
            self.figures.iter_mut().zip(rates).for_each(|((_, all), rate)| all.push(rate));
        }
    }

    #[test]
    fn a_row_says_how_much_faster_ours_is() {
        let ours = [Ok((20.0, &[][..])), Ok((30.0, &[][..]))];
        assert_eq!(row("m", "v4", &ours, &ours), "| m | v4 | 20.0 | 30.0 |");
        let theirs = [Ok((16.0, ON)), Err("signal: 8".to_owned())];
        let row = row("m", "ik", &theirs, &ours);
        assert_eq!(row, "| m | ik | 16.0, v4 1.25x (-rtr 1) | cannot load (signal: 8) |");
    }

    #[test]
    fn prefill_and_decode_are_one_run() {
        let all = [Column::Prefill, Column::Decode, Column::Depth, Column::Batch];
        let lengths = |columns| parts(columns).map(<[Column]>::len).collect::<Vec<_>>();
        assert_eq!(lengths(&all[..]), [2, 1, 1]);
        assert_eq!(lengths(&all[1..3]), [1, 1]);
    }
}
