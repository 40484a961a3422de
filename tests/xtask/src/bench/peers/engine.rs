//! An engine that is measured: its programs, their arguments and what they print.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Tokens of the prompt of [`Column::Prefill`].
const PREFILL: &str = "512";
/// Tokens of the answer of [`Column::Decode`].
const DECODE: &str = "64";
/// Tokens of context of [`Column::Depth`], and of the answer after them.
const DEPTH: [&str; 2] = ["4096", "16"];
/// Sequences of [`Column::Batch`], tokens of each's prompt and answer, and of room for all.
const BATCH: [&str; 4] = ["8", "64", "24", "2048"];

/// A figure, in tokens a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    /// A prompt of 512 tokens.
    Prefill,
    /// An answer of 64 tokens from an empty cache.
    Decode,
    /// An answer of 16 tokens after 4096.
    Depth,
    /// Answers of 24 tokens to eight prompts of 64, all eight together.
    Batch,
}

impl Column {
    /// Its head in a table.
    pub fn name(self) -> &'static str {
        match self {
            Column::Prefill => "prefill 512",
            Column::Decode => "decode 64",
            Column::Depth => "decode at depth 4096",
            Column::Batch => "batch 8 decode total",
        }
    }
}

/// Whose programs they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Our own, by `xtask bench` in a process of its own.
    V4,
    /// llama.cpp's.
    Llama,
    /// `ik_llama.cpp`'s.
    Ik,
}

/// Arguments that change how fast an engine is but not what it does; the first is its default.
pub type Setting = &'static [&'static str];

/// An engine's programs.
#[derive(Debug)]
pub struct Engine {
    kind: Kind,
    /// The folder of its programs; for our own, the program.
    path: PathBuf,
    threads: usize,
    /// More arguments of our own.
    arguments: Vec<String>,
}

impl Engine {
    /// Our own engine, with the arguments of its device.
    ///
    /// # Errors
    /// This program cannot be found.
    pub fn ours(threads: usize, arguments: Vec<String>) -> Result<Self, String> {
        let path = std::env::current_exe().map_err(|error| error.to_string())?;
        Ok(Self { kind: Kind::V4, path, threads, arguments })
    }

    /// A peer whose programs lie in a folder.
    ///
    /// # Errors
    /// They do not.
    pub fn peer(kind: Kind, folder: &Path, threads: usize) -> Result<Self, String> {
        for program in ["llama-bench", "llama-batched-bench"] {
            if !folder.join(program).is_file() {
                return Err(format!("{} has no {program}", folder.display()));
            }
        }
        // Programs run in another folder.
        let path = folder.canonicalize().map_err(|error| error.to_string())?;
        Ok(Self { kind, path, threads, arguments: Vec::new() })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::V4 => "v4",
            Kind::Llama => "llama.cpp",
            Kind::Ik => "ik_llama.cpp",
        }
    }

    /// Settings of which the best counts.
    pub fn settings(&self, columns: &[Column]) -> &'static [Setting] {
        let is_batch = columns.contains(&Column::Batch);
        let is_depth = columns.contains(&Column::Depth);
        match self.kind {
            Kind::V4 => &[&[]],
            Kind::Llama if is_batch => &[&["-fa", "on"], &["-fa", "off"], &["-fa", "off", "-nr"]],
            Kind::Llama => &[&["-fa", "1"], &["-fa", "0"], &["-fa", "0", "--repack", "0"]],
            Kind::Ik if is_batch => &[&["-fa", "on"], &["-fa", "on", "-rtr"]],
            Kind::Ik if is_depth => &[&["-fa", "1"], &["-fa", "0"], &["-fa", "1", "-rtr", "1"]],
            Kind::Ik => &[&["-rtr", "0"], &["-rtr", "1"]],
        }
    }

    /// Runs a program once and reads its figures, one a column, in order.
    ///
    /// # Errors
    /// It fails, as it does for a file it cannot load, or prints no such figures.
    pub fn run(
        &self,
        file: &Path,
        columns: &[Column],
        setting: Setting,
    ) -> Result<Vec<f64>, String> {
        let is_batch = columns.contains(&Column::Batch);
        let program = match self.kind {
            Kind::V4 => self.path.clone(),
            _ if is_batch => self.path.join("llama-batched-bench"),
            _ => self.path.join("llama-bench"),
        };
        let mut command = Command::new(program);
        // A peer leaves a log where it runs.
        command.current_dir(std::env::temp_dir()).args(setting);
        match self.kind {
            Kind::V4 => command.args(ours(columns)).args(&self.arguments).arg(file),
            kind => {
                command.args(theirs(kind, columns, &self.threads.to_string())).arg("-m").arg(file)
            }
        };
        let output = command.output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(output.status.to_string());
        }
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        let figure = |&column: &Column| {
            let figure = match self.kind {
                Kind::V4 => our_figure(&text, column),
                _ if is_batch => table_figure(&text),
                _ => record_figure(&String::from_utf8_lossy(&output.stdout), column),
            };
            figure.ok_or_else(|| format!("printed no {}", column.name()))
        };
        columns.iter().map(figure).collect()
    }
}

