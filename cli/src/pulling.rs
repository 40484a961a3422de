//! A pull as a person sees it: bars on a terminal, plain lines elsewhere, always on the standard
//! error.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};
use std::time::{Duration, Instant};

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
        Box::new(Lines::new(output::note))
    };
    let (mut is_done, began) = (false, Instant::now());
    while let Some(line) = lines.next().await? {
        let Some(step) = Step::read(&line) else { continue };
        is_done = step.status == "success";
        display.show(&step, began.elapsed());
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
    of: Bytes,
    /// Who sends it.
    source: Option<String>,
    /// All files together.
    overall: Bytes,
}

/// Bytes that are here, of how many.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bytes {
    total: u64,
    completed: u64,
}

impl Bytes {
    fn read(value: &Value) -> Option<Self> {
        let completed = value["completed"].as_u64().unwrap_or(0);
        Some(Self { total: value["total"].as_u64()?, completed })
    }

    /// Whole hundredths; nothing is all of nothing.
    fn percent(self) -> u64 {
        self.completed.saturating_mul(100).checked_div(self.total).unwrap_or(100)
    }

    fn is_all(self) -> bool {
        self.completed >= self.total
    }
}

impl Step {
    fn read(line: &Value) -> Option<Self> {
        let status = line["status"].as_str()?.to_owned();
        let file = line["digest"].as_str().and_then(|digest| {
            let of = Bytes::read(line)?;
            Some(File {
                digest: digest.to_owned(),
                of,
                source: line["source"].as_str().map(str::to_owned),
                overall: Bytes::read(&line["overall"]).unwrap_or(of),
            })
        });
        Some(Self { status, file })
    }
}

trait Display {
    /// Shows a step that came `at` this time after the start.
    fn show(&mut self, step: &Step, at: Duration);
}

/// A bar a file, one for all files where there are several, and a line a state.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    files: HashMap<String, ProgressBar>,
    overall: Option<ProgressBar>,
    state: Option<(String, ProgressBar)>,
}

impl Display for Bars {
    fn show(&mut self, step: &Step, _at: Duration) {
        match &step.file {
            Some(file) => self.show_file(step, file),
            None => self.show_state(&step.status),
        }
    }
}

impl Bars {
    fn show_file(&mut self, step: &Step, file: &File) {
        if !self.files.contains_key(&file.digest) {
            let bar = bar(file.of);
            // That of all files stays the last.
            let bar = match &self.overall {
                Some(overall) => self.all.insert_before(overall, bar),
                None => self.all.add(bar),
            };
            bar.set_message(step.status.clone());
            bar.reset_eta();
            self.files.insert(file.digest.clone(), bar);
        }
        if let Some(bar) = self.files.get(&file.digest) {
            if let Some(source) = &file.source {
                bar.set_prefix(format!("from {source}"));
            }
            bar.set_length(file.of.total);
            bar.set_position(file.of.completed);
            if file.of.is_all() && !bar.is_finished() {
                bar.finish();
            }
        }
        if self.overall.is_none() && file.overall.total > file.of.total {
            let bar = self.all.add(bar(file.overall));
            bar.set_message("in all");
            bar.reset_eta();
            self.overall = Some(bar);
        }
        if let Some(bar) = &self.overall {
            bar.set_length(file.overall.total);
            bar.set_position(file.overall.completed);
            if file.overall.is_all() && !bar.is_finished() {
                bar.finish();
            }
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

/// A bar for these bytes, with rate and time left.
fn bar(of: Bytes) -> ProgressBar {
    type State = indicatif::ProgressState;
    let style = "{msg}: {percent:>3}% ▕{bar:24}▏ {bytes}/{total_bytes}  {speed}  {eta}  {prefix}";
    let style = ProgressStyle::with_template(style)
        .expect("the template is a constant")
        .progress_chars("█▉▊▋▌▍▎▏ ")
        .with_key("bytes", |state: &State, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&human::size(state.pos()));
        })
        .with_key("total_bytes", |state: &State, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&human::size(state.len().unwrap_or(0)));
        })
        .with_key("speed", |state: &State, out: &mut dyn std::fmt::Write| {
            let _ = write!(out, "{}/s", human::size(whole(state.per_sec())));
        });
    ProgressBar::new(of.total).with_style(style).with_position(of.completed)
}

impl Drop for Bars {
    /// What was shown stays on the screen, also after a failure.
    fn drop(&mut self) {
        let state = self.state.take().map(|(_, bar)| bar);
        let all = self.files.values().chain(&self.overall).chain(&state);
        for bar in all.filter(|bar| !bar.is_finished()) {
            bar.abandon();
        }
    }
}

/// A rate as whole bytes; rates are far below what a `u64` holds.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped first")]
fn whole(rate: f64) -> u64 {
    rate.clamp(0.0, 1e15) as u64
}

/// How long back a rate looks: long enough that a pause of the network does not jump about in it.
const WINDOW: Duration = Duration::from_secs(10);

/// How fast bytes come.
#[derive(Default)]
struct Speed(VecDeque<(Duration, u64)>);

impl Speed {
    /// So many bytes are here `at` this time.
    fn add(&mut self, at: Duration, completed: u64) {
        self.0.push_back((at, completed));
        while self.0.len() > 2 && self.0[1].0 + WINDOW < at {
            self.0.pop_front();
        }
    }

