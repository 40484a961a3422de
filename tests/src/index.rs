//! A loopback package index that speaks the JSON API and ranges, and can misbehave.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use serde_json::json;

use crate::DEADLINE;
use crate::home::digest;

/// How the index misbehaves when it sends a wheel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// It does not.
    #[default]
    None,
    /// Hangs up after this many bytes of each answer.
    CutAfter(usize),
    /// Answers 503.
    Unavailable,
    /// Sends the whole file whatever range is asked for.
    NoRanges,
    /// Sends this many bytes, then nothing more, and keeps the connection.
    StallAfter(usize),
}

#[derive(Default)]
struct State {
    /// Packages by `name/version`: the wheel.
    packages: HashMap<String, Arc<Vec<u8>>>,
    fault: Fault,
    /// What was asked for, in order: method, path and range.
    asked: Vec<String>,
    /// Connections that are kept open and silent.
    stalled: Vec<TcpStream>,
}

/// The index. It serves until the test's process ends.
pub struct Index {
    url: String,
    state: Arc<Mutex<State>>,
}

impl Default for Index {
    fn default() -> Self {
        Self::new()
    }
}

impl Index {
    /// An empty index on a free port.
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let base = url.clone();
        thread::spawn(move || {
            for wire in listener.incoming().map_while(Result::ok) {
                let (shared, base) = (Arc::clone(&shared), base.clone());
                // A client that goes away in the middle is what some tests are about.
                thread::spawn(move || serve(wire, &base, &shared).ok());
            }
        });
        Self { url, state }
    }

    /// Its address, for `V4_INDEX_URL`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Offers a wheel.
    pub fn offer(&self, package: &str, version: &str, wheel: Vec<u8>) {
        lock(&self.state).packages.insert(format!("{package}/{version}"), Arc::new(wheel));
    }

    /// Misbehaves like this from now on. Connections kept silent are closed.
    pub fn misbehave(&self, fault: Fault) {
        let mut state = lock(&self.state);
        state.fault = fault;
        state.stalled.clear();
    }

    /// What was asked for so far.
    pub fn asked(&self) -> Vec<String> {
        lock(&self.state).asked.clone()
    }
}

/// What a client asks for.
pub(crate) struct Asked {
    pub method: String,
    pub path: String,
    /// Behind `bytes=`.
    pub range: Option<String>,
}

/// The next request of a connection; `None` at its end.
pub(crate) fn asked(reader: &mut impl BufRead) -> std::io::Result<Option<Asked>> {
    let mut request = String::new();
    if reader.read_line(&mut request)? == 0 {
        return Ok(None);
    }
    let mut range = None;
    loop {
        let mut field = String::new();
        reader.read_line(&mut field)?;
        let field = field.trim().to_lowercase();
        if field.is_empty() {
            break;
        }
        if let Some(bytes) = field.strip_prefix("range: bytes=") {
            range = Some(bytes.to_owned());
        }
    }
    let mut words = request.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    Ok(Some(Asked { method, path, range }))
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("no thread of the index panics")
}

fn serve(mut wire: TcpStream, base: &str, state: &Mutex<State>) -> std::io::Result<()> {
    wire.set_read_timeout(Some(DEADLINE))?;
    let mut reader = BufReader::new(wire.try_clone()?);
    loop {
        let Some(Asked { method, path, range }) = asked(&mut reader)? else { return Ok(()) };
        let asked = format!("{method} {path} {}", range.as_deref().unwrap_or("-"));
        lock(state).asked.push(asked);
        if !answer(&mut wire, base, state, &path, range.as_deref())? {
            return Ok(());
        }
    }
}

/// Answers one request. `false` when the connection ends with it.
fn answer(
    wire: &mut TcpStream,
    base: &str,
    state: &Mutex<State>,
    path: &str,
    range: Option<&str>,
) -> std::io::Result<bool> {
    let find = |key: &str| lock(state).packages.get(key).cloned();
    let json_of = path.strip_prefix("/pypi/").and_then(|rest| rest.strip_suffix("/json"));
    if let Some((key, wheel)) = json_of.and_then(|key| Some((key, find(key)?))) {
        let name = key.replace('/', "-").replacen('-', "_", key.matches('-').count());
        let release = json!({"urls": [{
            "packagetype": "bdist_wheel",
            "filename": format!("{name}-py3-none-any.whl"),
            "url": format!("{base}/files/{key}"),
            "size": wheel.len(),
            "digests": {"sha256": digest(&wheel).hex()},
        }]});
        return send(wire, "200 OK", release.to_string().as_bytes(), Fault::None, state);
    }
    let Some(wheel) = path.strip_prefix("/files/").and_then(find) else {
        return send(wire, "404 Not Found", b"no such package", Fault::None, state);
    };
    let fault = lock(state).fault;
    if fault == Fault::Unavailable {
        return send(wire, "503 Service Unavailable", b"later", Fault::None, state);
    }
    match range.filter(|_| fault != Fault::NoRanges).and_then(|range| bounds(range, wheel.len())) {
        None => send(wire, "200 OK\r\nAccept-Ranges: bytes", &wheel, fault, state),
        Some((start, end)) => {
            let range = format!("bytes {start}-{}/{}", end - 1, wheel.len());
            let head = format!(
                "206 Partial Content
Content-Range: {range}"
            );
            send(wire, &head, &wheel[start..end], fault, state)
        }
    }
}

/// The bytes `start..end` of `start-` or `start-last`, as far as there are any.
pub(crate) fn bounds(range: &str, len: usize) -> Option<(usize, usize)> {
    let (start, last) = range.split_once('-')?;
    let start = start.parse().ok().filter(|start| *start < len)?;
    let end = if last.is_empty() { len } else { last.parse::<usize>().ok()? + 1 };
    Some((start, end.min(len)))
}

fn send(
    wire: &mut TcpStream,
    head: &str,
    body: &[u8],
    fault: Fault,
    state: &Mutex<State>,
) -> std::io::Result<bool> {
    let head = format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\n\r\n", body.len());
    wire.write_all(head.as_bytes())?;
    match fault {
        Fault::CutAfter(n) if n < body.len() => {
            wire.write_all(&body[..n])?;
            return Ok(false);
        }
        Fault::StallAfter(n) if n < body.len() => {
            wire.write_all(&body[..n])?;
            lock(state).stalled.push(wire.try_clone()?);
            return Ok(false);
        }
        _ => wire.write_all(body)?,
    }
    Ok(true)
}
