//! Registries that speak the distribution protocol (`/v2`): Ollama's own, plain OCI ones, and
//! `hf.co`, which is just another host. A name there is a manifest; its layers are blobs.

use std::{
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use reqwest::{
    Url,
    header::{ACCEPT, HeaderMap, HeaderValue},
};
use serde::Deserialize;
use v4_proto::{Digest, ModelName, name::DEFAULT_HOST};
use v4_store::{
    Layer, Manifest, Role,
    fs::{self, RealFs},
    manifest::MANIFEST_TYPE,
    sha256,
};

use super::{
    Net, host,
    http::{self, Key, Link},
    modelpack,
    ollama_key::OllamaKey,
};
use crate::{
    error::{PullError, shown},
    limits,
    recipe::{Origin, Part, Recipe, RecipeFile, RegistryBlob},
    signature::{self, Mode},
};

/// What is taken for a manifest.
const ACCEPTED: &str = "application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// A repository of a registry, found by a name.
#[derive(Debug, Clone)]
pub(crate) struct Repository {
    /// Scheme, host and port.
    pub base: String,
    /// Its path.
    pub path: String,
}

impl Repository {
    /// Where a name may be, best first.
    pub fn of(net: &Net, name: &ModelName, is_plain: bool) -> Vec<Self> {
        let path = format!("{}/{}", name.namespace(), name.model());
        let bases = if name.host() == DEFAULT_HOST {
            net.config.registries.clone()
        } else {
            let scheme = if is_plain || is_loopback(name.host()) { "http" } else { "https" };
            vec![format!("{scheme}://{}", name.host())]
        };
        let clean = |base: String| base.trim_end_matches('/').to_owned();
        bases.into_iter().map(|base| Self { base: clean(base), path: path.clone() }).collect()
    }
}

/// Whether a host is this machine, so that nobody can listen in.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.chars().all(|c| c.is_ascii_digit()) => name,
        _ => host,
    };
    name == "localhost"
        || name.ends_with(".localhost")
        || name.trim_matches(['[', ']']).parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

/// Asks the registries of a name for its manifest, in order, and makes a recipe of it.
pub(crate) async fn resolve(
    net: &Net,
    name: &ModelName,
    is_plain: bool,
) -> Result<Recipe, PullError> {
    let mut failed: Option<PullError> = None;
    for repository in Repository::of(net, name, is_plain) {
        match resolve_at(net, name, &repository).await {
            Ok(recipe) => return Ok(recipe),
            // That one is out of reach says less than what another one says.
            Err(error) => match error {
                PullError::Unreachable { .. } if failed.is_some() => {}
                error => failed = Some(error),
            },
        }
    }
    Err(failed.unwrap_or_else(|| PullError::Unknown { name: name.to_string(), host: None }))
}

async fn resolve_at(
    net: &Net,
    name: &ModelName,
    repository: &Repository,
) -> Result<Recipe, PullError> {
    let (bytes, url) = manifest(net, name, repository).await?;
    let signature = signed(net, name, repository, &sha256(&bytes)).await?;
    let wrong = |what: String| PullError::Answer { url: shown(&url), what };
    let manifest =
        Manifest::parse(&bytes).map_err(|error| wrong(format!("no manifest: {error}")))?;
    let Some(files) = files(&manifest, repository) else {
        return Err(wrong("a manifest without weights that v4 can read".to_owned()));
    };
    let from = format!("{}/{}:{}", repository.base, repository.path, name.tag());
    let revision = Some(sha256(&bytes).to_string());
    let origin = Origin { from, revision, license: None, signature };
    // With archives the model is made of what is in them, under a manifest of its own.
    let has_archives = manifest.layers.iter().any(is_archive);
    let manifest = (!has_archives).then_some(bytes);
    Ok(Recipe { name: name.clone(), files, texts: Vec::new(), manifest, origin })
}

