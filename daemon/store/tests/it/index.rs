//! The index is damaged in the ways that sled is known to meet, and the store opens all the same.

use std::{io::Write as _, path::Path};

use tempfile::TempDir;
use v4_proto::{Inspection, Layout, ModelInfo};
use v4_store::{
    Opened, Store,
    fs::{Fs as _, RealFs},
    sha256,
};

use crate::story::name;

pub fn inspection() -> Inspection {
    let info = ModelInfo {
        format: "gguf".into(),
        arch: "llama".into(),
        supported: true,
        quant: "Q8_0".into(),
        n_params: 1,
        context_length: 2,
        embedding_length: 3,
        n_layers: 4,
        weight_bytes: 5,
        kv_bytes_per_token: 6,
        layout: Layout::default(),
        abilities: Vec::new(),
    };
    let metadata = serde_json::Map::from_iter([("general.name".to_owned(), "x".into())]);
    Inspection { info, metadata, chat_template: Some("{{ x }}".into()), tensors: Vec::new() }
}

/// A home whose index has rows.
fn filled() -> TempDir {
    let folder = TempDir::new().unwrap();
    let store = Store::open(folder.path()).unwrap();
    assert_eq!(store.index_opened(), Opened::Whole);
    let digest = store.put_blob(b"weights").unwrap();
    store.put_inspection(&digest, &inspection()).unwrap();
    for i in 0..300_u32 {
        store.put_inspection(&sha256(&i.to_le_bytes()), &inspection()).unwrap();
    }
    store.touch(&name("m")).unwrap();
    assert!(store.last_use(&name("m")).is_some());
    folder
}

/// Opens the home and says how the index came up and whether its rows are there.
fn reopen(home: &Path) -> (Opened, bool) {
    let store = Store::open(home).unwrap();
    let digest = sha256(b"weights");
    store.verify(&digest).unwrap();
    let is_known = store.inspection(&digest).as_ref() == Some(&inspection());
    // It works again, whatever it was.
    store.put_inspection(&digest, &inspection()).unwrap();
    assert_eq!(store.inspection(&digest), Some(inspection()));
    (store.index_opened(), is_known)
}

fn overwrite(path: &Path, bytes: &[u8]) {
    let mut file = RealFs.open(path).unwrap();
    file.set_len(0).unwrap();
    file.write_all(bytes).unwrap();
}

fn snapshots(db: &Path) -> Vec<std::path::PathBuf> {
    let names = RealFs.list(db).unwrap();
    names.iter().filter(|name| name.starts_with("snap.")).map(|name| db.join(name)).collect()
}

#[test]
fn rows_live_over_a_restart_and_go_with_what_they_are_about() {
    let folder = filled();
    assert_eq!(reopen(folder.path()), (Opened::Whole, true));
    let store = Store::open(folder.path()).unwrap();
    assert!(store.last_use(&name("m")).is_some());
    assert!(!store.remove(&name("m")).unwrap());
}

#[test]
fn a_deleted_index_is_begun_anew() {
    let folder = filled();
    RealFs.remove_tree(&folder.path().join("index")).unwrap();
    assert_eq!(reopen(folder.path()), (Opened::Whole, false));
    assert_eq!(reopen(folder.path()), (Opened::Whole, true));
}

#[test]
fn damaged_snapshots_are_dropped_and_no_row_is_lost() {
    let folder = filled();
    let db = folder.path().join("index/db");
    // One that sled had begun to write, and whatever it had finished.
    overwrite(&db.join("snap.00000000000000FA"), b"");
    for path in snapshots(&db) {
        overwrite(&path, b"");
    }
    assert_eq!(reopen(folder.path()), (Opened::Healed, true));
    assert_eq!(reopen(folder.path()), (Opened::Whole, true));
}

#[test]
fn a_shortened_database_is_set_aside() {
    let folder = filled();
    let file = folder.path().join("index/db/db");
    let len = RealFs.meta(&file).unwrap().unwrap().len;
    RealFs.open(&file).unwrap().set_len(len / 3).unwrap();
    let (opened, _) = reopen(folder.path());
    assert_eq!(opened, Opened::Rebuilt);
    assert!(folder.path().join("index/db.damaged").is_dir());
    assert_eq!(reopen(folder.path()), (Opened::Whole, true));
}

#[test]
fn noise_in_place_of_the_database_is_noticed_by_the_missing_rows() {
    let folder = filled();
    let db = folder.path().join("index/db");
    for path in snapshots(&db) {
        RealFs.remove_file(&path).unwrap();
    }
    let noise: Vec<u8> =
        (0..1_u32 << 18).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    overwrite(&db.join("db"), &noise);
    assert_eq!(reopen(folder.path()), (Opened::Rebuilt, false));
}
