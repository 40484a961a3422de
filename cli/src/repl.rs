//! The chat prompt of `v4 run`: lines in, answers out, `/` commands in between.

use std::path::PathBuf;

use http::Method;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use v4_proto::paths;

use crate::answer::{self, End, Said};
use crate::client::Client;
use crate::cmd::run::Session;
use crate::cmd::show;
use crate::error::Failure;
use crate::output;

const PROMPT: &str = ">>> ";
const CONTINUED: &str = "... ";
const QUOTES: &str = "\"\"\"";

/// Lines that the history keeps.
const HISTORY_LINES: usize = 1000;

const HELP: &str = "\
  /set parameter NAME VALUE    a sampling option, for example: /set parameter temperature 0
  /set system TEXT             instructions for the model, from now on
  /set verbose, /set quiet     print timings after each answer, or not
  /show [PART]                 about the model; PART is license, modelfile, parameters, system or template
  /clear                       forget the conversation
  /bye                         leave
  \"\"\"                          begins and ends a message of several lines
  Ctrl-C                       stops an answer
";

/// Chats until the person leaves.
///
/// # Errors
/// The model cannot be loaded, or the terminal cannot be used. What goes wrong with one answer is
/// shown, and the chat goes on.
pub fn run(client: &Client, runtime: &Runtime, session: Session) -> Result<(), Failure> {
    let load = session.body();
    let loaded = async {
        let mut lines = client.stream("/api/generate", &load).await?;
        while lines.next().await?.is_some() {}
        Ok::<_, Failure>(())
    };
    wait(runtime, loaded)?;
    output::note("Ask anything. /? lists the commands, /bye leaves.");
    let mut keys = Keys::new(client.place().home.join(paths::HISTORY_FILE))?;
    let mut chat = Chat { client, runtime, session, messages: Vec::new() };
    while let Some(text) = read(&mut keys)? {
        match chat.act(parse(&text)) {
            Ok(true) => {}
            Ok(false) => break,
            Err(failure @ (Failure::ReaderLeft | Failure::Output(_))) => return Err(failure),
            // The person's ^C stands on the line: begin a new one.
            Err(Failure::Stopped) => output::note(""),
            Err(failure) => output::note(&format!("error: {failure}")),
        }
    }
    Ok(())
}

/// Does `work`, unless Ctrl-C stops it. All waiting in a chat is done here or in [`answer::ask`]:
/// once one of them has asked for the signal, it ends the program no more.
///
/// # Errors
/// [`Failure::Stopped`], or those of `work`.
fn wait<T>(
    runtime: &Runtime,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    runtime.block_on(async {
        tokio::select! {
            biased;
            Ok(()) = tokio::signal::ctrl_c() => Err(Failure::Stopped),
            done = work => done,
        }
    })
}

/// What came from the keyboard.
enum Typed {
    Line(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D.
    End,
}

/// The keyboard, so that a test can type.
trait Keyboard {
    fn line(&mut self, prompt: &str) -> Result<Typed, Failure>;
    fn remember(&mut self, text: &str);
}

struct Keys {
    editor: Editor<(), FileHistory>,
    history: PathBuf,
}

impl Keys {
    fn new(history: PathBuf) -> Result<Self, Failure> {
        let config = Config::builder()
            .max_history_size(HISTORY_LINES)
            .map_err(terminal)?
            .auto_add_history(false)
            .build();
        let mut editor = Editor::with_config(config).map_err(terminal)?;
        // No history yet, or one that cannot be read: the chat does not need it.
        let _ = editor.load_history(&history);
        Ok(Self { editor, history })
    }
}

impl Keyboard for Keys {
    fn line(&mut self, prompt: &str) -> Result<Typed, Failure> {
        match self.editor.readline(prompt) {
            Ok(line) => Ok(Typed::Line(line)),
            Err(ReadlineError::Interrupted) => Ok(Typed::Interrupted),
            Err(ReadlineError::Eof) => Ok(Typed::End),
            Err(error) => Err(terminal(error)),
        }
    }

