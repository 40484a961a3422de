//! A loopback HTTP server whose answers a test makes, with the faults of bad networks.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    /// The method.
    pub method: String,
    /// The path.
    pub path: String,
    /// Headers by lower-case name.
    pub headers: BTreeMap<String, String>,
    /// How many requests of this method for this path came before.
    pub n: usize,
}

impl Request {
    /// Where the range begins that is asked for.
    pub fn start(&self) -> Option<usize> {
        self.range().map(|range| range.0)
    }

    /// The range that is asked for; its end is open where none is said.
    pub fn range(&self) -> Option<(usize, Option<usize>)> {
        let (start, last) = self.headers.get("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((start.parse().ok()?, last.parse().ok().map(|last: usize| last + 1)))
    }
}

/// What becomes of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It is sent whole.
    Whole,
    /// The connection closes after so many bytes.
    Cut(usize),
    /// Nothing comes after so many bytes, while the connection stays.
    Stall(usize),
    /// The connection closes without an answer.
    Gone,
    /// It comes whole, so many bytes each millisecond.
    Slow(usize),
    /// A byte comes now and then, so that no wait for one is long.
    Drip,
    /// The same from the first byte of the header on.
    DripHead,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    pub end: End,
    /// Instead of the body's own length.
    pub content_length: Option<usize>,
}

impl Reply {
    /// An answer with a body.
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { status, headers: Vec::new(), body, end: End::Whole, content_length: None }
    }

    /// The file, or the rest of it that is asked for.
    pub fn file(request: &Request, bytes: &[u8]) -> Self {
        match request.range() {
            Some((start, end)) if start < bytes.len() => {
                let end = end.map_or(bytes.len(), |end| end.min(bytes.len()));
                let range = format!("bytes {start}-{}/{}", end - 1, bytes.len());
                Self::new(206, &bytes[start..end]).header("Content-Range", range)
            }
            Some(_) => {
                Self::new(416, "").header("Content-Range", format!("bytes */{}", bytes.len()))
            }
            None => Self::new(200, bytes),
        }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn end(mut self, end: End) -> Self {
        self.end = end;
        self
    }
}

type Answer = dyn Fn(&Request) -> Reply + Send + Sync;

#[derive(Default)]
struct Seen {
    requests: Vec<Request>,
    body_bytes: usize,
    n_left: usize,
    n_dripped: usize,
    n_slow: usize,
}

struct Shared {
    answer: Box<Answer>,
    seen: Mutex<Seen>,
    changed: Condvar,
}

/// The server; it ends with the test's process.
#[derive(Clone)]
pub struct Server {
    url: String,
    shared: Arc<Shared>,
}

impl Server {
    /// Answers every request with what `answer` makes of it.
    pub fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_on(&TcpListener::bind("127.0.0.1:0").unwrap(), answer)
    }

    /// The same on a port that a test has chosen.
    pub fn start_on(
        listener: &TcpListener,
        answer: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = listener.try_clone().unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (answer, seen, changed) = (Box::new(answer), Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { answer, seen, changed });
        let server = Self { url, shared: Arc::clone(&shared) };
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, shared) = (stream.unwrap(), Arc::clone(&shared));
                thread::spawn(move || serve(stream, &shared));
            }
        });
        server
    }

    /// Scheme, host and port.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.seen.lock().unwrap().requests.clone()
    }

    /// Bytes of bodies that were sent so far.
    pub fn body_bytes(&self) -> usize {
        self.shared.seen.lock().unwrap().body_bytes
    }

    /// Bytes that were sent slowly so far.
    pub fn slow_bytes(&self) -> usize {
        self.shared.seen.lock().unwrap().n_slow
    }

    /// Bytes that were dripped so far.
    pub fn dripped(&self) -> usize {
        self.shared.seen.lock().unwrap().n_dripped
    }

    /// Waits until a client has left a stalled answer.
    pub fn wait_until_left(&self) {
        let seen = self.shared.seen.lock().unwrap();
        let deadline = Duration::from_secs(20);
        let (_seen, outcome) = self
            .shared
            .changed
            .wait_timeout_while(seen, deadline, |seen| seen.n_left == 0)
            .unwrap();
        assert!(!outcome.timed_out(), "the client did not leave");
    }
}

/// One connection: one request, one answer.
fn serve(mut stream: TcpStream, shared: &Shared) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut lines = reader.by_ref().lines();
    let first = lines.next()?.ok()?;
    let (method, path) = first.split_once(' ')?;
    let (method, path) = (method.to_owned(), path.split(' ').next()?.to_owned());
    let mut headers = BTreeMap::new();
    for line in lines.by_ref() {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let request = {
        let mut seen = shared.seen.lock().unwrap();
        let is_same = |one: &&Request| one.path == path && one.method == method;
        let n = seen.requests.iter().filter(is_same).count();
        let request = Request { method, path, headers, n };
        seen.requests.push(request.clone());
        request
    };
    let length = request.headers.get("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
    std::io::copy(&mut reader.take(length), &mut std::io::sink()).ok()?;
    let reply = (shared.answer)(&request);
    if reply.end == End::Gone {
        return None;
    }
    let length = reply.content_length.unwrap_or(reply.body.len());
    let mut head = format!("HTTP/1.1 {} x\r\nContent-Length: {length}\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.extend([*name, ": ", value, "\r\n"]);
    }
    let head = format!("{head}Connection: close\r\n\r\n");
    if reply.end == End::DripHead {
        drip(&mut stream, head.as_bytes(), shared)?;
    }
    stream.write_all(head.as_bytes()).ok()?;
    let n_sent = match reply.end {
        End::Cut(n) | End::Stall(n) => n.min(reply.body.len()),
        _ => reply.body.len(),
    };
    // Counted before it is sent, so that a client that has it finds it counted.
    shared.seen.lock().unwrap().body_bytes += n_sent;
    let n_sent = if request.method == "HEAD" { 0 } else { n_sent };
    match reply.end {
        End::Slow(n) => {
            for piece in reply.body.chunks(n) {
                shared.seen.lock().unwrap().n_slow += piece.len();
                stream.write_all(piece).ok()?;
                thread::park_timeout(Duration::from_millis(1));
            }
        }
        End::Drip => drip(&mut stream, &reply.body, shared)?,
        _ => stream.write_all(&reply.body[..n_sent]).ok()?,
    }
    if matches!(reply.end, End::Stall(_)) {
        // Ends when the client does.
        let _ = stream.read(&mut [0]);
        shared.seen.lock().unwrap().n_left += 1;
        shared.changed.notify_all();
    }
    Some(())
}

/// Sends a byte every few milliseconds, until the client has had enough.
fn drip(stream: &mut TcpStream, bytes: &[u8], shared: &Shared) -> Option<()> {
    for byte in bytes {
        shared.seen.lock().unwrap().n_dripped += 1;
        if stream.write_all(&[*byte]).is_err() {
            shared.seen.lock().unwrap().n_left += 1;
            shared.changed.notify_all();
            return None;
        }
        thread::park_timeout(Duration::from_millis(20));
    }
    Some(())
}
