//! What is stored: resolve a name, list, describe, remove.

use std::{path::PathBuf, sync::Arc};

use serde::Deserialize;
use serde_json::{Map, Value};
use v4_proto::{
    Ability, Code, Digest, Fault, Inspection, Message, ModelFiles, ModelInfo, ModelName,
};
use v4_store::{Entry, Record, Role, Store, StoreError, manifest::inspection_key};
use v4_supervisor::Target;

use crate::{daemon::Daemon, limits, options::Options};

/// A model as a client asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its name.
    pub name: ModelName,
    /// The name as it was written, which answers repeat.
    pub text: String,
}

impl Wanted {
    /// The fault for a model that is not there.
    pub fn not_found(&self) -> Fault {
        Fault::new(Code::NotFound, format!("model '{}' not found", self.text))
    }
}

/// The small roles of a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Texts {
    /// Default parameters by name.
    pub params: Map<String, Value>,
    /// The default system message.
    pub system: Option<String>,
    /// The chat template of the manifest.
    pub template: Option<Template>,
    /// The turns that every conversation starts with.
    pub messages: Vec<Message>,
    /// The licences.
    pub licenses: Vec<String>,
}

/// A chat template of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Template {
    /// It replaces the template in the weights.
    Jinja(String),
    /// Go's language, which this build does not run: the template in the weights is used.
    Go(String),
}

impl Template {
    /// Statements tell the languages apart: every chat template in Jinja has a loop, `{% for`, and
    /// Go's language has no `{%`.
    fn of(text: String) -> Self {
        if text.contains("{%") { Self::Jinja(text) } else { Self::Go(text) }
    }
}

/// A stored model, resolved.
#[derive(Debug, Clone)]
pub struct Model {
    /// Its name and manifest.
    pub record: Record,
    /// Its small roles.
    pub texts: Texts,
    /// What a runner opens.
    pub files: ModelFiles,
    /// The weights, with all that lies beside them in a model folder.
    pub weights: Vec<Digest>,
    /// What figures and inspection are kept under.
    pub key: Digest,
    /// Where it came from, as far as that is known: JSON, or `null`.
    pub origin: Value,
}

impl Model {
    /// What the supervisor is asked for.
    pub fn target(&self, info: Option<ModelInfo>) -> Target {
        Target {
            name: self.record.name.clone(),
            digest: self.record.digest,
            files: self.files.clone(),
            blobs: self.weights.clone(),
            info,
        }
    }

    /// The options that the model brings along.
    ///
    /// # Errors
    /// `corrupt` when its parameters cannot be meant.
    pub fn options(&self) -> Result<Options, Fault> {
        Options::read(&self.texts.params).map_err(|fault| {
            let name = &self.record.name;
            Fault::new(Code::Corrupt, format!("the parameters of {name} are broken: {fault}"))
        })
    }
}

/// Finds a stored model.
///
/// # Errors
/// `not_found`; `unsupported` for a model with an adapter; what the store says.
pub async fn resolve(daemon: &Daemon, wanted: &Wanted) -> Result<Model, Fault> {
    let name = wanted.name.clone();
    // One visit to the store: each costs a thread's waking, and all who ask pay it.
    let found = daemon.blocking(move |store| {
        let Some((record, texts)) = read(store, &name)? else { return Ok(None) };
        let origin = store.origin(&record.digest);
        let origin = origin.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let is_whole = are_whole(store, &record.manifest.weights().0)?;
        Ok(Some((record, texts, origin.unwrap_or_default(), is_whole)))
    });
    let (record, texts, origin, is_whole) = found.await?.ok_or_else(|| wanted.not_found())?;
    if record.manifest.role(Role::Adapter).next().is_some() {
        return Err(Fault::new(
            Code::Unsupported,
            format!("model '{}' has an adapter, which this version does not support", wanted.text),
        ));
    }
    let (weights, names) = record.manifest.weights();
    let Some(key) = inspection_key(&weights, &names) else {
        return Err(Fault::new(
            Code::Unsupported,
            format!("model '{}' has no weights of its own in the store", wanted.text),
        ));
    };
    if !is_whole {
        return Err(Fault::new(
            Code::Corrupt,
            format!(
                "the weights of model '{0}' are missing or were changed on disk; mend them with \
                 `v4 pull {0}`",
                wanted.text
            ),
        ));
    }
    let chat_template = match &texts.template {
        Some(Template::Jinja(text)) => Some(text.clone()),
        _ => None,
    };
    let paths: Vec<PathBuf> = weights.iter().map(|digest| daemon.store.blob_path(digest)).collect();
    let files = ModelFiles { weights: paths, names, chat_template };
    Ok(Model { record, texts, files, weights, key, origin })
}

