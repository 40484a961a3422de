//! Bodies of Ollama's clients to what they ask. Fields that are not named here are ignored.

use std::{num::NonZeroU64, path::PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use v4_proto::{Code, Digest, Fault, Message, ModelName, Think, name::Reference};
use v4_pull::{Change, Wish};
use v4_supervisor::{Caller, KeepAlive};

use crate::{
    api::{
        json, keep_alive,
        ollama::encode::{Encoder, Shape},
        turns, wanted,
    },
    config,
    keys::Scope,
    ops::{
        create::Create,
        generate::{Ask, Work, lacks},
        import::Import,
        models::Wanted,
        pull::Order,
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
    insecure: Option<bool>,
    /// v4's own: the pull goes on when nobody watches.
    detach: Option<bool>,
    /// v4's own: bytes a second, as a number or as `2M`.
    limit_rate: Option<Value>,
    /// v4's own: the digest of the manifest that a pull must bring.
    locked: Option<String>,
    /// v4's own: other v4 on the network that may have the blobs.
    peers: Option<Vec<String>>,
    /// v4's own: `pause`, `resume` or `cancel`.
    action: Option<String>,
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
            caller: Caller::default(),
            parent: None,
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
            caller: Caller::default(),
            parent: None,
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

/// `/api/replace`.
///
/// # Errors
/// `invalid` faults.
pub fn replace(bytes: &[u8]) -> Result<crate::replace::Request, Fault> {
    json::parse(bytes)
}

/// `/api/pull`.
#[derive(Debug, PartialEq)]
pub struct Pull {
    /// The model.
    pub model: Wanted,
    /// Whether progress comes in pieces.
    pub stream: bool,
    /// How it is wished.
    pub wish: Wish,
}

/// `/api/pull`.
///
/// # Errors
/// `invalid` faults.
pub fn pull(bytes: &[u8]) -> Result<Pull, Fault> {
    let body: Named = json::parse(bytes)?;
    let given = body.model.as_deref().filter(|text| !text.is_empty()).or(body.name.as_deref());
    let reference = reference(given)?;
    let wish = Wish {
        revision: reference.revision,
        locked: body.locked.as_deref().map(locked).transpose()?,
        is_plain: body.insecure.unwrap_or(false),
        is_detached: body.detach.unwrap_or(false),
        rate: body.limit_rate.as_ref().map_or(Ok(None), limit_rate)?,
        peers: body.peers.unwrap_or_default(),
    };
    let text = given.map(str::trim).unwrap_or_default().to_owned();
    let model = Wanted { name: reference.name, text };
    Ok(Pull { model, stream: body.stream.unwrap_or(true), wish })
}

/// A digest, with `sha256:` in front or as listings write it.
fn locked(text: &str) -> Result<Digest, Fault> {
    let read = text.parse().or_else(|_| Digest::from_hex(text));
    read.map_err(|error: v4_proto::name::NameError| Fault::invalid(error.to_string()))
}

/// A name as it may be pulled.
fn reference(text: Option<&str>) -> Result<Reference, Fault> {
    let text = text.map(str::trim).filter(|text| !text.is_empty());
    let text = text.ok_or_else(|| Fault::invalid("model is required"))?;
    let read = text.parse();
    read.map_err(|error| Fault::invalid(format!("invalid model name: {error}")))
}

#[derive(Deserialize)]
struct CopyBody {
    source: Option<String>,
    destination: Option<String>,
}

/// `/api/copy`: from which name to which.
///
/// # Errors
/// `invalid` faults.
pub fn copy(bytes: &[u8]) -> Result<(Wanted, Wanted), Fault> {
    let body: CopyBody = json::parse(bytes)?;
    let name = |what: &str, text: Option<String>| {
        let text = text.unwrap_or_default();
        let read = wanted(Some(&text));
        read.map_err(|_| Fault::invalid(format!("{what} {text:?} is invalid")))
    };
    Ok((name("source", body.source)?, name("destination", body.destination)?))
}

#[derive(Deserialize)]
struct CreateBody {
    model: Option<String>,
    name: Option<String>,
    from: Option<String>,
    #[serde(default)]
    files: Option<Map<String, Value>>,
    #[serde(default)]
    adapters: Option<Map<String, Value>>,
    template: Option<String>,
    system: Option<String>,
    license: Option<Value>,
    parameters: Option<Map<String, Value>>,
    messages: Option<Vec<WireMessage>>,
    renderer: Option<String>,
    parser: Option<String>,
    requires: Option<String>,
    quantize: Option<String>,
    quantization: Option<String>,
    stream: Option<bool>,
}

/// `/api/create`, and whether its progress comes in pieces.
///
/// # Errors
/// `invalid` and `unsupported` faults.
pub fn create(bytes: &[u8]) -> Result<(Create, bool), Fault> {
    let body: CreateBody = json::parse(bytes)?;
    let said = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    let given = body.model.as_deref().filter(|text| !text.is_empty());
    let target = wanted(given.or(body.name.as_deref()))?;
    if said(&body.quantize) || said(&body.quantization) {
        return Err(Fault::new(
            Code::Unsupported,
            "quantize is not supported yet; make the model of weights that have the quant",
        ));
    }
    let from = body.from.as_deref().filter(|text| !text.is_empty());
    let from = from.map(|text| wanted(Some(text))).transpose()?;
    let files = uploaded("files", body.files)?;
    if from.is_none() && files.is_empty() {
        return Err(Fault::invalid("neither 'from' or 'files' was specified"));
    }
    let adapters = uploaded("adapters", body.adapters)?;
    if adapters.len() > 1 {
        return Err(Fault::invalid("a model can have one adapter only"));
    }
    let turns = body.messages.unwrap_or_default();
    turns::check_count(turns.len())?;
    let messages =
        turns.into_iter().map(|turn| message(&target.name, turn)).collect::<Result<Vec<_>, _>>()?;
    let fields =
        [("renderer", body.renderer), ("parser", body.parser), ("requires", body.requires)];
    let fields = fields.into_iter().filter(|(_, text)| said(text));
    let config = fields.filter_map(|(name, text)| Some((name.to_owned(), text?.into()))).collect();
    let order = Create {
        target,
        from,
        files,
        adapters,
        template: body.template.filter(|text| !text.is_empty()),
        system: body.system.filter(|text| !text.is_empty()),
        parameters: body.parameters.unwrap_or_default(),
        messages,
        licenses: licenses(body.license)?,
        config,
    };
    Ok((order, body.stream.unwrap_or(true)))
}

#[derive(Deserialize)]
struct ImportBody {
    path: Option<PathBuf>,
    model: Option<String>,
    #[serde(default)]
    link: bool,
    stream: Option<bool>,
}

/// `/api/import`, v4's own, and whether its progress comes in pieces.
///
/// # Errors
/// `invalid` faults.
pub fn import(bytes: &[u8]) -> Result<(Import, bool), Fault> {
    let body: ImportBody = json::parse(bytes)?;
    let path = body.path.filter(|path| path.is_absolute());
    let path = path.ok_or_else(|| Fault::invalid("path must be an absolute path"))?;
    let name = body.model.as_deref().filter(|text| !text.is_empty());
    let name = name.map(|text| wanted(Some(text))).transpose()?;
    Ok((Import { path, name, may_link: body.link }, body.stream.unwrap_or(true)))
}

#[derive(Deserialize)]
struct PinBody {
    model: Option<String>,
    pinned: bool,
}

/// `/api/pins`, v4's own: a name, and whether it is pinned from now on.
///
/// # Errors
/// `invalid` faults.
pub fn pin(bytes: &[u8]) -> Result<(Wanted, bool), Fault> {
    let body: PinBody = json::parse(bytes)?;
    Ok((wanted(body.model.as_deref())?, body.pinned))
}

/// Files by name, each with the digest of its blob.
fn uploaded(what: &str, files: Option<Map<String, Value>>) -> Result<Vec<(String, Digest)>, Fault> {
    let one = |(name, digest): (String, Value)| {
        let steps = name.split('/');
        let is_inside =
            !name.contains('\\') && steps.into_iter().all(|step| !matches!(step, "" | "." | ".."));
        let digest = digest.as_str().and_then(|text| text.parse().ok());
        match digest.filter(|_| is_inside) {
            Some(digest) => Ok((name, digest)),
            None => Err(Fault::invalid(format!(
                "{what} must be names inside a folder with the digest of each, and {name:?} is not"
            ))),
        }
    };
    files.unwrap_or_default().into_iter().map(one).collect()
}

/// One text or several.
fn licenses(value: Option<Value>) -> Result<Vec<String>, Fault> {
    let wrong = || Fault::invalid("license must be a text or a list of texts");
    let texts = match value {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(items)) => {
            let text = |item: Value| item.as_str().map(str::to_owned).ok_or_else(wrong);
            items.into_iter().map(text).collect::<Result<_, _>>()?
        }
        Some(_) => return Err(wrong()),
    };
    Ok(texts.into_iter().filter(|text| !text.is_empty()).collect())
}

/// `/api/prune`, `/api/fsck` and `/api/roots`, v4's own.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Care {
    /// Downloads that are not done go too.
    pub partials: bool,
    /// Another program's store to be read in place.
    pub add: Option<PathBuf>,
    /// One to be read no more.
    pub remove: Option<PathBuf>,
    /// What is damaged is pulled again.
    pub repair: bool,
    /// Whether it is told as it comes.
    pub stream: bool,
}

/// `/api/prune`, `/api/fsck` and `/api/roots`.
///
/// # Errors
/// `invalid` faults.
pub fn care(bytes: &[u8]) -> Result<Care, Fault> {
    json::parse(bytes)
}

/// What `/api/keys` is asked to do.
#[derive(Debug, PartialEq, Eq)]
pub enum KeyOrder {
    /// Make a key of this name and scope.
    Add(String, Scope),
    /// Remove one.
    Remove(String),
}

/// `/api/keys`: `add` with a `scope`, or `remove`.
///
/// # Errors
/// `invalid` faults.
pub fn change_keys(bytes: &[u8]) -> Result<KeyOrder, Fault> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Wish {
        add: Option<String>,
        scope: Option<String>,
        remove: Option<String>,
    }
    let wish: Wish = json::parse(bytes)?;
    match (wish.add, wish.scope, wish.remove) {
        (Some(name), Some(scope), None) => Ok(KeyOrder::Add(name, scope.parse()?)),
        (None, None, Some(name)) => Ok(KeyOrder::Remove(name)),
        _ => Err(Fault::invalid("say which key to add, with its scope, or which to remove")),
    }
}