/// The files of a manifest; `None` where no weights are among them.
fn files(manifest: &Manifest, repository: &Repository) -> Option<Vec<RecipeFile>> {
    let blob = |layer: &Layer| RegistryBlob {
        base: repository.base.clone(),
        repository: repository.path.clone(),
        digest: layer.digest,
    };
    let file = |layer: &Layer| RecipeFile {
        role: layer.role(),
        media_type: layer.media_type.clone(),
        digest: Some(layer.digest),
        size: Some(layer.size),
        sources: vec![Part::Registry(blob(layer)).into()],
    };
    let unpacked = |layer: &Layer| RecipeFile {
        role: Role::Model,
        media_type: Role::Model.media_type(),
        digest: None,
        size: None,
        sources: vec![Part::Tar(blob(layer), layer.size).into()],
    };
    let layers = &manifest.layers;
    layers.iter().any(|layer| layer.role() == Role::Model || is_archive(layer)).then_some(())?;
    if !layers.iter().any(is_archive) {
        return Some(layers.iter().chain([&manifest.config]).map(file).collect());
    }
    let is_known = |layer: &&Layer| is_archive(layer) || layer.role() != Role::Other;
    let known = layers.iter().filter(is_known);
    Some(known.map(|layer| if is_archive(layer) { unpacked(layer) } else { file(layer) }).collect())
}

/// Whether a layer is an archive of weights.
fn is_archive(layer: &Layer) -> bool {
    modelpack::is_archive(&layer.media_type)
}

/// Does what the policy asks of a name. Gives the file of the key that signed it, where one did.
async fn signed(
    net: &Net,
    name: &ModelName,
    repository: &Repository,
    manifest: &Digest,
) -> Result<Option<String>, PullError> {
    let rule = signature::rule(net.config.policy.as_deref(), name)?;
    let Some(rule) = rule.filter(|rule| rule.mode != Mode::Off) else { return Ok(None) };
    let keys = rule.keys()?;
    let what = match signer(net, repository, manifest, &keys).await? {
        Ok(file) => return Ok(Some(file)),
        Err(what) => what,
    };
    if rule.mode == Mode::Require {
        return Err(PullError::Unsigned { name: name.to_string(), what });
    }
    tracing::warn!(%name, what, "the policy asks for a signature");
    Ok(None)
}

/// The file of the key that signed a manifest, or what there is instead.
async fn signer(
    net: &Net,
    repository: &Repository,
    manifest: &Digest,
    keys: &[signature::Key],
) -> Result<Result<String, String>, PullError> {
    let Repository { base, path } = repository;
    let session = net.session(base, path, "pull");
    let ask = async |what: String, max_bytes: usize| {
        let url = format!("{base}/v2/{path}/{what}");
        let link = Link::new(net, &url, Key::Registry(&session));
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(ACCEPTED));
        http::read_small(&link, &headers, max_bytes).await.map(|(_, bytes)| bytes)
    };
    let tag = format!("manifests/{}", signature::tag(manifest));
    let bytes = match ask(tag, v4_store::limits::MANIFEST_BYTES).await {
        Err(PullError::Status { status: 404, .. }) => return Ok(Err("no signature".to_owned())),
        answer => answer?,
    };
    let Ok(signatures) = Manifest::parse(&bytes) else {
        return Ok(Err("something else where its signature would be".to_owned()));
    };
    let mut what = "no signature".to_owned();
    for (layer, signature) in signature::candidates(&signatures.layers) {
        let payload = ask(format!("blobs/{}", layer.digest), limits::PAYLOAD_BYTES).await?;
        if sha256(&payload) != layer.digest {
            "a signature whose bytes are not what they must be".clone_into(&mut what);
            continue;
        }
        match signature::check(&payload, &signature, manifest, keys) {
            Ok(file) => return Ok(Ok(file.display().to_string())),
            Err(why) => what = why,
        }
    }
    Ok(Err(what))
}

/// The bytes of a name's manifest, and the URL it came from. Of an index, the manifest that is for
/// this kind of machine, or the first.
async fn manifest(
    net: &Net,
    name: &ModelName,
    repository: &Repository,
) -> Result<(Vec<u8>, String), PullError> {
    let mut reference = name.tag().to_owned();
    for _ in 0..2 {
        let Repository { base, path } = repository;
        let url = format!("{base}/v2/{path}/manifests/{reference}");
        let session = net.session(base, path, "pull");
        let link = Link::new(net, &url, Key::Registry(&session));
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(ACCEPTED));
        let answer = http::read_small(&link, &headers, v4_store::limits::MANIFEST_BYTES).await;
        let (_, bytes) = answer.map_err(|error| refused(error, name, base))?;
        if let Ok(expected) = reference.parse::<Digest>()
            && sha256(&bytes) != expected
        {
            return Err(link.wrong(format!("a manifest that is not {expected}")));
        }
        match serde_json::from_slice(&bytes) {
            Ok(Index { manifests }) if !manifests.is_empty() => {
                let ours = manifests.iter().find(|one| one.platform.is_ours());
                reference = ours.unwrap_or(&manifests[0]).digest.to_string();
            }
            _ => return Ok((bytes, url)),
        }
    }
    let url = shown(&repository.base);
    Err(PullError::Answer { url, what: "an index in an index".to_owned() })
}