/// Whether the weights are what their digests say: a file that somebody cut, changed or removed
/// would end the runner, or worse, answer.
fn are_whole(store: &Store, weights: &[Digest]) -> Result<bool, StoreError> {
    match weights.iter().try_for_each(|digest| store.intact(digest)) {
        Ok(()) => Ok(true),
        Err(StoreError::Missing(_) | StoreError::Digest { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn read(store: &Store, name: &ModelName) -> Result<Option<(Record, Texts)>, StoreError> {
    let Some(record) = store.find(name)? else { return Ok(None) };
    let mut texts = Texts::default();
    for layer in &record.manifest.layers {
        let role = layer.role();
        let is_text = !matches!(
            role,
            Role::Model | Role::Config | Role::Adapter | Role::Projector | Role::Other
        );
        if !is_text {
            continue;
        }
        let bytes = store.read_blob(&layer.digest, limits::ROLE_BYTES)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match role {
            Role::Template => texts.template = Some(Template::of(text)),
            Role::System => texts.system = Some(text).filter(|text| !text.is_empty()),
            Role::License => texts.licenses.push(text),
            Role::Params => texts.params = json(&record, "parameters", &text),
            Role::Messages => texts.messages = json(&record, "messages", &text),
            Role::Model | Role::Config | Role::Adapter | Role::Projector | Role::Other => {}
        }
    }
    Ok(Some((record, texts)))
}

/// A role that is JSON. One that is broken counts as empty, with a line in the log: the model can
/// still answer.
fn json<T: for<'de> Deserialize<'de> + Default>(record: &Record, what: &str, text: &str) -> T {
    serde_json::from_str(text).unwrap_or_else(|error| {
        tracing::warn!(name = %record.name, what, %error, "a role cannot be read and is ignored");
        T::default()
    })
}

/// The figures of a model: kept ones, or read by a short-lived runner.
///
/// # Errors
/// What the runner says of the files.
pub async fn info(daemon: &Daemon, model: &Model) -> Result<ModelInfo, Fault> {
    let key = model.key;
    if let Some(info) = daemon.known(&key) {
        return Ok(info);
    }
    let info = inspection(daemon, model).await?.info;
    daemon.keep(key, info.clone());
    Ok(info)
}

/// All that the header of a model says.
///
/// # Errors
/// What the runner says of the files.
pub async fn inspection(daemon: &Daemon, model: &Model) -> Result<Inspection, Fault> {
    let key = model.key;
    let kept = daemon.blocking(move |store| Ok(store.inspection(&key))).await?;
    if let Some(kept) = kept {
        return Ok(kept);
    }
    let lease = daemon.store.lease(&model.weights);
    let read = daemon.supervisor.inspect(model.files.clone()).await?;
    drop(lease);
    let copy = read.clone();
    // Only a cache: a failure costs a second look, and is in the log already.
    drop(daemon.blocking(move |store| store.put_inspection(&key, &copy)).await);
    Ok(read)
}

/// What listings say of a model. Each field is empty where nobody knows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    /// `gguf` or `safetensors`.
    pub format: String,
    /// The architecture.
    pub family: String,
    /// As people write it: `134.52M`, `8.0B`.
    pub parameter_size: String,
    /// The quant.
    pub quant: String,
    /// Tokens of context the model was trained for.
    pub context_length: Option<u32>,
    /// Width of the hidden state.
    pub embedding_length: Option<u32>,
    /// What it can do; `None` where nobody has looked.
    pub abilities: Option<Vec<Ability>>,
}

impl From<&ModelInfo> for Facts {
    fn from(info: &ModelInfo) -> Self {
        Self {
            format: info.format.clone(),
            family: info.arch.clone(),
            parameter_size: human_count(info.n_params),
            quant: info.quant.clone(),
            context_length: Some(info.context_length),
            embedding_length: Some(info.embedding_length),
            abilities: Some(info.abilities.clone()),
        }
    }
}

/// A count as Ollama writes it: two decimals in millions, one in billions, none when whole.
pub fn human_count(n: u64) -> String {
    let (unit, letter, decimals) = match n {
        1_000_000_000_000.. => (1e12, "T", 1),
        1_000_000_000.. => (1e9, "B", 1),
        1_000_000.. => (1e6, "M", 2),
        1_000.. => (1e3, "K", 0),
        _ => return n.to_string(),
    };
    let value = n as f64 / unit;
    if value.fract() == 0.0 {
        format!("{value:.0}{letter}")
    } else {
        format!("{value:.decimals$}{letter}")
    }
}

/// The config blob of a manifest, as far as listings use it.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Config {
    model_format: String,
    model_family: String,
    model_type: String,
    file_type: String,
    context_length: Option<u32>,
    embedding_length: Option<u32>,
}

/// One line of a listing.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Name, digest, size, time.
    pub entry: Entry,
    /// What is known of it without opening its weights.
    pub facts: Facts,
}

/// All stored models, newest first.
///
/// # Errors
/// What the store says.
pub async fn list(daemon: &Daemon) -> Result<Vec<Listed>, Fault> {
    daemon
        .blocking(|store| {
            let entries = store.names()?;
            Ok(entries.into_iter().map(|entry| listed(store, entry)).collect())
        })
        .await
}

fn listed(store: &Store, entry: Entry) -> Listed {
    let facts = store.find(&entry.name).ok().flatten().map(|record| facts(store, &record));
    Listed { entry, facts: facts.unwrap_or_default() }
}

/// What is known without opening the weights: the kept header, else the config blob.
fn facts(store: &Store, record: &Record) -> Facts {
    let key = record.manifest.inspection_key();
    if let Some(kept) = key.and_then(|key| store.inspection(&key)) {
        return Facts::from(&kept.info);
    }
    let config = store.read_blob(&record.manifest.config.digest, limits::ROLE_BYTES);
    let config: Config =
        config.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    Facts {
        format: config.model_format,
        family: config.model_family,
        parameter_size: config.model_type,
        quant: config.file_type,
        context_length: config.context_length,
        embedding_length: config.embedding_length,
        abilities: None,
    }
}

/// One stored model as listings show it.
///
/// # Errors
/// `not_found`; what the store says.
pub async fn one(daemon: &Daemon, wanted: &Wanted) -> Result<Listed, Fault> {
    let name = wanted.name.clone();
    let found = daemon
        .blocking(move |store| {
            let record = store.find(&name)?;
            Ok(record.map(|Record { name, digest, manifest, modified }| {
                let size_bytes = manifest.size_bytes();
                listed(store, Entry { name, digest, size_bytes, modified })
            }))
        })
        .await?;
    found.ok_or_else(|| wanted.not_found())
}

/// Gives a stored model another name, which is moved to it where it is there already.
///
/// # Errors
/// `not_found`; what the store says.
pub async fn copy(daemon: &Arc<Daemon>, from: Wanted, to: Wanted) -> Result<(), Fault> {
    let (source, target) = (from.name.clone(), to.name.clone());
    let copied = daemon.blocking(move |store| match store.manifest(&source)? {
        Some((_, bytes)) => store.put_manifest(&target, &bytes).map(Some),
        None => Ok(None),
    });
    let digest = copied
        .await?
        .ok_or_else(|| Fault::new(Code::NotFound, format!("model \"{}\" not found", from.text)))?;
    tokio::spawn(super::pull::replace(Arc::clone(daemon), to, digest));
    Ok(())
}

/// Unloads a model and deletes its name, which can come back until the next prune.
///
/// # Errors
/// `not_found`; what the store says.
pub async fn remove(daemon: &Daemon, wanted: &Wanted) -> Result<(), Fault> {
    daemon.supervisor.unload(&wanted.name).await;
    let name = wanted.name.clone();
    let was_there = daemon.blocking(move |store| store.delete(&name)).await?;
    if was_there { Ok(()) } else { Err(wanted.not_found()) }
}

/// Brings a deleted name back.
///
/// # Errors
/// `not_found`; `invalid` when the name is used again; what the store says.
pub async fn restore(daemon: &Daemon, wanted: &Wanted) -> Result<(), Fault> {
    let name = wanted.name.clone();
    if daemon.blocking(move |store| store.restore(&name)).await? {
        return Ok(());
    }
    let text = &wanted.text;
    let words = format!("there is no deleted '{text}'; `v4 list --deleted` shows those there are");
    Err(Fault::new(Code::NotFound, words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_read_as_people_write_them() {
        for (n, text) in [
            (7, "7"),
            (125_000, "125K"),
            (134_515_008, "134.52M"),
            (8_030_261_248, "8.0B"),
            (7_000_000_000, "7B"),
            (1_600_000_000_000, "1.6T"),
        ] {
            assert_eq!(human_count(n), text);
        }
    }

    #[test]
    fn the_language_of_a_template_shows_in_its_statements() {
        let jinja = "{% for m in messages %}{{ m.content }}{% endfor %}";
        assert_eq!(Template::of(jinja.into()), Template::Jinja(jinja.into()));
        let go = "{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}";
        assert_eq!(Template::of(go.into()), Template::Go(go.into()));
    }
}
