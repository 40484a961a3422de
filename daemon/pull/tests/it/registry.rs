//! Registries that speak the distribution protocol, with their tokens and their tricks.

use std::sync::Arc;

use serde_json::{Value, json};
use v4_proto::{Code, Digest};
use v4_pull::{PullConfig, Stage, Wish};
use v4_store::{fs::RealFs, sha256};

use crate::{
    server::{Reply, Request, Server},
    world::{World, bytes, config, name},
};

const OLLAMA: &str = "application/vnd.ollama.image";

/// What a registry has: a manifest and its blobs.
#[derive(Clone)]
struct Image {
    manifest: Vec<u8>,
    blobs: Vec<Vec<u8>>,
}

impl Image {
    /// Weights, a licence and a config under these media types.
    fn new(weights: Vec<u8>, model: &str, license: &str) -> Self {
        let blobs = vec![weights, b"Be kind.".to_vec(), b"{\"model_format\":\"gguf\"}".to_vec()];
        let layer = |i: usize, media_type: &str| json!({"mediaType": media_type, "digest": sha256(&blobs[i]), "size": blobs[i].len()});
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": layer(2, "application/vnd.docker.container.image.v1+json"),
            "layers": [layer(0, model), layer(1, license)],
        });
        Self { manifest: manifest.to_string().into_bytes(), blobs }
    }

    fn ollama(weights: Vec<u8>) -> Self {
        Self::new(weights, &format!("{OLLAMA}.model"), &format!("{OLLAMA}.license"))
    }

    /// The answer to a request for a repository of this one image.
    fn answer(&self, request: &Request, repository: &str) -> Reply {
        let path = request.path.strip_prefix(&format!("/v2/{repository}/"));
        if path == Some("manifests/latest") {
            return Reply::new(200, self.manifest.clone());
        }
        let digest = path.and_then(|path| path.strip_prefix("blobs/")?.parse::<Digest>().ok());
        match self.blobs.iter().find(|blob| Some(sha256(blob)) == digest) {
            Some(blob) => Reply::file(request, blob),
            None => Reply::new(404, r#"{"errors":[{"code":"NAME_UNKNOWN"}]}"#),
        }
    }
}

