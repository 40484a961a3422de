//! A request to a sequence of tokens: template, tokenizer, length. Needs no device, so it runs
//! beside the engine's thread.

use std::borrow::Cow;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use v4_proto::{Code, Fault, Generate, Input, Lane, Message, Role, SamplingParams, Think, limits};

use crate::Error;
use crate::dialect::{Dialect, Reader, Template, Variables};
use crate::format::Meta;
use crate::tokenizer::{Special, Tokenizer};

/// A request as the engine takes it.
#[derive(Debug)]
pub struct Sequence {
    /// The prompt; at least one token, fewer than `context`.
    pub(crate) prompt: Vec<u32>,
    /// Tokens of the prompt as it was sent.
    pub(crate) sent_tokens: u32,
    /// Most tokens of prompt and answer together.
    pub(crate) context: usize,
    /// Most tokens of the answer.
    pub(crate) max_tokens: usize,
    /// How urgent it is.
    pub(crate) lane: Lane,
    /// How tokens are chosen.
    pub(crate) sampling: SamplingParams,
    /// Where the request gives no seed.
    pub(crate) seed: u64,
    /// What ends the answer.
    pub(crate) stop: Vec<String>,
    /// Takes the answer apart; raw prompts have none.
    pub(crate) reader: Option<Reader>,
    /// Control tokens that are text of this answer, because its reader looks for them.
    pub(crate) visible: Vec<u32>,
}

/// What turns requests for one model into sequences.
#[derive(Debug)]
pub struct Prepare {
    tokenizer: Arc<Tokenizer>,
    /// The chat template; why it cannot be used; or nothing where the model has none.
    template: Option<Result<Template, Fault>>,
    dialect: Dialect,
    /// Text of special tokens, as templates name them.
    specials: Map<String, Value>,
    context: u32,
    /// Draws seeds.
    seeds: RandomState,
}

/// A conversation as text.
struct Rendered {
    prompt: String,
    /// Stop strings that the rendering itself asks for.
    stop: Option<String>,
}

/// A prompt in tokens, and how long it was as it was sent.
struct Fitted {
    ids: Vec<u32>,
    sent: usize,
    text: String,
    stop: Option<String>,
}

impl Prepare {
    /// For a model with this metadata, loaded for `context` tokens. `chat_template` replaces the
    /// file's own.
    ///
    /// # Errors
    /// What [`Tokenizer::from_meta`] finds.
    pub fn new(meta: &Meta, chat_template: Option<&str>, context: u32) -> Result<Self, Error> {
        let tokenizer = Arc::new(Tokenizer::from_meta(meta)?);
        let text = chat_template.or_else(|| meta.str("tokenizer.chat_template"));
        let id = |name: &str| {
            let id = meta.u64(&format!("tokenizer.ggml.{name}_token_id"))?;
            u32::try_from(id).ok()
        };
        let names = [
            ("bos_token", tokenizer.bos()),
            ("eos_token", tokenizer.eos()),
            ("pad_token", id("padding")),
            ("unk_token", id("unknown")),
        ];
        let specials = names.into_iter().filter_map(|(name, id)| {
            let text = String::from_utf8_lossy(tokenizer.bytes(id?)).into_owned();
            Some((name.to_owned(), Value::String(text)))
        });
        Ok(Self {
            specials: specials.collect(),
            template: text.map(Template::new),
            dialect: text.map(Dialect::of).unwrap_or_default(),
            tokenizer,
            context,
            seeds: RandomState::new(),
        })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Tokens of context that a sequence gets.
    pub fn context(&self) -> u32 {
        self.context
    }

    /// The sequence of a request.
    ///
    /// # Errors
    /// [`Code::ContextOverflow`] when the prompt leaves no room for an answer,
    /// [`Code::Invalid`] when the request or the model's template refuses the conversation,
    /// [`Code::Unsupported`] when the template cannot be used.
    pub fn prepare(&self, request: &Generate) -> Result<Sequence, Fault> {
        check_stops(&request.stop)?;
        let context = request.context.map_or(self.context, |c| c.min(self.context)) as usize;
        let seed = self.seed();
        let mut stop = request.stop.clone();
        let mut reader = None;
        let mut visible = Vec::new();
        let (prompt, sent) = match &request.input {
            Input::Chat { messages, tools, think } => {
                let messages = Cow::Borrowed(messages.as_slice());
                let chat = Chat { messages, tools, think: *think };
                let encode = |text: &str| self.encode(text);
                let fitted = self.fit(&chat, context, request.truncate, &encode)?;
                reader = Some(self.dialect.reader(&fitted.text, !tools.is_empty(), seed));
                visible.extend(self.dialect.tags().filter_map(|tag| self.tokenizer.special(tag)));
                stop.extend(fitted.stop);
                (fitted.ids, fitted.sent)
            }
            Input::Raw { text } => {
                self.refuse_hopeless(text.len(), context)?;
                let ids = self.encode(text);
                let sent = ids.len();
                (ids, sent)
            }
            Input::Tokens { ids } => {
                if let Some(id) = ids.iter().find(|&&id| id as usize >= self.tokenizer.len()) {
                    let n = self.tokenizer.len();
                    let message = format!("the model has no token {id}: its vocabulary has {n}");
                    return Err(Fault::invalid(message));
                }
                (ids.clone(), ids.len())
            }
        };
        if prompt.is_empty() {
            return Err(Fault::invalid("the prompt has no tokens: send some text"));
        }
        if prompt.len() >= context {
            return Err(overflow(&prompt.len().to_string(), context));
        }
        Ok(Sequence {
            sent_tokens: u32::try_from(sent).unwrap_or(u32::MAX),
            prompt,
            context,
            max_tokens: request.max_tokens.map_or(usize::MAX, |n| n as usize),
            lane: request.lane,
            sampling: request.sampling.clone(),
            seed,
            stop,
            reader,
            visible,
        })
    }

    /// A seed that nobody chose.
    fn seed(&self) -> u64 {
        let mut hasher = self.seeds.build_hasher();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        hasher.write_u128(now.unwrap_or_default().as_nanos());
        hasher.finish()
    }

    /// Tokens of a text with its special tokens, and BOS before it where the model wants one that
    /// is not written there.
    fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = self.tokenizer.encode(text, Special::Parse);
        if let Some(bos) = self.tokenizer.bos()
            && self.tokenizer.add_bos()
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        ids
    }

