//! A name's record: which blobs play which role. The bytes are an OCI manifest as Ollama writes it;
//! they are kept as they came, so a model has the same identity everywhere.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use v4_proto::{Digest, ModelName};

use crate::{error::ManifestError, limits};

/// The media type of the manifest itself.
pub const MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// The media type of the config blob.
pub const CONFIG_TYPE: &str = "application/vnd.docker.container.image.v1+json";
/// The media types of ModelPack for the files of a model folder: weights, and what lies beside.
pub const FOLDER_WEIGHTS_TYPE: &str = "application/vnd.cncf.model.weight.v1.raw";
/// See [`FOLDER_WEIGHTS_TYPE`].
pub const FOLDER_CONFIG_TYPE: &str = "application/vnd.cncf.model.weight.config.v1.raw";
/// Where a layer says what its file is called: ModelPack's and the usual annotation.
const FILE_NAMES: [&str; 2] = ["org.cncf.model.filepath", "org.opencontainers.image.title"];
/// The file that makes a model a folder.
const FOLDER_MARK: &str = "config.json";
/// What the media types of all roles begin with.
const ROLE_PREFIX: &str = "application/vnd.ollama.image.";

/// What a blob is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Weights.
    Model,
    /// A file beside the weights of a model folder: configuration, tokenizer, template.
    Config,
    /// A chat template that replaces the file's own.
    Template,
    /// The default system message.
    System,
    /// Default parameters, a JSON object.
    Params,
    /// The text of a licence.
    License,
    /// The turns that every conversation starts with, a JSON list.
    Messages,
    /// A low-rank adapter.
    Adapter,
    /// An image encoder.
    Projector,
    /// Something this version does not know; kept.
    Other,
}

impl Role {
    /// Roles and the words that end their media types, the one to write first.
    const WORDS: [(Role, &'static str); 9] = [
        (Role::Model, "model"),
        (Role::Template, "template"),
        (Role::Template, "prompt"),
        (Role::System, "system"),
        (Role::Params, "params"),
        (Role::License, "license"),
        (Role::Messages, "messages"),
        (Role::Adapter, "adapter"),
        (Role::Projector, "projector"),
    ];

    /// Roles and the media types of other tools: OCI ModelPack's and Docker's. A layer of ModelPack
    /// that is an archive is unpacked on its way here, so it has no role.
    const OTHERS: [(Role, &'static str); 7] = [
        (Role::Model, FOLDER_WEIGHTS_TYPE),
        (Role::Config, FOLDER_CONFIG_TYPE),
        (Role::Config, "application/vnd.ollama.image.json"),
        (Role::Model, "application/vnd.docker.ai.gguf.v3"),
        (Role::License, "application/vnd.docker.ai.license"),
        (Role::Template, "application/vnd.docker.ai.chat.template.jinja"),
        (Role::Projector, "application/vnd.docker.ai.mmproj"),
    ];

    /// The role that a media type says.
    pub fn from_media_type(media_type: &str) -> Self {
        let media_type = media_type.split(';').next().unwrap_or_default().trim_end();
        let word = media_type.strip_prefix(ROLE_PREFIX);
        let ours = Self::WORDS.iter().find(|entry| word == Some(entry.1));
        let other = Self::OTHERS.iter().find(|entry| entry.1 == media_type);
        ours.or(other).map_or(Self::Other, |entry| entry.0)
    }

    /// The media type to write for this role.
    pub fn media_type(self) -> String {
        if self == Self::Config {
            return FOLDER_CONFIG_TYPE.to_owned();
        }
        let word =
            Self::WORDS.iter().find(|entry| entry.0 == self).map_or("other", |entry| entry.1);
        format!("{ROLE_PREFIX}{word}")
    }
}

/// One blob of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Layer {
    /// What it is, as the manifest says.
    pub media_type: String,
    /// Which blob.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// Whatever else the manifest says of it.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Layer {
    /// A layer of a media type.
    pub fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self { media_type: media_type.into(), digest, size, extra: Map::new() }
    }

    /// A layer that is a file of a model folder.
    pub fn file(media_type: impl Into<String>, name: &str, digest: Digest, size: u64) -> Self {
        let annotations = Map::from_iter([(FILE_NAMES[0].to_owned(), name.into())]);
        let extra = Map::from_iter([("annotations".to_owned(), annotations.into())]);
        Self { extra, ..Self::new(media_type, digest, size) }
    }

    /// What it is for.
    pub fn role(&self) -> Role {
        Role::from_media_type(&self.media_type)
    }

