//! A temporary home, and models put into it the way the documented tree says.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use v4_proto::{Digest, ModelName};

use crate::golden;

const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const LAYER: &str = "application/vnd.ollama.image";

/// The variable that lets an answer of [`Home::put_endless`] go on.
pub const ENDLESS: (&str, &str) = ("V4_CONTEXT", "65536");

/// A home; a temporary one goes when it is dropped.
pub struct Home {
    root: PathBuf,
    /// Kept for its end.
    _temporary: Option<TempDir>,
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

/// A model to be put into a home.
pub struct Model<'a> {
    /// Its name.
    pub name: &'a str,
    /// The bytes of its weights.
    pub weights: Vec<u8>,
    /// Parameters as the `params` role has them, or `null`.
    pub params: Value,
}

impl Home {
    /// An empty home.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self { root: folder.path().to_owned(), _temporary: Some(folder) }
    }

    /// The home that is kept below `root`.
    pub fn kept(root: PathBuf) -> Self {
        fs::create_dir_all(&root).expect("a writable folder");
        Self { root, _temporary: None }
    }

    /// The folder of the daemon.
    pub fn path(&self) -> PathBuf {
        self.root.join("home")
    }

    /// A folder beside it that the daemon does not know.
    pub fn beside(&self) -> &Path {
        &self.root
    }

    /// The socket of the daemon.
    pub fn socket(&self) -> PathBuf {
        self.path().join("v4.sock")
    }

    /// The file of a blob.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.path().join("blobs").join(format!("sha256-{}", digest.hex()))
    }

    /// The file of a name's manifest.
    pub fn manifest(&self, name: &str) -> PathBuf {
        let name: ModelName = name.parse().expect("a model name");
        self.path().join("manifests").join(name.path().iter().collect::<PathBuf>())
    }

    /// The digests of all blobs.
    pub fn blobs(&self) -> Vec<Digest> {
        let Ok(entries) = fs::read_dir(self.path().join("blobs")) else { return Vec::new() };
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let mut digests: Vec<Digest> =
            names.filter_map(|name| name.to_str()?.parse().ok()).collect();
        digests.sort();
        digests
    }

    /// Puts the tiny model `file` of the golden folder under `name`; gives the digest of its
    /// weights.
    pub fn put_golden(&self, name: &str, file: &str) -> Digest {
        let weights = fs::read(golden().join("gguf").join(file)).expect("a golden file");
        self.put(&Model { name, weights, params: Value::Null })
    }

    /// Puts a tiny model that claims a context of a million tokens and has no token that ends an
    /// answer: with [`ENDLESS`] set, an answer of it goes on for minutes.
    pub fn put_endless(&self, name: &str) -> Digest {
        let mut weights = fs::read(golden().join("gguf/llama-q4_0.gguf")).expect("a golden file");
        let mut patch = |key: &str, skip: usize, bytes: &[u8]| {
            let found = weights.windows(key.len()).position(|window| window == key.as_bytes());
            let at = found.expect("the golden file has it") + skip;
            weights[at..at + bytes.len()].copy_from_slice(bytes);
        };
        // After the key come the number of the type, U32, and the value.
        let key = "llama.context_length";
        patch(key, key.len() + 4, &(1_u32 << 20).to_le_bytes());
        patch("<|eot_id|>", 0, b"<|e0t_id|>");
        patch("<|end_of_text|>", 0, b"<|end_0f_text|>");
        patch("ggml.eos_token_id", 0, b"ggml.e0s_token_id");
        self.put(&Model { name, weights, params: Value::Null })
    }

    /// Puts a name of another home here too, without copying its blobs.
    pub fn share(&self, from: &Home, name: &str) {
        for digest in from.blobs() {
            let to = self.blob(&digest);
            fs::create_dir_all(to.parent().expect("a folder")).expect("a writable home");
            fs::hard_link(from.blob(&digest), &to)
                .or_else(|_| fs::copy(from.blob(&digest), &to).map(|_| ()))
                .expect("a writable home");
        }
        let to = self.manifest(name);
        fs::create_dir_all(to.parent().expect("a folder")).expect("a writable home");
        fs::copy(from.manifest(name), to).expect("a writable home");
    }

    /// Puts a model; gives the digest of its weights.
    pub fn put(&self, model: &Model<'_>) -> Digest {
        let weights = self.put_blob(&model.weights);
        let layer = |kind: &str, digest: &Digest, size: usize| json!({"mediaType": format!("{LAYER}.{kind}"), "digest": digest, "size": size});
        let mut layers = vec![layer("model", &weights, model.weights.len())];
        if !model.params.is_null() {
            let text = model.params.to_string();
            layers.push(layer("params", &self.put_blob(text.as_bytes()), text.len()));
        }
        let config = json!({"model_format": "gguf", "model_family": "llama",
            "architecture": "amd64", "os": "linux"});
        let config = config.to_string();
        let digest = self.put_blob(config.as_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": digest, "size": config.len()},
            "layers": layers,
        });
        let path = self.manifest(model.name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a writable home");
        fs::write(path, manifest.to_string()).expect("a writable home");
        weights
    }

    fn put_blob(&self, bytes: &[u8]) -> Digest {
        let digest = digest(bytes);
        let path = self.blob(&digest);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a writable home");
        if !path.exists() {
            fs::write(path, bytes).expect("a writable home");
        }
        digest
    }
}

/// A model file of `len` bytes whose one tensor is noise, of an architecture that nothing runs.
pub fn noise(len: usize) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend([1_u64, 1].map(u64::to_le_bytes).concat());
    file.extend(text("general.architecture"));
    file.extend(8_u32.to_le_bytes());
    file.extend([text("noise"), text("noise")].concat());
    file.extend(1_u32.to_le_bytes());
    // What follows: the length of the tensor, its type (F32) and its place; 20 bytes.
    let start = (file.len() + 20).next_multiple_of(32);
    file.extend(((len - start) as u64 / 4).to_le_bytes());
    file.extend([0; 12]);
    file.resize(start, 0);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    while file.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.extend(state.to_le_bytes());
    }
    file.truncate(len);
    file
}

/// The digest of bytes.
pub fn digest(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

/// The digest of a file that may be large.
pub fn file_digest(path: &Path) -> Digest {
    let mut file = fs::File::open(path).expect("a file");
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut chunk).expect("a readable file");
        if n == 0 {
            return Digest::from_bytes(hash.finalize().into());
        }
        hash.update(&chunk[..n]);
    }
}
