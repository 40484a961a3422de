//! The domain request: what a client wants, in no dialect. A surface of the server decodes into
//! this; a runner reads it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Who says a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// The person or program that asks.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The word that chat templates use.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// The thinking of an assistant's turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thinking: Option<String>,
    /// The calls of an assistant's turn: `{id, function: {name, arguments: {…}}}`, key order kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<Value>,
    /// Which tool a tool message answers for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_name: Option<String>,
    /// Which call a tool message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A plain message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            thinking: None,
            tool_calls: Vec::new(),
            tool_name: None,
            tool_call_id: None,
        }
    }
}

/// How much a model that can think should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Think {
    /// Not at all.
    Off,
    /// As the model does by itself.
    On,
    /// Little.
    Low,
    /// Some.
    Medium,
    /// Much.
    High,
    /// As much as it can.
    Max,
}

/// What the model is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Input {
    /// A conversation, rendered with the model's chat template.
    Chat {
        /// The turns so far; at least one.
        messages: Vec<Message>,
        /// Tool definitions as the client wrote them, key order kept.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tools: Vec<Value>,
        /// How much to think; `None` is the model's own default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        think: Option<Think>,
    },
    /// Text that is given to the model as it is. Special tokens written in it count, as BOS does
    /// where the model wants it.
    Raw {
        /// The prompt.
        text: String,
    },
    /// Token ids as they are.
    Tokens {
        /// The prompt.
        ids: Vec<u32>,
    },
}

/// How a token is chosen from the logits. The defaults are Ollama's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the likeliest token always.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens; 0 is all.
    pub top_k: u32,
    /// The smallest set of likeliest tokens whose probability reaches this; 1 is all.
    pub top_p: f32,
    /// Tokens at least this many times as likely as the likeliest; 0 is all.
    pub min_p: f32,
    /// Locally typical sampling (Meister et al. 2022); 1 is off.
    pub typical_p: f32,
    /// Divides (or multiplies, when negative) the logits of tokens seen lately; 1 is off.
    pub repeat_penalty: f32,
    /// How many of the last tokens count as seen lately; 0 is none, -1 the whole context.
    pub repeat_last_n: i32,
    /// Subtracted from the logits of tokens seen lately.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens seen lately, once for each time.
    pub frequency_penalty: f32,
    /// Seed of the choice; `None` draws one.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.0,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
        }
    }
}

impl SamplingParams {
    /// The likeliest token always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }
}

/// How urgent a request is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Somebody waits for it.
    #[default]
    Interactive,
    /// Nobody does: it takes what the others leave, and its turn when it has waited long.
    Background,
}

impl Lane {
    /// The lane of that name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "interactive" => Some(Self::Interactive),
            "background" => Some(Self::Background),
            _ => None,
        }
    }
}

/// A request for text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generate {
    /// What the model is given.
    pub input: Input,
    /// How tokens are chosen.
    #[serde(default)]
    pub sampling: SamplingParams,
    /// At most this many tokens; `None` ends at the context's edge or when the model stops.
    #[serde(default)]
    pub max_tokens: Option<u32>,
    /// Texts that end the answer; they are not part of it.
    #[serde(default)]
    pub stop: Vec<String>,
    /// A cap on prompt and answer together, in tokens; `None` is what the runner was loaded with.
    #[serde(default)]
    pub context: Option<u32>,
    /// A chat that does not fit: `true` drops the oldest turns and says so in [`crate::Usage`],
    /// `false` is a fault.
    #[serde(default)]
    pub truncate: bool,
    /// How urgent it is.
    #[serde(default)]
    pub lane: Lane,
}

/// The files of a model as a runner gets them: paths of immutable, leased blobs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ModelFiles {
    /// The weights: one GGUF file, or the shards of one in order; or all files of a model folder
    /// of Hugging Face.
    pub weights: Vec<PathBuf>,
    /// What each of [`ModelFiles::weights`] is called in its folder; empty where they are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// A chat template that replaces the file's own (Jinja text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
}