    /// What its file is called in its folder, where the manifest says so.
    pub fn file_name(&self) -> Option<&str> {
        let annotation = |key: &&str| self.extra.get("annotations")?.get(key)?.as_str();
        let name = || self.extra.get("name")?.as_str();
        FILE_NAMES.iter().find_map(annotation).or_else(name)
    }
}

/// A manifest, read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    /// The config blob: facts of the model as JSON.
    pub config: Layer,
    /// The blobs.
    #[serde(default)]
    pub layers: Vec<Layer>,
    /// Whatever else the manifest says.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Manifest {
    /// A new manifest.
    pub fn new(config: Layer, layers: Vec<Layer>) -> Self {
        Self {
            schema_version: 2,
            media_type: MANIFEST_TYPE.to_owned(),
            config,
            layers,
            extra: Map::new(),
        }
    }

    /// Reads a manifest's bytes.
    ///
    /// # Errors
    /// [`ManifestError`] when they are too many or not a manifest.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > limits::MANIFEST_BYTES {
            return Err(ManifestError::TooLong);
        }
        let manifest: Self = serde_json::from_slice(bytes)?;
        let sum = manifest.blobs().try_fold(0_u64, |sum, blob| sum.checked_add(blob.size));
        sum.map(|_| manifest).ok_or(ManifestError::Sizes)
    }

    /// The bytes of a manifest that was made here. One that came from elsewhere is stored as it
    /// came.
    ///
    /// # Panics
    /// Never: a manifest is always JSON.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a manifest has string keys only, so it is always JSON")
    }

    /// All blobs, the config first.
    pub fn blobs(&self) -> impl Iterator<Item = &Layer> {
        std::iter::once(&self.config).chain(&self.layers)
    }

    /// The digests of all blobs: what a lease must hold.
    pub fn digests(&self) -> Vec<Digest> {
        self.blobs().map(|blob| blob.digest).collect()
    }

    /// The layers of a role, in order.
    pub fn role(&self, role: Role) -> impl Iterator<Item = &Layer> {
        self.layers.iter().filter(move |layer| layer.role() == role)
    }

    /// What a runner opens, in order, and what each is called in its folder: no names for GGUF
    /// weights, all names for a model folder.
    pub fn weights(&self) -> (Vec<Digest>, Vec<String>) {
        let is_mark =
            |layer: &Layer| layer.role() == Role::Config && layer.file_name() == Some(FOLDER_MARK);
        if !self.layers.iter().any(is_mark) {
            return (self.role(Role::Model).map(|layer| layer.digest).collect(), Vec::new());
        }
        let is_file = |layer: &&Layer| matches!(layer.role(), Role::Model | Role::Config);
        let named = |layer: &Layer| Some((layer.digest, layer.file_name()?.to_owned()));
        self.layers.iter().filter(is_file).filter_map(named).unzip()
    }

    /// What the inspection of the weights is kept under: the digest of a file that is alone in
    /// having a header, else one of all the files and their names together.
    pub fn inspection_key(&self) -> Option<Digest> {
        let (weights, names) = self.weights();
        inspection_key(&weights, &names)
    }

    /// Bytes of all blobs.
    pub fn size_bytes(&self) -> u64 {
        self.blobs().fold(0, |sum, blob| sum.saturating_add(blob.size))
    }
}

/// The files beside the weights of a model folder that a runner reads.
const FOLDER_FILES: [&str; 7] = [
    FOLDER_MARK,
    "chat_template.jinja",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// What a file of a model folder is for by its name, and its media type; `None` for one that is not
/// needed.
pub fn folder_file(name: &str) -> Option<(Role, &'static str)> {
    let is_plain = !name.starts_with('.') && !name.contains(['/', '\\', '\0']);
    if is_plain && name.strip_suffix(".safetensors").is_some_and(|stem| !stem.is_empty()) {
        Some((Role::Model, FOLDER_WEIGHTS_TYPE))
    } else if FOLDER_FILES.contains(&name) {
        Some((Role::Config, FOLDER_CONFIG_TYPE))
    } else {
        None
    }
}

/// What a model folder lacks to be run; `None` where it lacks nothing.
pub fn folder_lacks(names: &[&str]) -> Option<&'static str> {
    let has_weights =
        names.iter().any(|name| folder_file(name).is_some_and(|(role, _)| role == Role::Model));
    if !has_weights {
        return Some("files that end in .safetensors");
    }
    [FOLDER_MARK, "tokenizer.json"].into_iter().find(|needed| !names.contains(needed))
}

