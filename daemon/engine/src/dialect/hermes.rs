//! Tool calls as JSON between tags, as Hermes introduced them and Qwen 2.5 and 3 write them:
//! `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

use serde_json::{Map, Value};

use super::{Call, ToolFormat};

/// The format.
pub static FORMAT: ToolFormat = ToolFormat {
    open: "<tool_call>",
    close: "</tool_call>",
    is_of: |template| template.contains("<tool_call>") && !template.contains("<function="),
    parse,
};

fn parse(inner: &str) -> Option<Call> {
    let mut call: Map<String, Value> = serde_json::from_str(inner.trim()).ok()?;
    let Value::String(name) = call.shift_remove("name")? else { return None };
    let arguments = match call.shift_remove("arguments").or(call.shift_remove("parameters")) {
        None | Some(Value::Null) => Value::Object(Map::new()),
        // Some models write the object as a string of JSON.
        Some(Value::String(text)) => serde_json::from_str(&text).ok()?,
        Some(arguments) => arguments,
    };
    arguments.is_object().then_some(Call { name, arguments })
}
