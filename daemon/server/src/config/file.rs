//! The file of settings: TOML, a key a setting, and a table a model.

use std::{collections::BTreeMap, ops::Range, path::Path};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};
use v4_proto::ModelName;
use v4_store::fs::{self, Fs as _, RealFs};
use v4_supervisor::KeepAlive;
use v4_supervisor::policy::{HOST, ModelRules};

use super::{SETTINGS, nearest};
use crate::{api, error::Error, limits};

/// What a file says.
#[derive(Debug, Default)]
pub struct File {
    /// The words of each key, with its line.
    pub values: BTreeMap<&'static str, (String, usize)>,
    /// Of single models.
    pub models: Vec<ModelTable>,
}

/// What is wished for one model, where it differs from what is wished for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelTable {
    /// Which.
    pub name: ModelName,
    /// How long it stays loaded after its last answer, if its request says nothing.
    pub keep_alive: Option<KeepAlive>,
    /// Whether it is loaded when the daemon starts.
    pub preload: bool,
    /// What the supervisor is told of it.
    pub rules: ModelRules,
}

/// The keys of a model's table.
const MODEL_KEYS: [&str; 11] = [
    "keep_alive",
    "preload",
    "pin",
    "slots",
    "context",
    "max_queue",
    "priority",
    "group",
    "excludes",
    "device",
    "gpus",
];

/// What is wrong, and where.
struct Wrong {
    at: Range<usize>,
    what: String,
}

impl File {
    /// Reads a file. One that is not there says nothing.
    ///
    /// # Errors
    /// [`Error::File`] with the line.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let failed = |line, what| Error::File { path: path.to_owned(), line, what };
        let is_there = RealFs.meta(path).map_err(|error| failed(1, error.to_string()))?.is_some();
        if !is_there {
            return Ok(Self::default());
        }
        let bytes = fs::read(&RealFs, path, limits::CONFIG_BYTES);
        let bytes = bytes.map_err(|error| failed(1, error.to_string()))?;
        let text = String::from_utf8(bytes)
            .map_err(|error| failed(1, format!("it is not UTF-8: {error}")))?;
        Self::parse(&text).map_err(|Wrong { at, what }| failed(line(&text, at.start), what))
    }

    fn parse(text: &str) -> Result<Self, Wrong> {
        let table = DeTable::parse(text).map_err(|error| {
            let what = error.message().lines().collect::<Vec<_>>().join(", ");
            Wrong { at: error.span().unwrap_or(0..0), what }
        })?;
        let mut file = Self::default();
        for (key, value) in in_order(table.get_ref()) {
            if key.get_ref() == "model" {
                file.models = models(value)?;
                continue;
            }
            let known = SETTINGS.iter().find(|setting| setting.key == key.get_ref().as_ref());
            let Some(setting) = known else {
                let keys = SETTINGS.iter().map(|setting| setting.key).chain(["model"]);
                return Err(unknown(key, keys));
            };
            let words = words(value).ok_or_else(|| Wrong {
                at: value.span(),
                what: format!("{} must be a text, a number, true, false or a list", setting.key),
            })?;
            file.values.insert(setting.key, (words, line(text, key.span().start)));
        }
        Ok(file)
    }
}

/// The keys of a table as they stand in the file, so that its first mistake is the one that is
/// named.
fn in_order<'a, 'i>(
    table: &'a DeTable<'i>,
) -> Vec<(&'a Spanned<std::borrow::Cow<'i, str>>, &'a Spanned<DeValue<'i>>)> {
    let mut pairs: Vec<_> = table.iter().collect();
    pairs.sort_by_key(|(key, _)| key.span().start);
    pairs
}

/// The number of the line that has this byte.
fn line(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1
}

fn unknown<'a>(
    key: &Spanned<std::borrow::Cow<'_, str>>,
    keys: impl Iterator<Item = &'a str>,
) -> Wrong {
    let word: String = key.get_ref().chars().take(limits::ECHO_CHARS).collect();
    let near = nearest(&word, keys).unwrap_or_default();
    Wrong { at: key.span(), what: format!("there is no setting '{word}'; did you mean '{near}'?") }
}

