//! Files of the person into models: a GGUF file with its shards, a folder of such, or a folder of
//! safetensors with its configuration and tokenizer.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, json};
use v4_proto::{Code, Digest, Fault, ModelFiles, ModelName};
use v4_store::{
    Adopted, How, Store,
    fs::{Fs as _, RealFs},
    human,
    manifest::{folder_file, folder_lacks},
};

use crate::{
    daemon::Daemon,
    limits,
    ops::{
        create::{self, Create, Say},
        models::Wanted,
    },
};

/// What is to be imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// A file or a folder of this machine.
    pub path: PathBuf,
    /// The name to make; not said is that of the file.
    pub name: Option<Wanted>,
    /// A hard link will do where the file system has no reflinks.
    pub may_link: bool,
}

/// One model that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    /// What its files are called, without ending and number.
    stem: String,
    /// Its files: names and paths, in order.
    files: Vec<(String, PathBuf)>,
    /// They are a model folder.
    is_folder: bool,
}

/// Makes models of the person's files.
///
/// # Errors
/// `invalid` for what is no model or has no name; what the store and the runner say.
pub async fn import(daemon: &Arc<Daemon>, order: Import, say: &Say) -> Result<(), Fault> {
    let path = order.path.clone();
    let looked = tokio::task::spawn_blocking(move || look(&path)).await;
    let found =
        looked.map_err(|_| Fault::internal("v4 made a mistake; its log has the details"))?;
    let found = found?;
    let names = names(&found, order.name.as_ref())?;
    for (found, name) in found.iter().zip(names) {
        if order.name.is_none() {
            refuse_taken(daemon, found, &name).await?;
        }
        one(daemon, found, name, order.may_link, say).await?;
    }
    Ok(())
}

/// Makes one model.
async fn one(
    daemon: &Arc<Daemon>,
    found: &Found,
    name: ModelName,
    may_link: bool,
    say: &Say,
) -> Result<(), Fault> {
    let names = if found.is_folder { file_names(found) } else { Vec::new() };
    let weights = found.files.iter().map(|(_, path)| path.clone()).collect();
    // Before anything is copied: what is no model is refused by whoever can tell.
    let files = ModelFiles { weights, names, ..ModelFiles::default() };
    let info = daemon.supervisor.inspect(files).await?.info;
    let adopted = adopt(daemon, found, may_link, say).await?;
    // Whoever left need not hear it.
    let _ = say.send(words(&name, &adopted)).await;
    let digests = adopted.iter().map(|one| one.digest);
    let target = Wanted { text: name.to_string(), name };
    let make = Create {
        target,
        from: None,
        files: file_names(found).into_iter().zip(digests).collect(),
        adapters: Vec::new(),
        template: None,
        system: None,
        parameters: Map::new(),
        messages: Vec::new(),
        licenses: Vec::new(),
        config: Map::new(),
    };
    let manifest = create::create(daemon, make, say).await?;
    note_origin(daemon, found, &adopted, manifest).await;
    if !info.supported {
        let _ = say.send(create::cannot_run(&info.arch)).await;
    }
    Ok(())
}

/// Takes the files into the store, telling every tenth of each.
async fn adopt(
    daemon: &Daemon,
    found: &Found,
    may_link: bool,
    say: &Say,
) -> Result<Vec<Adopted>, Fault> {
    let (files, say) = (found.files.clone(), say.clone());
    let one = move |store: &Store, (name, path): &(String, PathBuf)| {
        let mut last = 0;
        store.adopt(path, may_link, &mut |done, all| {
            let tenths = done.saturating_mul(10).checked_div(all).unwrap_or(10);
            if tenths > last && tenths < 10 {
                last = tenths;
                // Whoever left need not hear it.
                let _ = say.blocking_send(format!("reading {name}: {tenths}0%"));
            }
        })
    };
    let work = daemon.blocking(move |store| {
        files.iter().map(|file| one(store, file)).collect::<Result<Vec<_>, _>>()
    });
    work.await
}

