//! An answer as it arrives: text at once, thinking dimmed, timings when they are asked for.

use std::pin::pin;

use serde_json::Value;

use crate::client::Client;
use crate::error::Failure;
use crate::{human, output};

/// Escape codes of a terminal.
const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// What an answer came to.
#[derive(Debug, Default, PartialEq)]
pub struct Said {
    /// Its text.
    pub text: String,
    /// Its thinking.
    pub thinking: String,
    /// The calls of tools it asked for, as the daemon sent them.
    pub tool_calls: Vec<Value>,
    /// The figures of the last line; `null` when there was none.
    pub figures: Value,
}

impl Said {
    fn is_nothing(&self) -> bool {
        self.text.is_empty() && self.thinking.is_empty() && self.tool_calls.is_empty()
    }
}

/// Where the words go, so that a test can look at them.
pub trait Screen {
    /// Shows `text` at once.
    ///
    /// # Errors
    /// As [`output::print`].
    fn print(&mut self, text: &str) -> Result<(), Failure>;
    /// Whether a person looks, so that dimming means something.
    fn is_seen(&self) -> bool;
}

/// The standard output.
pub struct Stdout;

impl Screen for Stdout {
    fn print(&mut self, text: &str) -> Result<(), Failure> {
        output::print(text)
    }

    fn is_seen(&self) -> bool {
        output::is_seen()
    }
}

/// Puts the lines of one answer on a screen.
pub struct Show<S> {
    screen: S,
    said: Said,
    is_thinking: bool,
}

impl<S: Screen> Show<S> {
    /// A fresh answer.
    pub fn new(screen: S) -> Self {
        Self { screen, said: Said::default(), is_thinking: false }
    }

    /// Shows one line, of `/api/generate` or of `/api/chat`.
    ///
    /// # Errors
    /// As [`output::print`].
    pub fn line(&mut self, line: &Value) -> Result<(), Failure> {
        let message = line.get("message").unwrap_or(line);
        let text = |key: &str| message[key].as_str().unwrap_or_default();
        self.thinking(text("thinking"))?;
        self.text(if message["content"].is_string() { text("content") } else { text("response") })?;
        for call in message["tool_calls"].as_array().into_iter().flatten() {
            self.said.tool_calls.push(call.clone());
            self.text_only(&format!("{}\n", call["function"]))?;
        }
        if line["done"] == true {
            self.said.figures = line.clone();
        }
        Ok(())
    }

    /// Ends the answer: the screen is at the start of a line.
    ///
    /// # Errors
    /// As [`output::print`].
    pub fn end(mut self) -> Result<Said, Failure> {
        self.stop_thinking()?;
        if !self.said.text.ends_with('\n') {
            self.screen.print("\n")?;
        }
        Ok(self.said)
    }

    fn thinking(&mut self, text: &str) -> Result<(), Failure> {
        if text.is_empty() {
            return Ok(());
        }
        if !self.is_thinking {
            self.is_thinking = true;
            let dim = if self.screen.is_seen() { DIM } else { "" };
            self.screen.print(&format!("{dim}Thinking...\n"))?;
        }
        self.said.thinking.push_str(text);
        self.screen.print(text)
    }

    fn stop_thinking(&mut self) -> Result<(), Failure> {
        if !self.is_thinking {
            return Ok(());
        }
        self.is_thinking = false;
        let line = if self.said.thinking.ends_with('\n') { "" } else { "\n" };
        let plain = if self.screen.is_seen() { PLAIN } else { "" };
        self.screen.print(&format!("{line}...done thinking.{plain}\n\n"))
    }

    fn text(&mut self, text: &str) -> Result<(), Failure> {
        if text.is_empty() {
            return Ok(());
        }
        self.said.text.push_str(text);
        self.text_only(text)
    }

    fn text_only(&mut self, text: &str) -> Result<(), Failure> {
        self.stop_thinking()?;
        self.screen.print(text)
    }
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself.
    Whole,
    /// The person pressed Ctrl-C.
    Stopped,
}

