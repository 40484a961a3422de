//! A new name of what is here: another model, files that were uploaded, texts and parameters.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use v4_proto::{Code, Digest, Fault, Inspection, Message, ModelFiles};
use v4_store::{
    Layer, Manifest, Record, Role, Store, StoreError,
    manifest::{CONFIG_TYPE, folder_file, folder_lacks, inspection_key},
};

use crate::{
    daemon::Daemon,
    limits,
    ops::{models::Wanted, pull},
    options::Options,
};

/// What a new model is made of. What is not said comes from `from`.
#[derive(Debug, Clone, PartialEq)]
pub struct Create {
    /// The name to make.
    pub target: Wanted,
    /// The model it begins with.
    pub from: Option<Wanted>,
    /// Weights that were uploaded: what they are called, and their blobs, in order.
    pub files: Vec<(String, Digest)>,
    /// Adapters that were uploaded.
    pub adapters: Vec<(String, Digest)>,
    /// The chat template.
    pub template: Option<String>,
    /// The default system message.
    pub system: Option<String>,
    /// Default parameters, laid over those of `from`.
    pub parameters: Map<String, Value>,
    /// The turns that every conversation starts with.
    pub messages: Vec<Message>,
    /// Licences; those of `from` stay when none is said.
    pub licenses: Vec<String>,
    /// Fields of the config blob: renderer, parser, requires.
    pub config: Map<String, Value>,
}

/// Takes the lines that tell how far it is.
pub type Say = mpsc::Sender<String>;

/// Makes the name. Returns the digest of its manifest.
///
/// # Errors
/// `not_found` for a model or a blob that is not here; `invalid` and `unsupported` for what cannot
/// be made; what the store says.
pub async fn create(daemon: &Arc<Daemon>, order: Create, say: &Say) -> Result<Digest, Fault> {
    let files = order.files.iter().chain(&order.adapters);
    let digests: Vec<Digest> = files.map(|(_, digest)| *digest).collect();
    let _lease = daemon.store.lease(&digests);
    let base = match &order.from {
        Some(from) => Some(base(daemon, from).await?),
        None => None,
    };
    let is_folder = order
        .files
        .iter()
        .any(|(name, _)| folder_file(name).is_some_and(|(role, _)| role == Role::Model));
    let mut order = order;
    if is_folder {
        order.files = folder(order.files)?;
    }
    let weights = sizes(daemon, &order.files).await?;
    let adapters = sizes(daemon, &order.adapters).await?;
    let mut inspection = None;
    if !weights.is_empty() {
        // Whoever left need not hear it.
        let what = if is_folder { "parsing safetensors" } else { "parsing GGUF" };
        let _ = say.send(what.to_owned()).await;
        let names = if is_folder { names(&order.files) } else { Vec::new() };
        inspection = Some(inspect(daemon, &weights, names).await?);
    }
    Options::read(&order.parameters)?;
    let target = order.target.clone();
    let parts = Parts { order, base, is_folder, weights, adapters, inspection };
    let (sender, mut lines) = mpsc::channel(limits::CREATE_LINES);
    let work = daemon.blocking(move |store| parts.write(store, &sender));
    let tell = async {
        while let Some(line) = lines.recv().await {
            let _ = say.send(line).await;
        }
    };
    let (digest, ()) = tokio::join!(work, tell);
    let digest = digest?;
    tokio::spawn(pull::replace(Arc::clone(daemon), target, digest));
    Ok(digest)
}

/// The files of a model folder that a runner reads; others are left out.
fn folder(files: Vec<(String, Digest)>) -> Result<Vec<(String, Digest)>, Fault> {
    let files: Vec<_> = files.into_iter().filter(|(name, _)| folder_file(name).is_some()).collect();
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    match folder_lacks(&names) {
        None => Ok(files),
        Some(what) => {
            Err(Fault::invalid(format!("a model of safetensors needs {what} among its files")))
        }
    }
}

fn names(files: &[(String, Digest)]) -> Vec<String> {
    files.iter().map(|(name, _)| name.clone()).collect()
}

/// What is said of a model that was stored all the same.
pub fn cannot_run(arch: &str) -> String {
    format!(
        "warning: the model is stored, but cannot run: this version of v4 cannot run the \
         architecture {arch}"
    )
}

/// The model that a new one begins with.
async fn base(daemon: &Daemon, from: &Wanted) -> Result<Record, Fault> {
    let name = from.name.clone();
    let record = daemon.blocking(move |store| store.find(&name)).await?;
    record.ok_or_else(|| {
        let text = &from.text;
        Fault::new(
            Code::NotFound,
            format!("model '{text}' not found; get it with `v4 pull {text}`"),
        )
    })
}

/// Uploaded files with their sizes.
async fn sizes(daemon: &Daemon, files: &[(String, Digest)]) -> Result<Vec<(Digest, u64)>, Fault> {
    let files = files.to_vec();
    let found = daemon.blocking(move |store| {
        files
            .into_iter()
            .map(|(name, digest)| Ok((name, digest, store.blob(&digest)?)))
            .collect::<Result<Vec<_>, StoreError>>()
    });
    let of = |(name, digest, size): (String, Digest, Option<u64>)| {
        let missing = || {
            let words = format!("the blob {digest} of {name:?} is not here; upload it first");
            Fault::new(Code::NotFound, words)
        };
        size.map(|size| (digest, size)).ok_or_else(missing)
    };
    found.await?.into_iter().map(of).collect()
}

/// What the header of the new weights says, read by a short-lived runner.
async fn inspect(
    daemon: &Daemon,
    weights: &[(Digest, u64)],
    names: Vec<String>,
) -> Result<Inspection, Fault> {
    let paths = weights.iter().map(|(digest, _)| daemon.store.blob_path(digest)).collect();
    let files = ModelFiles { weights: paths, names, ..ModelFiles::default() };
    daemon.supervisor.inspect(files).await
}

