//! Repositories of Hugging Face, over a loopback hub.

use std::sync::Arc;

use serde_json::json;
use v4_proto::Code;
use v4_pull::{PullConfig, Wish};
use v4_store::{fs::RealFs, sha256};

use crate::{
    server::{Reply, Server},
    world::{SHORT, World, bytes, config, name},
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one repository of two quants, one of them in shards. Everything needs a token.
fn hub(shards: [Vec<u8>; 2], small: Vec<u8>) -> Server {
    Server::start(move |request| {
        if request.headers.get("authorization").map(String::as_str) != Some("Bearer secret") {
            return Reply::new(401, "");
        }
        let lfs = |bytes: &[u8]| json!({"oid": sha256(bytes).hex(), "size": bytes.len()});
        let file = |path: &str, bytes: &[u8]| json!({"type": "file", "path": path, "size": 130, "lfs": lfs(bytes)});
        let resolve = format!("/me/x-GGUF/resolve/{COMMIT}");
        let tree = format!("/api/models/me/x-GGUF/tree/{COMMIT}");
        match request.path.as_str() {
            "/api/models/me/x-GGUF/revision/main" | "/api/models/me/x-GGUF/revision/v1.0" => {
                Reply::new(200, json!({"sha": COMMIT, "cardData": {"license": "mit"}}).to_string())
            }
            path if path == format!("{tree}?recursive=true") => {
                let page =
                    json!([{"type": "directory", "path": "Q8_0"}, file("x-Q4_K_M.gguf", &small)]);
                let base = format!("http://{}", request.headers["host"]);
                let link = format!("<{base}{tree}?cursor=2>; rel=\"next\"");
                Reply::new(200, page.to_string()).header("Link", link)
            }
            path if path == format!("{tree}?cursor=2") => {
                let shard = |i: usize| {
                    file(&format!("Q8_0/x-Q8_0-0000{}-of-00002.gguf", i + 1), &shards[i])
                };
                Reply::new(200, json!([shard(0), shard(1)]).to_string())
            }
            path if path == format!("{resolve}/x-Q4_K_M.gguf") => Reply::file(request, &small),
            path if path == format!("{resolve}/Q8_0/x-Q8_0-00001-of-00002.gguf") => {
                Reply::file(request, &shards[0])
            }
            path if path == format!("{resolve}/Q8_0/x-Q8_0-00002-of-00002.gguf") => {
                Reply::file(request, &shards[1])
            }
            _ => Reply::new(404, ""),
        }
    })
}

fn world(server: &Server, token: Option<&str>) -> World {
    let config = PullConfig {
        hf_endpoint: server.url().to_owned(),
        hf_token: token.map(str::to_owned),
        ..config("http://127.0.0.1:1")
    };
    World::of(config, Arc::new(RealFs))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quant_of_a_repository_is_pulled_and_pinned() {
    let (shards, small) = ([bytes(20 << 20), bytes(1000)], bytes(5000));
    let server = hub(shards.clone(), small.clone());
    let world = world(&server, Some("secret"));
    world.pull_well("hf.co/me/x-GGUF").await;
    let record = world.store.find(&name("hf.co/me/x-GGUF")).unwrap().unwrap();
    assert_eq!(record.manifest.layers[0].digest, sha256(&small));
    let origin = world.store.origin(&record.digest).unwrap();
    let origin: serde_json::Value = serde_json::from_slice(&origin).unwrap();
    assert_eq!((&origin["revision"], &origin["license"]), (&json!(COMMIT), &json!("mit")));
    assert_eq!(origin["files"][0]["verified"], true);
    // All shards of a quant, one blob each.
    let wish = Wish { revision: Some("v1.0".to_owned()), ..Wish::default() };
    let sharded = name("hf.co/me/x-GGUF:Q8_0");
    let watch = world.jobs.pull(&sharded, wish).unwrap();
    world.follow(watch).await;
    let record = world.store.find(&sharded).unwrap().unwrap();
    let digests: Vec<_> = record.manifest.layers.iter().map(|layer| layer.digest).collect();
    assert_eq!(digests, shards.map(|shard| sha256(&shard)));
}

/// A short name of the catalog that means a repository is that repository with the catalog's texts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_name_may_mean_a_repository() {
    let small = bytes(5000);
    let server = hub([bytes(10), bytes(20)], small.clone());
    let open = world(&server, Some("secret"));
    open.pull_well(SHORT.0).await;
    let record = open.store.find(&name(SHORT.0)).unwrap().unwrap();
    assert_eq!(record.manifest.layers[0].digest, sha256(&small));
    let license = record.manifest.role(v4_store::Role::License).next().unwrap();
    assert_eq!(open.store.read_blob(&license.digest, 100).unwrap(), b"free");
    let origin = open.store.origin(&record.digest).unwrap();
    let origin: serde_json::Value = serde_json::from_slice(&origin).unwrap();
    assert_eq!(
        (&origin["revision"], &origin["files"][0]["verified"]),
        (&json!(COMMIT), &json!(true))
    );
    // Nobody else can be asked here, so what the hub says is what is said.
    let closed = world(&server, None);
    closed.pull_badly(SHORT.0, Code::Upstream, &["HF_TOKEN"]).await;
}

/// A repository without GGUF: its weights and what a runner reads beside them, each under its name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_of_safetensors_is_pulled_as_a_folder() {
    let weights = bytes(20 << 20);
    let oid = json!({"oid": sha256(&weights).hex(), "size": weights.len()});
    let server = Server::start(move |request| {
        let tree = format!("/api/models/me/folder/tree/{COMMIT}?recursive=true");
        let file = |path: &str| json!({"type": "file", "path": path, "size": path.len()});
        let path = request.path.as_str();
        let resolve = format!("/me/folder/resolve/{COMMIT}/");
        match path.strip_prefix(&resolve) {
            Some("model.safetensors") => return Reply::file(request, &weights),
            // Each small file says its own name.
            Some(name) => return Reply::new(200, name.to_owned()),
            None => {}
        }
        match path {
            "/api/models/me/folder/revision/main" => {
                Reply::new(200, json!({"sha": COMMIT}).to_string())
            }
            path if path == tree => {
                let large =
                    json!({"type": "file", "path": "model.safetensors", "size": 135, "lfs": oid});
                let files =
                    ["config.json", "tokenizer.json", "README.md", "onnx/config.json"].map(file);
                Reply::new(200, json!([large, files[0], files[1], files[2], files[3]]).to_string())
            }
            _ => Reply::new(404, ""),
        }
    });
    let world = world(&server, None);
    for name in ["hf.co/me/folder", "hf.co/me/folder:safetensors"] {
        world.pull_well(name).await;
    }
    let record = world.store.find(&name("hf.co/me/folder")).unwrap().unwrap();
    let (digests, names) = record.manifest.weights();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    let small = world.store.read_blob(&digests[0], 100).unwrap();
    assert_eq!(small, b"config.json");
    assert_eq!(record.manifest.role(v4_store::Role::Config).count(), 2);
    assert!(world.store.inspection(&record.manifest.inspection_key().unwrap()).is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_or_not_open_is_said() {
    let server = hub([bytes(10), bytes(20)], bytes(30));
    let open = world(&server, Some("secret"));
    open.pull_badly("hf.co/me/x-GGUF:Q2_K", Code::Upstream, &["no file for \"Q2_K\""]).await;
    open.pull_badly("hf.co/me/other", Code::NotFound, &["not found on 127.0.0.1"]).await;
    let closed = world(&server, None);
    closed.pull_badly("hf.co/me/x-GGUF", Code::Upstream, &["HF_TOKEN"]).await;
}