/// `wanted` if the column is measured, else 0, which leaves it out.
fn tokens(columns: &[Column], column: Column, wanted: &'static str) -> &'static str {
    if columns.contains(&column) { wanted } else { "0" }
}

/// Our arguments. The peers' figures count one time after a first that does not; so do ours.
fn ours(columns: &[Column]) -> Vec<&'static str> {
    let mut arguments = vec!["bench", "--json", "--reps", "1"];
    arguments.extend(["--prefill", tokens(columns, Column::Prefill, PREFILL)]);
    if columns.contains(&Column::Depth) {
        arguments.extend(["--depth", DEPTH[0], "--decode", DEPTH[1]]);
    } else if columns.contains(&Column::Batch) {
        arguments.extend(["--batch", BATCH[0], "--depth", BATCH[1], "--decode", BATCH[2]]);
    } else {
        arguments.extend(["--decode", tokens(columns, Column::Decode, DECODE)]);
    }
    arguments
}

/// A peer's arguments, without the model.
fn theirs(kind: Kind, columns: &[Column], threads: &str) -> Vec<String> {
    let mut arguments: Vec<String> = vec!["-t".into(), threads.into()];
    let mut add = |more: &[&str]| arguments.extend(more.iter().map(|&word| word.to_owned()));
    if columns.contains(&Column::Batch) {
        let [sequences, prompt, answer, room] = BATCH;
        add(&["-tb", threads, "-c", room, "-npp", prompt, "-ntg", answer, "-npl", sequences]);
        return arguments;
    }
    add(&["-r", "1", "-o", "json"]);
    match kind {
        _ if !columns.contains(&Column::Depth) => {
            add(&["-p", tokens(columns, Column::Prefill, PREFILL)]);
            add(&["-n", tokens(columns, Column::Decode, DECODE)]);
        }
        Kind::Ik => add(&["-p", "0", "-n", "0", "-gp", &DEPTH.join(",")]),
        _ => add(&["-p", "0", "-n", DEPTH[1], "-d", DEPTH[0]]),
    }
    arguments
}

/// A figure of our own `bench --json`.
fn our_figure(text: &str, column: Column) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with('{'))?;
    let line: Value = serde_json::from_str(line).ok()?;
    let key = if column == Column::Prefill { "prefill" } else { "decode" };
    line[format!("{key}_tokens_per_s")].as_f64()
}

/// A figure of `llama-bench -o json`: records of tests; that of a prompt generates nothing.
fn record_figure(text: &str, column: Column) -> Option<f64> {
    let records: Value = serde_json::from_str(text.get(text.find('[')?..)?).ok()?;
    let is_prefill = |record: &Value| record["n_gen"] == 0;
    let mut records = records.as_array()?.iter();
    records.find(|it| is_prefill(it) == (column == Column::Prefill))?["avg_ts"].as_f64()
}

/// Tokens a second of all sequences together, from the table of `llama-batched-bench`.
fn table_figure(text: &str) -> Option<f64> {
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let mut rows = text.lines().filter(|line| line.starts_with('|')).map(cells);
    let at = rows.next()?.iter().position(|cell| cell.starts_with("S_TG"))?;
    rows.nth(1)?.get(at)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_left_out_is_not_asked_for() {
        let asked = theirs(Kind::Llama, &[Column::Decode], "2").join(" ");
        assert_eq!(asked, "-t 2 -r 1 -o json -p 0 -n 64");
        let asked = theirs(Kind::Ik, &[Column::Depth], "2").join(" ");
        assert_eq!(asked, "-t 2 -r 1 -o json -p 0 -n 0 -gp 4096,16");
        let asked = theirs(Kind::Llama, &[Column::Depth], "2").join(" ");
        assert_eq!(asked, "-t 2 -r 1 -o json -p 0 -n 16 -d 4096");
        let asked = ours(&[Column::Prefill]).join(" ");
        assert_eq!(asked, "bench --json --reps 1 --prefill 512 --decode 0");
    }

    #[test]
    fn figures_are_found_in_what_each_program_prints() {
        let text = "{\"prefill_tokens_per_s\":5.0,\"decode_tokens_per_s\":2.5}\n";
        assert_eq!(our_figure(text, Column::Prefill), Some(5.0));
        assert_eq!(our_figure(text, Column::Batch), Some(2.5));
        let text = "a note\n[{\"n_prompt\":512,\"n_gen\":0,\"avg_ts\":9.5},
            {\"n_prompt\":0,\"n_gen\":64,\"avg_ts\":3.5}]";
        assert_eq!(record_figure(text, Column::Prefill), Some(9.5));
        assert_eq!(record_figure(text, Column::Decode), Some(3.5));
        // At depth a peer says the prompt beside the answer.
        let text = "[{\"n_prompt\":4096,\"n_gen\":16,\"avg_ts\":1.5}]";
        assert_eq!(record_figure(text, Column::Depth), Some(1.5));
        assert_eq!(record_figure(text, Column::Prefill), None);
        let text = "\n| B | S_PP t/s | S_TG t/s |\n|---|---|---|\n| 8 |  99.15 | 102.02 |\nend";
        assert_eq!(table_figure(text), Some(102.02));
        assert_eq!(table_figure("| B |\n"), None);
    }
}
