//! What the store does when nothing crashes.

use std::{
    io::{Read as _, Write as _},
    path::Path,
    sync::Arc,
};

use tempfile::TempDir;
use v4_proto::Code;
use v4_store::{
    Layer, Manifest, Role, Store, StoreError,
    fs::{self, Fs as _, RealFs},
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

/// Puts a name over these blobs.
fn put(store: &Store, model: &str, blobs: &[&[u8]]) {
    let layer = |bytes: &&[u8]| {
        let digest = store.put_blob(bytes).unwrap();
        Layer::new(Role::Model.media_type(), digest, bytes.len() as u64)
    };
    let config = Layer::new(CONFIG_TYPE, store.put_blob(b"{}").unwrap(), 2);
    let manifest = Manifest::new(config, blobs.iter().map(layer).collect());
    store.put_manifest(&name(model), &manifest.encode()).unwrap();
}

fn overwrite(path: &Path, bytes: &[u8]) {
    RealFs.set_mode(path, 0o600).unwrap();
    let mut file = RealFs.open(path).unwrap();
    file.set_len(0).unwrap();
    file.write_all(bytes).unwrap();
}

#[test]
fn names_are_found_in_any_letter_case_and_listed_newest_first() {
    let (_folder, store) = home();
    put(&store, "Alpha:Q4", &[b"one"]);
    put(&store, "beta", &[b"two"]);
    put(&store, "alpha:q4", &[b"three"]);
    let names: Vec<String> =
        store.names().unwrap().iter().map(|entry| entry.name.to_string()).collect();
    assert_eq!(names, ["Alpha:Q4", "beta:latest"]);
    let record = store.find(&name("ALPHA:q4")).unwrap().unwrap();
    assert_eq!(record.manifest.layers[0].digest, sha256(b"three"));
    assert_eq!(store.names().unwrap()[0].digest, record.digest);
    assert_eq!(store.names().unwrap()[0].size_bytes, 5 + 2);
    assert_eq!(store.find(&name("gamma")).unwrap(), None);
}

#[test]
fn blobs_go_with_the_last_name_that_needs_them() {
    let (_folder, store) = home();
    put(&store, "a", &[b"shared", b"only a"]);
    put(&store, "b", &[b"shared"]);
    assert!(store.remove(&name("A")).unwrap());
    assert!(!store.remove(&name("a")).unwrap());
    assert_eq!(store.blob(&sha256(b"only a")).unwrap(), None);
    assert_eq!(store.blob(&sha256(b"shared")).unwrap(), Some(6));
    put(&store, "b", &[b"new"]);
    assert_eq!(store.blob(&sha256(b"shared")).unwrap(), None);
    assert!(store.remove(&name("b")).unwrap());
    assert_eq!(RealFs.list(&store.home().join("blobs")).unwrap(), Vec::<String>::new());
    assert_eq!(RealFs.list(&store.home().join("manifests")).unwrap(), Vec::<String>::new());
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a runner writes these files")]
fn what_runners_kept_of_a_model_goes_with_its_blob() {
    let (_folder, store) = home();
    put(&store, "kept", &[b"kept"]);
    put(&store, "gone", &[b"gone"]);
    let kv = store.home().join(v4_store::KV_FOLDER);
    let of = |weights: &[u8]| kv.join(format!("sha256-{}", sha256(weights).hex()));
    for weights in [b"kept", b"gone"] {
        std::fs::create_dir_all(of(weights)).unwrap();
        std::fs::write(of(weights).join("block"), b"x").unwrap();
    }
    assert!(store.remove(&name("gone")).unwrap());
    assert!(of(b"kept").join("block").exists() && !of(b"gone").exists());
}

#[test]
fn a_lease_keeps_what_is_removed_until_it_ends() {
    let (_folder, store) = home();
    put(&store, "a", &[b"used"]);
    let lease = store.lease(&[sha256(b"used")]);
    assert!(store.remove(&name("a")).unwrap());
    assert_eq!(store.blob(&sha256(b"used")).unwrap(), Some(4));
    let second = store.lease(&[sha256(b"used")]);
    drop(lease);
    assert_eq!(store.blob(&sha256(b"used")).unwrap(), Some(4));
    drop(second);
    assert_eq!(store.blob(&sha256(b"used")).unwrap(), None);
}

#[test]
fn a_name_that_came_back_keeps_its_blobs_when_the_lease_ends() {
    let (folder, store) = home();
    put(&store, "a", &[b"used"]);
    let lease = store.lease(&[sha256(b"used")]);
    assert!(store.remove(&name("a")).unwrap());
    put(&store, "b", &[b"used"]);
    drop(lease);
    assert_eq!(store.blob(&sha256(b"used")).unwrap(), Some(4));
    // A lease that outlives its store keeps the home from nobody.
    let lease = store.lease(&[sha256(b"used")]);
    drop(store);
    Store::open(&folder.path().join("home")).unwrap();
    drop(lease);
}

#[test]
fn a_full_disk_lets_a_name_and_its_blobs_go() {
    let folder = TempDir::new().unwrap();
    let fs = FaultFs::new(Fault::DiskFull, u64::MAX);
    let store = Store::open_with(&folder.path().join("home"), Arc::new(fs.clone())).unwrap();
    put(&store, "a", &[b"one", b"two"]);
    store.touch(&name("a")).unwrap();
    for bytes in [b"one", b"two"] {
        store.put_inspection(&sha256(bytes), &crate::index::inspection()).unwrap();
    }
    fs.fail_after(0);
    assert!(store.touch(&name("b")).is_err(), "the index can be written");
    assert!(store.remove(&name("a")).unwrap());
    assert_eq!(RealFs.list(&store.home().join("blobs")).unwrap(), Vec::<String>::new());
}

#[test]
fn what_cannot_be_deleted_fails_no_put_and_goes_later() {
    let folder = TempDir::new().unwrap();
    let fs = FaultFs::new(Fault::Stuck, u64::MAX);
    let store = Store::open_with(&folder.path().join("home"), Arc::new(fs.clone())).unwrap();
    put(&store, "a", &[b"old"]);
    let mut partial = store.partial("key", Some(3)).unwrap();
    partial.write(b"new").unwrap();
    fs.fail_after(0);
    partial.commit(&sha256(b"new"), 3).unwrap();
    put(&store, "a", &[b"new"]);
    assert_eq!(store.find(&name("a")).unwrap().unwrap().manifest.layers[0].digest, sha256(b"new"));
    assert_eq!(store.blob(&sha256(b"old")).unwrap(), Some(3));
    fs.heal();
    put(&store, "b", &[b"other"]);
    assert_eq!(store.blob(&sha256(b"old")).unwrap(), None);
}

#[test]
fn a_name_that_goes_while_it_is_read_is_left_out() {
    let folder = TempDir::new().unwrap();
    let fs = FaultFs::new(Fault::Vanish, u64::MAX);
    let store = Store::open_with(&folder.path().join("home"), Arc::new(fs.clone())).unwrap();
    put(&store, "a", &[b"one"]);
    fs.fail_after(0);
    assert_eq!(store.names().unwrap(), []);
    assert_eq!(store.find(&name("a")).unwrap(), None);
}

#[test]
fn partials_that_nobody_goes_on_with_are_swept_at_start() {
    let (folder, store) = home();
    let home = folder.path().join("home");
    for key in ["young", "old"] {
        let mut partial = store.partial(key, None).unwrap();
        partial.write(b"some bytes").unwrap();
        partial.sync().unwrap();
    }
    drop(store);
    let file = std::fs::OpenOptions::new().read(true).open(home.join("partial/old")).unwrap();
    let eight_days_ago = std::time::SystemTime::now() - std::time::Duration::from_hours(8 * 24);
    file.set_modified(eight_days_ago).unwrap();
    let store = Store::open(&home).unwrap();
    let left = RealFs.list(&home.join("partial")).unwrap();
    assert_eq!(left, ["young", "young.journal"]);
    assert_eq!(store.partial("young", None).unwrap().offset(), 10);
}

#[test]
fn a_manifest_that_cannot_be_read_protects_all_blobs() {
    let (_folder, store) = home();
    put(&store, "a", &[b"one"]);
    put(&store, "b", &[b"two"]);
    let path = store.home().join("manifests/registry.ollama.ai/library/b/latest");
    overwrite(&path, b"{\"torn");
    let error = store.find(&name("b")).unwrap_err();
    assert_eq!(error.fault().code, Code::Corrupt);
    assert_eq!(store.names().unwrap().len(), 1);
    assert!(store.remove(&name("a")).unwrap());
    assert_eq!(store.blob(&sha256(b"one")).unwrap(), Some(3));
    // A new one takes its place.
    put(&store, "b", &[b"two"]);
    assert!(store.find(&name("b")).unwrap().is_some());
}

#[test]
fn a_manifest_must_name_blobs_that_are_here() {
    let (_folder, store) = home();
    let config = Layer::new(CONFIG_TYPE, store.put_blob(b"{}").unwrap(), 2);
    let absent = Layer::new(Role::Model.media_type(), sha256(b"absent"), 6);
    let wrong = Layer::new(Role::Model.media_type(), store.put_blob(b"short").unwrap(), 6);
    for layer in [absent, wrong] {
        let manifest = Manifest::new(config.clone(), vec![layer.clone()]);
        let error = store.put_manifest(&name("a"), &manifest.encode()).unwrap_err();
        assert!(matches!(error, StoreError::Missing(digest) if digest == layer.digest), "{error}");
    }
    assert!(store.put_manifest(&name("a"), b"nonsense").is_err());
    assert_eq!(store.names().unwrap(), []);
}

#[test]
fn a_second_store_on_one_home_is_refused() {
    let (folder, store) = home();
    let home = folder.path().join("home");
    let error = Store::open(&home).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    assert!(error.to_string().contains(home.to_str().unwrap()), "{error}");
    assert!(error.to_string().contains("another v4 serve"), "{error}");
    drop(store);
    Store::open(&home).unwrap();
}

#[test]
fn a_blob_that_changed_on_disk_is_noticed() {
    let (_folder, store) = home();
    let digest = store.put_blob(b"as it was").unwrap();
    store.verify(&digest).unwrap();
    let path = store.blob_path(&digest);
    overwrite(&path, b"as it is!");
    let actual = sha256(b"as it is!");
    for error in [store.verify(&digest).unwrap_err(), store.read_blob(&digest, 100).unwrap_err()] {
        assert_eq!(error.fault().code, Code::Corrupt);
        let text = error.to_string();
        assert!(text.contains(&digest.hex()) && text.contains(&actual.hex()), "{text}");
    }
    assert_eq!(store.verify(&actual).unwrap_err().fault().code, Code::Corrupt);
    // One that was cut is put again.
    overwrite(&path, b"as");
    store.put_blob(b"as it was").unwrap();
    store.verify(&digest).unwrap();
    assert!(store.read_blob(&digest, 3).is_err());
}

#[test]
fn a_partial_is_hashed_checked_and_read_only() {
    let (_folder, store) = home();
    let bytes = b"some weights";
    let mut partial = store.partial("key", Some(12)).unwrap();
    assert!(matches!(store.partial("key", None), Err(StoreError::Busy(_))));
    partial.write(&bytes[..5]).unwrap();
    assert!(matches!(partial.write(b"too much for it"), Err(StoreError::Length { .. })));
    partial.write(&bytes[5..]).unwrap();
    assert_eq!(partial.digest().unwrap(), sha256(bytes));
    partial.commit(&sha256(bytes), 12).unwrap();
    let path = store.blob_path(&sha256(bytes));
    let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o444);
    for folder in ["", "blobs", "partial", "manifests", "index"] {
        let meta = store.home().join(folder).metadata().unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&meta.permissions());
        assert_eq!(mode & 0o777, 0o700, "{folder}");
    }
    assert_eq!(RealFs.list(&store.home().join("partial")).unwrap(), Vec::<String>::new());
}

