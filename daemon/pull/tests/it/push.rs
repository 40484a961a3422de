//! Pushes: to a registry of our own that breaks off, and to a real one where it is installed.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use v4_proto::Code;
use v4_pull::{Progress, PullConfig, Stage};
use v4_store::{Layer, Manifest, Role, Store, fs::RealFs, manifest::CONFIG_TYPE, sha256};

use crate::{
    server::{Reply, Server},
    world::{World, bytes, config, name},
};

/// Where Debian's package `docker-registry` puts it, and where `.ci/run` unpacks that.
const REGISTRIES: [&str; 2] = [
    "/usr/bin/docker-registry",
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/registry/usr/bin/docker-registry"),
];

/// A real registry on a free port.
struct Registry {
    child: Child,
    host: String,
}

impl Registry {
    /// Starts one; `None` where none is installed.
    fn start(folder: &Path) -> Option<Self> {
        use std::io::Write as _;
        use v4_store::fs::Fs as _;
        let program = REGISTRIES.iter().find(|path| Path::new(path).exists())?;
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = folder.join("registry.yml");
        let root = folder.join("registry");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: '{}'}}}}\n\
             http: {{addr: '127.0.0.1:{port}'}}\n",
            root.display()
        );
        RealFs.open(&config).unwrap().write_all(text.as_bytes()).unwrap();
        let child = Command::new(program)
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let host = format!("127.0.0.1:{port}");
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(&host).is_err() {
            assert!(Instant::now() < deadline, "the registry does not come up");
            std::thread::yield_now();
        }
        Some(Self { child, host })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Stores a model of these weights.
fn stock(store: &Store, model: &str, weights: &[u8]) {
    let size = weights.len() as u64;
    let mut partial = store.partial("stock", Some(size)).unwrap();
    partial.write(weights).unwrap();
    partial.commit(&sha256(weights), size).unwrap();
    let layer = Layer::new(Role::Model.media_type(), sha256(weights), size);
    let config = Layer::new(CONFIG_TYPE, store.put_blob(b"{}").unwrap(), 2);
    store.put_manifest(&name(model), &Manifest::new(config, vec![layer]).encode()).unwrap();
}

