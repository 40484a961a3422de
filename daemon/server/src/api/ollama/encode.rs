//! Answers as Ollama's clients read them. Key order, omitted fields and times are part of the
//! contract; `tests` beside this file are its transcripts.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use v4_proto::{Delta, Fault, Finish, ToolCall};

use crate::{
    api::{Encode, End, Settled, bytes, clock, line, ollama::STREAM_TYPE},
    error,
};

/// Which endpoint's frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// `/api/generate`: text in `response`.
    Generate,
    /// `/api/chat`: text in `message`.
    Chat,
}

/// Writes one answer.
#[derive(Debug)]
pub struct Encoder {
    shape: Shape,
    /// The model's name as the client wrote it; every frame repeats it.
    model: String,
    /// Calls written so far; each call has its index in the whole answer.
    n_calls: usize,
}

/// One object of an answer. What is `None` or zero is left out.
#[derive(Serialize)]
struct Frame<'a> {
    model: &'a str,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response: Option<&'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    thinking: &'a str,
    done: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    done_reason: Option<&'static str>,
    #[serde(flatten)]
    cost: Cost,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    thinking: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call<'a>>,
}

#[derive(Serialize)]
struct Call<'a> {
    id: &'a str,
    function: Function<'a>,
}

#[derive(Serialize)]
struct Function<'a> {
    index: usize,
    name: &'a str,
    arguments: &'a Value,
}

/// What an answer cost: counts, and times in nanoseconds.
#[derive(Serialize, Default)]
struct Cost {
    #[serde(skip_serializing_if = "is_zero")]
    total_duration: u64,
    #[serde(skip_serializing_if = "is_zero")]
    load_duration: u64,
    #[serde(skip_serializing_if = "is_zero")]
    prompt_eval_count: u64,
    #[serde(skip_serializing_if = "is_zero")]
    prompt_eval_duration: u64,
    #[serde(skip_serializing_if = "is_zero")]
    eval_count: u64,
    #[serde(skip_serializing_if = "is_zero")]
    eval_duration: u64,
    /// v4's own: tokens of the prompt that were cut off because it did not fit the context. A cut
    /// is never silent.
    #[serde(skip_serializing_if = "is_zero")]
    prompt_dropped_count: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands out a reference")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl From<&End> for Cost {
    fn from(end: &End) -> Self {
        let usage = end.done.usage;
        Self {
            total_duration: end.total_ns,
            load_duration: end.load_ns,
            prompt_eval_count: usage.prompt_tokens.into(),
            prompt_eval_duration: usage.prompt_ns,
            eval_count: usage.completion_tokens.into(),
            eval_duration: usage.completion_ns,
            prompt_dropped_count: usage.sent_tokens.saturating_sub(usage.prompt_tokens).into(),
        }
    }
}

impl Encoder {
    /// For one answer of `model` as the client wrote it.
    pub fn new(shape: Shape, model: String) -> Self {
        Self { shape, model, n_calls: 0 }
    }

    /// A frame with some of the answer; `calls` are written with the next indices.
    fn frame<'a>(&'a self, text: &'a str, thinking: &'a str, now: Timestamp) -> Frame<'a> {
        let mut frame = Frame {
            model: &self.model,
            created_at: clock::utc(now),
            message: None,
            response: None,
            thinking: "",
            done: false,
            done_reason: None,
            cost: Cost::default(),
        };
        match self.shape {
            Shape::Generate => {
                frame.response = Some(text);
                frame.thinking = thinking;
            }
            Shape::Chat => {
                let tool_calls = Vec::new();
                frame.message =
                    Some(Message { role: "assistant", content: text, thinking, tool_calls });
            }
        }
        frame
    }

    fn calls<'a>(&self, calls: &'a [ToolCall]) -> Vec<Call<'a>> {
        let call = |(i, call): (usize, &'a ToolCall)| Call {
            id: &call.id,
            function: Function {
                index: self.n_calls + i,
                name: &call.name,
                arguments: &call.arguments,
            },
        };
        calls.iter().enumerate().map(call).collect()
    }
}

/// The word for an end. A call of tools is an ordinary stop here.
fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop | Finish::ToolCalls => "stop",
        Finish::Length => "length",
        Finish::Cancelled => "cancelled",
    }
}

impl Encode for Encoder {
    fn stream_type(&self) -> &'static str {
        STREAM_TYPE
    }

    fn delta(&mut self, delta: Delta, now: Timestamp) -> Vec<u8> {
        let mut out = Vec::new();
        if !delta.text.is_empty() || !delta.thinking.is_empty() {
            out = line(&self.frame(&delta.text, &delta.thinking, now));
        }
        if self.shape == Shape::Chat && !delta.tool_calls.is_empty() {
            let mut frame = self.frame("", "", now);
            if let Some(message) = &mut frame.message {
                message.tool_calls = self.calls(&delta.tool_calls);
            }
            out.extend(line(&frame));
            self.n_calls += delta.tool_calls.len();
        }
        out
    }

    fn end(&mut self, end: &End, now: Timestamp) -> Vec<u8> {
        let mut frame = self.frame("", "", now);
        frame.done = true;
        frame.done_reason = Some(reason(end.done.finish));
        frame.cost = Cost::from(end);
        line(&frame)
    }

    fn failed(&mut self, fault: &Fault) -> Vec<u8> {
        line(&error::ollama_body(fault))
    }

    fn whole(&mut self, all: Delta, end: &End, now: Timestamp) -> Vec<u8> {
        let mut frame = self.frame(&all.text, &all.thinking, now);
        if let Some(message) = &mut frame.message {
            message.tool_calls = self.calls(&all.tool_calls);
        }
        frame.done = true;
        frame.done_reason = Some(reason(end.done.finish));
        frame.cost = Cost::from(end);
        bytes(&frame)
    }

    fn settled(&mut self, settled: Settled, now: Timestamp) -> Vec<u8> {
        let mut frame = self.frame("", "", now);
        frame.done = true;
        frame.done_reason = Some(match settled {
            Settled::Loaded => "load",
            Settled::Unloaded => "unload",
        });
        bytes(&frame)
    }
}