#[test]
fn wrong_bytes_never_become_a_blob() {
    let (_folder, store) = home();
    for (bytes, size) in [(&b"wrong bytes!"[..], 12), (b"too short", 12)] {
        let mut partial = store.partial("key", Some(12)).unwrap();
        assert_eq!(partial.offset(), 0, "the last one was kept");
        partial.write(bytes).unwrap();
        let error = partial.commit(&sha256(b"some weights"), size).unwrap_err();
        assert_eq!(error.fault().code, Code::Corrupt);
    }
    assert_eq!(RealFs.list(&store.home().join("blobs")).unwrap(), Vec::<String>::new());
    assert_eq!(RealFs.list(&store.home().join("partial")).unwrap(), Vec::<String>::new());
}

#[test]
fn a_resume_keeps_what_the_journal_vouches_for() {
    let (folder, store) = home();
    let home = folder.path().join("home");
    let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut partial = store.partial("key", None).unwrap();
    for chunk in bytes[..300_000].chunks(100_000) {
        partial.write(chunk).unwrap();
        partial.sync().unwrap();
    }
    partial.write(&bytes[300_000..]).unwrap();
    drop((partial, store));
    let (data, journal) = (home.join("partial/key"), home.join("partial/key.journal"));
    let resumed = || Store::open(&home).unwrap().partial("key", None).unwrap().offset();
    assert_eq!(resumed(), 300_000, "what was not synced is not trusted");
    let mut lines = Vec::new();
    RealFs.open_read(&journal).unwrap().read_to_end(&mut lines).unwrap();
    assert_eq!(lines.len(), 3 * 43);
    // A torn line, and one that is no line.
    overwrite(&journal, &lines[..2 * 43 + 20]);
    assert_eq!(resumed(), 200_000);
    // A page that was lost in the middle.
    let mut damaged = bytes[..200_000].to_vec();
    damaged[150_000..154_096].fill(0);
    overwrite(&data, &damaged);
    assert_eq!(resumed(), 100_000);
    // Shorter than the journal says; then nothing at all; then a journal full of noise.
    overwrite(&data, &bytes[..50_000]);
    assert_eq!(resumed(), 0);
    overwrite(&data, &bytes[..100_000]);
    overwrite(&journal, &[0xff; 1000]);
    assert_eq!(resumed(), 0);
    // Longer than it may be.
    overwrite(&data, &bytes[..300_000]);
    overwrite(&journal, &lines);
    assert_eq!(Store::open(&home).unwrap().partial("key", Some(200_000)).unwrap().offset(), 0);
}