/// A name on this server.
fn on(server: &Server, repository: &str) -> String {
    format!("{}/{repository}", server.url().strip_prefix("http://").unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_and_its_blobs_are_kept_as_they_came() {
    let (world, image) = (World::new(), Image::ollama(bytes(20 << 20)));
    let served = image.clone();
    let server = Server::start(move |request| served.answer(request, "me/tiny"));
    let model = on(&server, "me/tiny");
    world.pull_well(&model).await;
    let record = world.store.find(&name(&model)).unwrap().unwrap();
    assert_eq!(record.digest, sha256(&image.manifest), "the bytes are the registry's");
    // A second pull asks for the manifest and finds everything here.
    let before = server.requests().len();
    world.pull_well(&model).await;
    assert_eq!(server.requests().len(), before + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modelpack_and_docker_layers_are_weights_too() {
    for (model, license) in [
        ("application/vnd.cncf.model.weight.v1.raw", "application/vnd.cncf.model.doc.v1.raw"),
        ("application/vnd.docker.ai.gguf.v3", "application/vnd.docker.ai.license"),
    ] {
        let (world, image) = (World::new(), Image::new(bytes(1000), model, license));
        let server = Server::start(move |request| image.answer(request, "me/tiny"));
        world.pull_well(&on(&server, "me/tiny")).await;
    }
    let (world, image) = (World::new(), Image::new(bytes(10), "a/tar", "b/tar"));
    let server = Server::start(move |request| image.answer(request, "me/tiny"));
    world.pull_badly(&on(&server, "me/tiny"), Code::Upstream, &["without weights"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_leads_to_its_manifest() {
    let (world, image) = (World::new(), Image::ollama(bytes(1000)));
    let server = Server::start(move |request| {
        let digest = sha256(&image.manifest);
        match request.path.as_str() {
            "/v2/me/tiny/manifests/latest" => {
                let other = json!({"digest": sha256(b"other"), "platform": {"architecture": "wasm", "os": "js"}});
                let ours =
                    json!({"digest": digest, "platform": {"architecture": "amd64", "os": "linux"}});
                Reply::new(200, json!({"schemaVersion": 2, "manifests": [other, ours]}).to_string())
            }
            path if path.ends_with(&digest.to_string()) => Reply::new(200, image.manifest.clone()),
            _ => image.answer(request, "me/tiny"),
        }
    });
    world.pull_well(&on(&server, "me/tiny")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_without_a_host_come_from_the_configured_registries_in_turn() {
    let image = Image::ollama(bytes(1000));
    let server = Server::start(move |request| image.answer(request, "library/tiny"));
    let registries = vec!["http://127.0.0.1:1".to_owned(), server.url().to_owned()];
    let config = PullConfig { registries, ..config("http://127.0.0.1:1") };
    let world = World::of(config, Arc::new(RealFs));
    world.recipe("known", b"x", &[]);
    world.pull_well("tiny").await;
    assert!(world.store.find(&name("tiny")).unwrap().unwrap().name.is_library());
    world.pull_badly("nonsense", Code::NotFound, &["'nonsense:latest' not found", "known"]).await;
}

/// A registry that wants a token, and a token server that wants a password where one is set.
fn guarded(image: Image, password: Option<&'static str>) -> Server {
    Server::start(move |request| {
        let given = request.headers.get("authorization").map(String::as_str);
        let base = format!("http://{}", request.headers["host"]);
        if let Some(query) = request.path.strip_prefix("/token?") {
            assert!(
                query.contains("service=it") && query.contains("repository%3Ame%2Ftiny%3Apull"),
                "{query}"
            );
            if password.is_some() && given != password {
                return Reply::new(401, "");
            }
            return Reply::new(200, json!({"token": "open"}).to_string());
        }
        if given == Some("Bearer open") {
            return image.answer(request, "me/tiny");
        }
        let challenge = format!(
            "Bearer realm=\"{base}/token\",service=\"it\",scope=\"repository:me/tiny:pull\""
        );
        Reply::new(401, "").header("WWW-Authenticate", challenge)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_fetched_and_used_again() {
    let world = World::new();
    let server = guarded(Image::ollama(bytes(1000)), None);
    world.pull_well(&on(&server, "me/tiny")).await;
    let tokens = server.requests().iter().filter(|r| r.path.starts_with("/token")).count();
    assert_eq!(tokens, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_come_from_the_file_and_without_them_the_refusal_says_what_to_do() {
    use std::io::Write as _;
    use v4_store::fs::Fs as _;
    let server = guarded(Image::ollama(bytes(1000)), Some("Basic bWU6c2VjcmV0"));
    let world = World::new();
    let model = on(&server, "me/tiny");
    world.pull_badly(&model, Code::Upstream, &["refuses access", "docker login"]).await;
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("config.json");
    let host = server.url().strip_prefix("http://").unwrap();
    let text = json!({"auths": {host: {"auth": "bWU6c2VjcmV0"}}}).to_string();
    RealFs.open(&file).unwrap().write_all(text.as_bytes()).unwrap();
    let config = PullConfig { auth_file: Some(file), ..config("http://127.0.0.1:1") };
    let world = World::of(config, Arc::new(RealFs));
    world.pull_well(&model).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_a_blob_is_redirected_to_learns_no_token() {
    let (world, image) = (World::new(), Image::ollama(bytes(20 << 20)));
    let store = image.clone();
    let elsewhere = Server::start(move |request| {
        let bytes = store.blobs.iter().find(|blob| request.path.contains(&sha256(blob).hex()));
        Reply::file(request, bytes.unwrap())
    });
    let to = elsewhere.url().to_owned();
    let guard = guarded(image.clone(), None);
    let base = guard.url().to_owned();
    let server = Server::start(move |request| {
        let is_open = request.headers.contains_key("authorization");
        if !is_open {
            let challenge = format!(
                "Bearer realm=\"{base}/token\",service=\"it\",scope=\"repository:me/tiny:pull\""
            );
            return Reply::new(401, "").header("WWW-Authenticate", challenge);
        }
        if request.path.contains("/blobs/") {
            return Reply::new(307, "").header("Location", format!("{to}{}", request.path));
        }
        image.answer(request, "me/tiny")
    });
    world.pull_well(&on(&server, "me/tiny")).await;
    assert!(elsewhere.requests().len() > 3);
    for request in elsewhere.requests() {
        assert!(!request.headers.contains_key("authorization"), "{request:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_manifests_end_in_an_error() {
    let digest = sha256(b"x").to_string();
    let model = format!("{OLLAMA}.model");
    let layer =
        |digest: &str, size: Value| json!({"mediaType": model, "digest": digest, "size": size});
    let manifest = |layers: Value| {
        json!({"schemaVersion": 2, "config": layer(&digest, json!(1)), "layers": layers})
            .to_string()
    };
    let bodies = [
        "{}".to_owned(),
        "<html>".to_owned(),
        "[".repeat(100_000),
        manifest(json!([layer("sha256:../../../etc/passwd", json!(1))])),
        manifest(json!([layer(&digest, json!(-1))])),
        manifest(json!([layer(&digest, json!(u64::MAX)), layer(&digest, json!(2))])),
        format!("{{\"x\":\"{}\"}}", "a".repeat(9 << 20)),
    ];
    for body in bodies {
        let world = World::new();
        let shown: String = body.chars().take(60).collect();
        let server = Server::start(move |_| Reply::new(200, body.clone()));
        let progress = world.pull(&on(&server, "me/tiny")).await;
        let Stage::Failed(fault) = progress.stage else { panic!("{shown}") };
        assert_eq!(fault.code, Code::Upstream, "{shown}: {fault}");
        assert_eq!(world.partials(), 0);
    }
    // One that is packed is not unpacked, however much would come out of it.
    let world = World::new();
    let server =
        Server::start(|_| Reply::new(200, vec![0x1f, 0x8b, 8]).header("Content-Encoding", "gzip"));
    world.pull_badly(&on(&server, "me/tiny"), Code::Upstream, &["no manifest"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_with_other_bytes_is_refused() {
    let (world, image) = (World::new(), Image::ollama(bytes(1000)));
    let server = Server::start(move |request| {
        if request.path.contains("/blobs/") {
            return Reply::new(200, vec![7; 1000]);
        }
        image.answer(request, "me/tiny")
    });
    world.pull_badly(&on(&server, "me/tiny"), Code::Corrupt, &["is not what it must be"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_pull_takes_that_manifest_and_no_other() {
    let (world, image) = (World::new(), Image::ollama(bytes(1000)));
    let digest = sha256(&image.manifest);
    let server = Server::start(move |request| image.answer(request, "me/tiny"));
    let model = name(&on(&server, "me/tiny"));
    let pull = async |locked| {
        let wish = Wish { locked: Some(locked), ..Wish::default() };
        world.follow(world.jobs.pull(&model, wish).unwrap()).await.stage
    };
    let Stage::Failed(fault) = pull(sha256(b"another")).await else { panic!("it was taken") };
    assert!(fault.message.contains("is locked; nothing was changed"), "{fault}");
    assert_eq!(world.store.find(&model).unwrap(), None);
    assert!(matches!(pull(digest).await, Stage::Done { .. }));
    // Also when it is here already.
    let Stage::Failed(fault) = pull(sha256(b"another")).await else { panic!("it was taken") };
    assert_eq!(fault.code, Code::Corrupt);
}
