//! One table: method, path, surface, operation. And the way of a request through it.

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Body as HttpBody;
use jiff::Timestamp;
use matchit::Router;
use v4_proto::Fault;

use crate::{
    api::{Encode, bytes, ollama, openai, wanted},
    body::{Body, Line, Reader},
    daemon::Daemon,
    error::{self, Refusal},
    guard::{Guard, Verdict},
    limits,
    ops::{
        generate::{self, Ask, Running, Started, Step},
        models, ps, pull,
    },
};

/// Whose words a route speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surface {
    /// Ollama's clients.
    Ollama,
    /// OpenAI's clients.
    OpenAi,
}

/// What a route does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Alive,
    Version,
    List,
    Loaded,
    Show,
    Generate,
    Chat,
    Pull,
    Delete,
    One,
}

/// One line of the table.
#[derive(Debug, Clone)]
struct Route {
    method: Method,
    path: &'static str,
    surface: Surface,
    op: Op,
}

/// Every endpoint. `HEAD` is allowed wherever `GET` is.
static ROUTES: [Route; 12] = [
    route(Method::GET, "/", Surface::Ollama, Op::Alive),
    route(Method::GET, "/api/version", Surface::Ollama, Op::Version),
    route(Method::GET, "/api/tags", Surface::Ollama, Op::List),
    route(Method::GET, "/api/ps", Surface::Ollama, Op::Loaded),
    route(Method::POST, "/api/show", Surface::Ollama, Op::Show),
    route(Method::POST, "/api/generate", Surface::Ollama, Op::Generate),
    route(Method::POST, "/api/chat", Surface::Ollama, Op::Chat),
    route(Method::POST, "/api/pull", Surface::Ollama, Op::Pull),
    route(Method::DELETE, "/api/delete", Surface::Ollama, Op::Delete),
    route(Method::POST, "/v1/chat/completions", Surface::OpenAi, Op::Chat),
    route(Method::GET, "/v1/models", Surface::OpenAi, Op::List),
    route(Method::GET, "/v1/models/{*model}", Surface::OpenAi, Op::One),
];

const fn route(method: Method, path: &'static str, surface: Surface, op: Op) -> Route {
    Route { method, path, surface, op }
}

/// What every request is served with.
pub struct Service {
    daemon: Arc<Daemon>,
    guard: Guard,
    reader: Reader,
    router: Router<usize>,
    requests: AtomicU64,
}

/// A request on its way through the service.
struct Call<B> {
    id: u64,
    route: &'static Route,
    /// The rest of the path, for the routes that have one.
    rest: String,
    body: B,
}

impl Service {
    /// Serves `daemon`, giving clients up that stall for `body_stall` within a body.
    pub fn new(daemon: Arc<Daemon>, guard: Guard, body_stall: Duration) -> Self {
        let mut router = Router::new();
        for (number, route) in ROUTES.iter().enumerate() {
            router.insert(route.path, number).expect("the table has each path once");
        }
        Self { daemon, guard, reader: Reader::new(body_stall), router, requests: AtomicU64::new(1) }
    }

