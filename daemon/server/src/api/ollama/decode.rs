//! Bodies of Ollama's clients to what they ask. Fields that are not named here are ignored.

use serde::Deserialize;
use serde_json::{Map, Value};
use v4_proto::{Code, Fault, Message, ModelName, Think};
use v4_supervisor::KeepAlive;

use crate::{
    api::{
        json, keep_alive,
        ollama::encode::{Encoder, Shape},
        turns, wanted,
    },
    ops::{
        generate::{Ask, Work, lacks},
        models::Wanted,
    },
    options::Options,
};

/// A request for an answer, decoded.
#[derive(Debug)]
pub struct Request {
    /// What is asked.
    pub ask: Ask,
    /// Whether the answer comes in pieces.
    pub stream: bool,
    /// What writes the answer.
    pub encoder: Encoder,
}

#[derive(Deserialize)]
struct GenerateBody {
    model: Option<String>,
    prompt: Option<String>,
    suffix: Option<String>,
    system: Option<String>,
    template: Option<String>,
    context: Option<Vec<Value>>,
    raw: Option<bool>,
    images: Option<Vec<Value>>,
    stream: Option<bool>,
    format: Option<Value>,
    keep_alive: Option<Value>,
    options: Option<Map<String, Value>>,
    think: Option<Value>,
    truncate: Option<bool>,
    logprobs: Option<bool>,
}

#[derive(Deserialize)]
struct ChatBody {
    model: Option<String>,
    messages: Option<Vec<WireMessage>>,
    tools: Option<Vec<Value>>,
    stream: Option<bool>,
    format: Option<Value>,
    keep_alive: Option<Value>,
    options: Option<Map<String, Value>>,
    think: Option<Value>,
    truncate: Option<bool>,
    logprobs: Option<bool>,
}

#[derive(Deserialize)]
struct WireMessage {
    role: String,
    content: Option<String>,
    thinking: Option<String>,
    images: Option<Vec<Value>>,
    tool_calls: Option<Vec<Value>>,
    tool_name: Option<String>,
    tool_call_id: Option<String>,
}

#[derive(Deserialize)]
struct Named {
    model: Option<String>,
    name: Option<String>,
    stream: Option<bool>,
}

/// `/api/generate`.
///
/// # Errors
/// `invalid` and `unsupported` faults.
pub fn generate(bytes: &[u8]) -> Result<Request, Fault> {
    let body: GenerateBody = json::parse(bytes)?;
    let model = wanted(body.model.as_deref())?;
    refuse_generate(&model.name, &body)?;
    turns::refuse_extras(body.format.as_ref(), body.logprobs)?;
    let keep_alive = body.keep_alive.as_ref().map_or(Ok(None), keep_alive::parse)?;
    let think = body.think.as_ref().map_or(Ok(None), think)?;
    let text = body.prompt.unwrap_or_default();
    let work = if text.is_empty() {
        nothing_to_say(keep_alive)
    } else if body.raw == Some(true) {
        Work::Raw { text }
    } else {
        Work::Prompt { text, system: body.system.filter(|text| !text.is_empty()), think }
    };
    Ok(Request {
        encoder: Encoder::new(Shape::Generate, model.text.clone()),
        stream: body.stream.unwrap_or(true),
        ask: Ask {
            model,
            work,
            options: body.options.as_ref().map_or_else(|| Ok(Options::default()), Options::read)?,
            fallback: Options::default(),
            keep_alive,
            truncate: body.truncate.unwrap_or(true),
        },
    })
}

/// What `/api/generate` cannot do.
fn refuse_generate(model: &ModelName, body: &GenerateBody) -> Result<(), Fault> {
    let said = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    let has_context = body.context.as_ref().is_some_and(|ids| !ids.is_empty());
    let unsupported = |message: &str| Err(Fault::new(Code::Unsupported, message));
    if body.raw == Some(true) && (said(&body.template) || said(&body.system) || has_context) {
        return Err(Fault::invalid("raw mode does not support template, system, or context"));
    }
    if has_context {
        return unsupported("context is not supported; send the conversation to /api/chat");
    }
    if said(&body.template) {
        return unsupported(
            "a template in a request is not supported; leave it out to use the model's own, or \
             set raw to send the prompt as it is",
        );
    }
    if said(&body.suffix) {
        return Err(lacks(model, "insert"));
    }
    turns::refuse_images(model, body.images.as_deref())
}

/// `/api/chat`.
///
/// # Errors
/// `invalid` and `unsupported` faults.
pub fn chat(bytes: &[u8]) -> Result<Request, Fault> {
    let body: ChatBody = json::parse(bytes)?;
    let model = wanted(body.model.as_deref())?;
    turns::refuse_extras(body.format.as_ref(), body.logprobs)?;
    let keep_alive = body.keep_alive.as_ref().map_or(Ok(None), keep_alive::parse)?;
    let think = body.think.as_ref().map_or(Ok(None), think)?;
    let turns = body.messages.unwrap_or_default();
    turns::check_count(turns.len())?;
    let messages =
        turns.into_iter().map(|turn| message(&model.name, turn)).collect::<Result<Vec<_>, _>>()?;
    let work = if messages.is_empty() {
        nothing_to_say(keep_alive)
    } else {
        Work::Chat { messages, tools: turns::tools(body.tools.unwrap_or_default())?, think }
    };
    Ok(Request {
        encoder: Encoder::new(Shape::Chat, model.text.clone()),
        stream: body.stream.unwrap_or(true),
        ask: Ask {
            model,
            work,
            options: body.options.as_ref().map_or_else(|| Ok(Options::default()), Options::read)?,
            fallback: Options::default(),
            keep_alive,
            truncate: body.truncate.unwrap_or(true),
        },
    })
}