/// All that a manifest is written of.
struct Parts {
    order: Create,
    base: Option<Record>,
    /// The weights are the files of a model folder.
    is_folder: bool,
    weights: Vec<(Digest, u64)>,
    adapters: Vec<(Digest, u64)>,
    inspection: Option<Inspection>,
}

impl Parts {
    /// Writes the texts, the config and the manifest. Returns the manifest's digest.
    fn write(&self, store: &Store, say: &mpsc::Sender<String>) -> Result<Digest, StoreError> {
        let mut layers: Vec<Layer> = Vec::new();
        if let Some(base) = &self.base {
            layers.clone_from(&base.manifest.layers);
        }
        let mut set = |role: Role, new: Vec<(Digest, u64)>| {
            if !new.is_empty() {
                layers.retain(|layer| layer.role() != role);
                let layer = |(digest, size)| Layer::new(role.media_type(), digest, size);
                layers.extend(new.into_iter().map(layer));
            }
        };
        if !self.is_folder {
            set(Role::Model, self.weights.clone());
        }
        set(Role::Adapter, self.adapters.clone());
        let mut leases = Vec::new();
        for (role, texts) in self.texts(store)? {
            let mut new = Vec::new();
            for text in texts {
                leases.push(store.lease(&[v4_store::sha256(text.as_bytes())]));
                new.push(put(store, say, text.as_bytes())?);
            }
            set(role, new);
        }
        if !self.weights.is_empty() {
            // What lay beside the old weights says nothing of the new ones.
            layers.retain(|layer| layer.role() != Role::Config);
        }
        if self.is_folder {
            layers.retain(|layer| layer.role() != Role::Model);
            layers.splice(0..0, self.folder());
        }
        let config = self.config(store)?;
        leases.push(store.lease(&[v4_store::sha256(&config)]));
        let (digest, size) = put(store, say, &config)?;
        let weights: Vec<Digest> = self.weights.iter().map(|(digest, _)| *digest).collect();
        let names = if self.is_folder { names(&self.order.files) } else { Vec::new() };
        let key = inspection_key(&weights, &names);
        if let (Some(inspection), Some(key)) = (&self.inspection, key) {
            // Only a cache: without it the header is read again.
            let _ = store.put_inspection(&key, inspection);
        }
        let manifest = Manifest::new(Layer::new(CONFIG_TYPE, digest, size), layers);
        let _ = say.blocking_send("writing manifest".to_owned());
        store.put_manifest(&self.order.target.name, &manifest.encode())
    }

    /// The files of a model folder as layers.
    fn folder(&self) -> Vec<Layer> {
        let files = self.order.files.iter().zip(&self.weights);
        let layer = |((name, _), (digest, size)): (&(String, Digest), &(Digest, u64))| {
            let (_, media_type) = folder_file(name)?;
            Some(Layer::file(media_type, name, *digest, *size))
        };
        files.filter_map(layer).collect()
    }

    /// The texts of each role that is said.
    fn texts(&self, store: &Store) -> Result<Vec<(Role, Vec<String>)>, StoreError> {
        let order = &self.order;
        let one = |text: &Option<String>| text.iter().cloned().collect::<Vec<String>>();
        let params = self.params(store)?;
        let messages = (!order.messages.is_empty())
            .then(|| serde_json::to_string(&order.messages).expect("turns are JSON"));
        Ok(vec![
            (Role::Template, one(&order.template)),
            (Role::System, one(&order.system)),
            (Role::Params, one(&params)),
            (Role::Messages, one(&messages)),
            (Role::License, order.licenses.clone()),
        ])
    }

    /// The parameters, laid over those of the base.
    fn params(&self, store: &Store) -> Result<Option<String>, StoreError> {
        if self.order.parameters.is_empty() {
            return Ok(None);
        }
        let layer = self.base.as_ref().and_then(|base| base.manifest.role(Role::Params).next());
        let before = match layer {
            Some(layer) => store.read_blob(&layer.digest, limits::ROLE_BYTES)?,
            None => Vec::new(),
        };
        let mut params: Map<String, Value> = serde_json::from_slice(&before).unwrap_or_default();
        params.extend(self.order.parameters.clone());
        Ok(Some(Value::Object(params).to_string()))
    }

    /// The config blob: of the new weights, else of the base, with what is said laid over it.
    fn config(&self, store: &Store) -> Result<Vec<u8>, StoreError> {
        let mut bytes = v4_pull::config::encode(self.inspection.as_ref().map(|one| &one.info));
        if let (None, Some(base)) = (&self.inspection, &self.base) {
            bytes = store.read_blob(&base.manifest.config.digest, limits::ROLE_BYTES)?;
        }
        if self.order.config.is_empty() {
            return Ok(bytes);
        }
        let mut config: Value = serde_json::from_slice(&bytes).unwrap_or_else(|_| json!({}));
        if let Some(fields) = config.as_object_mut() {
            fields.extend(self.order.config.clone());
        }
        Ok(config.to_string().into_bytes())
    }
}

/// Stores a small blob and says whether it was there.
fn put(
    store: &Store,
    say: &mpsc::Sender<String>,
    bytes: &[u8],
) -> Result<(Digest, u64), StoreError> {
    let digest = v4_store::sha256(bytes);
    let word = if store.blob(&digest)?.is_some() { "using existing" } else { "creating new" };
    let _ = say.blocking_send(format!("{word} layer {digest}"));
    Ok((store.put_blob(bytes)?, bytes.len() as u64))
}
