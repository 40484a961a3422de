//! What a person keeps on the machine: files that become models, models that go and come back, and
//! how much there may be.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde_json::{Value, json};
use v4_tests::daemon::Daemon;
use v4_tests::home::{Home, digest, file_digest};
use v4_tests::process::{Outcome, run, v4};
use v4_tests::registry::Registry;

const TINY: &str = "llama-q4_0.gguf";
const GGUF: &str = "application/vnd.ollama.image.model";
const WEIGHTS: &str = "application/vnd.cncf.model.weight.v1.raw";
const BESIDE: &str = "application/vnd.cncf.model.weight.config.v1.raw";

/// A copy of a golden file or folder beside the home.
fn copy(home: &Home, from: &str, to: &str) -> String {
    let (from, to) = (v4_tests::golden().join(from), home.beside().join(to));
    if from.is_dir() {
        fs::create_dir(&to).expect("a writable folder");
        for entry in fs::read_dir(&from).expect("a folder") {
            let path = entry.expect("an entry").path();
            fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
        }
    } else {
        fs::copy(&from, &to).expect("a copy");
    }
    to.to_str().expect("a path").to_owned()
}

/// The first words of a model.
fn says(home: &Home, model: &str) -> String {
    let ask = ["run", model, "Once", "--num-predict", "8", "--temperature", "0"];
    run(&mut v4(home, &ask), "").success().to_owned()
}

#[test]
fn a_file_becomes_a_model_and_stays_the_persons() {
    let home = Home::new();
    let _daemon = Daemon::start(&home);
    let v4 = |args: &[&str]| run(&mut v4(&home, args), "");
    let path = copy(&home, &format!("gguf/{TINY}"), "Tiny-Llama.Q4_0.gguf");
    let before = file_digest(Path::new(&path));
    let import = v4(&["import", &path]);
    import.success();
    let done = ["copied)", "reflinked, so it takes no space of its own)"];
    assert!(import.stderr.contains("imported 'tiny-llama:q4_0' ("), "{import:?}");
    assert!(done.iter().any(|words| import.stderr.contains(words)), "{import:?}");
    assert!(says(&home, "tiny-llama:q4_0").len() > 1);
    let origin = v4(&["show", "--provenance", "tiny-llama:q4_0"]);
    assert!(origin.success().contains(&format!("file:{path}")), "{origin:?}");
    assert_eq!(file_digest(Path::new(&path)), before);
    // Once more is no second model, and another name no second blob.
    let again = v4(&["import", &path, "mine"]);
    again.success();
    assert!(again.stderr.contains("the same bytes were here already)"), "{again:?}");
    v4(&["import", &path]).success();
    assert_eq!(home.blobs().iter().filter(|digest| **digest == before).count(), 1);
    // What is no model is refused before anything is copied.
    let blobs = home.blobs();
    fs::write(home.beside().join("junk.gguf"), vec![7; 100_000]).expect("a writable folder");
    let junk = home.beside().join("junk.gguf");
    v4(&["import", junk.to_str().expect("a path")]).failure(1);
    assert!(v4(&["import", "/nowhere.gguf"]).failure(1).contains("there is no /nowhere.gguf"));
    assert_eq!(home.blobs(), blobs);
    // What this build cannot run is kept, and that is said.
    let mut stranger = fs::read(&path).expect("a file");
    let key = b"general.architecture";
    let at = stranger.windows(key.len()).position(|part| part == key).expect("the golden has it");
    // Behind the key come the number of the type and the length.
    let at = at + key.len() + 4 + 8;
    assert_eq!(&stranger[at..at + 5], b"llama");
    stranger[at..at + 5].copy_from_slice(b"other");
    fs::write(home.beside().join("stranger.gguf"), stranger).expect("a writable folder");
    let kept = v4(&["import", home.beside().join("stranger.gguf").to_str().expect("a path")]);
    kept.success();
    assert!(kept.stderr.contains("cannot run the architecture other"), "{kept:?}");
    // A name that was not said does not take another model's place.
    home.put_golden("other:q4_0", "llama-f16.gguf");
    let other = copy(&home, &format!("gguf/{TINY}"), "other-Q4_0.gguf");
    assert!(v4(&["import", &other]).failure(1).contains("another model 'other:q4_0'"));
}

