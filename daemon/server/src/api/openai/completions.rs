//! `/v1/completions`: a text is continued as it is, without a chat template.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use v4_proto::{Code, Delta, Fault};
use v4_supervisor::Caller;

use super::{
    STREAM_TYPE,
    decode::{self, Request, StreamOptions},
    encode::{self, Head},
};
use crate::{
    api::{Encode, End, Settled, bytes, json, keep_alive, wanted},
    error,
    ops::generate::{Ask, Work},
    options::Options,
};

/// Tokens of an answer where the request says nothing: OpenAI's own default. A text that is
/// continued has no end of its own.
const MAX_TOKENS: i64 = 16;

#[derive(Deserialize)]
struct Body {
    model: Option<String>,
    prompt: Option<Value>,
    suffix: Option<String>,
    echo: Option<bool>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<Value>,
    seed: Option<Value>,
    stop: Option<Value>,
    temperature: Option<Value>,
    top_p: Option<Value>,
    top_k: Option<Value>,
    min_p: Option<Value>,
    frequency_penalty: Option<Value>,
    presence_penalty: Option<Value>,
    logprobs: Option<Value>,
    n: Option<u64>,
    best_of: Option<u64>,
    num_ctx: Option<Value>,
    options: Option<Map<String, Value>>,
    keep_alive: Option<Value>,
    service_tier: Option<String>,
    user: Option<String>,
}

/// `/v1/completions`. `id` and `created` go into every chunk of the answer.
///
/// # Errors
/// `invalid` and `unsupported` faults.
pub fn decode(bytes: &[u8], id: u64, created: i64) -> Result<Request<Encoder>, Fault> {
    let body: Body = json::parse(bytes)?;
    let model = wanted(body.model.as_deref())?;
    refuse(&body)?;
    let options = decode::options!(body, body.max_tokens.as_ref())?;
    let text = prompt(body.prompt)?;
    let include_usage =
        body.stream_options.is_some_and(|options| options.include_usage == Some(true));
    let id = format!("cmpl-{id}");
    let head = Head { id, created, model: model.text.clone(), include_usage };
    Ok(Request {
        encoder: Encoder(head),
        stream: body.stream.unwrap_or(false),
        user: body.user,
        ask: Ask {
            model,
            work: Work::Raw { text },
            options,
            fallback: Options {
                temperature: Some(1.0),
                top_p: Some(1.0),
                num_predict: Some(MAX_TOKENS),
                ..Options::default()
            },
            keep_alive: body.keep_alive.as_ref().map_or(Ok(None), keep_alive::parse)?,
            truncate: true,
            caller: Caller::default(),
            parent: None,
        },
    })
}

/// What would be dropped in silence otherwise.
fn refuse(body: &Body) -> Result<(), Fault> {
    let says = |value: Option<&Value>| value.is_some_and(|value| !matches!(value, Value::Null));
    let why = if body.suffix.as_ref().is_some_and(|text| !text.is_empty()) {
        "suffix is not supported; send the text before it as the prompt and leave the field out"
    } else if says(body.logprobs.as_ref()) {
        "logprobs are not supported; leave the field out"
    } else if body.echo == Some(true) {
        "echo is not supported; put the prompt in front of the answer"
    } else if body.n.is_some_and(|n| n > 1) || body.best_of.is_some_and(|n| n > 1) {
        "n and best_of above 1 are not supported; send the request several times"
    } else {
        return Ok(());
    };
    Err(Fault::new(Code::Unsupported, why))
}

/// The one text that is continued.
fn prompt(value: Option<Value>) -> Result<String, Fault> {
    match value {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(mut texts)) if texts.len() == 1 && texts[0].is_string() => {
            match texts.pop() {
                Some(Value::String(text)) => Ok(text),
                _ => Err(Fault::invalid("prompt is required")),
            }
        }
        Some(Value::Array(texts)) if texts.iter().all(Value::is_string) && !texts.is_empty() => {
            Err(Fault::new(
                Code::Unsupported,
                "more than one prompt is not supported; send a request for each",
            ))
        }
        Some(Value::Array(items)) if !items.is_empty() => Err(Fault::new(
            Code::Unsupported,
            "a prompt of token numbers is not supported; send the text",
        )),
        None | Some(Value::Null) => Err(Fault::invalid("prompt is required")),
        Some(_) => Err(Fault::invalid("prompt must be a text, or a list of one text")),
    }
}

