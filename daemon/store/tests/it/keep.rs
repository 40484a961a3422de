//! What a person keeps: files that are taken in, names that come back, how much there may be.

#![expect(clippy::disallowed_methods, reason = "the person's own files are none of the store's")]

use std::{
    io::Write as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;
use v4_proto::ModelName;
use v4_store::{
    How, Layer, Manifest, Need, Quota, Role, Store, StoreError,
    fs::{Fs as _, RealFs},
    manifest::CONFIG_TYPE,
    sha256,
};

use crate::{
    fault_fs::{Fault, FaultFs},
    story::name,
};

fn home() -> (TempDir, Store) {
    let folder = TempDir::new().unwrap();
    let store = Store::open(&folder.path().join("home")).unwrap();
    (folder, store)
}

/// Puts a name over a blob of its own.
fn put(store: &Store, model: &str, weights: &[u8]) {
    let digest = store.put_blob(weights).unwrap();
    let layer = Layer::new(Role::Model.media_type(), digest, weights.len() as u64);
    let config = Layer::new(CONFIG_TYPE, store.put_blob(b"{}").unwrap(), 2);
    let manifest = Manifest::new(config, vec![layer]).encode();
    store.put_origin(&sha256(&manifest), b"{}").unwrap();
    store.put_manifest(&name(model), &manifest).unwrap();
}

fn file(folder: &TempDir, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join("theirs.gguf");
    RealFs.open(&path).unwrap().write_all(bytes).unwrap();
    path
}

/// Makes room and gives it back at once. The names that went.
fn room(store: &Store, size: u64) -> Result<Vec<ModelName>, StoreError> {
    let need = Need { key: "download".to_owned(), size };
    store.make_room(vec![need]).map(|room| room.gone.clone())
}

fn inode(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().ino()
}

#[test]
fn a_file_is_taken_in_and_stays_the_persons() {
    let (folder, store) = home();
    let path = file(&folder, b"weights");
    let adopted = store.adopt(&path, false, &mut |_, _| {}).unwrap();
    let digest = sha256(b"weights");
    assert_eq!((adopted.digest, adopted.size), (digest, 7));
    assert!(matches!(adopted.how, How::Copied | How::Reflinked), "{:?}", adopted.how);
    assert_ne!(inode(&path), inode(&store.blob_path(&digest)));
    assert_eq!(store.adopt(&path, true, &mut |_, _| {}).unwrap().how, How::Here);
    // What is written to theirs is not written to ours.
    RealFs.open(&path).unwrap().write_all(b"WEIGHTS").unwrap();
    store.verify(&digest).unwrap();
    assert_eq!(RealFs.list(&store.home().join("partial")).unwrap(), Vec::<String>::new());
    // Nothing but the lease keeps it.
    store.prune(false).unwrap();
    assert_eq!(store.blob(&digest).unwrap(), Some(7));
    drop(adopted);
    store.prune(false).unwrap();
    assert_eq!(store.blob(&digest).unwrap(), None);
}

/// A hard link is one file under two names. What is written through theirs is noticed before ours
/// is used, even where its time is set back, and is never mended in place: theirs would change.
#[test]
fn a_linked_file_that_is_written_is_refused_and_not_touched() {
    let (folder, store) = home();
    let bytes: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let path = file(&folder, &bytes);
    let Ok(adopted) = store.adopt(&path, true, &mut |_, _| {}) else { panic!("adopted") };
    if adopted.how != How::Linked {
        println!("skipped: this file system has reflinks, so nothing is linked");
        return;
    }
    let digest = adopted.digest;
    assert_eq!(inode(&path), inode(&store.blob_path(&digest)));
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o444, "nobody writes by mistake");
    store.intact(&digest).unwrap();
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    RealFs.set_mode(&path, 0o600).unwrap();
    let mut theirs = std::fs::File::options().write(true).open(&path).unwrap();
    theirs.write_all(b"!").unwrap();
    theirs.set_modified(before).unwrap();
    let error = store.intact(&digest).unwrap_err();
    assert!(matches!(error, StoreError::Digest { .. }), "{error}");
    assert_eq!(store.salvage(&digest).unwrap(), 0);
    assert_eq!(std::fs::read(&path).unwrap()[0], b'!');
}

