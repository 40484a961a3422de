//! What the surfaces' conversations have in common: roles, tool calls, tool definitions, and what
//! this build does not do.

use serde_json::{Value, json};
use v4_proto::{Code, Fault, ModelName, Role, Think, limits};

use crate::ops::generate::lacks;

/// A role by its word; letter case does not count.
///
/// # Errors
/// `invalid` for a word that is no role.
pub fn role(word: &str) -> Result<Role, Fault> {
    match word.to_ascii_lowercase().as_str() {
        "system" | "developer" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" | "function" => Ok(Role::Tool),
        _ => Err(Fault::invalid("invalid role in messages; write system, user, assistant or tool")),
    }
}

/// Refuses a conversation of more turns than there may be.
///
/// # Errors
/// `invalid` above the limit.
pub fn check_count(n_messages: usize) -> Result<(), Fault> {
    if n_messages > limits::MESSAGES {
        return Err(Fault::invalid(format!(
            "there are {n_messages} messages; at most {} are allowed",
            limits::MESSAGES
        )));
    }
    Ok(())
}

/// The calls of an assistant's turn as templates read them: arguments are an object. OpenAI writes
/// them as text.
///
/// # Errors
/// `invalid` when a call has no name or its arguments are no object.
pub fn tool_calls(calls: Vec<Value>) -> Result<Vec<Value>, Fault> {
    calls.into_iter().map(tool_call).collect()
}

fn tool_call(mut call: Value) -> Result<Value, Fault> {
    let broken = || {
        Fault::invalid(
            "a tool call in messages is broken; write {\"function\":{\"name\":…,\"arguments\":{…}}}",
        )
    };
    let id = call.get("id").and_then(Value::as_str).map(str::to_owned);
    let function = call.get_mut("function").ok_or_else(broken)?;
    let name = function.get("name").and_then(Value::as_str).ok_or_else(broken)?.to_owned();
    let arguments = match function.get_mut("arguments").map(Value::take) {
        None | Some(Value::Null) => json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        Some(Value::String(text)) => serde_json::from_str(&text).map_err(|_| broken())?,
        Some(value) => value,
    };
    if !arguments.is_object() {
        return Err(broken());
    }
    let function = json!({ "name": name, "arguments": arguments });
    Ok(match id {
        Some(id) => json!({ "id": id, "type": "function", "function": function }),
        None => json!({ "type": "function", "function": function }),
    })
}

/// Tool definitions; each needs a name, the rest is the template's business.
///
/// # Errors
/// `invalid` when one has no name.
pub fn tools(tools: Vec<Value>) -> Result<Vec<Value>, Fault> {
    let is_named = |tool: &Value| tool_name(tool).is_some_and(|name| !name.is_empty());
    if tools.iter().all(is_named) {
        Ok(tools)
    } else {
        Err(Fault::invalid(
            "a tool is broken; write {\"type\":\"function\",\"function\":{\"name\":…,\
             \"parameters\":{…}}}",
        ))
    }
}

/// The name in a tool definition.
pub fn tool_name(tool: &Value) -> Option<&str> {
    tool.get("function")?.get("name")?.as_str()
}

/// How much to think, by its word.
///
/// # Errors
/// `invalid` for an unknown word.
pub fn effort(word: &str) -> Result<Think, Fault> {
    match word {
        "low" => Ok(Think::Low),
        "medium" => Ok(Think::Medium),
        "high" => Ok(Think::High),
        "max" => Ok(Think::Max),
        _ => Err(bad_effort()),
    }
}

/// The fault for a wish to think that is none.
pub fn bad_effort() -> Fault {
    Fault::invalid("think must be true, false, \"low\", \"medium\", \"high\" or \"max\"")
}

/// Refuses images: no model of this build sees them.
///
/// # Errors
/// `unsupported` when there is one, in the words that Ollama's clients know.
pub fn refuse_images(model: &ModelName, images: Option<&[Value]>) -> Result<(), Fault> {
    match images {
        None | Some([]) => Ok(()),
        Some(_) => Err(lacks(model, "vision")),
    }
}

/// Refuses what would be dropped in silence otherwise: an output format and log probabilities.
///
/// # Errors
/// `unsupported` when one is asked for.
pub fn refuse_extras(format: Option<&Value>, logprobs: Option<bool>) -> Result<(), Fault> {
    let is_off = match format {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(_) => false,
    };
    if !is_off {
        return Err(Fault::new(
            Code::Unsupported,
            "a format for the answer is not supported; leave it out and ask for JSON in the prompt",
        ));
    }
    if logprobs == Some(true) {
        return Err(Fault::new(
            Code::Unsupported,
            "logprobs are not supported; leave the field out",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_become_objects() {
        let calls = vec![
            json!({"id": "a", "function": {"name": "f", "arguments": "{\"z\":1,\"a\":2}"}}),
            json!({"function": {"name": "g", "arguments": {"x": [1]}, "index": 3}}),
            json!({"function": {"name": "h"}}),
        ];
        let read = tool_calls(calls).expect("valid");
        assert_eq!(
            Value::from(read).to_string(),
            r#"[{"id":"a","type":"function","function":{"name":"f","arguments":{"z":1,"a":2}}},{"type":"function","function":{"name":"g","arguments":{"x":[1]}}},{"type":"function","function":{"name":"h","arguments":{}}}]"#
        );
        for bad in [
            json!(1),
            json!({"function": {}}),
            json!({"function": {"name": "f", "arguments": "{"}}),
            json!({"function": {"name": "f", "arguments": [1]}}),
        ] {
            tool_calls(vec![bad]).expect_err("refused");
        }
    }

    #[test]
    fn limits_hold_at_their_edges() {
        check_count(limits::MESSAGES).expect("the most there may be");
        check_count(limits::MESSAGES + 1).expect_err("refused");
        tools(vec![json!({"function": {"name": ""}})]).expect_err("no name");
        role("ROBOT").expect_err("no role");
        assert_eq!(role("User"), Ok(Role::User));
    }
}