/// An index: manifests for several kinds of machine.
#[derive(Deserialize)]
struct Index {
    manifests: Vec<IndexEntry>,
}

#[derive(Deserialize)]
struct IndexEntry {
    digest: Digest,
    #[serde(default)]
    platform: Platform,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Platform {
    architecture: String,
    os: String,
}

impl Platform {
    fn is_ours(&self) -> bool {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        self.os == std::env::consts::OS && self.architecture == architecture
    }
}

/// What a registry's refusal of a name means.
fn refused(error: PullError, name: &ModelName, base: &str) -> PullError {
    match error {
        PullError::Status { status: 404, .. } => {
            PullError::Unknown { name: name.to_string(), host: Some(host(base)) }
        }
        PullError::Status { status: 401 | 403, .. } => {
            PullError::Denied { name: name.to_string(), host: host(base) }
        }
        error => error,
    }
}

/// What opens the doors of a repository: found out when the registry first refuses.
pub(crate) struct Session {
    /// Scheme, host and port of the registry.
    base: String,
    /// What is asked for when the registry does not say it.
    scope: String,
    opened: Mutex<Option<HeaderValue>>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("scope", &self.scope).finish_non_exhaustive()
    }
}

impl Net {
    /// The session of a repository for some actions, kept from an earlier request.
    pub fn session(&self, base: &str, path: &str, actions: &str) -> Arc<Session> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.len() >= limits::SESSIONS {
            sessions.retain(|_, session| Arc::strong_count(session) > 1);
        }
        let made = || {
            let (base, scope) = (base.to_owned(), format!("repository:{path}:{actions}"));
            Arc::new(Session { base, scope, opened: Mutex::default() })
        };
        Arc::clone(sessions.entry(format!("{base} {path} {actions}")).or_insert_with(made))
    }
}

/// A token server's answer.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Session {
    /// What the requests bear, once that is known.
    pub fn authorization(&self) -> Option<HeaderValue> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Does what a refusal asks for. Returns whether there is something new to try. Boxed, since a
    /// token server is asked by the same code that asks for a token.
    pub fn open<'a>(
        &'a self,
        net: &'a Net,
        challenges: &'a [&'a str],
    ) -> Pin<Box<dyn Future<Output = Result<bool, PullError>> + Send + 'a>> {
        Box::pin(self.try_open(net, challenges))
    }

    async fn try_open(&self, net: &Net, challenges: &[&str]) -> Result<bool, PullError> {
        let credentials = credentials(net.config.auth_file.as_deref(), &host(&self.base));
        for challenge in challenges.iter().filter_map(|text| Challenge::parse(text)) {
            let value = match challenge {
                Challenge::Basic => credentials.clone(),
                Challenge::Bearer { realm, service, scope } => {
                    let token = self.token(net, &realm, service, scope, credentials.as_deref());
                    Some(format!("Bearer {}", token.await?))
                }
            };
            let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) else {
                continue;
            };
            let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
            let is_new = opened.as_ref() != Some(&value);
            *opened = Some(value);
            return Ok(is_new);
        }
        Ok(false)
    }

    /// Whether a registry is one of those of names without a host: Ollama's, or what stands for it.
    fn is_ollamas(&self, net: &Net) -> bool {
        net.config.registries.iter().any(|url| host(url) == host(&self.base))
    }

    /// Asks a token server, with credentials where there are some.
    async fn token(
        &self,
        net: &Net,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
        credentials: Option<&str>,
    ) -> Result<String, PullError> {
        let wrong =
            |what: &str| PullError::Answer { url: shown(&self.base), what: what.to_owned() };
        let mut url = Url::parse(realm).map_err(|_| wrong("a realm that is no URL"))?;
        // Nobody on the way may see what the registry itself would not be told in the open.
        let is_safe = url.scheme() == "https" || host(realm) == host(&self.base);
        if !is_safe && credentials.is_some() {
            return Err(wrong("a token server that would see the credentials in the open"));
        }
        let scope = scope.unwrap_or_else(|| self.scope.clone());
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", &service);
        }
        let mut bearer = credentials.and_then(|value| HeaderValue::try_from(value).ok());
        if bearer.is_none() && self.is_ollamas(net) && host(realm) == host(&self.base) {
            // Its users have no password but a key.
            let key = net.config.ollama_key.as_deref().and_then(OllamaKey::open);
            bearer = key.and_then(|key| key.sign(&mut url));
        }
        let key = bearer.as_ref().map_or(Key::None, Key::Bearer);
        let link = Link::new(net, url.as_str(), key);
        let (_, bytes) = http::read_small(&link, &HeaderMap::new(), limits::TOKEN_BYTES).await?;
        let token = serde_json::from_slice(&bytes).ok();
        let token = token.and_then(|Token { token, access_token }| token.or(access_token));
        token.ok_or_else(|| link.wrong("no token"))
    }
}