/// What the inspection of these files is kept under, see [`Manifest::inspection_key`].
pub fn inspection_key(weights: &[Digest], names: &[String]) -> Option<Digest> {
    if names.is_empty() {
        return weights.first().copied();
    }
    let lines = weights.iter().zip(names).map(|(digest, name)| format!("{digest} {name}\n"));
    Some(crate::sha256(lines.collect::<String>().as_bytes()))
}

/// A name that is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name as it is stored.
    pub name: ModelName,
    /// The digest of the manifest's bytes: the model's identity.
    pub digest: Digest,
    /// Bytes of all its blobs.
    pub size_bytes: u64,
    /// When the name was last made to point here.
    pub modified: SystemTime,
}

/// A name with its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The name as it is stored.
    pub name: ModelName,
    /// The digest of the manifest's bytes: the model's identity.
    pub digest: Digest,
    /// What it points to.
    pub manifest: Manifest,
    /// When the name was last made to point here.
    pub modified: SystemTime,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manifest as Ollama's registry serves it, with fields this version does not know.
    const FOREIGN: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{"mediaType":"application/vnd.docker.container.image.v1+json","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000001","size":488},"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000002","size":91727296,"from":"elsewhere"},{"mediaType":"application/vnd.ollama.image.prompt","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000003","size":7},{"mediaType":"application/x.new","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000004","size":1}],"annotations":{"a":"b"}}"#;

    #[test]
    fn a_foreign_manifest_keeps_every_byte() {
        let manifest = Manifest::parse(FOREIGN.as_bytes()).unwrap();
        assert_eq!(String::from_utf8(manifest.encode()).unwrap(), FOREIGN);
        let roles: Vec<Role> = manifest.layers.iter().map(Layer::role).collect();
        assert_eq!(roles, [Role::Model, Role::Template, Role::Other]);
        assert_eq!(manifest.size_bytes(), 488 + 91_727_296 + 7 + 1);
        assert_eq!(manifest.role(Role::Model).count(), 1);
    }

    #[test]
    fn roles_and_media_types_agree() {
        for (role, word) in Role::WORDS {
            assert_eq!(Role::from_media_type(&format!("{ROLE_PREFIX}{word}")), role);
            assert_eq!(Role::from_media_type(&role.media_type()), role);
        }
        assert_eq!(Role::from_media_type("text/plain"), Role::Other);
        for (role, media_type) in Role::OTHERS {
            assert_eq!(Role::from_media_type(media_type), role);
        }
    }

    #[test]
    fn a_model_folder_is_opened_by_the_names_of_its_files() {
        let [a, b, c] = [b"a", b"b", b"c"].map(|bytes| crate::sha256(bytes));
        let weights = Layer::file(FOLDER_WEIGHTS_TYPE, "model.safetensors", a, 1);
        let config = Layer::file(FOLDER_CONFIG_TYPE, "config.json", b, 1);
        let license = Layer::new(Role::License.media_type(), c, 1);
        let manifest = |layers| Manifest::new(Layer::new(CONFIG_TYPE, c, 1), layers);
        let folder = manifest(vec![weights.clone(), license.clone(), config.clone()]);
        let names = vec!["model.safetensors".to_owned(), "config.json".to_owned()];
        assert_eq!(folder.weights(), (vec![a, b], names));
        let read = Manifest::parse(&folder.encode()).unwrap();
        assert_eq!(read, folder);
        // A file that is alone is opened as it is.
        let single = manifest(vec![weights.clone(), license]);
        assert_eq!((single.weights(), single.inspection_key()), ((vec![a], Vec::new()), Some(a)));
        let key = folder.inspection_key().unwrap();
        let other = Layer::file(FOLDER_CONFIG_TYPE, "config.json", c, 1);
        assert_ne!(manifest(vec![weights, other]).inspection_key(), Some(key));
        let mut ollamas = config;
        ollamas.media_type = "application/vnd.ollama.image.json".to_owned();
        ollamas.extra = Map::from_iter([("name".to_owned(), "config.json".into())]);
        assert_eq!((ollamas.role(), ollamas.file_name()), (Role::Config, Some("config.json")));
    }

    #[test]
    fn hostile_manifests_are_refused() {
        let huge = format!("{{\"x\":\"{}\"}}", "a".repeat(limits::MANIFEST_BYTES));
        let deep = "[".repeat(100_000);
        let sizes = FOREIGN.replace("\"size\":7", &format!("\"size\":{}", u64::MAX));
        let path = FOREIGN.replace("sha256:00", "sha256:../../");
        let negative = FOREIGN.replace("\"size\":7", "\"size\":-7");
        for text in ["", "{}", "null", &huge, &deep, &sizes, &path, &negative, &FOREIGN[..200]] {
            assert!(Manifest::parse(text.as_bytes()).is_err());
        }
    }
}
