//! Bodies of OpenAI's clients to what they ask. Beyond OpenAI's own fields, Ollama's `options`,
//! `num_ctx`, `keep_alive` and `think` are taken. Fields that are not named here are ignored.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value};
use v4_proto::{Code, Fault, Lane, Message, ModelName, Think};
use v4_supervisor::Caller;

use crate::{
    api::{json, keep_alive, openai::encode::Encoder, turns, wanted},
    ops::generate::{Ask, Work, lacks},
    options::Options,
};

/// A request for an answer, decoded, and what writes that as `E`.
#[derive(Debug)]
pub struct Request<E> {
    /// What is asked.
    pub ask: Ask,
    /// Whether the answer comes in pieces.
    pub stream: bool,
    /// Whom the client asks for, in its own words.
    pub user: Option<String>,
    /// What writes the answer.
    pub encoder: E,
}

#[derive(Deserialize)]
struct Body {
    model: Option<String>,
    messages: Option<Vec<WireMessage>>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<Value>,
    max_completion_tokens: Option<Value>,
    seed: Option<Value>,
    stop: Option<Value>,
    temperature: Option<Value>,
    top_p: Option<Value>,
    top_k: Option<Value>,
    min_p: Option<Value>,
    frequency_penalty: Option<Value>,
    presence_penalty: Option<Value>,
    response_format: Option<ResponseFormat>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    reasoning: Option<Reasoning>,
    reasoning_effort: Option<String>,
    logprobs: Option<bool>,
    n: Option<u64>,
    num_ctx: Option<Value>,
    options: Option<Map<String, Value>>,
    keep_alive: Option<Value>,
    service_tier: Option<String>,
    user: Option<String>,
}

/// What is said of a stream.
#[derive(Deserialize)]
pub struct StreamOptions {
    /// Whether it ends with what it cost.
    pub include_usage: Option<bool>,
}

#[derive(Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    ty: Option<String>,
}

#[derive(Deserialize)]
struct Reasoning {
    effort: Option<String>,
}

#[derive(Deserialize)]
struct WireMessage {
    role: String,
    content: Option<Content>,
    reasoning: Option<String>,
    tool_calls: Option<Vec<Value>>,
    name: Option<String>,
    tool_call_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    ty: Option<String>,
    text: Option<String>,
}

/// `/v1/chat/completions`. `id` and `created` go into every chunk of the answer.
///
/// # Errors
/// `invalid` and `unsupported` faults.
pub fn chat(bytes: &[u8], id: u64, created: i64) -> Result<Request<Encoder>, Fault> {
    let mut body: Body = json::parse(bytes)?;
    let model = wanted(body.model.as_deref())?;
    refuse(&body)?;
    let max_tokens = body.max_completion_tokens.as_ref().or(body.max_tokens.as_ref());
    let options = options!(body, max_tokens)?;
    let wire = body.messages.take().unwrap_or_default();
    if wire.is_empty() {
        return Err(Fault::invalid("[] is too short - 'messages'"));
    }
    turns::check_count(wire.len())?;
    let messages =
        wire.into_iter().map(|turn| message(&model.name, turn)).collect::<Result<Vec<_>, _>>()?;
    let effort = body.reasoning.and_then(|reasoning| reasoning.effort).or(body.reasoning_effort);
    let work = Work::Chat {
        messages: name_results(messages),
        tools: choose(turns::tools(body.tools.unwrap_or_default())?, body.tool_choice.as_ref())?,
        think: effort.as_deref().map(think).transpose()?,
    };
    let include_usage =
        body.stream_options.is_some_and(|options| options.include_usage == Some(true));
    Ok(Request {
        encoder: Encoder::new(id, created, model.text.clone(), include_usage),
        stream: body.stream.unwrap_or(false),
        user: body.user,
        ask: Ask {
            model,
            work,
            options,
            fallback: Options { temperature: Some(1.0), top_p: Some(1.0), ..Options::default() },
            keep_alive: body.keep_alive.as_ref().map_or(Ok(None), keep_alive::parse)?,
            truncate: true,
            caller: Caller::default(),
            parent: None,
        },
    })
}

/// What would be dropped in silence otherwise.
fn refuse(body: &Body) -> Result<(), Fault> {
    let format = body.response_format.as_ref().and_then(|format| format.ty.as_deref());
    let format = format.filter(|&ty| ty != "text").map(Value::from);
    turns::refuse_extras(format.as_ref(), body.logprobs)?;
    if body.n.is_some_and(|n| n > 1) {
        return Err(Fault::new(
            Code::Unsupported,
            "n above 1 is not supported; send the request several times",
        ));
    }
    Ok(())
}

