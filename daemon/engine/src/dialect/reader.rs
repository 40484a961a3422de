//! The text of an answer, taken apart as it comes: thinking, tool calls, and the rest.

use v4_proto::{Delta, ToolCall};

use super::{ToolFormat, think::Tags};
use crate::sample::Rng;
use crate::text::overlap;

/// Where in an answer the reader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before anything but white space; thinking may begin.
    Start,
    /// In the thinking.
    Thinking,
    /// Between the thinking and the answer, or two calls: white space is dropped.
    Between,
    /// In the answer.
    Answer,
    /// In a tool call.
    Call,
}

/// The reader of one answer.
#[derive(Debug)]
pub struct Reader {
    thinking: Option<&'static Tags>,
    tools: Option<&'static ToolFormat>,
    place: Place,
    /// Text that has not been handed out.
    held: String,
    has_calls: bool,
    /// For the ids of calls.
    rng: Rng,
}

impl Reader {
    /// A reader of what follows `prompt`. It looks for thinking and for calls where their format is
    /// given; `seed` goes into the ids of calls.
    pub(super) fn new(
        thinking: Option<&'static Tags>,
        tools: Option<&'static ToolFormat>,
        prompt: &str,
        seed: u64,
    ) -> Self {
        let begun = thinking.is_some_and(|tags| prompt.trim_end().ends_with(tags.open));
        Self {
            thinking,
            tools,
            place: if begun { Place::Thinking } else { Place::Start },
            held: String::new(),
            has_calls: false,
            rng: Rng::new(seed),
        }
    }

    /// Takes more of the text; gives what is certain.
    pub fn push(&mut self, text: &str) -> Delta {
        let mut delta = Delta::default();
        self.held.push_str(text);
        while self.advance(&mut delta) {}
        delta
    }

    /// The rest, when no more text comes. A call that never ended is one if it can be read as such,
    /// else text.
    pub fn finish(&mut self) -> Delta {
        let mut delta = Delta::default();
        let held = std::mem::take(&mut self.held);
        match (self.place, self.tools) {
            (Place::Thinking, _) => delta.thinking = held,
            (Place::Call, Some(tools)) => self.call(tools, &held, "", &mut delta),
            _ => delta.text = held,
        }
        delta
    }

    /// Whether tools have been called.
    pub fn has_calls(&self) -> bool {
        self.has_calls
    }

    /// Hands out what is certain of the held text; true when there may be more.
    fn advance(&mut self, delta: &mut Delta) -> bool {
        match self.place {
            Place::Start => self.start(),
            Place::Thinking => self.think(delta),
            Place::Between => {
                let dropped = self.held.len() - self.held.trim_start().len();
                self.held.drain(..dropped);
                self.place = if self.held.is_empty() { Place::Between } else { Place::Answer };
                !self.held.is_empty()
            }
            Place::Answer => self.answer(delta),
            Place::Call => self.read_call(delta),
        }
    }

    fn start(&mut self) -> bool {
        let Some(tags) = self.thinking else {
            self.place = Place::Answer;
            return true;
        };
        let text = self.held.trim_start();
        if let Some(rest) = text.strip_prefix(tags.open) {
            self.held = rest.to_owned();
            self.place = Place::Thinking;
        } else if tags.open.starts_with(text) {
            return false;
        } else {
            self.place = Place::Answer;
        }
        true
    }

    fn think(&mut self, delta: &mut Delta) -> bool {
        let Some(tags) = self.thinking else { return false };
        if delta.thinking.is_empty() && self.held.trim().is_empty() {
            return false;
        }
        if let Some((thought, rest)) = self.held.split_once(tags.close) {
            delta.thinking.push_str(thought.trim_end());
            self.held = rest.to_owned();
            self.place = Place::Between;
            return true;
        }
        // White space at the end waits too: it is dropped before the closing tag.
        let certain = self.held.len() - overlap(&self.held, tags.close);
        let certain = self.held[..certain].trim_end().len();
        delta.thinking.extend(self.held.drain(..certain));
        false
    }

    fn answer(&mut self, delta: &mut Delta) -> bool {
        let Some(tools) = self.tools else {
            delta.text.push_str(&std::mem::take(&mut self.held));
            return false;
        };
        if let Some((text, rest)) = self.held.split_once(tools.open) {
            delta.text.push_str(text.trim_end());
            self.held = rest.to_owned();
            self.place = Place::Call;
            return true;
        }
        let certain = self.held.len() - overlap(&self.held, tools.open);
        let certain = self.held[..certain].trim_end().len();
        delta.text.extend(self.held.drain(..certain));
        false
    }

    fn read_call(&mut self, delta: &mut Delta) -> bool {
        let Some(tools) = self.tools else { return false };
        let Some((inner, rest)) = self.held.split_once(tools.close) else { return false };
        let (inner, rest) = (inner.to_owned(), rest.to_owned());
        self.call(tools, &inner, tools.close, delta);
        self.held = rest;
        self.place = Place::Between;
        true
    }

