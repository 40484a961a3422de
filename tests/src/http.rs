//! A small HTTP/1.1 client: one connection a request, so that a test can stop in the middle.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::{DEADLINE, LONG_DEADLINE};

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `host:port`.
    Tcp(String),
    /// A unix socket.
    Unix(PathBuf),
}

impl Address {
    /// The unix socket at `path`.
    pub fn unix(path: &Path) -> Self {
        Address::Unix(path.to_owned())
    }

    /// Connects, with [`DEADLINE`] on every read and write.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn connect(&self) -> io::Result<Wire> {
        self.connect_for(DEADLINE)
    }

    fn connect_for(&self, deadline: Duration) -> io::Result<Wire> {
        let deadline = Some(deadline);
        Ok(match self {
            Address::Tcp(address) => {
                let wire = TcpStream::connect(address)?;
                wire.set_read_timeout(deadline)?;
                wire.set_write_timeout(deadline)?;
                Wire::Tcp(wire)
            }
            Address::Unix(path) => {
                let wire = UnixStream::connect(path)?;
                wire.set_read_timeout(deadline)?;
                wire.set_write_timeout(deadline)?;
                Wire::Unix(wire)
            }
        })
    }

    /// Sends a request and reads the whole answer.
    pub fn request(&self, method: &str, path: &str, body: &[u8]) -> Reply {
        self.open(method, path, body).whole()
    }

    /// Sends a request and reads the head of the answer.
    pub fn open(&self, method: &str, path: &str, body: &[u8]) -> Stream {
        self.open_for(DEADLINE, method, path, body)
    }

    fn open_for(&self, deadline: Duration, method: &str, path: &str, body: &[u8]) -> Stream {
        Stream::read(self.send(deadline, method, path, body), method)
    }

    fn send(&self, deadline: Duration, method: &str, path: &str, body: &[u8]) -> Wire {
        self.send_with("", deadline, method, path, body)
    }

    fn send_with(
        &self,
        lines: &str,
        deadline: Duration,
        method: &str,
        path: &str,
        body: &[u8],
    ) -> Wire {
        let mut wire = self.connect_for(deadline).expect("the server accepts connections");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\n{lines}Content-Length: {}\r\n\r\n",
            body.len()
        );
        // A server may refuse and close before it has read all of a long body.
        let _ = wire.write_all(head.as_bytes()).and_then(|()| wire.write_all(body));
        wire
    }

    /// Sends a request with further header lines, each with its end, and reads the whole answer.
    pub fn request_with(&self, lines: &str, method: &str, path: &str, body: &[u8]) -> Reply {
        Stream::read(self.send_with(lines, DEADLINE, method, path, body), method).whole()
    }

    /// Whether somebody is there who answers.
    pub fn answers(&self) -> bool {
        let head = "HEAD /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        self.connect().is_ok_and(|mut wire| {
            let sent = wire.write_all(head.as_bytes());
            sent.is_ok() && wire.read(&mut [0; 16]).is_ok_and(|n| n > 0)
        })
    }

    /// Sends a request and does not wait for an answer.
    pub fn open_only(&self, method: &str, path: &str, body: &[u8]) -> Wire {
        self.send(DEADLINE, method, path, body)
    }

    /// GET.
    pub fn get(&self, path: &str) -> Reply {
        self.request("GET", path, b"")
    }

    /// POST of JSON.
    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.request("POST", path, body.to_string().as_bytes())
    }

    /// POST of JSON whose answer may take [`LONG_DEADLINE`]: a pull of a real model.
    pub fn patient_post(&self, path: &str, body: &Value) -> Reply {
        self.open_for(LONG_DEADLINE, "POST", path, body.to_string().as_bytes()).whole()
    }

    /// POST of JSON whose answer comes bit by bit, each within [`LONG_DEADLINE`].
    pub fn patient_stream(&self, path: &str, body: &Value) -> Stream {
        self.open_for(LONG_DEADLINE, "POST", path, body.to_string().as_bytes())
    }

    /// POST of JSON whose answer comes bit by bit.
    pub fn stream(&self, path: &str, body: &Value) -> Stream {
        self.open("POST", path, body.to_string().as_bytes())
    }
}