/// The options of a body by their native names, with so many tokens at most: its own fields come
/// before its `options` object. Bodies differ in type and not in these fields, and to share them
/// serde's `flatten` would copy all of a body.
macro_rules! options {
    ($body:expr, $max_tokens:expr) => {
        $crate::api::openai::decode::gather(
            &[
                ("num_predict", $max_tokens),
                ("seed", $body.seed.as_ref()),
                ("stop", $body.stop.as_ref()),
                ("temperature", $body.temperature.as_ref()),
                ("top_p", $body.top_p.as_ref()),
                ("top_k", $body.top_k.as_ref()),
                ("min_p", $body.min_p.as_ref()),
                ("frequency_penalty", $body.frequency_penalty.as_ref()),
                ("presence_penalty", $body.presence_penalty.as_ref()),
                ("num_ctx", $body.num_ctx.as_ref()),
            ],
            $body.options.as_ref(),
            $body.service_tier.as_deref(),
        )
    };
}
pub(super) use options;

/// Options of fields by their native names, of an `options` object, and of the service tier.
///
/// # Errors
/// `invalid` faults.
pub fn gather(
    fields: &[(&str, Option<&Value>)],
    extra: Option<&Map<String, Value>>,
    service_tier: Option<&str>,
) -> Result<Options, Fault> {
    let named = fields
        .iter()
        .filter_map(|(name, value)| Some(((*name).to_owned(), (*value)?.clone())))
        .collect();
    let extra = extra.map_or_else(|| Ok(Options::default()), Options::read)?;
    // The tier that is cheaper because it waits; the others are what everybody gets.
    let is_patient = service_tier == Some("flex");
    let lane = is_patient.then_some(Lane::Background);
    Ok(Options::read(&named)?.or(extra).or(Options { lane, ..Options::default() }))
}

fn message(model: &ModelName, wire: WireMessage) -> Result<Message, Fault> {
    let content = match wire.content {
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => join(model, parts)?,
    };
    Ok(Message {
        role: turns::role(&wire.role)?,
        content,
        thinking: wire.reasoning.filter(|text| !text.is_empty()),
        tool_calls: turns::tool_calls(wire.tool_calls.unwrap_or_default())?,
        tool_name: wire.name,
        tool_call_id: wire.tool_call_id,
    })
}

/// The text of a message in parts.
fn join(model: &ModelName, parts: Vec<Part>) -> Result<String, Fault> {
    let mut texts = Vec::with_capacity(parts.len());
    for part in parts {
        match part.ty.as_deref() {
            Some("text" | "input_text" | "output_text") => {
                texts.push(part.text.unwrap_or_default());
            }
            Some("image_url") => return Err(lacks(model, "vision")),
            Some("input_audio") => return Err(lacks(model, "audio")),
            _ => {
                return Err(Fault::invalid(
                    "a part of a message's content is of an unknown type; write {\"type\":\"text\",\
                     \"text\":…}",
                ));
            }
        }
    }
    Ok(texts.join("\n"))
}

/// Gives the results of tool calls the name of the tool, which templates want and OpenAI's clients
/// leave to the call's id.
fn name_results(mut messages: Vec<Message>) -> Vec<Message> {
    let mut names = HashMap::new();
    for message in &mut messages {
        for call in &message.tool_calls {
            if let (Some(id), Some(name)) = (call["id"].as_str(), turns::tool_name(call)) {
                names.insert(id.to_owned(), name.to_owned());
            }
        }
        if message.tool_name.is_none() {
            let id = message.tool_call_id.as_ref();
            message.tool_name = id.and_then(|id| names.get(id)).cloned();
        }
    }
    messages
}

/// The tools that `tool_choice` leaves: none, all, or the one that is named.
fn choose(tools: Vec<Value>, choice: Option<&Value>) -> Result<Vec<Value>, Fault> {
    match choice {
        Some(Value::String(word)) if word == "none" => Ok(Vec::new()),
        Some(choice @ Value::Object(_)) => {
            let wanted = turns::tool_name(choice);
            let chosen: Vec<Value> =
                tools.into_iter().filter(|tool| turns::tool_name(tool) == wanted).collect();
            if chosen.is_empty() {
                return Err(Fault::invalid("tool_choice names a tool that is not in tools"));
            }
            Ok(chosen)
        }
        _ => Ok(tools),
    }
}