    /// Bytes a second; `None` where nobody can tell yet.
    fn rate(&self) -> Option<u64> {
        let ((from, before), (to, after)) = (self.0.front()?, self.0.back()?);
        let millis = to.saturating_sub(*from).as_millis();
        let bytes = u128::from(after.saturating_sub(*before)) * 1000;
        u64::try_from(bytes.checked_div(millis)?).ok().filter(|rate| *rate > 0)
    }
}

/// A line for every new state and every tenth of a file.
struct Lines<W> {
    /// Tenths shown of each file.
    shown: HashMap<String, u64>,
    speed: Speed,
    last: String,
    write: W,
}

impl<W: FnMut(&str)> Lines<W> {
    fn new(write: W) -> Self {
        Self { shown: HashMap::new(), speed: Speed::default(), last: String::new(), write }
    }

    /// Where a file is: how much of it, how fast, how long still, from where, and how much of all.
    fn file(&self, status: &str, file: &File) -> String {
        let (done, total) = (human::size(file.of.completed), human::size(file.of.total));
        let mut line = format!("{status}: {}% ({done}/{total})", file.of.percent());
        let left = file.overall.total.saturating_sub(file.overall.completed);
        if let Some(rate) = self.speed.rate().filter(|_| left > 0) {
            let still = human::span(Duration::from_secs(left / rate)).to_lowercase();
            let _ = write!(line, ", {}/s, {still} left", human::size(rate));
        }
        if let Some(source) = &file.source {
            let _ = write!(line, ", from {source}");
        }
        if file.overall.total > file.of.total {
            let (percent, all) = (file.overall.percent(), human::size(file.overall.total));
            let _ = write!(line, "; in all {percent}% of {all}");
        }
        line
    }
}

impl<W: FnMut(&str)> Display for Lines<W> {
    fn show(&mut self, step: &Step, at: Duration) {
        let Some(file) = &step.file else {
            if self.last != step.status {
                self.last.clone_from(&step.status);
                (self.write)(&step.status);
            }
            return;
        };
        self.speed.add(at, file.overall.completed);
        let tenths = file.of.percent() / 10;
        if self.shown.insert(file.digest.clone(), tenths) != Some(tenths) {
            let line = self.file(&step.status, file);
            (self.write)(&line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What plain lines say of these reports, a second apart.
    fn told(reports: &[Value]) -> Vec<String> {
        let mut written = Vec::new();
        let mut lines = Lines::new(|line: &str| written.push(line.to_owned()));
        for (second, report) in (0..).zip(reports) {
            let at = Duration::from_secs(second);
            lines.show(&Step::read(report).expect("a step"), at);
        }
        written
    }

    #[test]
    fn plain_lines_come_once_a_state_and_once_a_tenth() {
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
        let expected = [
            "pulling manifest",
            "pulling aa: 0% (0 B/1 KB)",
            "pulling aa: 10% (100 B/1 KB), 33 B/s, 27 seconds left",
            "pulling aa: 100% (1 KB/1 KB)",
            "success",
        ];
        assert_eq!(told(&steps), expected);
    }

    #[test]
    fn a_line_says_rate_time_left_source_and_all_files() {
        let file = |name: &str, completed: u64, total: u64, all: u64| {
            json!({
                "status": format!("pulling {name}"), "digest": format!("sha256:{name}"),
                "total": total, "completed": completed, "source": "hub.example:80",
                "overall": {"total": 10_000_000, "completed": all},
            })
        };
        let steps = [
            file("aa", 0, 4_000_000, 0),
            file("aa", 2_000_000, 4_000_000, 2_000_000),
            file("aa", 4_000_000, 4_000_000, 4_000_000),
            file("bb", 6_000_000, 6_000_000, 10_000_000),
        ];
        let expected = [
            "pulling aa: 0% (0 B/4 MB), from hub.example:80; in all 0% of 10 MB",
            "pulling aa: 50% (2 MB/4 MB), 2 MB/s, 4 seconds left, from hub.example:80; \
             in all 20% of 10 MB",
            "pulling aa: 100% (4 MB/4 MB), 2 MB/s, 3 seconds left, from hub.example:80; \
             in all 40% of 10 MB",
            "pulling bb: 100% (6 MB/6 MB), from hub.example:80; in all 100% of 10 MB",
        ];
        assert_eq!(told(&steps), expected);
    }

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let mut speed = Speed::default();
        assert_eq!(speed.rate(), None);
        for second in 0..60 {
            // A hundred a second, then nothing, then a thousand a second.
            let bytes = [100 * second, 2000, 2000 + 1000 * (second.max(40) - 40)];
            let at = usize::try_from(second / 20).expect("small");
            speed.add(Duration::from_secs(second), bytes[at]);
            match second {
                0 => assert_eq!(speed.rate(), None),
                10 => assert_eq!(speed.rate(), Some(100)),
                39 => assert_eq!(speed.rate(), None, "nothing came"),
                59 => assert_eq!(speed.rate(), Some(1000)),
                _ => {}
            }
        }
    }

    #[test]
    fn a_line_without_a_status_is_no_step() {
        assert_eq!(Step::read(&json!({"x": 1})), None);
        assert_eq!(Step::read(&json!({"status": 7})), None);
    }
}
