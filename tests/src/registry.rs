//! A loopback registry of one model, which counts the bytes that it is asked for.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use serde_json::json;
use v4_proto::Digest;

use crate::DEADLINE;
use crate::home::digest;

/// The repository that it has.
const REPOSITORY: &str = "me/noise";

/// The registry. It serves until the test's process ends.
pub struct Registry {
    host: String,
    weights: Digest,
    state: Arc<State>,
}

struct State {
    manifest: Vec<u8>,
    blobs: HashMap<String, Vec<u8>>,
    /// The parts of blobs that were asked for, by the blob's digest.
    asked: Mutex<Vec<(String, Range<usize>)>>,
}

impl State {
    fn asked(&self) -> MutexGuard<'_, Vec<(String, Range<usize>)>> {
        self.asked.lock().expect("no thread of the registry panics")
    }
}

impl Registry {
    /// Serves a model of these weights on a free port.
    pub fn new(weights: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let host = listener.local_addr().expect("bound").to_string();
        let config = b"{}".to_vec();
        let layer = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": digest(bytes), "size": bytes.len()});
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": layer("application/vnd.docker.container.image.v1+json", &config),
            "layers": [layer("application/vnd.ollama.image.model", &weights)],
        });
        let manifest = manifest.to_string().into_bytes();
        let (weights_digest, asked) = (digest(&weights), Mutex::default());
        let blobs = [weights, config].map(|bytes| (digest(&bytes).to_string(), bytes)).into();
        let state = Arc::new(State { manifest, blobs, asked });
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for wire in listener.incoming().map_while(Result::ok) {
                let shared = Arc::clone(&shared);
                // A client that goes away in the middle is what some tests are about.
                thread::spawn(move || serve(&wire, &shared).ok());
            }
        });
        Self { host, weights: weights_digest, state }
    }

    /// The model's name.
    pub fn name(&self) -> String {
        format!("{}/{REPOSITORY}", self.host)
    }

    /// The digest of the weights.
    pub fn weights(&self) -> Digest {
        self.weights
    }

    /// Bytes of the weights that were asked for since the last call, those asked for twice once.
    pub fn take_asked(&self) -> usize {
        let key = self.weights.to_string();
        let mut parts: Vec<Range<usize>> =
            self.state.asked().drain(..).filter(|part| part.0 == key).map(|part| part.1).collect();
        parts.sort_by_key(|part| part.start);
        let mut reach = 0;
        parts.iter().fold(0, |sum, part| {
            let new = part.end.saturating_sub(part.start.max(reach));
            reach = reach.max(part.end);
            sum + new
        })
    }
}

fn serve(mut wire: &TcpStream, state: &State) -> std::io::Result<()> {
    wire.set_read_timeout(Some(DEADLINE))?;
    wire.set_write_timeout(Some(DEADLINE))?;
    let mut lines = BufReader::new(wire).lines();
    loop {
        let Some(request) = lines.next().transpose()? else { return Ok(()) };
        let mut range = None;
        for line in lines.by_ref() {
            let line = line?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(text) = line.strip_prefix("range: bytes=") {
                let (start, last) = text.split_once('-').unwrap_or((text, ""));
                range = start.parse::<usize>().ok().map(|start| (start, last.parse().ok()));
            }
        }
        let path = request.split(' ').nth(1).unwrap_or_default();
        let key = path.rsplit('/').next().unwrap_or_default();
        let body = match state.blobs.get(key) {
            Some(blob) => blob,
            None if path == format!("/v2/{REPOSITORY}/manifests/latest") => &state.manifest,
            None => {
                write!(wire, "HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n")?;
                continue;
            }
        };
        let all = 0..body.len();
        let part = range.map_or(all, |(start, last): (usize, Option<usize>)| {
            start..last.map_or(body.len(), |last| body.len().min(last + 1))
        });
        state.asked().push((key.to_owned(), part.clone()));
        let (start, last, size) = (part.start, part.end.saturating_sub(1), body.len());
        let head = match range {
            None => "200 OK".to_owned(),
            Some(_) => format!("206 Partial\r\nContent-Range: bytes {start}-{last}/{size}"),
        };
        write!(wire, "HTTP/1.1 {head}\r\nContent-Length: {}\r\n\r\n", part.len())?;
        wire.write_all(&body[part])?;
    }
}
