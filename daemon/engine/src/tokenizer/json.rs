//! The tokenizer and the chat template of a model folder, as the metadata that GGUF has for them.
//!
//! What this build does not know is named in the metadata all the same: whoever makes a tokenizer
//! of it says so then, and the model can be described.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value as Json;
use v4_proto::limits;

use crate::Error;
use crate::format::folder::Folder;
use crate::format::safetensors::json;
use crate::format::{Array, FormatError, Meta, Value, bounded, length, wide};

const TOKENIZER: &str = "tokenizer.json";
const SETTINGS: &str = "tokenizer_config.json";
const GENERATION: &str = "generation_config.json";
const TEMPLATE: &str = "chat_template.jinja";
/// A space, as vocabularies of `SentencePiece` write it.
const SPACE: &str = "▁";
/// Bytes of a pre-tokenizer that is not known which a message repeats.
const ECHO_BYTES: usize = 200;

/// Numbers of `tokenizer.ggml.token_type`.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;
const BYTE: u64 = 6;

/// Expressions that cut text before byte-level BPE, and what GGUF calls them where pieces that are
/// tokens are taken whole, and where they are not. Several stand one after another.
const EXPRESSIONS: &[(&[&str], &str, &str)] = &[
    (
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        "llama-bpe",
        "dbrx",
    ),
    (
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        "qwen2",
        "qwen2",
    ),
    (
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        "qwen35",
        "qwen35",
    ),
    (
        &[
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        "gpt-4o",
        "gpt-4o",
    ),
    (
        &[
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        "tekken",
        "tekken",
    ),
    (
        &[
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        ],
        "deepseek-v3",
        "deepseek-v3",
    ),
];

#[derive(Deserialize)]
struct Written {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Json>,
    pre_tokenizer: Option<Json>,
    post_processor: Option<Json>,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u64,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    unk_token: Option<String>,
    vocab: Vocab,
    #[serde(default)]
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Vocab {
    Ids(HashMap<String, u64>),
    Other(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

impl Merge {
    fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Merge::Pair(left, right) => Some((left, right)),
            Merge::Line(line) => line.split_once(' '),
        }
    }
}

/// Adds what the folder says of its tokenizer and its chat template. A folder without a
/// `tokenizer.json` adds no tokenizer.
///
/// # Errors
/// [`Error::Open`]; [`Error::Format`] where a file makes no sense.
pub(crate) fn add(meta: &mut Meta, folder: Folder<'_>) -> Result<(), Error> {
    let settings = optional(folder, SETTINGS)?;
    if let Some(text) = template(folder, &settings)? {
        set(meta, "chat_template", Value::String(text));
    }
    let Some(bytes) = folder.find(TOKENIZER)? else { return Ok(()) };
    let generation = optional(folder, GENERATION)?;
    translate(meta, bytes.as_slice(), &settings, &generation)
}

/// Says in `meta` what a `tokenizer.json` and the settings beside it say.
fn translate(
    meta: &mut Meta,
    bytes: &[u8],
    settings: &Json,
    generation: &Json,
) -> Result<(), Error> {
    let len = wide(bytes.len());
    bounded("bytes of a JSON file", len, wide(limits::MODEL_JSON_BYTES))?;
    let read: Written = serde_json::from_slice(bytes)
        .map_err(|error| FormatError::Contradiction(format!("{TOKENIZER}: {error}")))?;
    let Vocab::Ids(ids) = &read.model.vocab else {
        let kind = read.model.kind.unwrap_or_default();
        set(meta, "ggml.model", Value::String(kind));
        return Ok(());
    };
    vocabulary(meta, &read, ids)?;
    let is_bytes = has_type(read.pre_tokenizer.as_ref(), "ByteLevel");
    let is_pieces = read.model.byte_fallback || says_space(&read);
    match read.model.kind.as_deref() {
        None | Some("BPE") if is_bytes => bytes_of(meta, &read),
        None | Some("BPE") if is_pieces => pieces_of(meta, &read, ids),
        kind => set(meta, "ggml.model", Value::String(kind.unwrap_or("BPE").to_owned())),
    }
    ends(meta, &read, ids, settings, generation);
    Ok(())
}

fn set(meta: &mut Meta, key: &str, value: Value) {
    meta.insert(format!("tokenizer.{key}"), value);
}

/// A JSON file that need not be there; then it says nothing.
fn optional(folder: Folder<'_>, name: &str) -> Result<Json, Error> {
    if folder.find(name)?.is_none() {
        return Ok(Json::Null);
    }
    json(folder, name)
}

/// The chat template: a file of its own, or in the settings, where several have names.
fn template(folder: Folder<'_>, settings: &Json) -> Result<Option<String>, Error> {
    if let Some(bytes) = folder.find(TEMPLATE)? {
        let len = wide(bytes.len());
        bounded("bytes of a template", len, limits::META_STRING_BYTES)?;
        return Ok(Some(String::from_utf8_lossy(bytes.as_slice()).into_owned()));
    }
    let said = &settings["chat_template"];
    let named = said.as_array().into_iter().flatten();
    let default =
        named.filter(|one| one["name"] == "default").find_map(|one| one["template"].as_str());
    Ok(said.as_str().or(default).map(str::to_owned))
}

/// Texts and kinds of all tokens by their numbers. A number that none has is a place that no text
/// uses.
fn vocabulary(meta: &mut Meta, read: &Written, ids: &HashMap<String, u64>) -> Result<(), Error> {
    let added = read.added_tokens.iter().map(|token| (&token.content, token.id));
    let all = ids.iter().map(|(text, id)| (text, *id)).chain(added);
    let end = all.clone().map(|(_, id)| id.saturating_add(1)).max().unwrap_or(0);
    bounded("tokens", end, limits::META_ARRAY_ITEMS)?;
    let count = length(end);
    let mut texts = vec![String::new(); count];
    let mut kinds = vec![UNUSED; count];
    for (text, id) in all {
        let id = length(id);
        let kind = if Some(text) == read.model.unk_token.as_ref() {
            UNKNOWN
        } else if read.model.byte_fallback && is_byte(text) {
            BYTE
        } else {
            NORMAL
        };
        if let (Some(place), Some(known)) = (texts.get_mut(id), kinds.get_mut(id)) {
            text.clone_into(place);
            *known = kind;
        }
    }
    for token in &read.added_tokens {
        if let Some(kind) = kinds.get_mut(length(token.id)).filter(|kind| **kind == NORMAL) {
            *kind = if token.special { CONTROL } else { USER_DEFINED };
        }
    }
    set(meta, "ggml.tokens", Value::Array(Array::String(texts)));
    set(meta, "ggml.token_type", Value::Array(Array::U64(kinds)));
    Ok(())
}

/// `<0x0A>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Byte-level BPE.
fn bytes_of(meta: &mut Meta, read: &Written) {
    let merges = read.model.merges.iter().filter_map(Merge::parts);
    let merges = merges.map(|(left, right)| format!("{left} {right}")).collect();
    set(meta, "ggml.model", Value::String("gpt2".to_owned()));
    set(meta, "ggml.merges", Value::Array(Array::String(merges)));
    set(meta, "ggml.pre", Value::String(splitter(read)));
}

/// What GGUF calls the way in which text is cut, or the expressions where it has no name for them.
fn splitter(read: &Written) -> String {
    let mut steps = Vec::new();
    all_of(read.pre_tokenizer.as_ref(), &mut steps);
    let found: Vec<&str> =
        steps.iter().filter_map(|step| step.pointer("/pattern/Regex")?.as_str()).collect();
    let is = |step: &Json, kind: &str| step["type"] == kind;
    let cuts_words = steps.iter().any(|step| is(step, "ByteLevel") && step["use_regex"] != false);
    let cuts_digits =
        steps.iter().any(|step| is(step, "Digits") && step["individual_digits"] == true);
    let known = EXPRESSIONS.iter().find(|(expressions, ..)| *expressions == found.as_slice());
    match known {
        Some((_, whole, _)) if !cuts_words && read.model.ignore_merges => (*whole).to_owned(),
        Some((_, _, merged)) if !cuts_words => (*merged).to_owned(),
        _ if found.is_empty() && cuts_words && cuts_digits => "smollm".to_owned(),
        _ if found.is_empty() && cuts_words => "gpt-2".to_owned(),
        _ => found.join(" then ").chars().take(ECHO_BYTES).collect(),
    }
}

/// BPE of pieces with spaces in them. A token's score is the place of the first merge that makes
/// it: merges were written down in the order of the scores.
fn pieces_of(meta: &mut Meta, read: &Written, ids: &HashMap<String, u64>) {
    let count = meta.strings("tokenizer.ggml.tokens").map_or(0, <[String]>::len);
    let last = f64::from(u32::try_from(read.model.merges.len()).unwrap_or(u32::MAX));
    let mut scores = vec![-last; count];
    for (rank, merge) in (0_u32..).zip(&read.model.merges) {
        let Some((left, right)) = merge.parts() else { continue };
        let id = ids.get(&[left, right].concat()).copied().map(length);
        if let Some(score) = id.and_then(|id| scores.get_mut(id)).filter(|score| **score <= -last) {
            *score = -f64::from(rank);
        }
    }
    set(meta, "ggml.model", Value::String("llama".to_owned()));
    set(meta, "ggml.scores", Value::Array(Array::F64(scores)));
    set(meta, "ggml.add_space_prefix", Value::Bool(puts_space_first(read)));
}

/// Whether a space is put before the text: a normalizer does, or the pre-tokenizer.
fn puts_space_first(read: &Written) -> bool {
    let mut steps = Vec::new();
    all_of(read.normalizer.as_ref(), &mut steps);
    all_of(read.pre_tokenizer.as_ref(), &mut steps);
    steps.iter().any(|step| match step["type"].as_str() {
        Some("Prepend") => step["prepend"] == SPACE,
        Some("Metaspace") => match step["prepend_scheme"].as_str() {
            Some(scheme) => scheme != "never",
            None => step["add_prefix_space"] != false,
        },
        _ => false,
    })
}

/// Whether spaces are written as [`SPACE`].
fn says_space(read: &Written) -> bool {
    let mut steps = Vec::new();
    all_of(read.normalizer.as_ref(), &mut steps);
    all_of(read.pre_tokenizer.as_ref(), &mut steps);
    steps.iter().any(|step| step["type"] == "Metaspace" || step["content"] == SPACE)
}

/// The steps of a pipeline, in order.
fn all_of<'a>(step: Option<&'a Json>, steps: &mut Vec<&'a Json>) {
    let Some(step) = step else { return };
    let inner = ["normalizers", "pretokenizers", "processors"].map(|key| step[key].as_array());
    match inner.into_iter().flatten().next() {
        // A pipeline in a pipeline is written by nobody; one more level is enough to look at.
        Some(inner) => steps.extend(inner),
        None => steps.push(step),
    }
}

fn has_type(step: Option<&Json>, kind: &str) -> bool {
    let mut steps = Vec::new();
    all_of(step, &mut steps);
    steps.iter().any(|step| step["type"] == kind)
}

/// The tokens that begin and end texts and answers, and whether the first and the last are added.
fn ends(
    meta: &mut Meta,
    read: &Written,
    ids: &HashMap<String, u64>,
    settings: &Json,
    generation: &Json,
) {
    let id_of = |text: &str| {
        let added = read.added_tokens.iter().find(|token| token.content == text);
        added.map(|token| token.id).or_else(|| ids.get(text).copied())
    };
    let said = |name: &str| {
        let token = &settings[name];
        token.as_str().or(token["content"].as_str()).and_then(id_of)
    };
    let numbers = |name: &str| -> Vec<u64> {
        let value = &generation[name];
        let list = value.as_array().into_iter().flatten().filter_map(Json::as_u64);
        value.as_u64().into_iter().chain(list).collect()
    };
    let bos = said("bos_token").or_else(|| meta.u64("bos_token_id"));
    let mut eos: Vec<u64> = said("eos_token").into_iter().chain(numbers("eos_token_id")).collect();
    eos.extend(meta.u64("eos_token_id"));
    let mut seen = Vec::new();
    eos.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });
    // The places that metadata has for tokens that end an answer.
    let names = ["eos", "eot", "eom"].into_iter().zip(eos).map(|(name, id)| (name, Some(id)));
    let others = [("bos", bos), ("padding", said("pad_token")), ("unknown", said("unk_token"))];
    for (name, id) in names.chain(others) {
        if let Some(id) = id {
            set(meta, &format!("ggml.{name}_token_id"), Value::U64(id));
        }
    }
    let flag = |name: &str, is_first: bool| {
        settings[name].as_bool().unwrap_or_else(|| adds(read, is_first))
    };
    set(meta, "ggml.add_bos_token", Value::Bool(flag("add_bos_token", true)));
    set(meta, "ggml.add_eos_token", Value::Bool(flag("add_eos_token", false)));
}

/// Whether the last step puts a token before a text, or behind it.
fn adds(read: &Written, is_first: bool) -> bool {
    let mut steps = Vec::new();
    all_of(read.post_processor.as_ref(), &mut steps);
    let singles = steps.iter().filter_map(|step| step["single"].as_array());
    let mut edges =
        singles.filter_map(|single| if is_first { single.first() } else { single.last() });
    edges.any(|edge| edge.get("SpecialToken").is_some())
}

#[cfg(test)]
mod tests;