/// No text means: load, or unload when the model is to be kept for no time.
fn nothing_to_say(keep_alive: Option<KeepAlive>) -> Work {
    match keep_alive {
        Some(KeepAlive::For(time)) if time.is_zero() => Work::Unload,
        _ => Work::Load,
    }
}

fn message(model: &ModelName, wire: WireMessage) -> Result<Message, Fault> {
    turns::refuse_images(model, wire.images.as_deref())?;
    Ok(Message {
        role: turns::role(&wire.role)?,
        content: wire.content.unwrap_or_default(),
        thinking: wire.thinking.filter(|text| !text.is_empty()),
        tool_calls: turns::tool_calls(wire.tool_calls.unwrap_or_default())?,
        tool_name: wire.tool_name,
        tool_call_id: wire.tool_call_id,
    })
}

/// How much to think.
fn think(value: &Value) -> Result<Option<Think>, Fault> {
    match value {
        Value::Null => Ok(None),
        Value::Bool(false) => Ok(Some(Think::Off)),
        Value::Bool(true) => Ok(Some(Think::On)),
        Value::String(level) => turns::effort(level).map(Some),
        _ => Err(turns::bad_effort()),
    }
}

/// `/api/show`, by `model` or the older `name`.
///
/// # Errors
/// `invalid` faults.
pub fn show(bytes: &[u8]) -> Result<Wanted, Fault> {
    json::parse::<Named>(bytes)?.wanted()
}

/// `/api/delete`.
///
/// # Errors
/// `invalid` faults.
pub fn delete(bytes: &[u8]) -> Result<Wanted, Fault> {
    json::parse::<Named>(bytes)?.wanted()
}

/// `/api/pull`.
#[derive(Debug, PartialEq)]
pub struct Pull {
    /// The model.
    pub model: Wanted,
    /// Whether progress comes in pieces.
    pub stream: bool,
}

/// `/api/pull`.
///
/// # Errors
/// `invalid` faults.
pub fn pull(bytes: &[u8]) -> Result<Pull, Fault> {
    let body: Named = json::parse(bytes)?;
    Ok(Pull { model: body.wanted()?, stream: body.stream.unwrap_or(true) })
}