/// How much to think, in OpenAI's words.
fn think(effort: &str) -> Result<Think, Fault> {
    match effort {
        "none" => Ok(Think::Off),
        "minimal" => Ok(Think::Low),
        "xhigh" | "ultra" => Ok(Think::Max),
        word => turns::effort(word).map_err(|_| {
            Fault::invalid(
                "the reasoning effort must be none, minimal, low, medium, high, xhigh or max",
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use v4_proto::Role;
    use v4_supervisor::KeepAlive;

    use super::*;

    fn decode(body: &Value) -> Result<Request<Encoder>, Fault> {
        chat(body.to_string().as_bytes(), 1, 2)
    }

    fn with(extra: Value) -> Result<Request<Encoder>, Fault> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
        let Value::Object(extra) = extra else { panic!("no object") };
        body.as_object_mut().expect("an object").extend(extra);
        decode(&body)
    }

    #[test]
    fn settings_arrive_by_openais_names_and_by_ollamas() {
        let request = with(json!({
            "max_tokens": 3, "max_completion_tokens": 4, "seed": 5, "stop": "END", "top_p": 0.5,
            "temperature": null, "frequency_penalty": 0.25, "options": {"top_k": 7, "seed": 9},
            "num_ctx": 1024, "keep_alive": 60, "user": "me", "logit_bias": {}, "n": 1
        }))
        .expect("valid");
        let options = &request.ask.options;
        assert_eq!(options.max_tokens(), Some(4));
        assert_eq!((options.seed, options.top_k, options.num_ctx), (Some(5), Some(7), Some(1024)));
        assert_eq!((options.top_p, options.temperature), (Some(0.5), None));
        assert_eq!(options.stop, Some(vec!["END".to_owned()]));
        assert_eq!(request.ask.fallback.temperature, Some(1.0));
        assert_eq!(request.ask.fallback.top_p, Some(1.0));
        assert_eq!(request.ask.keep_alive, Some(KeepAlive::For(Duration::from_mins(1))));
        assert!(!request.stream);
    }

    #[test]
    fn efforts_are_levels_of_thinking() {
        for (word, expected) in [
            ("none", Think::Off),
            ("minimal", Think::Low),
            ("low", Think::Low),
            ("medium", Think::Medium),
            ("high", Think::High),
            ("xhigh", Think::Max),
            ("max", Think::Max),
            ("ultra", Think::Max),
        ] {
            let bodies =
                [json!({"reasoning_effort": word}), json!({"reasoning": {"effort": word}})];
            for body in bodies {
                let Work::Chat { think, .. } = with(body).expect(word).ask.work else {
                    panic!("no chat")
                };
                assert_eq!(think, Some(expected), "{word}");
            }
        }
        with(json!({"reasoning_effort": "some"})).expect_err("refused");
    }

    #[test]
    fn results_of_calls_get_the_name_of_their_tool() {
        let request = decode(&json!({"model": "m", "messages": [
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
            {"role": "function", "name": "g", "content": "1"}
        ]}))
        .expect("valid");
        let Work::Chat { messages, .. } = request.ask.work else { panic!("no chat") };
        assert_eq!((messages[1].role, messages[1].tool_name.as_deref()), (Role::Tool, Some("f")));
        assert_eq!(messages[1].content, "42");
        assert_eq!(messages[2].tool_name.as_deref(), Some("g"));
    }

    #[test]
    fn a_choice_of_tools_leaves_those_that_may_be_called() {
        let tools = json!([{"function": {"name": "f"}}, {"function": {"name": "g"}}]);
        let n_left = |choice: Value| {
            let request = with(json!({"tools": tools, "tool_choice": choice}))?;
            let Work::Chat { tools, .. } = request.ask.work else { panic!("no chat") };
            Ok::<usize, Fault>(tools.len())
        };
        assert_eq!(n_left(json!("none")), Ok(0));
        assert_eq!(n_left(json!("auto")), Ok(2));
        assert_eq!(n_left(json!(null)), Ok(2));
        assert_eq!(n_left(json!({"type": "function", "function": {"name": "g"}})), Ok(1));
        n_left(json!({"type": "function", "function": {"name": "h"}})).expect_err("no such tool");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (extra, words) in [
            (json!({"messages": []}), "[] is too short - 'messages'"),
            (json!({"messages": null}), "[] is too short - 'messages'"),
            (json!({"messages": [{"role": "user", "content": 1}]}), "did not match any variant"),
            (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "vision"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
                "audio",
            ),
            (json!({"messages": [{"role": "user", "content": [{"type": "new"}]}]}), "unknown type"),
            (json!({"model": "a b"}), "invalid model name"),
            (json!({"max_tokens": "many"}), "option \"num_predict\" must be of type integer"),
            (json!({"response_format": {"type": "json_object"}}), "format"),
            (json!({"logprobs": true}), "logprobs"),
            (json!({"n": 2}), "n above 1"),
        ] {
            let message = with(extra.clone()).expect_err("refused").message;
            assert!(message.contains(words), "{extra}: {message}");
        }
        with(json!({"response_format": {"type": "text"}, "logprobs": false})).expect("valid");
    }
}