    /// Refuses a text that is too long whatever its tokens are, before they are made.
    fn refuse_hopeless(&self, n_bytes: usize, context: usize) -> Result<(), Fault> {
        let least = n_bytes / self.tokenizer.longest_token_bytes().max(1);
        if least >= context { Err(overflow(&format!("at least {least}"), context)) } else { Ok(()) }
    }

    /// The tokens of a conversation; of its newest turns where it does not fit and `truncate` says
    /// so. `encode` is [`Prepare::encode`]: the dearest part by far, so a text that is too long by
    /// its bytes alone is encoded only where it is the whole, whose tokens are told.
    fn fit(
        &self,
        chat: &Chat<'_>,
        context: usize,
        truncate: bool,
        encode: &dyn Fn(&str) -> Vec<u32>,
    ) -> Result<Fitted, Fault> {
        if chat.messages.is_empty() {
            return Err(Fault::invalid("the conversation has no messages"));
        }
        let fitted = |Rendered { prompt, stop }| {
            let ids = encode(&prompt);
            Fitted { sent: ids.len(), ids, text: prompt, stop }
        };
        let rendered = self.render(chat)?;
        if !truncate {
            self.refuse_hopeless(rendered.prompt.len(), context)?;
        }
        let whole = fitted(rendered);
        if whole.ids.len() < context || !truncate {
            return Ok(whole);
        }
        // Fewer turns have fewer tokens: the first cut that fits is found by halving.
        let cuts = chat.cuts();
        let (mut low, mut high) = (0, cuts.len());
        let mut best = None;
        while low < high {
            let middle = usize::midpoint(low, high);
            let rendered = self.render(&chat.without(cuts[middle]))?;
            let may_fit = self.refuse_hopeless(rendered.prompt.len(), context).is_ok();
            let cut = may_fit.then(|| fitted(rendered)).filter(|cut| cut.ids.len() < context);
            match cut {
                Some(cut) => {
                    best = Some(Fitted { sent: whole.sent, ..cut });
                    high = middle;
                }
                None => low = middle + 1,
            }
        }
        best.ok_or_else(|| {
            let message = format!(
                "the last message alone does not fit the context of {context} tokens (the whole \
                 prompt has {}): shorten it or ask for a larger context",
                whole.sent
            );
            Fault::new(Code::ContextOverflow, message)
        })
    }

    /// The text of a conversation: by the model's template, else plainly.
    fn render(&self, chat: &Chat<'_>) -> Result<Rendered, Fault> {
        let template = match &self.template {
            None => return Ok(plain(&chat.messages)),
            Some(Err(fault)) => return Err(fault.clone()),
            Some(Ok(template)) => template,
        };
        let messages: Vec<Value> = chat.messages.iter().map(message_json).collect();
        let mut extra = self.specials.clone();
        extra.extend(chat.think.into_iter().flat_map(think_settings));
        // A conversation that ends with the model's own words asks for more of them.
        let last = chat.messages.last().filter(|last| last.role == Role::Assistant);
        let begun = last.filter(|last| last.tool_calls.is_empty()).map(|last| last.content.trim());
        let begun = begun.filter(|begun| !begun.is_empty());
        let render = |add_generation_prompt| {
            template.render(&Variables {
                messages: &messages,
                tools: Some(chat.tools).filter(|tools| !tools.is_empty()),
                documents: None,
                add_generation_prompt,
                extra: &extra,
            })
        };
        if let Some(begun) = begun {
            let mut prompt = render(false)?;
            if let Some(at) = prompt.rfind(begun) {
                prompt.truncate(at + begun.len());
                return Ok(Rendered { prompt, stop: None });
            }
        }
        Ok(Rendered { prompt: render(true)?, stop: None })
    }
}

