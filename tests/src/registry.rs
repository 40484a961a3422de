//! A loopback registry that serves manifests and blobs in ranges, and counts what it sends.

use std::collections::HashMap;
use std::io::{BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use serde_json::{Value, json};
use v4_proto::Digest;

use crate::DEADLINE;
use crate::home::digest;
use crate::index::{Asked, asked, bounds};

#[derive(Default)]
struct State {
    /// Bodies by path, with their media types.
    bodies: HashMap<String, (String, Arc<Vec<u8>>)>,
    /// Bytes of blobs that were sent.
    sent: u64,
    /// What was asked for: method, path and range.
    asked: Vec<String>,
}

/// The registry. It serves until the test's process ends.
pub struct Registry {
    host: String,
    state: Arc<Mutex<State>>,
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// An empty registry on a free port.
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let host = listener.local_addr().expect("bound").to_string();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for wire in listener.incoming().map_while(Result::ok) {
                let shared = Arc::clone(&shared);
                // A client that goes away in the middle has what it wanted.
                thread::spawn(move || serve(wire, &shared).ok());
            }
        });
        Self { host, state }
    }

    /// Its host and port, to stand in front of a repository.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Offers a model `repository:latest` of layers: media type, what the file is called, bytes.
    /// Gives the digests of the layers.
    pub fn offer(&self, repository: &str, layers: &[(&str, Option<&str>, &[u8])]) -> Vec<Digest> {
        let config = b"{}";
        let mut blobs = vec![config.as_slice()];
        blobs.extend(layers.iter().map(|(_, _, bytes)| *bytes));
        let layer = |(media_type, name, bytes): &(&str, Option<&str>, &[u8])| {
            let mut layer = described(media_type, bytes);
            if let Some(name) = name {
                layer["annotations"] = json!({"org.cncf.model.filepath": name});
            }
            layer
        };
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": described("application/vnd.cncf.model.config.v1+json", config),
            "layers": layers.iter().map(layer).collect::<Vec<_>>(),
        });
        let mut state = lock(&self.state);
        for bytes in blobs {
            let path = format!("/v2/{repository}/blobs/{}", digest(bytes));
            let body = ("application/octet-stream".to_owned(), Arc::new(bytes.to_vec()));
            state.bodies.insert(path, body);
        }
        let media_type = manifest["mediaType"].as_str().expect("a text").to_owned();
        let body = (media_type, Arc::new(manifest.to_string().into_bytes()));
        state.bodies.insert(format!("/v2/{repository}/manifests/latest"), body);
        layers.iter().map(|(_, _, bytes)| digest(bytes)).collect()
    }

    /// Bytes of blobs that were sent since the last call.
    pub fn take_sent(&self) -> u64 {
        std::mem::take(&mut lock(&self.state).sent)
    }

    /// What was asked for since the last call.
    pub fn take_asked(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.state).asked)
    }
}

/// The repository of [`OneModel`].
const REPOSITORY: &str = "me/noise";

/// A registry of one model.
pub struct OneModel {
    registry: Registry,
    weights: Digest,
    size: usize,
}

impl OneModel {
    /// Serves a model of these weights on a free port.
    pub fn new(weights: &[u8]) -> Self {
        let registry = Registry::new();
        let layer = ("application/vnd.ollama.image.model", None, weights);
        let digests = registry.offer(REPOSITORY, &[layer]);
        Self { registry, weights: digests[0], size: weights.len() }
    }

    /// The model's name.
    pub fn name(&self) -> String {
        format!("{}/{REPOSITORY}", self.registry.host())
    }

    /// The digest of the weights.
    pub fn weights(&self) -> Digest {
        self.weights
    }

    /// Bytes of the weights that were asked for since the last call, those asked for twice once.
    pub fn take_asked(&self) -> usize {
        let blob = format!("GET /v2/{REPOSITORY}/blobs/{} ", self.weights);
        let asked = self.registry.take_asked();
        let ranges = asked.iter().filter_map(|line| line.strip_prefix(&blob));
        let whole = (0, self.size);
        let mut parts: Vec<(usize, usize)> =
            ranges.map(|range| bounds(range, self.size).unwrap_or(whole)).collect();
        parts.sort_unstable();
        let mut reach = 0;
        parts.iter().fold(0, |sum, &(start, end)| {
            let new = end.saturating_sub(start.max(reach));
            reach = reach.max(end);
            sum + new
        })
    }
}

fn described(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()})
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("no thread of the registry panics")
}

fn serve(mut wire: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    wire.set_read_timeout(Some(DEADLINE))?;
    let mut reader = BufReader::new(wire.try_clone()?);
    loop {
        let Some(Asked { method, path, range }) = asked(&mut reader)? else { return Ok(()) };
        let body = {
            let mut state = lock(state);
            state.asked.push(format!("{method} {path} {}", range.as_deref().unwrap_or("-")));
            state.bodies.get(&path).cloned()
        };
        let Some((media_type, bytes)) = body else {
            wire.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        };
        let (head, part) = match range.and_then(|range| bounds(&range, bytes.len())) {
            None => ("200 OK".to_owned(), &bytes[..]),
            Some((start, end)) => (
                format!(
                    "206 Partial Content\r\nContent-Range: bytes {start}-{}/{}",
                    end - 1,
                    bytes.len()
                ),
                &bytes[start..end],
            ),
        };
        let head = format!(
            "HTTP/1.1 {head}\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\n\r\n",
            part.len()
        );
        wire.write_all(head.as_bytes())?;
        if method == "HEAD" {
            continue;
        }
        // In pieces, so that what a client leaves is not counted as sent.
        for piece in part.chunks(64 << 10) {
            wire.write_all(piece)?;
            if path.contains("/blobs/") {
                lock(state).sent += piece.len() as u64;
            }
        }
    }
}
