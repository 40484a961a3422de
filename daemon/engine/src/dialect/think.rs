//! Thinking between two tags, before the answer.

/// How a family marks its thinking.
#[derive(Debug, PartialEq, Eq)]
pub struct Tags {
    /// Begins it. Some templates write it at the end of the prompt.
    pub open: &'static str,
    /// Ends it.
    pub close: &'static str,
}

/// The tags of most models that think.
pub static THINK: Tags = Tags { open: "<think>", close: "</think>" };