fn file_names(found: &Found) -> Vec<String> {
    found.files.iter().map(|(name, _)| name.clone()).collect()
}

/// A name that was made of a file's may mean another model already, which nobody asked to replace.
async fn refuse_taken(daemon: &Daemon, found: &Found, name: &ModelName) -> Result<(), Fault> {
    let (wanted, n) = (name.clone(), found.files.len());
    let taken = daemon.blocking(move |store| {
        let Some(record) = store.find(&wanted)? else { return Ok(None) };
        let origin = store.origin(&record.digest).unwrap_or_default();
        Ok(Some((serde_json::from_slice::<serde_json::Value>(&origin).unwrap_or_default(), n)))
    });
    let Some((origin, _)) = taken.await? else { return Ok(()) };
    if origin["from"].as_str() == Some(&from(found)) {
        // The same file again: it may have another version by now.
        return Ok(());
    }
    Err(Fault::invalid(format!(
        "there is another model '{name}'; say which name this one gets: `v4 import PATH NAME`"
    )))
}

/// Where a model came from, as its record says it.
fn from(found: &Found) -> String {
    found.files.first().map(|(_, path)| format!("file:{}", path.display())).unwrap_or_default()
}

/// Writes down where a model came from. It is whole without that.
async fn note_origin(daemon: &Daemon, found: &Found, adopted: &[Adopted], manifest: Digest) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let file = |((_, path), one): (&(String, PathBuf), &Adopted)| json!({"digest": one.digest, "verified": false, "sources": [format!("file:{}", path.display())]});
    let files: Vec<_> = found.files.iter().zip(adopted).map(file).collect();
    let origin = json!({"from": from(found), "imported_at": since.as_secs(), "files": files});
    let text = origin.to_string();
    let noted = daemon.blocking(move |store| store.put_origin(&manifest, text.as_bytes()));
    // What went wrong is in the log.
    let _ = noted.await;
}

/// What was done, in one sentence.
fn words(name: &ModelName, adopted: &[Adopted]) -> String {
    let bytes: u64 = adopted.iter().map(|one| one.size).sum();
    let largest = adopted.iter().max_by_key(|one| one.size).map(|one| one.how);
    let done = match largest {
        Some(How::Reflinked) => "reflinked, so it takes no space of its own",
        Some(How::Linked) => {
            "hard-linked: it is your file under a second name, read-only from now on"
        }
        Some(How::Copied) => "copied",
        Some(How::Here) | None => "the same bytes were here already",
    };
    format!("imported '{name}' ({}, {done})", human(bytes))
}

/// What models a path has.
fn look(path: &Path) -> Result<Vec<Found>, Fault> {
    let failed =
        |error: std::io::Error| Fault::invalid(format!("cannot read {}: {error}", path.display()));
    let meta = RealFs.meta(path).map_err(failed)?;
    let meta = meta.ok_or_else(|| Fault::invalid(format!("there is no {}", path.display())))?;
    let folder = if meta.is_dir { path } else { path.parent().unwrap_or(path) };
    let list = RealFs.list(folder).map_err(failed)?;
    let all: Vec<&str> = list.iter().map(String::as_str).collect();
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("model");
    if !meta.is_dir {
        return Ok(vec![file(folder, name, &all)?]);
    }
    let of_folder: Vec<&str> =
        all.iter().copied().filter(|name| folder_file(name).is_some()).collect();
    let lacks = folder_lacks(&of_folder);
    if lacks.is_none() {
        let files = of_folder.iter().map(|name| ((*name).to_owned(), folder.join(name))).collect();
        return Ok(vec![Found { stem: name.to_owned(), files, is_folder: true }]);
    }
    let mut groups: BTreeMap<&str, &str> = BTreeMap::new();
    for name in all.iter().copied().filter(|name| is_weights(name)) {
        groups.entry(stem(name)).or_insert(name);
    }
    match (groups.is_empty(), lacks) {
        (true, Some(what)) => Err(Fault::invalid(format!(
            "{} has no GGUF files, and as a folder of safetensors it lacks {what}",
            path.display()
        ))),
        _ if groups.len() > limits::IMPORTS => Err(Fault::invalid(format!(
            "{} has {} models; import them one by one",
            path.display(),
            groups.len()
        ))),
        _ => groups.values().map(|first| file(folder, first, &all)).collect(),
    }
}