impl Named {
    fn wanted(&self) -> Result<Wanted, Fault> {
        let given = self.model.as_deref().filter(|text| !text.is_empty());
        wanted(given.or(self.name.as_deref()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use v4_proto::Role;

    use super::*;

    fn refusal(decode: fn(&[u8]) -> Result<Request, Fault>, body: &str) -> String {
        decode(body.as_bytes()).expect_err(body).message
    }

    #[test]
    fn a_prompt_is_decoded_with_all_it_says() {
        let request = generate(
            br#"{"model":"Qwen:0.5b","prompt":"Hi","system":"Be short.","think":"high",
                "options":{"temperature":0,"num_ctx":512},"keep_alive":"1m","stream":null}"#,
        )
        .expect("valid");
        let ask = request.ask;
        assert!(request.stream && ask.truncate);
        assert_eq!(ask.model.text, "Qwen:0.5b");
        let work = Work::Prompt {
            text: "Hi".to_owned(),
            system: Some("Be short.".to_owned()),
            think: Some(Think::High),
        };
        assert_eq!(ask.work, work);
        assert_eq!((ask.options.temperature, ask.options.num_ctx), (Some(0.0), Some(512)));
        assert_eq!(ask.keep_alive, Some(KeepAlive::For(Duration::from_mins(1))));
    }

    #[test]
    fn raw_text_goes_as_it_is() {
        let request = generate(br#"{"model":"m","prompt":"<s>Hi","raw":true}"#).expect("valid");
        assert_eq!(request.ask.work, Work::Raw { text: "<s>Hi".to_owned() });
        for field in [r#""system":"a""#, r#""template":"a""#, r#""context":[1]"#] {
            let body = format!(r#"{{"model":"m","prompt":"p","raw":true,{field}}}"#);
            let words = "raw mode does not support template, system, or context";
            assert_eq!(refusal(generate, &body), words);
        }
    }

    #[test]
    fn no_text_means_load_or_unload() {
        for (body, work) in [
            (r#"{"model":"m"}"#, Work::Load),
            (r#"{"model":"m","prompt":"","keep_alive":-1}"#, Work::Load),
            (r#"{"model":"m","prompt":"","keep_alive":0}"#, Work::Unload),
            (r#"{"model":"m","keep_alive":"0s"}"#, Work::Unload),
        ] {
            assert_eq!(generate(body.as_bytes()).expect(body).ask.work, work, "{body}");
            assert_eq!(chat(body.as_bytes()).expect(body).ask.work, work, "{body}");
        }
        let body = r#"{"model":"m","prompt":"x","keep_alive":0}"#;
        assert!(matches!(generate(body.as_bytes()).expect(body).ask.work, Work::Prompt { .. }));
    }

    #[test]
    fn turns_are_decoded_with_their_calls() {
        let request = chat(
            br#"{"model":"m","truncate":false,"messages":[
                {"role":"ASSISTANT","content":null,"thinking":"hm","tool_calls":[{"function":{"name":"f","arguments":{"b":1,"a":2}}}]},
                {"role":"tool","content":"42","tool_name":"f","tool_call_id":"c"}]}"#,
        )
        .expect("valid");
        assert!(!request.ask.truncate);
        let Work::Chat { messages, tools, think } = request.ask.work else { panic!("no chat") };
        assert_eq!((messages[0].role, messages[0].content.as_str()), (Role::Assistant, ""));
        assert_eq!(messages[0].thinking.as_deref(), Some("hm"));
        let call = messages[0].tool_calls[0].to_string();
        assert_eq!(
            call,
            r#"{"type":"function","function":{"name":"f","arguments":{"b":1,"a":2}}}"#
        );
        assert_eq!(messages[1].tool_name.as_deref(), Some("f"));
        assert_eq!(messages[1].tool_call_id.as_deref(), Some("c"));
        assert_eq!((tools.len(), think), (0, None));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (body, words) in [
            (r"{}", "model is required"),
            (r#"{"model":""}"#, "model is required"),
            (r#"{"model":"../../etc/passwd","prompt":"x"}"#, "invalid model name: "),
            (r#"{"model":"a b","prompt":"x"}"#, "invalid model name: "),
            (r#"{"model":7}"#, "invalid type: integer `7`"),
            (r#"{"model":"m","prompt":"x","options":[]}"#, "invalid type: sequence"),
            (
                r#"{"model":"m","prompt":"x","options":{"num_ctx":"4"}}"#,
                "option \"num_ctx\" must be",
            ),
            (r#"{"model":"m","prompt":"x","think":"hard"}"#, "think must be"),
            (r#"{"model":"m","prompt":"x","think":1}"#, "think must be"),
            (r#"{"model":"m","prompt":"x","keep_alive":"soon"}"#, "keep_alive must be"),
            (
                r#"{"model":"m","prompt":"x","suffix":"y"}"#,
                "library/m:latest does not support insert",
            ),
            (r#"{"model":"m","prompt":"x","images":["aGk="]}"#, "m:latest does not support vision"),
            (r#"{"model":"m","prompt":"x","format":"json"}"#, "format"),
            (r#"{"model":"m","prompt":"x","logprobs":true}"#, "logprobs"),
            (r#"{"model":"m","prompt":"x","context":[1,2]}"#, "context is not supported"),
            (r#"{"model":"m","prompt":"x","template":"{{.Prompt}}"}"#, "template"),
        ] {
            let message = refusal(generate, body);
            assert!(message.contains(words), "{body}: {message}");
        }
        let long = format!(r#"{{"model":"{}","prompt":"x"}}"#, "a".repeat(10_000));
        assert!(refusal(generate, &long).contains("10000 characters"));
        for (body, words) in [
            (r#"{"model":"m","messages":[{"role":"robot","content":"x"}]}"#, "invalid role"),
            (r#"{"model":"m","messages":[{"content":"x"}]}"#, "missing field `role`"),
            (r#"{"model":"m","messages":{"role":"user"}}"#, "invalid type: map"),
            (
                r#"{"model":"m","messages":[{"role":"user","images":["x"]}]}"#,
                "does not support vision",
            ),
            (r#"{"model":"m","messages":[{"role":"user"}],"tools":[{}]}"#, "a tool is broken"),
            (r#"{"model":"m","messages":[{"role":"assistant","tool_calls":[1]}]}"#, "a tool call"),
        ] {
            let message = refusal(chat, body);
            assert!(message.contains(words), "{body}: {message}");
        }
    }

    #[test]
    fn what_is_off_may_be_said() {
        let body = r#"{"model":"m","prompt":"x","format":"","images":[],"suffix":"","context":null,"logprobs":false,"template":""}"#;
        generate(body.as_bytes()).expect("valid");
    }

    #[test]
    fn names_come_by_two_fields() {
        assert_eq!(show(br#"{"name":"m"}"#).expect("valid").text, "m");
        assert_eq!(show(br#"{"model":"","name":"m"}"#).expect("valid").text, "m");
        assert_eq!(delete(br#"{"model":"a/b:c"}"#).expect("valid").name.namespace(), "a");
        let asked = pull(br#"{"model":"m","stream":false,"insecure":true}"#).expect("valid");
        assert!(!asked.stream);
        assert_eq!(pull(b"{}").expect_err("no name").message, "model is required");
    }
}