/// A value as a variable would say it.
fn words(value: &Spanned<DeValue<'_>>) -> Option<String> {
    Some(match value.get_ref() {
        DeValue::String(text) => text.trim().to_owned(),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).ok()?.to_string()
        }
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Boolean(is_on) => if *is_on { "on" } else { "off" }.to_owned(),
        DeValue::Array(items) => {
            let texts: Option<Vec<String>> = items.iter().map(words).collect();
            texts?.join(",")
        }
        DeValue::Table(_) | DeValue::Datetime(_) => return None,
    })
}

fn models(value: &Spanned<DeValue<'_>>) -> Result<Vec<ModelTable>, Wrong> {
    let shape = || Wrong {
        at: value.span(),
        what: "write a model as a table of its own, [model.\"NAME\"]".to_owned(),
    };
    let tables = value.get_ref().as_table().ok_or_else(shape)?;
    let mut models: Vec<ModelTable> = Vec::new();
    for (key, value) in in_order(tables) {
        let wrong = |what: String| Wrong { at: key.span(), what };
        let name: ModelName =
            key.get_ref().parse().map_err(|error| wrong(format!("no model's name: {error}")))?;
        let table = value.get_ref().as_table().ok_or_else(shape)?;
        if models.iter().any(|known| known.name.matches(&name)) {
            return Err(wrong(format!("there are two tables for the model '{name}'")));
        }
        models.push(model(name, table)?);
    }
    Ok(models)
}

fn model(name: ModelName, table: &DeTable<'_>) -> Result<ModelTable, Wrong> {
    let mut model =
        ModelTable { name, keep_alive: None, preload: false, rules: ModelRules::default() };
    for (key, value) in in_order(table) {
        let wrong = |what: &str| Wrong {
            at: value.span(),
            what: format!("{} of the model '{}' must be {what}", key.get_ref(), model.name),
        };
        let is_on = || value.get_ref().as_bool().ok_or_else(|| wrong("true or false"));
        let rules = &mut model.rules;
        match key.get_ref().as_ref() {
            "keep_alive" => {
                let said = words(value).and_then(|text| api::keep_alive::parse_text(&text).ok());
                let said = said.flatten().ok_or_else(|| wrong("seconds or a duration such as 5m"));
                model.keep_alive = Some(said?);
                rules.keep_alive = model.keep_alive;
            }
            "preload" => model.preload = is_on()?,
            "pin" => rules.pinned = is_on()?,
            "slots" => rules.slots = Some(positive(value).ok_or_else(|| wrong(POSITIVE))?),
            "context" => rules.context = Some(positive(value).ok_or_else(|| wrong(POSITIVE))?),
            "max_queue" => {
                let said: u32 = positive(value).ok_or_else(|| wrong(POSITIVE))?;
                rules.max_queue = Some(said as usize);
            }
            "priority" => {
                let said = words(value).and_then(|text| text.parse().ok());
                rules.priority = said.ok_or_else(|| wrong("a number from -128 to 127"))?;
            }
            "group" => {
                let said = value.get_ref().as_str().ok_or_else(|| wrong("a word in quotes"))?;
                rules.group = Some(said.to_owned());
            }
            "excludes" => {
                let said = words(value).ok_or_else(|| wrong("a list of names"))?;
                let names = said.split(',').map(str::trim).filter(|name| !name.is_empty());
                rules.excludes = names.map(str::to_owned).collect();
            }
            "device" => rules.device = Some(device(value).ok_or_else(|| wrong(DEVICE))?),
            "gpus" => rules.gpus = Some(positive(value).ok_or_else(|| wrong(POSITIVE))?),
            _ => return Err(unknown(key, MODEL_KEYS.into_iter())),
        }
    }
    Ok(model)
}

/// What a device of a model's table must be.
const DEVICE: &str = "host, gpu0 or another number, or the UUID of a GPU, in quotes";

/// The name of a device; whether it is there is known when a model is asked for.
fn device(value: &Spanned<DeValue<'_>>) -> Option<String> {
    let name = value.get_ref().as_str()?.trim();
    let is_number = |n: &str| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit());
    let is_index = name.strip_prefix("gpu").is_some_and(is_number);
    let is_known = name == HOST || is_index || name.starts_with("GPU-");
    is_known.then(|| name.to_owned())
}

/// What a count of a model's table must be.
const POSITIVE: &str = "a number above 0";

fn positive(value: &Spanned<DeValue<'_>>) -> Option<u32> {
    words(value).and_then(|text| text.parse().ok()).filter(|&n| n > 0)
}
