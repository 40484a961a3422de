//! The HTTP client of every command but `serve`: one connection a request, over the daemon's socket
//! or TCP.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::error::Failure;
use crate::files::Upload;
use crate::place::{Place, Target};
use crate::start;

/// How long a connection may take. The daemon is near; only a wrong `V4_HOST` takes longer.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long an answer that is not streamed may take: a listing, a header read from a cold disk.
const CALL_DEADLINE: Duration = Duration::from_mins(1);
/// How long a stream may be silent: a large model loads from a slow disk, then reads a long prompt.
const SILENCE_DEADLINE: Duration = Duration::from_hours(1);
/// Bytes of an answer that is not streamed. `show` with all metadata of a large vocabulary is some
/// 20 MB.
const ANSWER_BYTES: usize = 256 << 20;
/// Bytes of one line of a stream.
const LINE_BYTES: usize = 16 << 20;

/// Whether a command wants a daemon that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfAbsent {
    /// Start one.
    Start,
    /// Say that none runs.
    Fail,
}

/// A client of one daemon.
pub struct Client {
    place: Place,
    if_absent: IfAbsent,
}

/// The runtime that a command runs its requests on.
///
/// # Errors
/// The system gives no epoll instance.
pub fn runtime() -> Result<Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Failure::System { what: "start the event loop", source })
}

trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}

/// Connects, and says so when nobody is there.
///
/// # Errors
/// What the system said; `NotFound` and `ConnectionRefused` mean that nobody is there.
async fn connect(target: &Target) -> io::Result<Box<dyn Wire>> {
    let opened = async {
        Ok(match target {
            Target::Socket(path) => Box::new(UnixStream::connect(path).await?) as Box<dyn Wire>,
            Target::Address(address) => Box::new(TcpStream::connect(address.as_str()).await?),
        })
    };
    timeout(CONNECT_DEADLINE, opened).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Whether somebody accepts connections at `target`.
pub async fn is_there(target: &Target) -> bool {
    connect(target).await.is_ok()
}

impl Client {
    /// A client of the daemon at `place`.
    pub fn new(place: Place, if_absent: IfAbsent) -> Self {
        Self { place, if_absent }
    }

    /// Where the daemon is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    async fn open(&self) -> Result<Box<dyn Wire>, Failure> {
        let target = &self.place.target;
        let error = match connect(target).await {
            Ok(wire) => return Ok(wire),
            Err(error) => error,
        };
        match (target, error.kind(), self.if_absent) {
            (
                Target::Socket(_),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused,
                wish,
            ) => {
                if wish == IfAbsent::Fail {
                    return Err(Failure::NotRunning);
                }
                start::daemon(&self.place).await?;
                connect(target).await.map_err(|error| Failure::Lost(error.to_string()))
            }
            (Target::Socket(_), ..) => {
                Err(Failure::System { what: "connect to the v4 daemon", source: error })
            }
            (Target::Address(_), ..) => Err(Failure::NobodyThere(target.clone())),
        }
    }

    /// Sends a request and gives the answer as JSON (`null` when it is empty).
    ///
    /// # Errors
    /// [`Failure::Refused`] with the daemon's words, or what befell the connection.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        let answer = async { self.send(method, path, body).await?.whole().await };
        let bytes = timeout(CALL_DEADLINE, answer).await.map_err(|_| silent(CALL_DEADLINE))??;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).map_err(|error| Failure::Lost(error.to_string()))
    }

    /// Sends a request whose answer comes in lines of JSON.
    ///
    /// # Errors
    /// As [`Client::call`], for what goes wrong before the first line.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<Answer, Failure> {
        let answer = self.send(Method::POST, path, Some(body));
        timeout(SILENCE_DEADLINE, answer).await.map_err(|_| silent(SILENCE_DEADLINE))?
    }

    /// Sends a file as a body, unless the daemon says that it has it.
    ///
    /// # Errors
    /// As [`Client::call`]; [`Failure::File`].
    pub async fn upload(&self, path: &str, file: &Path) -> Result<(), Failure> {
        match self.call(Method::HEAD, path, None).await {
            Ok(_) => return Ok(()),
            Err(failure) if failure.is_not_found() => {}
            Err(failure) => return Err(failure),
        }
        let body = Upload::open(file)?;
        let sent = async { self.send_body(Method::POST, path, body).await?.whole().await };
        timeout(SILENCE_DEADLINE, sent).await.map_err(|_| silent(SILENCE_DEADLINE))??;
        Ok(())
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Answer, Failure> {
        let body = body.map(Value::to_string).unwrap_or_default();
        self.send_body(method, path, Full::<Bytes>::new(body.into())).await
    }

    async fn send_body<B>(&self, method: Method, path: &str, body: B) -> Result<Answer, Failure>
    where
        B: Body<Data = Bytes, Error: std::error::Error + Send + Sync> + Send + Unpin + 'static,
    {
        let wire = self.open().await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(wire)).await.map_err(lost)?;
        let mut connection: Connection = Box::pin(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.host())
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)
            .expect("the parts are constants and a parsed host");
        if let Some(key) = &self.place.key {
            request.headers_mut().insert(header::AUTHORIZATION, key.clone());
        }
        let response = tokio::select! {
            biased;
            response = sender.send_request(request) => response.map_err(lost)?,
            ended = &mut connection => {
                let why = ended.err().map_or("it was closed".to_owned(), |error| error.to_string());
                return Err(Failure::Lost(why));
            }
        };
        let status = response.status();
        let answer = Answer {
            connection: Some(connection),
            body: response.into_body(),
            pending: BytesMut::new(),
        };
        if status.is_success() { Ok(answer) } else { Err(answer.refusal(status).await) }
    }

    fn host(&self) -> &str {
        match &self.place.target {
            Target::Socket(_) => "localhost",
            Target::Address(address) => address,
        }
    }
}