/// Sends a request and shows its whole answer on the standard output. Ctrl-C stops the answer: the
/// request is dropped, which the daemon takes as a cancel.
///
/// # Errors
/// The daemon's own words, or what befell the connection or the output. The screen is left at the
/// start of a line.
pub async fn ask(client: &Client, path: &str, body: &Value) -> Result<(Said, End), Failure> {
    let stopped = pin!(tokio::signal::ctrl_c());
    let mut show = Show::new(Stdout);
    let told = tokio::select! {
        biased;
        _ = stopped => Ok(End::Stopped),
        told = tell(client, path, body, &mut show) => told,
    };
    // Something was said, or the person's ^C stands on the line: begin a new one.
    if told.is_ok() || !show.said.is_nothing() {
        let said = show.end()?;
        return told.map(|end| (said, end));
    }
    told.map(|end| (Said::default(), end))
}

async fn tell<S: Screen>(
    client: &Client,
    path: &str,
    body: &Value,
    show: &mut Show<S>,
) -> Result<End, Failure> {
    let mut answer = client.stream(path, body).await?;
    while let Some(line) = answer.next().await? {
        show.line(&line)?;
    }
    Ok(End::Whole)
}

/// The figures of an answer, a line each, as `--verbose` prints them.
pub fn timings(figures: &Value) -> String {
    let number = |key: &str| figures[key].as_u64().unwrap_or(0);
    let rate = |count: u64, ns: u64| match ns {
        0 => "-".to_owned(),
        ns => format!("{:.2} tokens/s", count as f64 * 1e9 / ns as f64),
    };
    let (prompt, prompt_ns) = (number("prompt_eval_count"), number("prompt_eval_duration"));
    let (answer, answer_ns) = (number("eval_count"), number("eval_duration"));
    let lines = [
        ("total duration:", human::exact(number("total_duration"))),
        ("load duration:", human::exact(number("load_duration"))),
        ("prompt eval count:", format!("{prompt} token(s)")),
        ("prompt eval duration:", human::exact(prompt_ns)),
        ("prompt eval rate:", rate(prompt, prompt_ns)),
        ("eval count:", format!("{answer} token(s)")),
        ("eval duration:", human::exact(answer_ns)),
        ("eval rate:", rate(answer, answer_ns)),
    ];
    lines.map(|(what, figure)| format!("{what:<22}{figure}\n")).concat()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    struct Page<'a>(&'a mut String, bool);

    impl Screen for Page<'_> {
        fn print(&mut self, text: &str) -> Result<(), Failure> {
            self.0.push_str(text);
            Ok(())
        }

        fn is_seen(&self) -> bool {
            self.1
        }
    }

    fn shown(lines: &[Value], is_seen: bool) -> (String, Said) {
        let mut page = String::new();
        let mut show = Show::new(Page(&mut page, is_seen));
        for line in lines {
            show.line(line).expect("a String takes all");
        }
        let said = show.end().expect("a String takes all");
        (page, said)
    }

    #[test]
    fn both_endpoints_read_alike() {
        let generate = [json!({"response": "a"}), json!({"response": "b", "done": true})];
        let chat = [
            json!({"message": {"role": "assistant", "content": "a"}}),
            json!({"message": {"content": "b"}, "done": true}),
        ];
        for lines in [generate, chat] {
            let (page, said) = shown(&lines, true);
            assert_eq!((page.as_str(), said.text.as_str()), ("ab\n", "ab"));
            assert_eq!(said.figures["done"], true);
        }
    }

    #[test]
    fn thinking_is_set_apart_and_dimmed_for_people_only() {
        let lines = [
            json!({"message": {"content": "", "thinking": "hm"}}),
            json!({"message": {"content": "yes\n"}}),
        ];
        let (page, said) = shown(&lines, true);
        assert_eq!(page, "\x1b[2mThinking...\nhm\n...done thinking.\x1b[0m\n\nyes\n");
        assert_eq!((said.thinking.as_str(), said.text.as_str()), ("hm", "yes\n"));
        assert_eq!(shown(&lines, false).0, "Thinking...\nhm\n...done thinking.\n\nyes\n");
        // An answer that is cut off while it thinks leaves the terminal as it found it.
        assert!(shown(&lines[..1], true).0.contains("\x1b[0m"));
    }

    #[test]
    fn timings_survive_missing_figures() {
        let text = timings(&json!({"eval_count": 10, "eval_duration": 500_000_000u64}));
        assert!(text.contains("eval rate:            20.00 tokens/s\n"), "{text}");
        assert!(text.contains("prompt eval rate:     -\n"), "{text}");
        assert_eq!(timings(&Value::Null).lines().count(), 8);
    }
}