    fn remember(&mut self, text: &str) {
        // The history is a comfort: a full disk must not end the chat.
        if self.editor.add_history_entry(text).is_ok_and(|is_new| is_new) {
            let _ = self.editor.append_history(&self.history);
        }
    }
}

fn terminal(error: ReadlineError) -> Failure {
    match error {
        ReadlineError::Io(error) => Failure::Input(error),
        other => Failure::Input(std::io::Error::other(other)),
    }
}

/// The next whole input: a line, or the lines between triple quotes. `None` when the person leaves.
fn read(keys: &mut impl Keyboard) -> Result<Option<String>, Failure> {
    loop {
        let line = match keys.line(PROMPT)? {
            Typed::Line(line) => line,
            Typed::Interrupted => {
                output::note("Use Ctrl-D or /bye to leave.");
                continue;
            }
            Typed::End => return Ok(None),
        };
        let Some(text) = complete(keys, line)? else { continue };
        if !text.trim().is_empty() {
            keys.remember(text.trim_end());
            return Ok(Some(text));
        }
    }
}

/// Reads on while triple quotes are open. `None` when Ctrl-C gave the input up.
fn complete(keys: &mut impl Keyboard, line: String) -> Result<Option<String>, Failure> {
    let Some((head, rest)) = line.split_once(QUOTES) else { return Ok(Some(line)) };
    if !["", "/set system"].contains(&head.trim()) {
        return Ok(Some(line));
    }
    let mut text = head.to_owned();
    let mut rest = rest.to_owned();
    loop {
        if let Some(last) = rest.trim_end().strip_suffix(QUOTES) {
            text.push_str(last);
            return Ok(Some(text));
        }
        text.push_str(&rest);
        text.push('\n');
        rest = match keys.line(CONTINUED)? {
            Typed::Line(line) => line,
            Typed::Interrupted => return Ok(None),
            Typed::End => return Ok(Some(text)),
        };
    }
}

/// What the person wants.
#[derive(Debug, PartialEq)]
enum Wish {
    Say(String),
    Parameter(String, Value),
    System(String),
    Verbose(bool),
    Show(Option<&'static str>),
    Clear,
    Help,
    Bye,
    Wrong(String),
}

fn parse(text: &str) -> Wish {
    let text = text.trim();
    let (command, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    match (command, rest.trim()) {
        ("/bye" | "/exit", _) => Wish::Bye,
        ("/?" | "/help", _) => Wish::Help,
        ("/clear", _) => Wish::Clear,
        ("/show", part) => parse_show(part),
        ("/set", what) => parse_set(what),
        (command, _) if is_command(command) => {
            Wish::Wrong(format!("{command} is not a command; /? lists them"))
        }
        _ => Wish::Say(text.to_owned()),
    }
}

/// Whether a word looks like a command, and not like a path that somebody asks about.
fn is_command(word: &str) -> bool {
    word.strip_prefix('/')
        .is_some_and(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphabetic()))
}

fn parse_show(part: &str) -> Wish {
    const PARTS: [&str; 5] = ["license", "modelfile", "parameters", "system", "template"];
    match part {
        "" | "info" => Wish::Show(None),
        part => match PARTS.into_iter().find(|known| *known == part) {
            Some(part) => Wish::Show(Some(part)),
            None => {
                Wish::Wrong(format!("there is no {part} to show; say one of {}", PARTS.join(", ")))
            }
        },
    }
}

fn parse_set(what: &str) -> Wish {
    let (what, rest) = what.split_once(char::is_whitespace).unwrap_or((what, ""));
    match (what, rest.trim()) {
        ("verbose", "") => Wish::Verbose(true),
        ("quiet", "") => Wish::Verbose(false),
        ("system", text) => Wish::System(text.trim_matches('"').to_owned()),
        ("parameter", pair) => match pair.split_once(char::is_whitespace) {
            Some((name, value)) => Wish::Parameter(name.to_owned(), value_of(name, value.trim())),
            None => Wish::Wrong("write it as /set parameter NAME VALUE".to_owned()),
        },
        _ => Wish::Wrong("only parameter, system, verbose and quiet can be set; see /?".to_owned()),
    }
}

/// A parameter's value as the API types it. The daemon knows which type each wants and says so.
fn value_of(name: &str, text: &str) -> Value {
    let unquoted = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    if name == "stop" {
        return json!([unquoted.unwrap_or(text)]);
    }
    match (unquoted, serde_json::from_str::<Value>(text)) {
        (None, Ok(value @ (Value::Number(_) | Value::Bool(_)))) => value,
        _ => Value::from(unquoted.unwrap_or(text)),
    }
}

struct Chat<'a> {
    client: &'a Client,
    runtime: &'a Runtime,
    session: Session,
    messages: Vec<Value>,
}

impl Chat<'_> {
    /// Does what was wished. `false` ends the chat.
    fn act(&mut self, wish: Wish) -> Result<bool, Failure> {
        match wish {
            Wish::Bye => return Ok(false),
            Wish::Say(text) => self.say(&text)?,
            Wish::Parameter(name, value) => {
                output::note(&format!("Set {name} to {value}."));
                self.session.options.insert(name, value);
            }
            Wish::System(text) => {
                self.session.system = Some(text).filter(|text| !text.is_empty());
                output::note("Set the instructions.");
            }
            Wish::Verbose(is_verbose) => self.session.is_verbose = is_verbose,
            Wish::Show(part) => self.show(part)?,
            Wish::Clear => {
                self.messages.clear();
                output::note("Forgot the conversation.");
            }
            Wish::Help => output::print(HELP)?,
            Wish::Wrong(why) => output::note(&why),
        }
        Ok(true)
    }