#[test]
fn parts_may_come_in_any_order_and_a_bad_one_is_missing_alone() {
    let (folder, store) = home();
    let home = folder.path().join("home");
    let bytes: Vec<u8> = (0..250_000_u32).flat_map(u32::to_le_bytes).collect();
    let (size, digest) = (bytes.len() as u64, sha256(&bytes));
    let part = |i: usize| bytes[i * 100_000..(i + 1) * 100_000].to_vec().into();
    let mut partial = store.partial("key", Some(size)).unwrap();
    for i in [7, 2, 0, 9, 1] {
        partial.write_at(i as u64 * 100_000, part(i)).unwrap();
        partial.sync().unwrap();
    }
    assert_eq!((partial.offset(), partial.here().total()), (300_000, 500_000));
    assert_eq!(partial.digest().unwrap(), sha256(&bytes[..300_000]));
    drop((partial, store));
    // Somebody changes a byte of one part.
    let data = home.join("partial/key");
    let mut damaged = Vec::new();
    RealFs.open_read(&data).unwrap().read_to_end(&mut damaged).unwrap();
    damaged[750_000] ^= 1;
    overwrite(&data, &damaged);
    let store = Store::open(&home).unwrap();
    assert_eq!(store.partial_bytes("key").unwrap(), 500_000, "the journal alone cannot know");
    let mut partial = store.partial("key", Some(size)).unwrap();
    assert_eq!(partial.here().gaps(0..size).first(), Some(&(300_000..900_000)));
    // What is here already is passed over, also in the middle of what comes.
    partial.write_at(250_000, bytes[250_000..].to_vec().into()).unwrap();
    partial.commit(&digest, size).unwrap();
    store.verify(&digest).unwrap();
    assert_eq!(store.partial_bytes("key").unwrap(), 0);
}

