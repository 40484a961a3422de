//! How a family of models wants a conversation written, and how it writes back.

mod clock;
mod hermes;
mod python_json;
mod reader;
mod tagged;
mod template;
mod think;

pub use reader::Reader;
pub use template::{Template, Variables};

use think::Tags;

/// A tool call as a model wrote it.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The tool.
    pub name: String,
    /// A JSON object.
    pub arguments: serde_json::Value,
}

/// How a family writes tool calls.
#[derive(Debug)]
pub struct ToolFormat {
    /// Begins a call.
    pub open: &'static str,
    /// Ends it.
    pub close: &'static str,
    /// Whether a chat template is of this family.
    pub is_of: fn(&str) -> bool,
    /// The call between the tags, if it is one.
    pub parse: fn(&str) -> Option<Call>,
}

/// The formats of tool calls, each with a file of its own; the first that knows the template
/// counts.
static TOOL_FORMATS: &[&ToolFormat] = &[&hermes::FORMAT, &tagged::FORMAT];

/// The ways to mark thinking; the first whose tag is in the template counts.
static THINKING: &[&Tags] = &[&think::THINK];

/// How the answers to a chat template are to be read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Dialect {
    thinking: Option<&'static Tags>,
    tools: Option<&'static ToolFormat>,
}

impl Dialect {
    /// The dialect of a chat template.
    pub fn of(template: &str) -> Self {
        Self {
            thinking: THINKING.iter().find(|tags| template.contains(tags.open)).copied(),
            tools: TOOL_FORMATS.iter().find(|format| (format.is_of)(template)).copied(),
        }
    }

    /// A reader of the answer to `prompt`; calls are looked for when there are tools to call.
    /// `seed` goes into the ids of calls.
    pub fn reader(&self, prompt: &str, has_tools: bool, seed: u64) -> Reader {
        Reader::new(self.thinking, self.tools.filter(|_| has_tools), prompt, seed)
    }

    /// The tags that an answer is taken apart at. Where the vocabulary has them as control tokens,
    /// they are text here all the same.
    pub fn tags(&self) -> impl Iterator<Item = &'static str> {
        let thinking = self.thinking.into_iter().flat_map(|tags| [tags.open, tags.close]);
        thinking.chain(self.tools.into_iter().flat_map(|format| [format.open, format.close]))
    }
}