/// Whether a file of a folder is weights of a language model.
fn is_weights(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let is_gguf = name.rsplit_once('.').is_some_and(|(_, ending)| ending == "gguf");
    is_gguf && !name.contains("mmproj") && !name.contains("imatrix")
}

/// The model of a file: all its shards where it is one.
fn file(folder: &Path, name: &str, all: &[&str]) -> Result<Found, Fault> {
    let of = |name: &str| (name.to_owned(), folder.join(name));
    let stem = stem(name).to_owned();
    let Some(n) = shard_of(name).map(|(_, n)| n) else {
        return Ok(Found { stem, files: vec![of(name)], is_folder: false });
    };
    let mut shards: Vec<&str> = all
        .iter()
        .copied()
        .filter(|other| shard_of(other).is_some_and(|(of, m)| of == stem && m == n))
        .collect();
    shards.sort_unstable();
    if shards.len() as u64 != n {
        let here = shards.len();
        return Err(Fault::invalid(format!("{here} of the {n} parts of {stem} are here")));
    }
    Ok(Found { stem, files: shards.into_iter().map(of).collect(), is_folder: false })
}

/// A file's name without its ending and the number of its shard.
fn stem(name: &str) -> &str {
    match shard_of(name) {
        Some((stem, _)) => stem,
        None => name.rsplit_once('.').map_or(name, |(stem, _)| stem),
    }
}

/// `STEM-00001-of-00003.gguf`: the stem and how many there are.
fn shard_of(name: &str) -> Option<(&str, u64)> {
    let (rest, n) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, i) = rest.rsplit_once('-')?;
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|c| c.is_ascii_digit());
    (is_number(i) && is_number(n)).then_some((stem, n.parse().ok()?))
}

/// The name of each model: what was said, or what its file is called.
fn names(found: &[Found], said: Option<&Wanted>) -> Result<Vec<ModelName>, Fault> {
    let name = |one: &Found| match said {
        Some(said) if found.len() == 1 => Ok(said.name.clone()),
        Some(said) => {
            let tag = split(&one.stem).1;
            let path = said.name.path();
            let [host, namespace, model, _] = path;
            ModelName::from_path([host, namespace, model, &tag]).map_err(|_| unnamed(one))
        }
        None => {
            let (model, tag) = split(&one.stem);
            format!("{model}:{tag}").parse().map_err(|_| unnamed(one))
        }
    };
    let names: Vec<ModelName> = found.iter().map(name).collect::<Result<_, _>>()?;
    for (i, name) in names.iter().enumerate() {
        if names[..i].iter().any(|other| other.matches(name)) {
            return Err(Fault::invalid(format!(
                "several of these files would be '{name}'; import them one by one, with a name each"
            )));
        }
    }
    Ok(names)
}

fn unnamed(one: &Found) -> Fault {
    let stem = &one.stem;
    Fault::new(Code::Invalid, format!("{stem:?} makes no name; say which: `v4 import PATH NAME`"))
}

/// What a file's name says of model and quant: `SmolLM2-135M-Instruct.Q4_1` is
/// `smollm2-135m-instruct` and `q4_1`; without a quant the tag is `latest`.
fn split(stem: &str) -> (String, String) {
    let word = |text: &str| -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
        let text: String = text.to_ascii_lowercase().chars().map(plain).collect();
        text.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
    };
    let cut = stem.rfind(['-', '.']).filter(|at| is_quant(&stem[at + 1..]));
    match cut {
        Some(at) => (word(&stem[..at]), word(&stem[at + 1..])),
        None => (word(stem), v4_proto::name::DEFAULT_TAG.to_owned()),
    }
}