#[test]
fn a_large_blob_keeps_its_chain_until_it_goes() {
    let (_folder, store) = home();
    let bytes: Vec<u8> = (0..5_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (size, digest) = (bytes.len() as u64, sha256(&bytes));
    let mut partial = store.partial("key", Some(size)).unwrap();
    // From the end to the start, so that all of it is hashed behind the writing.
    for (i, chunk) in bytes.chunks(1 << 20).enumerate().collect::<Vec<_>>().into_iter().rev() {
        partial.write_at((i as u64) << 20, chunk.to_vec().into()).unwrap();
    }
    partial.commit(&digest, size).unwrap();
    store.verify(&digest).unwrap();
    let chains = store.home().join("chains");
    assert_eq!(RealFs.list(&chains).unwrap(), [format!("sha256-{}", digest.hex())]);
    let layer = Layer::new(Role::Model.media_type(), digest, size);
    let config = Layer::new(CONFIG_TYPE, store.put_blob(b"{}").unwrap(), 2);
    store.put_manifest(&name("a"), &Manifest::new(config, vec![layer]).encode()).unwrap();
    store.remove(&name("a")).unwrap();
    assert_eq!(RealFs.list(&chains).unwrap(), Vec::<String>::new());
}

#[test]
fn a_chain_names_the_wrong_parts_and_they_alone_are_forgotten() {
    const PART: u64 = 8 << 20;
    let (_folder, store) = home();
    let bytes: Vec<u8> = (0..5_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (size, digest) = (bytes.len() as u64, sha256(&bytes));
    let mut partial = store.partial("key", Some(size)).unwrap();
    partial.write(&bytes).unwrap();
    partial.commit(&digest, size).unwrap();
    let chain = store.chain(&digest, size).unwrap().unwrap();
    assert_eq!(store.chain(&digest, size + PART).unwrap(), None, "it is of another length");

    let mut wrong = bytes.clone();
    wrong[usize::try_from(PART).unwrap() + 77] ^= 1;
    let mut partial = store.partial("other", Some(size)).unwrap();
    partial.write(&wrong).unwrap();
    assert_eq!(partial.digest().unwrap(), sha256(&wrong));
    let parts = partial.wrong_parts(&chain, &digest, size).unwrap();
    assert_eq!((parts.len(), &parts[0]), (1, &(PART..2 * PART)));
    partial.forget(&parts).unwrap();
    assert_eq!(partial.here().gaps(0..size), parts);
    drop(partial);
    // Also after a restart nothing of it comes back.
    assert_eq!(store.partial_bytes("other").unwrap(), size - PART);
    let mut partial = store.partial("other", Some(size)).unwrap();
    assert_eq!(partial.here().gaps(0..size), parts);
    let part = bytes[usize::try_from(PART).unwrap()..][..8 << 20].to_vec();
    partial.write_at(PART, part.into()).unwrap();
    assert_eq!(partial.wrong_parts(&chain, &digest, size).unwrap(), []);
    partial.commit(&digest, size).unwrap();
}

#[test]
fn a_partial_goes_on_across_restarts_to_the_right_blob() {
    let folder = TempDir::new().unwrap();
    let home = folder.path().join("home");
    let bytes: Vec<u8> = (0..5_000_000_u32).flat_map(u32::to_le_bytes).collect();
    // 20 MB: two points are synced without being asked for.
    let store = Store::open(&home).unwrap();
    let mut partial = store.partial("key", Some(bytes.len() as u64)).unwrap();
    for chunk in bytes[..19_000_000].chunks(64 << 10) {
        partial.write(chunk).unwrap();
    }
    drop((partial, store));
    let store = Store::open(&home).unwrap();
    let mut partial = store.partial("key", Some(bytes.len() as u64)).unwrap();
    let at = usize::try_from(partial.offset()).unwrap();
    assert!(19_000_000 - at <= 8 << 20, "{at}");
    partial.write(&bytes[at..]).unwrap();
    partial.commit(&sha256(&bytes), bytes.len() as u64).unwrap();
    store.verify(&sha256(&bytes)).unwrap();
}

#[test]
fn a_staged_file_is_checked_and_can_be_read() {
    let (_folder, store) = home();
    let mut partial = store.partial("wheel", None).unwrap();
    partial.write(b"an archive").unwrap();
    let staged = partial.stage(&sha256(b"an archive"), 10).unwrap();
    let mut text = String::new();
    staged.open().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "an archive");
    assert!(matches!(store.partial("wheel", None), Err(StoreError::Busy(_))));
    assert!(!store.discard("wheel").unwrap(), "it is in use");
    drop(staged);
    assert_eq!(store.partial("wheel", None).unwrap().offset(), 10);
    let partial = store.partial("wheel", None).unwrap();
    assert!(partial.stage(&sha256(b"another"), 10).is_err());
    let mut partial = store.partial("wheel", None).unwrap();
    assert_eq!(partial.offset(), 0);
    partial.write(b"more").unwrap();
    drop(partial);
    assert!(store.discard("wheel").unwrap());
    assert_eq!(RealFs.list(&store.home().join("partial")).unwrap(), Vec::<String>::new());
}

#[test]
fn a_key_is_a_file_name_and_nothing_else() {
    let (_folder, store) = home();
    let long = "a".repeat(201);
    for key in ["", ".", "..", "../x", "a/b", "a b", "put-1", "a.journal", "ä", &long] {
        assert!(matches!(store.partial(key, None), Err(StoreError::Key(_))), "{key}");
    }
}

#[test]
fn a_full_disk_is_said_and_nothing_is_lost() {
    let folder = TempDir::new().unwrap();
    let home = folder.path().join("home");
    let fs = FaultFs::new(Fault::DiskFull, u64::MAX);
    let store = Store::open_with(&home, Arc::new(fs.clone())).unwrap();
    put(&store, "a", &[b"here"]);
    let mut partial = store.partial("key", Some(100)).unwrap();
    partial.write(&[1; 50]).unwrap();
    partial.sync().unwrap();
    fs.fail_after(0);
    let error = partial.write(&[2; 50]).unwrap_err();
    assert_eq!(error.fault().code, Code::Disk);
    assert!(error.to_string().contains("disk is full"), "{error}");
    assert_eq!(store.put_blob(b"more").unwrap_err().fault().code, Code::Disk);
    let manifest = store.find(&name("a")).unwrap().unwrap().manifest.encode();
    assert!(store.put_manifest(&name("b"), &manifest).is_err());
    fs.heal();
    drop(partial);
    assert_eq!(store.partial("key", Some(100)).unwrap().offset(), 50);
    assert_eq!(store.names().unwrap().len(), 1);
    store.verify(&sha256(b"here")).unwrap();
}

#[test]
fn left_overs_are_swept_and_old_orphans_collected_at_start() {
    let (folder, store) = home();
    let home = folder.path().join("home");
    put(&store, "a", &[b"named"]);
    let [young, old] = [b"young", b"older"].map(|bytes| store.put_blob(bytes).unwrap());
    let paths = [&old, &sha256(b"named")].map(|digest| store.blob_path(digest));
    drop(store);
    for path in paths {
        let eight_days_ago = std::time::SystemTime::now() - std::time::Duration::from_hours(8 * 24);
        let file = std::fs::OpenOptions::new().read(true).open(path).unwrap();
        file.set_modified(eight_days_ago).unwrap();
    }
    for left_over in ["put-7", "gone.journal"] {
        RealFs.open(&home.join("partial").join(left_over)).unwrap();
    }
    let store = Store::open(&home).unwrap();
    assert_eq!(RealFs.list(&home.join("partial")).unwrap(), Vec::<String>::new());
    assert_eq!(store.blob(&young).unwrap(), Some(5));
    assert_eq!(store.blob(&old).unwrap(), None);
    assert_eq!(store.blob(&sha256(b"named")).unwrap(), Some(5));
}

#[test]
fn what_an_ollama_store_also_holds_is_left_alone() {
    let (_folder, store) = home();
    put(&store, "a", &[b"x"]);
    let blobs = store.home().join("blobs");
    let foreign = [blobs.join("sha256-abc-partial"), blobs.join("sha256-abc-partial-0")];
    let manifests = store.home().join("manifests");
    let odd = [manifests.join(".DS_Store"), manifests.join("registry.ollama.ai/library/a/.tmp")];
    for path in foreign.iter().chain(&odd) {
        RealFs.open(path).unwrap();
    }
    assert_eq!(store.names().unwrap().len(), 1);
    assert!(store.remove(&name("a")).unwrap());
    assert!(foreign.iter().chain(&odd).all(|path| path.is_file()));
}

#[test]
fn a_socket_is_removed_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let dir = folder.path().join("run/v4");
    fs::bind_dir(&dir).unwrap();
    let (socket, file) = (dir.join("socket"), dir.join("file"));
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    fs::set_private(&socket).unwrap();
    fs::remove_socket(&socket).unwrap();
    fs::remove_socket(&socket).unwrap();
    assert!(!socket.exists());
    fs::open_append(&file).unwrap().write_all(b"a").unwrap();
    fs::open_append(&file).unwrap().write_all(b"b").unwrap();
    assert!(fs::remove_socket(&file).is_err());
    assert_eq!(fs::read(&RealFs, &file, 2).unwrap(), b"ab");
    assert!(fs::read(&RealFs, &file, 1).is_err());
}