async fn push(world: &World, model: &str) -> Progress {
    let push = world.jobs.push(&name(model), false).last();
    tokio::time::timeout(Duration::from_secs(30), push).await.expect("too long")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_registry_takes_a_model_and_gives_it_back() {
    // On a busy machine a real one may take a while to hash.
    let patient =
        PullConfig { stall_timeout: Duration::from_secs(20), ..config("http://127.0.0.1:1") };
    let world = World::of(patient, Arc::new(RealFs));
    let Some(registry) = Registry::start(world.folder.path()) else {
        println!(
            "skipped: Debian's package docker-registry is neither installed nor in target/registry"
        );
        return;
    };
    let weights = bytes(20 << 20);
    let model = format!("{}/me/tiny:v1", registry.host);
    stock(&world.store, &model, &weights);
    let record = world.store.find(&name(&model)).unwrap().unwrap();
    let progress = push(&world, &model).await;
    let Stage::Done { digest, .. } = progress.stage else { panic!("{progress:?}") };
    assert_eq!(digest, record.digest);
    assert!(progress.files.iter().all(|file| file.is_done), "{progress:?}");
    // Once more: nothing is sent that is there.
    assert!(matches!(push(&world, &model).await.stage, Stage::Done { .. }));
    let other = World::new();
    other.pull_well(&model).await;
    let pulled = other.store.find(&name(&model)).unwrap().unwrap();
    assert_eq!(pulled.digest, record.digest, "the manifest is the same byte for byte");
    other
        .pull_badly(&format!("{}/me/nothing", registry.host), Code::NotFound, &["not found"])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_of_a_push_says_what_to_do() {
    let world = World::new();
    let server = Server::start(|_| Reply::new(401, "").header("WWW-Authenticate", "Basic realm=x"));
    let model = format!("{}/me/tiny", server.url().strip_prefix("http://").unwrap());
    stock(&world.store, &model, &bytes(1000));
    let Stage::Failed(fault) = push(&world, &model).await.stage else { panic!("it was taken") };
    assert!(fault.message.contains("docker login"), "{fault}");
    let Stage::Failed(fault) = push(&world, "nothing").await.stage else { panic!("it was sent") };
    assert_eq!(fault.code, Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_breaks_off_is_sent_again_from_where_the_registry_is() {
    let world = World::new();
    let taken = Arc::new(std::sync::Mutex::new(Vec::new()));
    let noted = Arc::clone(&taken);
    let server = Server::start(move |request| {
        let place = "/v2/me/tiny/blobs/uploads/1";
        match (request.method.as_str(), request.path.as_str()) {
            ("HEAD", path) if !path.ends_with(&sha256(b"{}").to_string()) => Reply::new(404, ""),
            ("POST", _) => Reply::new(202, "").header("Location", place),
            ("PATCH", _) if request.n == 1 => {
                // It has the first half of the second chunk, and the connection breaks.
                Reply::new(202, "").end(crate::server::End::Gone)
            }
            ("PATCH", _) => {
                noted.lock().unwrap().push(request.headers["content-range"].clone());
                Reply::new(202, "").header("Location", place)
            }
            ("GET", _) => {
                let last = (12 << 20) - 1;
                Reply::new(204, "").header("Location", place).header("Range", format!("0-{last}"))
            }
            _ => Reply::new(201, ""),
        }
    });
    let model = format!("{}/me/tiny", server.url().strip_prefix("http://").unwrap());
    stock(&world.store, &model, &bytes(20 << 20));
    let progress = push(&world, &model).await;
    assert!(matches!(progress.stage, Stage::Done { .. }), "{progress:?}");
    let mib = |from: u64, to: u64| format!("{}-{}", from << 20, (to << 20) - 1);
    assert_eq!(*taken.lock().unwrap(), [mib(0, 8), mib(12, 20)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_that_another_repository_has_is_mounted_and_else_sent() {
    let weights = bytes(1000);
    let mount = format!("/v2/me/tiny/blobs/uploads/?mount={}&from=library/base", sha256(&weights));
    for knows_it in [true, false] {
        let world = World::new();
        let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
        let (noted, wanted) = (Arc::clone(&seen), mount.clone());
        let server = Server::start(move |request| {
            noted.lock().unwrap().push(format!("{} {}", request.method, request.path));
            match (request.method.as_str(), request.path.as_str()) {
                ("HEAD", _) => Reply::new(404, ""),
                ("POST", path) if knows_it && path == wanted => Reply::new(201, ""),
                ("POST" | "PATCH", _) => {
                    Reply::new(202, "").header("Location", "/v2/me/tiny/blobs/uploads/1")
                }
                _ => Reply::new(201, ""),
            }
        });
        let model = format!("{}/me/tiny", server.url().strip_prefix("http://").unwrap());
        stock(&world.store, &model, &weights);
        let mut layer = Layer::new(Role::Model.media_type(), sha256(&weights), 1000);
        layer.extra.insert("from".to_owned(), "library/base".into());
        let config = Layer::new(CONFIG_TYPE, sha256(b"{}"), 2);
        let manifest = Manifest::new(config, vec![layer]).encode();
        world.store.put_manifest(&name(&model), &manifest).unwrap();
        let progress = push(&world, &model).await;
        assert!(matches!(progress.stage, Stage::Done { .. }), "{progress:?}");
        let seen = seen.lock().unwrap();
        assert!(seen.contains(&format!("POST {mount}")), "{seen:?}");
        // The config has no such place, so it is sent in any case.
        let n_sent = seen.iter().filter(|line| line.starts_with("PATCH ")).count();
        assert_eq!(n_sent, if knows_it { 1 } else { 2 }, "{seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_to_ollamas_registry_is_opened_by_its_users_key() {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    use ring::signature::{ED25519, UnparsedPublicKey};

    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("id_ed25519");
    let mut tool = Command::new("ssh-keygen");
    let made = tool.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&file).status();
    if !made.is_ok_and(|status| status.success()) {
        println!("skipped: ssh-keygen is not installed");
        return;
    }
    let server = Server::start(move |request| {
        let base = format!("http://{}", request.headers["host"]);
        let given = request.headers.get("authorization").cloned().unwrap_or_default();
        if request.path.starts_with("/token?") {
            // As Ollama's server checks it: the text that was signed is made of the URL.
            let Some((public, signature)) = given.split_once(':') else {
                return Reply::new(401, "");
            };
            let decode = |text: &str| BASE64_STANDARD.decode(text).unwrap();
            let nothing = BASE64_STANDARD.encode(sha256(b"").hex());
            let text = format!("GET,{base}{},{nothing}", request.path);
            let public = decode(public);
            let key = UnparsedPublicKey::new(&ED25519, &public[public.len() - 32..]);
            let is_right = key.verify(text.as_bytes(), &decode(signature)).is_ok();
            return if is_right {
                Reply::new(200, "{\"token\":\"open\"}")
            } else {
                Reply::new(401, "")
            };
        }
        if given != "Bearer open" {
            let challenge = format!("Bearer realm=\"{base}/token\",service=\"it\"");
            return Reply::new(401, "").header("WWW-Authenticate", challenge);
        }
        match request.method.as_str() {
            "HEAD" => Reply::new(404, ""),
            "POST" | "PATCH" => Reply::new(202, "").header("Location", "/v2/me/tiny/upload"),
            _ => Reply::new(201, ""),
        }
    });
    let registries = vec![server.url().to_owned()];
    let with_key = |ollama_key| {
        let registries = registries.clone();
        let config = PullConfig { registries, ollama_key, ..config("http://127.0.0.1:1") };
        World::of(config, Arc::new(RealFs))
    };
    let world = with_key(Some(file));
    stock(&world.store, "me/tiny", &bytes(1000));
    let progress = push(&world, "me/tiny").await;
    assert!(matches!(progress.stage, Stage::Done { .. }), "{progress:?}");
    let world = with_key(None);
    stock(&world.store, "me/tiny", &bytes(1000));
    let Stage::Failed(fault) = push(&world, "me/tiny").await.stage else { panic!("it was taken") };
    assert!(fault.message.contains("id_ed25519"), "{fault}");
}