#[test]
fn a_file_that_has_no_room_is_refused_before_it_is_copied() {
    let folder = TempDir::new().unwrap();
    let path = file(&folder, &vec![7; 100_000]);
    let fs = FaultFs::new(Fault::DiskFull, u64::MAX);
    let store = Store::open_with(&folder.path().join("home"), Arc::new(fs.clone())).unwrap();
    fs.fail_after(50_000);
    match store.adopt(&path, false, &mut |_, _| {}) {
        Err(StoreError::Space { needed: 100_000, .. }) => {}
        Ok(adopted) if adopted.how == How::Reflinked => println!("skipped: reflinks need no room"),
        other => panic!("{other:?}"),
    }
    store.adopt(&folder.path().join("absent"), false, &mut |_, _| {}).unwrap_err();
    store.adopt(folder.path(), true, &mut |_, _| {}).unwrap_err();
}

#[test]
fn a_deleted_name_comes_back_until_the_next_prune() {
    let (_folder, store) = home();
    put(&store, "Gone:q4", b"weights");
    let (digest, found) = (sha256(b"weights"), store.find(&name("gone:q4")).unwrap().unwrap());
    assert!(store.delete(&name("gone:Q4")).unwrap());
    assert!(!store.delete(&name("gone:q4")).unwrap());
    assert_eq!(store.names().unwrap(), []);
    assert_eq!(store.find(&name("gone:q4")).unwrap(), None);
    let deleted = store.deleted().unwrap();
    assert_eq!((deleted[0].name.to_string(), deleted[0].size_bytes), ("Gone:q4".to_owned(), 9));
    assert!(deleted[0].modified.elapsed().unwrap() < Duration::from_mins(1));
    let usage = store.usage().unwrap();
    assert_eq!((usage.deleted_bytes, usage.orphan_bytes), (9, 0));

    assert!(store.restore(&name("gone:q4")).unwrap());
    assert!(!store.restore(&name("gone:q4")).unwrap());
    let back = store.find(&name("gone:q4")).unwrap().unwrap();
    assert_eq!((back.digest, store.deleted().unwrap()), (found.digest, Vec::new()));
    store.verify(&digest).unwrap();
    assert!(store.origin(&back.digest).is_some());

    store.delete(&name("gone:q4")).unwrap();
    put(&store, "gone:q4", b"other");
    let error = store.restore(&name("gone:q4")).unwrap_err();
    assert!(matches!(error, StoreError::Taken { .. }), "{error}");
    assert_eq!(store.prune(false).unwrap(), 7);
    assert_eq!(store.blob(&digest).unwrap(), None);
    assert_eq!((store.deleted().unwrap(), store.origin(&found.digest)), (Vec::new(), None));
    store.verify(&sha256(b"other")).unwrap();
    assert!(!store.restore(&name("gone:q4")).unwrap());
}

#[test]
fn a_name_that_is_deleted_twice_keeps_its_last_version() {
    let (folder, store) = home();
    for weights in [b"first.", b"second"] {
        put(&store, "m", weights);
        store.delete(&name("m")).unwrap();
    }
    assert_eq!(store.blob(&sha256(b"first.")).unwrap(), None);
    drop(store);
    // It comes back after a restart, too.
    let store = Store::open(&folder.path().join("home")).unwrap();
    assert!(store.restore(&name("m")).unwrap());
    store.verify(&sha256(b"second")).unwrap();
}

#[test]
fn a_deleted_name_keeps_what_another_had_too() {
    let (_folder, store) = home();
    put(&store, "a", b"weights");
    put(&store, "b", b"weights");
    store.delete(&name("a")).unwrap();
    store.remove(&name("b")).unwrap();
    assert!(store.restore(&name("a")).unwrap());
    store.verify(&sha256(b"weights")).unwrap();
    let digest = store.find(&name("a")).unwrap().unwrap().digest;
    assert!(store.origin(&digest).is_some());
}

/// A manifest that cannot be read would protect every blob for ever, and nothing of it can come
/// back: it goes at once.
#[test]
fn a_broken_name_is_deleted_for_good() {
    let (folder, store) = home();
    put(&store, "m", b"weights");
    let path = folder.path().join("home/manifests/registry.ollama.ai/library/m/latest");
    let mut manifest = RealFs.open(&path).unwrap();
    manifest.set_len(0).unwrap();
    assert!(store.delete(&name("m")).unwrap());
    assert_eq!((store.names().unwrap(), store.deleted().unwrap()), (Vec::new(), Vec::new()));
}

