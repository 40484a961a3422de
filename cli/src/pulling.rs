//! A pull as a person sees it: bars on a terminal, plain lines elsewhere, always on the standard
//! error.

use std::collections::HashMap;
use std::io::{self, IsTerminal as _};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::client::Client;
use crate::error::Failure;
use crate::human;
use crate::output;

/// Pulls `model` and shows how it goes.
///
/// # Errors
/// The daemon's own words, also when the stream ends without a word of success.
pub async fn pull(client: &Client, model: &str) -> Result<(), Failure> {
    follow(client, "/api/pull", &json!({ "model": model })).await
}

/// Asks for work that takes a while and shows how it goes.
///
/// # Errors
/// As for [`pull`].
pub async fn follow(client: &Client, path: &str, body: &Value) -> Result<(), Failure> {
    let mut lines = client.stream(path, body).await?;
    let mut display: Box<dyn Display> = if io::stderr().is_terminal() {
        Box::new(Bars::default())
    } else {
        Box::new(Lines { shown: HashMap::new(), last: String::new(), write: output::note })
    };
    let mut is_done = false;
    while let Some(line) = lines.next().await? {
        let Some(step) = Step::read(&line) else { continue };
        is_done = step.status == "success";
        display.show(&step);
    }
    if is_done { Ok(()) } else { Err(Failure::Lost("it ended without success".to_owned())) }
}

/// One line of the daemon's report.
#[derive(Debug, PartialEq)]
struct Step {
    status: String,
    file: Option<File>,
}

#[derive(Debug, PartialEq)]
struct File {
    digest: String,
    total: u64,
    completed: u64,
}

impl Step {
    fn read(line: &Value) -> Option<Self> {
        let status = line["status"].as_str()?.to_owned();
        let file = line["digest"].as_str().and_then(|digest| {
            Some(File {
                digest: digest.to_owned(),
                total: line["total"].as_u64()?,
                completed: line["completed"].as_u64().unwrap_or(0),
            })
        });
        Some(Self { status, file })
    }
}

trait Display {
    fn show(&mut self, step: &Step);
}

/// A bar a file, and a line a state.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    files: HashMap<String, ProgressBar>,
    state: Option<(String, ProgressBar)>,
}

impl Display for Bars {
    fn show(&mut self, step: &Step) {
        match &step.file {
            Some(file) => self.show_file(step, file),
            None => self.show_state(&step.status),
        }
    }
}

impl Bars {
    fn show_file(&mut self, step: &Step, file: &File) {
        let bar = self.files.entry(file.digest.clone()).or_insert_with(|| {
            let style = "{msg}: {percent:>3}% ▕{bar:24}▏ {bytes}/{total_bytes}  {speed}  {eta}";
            let style = ProgressStyle::with_template(style)
                .expect("the template is a constant")
                .progress_chars("█▉▊▋▌▍▎▏ ")
                .with_key(
                    "bytes",
                    |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
                        let _ = out.write_str(&human::size(state.pos()));
                    },
                )
                .with_key(
                    "total_bytes",
                    |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
                        let _ = out.write_str(&human::size(state.len().unwrap_or(0)));
                    },
                )
                .with_key(
                    "speed",
                    |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
                        let _ = write!(out, "{}/s", human::size(whole(state.per_sec())));
                    },
                );
            let bar = self.all.add(ProgressBar::new(file.total).with_style(style));
            bar.set_message(step.status.clone());
            bar.set_position(file.completed);
            bar.reset_eta();
            bar
        });
        bar.set_length(file.total);
        bar.set_position(file.completed);
        if file.completed >= file.total && !bar.is_finished() {
            bar.finish();
        }
    }

    fn show_state(&mut self, status: &str) {
        if self.state.as_ref().is_some_and(|(shown, _)| shown == status) {
            return;
        }
        if let Some((_, bar)) = self.state.take() {
            bar.finish();
        }
        let style = ProgressStyle::with_template("{msg}").expect("the template is a constant");
        let bar = self.all.add(ProgressBar::new_spinner().with_style(style));
        bar.set_message(status.to_owned());
        bar.tick();
        if status == "success" {
            bar.finish();
        }
        self.state = Some((status.to_owned(), bar));
    }
}

impl Drop for Bars {
    /// What was shown stays on the screen, also after a failure.
    fn drop(&mut self) {
        let state = self.state.take().map(|(_, bar)| bar);
        for bar in self.files.values().chain(&state).filter(|bar| !bar.is_finished()) {
            bar.abandon();
        }
    }
}

/// A rate as whole bytes; rates are far below what a `u64` holds.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped first")]
fn whole(rate: f64) -> u64 {
    rate.clamp(0.0, 1e15) as u64
}

/// A line for every new state and every tenth of a file.
struct Lines<W> {
    /// Tenths shown of each file.
    shown: HashMap<String, u64>,
    last: String,
    write: W,
}

impl<W: FnMut(&str)> Display for Lines<W> {
    fn show(&mut self, step: &Step) {
        let Some(file) = &step.file else {
            if self.last != step.status {
                self.last.clone_from(&step.status);
                (self.write)(&step.status);
            }
            return;
        };
        let tenths = file.completed.saturating_mul(10).checked_div(file.total).unwrap_or(10);
        if self.shown.insert(file.digest.clone(), tenths) != Some(tenths) {
            let (done, total) = (human::size(file.completed), human::size(file.total));
            (self.write)(&format!("{}: {}% ({done}/{total})", step.status, tenths * 10));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_come_once_a_state_and_once_a_tenth() {
        let mut written = Vec::new();
        let mut lines = Lines {
            shown: HashMap::new(),
            last: String::new(),
            write: |line: &str| written.push(line.to_owned()),
        };
        let file = |completed: u64| json!({"status": "pulling aa", "digest": "sha256:aa", "total": 1000, "completed": completed});
        let steps = [
            json!({"status": "pulling manifest"}),
            json!({"status": "pulling manifest"}),
            json!({"status": "pulling aa", "digest": "sha256:aa", "total": 1000}),
            file(50),
            file(99),
            file(100),
            file(1000),
            json!({"status": "success"}),
        ];
        for step in &steps {
            lines.show(&Step::read(step).expect("a step"));
        }
        let expected = [
            "pulling manifest",
            "pulling aa: 0% (0 B/1 KB)",
            "pulling aa: 10% (100 B/1 KB)",
            "pulling aa: 100% (1 KB/1 KB)",
            "success",
        ];
        assert_eq!(written, expected);
    }

    #[test]
    fn a_line_without_a_status_is_no_step() {
        assert_eq!(Step::read(&json!({"x": 1})), None);
        assert_eq!(Step::read(&json!({"status": 7})), None);
    }
}
