//! Repositories of Hugging Face: which file a quant means, its digest, all its shards, and the
//! commit that the answer is pinned to.

use reqwest::header::HeaderMap;
use serde::{Deserialize, de::DeserializeOwned};
use v4_proto::{Digest, ModelName};
use v4_store::{
    Role,
    manifest::{folder_file, folder_lacks},
};

use super::{
    Net, host,
    http::{self, Link},
};
use crate::{
    error::{PullError, shown},
    limits,
    recipe::{Origin, Part, Recipe, RecipeFile},
};

/// The hosts whose names mean repositories.
const HOSTS: [&str; 2] = ["hf.co", "huggingface.co"];

/// Quants that are taken when none is asked for, best first: what most people take.
const USUAL: [&str; 8] = ["Q4_K_M", "Q4_K_S", "Q4_0", "Q5_K_M", "Q8_0", "MXFP4", "Q4_1", "BF16"];

/// Whether a name means a repository.
pub(crate) fn is_repository(name: &ModelName) -> bool {
    HOSTS.contains(&name.host())
}

/// What the hub says of one revision.
#[derive(Deserialize)]
struct Revision {
    sha: String,
    #[serde(default, rename = "cardData")]
    card: Option<Card>,
}

#[derive(Deserialize)]
struct Card {
    license: Option<serde_json::Value>,
}

/// A file of a repository.
#[derive(Debug, Clone, Deserialize)]
struct Entry {
    path: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    /// The sha256 of the bytes.
    oid: String,
    size: u64,
}

/// Makes a recipe of a repository: the file or files that the tag means.
pub(crate) async fn resolve(
    net: &Net,
    name: &ModelName,
    revision: Option<&str>,
) -> Result<Recipe, PullError> {
    let endpoint = net.config.hf_endpoint.trim_end_matches('/');
    let repository = format!("{}/{}", name.namespace(), name.model());
    let wanted = encoded(revision.unwrap_or("main"));
    let url = format!("{endpoint}/api/models/{repository}/revision/{wanted}");
    let asked = ask::<Revision>(net, &url).await;
    let (Revision { sha, card }, _) = asked.map_err(|error| refused(error, name, endpoint))?;
    if sha.is_empty() || !sha.chars().all(|c| c.is_ascii_hexdigit()) {
        return Err(PullError::Answer { url: shown(&url), what: "no commit".to_owned() });
    }
    let entries = tree(net, &format!("{endpoint}/api/models/{repository}/tree/{sha}")).await?;
    let chosen = choose(&entries, name.tag())
        .map_err(|what| PullError::Repository { repository: repository.clone(), what })?;
    let file = |entry: &&Entry| {
        let url = format!("{endpoint}/{repository}/resolve/{sha}/{}", encoded(&entry.path));
        let digest = entry.lfs.as_ref().and_then(|lfs| Digest::from_hex(&lfs.oid).ok());
        let (role, media_type) = match folder_file(&entry.path) {
            Some((role, media_type)) => (role, media_type.to_owned()),
            None => (Role::Model, Role::Model.media_type()),
        };
        RecipeFile {
            role,
            media_type,
            digest,
            size: Some(entry.lfs.as_ref().map_or(entry.size, |lfs| lfs.size)),
            sources: vec![Part::Http { url }.into()],
        }
    };
    let license = card.and_then(|card| match card.license? {
        serde_json::Value::String(text) => Some(text),
        _ => None,
    });
    let from = format!("{endpoint}/{repository}");
    let origin = Origin { from, revision: Some(sha.clone()), license, signature: None };
    let files = chosen.iter().map(file).collect();
    Ok(Recipe { name: name.clone(), files, texts: Vec::new(), manifest: None, origin })
}

/// All files of a commit, page by page.
async fn tree(net: &Net, url: &str) -> Result<Vec<Entry>, PullError> {
    let mut next = Some(format!("{url}?recursive=true"));
    let mut entries: Vec<Entry> = Vec::new();
    for _ in 0..limits::TREE_PAGES {
        let Some(url) = next.take() else { break };
        let (page, headers) = ask::<Vec<Entry>>(net, &url).await?;
        entries.extend(page);
        let links = headers.get("link").and_then(|link| link.to_str().ok());
        // Only to the same place: whoever answers must not send the token elsewhere.
        next = links.and_then(following).filter(|to| host(to) == host(&url));
    }
    Ok(entries)
}

/// The next page, as a `Link` field says it.
fn following(links: &str) -> Option<String> {
    let link = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    Some(link.trim().strip_prefix('<')?.split_once('>')?.0.to_owned())
}

async fn ask<T: DeserializeOwned>(net: &Net, url: &str) -> Result<(T, HeaderMap), PullError> {
    let link = Link::new(net, url, net.hf_key(url));
    let answer = http::read_small(&link, &HeaderMap::new(), limits::INDEX_ANSWER_BYTES).await?;
    let (headers, bytes) = answer;
    let parsed = serde_json::from_slice(&bytes);
    let parsed = parsed.map_err(|error| link.wrong(format!("something unexpected: {error}")))?;
    Ok((parsed, headers))
}

