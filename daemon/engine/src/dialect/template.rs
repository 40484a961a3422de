//! A chat template: Jinja text from a model's file, rendered as its makers' tools render it.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind, UndefinedBehavior};
use serde::Serialize;
use v4_proto::{Code, Fault};

use super::{clock, python_json};

/// Instructions that one rendering may take. Templates are strangers' programs: the longest real
/// one needs some 2,000 a message.
const FUEL: u64 = 50_000_000;
/// Macro calls and blocks within one another; real templates need under ten.
const RECURSION: usize = 100;
/// The one template of an environment. The name has no extension, so nothing is HTML-escaped.
const NAME: &str = "chat";

/// What a template is rendered with. Fields are named as templates know them.
#[derive(Debug, Clone, Serialize)]
pub struct Variables<'a> {
    /// The turns.
    pub messages: &'a [serde_json::Value],
    /// Tool definitions, or nothing.
    pub tools: Option<&'a [serde_json::Value]>,
    /// Always nothing; templates test it.
    pub documents: Option<()>,
    /// Whether the prompt ends where the model's turn begins.
    pub add_generation_prompt: bool,
    /// Text of BOS and other special tokens (`bos_token`, …) and settings (`enable_thinking`, …).
    #[serde(flatten)]
    pub extra: &'a serde_json::Map<String, serde_json::Value>,
}

/// A compiled template.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    text: String,
}

impl Template {
    /// Compiles `text`.
    ///
    /// # Errors
    /// A fault that names the line when it is not Jinja.
    pub fn new(text: &str) -> Result<Self, Fault> {
        Self::with_clock(text, || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }

    /// [`Template::new`] with a clock of the caller's own: time since 1970 in UTC.
    fn with_clock(
        text: &str,
        now: impl Fn() -> std::time::Duration + Send + Sync + 'static,
    ) -> Result<Self, Fault> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let mut environment = Environment::new();
        environment.set_syntax(syntax.expect("the default delimiters are valid"));
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_test("iterable", is_iterable);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", move |format: &str| clock::format(format, now()));
        let plain = without_generation_tags(text);
        environment
            .add_template_owned(NAME, plain.clone())
            .map_err(|error| unusable("is not valid Jinja", &error))?;
        Ok(Self { environment, text: plain })
    }

    /// The template's text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The prompt.
    ///
    /// # Errors
    /// [`Code::Invalid`] with the template's own words when it refuses the conversation,
    /// [`Code::Unsupported`] when it does what this build cannot.
    ///
    /// # Panics
    /// Never: the template was added when this was made.
    pub fn render(&self, variables: &Variables<'_>) -> Result<String, Fault> {
        let template = self.environment.get_template(NAME).expect("it was added by this name");
        template.render(Value::from(Serde(variables))).map_err(|error| {
            // What `raise_exception` raised may be wrapped in the errors of blocks around it.
            let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
            while let Some(inner) = cause {
                if let Some(raised) = inner.downcast_ref::<Raised>() {
                    return Fault::invalid(format!("the model's chat template says: {}", raised.0));
                }
                cause = inner.source();
            }
            unusable("cannot be rendered", &error)
        })
    }
}

/// What a template says through `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: &str) -> Result<Value, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raised by the template");
    Err(error.with_source(Raised(message.to_owned())))
}

fn unusable(problem: &str, error: &minijinja::Error) -> Fault {
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    let message = format!("the model's chat template {problem}: {error}{line}");
    Fault::new(Code::Unsupported, message)
}

/// Without the tags `{% generation %}` and `{% endgeneration %}`, which mark the model's own words
/// for training and print nothing.
fn without_generation_tags(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        plain.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |at| at + 2);
        let (tag, after) = tag.split_at(end);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}");
        let word = inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        if matches!(word, "generation" | "endgeneration") {
            // A comment trims the white space around it as the tag does.
            plain.push_str(if inner.starts_with('-') { "{#-" } else { "{#" });
            plain.push_str(if inner.ends_with('-') { "-#}" } else { "#}" });
        } else {
            plain.push_str(tag);
        }
        rest = after;
    }
    plain + rest
}

/// As in Python, nothing is not iterable.
fn is_iterable(value: &Value) -> bool {
    use minijinja::value::ValueKind::{Iterable, Map, Seq, String};
    matches!(value.kind(), Iterable | Map | Seq | String)
}

/// Python's `json.dumps` as a filter, with transformers' defaults.
#[expect(clippy::needless_pass_by_value, reason = "the shape of a filter")]
fn to_json(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let format = python_json::Format::from_kwargs(&options)?;
    options.assert_all_used()?;
    Ok(Value::from(format.write(value)?))
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