/// A connection.
pub enum Wire {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a unix socket.
    Unix(UnixStream),
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Wire::Tcp(wire) => wire.read(buffer),
            Wire::Unix(wire) => wire.read(buffer),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Wire::Tcp(wire) => wire.write(bytes),
            Wire::Unix(wire) => wire.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Wire::Tcp(wire) => wire.flush(),
            Wire::Unix(wire) => wire.flush(),
        }
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// Its header fields, names in lower case.
    pub fields: Vec<(String, String)>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Reply {
    /// A header field.
    pub fn field(&self, name: &str) -> Option<&str> {
        field(&self.fields, name)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {}: {}", self.status, self.text()))
    }

    /// The body as lines of JSON.
    #[track_caller]
    pub fn lines(&self) -> Vec<Value> {
        let text = self.text();
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        lines.map(|line| serde_json::from_str(line).expect(line)).collect()
    }

    /// The JSON body of an answer that must have this status.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        if self.body.is_empty() { Value::Null } else { self.json() }
    }

    /// The error text of an answer that must have this status.
    #[track_caller]
    pub fn error(&self, status: u16) -> String {
        let body = self.expect(status);
        let text = body["error"].as_str().or_else(|| body["error"]["message"].as_str());
        text.unwrap_or_else(|| panic!("no error in {body}")).to_owned()
    }
}

/// An answer whose body is read bit by bit. Dropping it hangs up.
pub struct Stream {
    /// Its status.
    pub status: u16,
    fields: Vec<(String, String)>,
    body: BufReader<Box<dyn Read + Send>>,
}

impl Stream {
    #[track_caller]
    fn read(wire: Wire, method: &str) -> Self {
        let mut wire = BufReader::new(wire);
        let line = |wire: &mut BufReader<Wire>| {
            let mut line = String::new();
            wire.read_line(&mut line).expect("an answer within the deadline");
            line.trim_end().to_owned()
        };
        let first = line(&mut wire);
        let status = first.split(' ').nth(1).and_then(|word| word.parse().ok());
        let status = status.unwrap_or_else(|| panic!("not an answer: {first:?}"));
        let mut fields = Vec::new();
        loop {
            let field = line(&mut wire);
            let Some((name, value)) = field.split_once(':') else { break };
            fields.push((name.to_lowercase(), value.trim().to_owned()));
        }
        let length = field(&fields, "content-length").and_then(|text| text.parse().ok());
        let body: Box<dyn Read + Send> = match (field(&fields, "transfer-encoding"), length) {
            _ if method == "HEAD" => Box::new(io::empty()),
            (Some("chunked"), _) => Box::new(Chunked { wire, left: 0, is_done: false }),
            (_, Some(length)) => Box::new(wire.take(length)),
            (_, None) => Box::new(wire),
        };
        Self { status, fields, body: BufReader::new(body) }
    }

    /// The next line of the body; `None` at its end.
    ///
    /// # Errors
    /// The connection broke, or nothing came within [`DEADLINE`].
    pub fn line(&mut self) -> io::Result<Option<String>> {
        let mut line = String::new();
        if self.body.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        Ok(Some(line.trim_end().to_owned()))
    }

    /// The next line as JSON; `None` at the end.
    #[track_caller]
    pub fn json(&mut self) -> Option<Value> {
        let line = self.line().expect("a whole line")?;
        Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line:?}")))
    }

    /// The rest of the answer.
    #[track_caller]
    pub fn whole(mut self) -> Reply {
        let mut body = Vec::new();
        self.body.read_to_end(&mut body).expect("a whole body");
        Reply { status: self.status, fields: self.fields, body }
    }
}

fn field<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

/// A chunked body.
struct Chunked {
    wire: BufReader<Wire>,
    /// Bytes left of the chunk.
    left: u64,
    is_done: bool,
}

impl Read for Chunked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 && !self.is_done {
            let mut size = String::new();
            self.wire.read_line(&mut size)?;
            self.left = u64::from_str_radix(size.trim(), 16)
                .map_err(|_| io::Error::new(io::ErrorKind::UnexpectedEof, "the body broke off"))?;
            self.is_done = self.left == 0;
        }
        if self.is_done {
            return Ok(0);
        }
        let n = (&mut self.wire).take(self.left).read(buffer)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        if self.left == 0 {
            self.wire.read_line(&mut String::new())?;
        }
        Ok(n)
    }
}