/// A conversation to render.
struct Chat<'a> {
    messages: Cow<'a, [Message]>,
    tools: &'a [Value],
    think: Option<Think>,
}

impl<'a> Chat<'a> {
    /// How many messages may be dropped from the start, fewest first: what is left begins with a
    /// user's message, as templates demand. System messages are never dropped nor counted.
    fn cuts(&self) -> Vec<usize> {
        let turns = self.messages.iter().filter(|message| message.role != Role::System);
        let users = turns.enumerate().filter(|(_, message)| message.role == Role::User);
        users.map(|(index, _)| index).filter(|&index| index > 0).collect()
    }

    /// The same without its first `dropped` messages; system messages stay.
    fn without(&self, dropped: usize) -> Chat<'a> {
        let mut left = dropped;
        let is_kept = |message: &&Message| {
            let goes = message.role != Role::System && left > 0;
            left -= usize::from(goes);
            !goes
        };
        let messages = self.messages.iter().filter(is_kept).cloned().collect();
        Chat { messages, ..*self }
    }
}

/// A message as templates know it.
fn message_json(message: &Message) -> Value {
    let mut json = json!({ "role": message.role.as_str(), "content": message.content });
    let mut set = |key: &str, value: Value| json[key] = value;
    if let Some(thinking) = &message.thinking {
        // Templates know it by either name.
        set("reasoning_content", json!(thinking));
        set("thinking", json!(thinking));
    }
    if !message.tool_calls.is_empty() {
        set("tool_calls", message.tool_calls.iter().map(call_json).collect());
    }
    if let Some(name) = &message.tool_name {
        set("name", json!(name));
    }
    if let Some(id) = &message.tool_call_id {
        set("tool_call_id", json!(id));
    }
    json
}

/// A call as templates know it: with its type, and arguments that are an object.
fn call_json(call: &Value) -> Value {
    let mut call = call.clone();
    if let Some(fields) = call.as_object_mut() {
        fields.entry("type").or_insert_with(|| json!("function"));
    }
    if let Some(arguments) = call.pointer_mut("/function/arguments")
        && let Some(text) = arguments.as_str()
        && let Ok(object) = serde_json::from_str::<Map<String, Value>>(text)
    {
        *arguments = Value::Object(object);
    }
    call
}

/// How much to think, by the names that templates know.
fn think_settings(think: Think) -> impl IntoIterator<Item = (String, Value)> {
    let is_on = think != Think::Off;
    let effort = match think {
        Think::Off | Think::On => None,
        Think::Low => Some("low"),
        Think::Medium => Some("medium"),
        Think::High => Some("high"),
        Think::Max => Some("max"),
    };
    let mut settings =
        vec![("enable_thinking".to_owned(), json!(is_on)), ("thinking".to_owned(), json!(is_on))];
    settings.extend(effort.map(|effort| ("reasoning_effort".to_owned(), json!(effort))));
    settings
}

/// A conversation for a model without a template, which only continues text: a single message is
/// the text itself; more are written as a script, each line begun by who speaks, and the answer
/// ends where the model begins the user's next line.
fn plain(messages: &[Message]) -> Rendered {
    if let [message] = messages {
        return Rendered { prompt: message.content.clone(), stop: None };
    }
    let mut prompt = String::new();
    for message in messages {
        let who = match message.role {
            Role::System => "",
            Role::User => "User: ",
            Role::Assistant => "Assistant: ",
            Role::Tool => "Tool: ",
        };
        prompt.extend([who, message.content.trim(), "\n\n"]);
    }
    prompt.push_str("Assistant:");
    Rendered { prompt, stop: Some("\n\nUser:".to_owned()) }
}

fn check_stops(stops: &[String]) -> Result<(), Fault> {
    if stops.len() > limits::STOP_STRINGS {
        let message = format!("at most {} stop strings are allowed", limits::STOP_STRINGS);
        return Err(Fault::invalid(message));
    }
    if stops.iter().any(|stop| stop.len() > limits::STOP_STRING_BYTES) {
        let most = limits::STOP_STRING_BYTES;
        return Err(Fault::invalid(format!("a stop string has at most {most} bytes")));
    }
    Ok(())
}

fn overflow(n_tokens: &str, context: usize) -> Fault {
    let message = format!(
        "the prompt has {n_tokens} tokens and the context {context}: shorten the prompt or ask for \
         a larger context"
    );
    Fault::new(Code::ContextOverflow, message)
}
#[cfg(test)]
mod tests;