    /// Answers a request. Never fails: what goes wrong is an answer too.
    pub async fn respond<B>(&self, request: Request<B>, is_tcp: bool) -> Response<Body>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let began = Instant::now();
        let id = self.requests.fetch_add(1, Ordering::Relaxed);
        let path: String = request.uri().path().chars().take(limits::ECHO_CHARS).collect();
        let what = format!("{} {path:?}", request.method());
        let is_whole = request.method() == Method::HEAD;
        let mut response = match self.guard.judge(request.method(), request.headers(), is_tcp) {
            Verdict::Refuse => plain(StatusCode::FORBIDDEN, ""),
            Verdict::Preflight(headers) => with(plain(StatusCode::NO_CONTENT, ""), headers),
            Verdict::Pass(headers) => with(self.route(id, request).await, headers),
        };
        let number = HeaderValue::from(id);
        response.headers_mut().insert("x-request-id", number);
        let status = response.status().as_u16();
        let line = Line { id, what, status, began, bytes: 0, is_whole };
        response.map(|body| body.logged(line))
    }

    async fn route<B>(&self, id: u64, request: Request<B>) -> Response<Body>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let Ok(found) = self.router.at(request.uri().path()) else {
            return plain(StatusCode::NOT_FOUND, "404 page not found");
        };
        let route = &ROUTES[*found.value];
        let is_head = route.method == Method::GET && request.method() == Method::HEAD;
        if route.method != request.method() && !is_head {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "405 method not allowed");
            let allow =
                if route.method == Method::GET { "GET, HEAD" } else { route.method.as_str() };
            response.headers_mut().insert(
                header::ALLOW,
                HeaderValue::from_str(allow).expect("a method's name is a header value"),
            );
            return response;
        }
        let rest = found.params.get("model").unwrap_or_default().to_owned();
        let call = Call { id, route, rest, body: request.into_body() };
        // A panic costs this request alone.
        let done = AssertUnwindSafe(self.run(call)).catch_unwind().await;
        let result = done.unwrap_or_else(|_| {
            tracing::error!(id, "a request panicked");
            Err(Fault::internal("v4 made a mistake; its log has the details").into())
        });
        result.unwrap_or_else(|refusal| refused(route.surface, &refusal))
    }

    async fn run<B>(&self, call: Call<B>) -> Result<Response<Body>, Refusal>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let daemon = &self.daemon;
        match (call.route.surface, call.route.op) {
            (Surface::Ollama, Op::Chat | Op::Generate) => {
                let decode = match call.route.op {
                    Op::Chat => ollama::decode::chat,
                    _ => ollama::decode::generate,
                };
                let request = decode(&self.reader.read(call.body).await?.bytes)?;
                let (ask, stream) = (request.ask, request.stream);
                answer(daemon, ask, stream, request.encoder, ollama::JSON_TYPE).await
            }
            (Surface::OpenAi, Op::Chat) => {
                let body = self.reader.read(call.body).await?;
                let now = Timestamp::now().as_second();
                let request = openai::decode::chat(&body.bytes, call.id, now)?;
                drop(body);
                let (ask, stream) = (request.ask, request.stream);
                answer(daemon, ask, stream, request.encoder, openai::JSON_TYPE).await
            }
            (Surface::Ollama, Op::Show) => {
                let asked = ollama::decode::show(&self.reader.read(call.body).await?.bytes)?;
                let model = models::resolve(daemon, &asked).await?;
                let inspection = models::inspection(daemon, &model).await?;
                Ok(json(ollama::JSON_TYPE, ollama::show::show(&model, &inspection)))
            }
            (Surface::Ollama, Op::Pull) => {
                let asked = ollama::decode::pull(&self.reader.read(call.body).await?.bytes)?;
                follow(pull::start(daemon, asked.model)?, asked.stream).await
            }
            (Surface::Ollama, Op::Delete) => {
                let asked = ollama::decode::delete(&self.reader.read(call.body).await?.bytes)?;
                models::remove(daemon, &asked).await?;
                Ok(plain(StatusCode::OK, ""))
            }
            (Surface::Ollama, _) => Ok(self.look(call.route.op).await?),
            (Surface::OpenAi, Op::One) => {
                let name = percent_decoded(&call.rest)
                    .ok_or_else(|| Fault::invalid("the model's name in the path is not UTF-8"))?;
                let listed = models::one(daemon, &wanted(Some(&name))?).await?;
                Ok(json(openai::JSON_TYPE, openai::listing::model(listed)))
            }
            (Surface::OpenAi, _) => {
                let listed = models::list(daemon).await?;
                Ok(json(openai::JSON_TYPE, openai::listing::models(listed)))
            }
        }
    }

    /// The routes that only look.
    async fn look(&self, op: Op) -> Result<Response<Body>, Fault> {
        Ok(match op {
            Op::Version => {
                json(ollama::JSON_TYPE, ollama::listing::version(self.daemon.listen.get()))
            }
            Op::List => {
                let listed = models::list(&self.daemon).await?;
                json(ollama::JSON_TYPE, ollama::listing::tags(listed))
            }
            Op::Loaded => {
                let loaded = ps::list(&self.daemon).await;
                json(ollama::JSON_TYPE, ollama::listing::ps(loaded, Timestamp::now()))
            }
            _ => plain(StatusCode::OK, "Ollama is running"),
        })
    }
}