#[test]
#[expect(clippy::disallowed_methods, reason = "somebody else changes the store's files")]
fn a_blob_is_hashed_again_only_when_its_file_changed() {
    let home = TempDir::new().expect("a folder");
    let fs = FaultFs::new(Fault::Vanish, u64::MAX);
    let store = Store::open_with(home.path(), Arc::new(fs.clone())).expect("opens");
    let digest = store.put_blob(b"as it should be").expect("puts");
    let path = store.blob_path(&digest);
    store.intact(&digest).expect("hashed, and noted");
    fs.fail_after(0);
    store.verify(&digest).expect_err("it cannot be read");
    store.intact(&digest).expect("not hashed again, so not read");
    fs.heal();
    let modified = std::fs::metadata(&path).and_then(|meta| meta.modified()).expect("a time");
    let write = |bytes: &[u8], time| {
        std::fs::remove_file(&path).expect("removes");
        std::fs::write(&path, bytes).expect("writes");
        let file = std::fs::File::options().write(true).open(&path).expect("opens");
        file.set_modified(time).expect("sets");
    };
    // The same length, and the time set back: that it was set tells.
    write(b"as it might be!", modified);
    assert!(matches!(store.intact(&digest), Err(StoreError::Digest { .. })));
    write(b"as it should be", modified + std::time::Duration::from_secs(2));
    store.intact(&digest).expect("right again");
    std::fs::remove_file(&path).expect("removes");
    assert!(matches!(store.intact(&digest), Err(StoreError::Missing(_))));
}