/// Writes one answer.
#[derive(Debug)]
pub struct Encoder(Head);

/// The `object` of an answer and of its pieces.
const OBJECT: &str = "text_completion";

#[derive(Serialize)]
struct Choice<'a> {
    text: &'a str,
    index: u32,
    /// Always null: the engine gives none.
    logprobs: Option<()>,
    finish_reason: Option<&'static str>,
}

impl Encoder {
    fn chunk(&self, text: &str, finish_reason: Option<&'static str>) -> Vec<u8> {
        let choice = Choice { text, index: 0, logprobs: None, finish_reason };
        encode::event(&self.0.envelope(OBJECT, vec![choice], None))
    }
}

impl Encode for Encoder {
    fn stream_type(&self) -> &'static str {
        STREAM_TYPE
    }

    fn delta(&mut self, delta: Delta, _now: Timestamp) -> Vec<u8> {
        if delta.text.is_empty() { Vec::new() } else { self.chunk(&delta.text, None) }
    }

    fn end(&mut self, end: &End, _now: Timestamp) -> Vec<u8> {
        let mut out = self.chunk("", Some(encode::reason(end.done.finish, 0)));
        out.extend(self.0.last(OBJECT, end.done.usage));
        out
    }

    fn failed(&mut self, fault: &Fault) -> Vec<u8> {
        encode::event(&error::openai_body(fault))
    }

    fn whole(&mut self, all: Delta, end: &End, _now: Timestamp) -> Vec<u8> {
        let finish_reason = Some(encode::reason(end.done.finish, 0));
        let choice = Choice { text: &all.text, index: 0, logprobs: None, finish_reason };
        bytes(&self.0.envelope(OBJECT, vec![choice], Some(end.done.usage)))
    }

    fn settled(&mut self, _settled: Settled, now: Timestamp) -> Vec<u8> {
        self.whole(Delta::default(), &encode::nothing(), now)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: &Value) -> Result<Request<Encoder>, Fault> {
        decode(body.to_string().as_bytes(), 1, 2)
    }

    #[test]
    fn a_text_is_continued_as_it_is() {
        for prompt in [json!("once"), json!(["once"])] {
            let request = read(&json!({"model": "m", "prompt": prompt, "max_tokens": 5,
                "temperature": 0, "stop": "x", "user": "u", "stream": true}));
            let request = request.expect("understood");
            assert_eq!(request.ask.work, Work::Raw { text: "once".to_owned() });
            let options = &request.ask.options;
            assert_eq!((options.num_predict, options.temperature), (Some(5), Some(0.0)));
            assert_eq!((request.user.as_deref(), request.stream), (Some("u"), true));
        }
        let request = read(&json!({"model": "m", "prompt": ""})).expect("understood");
        assert_eq!(request.ask.fallback.num_predict, Some(MAX_TOKENS));
        let harmless = json!({"model": "m", "prompt": "a", "suffix": "", "logprobs": null,
            "echo": false, "n": 1, "best_of": 1});
        assert!(read(&harmless).is_ok());
    }

    #[test]
    fn what_is_not_supported_is_refused_by_its_name() {
        for (field, value, code) in [
            ("suffix", json!("end"), Code::Unsupported),
            ("logprobs", json!(0), Code::Unsupported),
            ("echo", json!(true), Code::Unsupported),
            ("best_of", json!(2), Code::Unsupported),
            ("n", json!(2), Code::Unsupported),
            ("prompt", json!(["a", "b"]), Code::Unsupported),
            ("prompt", json!([1, 2]), Code::Unsupported),
            ("prompt", json!([[1]]), Code::Unsupported),
            ("prompt", json!([]), Code::Invalid),
            ("prompt", json!(7), Code::Invalid),
            ("prompt", json!(null), Code::Invalid),
        ] {
            let mut body = json!({"model": "m", "prompt": "a"});
            body[field] = value;
            let fault = read(&body).expect_err(field);
            assert_eq!(fault.code, code, "{field}");
            assert!(fault.message.contains(field), "{}", fault.message);
        }
    }
}
