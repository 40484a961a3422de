//! Signatures of models in a registry, under a policy.

use std::{io::Write as _, path::Path, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use serde_json::json;
use tempfile::TempDir;
use v4_proto::{Code, Digest};
use v4_pull::{PullConfig, Stage};
use v4_store::{
    fs::{Fs as _, RealFs},
    sha256,
};

use crate::{
    server::{Reply, Server},
    world::{World, bytes, config, name},
};

/// A pair of keys, made on the spot.
struct Keys(EcdsaKeyPair);

impl Keys {
    fn new() -> Self {
        let (algorithm, random) = (&ECDSA_P256_SHA256_ASN1_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        Self(EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap())
    }

    /// The public half as `openssl` and `cosign` write it.
    fn pem(&self) -> String {
        let head = "3059301306072a8648ce3d020106082a8648ce3d030107034200";
        let byte = |i: usize| u8::from_str_radix(&head[i..i + 2], 16).unwrap();
        let mut der: Vec<u8> = (0..head.len()).step_by(2).map(byte).collect();
        der.extend(self.0.public_key().as_ref());
        let body = BASE64_STANDARD.encode(der);
        let (first, second) = body.split_at(64);
        format!("-----BEGIN PUBLIC KEY-----\n{first}\n{second}\n-----END PUBLIC KEY-----\n")
    }

    fn sign(&self, bytes: &[u8]) -> String {
        let signature = self.0.sign(&SystemRandom::new(), bytes).unwrap();
        BASE64_STANDARD.encode(signature.as_ref())
    }
}

/// What a signature says, in the words of cosign.
fn payload(manifest: &Digest) -> Vec<u8> {
    let critical = json!({
        "identity": {"docker-reference": "me/tiny"},
        "image": {"docker-manifest-digest": manifest},
        "type": "cosign container image signature",
    });
    json!({"critical": critical, "optional": null}).to_string().into_bytes()
}

/// The signature manifest of some payloads, each with its signature.
fn signatures(signed: &[(Vec<u8>, String)]) -> Vec<u8> {
    let layer = |(payload, signature): &(Vec<u8>, String)| {
        json!({
            "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
            "digest": sha256(payload), "size": payload.len(),
            "annotations": {"dev.cosignproject.cosign/signature": signature},
        })
    };
    let layers: Vec<_> = signed.iter().map(layer).collect();
    let config = json!({"mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": sha256(b"{}"), "size": 2});
    json!({"schemaVersion": 2, "config": config, "layers": layers}).to_string().into_bytes()
}

/// A registry with a model, and whatever it has as signatures of it.
fn registry(make: impl Fn(&Digest) -> Vec<(Vec<u8>, String)>) -> Server {
    let weights = bytes(1000);
    let layer = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": sha256(bytes), "size": bytes.len()});
    let manifest = json!({
        "schemaVersion": 2,
        "config": layer("application/vnd.docker.container.image.v1+json", b"{}"),
        "layers": [layer("application/vnd.ollama.image.model", &weights)],
    });
    let manifest = manifest.to_string().into_bytes();
    let digest = sha256(&manifest);
    let signed = make(&digest);
    let tag = format!("/v2/me/tiny/manifests/sha256-{}.sig", digest.hex());
    let index = signatures(&signed);
    let mut blobs: Vec<Vec<u8>> = signed.into_iter().map(|(payload, _)| payload).collect();
    let is_signed = !blobs.is_empty();
    blobs.extend([weights, b"{}".to_vec()]);
    Server::start(move |request| {
        if request.path == "/v2/me/tiny/manifests/latest" {
            return Reply::new(200, manifest.clone());
        }
        if request.path == tag && is_signed {
            return Reply::new(200, index.clone());
        }
        let blob = blobs.iter().find(|blob| request.path.ends_with(&sha256(blob).to_string()));
        blob.map_or_else(|| Reply::new(404, ""), |blob| Reply::file(request, blob))
    })
}

fn write(path: &Path, text: &str) {
    let mut file = RealFs.open(path).unwrap();
    file.set_len(0).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// A world with a policy for the names of a server.
fn world(folder: &TempDir, server: &Server, mode: &str, keys: &Keys) -> (World, String) {
    let host = server.url().strip_prefix("http://").unwrap();
    write(&folder.path().join("me.pem"), &keys.pem());
    let policy = folder.path().join("policy");
    let rules = format!("# who signs what\n\n{host}/me/* {mode} me.pem # mine\n* require me.pem\n");
    write(&policy, &rules);
    let config = PullConfig { policy: Some(policy), ..config("http://127.0.0.1:1") };
    (World::of(config, Arc::new(RealFs)), format!("{host}/me/tiny"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_right_signature_is_found_among_others_and_noted() {
    let (folder, keys, stranger) = (TempDir::new().unwrap(), Keys::new(), Keys::new());
    let server = registry(|manifest| {
        let payload = payload(manifest);
        let by_stranger = [&payload[..], b" "].concat();
        let signed = stranger.sign(&by_stranger);
        vec![(by_stranger, signed), (payload.clone(), keys.sign(&payload))]
    });
    let (world, model) = world(&folder, &server, "require", &keys);
    world.pull_well(&model).await;
    let record = world.store.find(&name(&model)).unwrap().unwrap();
    let origin = world.store.origin(&record.digest).unwrap();
    assert!(String::from_utf8(origin).unwrap().contains("me.pem"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_right_signature_the_mode_decides() {
    type Make = fn(&Digest, &Keys) -> Vec<(Vec<u8>, String)>;
    let cases: [(&str, Make); 5] = [
        ("no signature", |_, _| Vec::new()),
        ("that none of the keys made", |manifest, _| {
            let payload = payload(manifest);
            let signature = Keys::new().sign(&payload);
            vec![(payload, signature)]
        }),
        ("of another manifest", |_, keys| {
            let payload = payload(&sha256(b"another"));
            let signature = keys.sign(&payload);
            vec![(payload, signature)]
        }),
        ("of something else", |manifest, keys| {
            let text = String::from_utf8(payload(manifest)).unwrap();
            let payload = text.replace("container image", "something").into_bytes();
            let signature = keys.sign(&payload);
            vec![(payload, signature)]
        }),
        ("that none of the keys made", |manifest, keys| {
            // Signed right, then changed.
            let text = payload(manifest);
            let signature = keys.sign(&text);
            vec![([&text[..], b"\n"].concat(), signature)]
        }),
    ];
    for (what, make) in cases {
        let (folder, keys) = (TempDir::new().unwrap(), Keys::new());
        let server = registry(|manifest| make(manifest, &keys));
        let (strict, model) = world(&folder, &server, "require", &keys);
        strict.pull_badly(&model, Code::Corrupt, &[what, "the policy"]).await;
        let (lax, model) = world(&folder, &server, "warn", &keys);
        lax.pull_well(&model).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_that_cannot_be_read_lets_nothing_through() {
    let (folder, keys) = (TempDir::new().unwrap(), Keys::new());
    let server = registry(|_| Vec::new());
    let (world, model) = world(&folder, &server, "require", &keys);
    write(&folder.path().join("me.pem"), "-----BEGIN PUBLIC KEY-----\n");
    world.pull_badly(&model, Code::Invalid, &["me.pem", "no public key"]).await;
    RealFs.remove_file(&folder.path().join("me.pem")).unwrap();
    world.pull_badly(&model, Code::Invalid, &["me.pem", "cannot be read"]).await;
    let policy = folder.path().join("policy");
    for (text, words) in [("* maybe me.pem", "line 1"), ("* off\n* require", "line 2")] {
        RealFs.remove_file(&policy).unwrap();
        write(&policy, text);
        world.pull_badly(&model, Code::Invalid, &[words]).await;
    }
    RealFs.remove_file(&policy).unwrap();
    world.pull_badly(&model, Code::Invalid, &["policy", "V4_POLICY"]).await;
    write(&policy, "* off\n");
    let progress = world.pull(&model).await;
    assert!(matches!(progress.stage, Stage::Done { .. }), "{progress:?}");
}
