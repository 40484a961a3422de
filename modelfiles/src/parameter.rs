//! Parameters and their types. [`TYPES`] is the one table.

use std::fmt;

use crate::parse::Problem;

/// The value of a parameter.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// Yes or no.
    Bool(bool),
    /// A text.
    Text(String),
}

/// A parameter with its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its value, of the type that the name asks for.
    pub value: Value,
}

/// What a parameter's value must be.
#[derive(Debug, Clone, Copy)]
enum Type {
    Int,
    Float,
    Bool,
    Text,
}

/// Every parameter that may be written, those included that Ollama once had and now passes over.
const TYPES: [(&str, Type); 29] = [
    ("num_keep", Type::Int),
    ("seed", Type::Int),
    ("num_predict", Type::Int),
    ("top_k", Type::Int),
    ("top_p", Type::Float),
    ("min_p", Type::Float),
    ("typical_p", Type::Float),
    ("repeat_last_n", Type::Int),
    ("temperature", Type::Float),
    ("repeat_penalty", Type::Float),
    ("presence_penalty", Type::Float),
    ("frequency_penalty", Type::Float),
    ("stop", Type::Text),
    ("num_ctx", Type::Int),
    ("num_batch", Type::Int),
    ("num_gpu", Type::Int),
    ("main_gpu", Type::Int),
    ("use_mmap", Type::Bool),
    ("num_thread", Type::Int),
    ("draft_num_predict", Type::Int),
    ("penalize_newline", Type::Bool),
    ("low_vram", Type::Bool),
    ("f16_kv", Type::Bool),
    ("logits_all", Type::Bool),
    ("vocab_only", Type::Bool),
    ("use_mlock", Type::Bool),
    ("mirostat", Type::Int),
    ("mirostat_tau", Type::Float),
    ("mirostat_eta", Type::Float),
];

impl Parameter {
    /// Reads a value as its name asks for.
    pub(crate) fn parse(name: &str, text: &str) -> Result<Self, Problem> {
        let name = name.to_ascii_lowercase();
        let Some((_, ty)) = TYPES.iter().find(|entry| entry.0 == name) else {
            return Err(Problem::Parameter(name.chars().take(40).collect()));
        };
        let word = text.trim();
        let value = match ty {
            Type::Int => word.parse().map(Value::Int).ok(),
            Type::Float => word.parse().ok().filter(|x: &f64| x.is_finite()).map(Value::Float),
            Type::Bool => word.to_ascii_lowercase().parse().map(Value::Bool).ok(),
            Type::Text => (!text.is_empty()).then(|| Value::Text(text.to_owned())),
        };
        let expected = match ty {
            Type::Int => "a whole number",
            Type::Float => "a number",
            Type::Bool => "true or false",
            Type::Text => "a text",
        };
        match value {
            Some(value) => Ok(Self { name, value }),
            None => Err(Problem::Value { name, expected }),
        }
    }
}

impl fmt::Display for Value {
    /// As it is written in a Modelfile.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(n) => n.fmt(f),
            Self::Float(x) => x.fmt(f),
            Self::Bool(b) => b.fmt(f),
            Self::Text(text) => f.write_str(text),
        }
    }
}

/// The JSON object of some parameters, as the `params` role of a manifest holds it. Texts that are
/// said again become a list (`stop` always is one); of anything else the last one counts. `None`
/// where there are no parameters.
pub(crate) fn to_json<'a>(parameters: impl Iterator<Item = &'a Parameter>) -> Option<String> {
    let mut fields: Vec<(&str, Vec<&Value>)> = Vec::new();
    for Parameter { name, value } in parameters {
        match fields.iter_mut().find(|field| field.0 == name) {
            Some((_, values)) if matches!(value, Value::Text(_)) => values.push(value),
            Some((_, values)) => *values = vec![value],
            None => fields.push((name, vec![value])),
        }
    }
    let written = fields.iter().map(|(name, values)| {
        let values: Vec<String> = values.iter().map(|value| value_to_json(value)).collect();
        let values = values.join(",");
        if *name == "stop" {
            format!("\"{name}\":[{values}]")
        } else {
            format!("\"{name}\":{values}")
        }
    });
    let written: Vec<String> = written.collect();
    (!written.is_empty()).then(|| format!("{{{}}}", written.join(",")))
}

fn value_to_json(value: &Value) -> String {
    match value {
        Value::Text(text) => text_to_json(text),
        // Numbers and booleans are written as JSON writes them; a parsed number is finite.
        other => other.to_string(),
    }
}

/// The JSON string of a text: quotes, backslashes and control characters escaped (RFC 8259, 7).
pub(crate) fn text_to_json(text: &str) -> String {
    use fmt::Write as _;
    let mut json = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => json.extend(['\\', c]),
            '\0'..='\x1f' => {
                write!(json, "\\u{:04x}", u32::from(c)).expect("writing to a String cannot fail");
            }
            _ => json.push(c),
        }
    }
    json.push('"');
    json
}