    /// A call, or the text it stands in where it cannot be read as one.
    fn call(&mut self, tools: &ToolFormat, inner: &str, close: &str, delta: &mut Delta) {
        if let Some(call) = (tools.parse)(inner) {
            self.has_calls = true;
            let id = self.id();
            delta.tool_calls.push(ToolCall { id, name: call.name, arguments: call.arguments });
        } else {
            delta.text.extend([tools.open, inner, close]);
        }
    }

    fn id(&mut self) -> String {
        const SIGNS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
        let sign = |_| char::from(SIGNS[self.rng.below(SIGNS.len())]);
        ["call_".to_owned(), (0..8).map(sign).collect()].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Dialect;
    use super::*;

    /// What comes of a text that is pushed `step` bytes (of whole characters) at a time: text,
    /// thinking, and calls as `name(arguments)`.
    fn read(dialect: &Dialect, prompt: &str, text: &str, step: usize) -> (String, String, String) {
        let mut reader = dialect.reader(prompt, true, 1);
        let mut all = Delta::default();
        let mut add = |delta: Delta| {
            all.text.push_str(&delta.text);
            all.thinking.push_str(&delta.thinking);
            all.tool_calls.extend(delta.tool_calls);
        };
        let chars: Vec<char> = text.chars().collect();
        for chunk in chars.chunks(step) {
            add(reader.push(&chunk.iter().collect::<String>()));
        }
        add(reader.finish());
        assert_eq!(reader.has_calls(), !all.tool_calls.is_empty());
        let calls = all.tool_calls.iter().map(|c| format!("{}({})", c.name, c.arguments));
        (all.text, all.thinking, calls.collect::<Vec<_>>().join(" "))
    }

    fn check(template: &str, table: &[(&str, &str, &str, &str, &str)]) {
        let dialect = Dialect::of(template);
        for (prompt, answer, text, thinking, calls) in table {
            for step in [1, 2, 3, 7, 1000] {
                let got = read(&dialect, prompt, answer, step);
                let got = (got.0.as_str(), got.1.as_str(), got.2.as_str());
                assert_eq!(got, (*text, *thinking, *calls), "{answer:?} by {step}");
            }
        }
    }

    #[test]
    fn thinking_is_told_from_the_answer() {
        check(
            "{{ '<think>' }}",
            &[
                ("", "hello", "hello", "", ""),
                ("", "<think>a b</think>c", "c", "a b", ""),
                ("", "\n<think>\na\n\nb\n</think>\n\nc \n", "c \n", "\na\n\nb", ""),
                ("x<think>\n", "a\n</think>\n\nc", "c", "a", ""),
                ("x<think>\n\n</think>\n\n", "c", "c", "", ""),
                ("", "<think>never ends", "", "never ends", ""),
                ("", "<thi", "<thi", "", ""),
                ("", "<thing>", "<thing>", "", ""),
                ("", "a <think>b</think>", "a <think>b</think>", "", ""),
            ],
        );
        check("no such tag", &[("", "<think>a</think>b", "<think>a</think>b", "", "")]);
    }

    #[test]
    fn calls_are_told_from_the_answer() {
        let call = r#"<tool_call>
{"name": "f", "arguments": {"b": 1, "a": "</x>"}}
</tool_call>"#;
        let two = format!("{call}\n{call}");
        let f = r#"f({"b":1,"a":"</x>"})"#;
        let text_call = r#"<tool_call>{"name": "f", "arguments": "{\"b\": 1}"}</tool_call>"#;
        check(
            "<tool_call>",
            &[
                ("", "hello <b> \n", "hello <b> \n", "", ""),
                ("", call, "", "", f),
                ("", &two, "", "", &format!("{f} {f}")),
                ("", &format!("Let me see.\n{call}\n"), "Let me see.", "", f),
                ("", call.trim_end_matches("\n</tool_call>"), "", "", f),
                ("", text_call, "", "", r#"f({"b":1})"#),
                ("", r#"<tool_call>{"name": "f"}</tool_call>"#, "", "", "f({})"),
                ("", "<tool_call>no</tool_call>!", "<tool_call>no</tool_call>!", "", ""),
                ("", "<tool_call>no", "<tool_call>no", "", ""),
            ],
        );
        check("plain", &[("", call, call, "", "")]);
    }

    #[test]
    fn tagged_calls_are_read() {
        let call = "<tool_call>\n<function=f>\n<parameter=a>\nx <y>\nz\n</parameter>\n\
                    <parameter=n>\n2\n</parameter>\n</function>\n</tool_call>";
        check(
            "<tool_call>\n<function=example>\n<parameter=p>",
            &[("", call, "", "", r#"f({"a":"x <y>\nz","n":2})"#)],
        );
    }

    #[test]
    fn without_tools_calls_are_text() {
        let mut reader = Dialect::of("<tool_call>").reader("", false, 1);
        let call = r#"<tool_call>{"name": "f"}</tool_call>"#;
        assert_eq!(reader.push(call).text, call);
    }
}
