//! Tool calls as tagged text, as Qwen3-Coder writes them:
//! `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>`.

use serde_json::{Map, Value};

use super::{Call, ToolFormat};

/// The format.
pub static FORMAT: ToolFormat = ToolFormat {
    open: "<tool_call>",
    close: "</tool_call>",
    is_of: |template| {
        template.contains("<tool_call>")
            && template.contains("<function=")
            && template.contains("<parameter=")
    },
    parse,
};

fn parse(inner: &str) -> Option<Call> {
    let (name, mut rest) = inner.trim().strip_prefix("<function=")?.split_once('>')?;
    let mut arguments = Map::new();
    while let Some((_, parameter)) = rest.split_once("<parameter=") {
        let (key, after) = parameter.split_once('>')?;
        // A value may hold any text but the end of its parameter.
        let (text, after) = after.split_once("</parameter>")?;
        let text = text.strip_prefix('\n').unwrap_or(text);
        let text = text.strip_suffix('\n').unwrap_or(text);
        arguments.insert(key.to_owned(), value(text));
        rest = after;
    }
    Some(Call { name: name.to_owned(), arguments: Value::Object(arguments) })
}

/// Numbers, truth values and containers are written as JSON, texts bare.
fn value(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}