#[test]
fn what_each_name_costs_is_told_and_orphans_are_pruned() {
    let (_folder, store) = home();
    put(&store, "a", &[b"shared", b"only a"]);
    put(&store, "b", &[b"shared"]);
    store.put_blob(b"orphan").unwrap();
    let mut partial = store.partial("key", None).unwrap();
    partial.write(b"begun").unwrap();
    partial.sync().unwrap();
    let usage = store.usage().unwrap();
    let costs: Vec<_> = usage
        .names
        .iter()
        .map(|cost| (cost.name.to_string(), cost.own_bytes, cost.shared_bytes))
        .collect();
    // The config is two bytes that both share.
    assert_eq!(costs, [("a:latest".to_owned(), 6, 8), ("b:latest".to_owned(), 0, 8)]);
    assert_eq!((usage.orphan_bytes, usage.partial_bytes), (6, 5 + 43));
    assert_eq!(usage.total_bytes, 6 + 6 + 2 + 6 + 48);
    let lease = store.lease(&[sha256(b"orphan")]);
    assert_eq!(store.prune(true).unwrap(), 0, "both are in use");
    drop((lease, partial));
    assert_eq!(store.blob(&sha256(b"orphan")).unwrap(), None, "it went with its lease");
    assert_eq!(store.prune(false).unwrap(), 0);
    assert_eq!(store.prune(true).unwrap(), 5);
    assert_eq!(RealFs.list(&store.home().join("partial")).unwrap(), Vec::<String>::new());
    store.verify(&sha256(b"shared")).unwrap();
}

