//! JSON as Python's `json.dumps` writes it, since models were trained on that.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Containers within one another; tool schemas have under twenty.
const DEPTH: usize = 128;

/// The arguments of `json.dumps`.
#[derive(Debug)]
pub struct Format {
    indent: Option<String>,
    ensure_ascii: bool,
    sort_keys: bool,
    item_separator: String,
    key_separator: String,
}

impl Format {
    /// From the keyword arguments of a template's call.
    pub fn from_kwargs(kwargs: &Kwargs) -> Result<Self, Error> {
        let indent = match kwargs.get::<Option<Value>>("indent")? {
            Some(value) if value.is_none() => None,
            Some(value) => Some(match (value.as_str(), value.as_usize()) {
                (Some(text), _) => text.to_owned(),
                (None, Some(n)) => " ".repeat(n.min(80)),
                (None, None) => String::new(),
            }),
            None => None,
        };
        let separators = kwargs.get::<Option<Value>>("separators")?;
        let separator = |index, default: &str| match &separators {
            Some(pair) if !pair.is_none() => {
                let item = pair.get_item_by_index(index)?;
                Ok(item.as_str().unwrap_or(default).to_owned())
            }
            _ => Ok::<_, Error>(default.to_owned()),
        };
        Ok(Self {
            item_separator: separator(0, if indent.is_some() { "," } else { ", " })?,
            key_separator: separator(1, ": ")?,
            indent,
            ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
            sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        })
    }

    /// The JSON of a value.
    pub fn write(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.value(value, 0, &mut out)?;
        Ok(out)
    }

    fn value(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(Error::new(ErrorKind::BadSerialization, "the value is too deep for JSON"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => {
                let number = f64::try_from(value.clone())?;
                out.push_str(&float(number));
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Map => self.map(value, depth, out)?,
            ValueKind::Seq | ValueKind::Iterable => {
                out.push('[');
                let mut is_empty = true;
                for item in value.try_iter()? {
                    self.separate(is_empty, depth + 1, out);
                    self.value(&item, depth + 1, out)?;
                    is_empty = false;
                }
                self.close(is_empty, depth, out);
                out.push(']');
            }
            kind => {
                let message = format!("a value of kind {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::BadSerialization, message));
            }
        }
        Ok(())
    }

    fn map(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        out.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.separate(index == 0, depth + 1, out);
            match key.as_str() {
                Some(text) => self.string(text, out),
                None => self.string(&key.to_string(), out),
            }
            out.push_str(&self.key_separator);
            self.value(&value.get_item(key)?, depth + 1, out)?;
        }
        self.close(keys.is_empty(), depth, out);
        out.push('}');
        Ok(())
    }

    fn separate(&self, is_first: bool, depth: usize, out: &mut String) {
        if !is_first {
            out.push_str(&self.item_separator);
        }
        self.new_line(depth, out);
    }

    fn close(&self, is_empty: bool, depth: usize, out: &mut String) {
        if !is_empty {
            self.new_line(depth, out);
        }
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}").expect("writing to a String cannot fail");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// A float as Python's `repr` writes it.
fn float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.unsigned_abs());
    }
    let plain = x.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_does() {
        let table = [
            (2.5, "2.5"),
            (1.0, "1.0"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (1e-4, "0.0001"),
            (1e22, "1e+22"),
            (1.797_693_134_862_315_7e308, "1.7976931348623157e+308"),
            (5e-324, "5e-324"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ];
        for (x, text) in table {
            assert_eq!(float(x), text);
        }
    }
}
