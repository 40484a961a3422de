//! The domain answer: what a runner says while it works on a request, in no dialect.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Fault;

/// A call of a tool that the model asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// `call_` and 8 characters of [a-z0-9] where the model gives none.
    pub id: String,
    /// The tool's name.
    pub name: String,
    /// A JSON object, key order kept.
    pub arguments: Value,
}

/// More of the answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// Text of the answer: whole characters, stop strings taken out.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Text of the model's thinking.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub thinking: String,
    /// Calls that are complete.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it, or a stop string did.
    Stop,
    /// `max_tokens` or the context's edge.
    Length,
    /// The model asked for tools.
    ToolCalls,
    /// The client left, or somebody stopped it.
    Cancelled,
}

/// What an answer cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt that the model read, cached ones counted in.
    pub prompt_tokens: u32,
    /// Of these, how many came from the prefix cache.
    pub cached_tokens: u32,
    /// Tokens of the prompt as it was sent: more than `prompt_tokens` when the oldest turns were
    /// dropped.
    pub sent_tokens: u32,
    /// Tokens of the answer.
    pub completion_tokens: u32,
    /// Time spent on the prompt, in nanoseconds.
    pub prompt_ns: u64,
    /// Time spent on the answer, in nanoseconds.
    pub completion_ns: u64,
}

/// The end of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Why it ended.
    pub finish: Finish,
    /// What it cost.
    pub usage: Usage,
}

/// One step of an answer. A stream is any number of deltas, then exactly one `Done` or `Failed`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// More of the answer.
    Delta(Delta),
    /// The end.
    Done(Done),
    /// The end, for a reason that is not the model's.
    Failed(Fault),
}