/// A hard link shares the bytes with the person's file: what is written there is noticed before the
/// model is used, and never mended in the person's file.
#[test]
fn a_linked_file_that_changes_is_refused() {
    let home = Home::new();
    let daemon = Daemon::start(&home);
    let path = copy(&home, &format!("gguf/{TINY}"), "linked.gguf");
    let linked = file_digest(Path::new(&path));
    let import = run(&mut v4(&home, &["import", "--link", &path, "linked"]), "");
    import.success();
    if !import.stderr.contains("hard-linked: it is your file under a second name") {
        assert!(import.stderr.contains("reflinked"), "{import:?}");
        println!("skipped: this file system has reflinks, so nothing is linked");
        return;
    }
    let inode = |path: &Path| fs::metadata(path).expect("it").ino();
    assert_eq!(inode(Path::new(&path)), inode(&home.blob(&linked)));
    assert!(says(&home, "linked").len() > 1);
    run(&mut v4(&home, &["stop", "linked"]), "").success();
    let mut bytes = fs::read(&path).expect("it");
    *bytes.last_mut().expect("not empty") ^= 1;
    let writable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(&path, writable).expect("mine");
    fs::write(&path, &bytes).expect("mine");
    let refused = run(&mut v4(&home, &["run", "linked", "hi"]), "");
    assert!(refused.failure(1).contains("were changed on disk"), "{refused:?}");
    assert_eq!(fs::read(&path).expect("it"), bytes);
    drop(daemon);
}

#[test]
fn a_folder_of_safetensors_is_imported_created_and_pulled_and_runs() {
    let home = Home::new();
    let registry = Registry::new();
    let daemon = Daemon::start(&home);
    let v4 = |args: &[&str]| run(&mut v4(&home, args), "");
    let folder = copy(&home, "models/qwen2", "Qwen2-Tiny");
    let import = v4(&["import", &folder]);
    import.success();
    assert!(import.stderr.contains("parsing safetensors"), "{import:?}");
    let said = says(&home, "qwen2-tiny");
    assert!(said.len() > 1);
    let show = v4(&["show", "qwen2-tiny"]);
    assert!(show.success().contains("qwen2"), "{show:?}");
    let template = v4(&["show", "--template", "qwen2-tiny"]);
    assert!(template.success().contains("<|im_start|>"), "{template:?}");

    // The same by a Modelfile, with a text on top.
    let modelfile = home.beside().join("Modelfile");
    fs::write(&modelfile, format!("FROM {folder}\nSYSTEM be brief\n")).expect("a writable folder");
    v4(&["create", "made", "-f", modelfile.to_str().expect("a path")]).success();
    assert!(v4(&["show", "made"]).success().contains("be brief"));
    fs::write(&modelfile, "FROM made\nPARAMETER temperature 0\n").expect("a writable folder");
    v4(&["create", "upon", "-f", modelfile.to_str().expect("a path")]).success();
    assert!(says(&home, "upon").len() > 1);

    // The same from a registry that has it as a ModelPack.
    let read = |name: &str| fs::read(Path::new(&folder).join(name)).expect("a file");
    let files: Vec<(&str, Vec<u8>)> = [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ]
    .into_iter()
    .map(|name| (name, read(name)))
    .collect();
    let layers: Vec<(&str, Option<&str>, &[u8])> = files
        .iter()
        .map(|(name, bytes)| {
            let kind = if name.ends_with(".safetensors") { WEIGHTS } else { BESIDE };
            (kind, Some(*name), bytes.as_slice())
        })
        .collect();
    registry.offer("me/folder", &layers);
    let pulled = format!("{}/me/folder", registry.host());
    v4(&["pull", &pulled]).success();
    assert_eq!(registry.take_sent(), 2, "all but the config are here already");
    assert_eq!(says(&home, &pulled), said);

    // What lacks a tokenizer is refused, with what it lacks.
    fs::remove_file(Path::new(&folder).join("tokenizer.json")).expect("mine");
    assert!(v4(&["import", &folder]).failure(1).contains("it lacks tokenizer.json"));
    let files =
        json!({"model.safetensors": file_digest(&Path::new(&folder).join("model.safetensors"))});
    let create = daemon.tcp.post("/api/create", &json!({"model": "x", "files": files}));
    assert!(create.error(400).contains("config.json"), "{}", create.text());
}