#[test]
fn damage_is_found_and_what_is_right_is_saved() {
    let (_folder, store) = home();
    let bytes: Vec<u8> = (0..5_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (size, digest) = (bytes.len() as u64, sha256(&bytes));
    let mut partial = store.partial("key", Some(size)).unwrap();
    partial.write(&bytes).unwrap();
    partial.commit(&digest, size).unwrap();
    let layer = Layer::new(Role::Model.media_type(), digest, size);
    let config = Layer::new(CONFIG_TYPE, store.put_blob(b"{}").unwrap(), 2);
    store.put_manifest(&name("large"), &Manifest::new(config, vec![layer]).encode()).unwrap();
    put(&store, "small", &[b"small"]);
    let mut seen = Vec::new();
    assert_eq!(store.check(|digest, size| seen.push((*digest, size))).unwrap(), []);
    assert_eq!(seen.len(), 3, "each once");

    let mut damaged = bytes.clone();
    damaged[9 << 20] ^= 1;
    overwrite(&store.blob_path(&digest), &damaged);
    RealFs.remove_file(&store.blob_path(&sha256(b"small"))).unwrap();
    let damages = store.check(|_, _| {}).unwrap();
    let told: Vec<_> =
        damages.iter().map(|damage| (damage.name.to_string(), damage.what.as_str())).collect();
    assert_eq!(
        told,
        [
            ("large:latest".to_owned(), "has 1 damaged part(s) of 8 MiB"),
            ("small:latest".to_owned(), "is missing"),
        ]
    );
    // Two of the three parts are right, and the rest is all that a pull needs to bring.
    assert_eq!(store.salvage(&digest).unwrap(), size - (8 << 20));
    let mut partial = store.partial(&format!("sha256-{}", digest.hex()), Some(size)).unwrap();
    assert_eq!(partial.here().gaps(0..size).first(), Some(&(8 << 20..16 << 20)));
    partial.write_at(8 << 20, bytes[8 << 20..16 << 20].to_vec().into()).unwrap();
    partial.commit(&digest, size).unwrap();
    store.verify(&digest).unwrap();
    // Without a chain nothing can be told apart.
    assert_eq!(store.salvage(&sha256(b"{}")).unwrap(), 0);
}

#[test]
fn another_programs_store_is_read_in_place_and_never_changed() {
    let (folder, other) = home();
    put(&other, "theirs", &[b"their weights"]);
    put(&other, "both", &[b"their version"]);
    let theirs = other.home().to_path_buf();
    drop(other);
    let all = |root: &Path| {
        let names = |part: &str| RealFs.list(&root.join(part)).unwrap();
        (names("blobs"), names("manifests/registry.ollama.ai/library"))
    };
    let before = all(&theirs);
    let hub = folder.path().join("hub/models--me--x/blobs");
    fs::bind_dir(&hub).unwrap();
    let cached = hub.join(sha256(b"cached").hex());
    RealFs.open(&cached).unwrap().write_all(b"cached").unwrap();

    let store = Store::open(&folder.path().join("mine")).unwrap();
    put(&store, "both", &[b"my version"]);
    assert!(store.add_root(folder.path()).is_err(), "no store");
    assert!(store.add_root(Path::new("relative")).is_err());
    let root = store.add_root(&theirs).unwrap();
    let hub = folder.path().join("hub");
    store.add_root(&hub).unwrap();
    let names: Vec<String> =
        store.names().unwrap().iter().map(|entry| entry.name.to_string()).collect();
    assert!(names.len() == 2 && names.contains(&"theirs:latest".to_owned()), "{names:?}");
    let digest = sha256(b"their weights");
    assert_eq!(store.blob(&digest).unwrap(), Some(13));
    assert_eq!(
        store.blob_path(&digest),
        theirs.join("blobs").join(format!("sha256-{}", digest.hex()))
    );
    store.verify(&digest).unwrap();
    assert_eq!(store.blob(&sha256(b"cached")).unwrap(), Some(6));
    let mine = store.find(&name("both")).unwrap().unwrap();
    assert_eq!(mine.manifest.layers[0].digest, sha256(b"my version"));

    // What is here by way of a root is not stored twice, and not removed.
    store.put_blob(b"their weights").unwrap();
    assert_eq!(store.remove(&name("theirs")).unwrap_err().fault().code, Code::Invalid);
    assert!(store.remove(&name("both")).unwrap());
    store.prune(true).unwrap();
    assert_eq!(RealFs.list(&store.home().join("blobs")).unwrap(), Vec::<String>::new());
    assert_eq!(store.salvage(&digest).unwrap(), 0);
    assert_eq!(all(&theirs), before);
    let both = store.find(&name("both")).unwrap().unwrap();
    assert_eq!(both.manifest.layers[0].digest, sha256(b"their version"));

    // It is remembered until it is forgotten.
    drop(store);
    let store = Store::open(&folder.path().join("mine")).unwrap();
    assert_eq!(store.roots()[0], root);
    assert!(store.remove_root(&theirs).unwrap() && store.remove_root(&hub).unwrap());
    assert!(!store.remove_root(&theirs).unwrap());
    assert_eq!(store.names().unwrap(), []);
    assert_eq!(all(&theirs), before);
}

#[test]
fn a_home_is_given_to_another_daemon_and_taken_back() {
    let (_folder, old) = home();
    put(&old, "kept", &[b"one"]);
    put(&old, "gone", &[b"two"]);
    old.touch(&name("kept")).unwrap();
    let lease = old.lease(&[sha256(b"two")]);
    let partial = old.partial("key", None).unwrap();
    assert!(old.is_written());
    drop(partial);
    assert!(!old.is_written());
    assert!(old.remove(&name("gone")).unwrap());
    old.hand_over();

    let new = Store::open(old.home()).unwrap();
    assert!(new.last_use(&name("kept")).is_some(), "the index is the same");
    // The old one can look, and no more.
    assert!(old.find(&name("kept")).unwrap().is_some());
    assert_eq!(old.last_use(&name("kept")), None);
    old.touch(&name("kept")).unwrap();
    let refused = [
        old.remove(&name("kept")).map(drop),
        old.partial("key", None).map(drop),
        old.pin(&name("kept"), true).map(drop),
    ];
    for refused in refused {
        let error = refused.unwrap_err();
        assert!(matches!(error, StoreError::HandedOver), "{error}");
        assert_eq!(error.fault().code, Code::Overloaded);
    }
    assert!(matches!(old.take_back(), Err(StoreError::Locked { .. })));
    // What the old one would have collected is the new one's to collect.
    drop(lease);
    assert_eq!(new.blob(&sha256(b"two")).unwrap(), Some(3));

    drop(new);
    old.take_back().unwrap();
    old.take_back().unwrap();
    assert!(old.last_use(&name("kept")).is_some());
    assert!(matches!(Store::open(old.home()), Err(StoreError::Locked { .. })));
    assert!(old.remove(&name("kept")).unwrap());
    assert_eq!(old.blob(&sha256(b"two")).unwrap(), None, "it was still to be collected");
}

#[test]
fn what_runners_keep_of_conversations_is_counted_by_itself() {
    let (_folder, store) = home();
    put(&store, "m", &[b"one"]);
    let before = store.usage().unwrap();
    assert_eq!(before.kv_bytes, 0);
    for (model, file, len) in [("sha256-a", "x-1", 5), ("sha256-a", "x-2", 7), ("sha256-b", "y", 9)]
    {
        let folder = store.home().join("kv").join(model);
        fs::bind_dir(&folder).unwrap();
        let mut file = RealFs.open(&folder.join(file)).unwrap();
        file.write_all(&vec![1; len]).unwrap();
    }
    let after = store.usage().unwrap();
    assert_eq!((after.kv_bytes, after.total_bytes - before.total_bytes), (21, 21));
    assert_eq!(after.orphan_bytes, 0);
}
