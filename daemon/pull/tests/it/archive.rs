//! Weights inside archives: layers of OCI ModelPack, and packages of npm.

use std::{io::Write as _, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use flate2::{Compression, write::GzEncoder};
use ring::digest::{SHA512, digest};
use serde_json::{Value, json};
use v4_proto::{Code, Digest};
use v4_pull::Stage;
use v4_store::{fs::RealFs, sha256};

use crate::{
    server::{Reply, Server},
    world::{World, bytes, config, name},
};

const SIZE: usize = 3 << 20;

/// A tar file of these members; `size` is what the header says.
fn tar_of(members: &[(&str, &[u8], u64)]) -> Vec<u8> {
    let mut tar = Vec::new();
    for (name, data, size) in members {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..108].copy_from_slice(b"0000644\0");
        if *size < 1 << 33 {
            block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        } else {
            block[124] = 0x80;
            block[128..136].copy_from_slice(&size.to_be_bytes());
        }
        block[148..156].copy_from_slice(b"        ");
        block[156] = b'0';
        block[257..263].copy_from_slice(b"ustar\0");
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.extend(block);
        tar.extend(*data);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let members: Vec<_> = members.iter().map(|(n, data)| (*n, *data, data.len() as u64)).collect();
    tar_of(&members)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

/// A registry with a model of ModelPack whose weights are this layer.
fn modelpack(layer: Vec<u8>, form: &str) -> (Server, String) {
    let describe = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": sha256(bytes), "size": bytes.len()});
    let (config, code) = (b"{\"descriptor\":{}}".to_vec(), b"print()".to_vec());
    let weights = format!("application/vnd.cncf.model.weight.v1.{form}");
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": describe("application/vnd.cncf.model.config.v1+json", &config),
        "layers": [
            describe(&weights, &layer),
            describe("application/vnd.cncf.model.code.v1.raw", &code),
        ],
    });
    let manifest = manifest.to_string().into_bytes();
    let blobs = [layer, config, code];
    let server = Server::start(move |request| {
        if request.path.ends_with("/manifests/latest") {
            return Reply::new(200, manifest.clone());
        }
        let wanted = request.path.rsplit('/').next().unwrap().parse::<Digest>().ok();
        let blob = blobs.iter().find(|blob| Some(sha256(blob)) == wanted);
        blob.map_or_else(|| Reply::new(404, ""), |blob| Reply::file(request, blob))
    });
    let model = format!("{}/me/tiny", server.url().strip_prefix("http://").unwrap());
    (server, model)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_in_a_layer_that_is_an_archive_become_a_blob_of_their_own() {
    let data = bytes(SIZE);
    let plain = tar(&[("README.md", b"hello"), ("../../weights/Tiny.GGUF", &data)]);
    for (layer, form) in [(plain.clone(), "tar"), (gzip(&plain), "tar+gzip")] {
        let world = World::new();
        let (server, model) = modelpack(layer, form);
        world.pull_well(&model).await;
        let record = world.store.find(&name(&model)).unwrap().unwrap();
        let digests: Vec<_> = record.manifest.layers.iter().map(|layer| layer.digest).collect();
        assert_eq!(digests, [sha256(&data)], "the weights alone, by their own digest");
        assert!(!world.folder.path().join("weights").exists());
        // Again: what came out of this very manifest is known.
        let before = server.requests().len();
        world.pull_well(&model).await;
        assert_eq!(server.requests().len(), before + 1);
        assert_eq!(world.store.find(&name(&model)).unwrap().unwrap().digest, record.digest);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn archives_that_are_broken_or_swell_end_in_an_error() {
    let data = bytes(1000);
    let bomb = tar_of(&[("x.gguf", &data, 1 << 60)]);
    // Some KB of these unpack to 64 MB, of which nothing is wanted.
    let zeros = tar(&[("zeros", &vec![0; 64 << 20])]);
    let cases: [(Vec<u8>, Code, &str); 6] = [
        (tar(&[("x.bin", &data)]), Code::Upstream, "without the file that is wanted"),
        (gzip(&zeros), Code::Upstream, "without the file that is wanted"),
        (bomb, Code::Disk, "more are needed"),
        (tar(&[("x.gguf", &data)])[..900].to_vec(), Code::Upstream, "ends early"),
        (vec![0x28, 0xb5, 0x2f, 0xfd, 0], Code::Upstream, "zstd"),
        (data.clone(), Code::Upstream, "no tar file"),
    ];
    for (layer, code, words) in cases {
        let world = World::new();
        let (_server, model) = modelpack(layer, "tar");
        world.pull_badly(&model, code, &[words]).await;
    }
}

/// A registry of npm with one package.
fn npm(tarball: Vec<u8>, integrity: String) -> Server {
    Server::start(move |request| {
        let base = format!("http://{}", request.headers["host"]);
        let version = |path: &str| -> Value {
            json!({"name": "x", "dist": {"tarball": format!("{base}/files/x.tgz"),
                "integrity": integrity, "shasum": path.len().to_string()}})
        };
        match request.path.as_str() {
            path @ ("/@me%2ftiny/1.0.0" | "/tiny/latest") => {
                Reply::new(200, version(path).to_string())
            }
            "/files/x.tgz" => Reply::file(request, &tarball),
            _ => Reply::new(404, ""),
        }
    })
}

fn sha512(bytes: &[u8]) -> String {
    format!("sha1-x sha512-{}", BASE64_STANDARD.encode(digest(&SHA512, bytes)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_a_package_of_npm_is_read() {
    let data = bytes(SIZE);
    let tarball = gzip(&tar(&[("package/package.json", b"{}"), ("package/m/x.gguf", &data)]));
    let server = npm(tarball.clone(), sha512(&tarball));
    for source in ["npm:@me/tiny@1.0.0:m/x.gguf", "npm:tiny:m/x.gguf"] {
        let world = World::with(server.url(), Arc::new(RealFs));
        world.recipe("m", &data, &[source.to_owned()]);
        world.pull_well("m").await;
    }
    let world = World::with(server.url(), Arc::new(RealFs));
    world.recipe("m", &data, &["npm:tiny:m/other".to_owned()]);
    world.pull_badly("m", Code::Upstream, &["tiny latest", "without the file"]).await;
    world.recipe("m", &data, &["npm:other@1:m/x.gguf".to_owned()]);
    world.pull_badly("m", Code::Upstream, &["no place on the registry"]).await;
    assert_eq!(world.partials(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tarball_that_is_not_what_the_registry_says_is_refused() {
    let data = bytes(SIZE);
    let tarball = gzip(&tar(&[("package/x.gguf", &data)]));
    for (integrity, words) in
        [(sha512(b"another"), "another sha512"), ("sha1-x".to_owned(), "without a sha512")]
    {
        let server = npm(tarball.clone(), integrity);
        let world = World::of(
            v4_pull::PullConfig { npm_url: server.url().to_owned(), ..config("http://x") },
            Arc::new(RealFs),
        );
        world.recipe("m", &data, &["npm:tiny:x.gguf".to_owned()]);
        world.pull_badly("m", Code::Upstream, &[words]).await;
        assert_eq!(world.partials(), 0, "it would be in the way");
    }
    // Another content than the recipe's, in a right tarball.
    let server = npm(tarball.clone(), sha512(&tarball));
    let world = World::with(server.url(), Arc::new(RealFs));
    world.recipe("m", &bytes(SIZE + 1)[1..], &["npm:tiny:x.gguf".to_owned()]);
    let Stage::Failed(fault) = world.pull("m").await.stage else { panic!("it was taken") };
    assert_eq!(fault.code, Code::Corrupt);
}