#[test]
fn a_quota_refuses_with_what_to_do_or_removes_what_is_worth_least() {
    let (_folder, store) = home();
    put(&store, "pinned", &[1; 1000]);
    put(&store, "used", &[2; 1000]);
    put(&store, "idle", &[3; 1000]);
    assert!(store.pin(&name("pinned"), true).unwrap());
    assert!(!store.pin(&name("PINNED"), true).unwrap());
    let lease = store.lease(&[sha256(&[2; 1000])]);
    assert_eq!(room(&store, 1 << 20).unwrap(), []);
    let quota = |bytes, evicts| store.set_quota(Quota { bytes: Some(bytes), evicts });
    quota(3502, false);
    assert_eq!(room(&store, 500).unwrap(), [], "what just fits, fits");
    let words = room(&store, 501).unwrap_err().to_string();
    assert!(words.contains("v4 rm idle:latest") && words.contains("V4_QUOTA"), "{words}");
    quota(3502, true);
    let words = room(&store, 1501).unwrap_err().to_string();
    assert!(words.contains("would not be enough"), "{words}");
    assert_eq!(store.names().unwrap().len(), 3, "a refusal removes nothing");
    assert_eq!(room(&store, 1500).unwrap(), [name("idle")]);
    assert_eq!(store.names().unwrap().len(), 2);
    assert!(room(&store, 1501).is_err());
    drop(lease);
    assert_eq!(room(&store, 1501).unwrap(), [name("used")]);
    assert!(store.pin(&name("pinned"), false).unwrap());
    assert_eq!(store.pins().unwrap(), []);
    assert_eq!(room(&store, 3000).unwrap(), [name("pinned")]);
}

/// Two who write at a time are not given the same room, and what one has written already is not
/// counted twice.
#[test]
fn room_is_given_once() {
    let (_folder, store) = home();
    store.set_quota(Quota { bytes: Some(1000), evicts: false });
    let need = |key: &str, size| vec![Need { key: key.to_owned(), size }];
    let first = store.make_room(need("first", 600)).unwrap();
    store.make_room(need("second", 401)).unwrap_err();
    let second = store.make_room(need("second", 400)).unwrap();
    // The same file for another name needs no room of its own.
    drop(store.make_room(need("first", 600)).unwrap());
    let mut partial = store.partial("first", Some(600)).unwrap();
    partial.write(&[7; 500]).unwrap();
    partial.sync().unwrap();
    // The journal has some bytes as well.
    store.make_room(need("third", 1)).unwrap_err();
    drop(second);
    let journal = 43;
    drop(store.make_room(need("third", 400 - journal)).unwrap());
    store.make_room(need("third", 401 - journal)).unwrap_err();
    drop(partial);
    store.discard("first").unwrap();
    drop(first);
    // What became a blob is counted as one, and no more as what is to come.
    let blob = store.make_room(need(&format!("sha256-{}", sha256(b"done").hex()), 4)).unwrap();
    put(&store, "m", b"done");
    drop(store.make_room(need("third", 1000 - 4 - 2)).unwrap());
    drop(blob);
    store.remove(&name("m")).unwrap();
    drop(store.make_room(need("third", 1000)).unwrap());
}

/// What was deleted makes room before anything else goes.
#[test]
fn what_is_deleted_goes_before_a_refusal() {
    let (_folder, store) = home();
    put(&store, "kept", &[1; 1000]);
    put(&store, "gone", &[2; 1000]);
    store.delete(&name("gone")).unwrap();
    store.set_quota(Quota { bytes: Some(2500), evicts: true });
    assert_eq!(room(&store, 400).unwrap(), []);
    assert_eq!(store.deleted().unwrap().len(), 1);
    assert_eq!(room(&store, 1000).unwrap(), []);
    assert_eq!((store.deleted().unwrap(), store.names().unwrap().len()), (Vec::new(), 1));
}

/// A process that is started while a store is closed has a copy of the lock's file until it becomes
/// another program. Closing the file would then leave the home locked for that moment.
#[test]
fn a_home_is_free_at_once_whatever_processes_are_started() {
    let (folder, store) = home();
    drop(store);
    let is_done = Arc::new(AtomicBool::new(false));
    let start = || {
        let is_done = Arc::clone(&is_done);
        std::thread::spawn(move || {
            while !is_done.load(Ordering::Relaxed) {
                Command::new("/bin/true").status().unwrap();
            }
        })
    };
    let threads = [start(), start(), start()];
    let reopen = |_| Store::open(&folder.path().join("home")).err().map(|error| error.to_string());
    let refused: Vec<String> = (0..60).filter_map(reopen).collect();
    is_done.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(refused, Vec::<String>::new());
}