    fn say(&mut self, text: &str) -> Result<(), Failure> {
        self.messages.push(json!({ "role": "user", "content": text }));
        let body = self.body();
        match self.runtime.block_on(answer::ask(self.client, "/api/chat", &body)) {
            Ok((said, end)) => {
                self.keep(&said);
                if end == End::Whole && self.session.is_verbose {
                    output::note(&format!("\n{}", answer::timings(&said.figures)));
                }
                output::print("\n")
            }
            Err(failure) => {
                // A question without an answer would confuse the next one.
                self.messages.pop();
                Err(failure)
            }
        }
    }

    fn body(&self) -> Value {
        let system = self.session.system.as_ref();
        let system = system.map(|text| json!({ "role": "system", "content": text }));
        let messages: Vec<Value> =
            system.into_iter().chain(self.messages.iter().cloned()).collect();
        let mut body = self.session.body();
        body["messages"] = messages.into();
        body
    }

    /// Makes the answer part of the conversation, also one that was stopped half way.
    fn keep(&mut self, said: &Said) {
        let mut message = json!({ "role": "assistant", "content": said.text });
        if !said.thinking.is_empty() {
            message["thinking"] = said.thinking.as_str().into();
        }
        if !said.tool_calls.is_empty() {
            message["tool_calls"] = said.tool_calls.clone().into();
        }
        self.messages.push(message);
    }

    fn show(&self, part: Option<&'static str>) -> Result<(), Failure> {
        let body = json!({ "model": self.session.name.to_string() });
        let call = self.client.call(Method::POST, "/api/show", Some(&body));
        let shown = wait(self.runtime, call)?;
        let text = match part {
            None => show::overview(&shown, false),
            Some(part) => show::part(&shown, part),
        };
        if text.is_empty() {
            output::note(&format!("This model has no {}.", part.unwrap_or("details")));
            return Ok(());
        }
        output::print(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Types what it was given, then Ctrl-D. `None` is Ctrl-C.
    struct Script(Vec<Option<&'static str>>, Vec<String>);

    impl Script {
        fn new(lines: &[Option<&'static str>]) -> Self {
            Self(lines.iter().rev().copied().collect(), Vec::new())
        }
    }

    impl Keyboard for Script {
        fn line(&mut self, _prompt: &str) -> Result<Typed, Failure> {
            Ok(match self.0.pop() {
                None => Typed::End,
                Some(None) => Typed::Interrupted,
                Some(Some(line)) => Typed::Line(line.to_owned()),
            })
        }

        fn remember(&mut self, text: &str) {
            self.1.push(text.to_owned());
        }
    }

    #[test]
    fn inputs_are_lines_or_quoted_blocks() {
        let mut script = Script::new(&[
            Some(""),
            Some("hello"),
            None,
            Some("\"\"\"first"),
            Some("  second\"\"\""),
            Some("\"\"\"one line\"\"\""),
            Some("\"\"\"given up"),
            None,
            Some("/set system \"\"\"be"),
            Some("brief"),
            Some("\"\"\""),
            Some("say \"\"\" is fine"),
        ]);
        let mut inputs = Vec::new();
        while let Some(input) = read(&mut script).expect("a script does not fail") {
            inputs.push(input);
        }
        let expected = [
            "hello",
            "first\n  second",
            "one line",
            "/set system be\nbrief\n",
            "say \"\"\" is fine",
        ];
        assert_eq!(inputs, expected);
        assert_eq!(script.1.len(), expected.len());
    }

    #[test]
    fn wishes_are_understood() {
        let table = [
            ("hi there", Wish::Say("hi there".into())),
            ("/bye", Wish::Bye),
            ("/usr/bin is what?", Wish::Say("/usr/bin is what?".into())),
            ("/byee", Wish::Wrong("/byee is not a command; /? lists them".into())),
            ("/set parameter seed 7", Wish::Parameter("seed".into(), json!(7))),
            ("/set parameter temperature 0.5", Wish::Parameter("temperature".into(), json!(0.5))),
            ("/set parameter stop \"7\"", Wish::Parameter("stop".into(), json!(["7"]))),
            ("/set parameter x [1]", Wish::Parameter("x".into(), json!("[1]"))),
            ("/set system \"be brief\"", Wish::System("be brief".into())),
            ("/set verbose", Wish::Verbose(true)),
            ("/show", Wish::Show(None)),
            ("/show template", Wish::Show(Some("template"))),
            ("/clear", Wish::Clear),
            ("/?", Wish::Help),
        ];
        for (text, wish) in table {
            assert_eq!(parse(text), wish, "{text}");
        }
        for text in ["/set", "/set parameter seed", "/set nothing", "/show nothing"] {
            assert!(matches!(parse(text), Wish::Wrong(_)), "{text}");
        }
    }
}
