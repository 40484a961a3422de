//! What a line of a Modelfile can say. [`WORDS`] is the one table of directives.

use std::{fmt, str::FromStr};

use crate::{parameter::Parameter, parse::Problem};

/// Who says a message that a model starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MessageRole {
    /// Instructions.
    System,
    /// The person who asks.
    User,
    /// The model.
    Assistant,
}

impl MessageRole {
    const ALL: [Self; 3] = [Self::System, Self::User, Self::Assistant];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One line of a Modelfile, or several where a value goes over lines.
#[derive(Debug, Clone, PartialEq)]
pub enum Directive {
    /// The model this one is made of: a name, or a file.
    From(String),
    /// A low-rank adapter.
    Adapter(String),
    /// A draft model for speculative decoding.
    Draft(String),
    /// A default parameter.
    Parameter(Parameter),
    /// A chat template that replaces the file's own.
    Template(String),
    /// The default system message.
    System(String),
    /// The text of a licence; may be said again.
    License(String),
    /// A turn that every conversation starts with; may be said again.
    Message {
        /// Who says it.
        role: MessageRole,
        /// What.
        content: String,
    },
    /// The name of a built-in renderer.
    Renderer(String),
    /// The name of a built-in parser.
    Parser(String),
    /// The least version that can run it.
    Requires(String),
    /// Where the file before it may be pulled from: one place, or several whose bytes are joined;
    /// may be said again, best first.
    Source(Vec<String>),
    /// The digest of the file before it: `sha256:` and 64 hexadecimal digits.
    Digest(String),
    /// The bytes of the file before it.
    Size(u64),
}

/// How a directive reads its value.
type Read = fn(&str) -> Result<Directive, Problem>;

/// Every directive: its word, and how it is read.
const WORDS: [(&str, Read); 14] = [
    ("FROM", |text| filled(text).map(Directive::From)),
    ("ADAPTER", |text| filled(text).map(Directive::Adapter)),
    ("DRAFT", |text| filled(text).map(Directive::Draft)),
    ("PARAMETER", |text| {
        let (name, value) = pair(text)?;
        Parameter::parse(name, value).map(Directive::Parameter)
    }),
    ("TEMPLATE", |text| Ok(Directive::Template(text.to_owned()))),
    ("SYSTEM", |text| Ok(Directive::System(text.to_owned()))),
    ("LICENSE", |text| Ok(Directive::License(text.to_owned()))),
    ("MESSAGE", |text| {
        let (word, content) = pair(text)?;
        let role = MessageRole::ALL.into_iter().find(|role| role.as_str() == word);
        let role = role.ok_or(Problem::Role)?;
        Ok(Directive::Message { role, content: content.to_owned() })
    }),
    ("RENDERER", |text| filled(text).map(Directive::Renderer)),
    ("PARSER", |text| filled(text).map(Directive::Parser)),
    ("REQUIRES", |text| version(text).map(Directive::Requires)),
    ("SOURCE", |text| {
        let parts = filled(text)?.split_whitespace().map(str::to_owned).collect();
        Ok(Directive::Source(parts))
    }),
    ("DIGEST", |text| digest(text).map(Directive::Digest)),
    ("SIZE", |text| text.trim().parse().map(Directive::Size).map_err(|_| Problem::Size)),
];

/// The words of all directives, for the message about one that is not.
pub(crate) fn words() -> String {
    WORDS.map(|(word, _)| word).join(", ")
}

/// Whether the first word of the value stands before the text that may be quoted.
pub(crate) fn has_name(word: &str) -> bool {
    word.eq_ignore_ascii_case("PARAMETER") || word.eq_ignore_ascii_case("MESSAGE")
}

/// Reads the directive of a word. Letter case does not count.
pub(crate) fn read(word: &str, value: &str) -> Result<Directive, Problem> {
    let found = WORDS.iter().find(|entry| entry.0.eq_ignore_ascii_case(word));
    let (_, read) = found.ok_or_else(|| Problem::Word(word.chars().take(40).collect()))?;
    read(value)
}

/// A value that may not be empty.
fn filled(text: &str) -> Result<String, Problem> {
    let text = text.trim();
    if text.is_empty() { Err(Problem::Empty) } else { Ok(text.to_owned()) }
}

/// A word, and what follows the white space after it.
fn pair(text: &str) -> Result<(&str, &str), Problem> {
    let (name, value) = text.split_once(' ').ok_or(Problem::Empty)?;
    if name.is_empty() { Err(Problem::Empty) } else { Ok((name, value)) }
}

/// `x.y.z`, with a `v` before it or without.
fn version(text: &str) -> Result<String, Problem> {
    let text = filled(text)?;
    let numbers: Vec<&str> = text.trim_start_matches('v').split('.').collect();
    let is_number = |part: &&str| u32::from_str(part).is_ok();
    if numbers.len() == 3 && numbers.iter().all(is_number) {
        Ok(text)
    } else {
        Err(Problem::Version)
    }
}

fn digest(text: &str) -> Result<String, Problem> {
    let text = filled(text)?;
    let hex = text.strip_prefix("sha256:").ok_or(Problem::Digest)?;
    if hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        Ok(text)
    } else {
        Err(Problem::Digest)
    }
}

impl fmt::Display for Directive {
    /// Text that reads back as the same directive.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::From(text) => write!(f, "FROM {}", Quoted(text)),
            Self::Adapter(text) => write!(f, "ADAPTER {}", Quoted(text)),
            Self::Draft(text) => write!(f, "DRAFT {}", Quoted(text)),
            Self::Parameter(Parameter { name, value }) => {
                write!(f, "PARAMETER {name} {}", Quoted(&value.to_string()))
            }
            Self::Template(text) => write!(f, "TEMPLATE {}", Quoted(text)),
            Self::System(text) => write!(f, "SYSTEM {}", Quoted(text)),
            Self::License(text) => write!(f, "LICENSE {}", Quoted(text)),
            Self::Message { role, content } => {
                write!(f, "MESSAGE {} {}", role.as_str(), Quoted(content))
            }
            Self::Renderer(text) => write!(f, "RENDERER {}", Quoted(text)),
            Self::Parser(text) => write!(f, "PARSER {}", Quoted(text)),
            Self::Requires(text) => write!(f, "REQUIRES {text}"),
            Self::Source(parts)
                if parts.len() > 1 && !parts.iter().any(|part| part.contains('"')) =>
            {
                write!(f, "SOURCE \"\"\"\n{}\n\"\"\"", parts.join("\n"))
            }
            Self::Source(parts) => write!(f, "SOURCE {}", Quoted(&parts.join(" "))),
            Self::Digest(text) => write!(f, "DIGEST {text}"),
            Self::Size(bytes) => write!(f, "SIZE {bytes}"),
        }
    }
}

/// A value as it must be written so that it reads back the same: bare where that is enough.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(text) = self;
        let is_bare = !text.is_empty()
            && text.trim() == *text
            && !text.starts_with('"')
            && !text.contains(['\n', '\r']);
        if is_bare { f.write_str(text) } else { write!(f, "\"\"\"{text}\"\"\"") }
    }
}