type Connection = Pin<Box<dyn Future<Output = Result<(), hyper::Error>> + Send>>;

/// The answer to one request. It owns the connection: dropping it hangs up at once, which is how a
/// request is cancelled.
pub struct Answer {
    /// `None` once it has ended.
    connection: Option<Connection>,
    body: Incoming,
    /// What came after the last whole line.
    pending: BytesMut,
}

impl Answer {
    /// The next line as JSON; `None` after the last.
    ///
    /// # Errors
    /// [`Failure::Broken`] when the line is the daemon's error; else what befell the connection.
    pub async fn next(&mut self) -> Result<Option<Value>, Failure> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line = self.pending.split_to(end);
                self.pending.advance(1);
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return parse(&line).map(Some);
            }
            if self.pending.len() > LINE_BYTES {
                return Err(Failure::Lost(format!("a line of over {LINE_BYTES} bytes")));
            }
            match timeout(SILENCE_DEADLINE, self.chunk()).await {
                Ok(Some(Ok(bytes))) => self.pending.extend_from_slice(&bytes),
                Ok(Some(Err(failure))) => return Err(failure),
                Ok(None) if self.pending.trim_ascii().is_empty() => return Ok(None),
                Ok(None) => return parse(&self.pending.split()).map(Some),
                Err(_) => return Err(silent(SILENCE_DEADLINE)),
            }
        }
    }

    /// More bytes of the body; `None` at its end.
    async fn chunk(&mut self) -> Option<Result<Bytes, Failure>> {
        loop {
            let frame = match &mut self.connection {
                None => self.body.frame().await,
                Some(connection) => tokio::select! {
                    biased;
                    frame = self.body.frame() => frame,
                    _ = connection => {
                        self.connection = None;
                        continue;
                    }
                },
            };
            match frame {
                None => return None,
                Some(Err(error)) => return Some(Err(lost(error))),
                Some(Ok(frame)) => {
                    // Trailers say nothing to us.
                    if let Ok(bytes) = frame.into_data() {
                        return Some(Ok(bytes));
                    }
                }
            }
        }
    }

    /// The whole body.
    async fn whole(self) -> Result<Bytes, Failure> {
        let Answer { connection, body, .. } = self;
        let collected = Limited::new(body, ANSWER_BYTES).collect();
        let collected = match connection {
            None => collected.await,
            Some(connection) => {
                let drive = async {
                    // How the connection ends shows in the body.
                    let _ = connection.await;
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    biased;
                    collected = collected => collected,
                    () = drive => unreachable!("it is pending for ever"),
                }
            }
        };
        match collected {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) => Err(Failure::Lost(error.to_string())),
        }
    }

    /// The daemon's words for a status that is not success.
    async fn refusal(self, status: StatusCode) -> Failure {
        let body = match self.whole().await {
            Ok(body) => body,
            Err(failure) => return failure,
        };
        let said = serde_json::from_slice(&body).ok().and_then(|body: Value| error_text(&body));
        let message = said.unwrap_or_else(|| format!("the v4 daemon answered {status}"));
        Failure::Refused { status, message }
    }
}

/// The error that a body or a line carries, if any.
fn error_text(body: &Value) -> Option<String> {
    body.get("error")?.as_str().map(str::to_owned)
}

fn parse(line: &[u8]) -> Result<Value, Failure> {
    let value = serde_json::from_slice(line).map_err(|error| Failure::Lost(error.to_string()))?;
    match error_text(&value) {
        Some(text) => Err(Failure::Broken(text)),
        None => Ok(value),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn lost(error: hyper::Error) -> Failure {
    Failure::Lost(error.to_string())
}

fn silent(deadline: Duration) -> Failure {
    Failure::Silent(deadline.as_secs())
}
