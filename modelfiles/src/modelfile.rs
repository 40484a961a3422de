//! [`Modelfile`]: all lines of one, and what they say together.

use std::fmt;

use crate::{
    directive::{Directive, MessageRole},
    parameter::{self, Parameter},
    parse::{self, ParseError, Problem},
};

/// A Modelfile: its directives in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Modelfile {
    /// The directives, in the order of the file.
    pub directives: Vec<Directive>,
}

/// A file that a Modelfile is made of, with what the lines behind it say of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File<'a> {
    /// The word before it: `FROM` (weights), `ADAPTER` or `DRAFT`.
    pub kind: &'static str,
    /// What the line says: a model's name, a path, a file name.
    pub from: &'a str,
    /// The digest it must have.
    pub digest: Option<&'a str>,
    /// Its bytes.
    pub size: Option<u64>,
    /// Where it may be pulled from, best first; each is one place or several that are joined.
    pub sources: Vec<&'a [String]>,
}

impl Modelfile {
    /// Reads a Modelfile.
    ///
    /// # Errors
    /// [`ParseError`] with the line.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let lines = parse::lines(text)?;
        let mut has_file = false;
        for (line, directive) in &lines {
            has_file |= file_kind(directive).is_some();
            let is_about_file = matches!(
                directive,
                Directive::Source(_) | Directive::Digest(_) | Directive::Size(_)
            );
            if is_about_file && !has_file {
                return Err(ParseError { line: *line, problem: Problem::NoFile });
            }
        }
        let last = lines.last().map_or(1, |(line, _)| *line);
        let directives: Vec<Directive> =
            lines.into_iter().map(|(_, directive)| directive).collect();
        if !directives.iter().any(|directive| matches!(directive, Directive::From(_))) {
            return Err(ParseError { line: last, problem: Problem::NoFrom });
        }
        Ok(Self { directives })
    }

    /// The first `FROM`; empty only in a Modelfile that was not parsed.
    pub fn from(&self) -> &str {
        let first = self.directives.iter().find_map(|directive| match directive {
            Directive::From(text) => Some(text.as_str()),
            _ => None,
        });
        first.unwrap_or_default()
    }

    /// The files it is made of, in order.
    pub fn files(&self) -> Vec<File<'_>> {
        let mut files: Vec<File<'_>> = Vec::new();
        for directive in &self.directives {
            if let Some((kind, from)) = file_kind(directive) {
                files.push(File { kind, from, digest: None, size: None, sources: Vec::new() });
                continue;
            }
            let Some(file) = files.last_mut() else { continue };
            match directive {
                Directive::Source(parts) => file.sources.push(parts),
                Directive::Digest(digest) => file.digest = Some(digest),
                Directive::Size(size) => file.size = Some(*size),
                _ => {}
            }
        }
        files
    }

    /// The parameters, in order.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.directives.iter().filter_map(|directive| match directive {
            Directive::Parameter(parameter) => Some(parameter),
            _ => None,
        })
    }

    /// The parameters as the JSON object that a manifest's `params` role holds, or `None` where
    /// there are none.
    pub fn params_json(&self) -> Option<String> {
        parameter::to_json(self.parameters())
    }

    /// The messages as the JSON list that a manifest's `messages` role holds, or `None` where there
    /// are none.
    pub fn messages_json(&self) -> Option<String> {
        let messages: Vec<String> = self
            .messages()
            .map(|(role, content)| {
                let content = parameter::text_to_json(content);
                format!("{{\"role\":\"{}\",\"content\":{content}}}", role.as_str())
            })
            .collect();
        (!messages.is_empty()).then(|| format!("[{}]", messages.join(",")))
    }

    /// The turns that every conversation starts with.
    pub fn messages(&self) -> impl Iterator<Item = (MessageRole, &str)> {
        self.directives.iter().filter_map(|directive| match directive {
            Directive::Message { role, content } => Some((*role, content.as_str())),
            _ => None,
        })
    }

    /// The chat template; of several the last.
    pub fn template(&self) -> Option<&str> {
        self.directives.iter().rev().find_map(|directive| match directive {
            Directive::Template(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// The default system message; of several the last.
    pub fn system(&self) -> Option<&str> {
        self.directives.iter().rev().find_map(|directive| match directive {
            Directive::System(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// The licences.
    pub fn licenses(&self) -> impl Iterator<Item = &str> {
        self.directives.iter().filter_map(|directive| match directive {
            Directive::License(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// The least version that can run it.
    pub fn requires(&self) -> Option<&str> {
        self.directives.iter().rev().find_map(|directive| match directive {
            Directive::Requires(text) => Some(text.as_str()),
            _ => None,
        })
    }
}

impl fmt::Display for Modelfile {
    /// A line a directive. What was parsed reads back the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.directives.iter().try_for_each(|directive| writeln!(f, "{directive}"))
    }
}

/// The word and value of a directive that names a file.
fn file_kind(directive: &Directive) -> Option<(&'static str, &str)> {
    match directive {
        Directive::From(text) => Some(("FROM", text)),
        Directive::Adapter(text) => Some(("ADAPTER", text)),
        Directive::Draft(text) => Some(("DRAFT", text)),
        _ => None,
    }
}
