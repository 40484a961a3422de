//! Answers as OpenAI's clients read them.

use jiff::Timestamp;
use serde::Serialize;
use v4_proto::{Delta, Fault, Finish, ToolCall, Usage};

use crate::{
    api::{Encode, End, Settled, bytes, openai::STREAM_TYPE},
    error,
};

/// What all pieces of an answer say.
#[derive(Debug)]
pub struct Head {
    /// The answer's name.
    pub id: String,
    /// Seconds since 1970.
    pub created: i64,
    /// The model's name as the client wrote it.
    pub model: String,
    /// Whether a stream ends with a chunk that says what it cost.
    pub include_usage: bool,
}

/// Writes one answer.
#[derive(Debug)]
pub struct Encoder {
    head: Head,
    /// Whether the first chunk, which says the role, is out.
    began: bool,
    /// Calls written so far; each call has its index in the whole answer.
    n_calls: usize,
}

/// A piece of an answer, or all of it.
#[derive(Debug, Serialize)]
pub struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Cost>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    message: Said<'a>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Said<'a>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize, Default)]
struct Said<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call<'a>>,
}

#[derive(Serialize)]
struct Call<'a> {
    id: &'a str,
    index: usize,
    #[serde(rename = "type")]
    ty: &'static str,
    function: Function<'a>,
}

#[derive(Serialize)]
struct Function<'a> {
    name: &'a str,
    /// The arguments as text, whole.
    arguments: String,
}

/// What an answer cost.
#[derive(Debug, Serialize)]
pub struct Cost {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
}

#[derive(Debug, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
    /// v4's own: tokens of the prompt that were cut off because it did not fit the context. A cut
    /// is never silent.
    #[serde(skip_serializing_if = "Option::is_none")]
    dropped_tokens: Option<u32>,
}

impl From<Usage> for Cost {
    fn from(usage: Usage) -> Self {
        let dropped = usage.sent_tokens.saturating_sub(usage.prompt_tokens);
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: PromptDetails {
                cached_tokens: usage.cached_tokens,
                dropped_tokens: (dropped > 0).then_some(dropped),
            },
        }
    }
}

impl Head {
    /// `choices` as a piece, or an answer that cost `usage`.
    pub fn envelope<C>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Usage>,
    ) -> Envelope<'_, C> {
        Envelope {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: "fp_v4",
            choices,
            usage: usage.map(Cost::from),
        }
    }

    /// The end of a stream.
    pub fn last(&self, object: &'static str, usage: Usage) -> Vec<u8> {
        let mut out = Vec::new();
        if self.include_usage {
            out.extend(event(&self.envelope::<()>(object, Vec::new(), Some(usage))));
        }
        out.extend(b"data: [DONE]\n\n");
        out
    }
}

impl Encoder {
    /// For one answer of `model` as the client wrote it.
    pub fn new(id: u64, created: i64, model: String, include_usage: bool) -> Self {
        let id = format!("chatcmpl-{id}");
        Self { head: Head { id, created, model, include_usage }, began: false, n_calls: 0 }
    }

    /// One event with a piece of the answer; the first one says the role.
    fn chunk(&mut self, mut said: Said<'_>, finish_reason: Option<&'static str>) -> Vec<u8> {
        if !self.began {
            self.began = true;
            said.role = Some("assistant");
            said.content = said.content.or(Some(""));
        }
        let choice = ChunkChoice { index: 0, delta: said, finish_reason };
        event(&self.head.envelope(CHUNK, vec![choice], None))
    }
}

/// The `object` of a piece of an answer.
const CHUNK: &str = "chat.completion.chunk";

fn calls<'a>(calls: &'a [ToolCall], first: usize) -> Vec<Call<'a>> {
    let call = |(i, call): (usize, &'a ToolCall)| Call {
        id: &call.id,
        index: first + i,
        ty: "function",
        function: Function { name: &call.name, arguments: call.arguments.to_string() },
    };
    calls.iter().enumerate().map(call).collect()
}

/// One server-sent event.
pub fn event(value: &impl Serialize) -> Vec<u8> {
    let mut out = b"data: ".to_vec();
    out.extend(bytes(value));
    out.extend(b"\n\n");
    out
}

/// The end of an answer where nothing was asked. These surfaces always ask for text; an empty
/// answer is what is left to say.
pub fn nothing() -> End {
    let done = v4_proto::Done { finish: Finish::Stop, usage: Usage::default() };
    End { done, load_ns: 0, total_ns: 0 }
}

/// Why it ended; a call of tools replaces only an ordinary stop.
pub fn reason(finish: Finish, n_calls: usize) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::ToolCalls => "tool_calls",
        Finish::Stop if n_calls > 0 => "tool_calls",
        Finish::Stop | Finish::Cancelled => "stop",
    }
}

impl Encode for Encoder {
    fn stream_type(&self) -> &'static str {
        STREAM_TYPE
    }

    fn delta(&mut self, delta: Delta, _now: Timestamp) -> Vec<u8> {
        let mut out = Vec::new();
        if !delta.thinking.is_empty() {
            let reasoning = Some(delta.thinking.as_str());
            out.extend(self.chunk(Said { reasoning, ..Said::default() }, None));
        }
        if !delta.text.is_empty() {
            let content = Some(delta.text.as_str());
            out.extend(self.chunk(Said { content, ..Said::default() }, None));
        }
        if !delta.tool_calls.is_empty() {
            let tool_calls = calls(&delta.tool_calls, self.n_calls);
            self.n_calls += tool_calls.len();
            out.extend(self.chunk(Said { tool_calls, ..Said::default() }, None));
        }
        out
    }

    fn end(&mut self, end: &End, _now: Timestamp) -> Vec<u8> {
        let mut out = Vec::new();
        if !self.began {
            out.extend(self.chunk(Said::default(), None));
        }
        let reason = reason(end.done.finish, self.n_calls);
        out.extend(self.chunk(Said::default(), Some(reason)));
        out.extend(self.head.last(CHUNK, end.done.usage));
        out
    }

    fn failed(&mut self, fault: &Fault) -> Vec<u8> {
        event(&error::openai_body(fault))
    }

    fn whole(&mut self, all: Delta, end: &End, _now: Timestamp) -> Vec<u8> {
        let message = Said {
            role: Some("assistant"),
            content: Some(&all.text),
            reasoning: (!all.thinking.is_empty()).then_some(all.thinking.as_str()),
            tool_calls: calls(&all.tool_calls, 0),
        };
        let finish_reason = reason(end.done.finish, all.tool_calls.len());
        let choice = Choice { index: 0, message, finish_reason };
        bytes(&self.head.envelope("chat.completion", vec![choice], Some(end.done.usage)))
    }

    fn settled(&mut self, _settled: Settled, now: Timestamp) -> Vec<u8> {
        self.whole(Delta::default(), &nothing(), now)
    }
}