/// `/api/pulls`: an action or a rate for one pull, or a rate for all of them.
///
/// # Errors
/// `invalid` faults.
pub fn steer(bytes: &[u8]) -> Result<Order, Fault> {
    let body: Named = json::parse(bytes)?;
    let rate = body.limit_rate.as_ref().map(limit_rate).transpose()?;
    let change = match body.action.as_deref() {
        None => rate.map(Change::Rate),
        Some("pause") => Some(Change::Pause),
        Some("resume") => Some(Change::Resume),
        Some("cancel") => Some(Change::Cancel),
        Some(_) => None,
    };
    let change = change.ok_or_else(|| {
        Fault::invalid("say what to do: an action (pause, resume or cancel) or a limit_rate")
    })?;
    match (body.model.is_some() || body.name.is_some(), change) {
        (true, change) => Ok(Order::One(body.wanted()?, change)),
        (false, Change::Rate(rate)) => Ok(Order::Rate(rate)),
        (false, _) => Err(Fault::invalid("model is required")),
    }
}

/// Bytes a second; none, 0 and nothing are no bound.
fn limit_rate(value: &Value) -> Result<Option<NonZeroU64>, Fault> {
    let bytes = match value {
        Value::Null => Some(0),
        Value::Number(n) => n.as_u64(),
        Value::String(text) if text == "none" => Some(0),
        Value::String(text) => config::bytes(text),
        _ => None,
    };
    let bytes = bytes.ok_or_else(|| {
        Fault::invalid("limit_rate must be bytes a second such as 2M or 500K, or none")
    })?;
    Ok(NonZeroU64::new(bytes))
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
    fn pulls_are_steered_one_by_one_or_in_their_rate_together() {
        let rate = |n| Change::Rate(NonZeroU64::new(n));
        for (body, change) in [
            (r#"{"model":"m","action":"pause"}"#, Change::Pause),
            (r#"{"name":"m","action":"resume"}"#, Change::Resume),
            (r#"{"model":"m","action":"cancel"}"#, Change::Cancel),
            (r#"{"model":"m","limit_rate":"2M"}"#, rate(2 << 20)),
            (r#"{"model":"m","limit_rate":1000}"#, rate(1000)),
            (r#"{"model":"m","limit_rate":"none"}"#, rate(0)),
        ] {
            let Order::One(wanted, found) = steer(body.as_bytes()).expect(body) else {
                panic!("{body} is for all")
            };
            assert_eq!((wanted.text.as_str(), found), ("m", change), "{body}");
        }
        let all = steer(br#"{"limit_rate":"1K"}"#).expect("valid");
        assert_eq!(all, Order::Rate(NonZeroU64::new(1024)));
        for (body, words) in [
            ("{}", "say what to do"),
            (r#"{"model":"m"}"#, "say what to do"),
            (r#"{"model":"m","action":"stop"}"#, "say what to do"),
            (r#"{"action":"pause"}"#, "model is required"),
            (r#"{"limit_rate":"fast"}"#, "limit_rate must be"),
            (r#"{"limit_rate":-1}"#, "limit_rate must be"),
        ] {
            let message = steer(body.as_bytes()).expect_err(body).message;
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
        assert!(asked.wish.is_plain && !asked.wish.is_detached);
        assert_eq!(pull(b"{}").expect_err("no name").message, "model is required");
    }
}