/// What a registry wants to see.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        let mut rest = rest.trim();
        while let Some((name, after)) = rest.split_once('=') {
            let (value, tail) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_once(',').unwrap_or((after, "")),
            };
            match name.trim().trim_start_matches(',').trim() {
                "realm" => realm = Some(value.to_owned()),
                "service" => service = Some(value.to_owned()),
                "scope" => scope = Some(value.to_owned()),
                _ => {}
            }
            rest = tail.trim_start_matches([',', ' ']);
        }
        Some(Self::Bearer { realm: realm?, service, scope })
    }
}

/// What the file says of a host, as the value of an `Authorization` field. The file is the one that
/// `docker login` and `podman login` write.
fn credentials(file: Option<&Path>, host: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        auths: std::collections::HashMap<String, Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        auth: Option<String>,
    }
    let bytes = fs::read(&RealFs, file?, limits::AUTH_FILE_BYTES).ok()?;
    let File { auths } = serde_json::from_slice(&bytes).ok()?;
    let plain = |key: &str| {
        let key =
            key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
        key.split('/').next().unwrap_or_default().to_owned()
    };
    let entry = auths.into_iter().find(|(key, _)| plain(key) == host)?.1;
    let auth = entry.auth.filter(|auth| !auth.is_empty())?;
    Some(format!("Basic {auth}"))
}

/// The media type a manifest says it has.
pub(crate) fn manifest_type(manifest: &[u8]) -> String {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Said {
        media_type: Option<String>,
    }
    let said = serde_json::from_slice::<Said>(manifest).ok().and_then(|said| said.media_type);
    said.filter(|text| !text.is_empty()).unwrap_or_else(|| MANIFEST_TYPE.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            let owned = |text: Option<&str>| text.map(str::to_owned);
            let (service, scope) = (owned(service), owned(scope));
            Some(Challenge::Bearer { realm: realm.to_owned(), service, scope })
        };
        for (text, expected) in [
            ("Basic realm=\"x\"", Some(Challenge::Basic)),
            ("basic", Some(Challenge::Basic)),
            (
                "Bearer realm=\"https://a/t\",service=\"s\",scope=\"repository:a/b:pull,push\"",
                bearer("https://a/t", Some("s"), Some("repository:a/b:pull,push")),
            ),
            ("bearer  realm=https://a/t, service=s", bearer("https://a/t", Some("s"), None)),
            ("Bearer realm=\"open", None),
            ("Bearer service=\"s\"", None),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(Challenge::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn this_machine_is_known_by_its_names() {
        for host in ["localhost", "localhost:5000", "127.0.0.1", "127.9.9.9:1", "a.localhost:1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["registry.ollama.ai", "10.0.0.1:5000", "localhost.example.org", "box"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn credentials_are_those_of_the_host() {
        use std::io::Write as _;
        use v4_store::fs::Fs as _;
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("config.json");
        let text = r#"{"auths":{"https://a.example/v1/":{"auth":"dTpw"},"b:5000":{"auth":""}}}"#;
        RealFs.open(&path).unwrap().write_all(text.as_bytes()).unwrap();
        assert_eq!(credentials(Some(&path), "a.example"), Some("Basic dTpw".to_owned()));
        assert_eq!(credentials(Some(&path), "b:5000"), None);
        assert_eq!(credentials(Some(&path), "example"), None);
        assert_eq!(credentials(None, "a.example"), None);
    }
}
