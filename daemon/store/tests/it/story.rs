//! A story in which everything happens that changes a store, and what must be true of the store
//! wherever the story ends.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use v4_proto::ModelName;
use v4_store::{
    Layer, Manifest, Role, Store, StoreError,
    fs::{self, Fs},
    manifest::CONFIG_TYPE,
    sha256,
};

pub fn name(text: &str) -> ModelName {
    text.parse().unwrap()
}

/// The weights that the story downloads.
pub fn weights() -> Vec<u8> {
    (0..50_000_u32).flat_map(u32::to_le_bytes).collect()
}

/// A manifest over these weights and texts.
fn manifest(store: &Store, weights: &[u8], texts: &[&str]) -> Result<Manifest, StoreError> {
    let config = br#"{"os":"linux"}"#;
    let layer =
        |role: Role, bytes: &[u8]| Layer::new(role.media_type(), sha256(bytes), bytes.len() as u64);
    let mut layers = vec![layer(Role::Model, weights)];
    for text in texts {
        store.put_blob(text.as_bytes())?;
        layers.push(layer(Role::License, text.as_bytes()));
    }
    let config = Layer::new(CONFIG_TYPE, store.put_blob(config)?, config.len() as u64);
    Ok(Manifest::new(config, layers))
}

/// What the person's file has.
const THEIRS: &[u8] = b"weights of the person";

fn theirs(home: &Path) -> PathBuf {
    home.parent().unwrap().join("theirs.gguf")
}

/// The person writes a file and does not care when it is on the disk.
fn write_theirs(home: &Path, fs: &dyn Fs) -> Result<(), StoreError> {
    let path = theirs(home);
    if fs::read(fs, &path, 1000).is_ok_and(|bytes| bytes == THEIRS) {
        return Ok(());
    }
    let failed = |source| StoreError::Io { what: "write", path: theirs(home), source };
    let mut file = fs.open(&path).map_err(failed)?;
    file.set_len(0).map_err(failed)?;
    file.write_all(THEIRS).map_err(failed)
}

/// What is there before the story: a name `old`, and a download that was left half-way.
pub fn before(home: &Path, fs: Arc<dyn Fs>) -> Result<(), StoreError> {
    let store = Store::open_with(home, fs)?;
    store.put_blob(b"old weights")?;
    let old = manifest(&store, b"old weights", &["shared licence", "old licence"])?;
    store.put_manifest(&name("old"), &old.encode())?;
    let bytes = weights();
    let mut partial = store.partial("download", Some(bytes.len() as u64))?;
    partial.write(&bytes[..60_000])?;
    partial.sync()
}

/// The story: the download goes on and is committed, a name points to it, then to a newer version
/// of it; a file of the person is taken in; and the old name is deleted, comes back, and is
/// removed.
pub fn tell(home: &Path, fs: &Arc<dyn Fs>) -> Result<(), StoreError> {
    let store = Store::open_with(home, Arc::clone(fs))?;
    let bytes = weights();
    // Before the download is committed, so that nothing after it syncs the blobs' folder again.
    let first = manifest(&store, &bytes, &["shared licence", "first terms"])?;
    if store.blob(&sha256(&bytes))?.is_none() {
        let mut partial = store.partial("download", Some(bytes.len() as u64))?;
        while partial.offset() < bytes.len() as u64 {
            let at = usize::try_from(partial.offset()).unwrap();
            partial.write(&bytes[at..bytes.len().min(at + 50_000)])?;
            // The last bytes are left to the commit.
            if at < 100_000 {
                partial.sync()?;
            }
        }
        partial.commit(&sha256(&bytes), bytes.len() as u64)?;
    }
    store.put_manifest(&name("new"), &first.encode())?;
    let second = manifest(&store, &bytes, &["second terms"])?;
    store.put_manifest(&name("new"), &second.encode())?;
    // A file of the person comes in under a second name.
    write_theirs(home, fs.as_ref())?;
    let adopted = store.adopt(&theirs(home), true, &mut |_, _| {})?;
    assert_eq!(adopted.digest, sha256(THEIRS));
    let config = Layer::new(CONFIG_TYPE, store.put_blob(b"{}")?, 2);
    let size = THEIRS.len() as u64;
    let layer = Layer::new(Role::Model.media_type(), adopted.digest, size);
    store.put_manifest(&name("theirs"), &Manifest::new(config, vec![layer]).encode())?;
    store.delete(&name("old"))?;
    store.restore(&name("old"))?;
    store.remove(&name("old"))?;
    Ok(())
}

/// What must be true wherever the story was cut off: names point to whole blobs, no blob has wrong
/// bytes, nothing half put is left, and the story can be told to its end.
pub fn check(home: &Path, fs: &Arc<dyn Fs>) {
    {
        let store = Store::open_with(home, Arc::clone(fs)).unwrap();
        for entry in store.names().unwrap() {
            let record = store.find(&entry.name).unwrap().unwrap();
            for layer in record.manifest.blobs() {
                assert_eq!(store.blob(&layer.digest).unwrap(), Some(layer.size), "{}", entry.name);
                store.verify(&layer.digest).unwrap();
            }
        }
        // Every file in the tree is a name that can be read.
        let tags = fs.list(&home.join("manifests/registry.ollama.ai/library/new")).unwrap();
        assert_eq!(store.find(&name("new")).unwrap().is_some(), tags == ["latest"]);
        for blob in fs.list(&home.join("blobs")).unwrap() {
            store.verify(&blob.parse().unwrap()).unwrap();
        }
        let partials = fs.list(&home.join("partial")).unwrap();
        assert!(!partials.iter().any(|partial| partial.starts_with("put-")), "{partials:?}");
    }
    tell(home, fs).unwrap();
    let store = Store::open_with(home, Arc::clone(fs)).unwrap();
    let mut names: Vec<String> =
        store.names().unwrap().iter().map(|entry| entry.name.to_string()).collect();
    names.sort();
    assert_eq!(names, ["new:latest", "theirs:latest"]);
    store.verify(&sha256(THEIRS)).unwrap();
    let record = store.find(&name("new")).unwrap().unwrap();
    let texts: Vec<Vec<u8>> = record
        .manifest
        .role(Role::License)
        .map(|layer| store.read_blob(&layer.digest, 100).unwrap())
        .collect();
    assert_eq!(texts, [b"second terms"]);
    store.verify(&sha256(&weights())).unwrap();
    assert_eq!(fs.list(&home.join("partial")).unwrap(), Vec::<String>::new());
}