/// What a hub's refusal means. It answers 401 for what does not exist, too.
fn refused(error: PullError, name: &ModelName, endpoint: &str) -> PullError {
    match error {
        PullError::Status { status: 404, .. } => {
            PullError::Unknown { name: name.to_string(), host: Some(host(endpoint)) }
        }
        PullError::Status { status: 401 | 403, .. } => {
            PullError::Gated { name: name.to_string(), host: host(endpoint) }
        }
        error => error,
    }
}

/// The tag that means the safetensors of a repository that has GGUF, too.
const SAFETENSORS: &str = "safetensors";

/// The files that a tag means: one, or all shards of one, or a folder of safetensors.
fn choose<'a>(entries: &'a [Entry], tag: &str) -> Result<Vec<&'a Entry>, String> {
    let lower = |entry: &Entry| entry.path.to_ascii_lowercase();
    let is_weights = |entry: &&Entry| {
        let path = lower(entry);
        has_ending(&path, "gguf") && !path.contains("mmproj") && !path.contains("imatrix")
    };
    let mut files: Vec<&Entry> = entries.iter().filter(is_weights).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let is_folder = || entries.iter().any(|entry| has_ending(&lower(entry), SAFETENSORS));
    if tag.eq_ignore_ascii_case(SAFETENSORS)
        || files.is_empty() && tag == v4_proto::name::DEFAULT_TAG && is_folder()
    {
        return folder(entries);
    }
    if files.is_empty() {
        let advice = "; for its safetensors say nothing or `safetensors` in place of the quant";
        return Err(format!("no GGUF file{}", if is_folder() { advice } else { "" }));
    }
    let first = |is_it: &dyn Fn(&Entry) -> bool| {
        // Of several the shortest: `x-Q4_K_M.gguf` before `x-UD-Q4_K_M.gguf`.
        files.iter().copied().filter(|file| is_it(file)).min_by_key(|file| file.path.len())
    };
    let found = if tag == v4_proto::name::DEFAULT_TAG {
        let usual = USUAL.iter().find_map(|quant| first(&|file| has_quant(&file.path, quant)));
        usual.or(files.first().copied())
    } else {
        let is_named = |file: &Entry| {
            let name = file.path.rsplit('/').next().unwrap_or_default();
            name.eq_ignore_ascii_case(tag)
                || stem(&file.path).rsplit('/').next().is_some_and(|x| x.eq_ignore_ascii_case(tag))
        };
        first(&is_named).or_else(|| first(&|file| has_quant(&file.path, tag)))
    };
    let Some(found) = found else {
        let names: Vec<&str> = files.iter().map(|file| file.path.as_str()).take(20).collect();
        return Err(format!("no file for {tag:?}; it has {}", names.join(", ")));
    };
    let whole = stem(&found.path);
    let shards: Vec<&Entry> =
        files.iter().copied().filter(|file| stem(&file.path) == whole).collect();
    match shard_of(&found.path).map(|(_, n)| n) {
        Some(n) if n != shards.len() as u64 => {
            Err(format!("{} of the {n} shards of {whole}", shards.len()))
        }
        _ => Ok(shards),
    }
}

/// The files of a model folder: what lies at the top and a runner reads. Of weights that are there
/// twice, whole and in the parts of another program, those that the index names.
fn folder(entries: &[Entry]) -> Result<Vec<&Entry>, String> {
    let mut files: Vec<&Entry> =
        entries.iter().filter(|entry| folder_file(&entry.path).is_some()).collect();
    let is_usual = |entry: &Entry| entry.path.starts_with("model");
    let is_weights = |entry: &Entry| has_ending(&entry.path, SAFETENSORS);
    if files.iter().any(|entry| is_weights(entry) && is_usual(entry)) {
        files.retain(|entry| !is_weights(entry) || is_usual(entry));
    }
    if files.iter().any(|entry| entry.path == INDEX) {
        files.retain(|entry| entry.path != "model.safetensors");
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let names: Vec<&str> = files.iter().map(|entry| entry.path.as_str()).collect();
    match folder_lacks(&names) {
        None => Ok(files),
        Some(what) => Err(format!(
            "no {what}, so its safetensors cannot be run; look for a repository of the same model \
             with GGUF in its name"
        )),
    }
}

/// Says which file has which weights, where there are several.
const INDEX: &str = "model.safetensors.index.json";

/// Whether the name of a file ends so.
fn has_ending(path: &str, ending: &str) -> bool {
    path.rsplit_once('.').is_some_and(|(_, found)| found == ending)
}

/// Whether a path says a quant, as a word of its own.
fn has_quant(path: &str, quant: &str) -> bool {
    let (path, quant) = (stem(path).to_ascii_lowercase(), quant.to_ascii_lowercase());
    let is_edge = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '_');
    path.match_indices(&quant).any(|(at, _)| {
        is_edge(path[..at].chars().next_back()) && is_edge(path[at + quant.len()..].chars().next())
    })
}

/// A path without the ending of its file and without the number of its shard.
fn stem(path: &str) -> &str {
    match shard_of(path) {
        Some((stem, _)) => stem,
        None => path.get(..path.len().saturating_sub(".gguf".len())).unwrap_or(path),
    }
}