/// `Q4_K_M`, `IQ2_XXS`, `F16`, `BF16`, `MXFP4`, `TQ1_0` and their like.
fn is_quant(text: &str) -> bool {
    let text = text.to_ascii_uppercase();
    let digits = ["MXFP", "NVFP", "BF", "F", "IQ", "TQ", "Q"]
        .iter()
        .find_map(|start| text.strip_prefix(start))
        .unwrap_or_default();
    digits.starts_with(|c: char| c.is_ascii_digit())
        && digits.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_its_model_and_its_quant() {
        for (stem, model, tag) in [
            ("SmolLM2-135M-Instruct.Q4_1", "smollm2-135m-instruct", "q4_1"),
            ("qwen2.5-coder-0.5b-instruct-q4_k_m", "qwen2.5-coder-0.5b-instruct", "q4_k_m"),
            ("gpt-oss-20b-MXFP4", "gpt-oss-20b", "mxfp4"),
            ("Llama 3.2 (1B)", "llama-3.2--1b", "latest"),
            ("model-f", "model-f", "latest"),
            ("x-IQ2_XXS", "x", "iq2_xxs"),
        ] {
            assert_eq!(split(stem), (model.to_owned(), tag.to_owned()), "{stem}");
        }
    }

    fn found(stem: &str) -> Found {
        Found { stem: stem.to_owned(), files: Vec::new(), is_folder: false }
    }

    #[test]
    fn several_models_get_a_tag_each_or_are_refused() {
        let said = Wanted { name: "mine".parse().expect("a name"), text: "mine".to_owned() };
        let both = [found("x-Q4_0"), found("x-Q8_0")];
        let text =
            |names: Vec<ModelName>| names.iter().map(ToString::to_string).collect::<Vec<String>>();
        assert_eq!(text(names(&both, None).expect("names")), ["x:q4_0", "x:q8_0"]);
        assert_eq!(text(names(&both, Some(&said)).expect("names")), ["mine:q4_0", "mine:q8_0"]);
        assert_eq!(text(names(&both[..1], Some(&said)).expect("names")), ["mine:latest"]);
        let same = [found("x"), found("y")];
        names(&same, Some(&said)).expect_err("both would be latest");
        names(&[found("---")], None).expect_err("no name in it");
    }

    #[test]
    fn a_folder_is_looked_at_by_the_names_in_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let put = |name: &str| drop(RealFs.open(&folder.path().join(name)).expect("written"));
        let words = |path: &Path| look(path).expect_err("nothing there").message;
        assert!(words(&folder.path().join("absent")).contains("there is no"));
        assert!(words(folder.path()).contains("no GGUF files"), "{}", words(folder.path()));
        for name in ["a-00001-of-00002.gguf", "b.Q4_0.gguf", "mmproj-b.gguf", "README.md"] {
            put(name);
        }
        assert!(words(folder.path()).contains("1 of the 2 parts of a"));
        put("a-00002-of-00002.gguf");
        let all = look(folder.path()).expect("two models");
        let stems: Vec<(&str, usize)> =
            all.iter().map(|one| (one.stem.as_str(), one.files.len())).collect();
        assert_eq!(stems, [("a", 2), ("b.Q4_0", 1)]);
        let shard = look(&folder.path().join("a-00002-of-00002.gguf")).expect("all of it");
        assert_eq!(shard, all[..1]);
        for name in ["model.safetensors", "config.json"] {
            put(name);
        }
        assert_eq!(look(folder.path()).expect("still GGUF"), all);
        put("tokenizer.json");
        let one = look(folder.path()).expect("a folder");
        assert!(one[0].is_folder);
        assert_eq!(file_names(&one[0]), ["config.json", "model.safetensors", "tokenizer.json"]);
    }
}