#[test]
fn what_was_removed_comes_back_until_the_next_prune() {
    let home = Home::new();
    let blob = home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let v4 = |args: &[&str]| run(&mut v4(&home, args), "");
    let said = says(&home, "tiny");
    v4(&["rm", "tiny"]).success();
    assert!(!v4(&["list"]).success().contains("tiny"));
    let deleted = v4(&["list", "--deleted"]);
    assert!(deleted.success().contains("tiny:latest"), "{deleted:?}");
    assert!(v4(&["du"]).success().contains("of deleted models"));
    assert!(v4(&["restore", "other"]).failure(1).contains("v4 list --deleted"));
    assert_eq!(v4(&["restore", "tiny"]).success(), "restored 'tiny:latest'\n");
    assert_eq!(says(&home, "tiny"), said);
    // The interface of Ollama is what it was.
    let gone = daemon.tcp.request("DELETE", "/api/delete", br#"{"model":"tiny"}"#);
    assert_eq!(gone.status, 200);
    assert_eq!(daemon.tcp.get("/api/tags").expect(200), json!({"models": []}));
    v4(&["prune"]).success();
    assert!(!home.blob(&blob).exists());
    assert!(v4(&["restore", "tiny"]).failure(1).contains("no deleted 'tiny"));
}

#[test]
fn a_quota_refuses_what_is_too_much_or_makes_room() {
    let home = Home::new();
    let registry = Registry::new();
    let tiny = fs::read(v4_tests::golden().join("gguf").join(TINY)).expect("a golden file");
    let other = fs::read(v4_tests::golden().join("gguf/qwen3-q4_k_m.gguf")).expect("golden");
    registry.offer("me/new", &[(GGUF, None, &other)]);
    let model = format!("{}/me/new", registry.host());
    home.put_golden("old", TINY);
    let quota = (tiny.len() + other.len() / 2).to_string();

    let daemon = Daemon::start_with(&home, &[("V4_QUOTA", &quota)]);
    let refused = run(&mut v4(&home, &["pull", &model]), "");
    let words = refused.failure(1);
    assert!(words.contains("v4 rm old:latest") && words.contains("V4_QUOTA"), "{words}");
    assert_eq!(registry.take_sent(), 0, "it was refused before the first byte");
    let path = format!("/api/blobs/{}", digest(&other));
    let upload = daemon.tcp.request("POST", &path, &other);
    assert!(upload.error(507).contains("v4 rm old:latest"), "{}", upload.text());
    drop(daemon);

    let evicting = [("V4_QUOTA", quota.as_str()), ("V4_QUOTA_EVICT", "on")];
    let _daemon = Daemon::start_with(&home, &evicting);
    let v4 = |args: &[&str]| run(&mut v4(&home, args), "");
    v4(&["pin", "old"]).success();
    assert_eq!(v4(&["pin"]).success(), "old:latest\n");
    assert!(v4(&["pull", &model]).failure(1).contains("would not be enough"));
    v4(&["pin", "--remove", "old"]).success();
    v4(&["pull", &model]).success();
    let list = v4(&["list"]);
    assert!(!list.success().contains("old:latest") && list.success().contains("me/new"));
}

#[test]
fn the_store_of_another_is_read_in_place_until_it_is_no_more_wanted() {
    let (home, other) = (Home::new(), Home::new());
    let weights = other.put_golden("theirs", TINY);
    let theirs = other.path().display().to_string();
    let _daemon = Daemon::start(&home);
    let v4 = |args: &[&str]| run(&mut v4(&home, args), "");
    v4(&["roots", "add", &theirs]).success();
    assert!(v4(&["roots"]).success().contains(&theirs));
    assert!(v4(&["list"]).success().contains("theirs:latest"));
    assert!(!home.blob(&weights).exists(), "nothing is copied");
    v4(&["roots", "remove", &theirs]).success();
    assert!(!v4(&["list"]).success().contains("theirs:latest"));
    assert!(other.blob(&weights).exists(), "nor is anything removed there");
}

/// The models of a lock file that are here need no source, and another version is refused.
#[test]
fn a_lock_holds_and_asks_nobody_for_what_is_here() {
    let home = Home::new();
    let registry = Registry::new();
    let first = fs::read(v4_tests::golden().join("gguf").join(TINY)).expect("a golden file");
    let second = fs::read(v4_tests::golden().join("gguf/qwen3-q4_k_m.gguf")).expect("golden");
    registry.offer("me/m", &[(GGUF, None, &first)]);
    let model = format!("{}/me/m", registry.host());
    let _daemon = Daemon::start(&home);
    let v4 = |args: &[&str]| run(&mut v4(&home, args), "");
    v4(&["pull", &model]).success();
    let file = home.beside().join("v4.lock");
    let file = file.to_str().expect("a path").to_owned();
    v4(&["lock", &model, "-f", &file]).success();
    let text = fs::read_to_string(&file).expect("a lock file");
    let lock: Value = serde_json::from_str(&text).expect("JSON");
    let entry = lock["models"].as_object().expect("models").values().next().expect("one");
    assert!(entry["digest"].as_str().expect("a digest").starts_with("sha256:"), "{entry}");
    assert!(entry["template"].as_str().expect("a template").contains("messages"), "{entry}");
    assert!(entry["parameters"].is_object(), "{entry}");
    let locked = format!("--locked={file}");

    registry.take_asked();
    v4(&["pull", &locked]).success();
    // Under another name it is here as well.
    v4(&["cp", &model, "copy"]).success();
    v4(&["rm", &model]).success();
    v4(&["pull", &locked]).success();
    assert!(says(&home, &model).len() > 1);
    assert_eq!(registry.take_asked(), Vec::<String>::new(), "nobody was asked");

    // The registry has another version by now: the locked one is kept, and where it is not here any
    // more the other is refused.
    registry.offer("me/m", &[(GGUF, None, &second)]);
    v4(&["pull", &locked]).success();
    for name in [model.as_str(), "copy"] {
        v4(&["rm", name]).success();
    }
    v4(&["prune"]).success();
    let refused = v4(&["pull", &locked]);
    assert!(refused.failure(1).contains("locked"), "{refused:?}");
    assert!(!v4(&["list"]).success().contains("me/m"));
    let absent = v4(&["pull", "other", &locked]);
    assert!(absent.failure(1).contains("does not have 'other:latest'"), "{absent:?}");
}

#[test]
fn a_damaged_blob_is_mended_by_its_damaged_parts_alone() {
    const PART: u32 = 8 << 20;
    let home = Home::new();
    let registry = Registry::new();
    let tiny = fs::read(v4_tests::golden().join("gguf").join(TINY)).expect("a golden file");
    let large: Vec<u8> = (0..5 * PART / 4 + 1000)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let layers = [(GGUF, None, tiny.as_slice()), ("application/x.other", None, large.as_slice())];
    let digests = registry.offer("me/m", &layers);
    let model = format!("{}/me/m", registry.host());
    let _daemon = Daemon::start(&home);
    let v4 = |args: &[&str]| -> Outcome { run(&mut v4(&home, args), "") };
    v4(&["pull", &model]).success();
    v4(&["fsck"]).success();
    let path = home.blob(&digests[1]);
    let mut bytes = fs::read(&path).expect("a blob");
    for at in [PART + 77, 3 * PART - 1] {
        bytes[usize::try_from(at).expect("32 bits")] ^= 1;
    }
    fs::remove_file(&path).expect("mine");
    fs::write(&path, &bytes).expect("mine");
    let found = v4(&["fsck"]);
    assert!(found.stderr.contains("has 2 damaged part(s) of 8 MiB"), "{found:?}");
    assert!(found.failure(1).contains("v4 fsck --repair"), "{found:?}");
    registry.take_sent();
    v4(&["fsck", "--repair"]).success();
    assert_eq!(file_digest(&path), digests[1]);
    assert_eq!(registry.take_sent(), 2 * u64::from(PART), "the damaged parts and nothing else");
    v4(&["fsck"]).success();
    assert_eq!(registry.take_sent(), 0);
}