/// `STEM-00001-of-00003.gguf`: the stem and how many there are.
fn shard_of(path: &str) -> Option<(&str, u64)> {
    let rest = path.get(..path.len().checked_sub(".gguf".len())?)?;
    let (rest, n) = rest.rsplit_once("-of-")?;
    let (stem, i) = rest.rsplit_once('-')?;
    let is_number = |text: &str| text.len() == 5 && text.chars().all(|c| c.is_ascii_digit());
    (is_number(i) && is_number(n)).then_some((stem, n.parse().ok()?))
}

/// A path as it may stand in a URL.
fn encoded(path: &str) -> String {
    use std::fmt::Write as _;
    path.bytes().fold(String::new(), |mut out, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                out.push(byte.into());
            }
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(paths: &[&str]) -> Vec<Entry> {
        let entry = |path: &&str| Entry { path: (*path).to_owned(), size: 1, lfs: None };
        paths.iter().map(entry).collect()
    }

    fn chosen(paths: &[&str], tag: &str) -> Result<Vec<String>, String> {
        let entries = entries(paths);
        Ok(choose(&entries, tag)?.iter().map(|entry| entry.path.clone()).collect())
    }

    const FILES: [&str; 9] = [
        "README.md",
        "mmproj-F16.gguf",
        "x-UD-Q4_K_M.gguf",
        "x-Q4_K_M.gguf",
        "x-Q4_K_S.gguf",
        "x-q8_0.gguf",
        "BF16/x-BF16-00002-of-00002.gguf",
        "BF16/x-BF16-00001-of-00002.gguf",
        "x.imatrix.gguf",
    ];

    #[test]
    fn a_quant_a_file_or_nothing_means_a_file_and_all_its_shards() {
        for (tag, expected) in [
            ("latest", vec!["x-Q4_K_M.gguf"]),
            ("q4_k_m", vec!["x-Q4_K_M.gguf"]),
            ("Q4_K_S", vec!["x-Q4_K_S.gguf"]),
            ("Q8_0", vec!["x-q8_0.gguf"]),
            ("x-UD-Q4_K_M.gguf", vec!["x-UD-Q4_K_M.gguf"]),
            ("x-UD-Q4_K_M", vec!["x-UD-Q4_K_M.gguf"]),
            ("BF16", vec!["BF16/x-BF16-00001-of-00002.gguf", "BF16/x-BF16-00002-of-00002.gguf"]),
        ] {
            assert_eq!(chosen(&FILES, tag).unwrap(), expected, "{tag}");
        }
        let words = chosen(&FILES, "Q2_K").unwrap_err();
        assert!(words.contains("no file for \"Q2_K\"; it has") && words.contains("x-Q4_K_S.gguf"));
        assert!(chosen(&FILES, "Q4").is_err(), "half a word is none");
        assert!(chosen(&["a-00001-of-00003.gguf"], "latest").unwrap_err().contains("1 of the 3"));
        assert!(chosen(&["m.safetensors"], "q4_0").unwrap_err().contains("safetensors"));
        assert_eq!(chosen(&["odd.gguf"], "latest").unwrap(), ["odd.gguf"]);
        assert_eq!(chosen(&[], "latest").unwrap_err(), "no GGUF file");
    }

    #[test]
    fn a_repository_of_safetensors_is_a_folder() {
        let single = ["config.json", "model.safetensors", "tokenizer.json"];
        let others = ["README.md", "onnx/model.onnx", "consolidated.safetensors", "a/config.json"];
        let all = [&single[..], &others].concat();
        assert_eq!(chosen(&all, "latest").unwrap(), single);
        assert_eq!(chosen(&all, "Safetensors").unwrap(), single);
        let both = [&all[..], &["x-Q4_K_M.gguf"]].concat();
        assert_eq!(chosen(&both, "latest").unwrap(), ["x-Q4_K_M.gguf"]);
        assert_eq!(chosen(&both, "safetensors").unwrap(), single);
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let sharded = [&all[..], &shards, &["model.safetensors.index.json"]].concat();
        let found = chosen(&sharded, "latest").unwrap();
        assert!(shards.iter().all(|shard| found.iter().any(|file| file == shard)), "{found:?}");
        assert!(!found.iter().any(|file| file == "model.safetensors"), "{found:?}");
        let words = chosen(&single[..2], "latest").unwrap_err();
        assert!(words.contains("no tokenizer.json"), "{words}");
        let words = chosen(&["m.safetensors"], "latest").unwrap_err();
        assert!(words.contains("no config.json"), "{words}");
    }

    #[test]
    fn paths_are_encoded_and_pages_followed() {
        assert_eq!(encoded("a b/ü?#%.gguf"), "a%20b/%C3%BC%3F%23%25.gguf");
        let links = "<https://x/a>; rel=\"prev\", <https://x/b?c=d>; rel=\"next\"";
        assert_eq!(following(links).as_deref(), Some("https://x/b?c=d"));
        assert_eq!(following("<https://x/a>; rel=\"prev\""), None);
    }
}