/// Does what is asked and writes the answer: in one piece, or as it comes.
async fn answer(
    daemon: &Daemon,
    ask: Ask,
    stream: bool,
    mut encoder: impl Encode + 'static,
    json_type: &'static str,
) -> Result<Response<Body>, Refusal> {
    match generate::start(daemon, ask).await? {
        Started::Settled(settled) => {
            Ok(json(json_type, encoder.settled(settled, Timestamp::now())))
        }
        Started::Answering(running) if stream => {
            let stream_type = encoder.stream_type();
            Ok(typed(stream_type, Body::stream(pieces(running, encoder))))
        }
        Started::Answering(running) => {
            let (all, end) = running.join().await?;
            Ok(json(json_type, encoder.whole(all, &end, Timestamp::now())))
        }
    }
}

/// The pieces of an answer as bytes. Dropping the stream drops the answer, which cancels it.
fn pieces(
    running: Running,
    encoder: impl Encode + 'static,
) -> impl futures_util::Stream<Item = Bytes> + Send {
    futures_util::stream::unfold(Some((running, encoder)), async |state| {
        let (mut running, mut encoder) = state?;
        loop {
            let now = Timestamp::now();
            match running.next().await? {
                Step::Delta(delta) => {
                    let piece = encoder.delta(delta, now);
                    if !piece.is_empty() {
                        return Some((piece.into(), Some((running, encoder))));
                    }
                }
                Step::End(end) => return Some((encoder.end(&end, now).into(), None)),
                Step::Failed(fault) => {
                    tracing::warn!(%fault, "an answer failed after it had begun");
                    return Some((encoder.failed(&fault).into(), None));
                }
            }
        }
    })
}

/// Writes the progress of a pull as it comes, or only its last word.
async fn follow(mut pulling: pull::Pulling, stream: bool) -> Result<Response<Body>, Refusal> {
    if stream {
        let body = Body::stream(lines(pulling));
        return Ok(typed(ollama::STREAM_TYPE, body));
    }
    while let Some(progress) = pulling.next().await {
        match progress.stage {
            v4_pull::Stage::Failed(fault) => return Err(fault.into()),
            v4_pull::Stage::Done { .. } => break,
            _ => {}
        }
    }
    Ok(json(ollama::JSON_TYPE, ollama::listing::PullLines::last()))
}

/// The lines of a pull. A failure after the first byte is a line too.
fn lines(pulling: pull::Pulling) -> impl futures_util::Stream<Item = Bytes> + Send {
    let state = Some((pulling, ollama::listing::PullLines::default()));
    futures_util::stream::unfold(state, async |state| {
        let (mut pulling, mut lines) = state?;
        loop {
            let progress = pulling.next().await?;
            let mut piece = lines.lines(&progress);
            if let v4_pull::Stage::Failed(fault) = &progress.stage {
                piece.extend(crate::api::line(&error::ollama_body(fault)));
            }
            if progress.is_last() {
                return Some((piece.into(), None));
            }
            if !piece.is_empty() {
                return Some((piece.into(), Some((pulling, lines))));
            }
        }
    })
}

/// A part of a path as it was meant: clients write the colon of a tag as `%3A`. `None` where it is
/// not UTF-8.
fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        let byte = hex.filter(|_| first == b'%').and_then(|hex| u8::from_str_radix(hex, 16).ok());
        bytes.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8(bytes).ok()
}

fn typed(content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn json(content_type: &'static str, body: Vec<u8>) -> Response<Body> {
    typed(content_type, Body::whole(body))
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = if text.is_empty() {
        Response::new(Body::empty())
    } else {
        typed("text/plain; charset=utf-8", Body::whole(text))
    };
    *response.status_mut() = status;
    response
}

fn with(mut response: Response<Body>, headers: http::HeaderMap) -> Response<Body> {
    response.headers_mut().extend(headers);
    response
}

/// A refusal in the words of a surface.
fn refused(surface: Surface, refusal: &Refusal) -> Response<Body> {
    let mut response = match surface {
        Surface::Ollama => json(ollama::JSON_TYPE, bytes(&error::ollama_body(&refusal.fault))),
        Surface::OpenAi => json(openai::JSON_TYPE, bytes(&error::openai_body(&refusal.fault))),
    };
    *response.status_mut() = refusal.status;
    if refusal.status == StatusCode::SERVICE_UNAVAILABLE {
        let seconds = HeaderValue::from_static(error::RETRY_AFTER_S);
        response.headers_mut().insert(header::RETRY_AFTER, seconds);
    }
    response
}

#[cfg(test)]
mod tests;
