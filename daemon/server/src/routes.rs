//! One table: method, path, surface, operation. And the way of a request through it.

mod registry;

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
use tracing::Instrument as _;
use v4_proto::{Digest, Fault, Lane};
use v4_supervisor::Caller;

use crate::{
    api::{
        Encode, bytes,
        ollama::{self, decode::KeyOrder},
        openai, prometheus, wanted,
    },
    body::{Body, Line, Reader},
    caller,
    daemon::Daemon,
    error::{self, Error, Refusal},
    guard::{Guard, Verdict},
    keys::Scope,
    limits,
    ops::{
        blobs, care, create,
        generate::{self, Ask, Running, Started, Step},
        import, metrics, models, plan, ps, pull,
    },
    options,
    parent::Parent,
    replace,
    uses::Use,
};

/// Whose words a route speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surface {
    /// Ollama's clients.
    Ollama,
    /// OpenAI's clients.
    OpenAi,
    /// Clients of registries.
    Oci,
}

/// What a route does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Alive,
    Metrics,
    Version,
    List,
    Loaded,
    Plan,
    Why,
    Show,
    Generate,
    Chat,
    Complete,
    Pull,
    Pulls,
    Steer,
    Delete,
    Copy,
    Create,
    Push,
    HasBlob,
    PutBlob,
    Registry,
    Chain,
    Usage,
    Prune,
    Check,
    Roots,
    ChangeRoots,
    Import,
    Deleted,
    Restore,
    Pins,
    Pin,
    One,
    Keys,
    ChangeKeys,
    Config,
    Reload,
    Replace,
}

impl Op {
    /// Whether it works on the store for as long as it takes.
    fn is_long(self) -> bool {
        matches!(self, Self::Create | Self::Import | Self::Push | Self::PutBlob | Self::Check)
    }
}

/// One line of the table.
#[derive(Debug, Clone)]
struct Route {
    method: Method,
    path: &'static str,
    surface: Surface,
    /// What a client must be allowed to do.
    scope: Scope,
    op: Op,
}

/// Every endpoint. `HEAD` is allowed wherever `GET` is.
static ROUTES: [Route; 41] = [
    route(Method::GET, "/", Surface::Ollama, Scope::Open, Op::Alive),
    route(Method::GET, "/metrics", Surface::Ollama, Scope::Read, Op::Metrics),
    route(Method::GET, "/api/version", Surface::Ollama, Scope::Read, Op::Version),
    route(Method::GET, "/api/tags", Surface::Ollama, Scope::Read, Op::List),
    route(Method::GET, "/api/ps", Surface::Ollama, Scope::Use, Op::Loaded),
    route(Method::POST, "/api/plan", Surface::Ollama, Scope::Use, Op::Plan),
    route(Method::POST, "/api/why", Surface::Ollama, Scope::Use, Op::Why),
    route(Method::POST, "/api/show", Surface::Ollama, Scope::Use, Op::Show),
    route(Method::POST, "/api/generate", Surface::Ollama, Scope::Use, Op::Generate),
    route(Method::POST, "/api/chat", Surface::Ollama, Scope::Use, Op::Chat),
    route(Method::POST, "/api/pull", Surface::Ollama, Scope::Admin, Op::Pull),
    route(Method::GET, "/api/pulls", Surface::Ollama, Scope::Admin, Op::Pulls),
    route(Method::POST, "/api/pulls", Surface::Ollama, Scope::Admin, Op::Steer),
    route(Method::POST, "/api/push", Surface::Ollama, Scope::Admin, Op::Push),
    route(Method::POST, "/api/create", Surface::Ollama, Scope::Admin, Op::Create),
    route(Method::POST, "/api/copy", Surface::Ollama, Scope::Admin, Op::Copy),
    route(Method::HEAD, "/api/blobs/{digest}", Surface::Ollama, Scope::Admin, Op::HasBlob),
    route(Method::POST, "/api/blobs/{digest}", Surface::Ollama, Scope::Admin, Op::PutBlob),
    route(Method::GET, "/api/chains/{digest}", Surface::Ollama, Scope::Read, Op::Chain),
    route(Method::GET, "/v2/", Surface::Oci, Scope::Read, Op::Registry),
    route(Method::GET, "/v2/{*path}", Surface::Oci, Scope::Read, Op::Registry),
    route(Method::GET, "/api/roots", Surface::Ollama, Scope::Admin, Op::Roots),
    route(Method::POST, "/api/roots", Surface::Ollama, Scope::Admin, Op::ChangeRoots),
    route(Method::GET, "/api/du", Surface::Ollama, Scope::Admin, Op::Usage),
    route(Method::POST, "/api/prune", Surface::Ollama, Scope::Admin, Op::Prune),
    route(Method::POST, "/api/fsck", Surface::Ollama, Scope::Admin, Op::Check),
    route(Method::DELETE, "/api/delete", Surface::Ollama, Scope::Admin, Op::Delete),
    route(Method::GET, "/api/deleted", Surface::Ollama, Scope::Admin, Op::Deleted),
    route(Method::POST, "/api/restore", Surface::Ollama, Scope::Admin, Op::Restore),
    route(Method::POST, "/api/import", Surface::Ollama, Scope::Admin, Op::Import),
    route(Method::GET, "/api/pins", Surface::Ollama, Scope::Admin, Op::Pins),
    route(Method::POST, "/api/pins", Surface::Ollama, Scope::Admin, Op::Pin),
    route(Method::GET, "/api/keys", Surface::Ollama, Scope::Owner, Op::Keys),
    route(Method::POST, "/api/keys", Surface::Ollama, Scope::Owner, Op::ChangeKeys),
    route(Method::GET, "/api/config", Surface::Ollama, Scope::Admin, Op::Config),
    route(Method::POST, "/api/config/reload", Surface::Ollama, Scope::Admin, Op::Reload),
    route(Method::POST, "/api/replace", Surface::Ollama, Scope::Owner, Op::Replace),
    route(Method::POST, "/v1/chat/completions", Surface::OpenAi, Scope::Use, Op::Chat),
    route(Method::POST, "/v1/completions", Surface::OpenAi, Scope::Use, Op::Complete),
    route(Method::GET, "/v1/models", Surface::OpenAi, Scope::Read, Op::List),
    route(Method::GET, "/v1/models/{*model}", Surface::OpenAi, Scope::Read, Op::One),
];

const fn route(
    method: Method,
    path: &'static str,
    surface: Surface,
    scope: Scope,
    op: Op,
) -> Route {
    Route { method, path, surface, scope, op }
}

/// What every request is served with.
pub struct Service {
    daemon: Arc<Daemon>,
    guard: Guard,
    reader: Reader,
    /// The routes of each path.
    router: Router<Vec<&'static Route>>,
    requests: AtomicU64,
}

/// A request on its way through the service.
struct Call<B> {
    id: u64,
    route: &'static Route,
    /// The rest of the path, for the routes that have one.
    rest: String,
    /// How urgent its headers say that it is.
    lane: Option<Lane>,
    /// Who asks.
    caller: Caller,
    /// The part of a blob that is asked for.
    range: Option<HeaderValue>,
    /// Whether it came over TCP.
    is_tcp: bool,
    /// The span that it belongs to.
    parent: Option<Parent>,
    /// It uses the store.
    used: Use,
    body: B,
}

/// The name of the key that a request came with, for its line in the log.
#[derive(Clone)]
struct KeyName(String);

/// The header that says how urgent a request is: `interactive` or `background`.
const LANE: &str = "x-v4-lane";

/// What [`LANE`] says; nothing where it is not there.
fn lane(headers: &http::HeaderMap) -> Result<Option<Lane>, Fault> {
    let value = headers.get(LANE).map(|value| String::from_utf8_lossy(value.as_bytes()));
    value.map(|text| options::lane("the header x-v4-lane", text.trim())).transpose()
}

impl Service {
    /// Serves `daemon`, giving clients up that stall for `body_stall` within a body.
    pub fn new(daemon: Arc<Daemon>, guard: Guard, body_stall: Duration) -> Self {
        let mut router = Router::new();
        for route in &ROUTES {
            let same = ROUTES.iter().filter(|other| other.path == route.path);
            let all: Vec<&Route> = same.collect();
            if std::ptr::eq(all[0], route) {
                router.insert(route.path, all).expect("no two paths of the table are alike");
            }
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
        let span = tracing::error_span!("request", id);
        let path: String = request.uri().path().chars().take(limits::ECHO_CHARS).collect();
        let what = format!("{} {path:?}", request.method());
        let method = request.method().clone();
        let is_whole = method == Method::HEAD;
        let found = self.router.at(request.uri().path());
        let route = found.map_or(metrics::OTHER, |found| found.value[0].path);
        let config = self.daemon.config();
        let (asked, headers) = (request.method(), request.headers());
        let mut response = match self.guard.judge(asked, headers, is_tcp, &config.origins) {
            Verdict::Refuse => plain(StatusCode::FORBIDDEN, ""),
            Verdict::Preflight(headers) => with(plain(StatusCode::NO_CONTENT, ""), headers),
            Verdict::Pass(headers) => {
                let answer = self.route(id, request, is_tcp).instrument(span.clone());
                with(answer.await, headers)
            }
        };
        let caller = response.extensions_mut().remove::<KeyName>();
        let number = HeaderValue::from(id);
        response.headers_mut().insert("x-request-id", number);
        let status = response.status().as_u16();
        self.daemon.requests.count(&method, route, status);
        let caller = caller.map(|KeyName(name)| name);
        let line = Line { id, span, what, caller, status, began, bytes: 0, is_whole };
        response.map(|body| body.logged(line))
    }

    async fn route<B>(&self, id: u64, request: Request<B>, is_tcp: bool) -> Response<Body>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let Ok(found) = self.router.at(request.uri().path()) else {
            return plain(StatusCode::NOT_FOUND, "404 page not found");
        };
        let asked = match *request.method() {
            Method::HEAD if !found.value.iter().any(|route| route.method == Method::HEAD) => {
                &Method::GET
            }
            ref method => method,
        };
        let Some(&route) = found.value.iter().find(|route| route.method == asked) else {
            return wrong_method(found.value);
        };
        let used = match self.daemon.uses.begin(route.op.is_long()).await {
            Ok(used) => used,
            Err(fault) => return refused(route.surface, &fault.into()),
        };
        let keys = &self.daemon.keys;
        let key = match keys.judge(request.headers(), is_tcp, route.scope).await {
            Ok(key) => key,
            Err(fault) => return refused(route.surface, &fault.into()),
        };
        let rest = ["model", "digest", "path"].iter().find_map(|name| found.params.get(name));
        let rest = rest.unwrap_or_default().to_owned();
        let lane = match lane(request.headers()) {
            Ok(lane) => lane,
            Err(fault) => return refused(route.surface, &fault.into()),
        };
        let range = request.headers().get(header::RANGE).cloned();
        let caller = caller::of(request.headers(), request.extensions().get());
        let parent = Parent::read(request.headers());
        let body = request.into_body();
        let call = Call { id, route, rest, lane, caller, range, is_tcp, parent, used, body };
        // A panic costs this request alone.
        let done = AssertUnwindSafe(self.run(call)).catch_unwind().await;
        let result = done.unwrap_or_else(|_| {
            tracing::error!(id, "a request panicked");
            Err(Fault::internal("v4 made a mistake; its log has the details").into())
        });
        let mut response = result.unwrap_or_else(|refusal| refused(route.surface, &refusal));
        if let Some(name) = key {
            response.extensions_mut().insert(KeyName(name));
        }
        response
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
                let (mut ask, stream) = (request.ask, request.stream);
                ask.options.lane = call.lane.or(ask.options.lane);
                (ask.caller, ask.parent) = (call.caller, call.parent);
                answer(daemon, (ask, call.used), stream, request.encoder, ollama::JSON_TYPE).await
            }
            (Surface::OpenAi, Op::Chat | Op::Complete) => self.openai(call).await,
            (Surface::Ollama, Op::Show | Op::Plan | Op::Why) => self.tell(call).await,
            (Surface::Ollama, Op::HasBlob | Op::PutBlob) => self.blob(call).await,
            (Surface::Oci, _) => {
                Ok(registry::answer(daemon, &call.rest, call.range.as_ref()).await?)
            }
            (Surface::Ollama, Op::Chain) => Ok(registry::chain(daemon, &call.rest).await?),
            (
                Surface::Ollama,
                Op::Copy | Op::Create | Op::Import | Op::Push | Op::Delete | Op::Restore | Op::Pin,
            ) => self.keep(call).await,
            (Surface::Ollama, Op::Prune | Op::Check | Op::ChangeRoots) => self.care(call).await,
            (Surface::Ollama, Op::Pull) => {
                let asked = ollama::decode::pull(&self.reader.read(call.body).await?.bytes)?;
                let is_left = asked.wish.is_detached && !asked.stream;
                let pulling = pull::start(daemon, asked.model, asked.wish)?;
                if is_left {
                    return Ok(json(ollama::JSON_TYPE, ollama::listing::PullLines::first()));
                }
                follow(pulling, asked.stream).await
            }
            (Surface::Ollama, Op::Keys | Op::ChangeKeys | Op::Reload | Op::Replace) => {
                self.rule(call).await
            }
            (Surface::Ollama, Op::Steer) => {
                let order = ollama::decode::steer(&self.reader.read(call.body).await?.bytes)?;
                pull::steer(daemon, order)?;
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

    /// Answers of a model in OpenAI's words.
    async fn openai<B>(&self, call: Call<B>) -> Result<Response<Body>, Refusal>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let body = self.reader.read(call.body).await?;
        let now = Timestamp::now().as_second();
        let about = (call.lane, call.caller, call.parent, call.used);
        if call.route.op == Op::Complete {
            let request = openai::completions::decode(&body.bytes, call.id, now)?;
            drop(body);
            return openai_answer(&self.daemon, request, about).await;
        }
        let request = openai::decode::chat(&body.bytes, call.id, now)?;
        drop(body);
        openai_answer(&self.daemon, request, about).await
    }

    /// Whether a blob is here, or it comes.
    async fn blob<B>(&self, mut call: Call<B>) -> Result<Response<Body>, Refusal>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let digest = call.rest.parse::<Digest>();
        let digest = digest.map_err(|error| Fault::invalid(error.to_string()))?;
        if blobs::is_here(&self.daemon, digest).await? {
            Ok(plain(StatusCode::OK, ""))
        } else if call.route.op == Op::HasBlob {
            Ok(plain(StatusCode::NOT_FOUND, ""))
        } else {
            self.take(&mut call.body, digest).await
        }
    }

    /// The routes that make models of what is here, send them elsewhere, or remove them.
    async fn keep<B>(&self, call: Call<B>) -> Result<Response<Body>, Refusal>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let (daemon, used) = (&self.daemon, call.used);
        let bytes = self.reader.read(call.body).await?.bytes;
        match call.route.op {
            Op::Copy => {
                let (from, to) = ollama::decode::copy(&bytes)?;
                models::copy(daemon, from, to).await?;
                Ok(plain(StatusCode::OK, ""))
            }
            Op::Push => {
                let asked = ollama::decode::pull(&bytes)?;
                let watch = pull::push(daemon, asked.model, asked.wish.is_plain).await?;
                Ok(pushed(watch, asked.stream).await?.map(|body| body.holding(used)))
            }
            Op::Delete => {
                models::remove(daemon, &ollama::decode::delete(&bytes)?).await?;
                Ok(plain(StatusCode::OK, ""))
            }
            Op::Restore => {
                models::restore(daemon, &ollama::decode::delete(&bytes)?).await?;
                Ok(plain(StatusCode::OK, ""))
            }
            Op::Pin => {
                let (wanted, is_pinned) = ollama::decode::pin(&bytes)?;
                care::pin(daemon, wanted, is_pinned).await?;
                Ok(plain(StatusCode::OK, ""))
            }
            Op::Import => {
                let (order, stream) = ollama::decode::import(&bytes)?;
                let daemon = Arc::clone(daemon);
                let work = async move |say| import::import(&daemon, order, &say).await;
                told(work, stream, used).await
            }
            _ => {
                let (order, stream) = ollama::decode::create(&bytes)?;
                let daemon = Arc::clone(daemon);
                let work = async move |say| create::create(&daemon, order, &say).await.map(drop);
                told(work, stream, used).await
            }
        }
    }

    /// What is known of one model.
    async fn tell<B>(&self, call: Call<B>) -> Result<Response<Body>, Refusal>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let daemon = &self.daemon;
        let asked = ollama::decode::show(&self.reader.read(call.body).await?.bytes)?;
        let body = match call.route.op {
            Op::Plan => ollama::plan::plan(plan::plan(daemon, &asked).await?),
            Op::Why => ollama::plan::why(plan::why(daemon, &asked).await?),
            _ => {
                let model = models::resolve(daemon, &asked).await?;
                let inspection = models::inspection(daemon, &model).await?;
                ollama::show::show(&model, &inspection)
            }
        };
        Ok(json(ollama::JSON_TYPE, body))
    }

    /// The routes that look after what is here.
    async fn care<B>(&self, call: Call<B>) -> Result<Response<Body>, Refusal>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let asked = ollama::decode::care(&self.reader.read(call.body).await?.bytes)?;
        match call.route.op {
            Op::Prune => {
                let freed = care::prune(&self.daemon, asked.partials).await?;
                Ok(json(ollama::JSON_TYPE, ollama::listing::freed(freed)))
            }
            Op::ChangeRoots => {
                care::change_roots(&self.daemon, asked.add, asked.remove).await?;
                Ok(plain(StatusCode::OK, ""))
            }
            _ => {
                let daemon = Arc::clone(&self.daemon);
                let work = async move |say| care::check(&daemon, asked.repair, &say).await;
                told(work, asked.stream, call.used).await
            }
        }
    }

    /// Who may call, and what the settings are.
    async fn rule<B>(&self, call: Call<B>) -> Result<Response<Body>, Refusal>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let keys = Arc::clone(&self.daemon.keys);
        if call.route.op == Op::Reload {
            let daemon = Arc::clone(&self.daemon);
            let wrong = |error: Error| Fault::invalid(error.to_string());
            let again = blocking(move || daemon.reload().map_err(wrong)).await?;
            return Ok(json(ollama::JSON_TYPE, ollama::listing::reloaded(&again)));
        }
        if call.route.op == Op::Replace {
            let asked = ollama::decode::replace(&self.reader.read(call.body).await?.bytes)?;
            replace::give::meet(&self.daemon, &asked, call.is_tcp)?;
            return Ok(plain(StatusCode::OK, ""));
        }
        if call.route.op == Op::Keys {
            let listed = blocking(move || Ok(keys.list())).await?;
            return Ok(json(ollama::JSON_TYPE, ollama::listing::keys(&listed)));
        }
        match ollama::decode::change_keys(&self.reader.read(call.body).await?.bytes)? {
            KeyOrder::Add(name, scope) => {
                let text = blocking(move || keys.add(&name, scope)).await?;
                Ok(json(ollama::JSON_TYPE, ollama::listing::new_key(&text)))
            }
            KeyOrder::Remove(name) => {
                blocking(move || keys.remove(&name)).await?;
                Ok(plain(StatusCode::OK, ""))
            }
        }
    }

    /// Takes a blob.
    async fn take<B>(&self, body: &mut B, digest: Digest) -> Result<Response<Body>, Refusal>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        // Without a length there is no telling; then the disk says it on the way.
        let _room = match body.size_hint().exact() {
            Some(bytes) => Some(blobs::make_room(&self.daemon, digest, bytes).await?),
            None => None,
        };
        let taking = blobs::take(&self.daemon, digest);
        while let Some(piece) = self.reader.piece(body).await? {
            if !piece.is_empty() && !taking.piece(piece).await {
                break;
            }
        }
        taking.end().await?;
        Ok(plain(StatusCode::CREATED, ""))
    }

    /// The routes that only look.
    async fn look(&self, op: Op) -> Result<Response<Body>, Fault> {
        Ok(match op {
            Op::Metrics => {
                let snapshot = metrics::read(&self.daemon).await;
                typed(prometheus::TYPE, Body::whole(prometheus::page(&snapshot)))
            }
            Op::Version => {
                json(ollama::JSON_TYPE, ollama::listing::version(self.daemon.listen.get()))
            }
            Op::List => {
                let listed = models::list(&self.daemon).await?;
                json(ollama::JSON_TYPE, ollama::listing::tags(listed))
            }
            Op::Pulls => {
                let jobs = &self.daemon.jobs;
                json(ollama::JSON_TYPE, ollama::listing::pulls(&jobs.list(), jobs.rate()))
            }
            Op::Roots => {
                json(ollama::JSON_TYPE, ollama::listing::roots(&self.daemon.store.roots()))
            }
            Op::Deleted => {
                let deleted = care::deleted(&self.daemon).await?;
                json(ollama::JSON_TYPE, ollama::listing::deleted(&deleted))
            }
            Op::Pins => {
                let pins = care::pins(&self.daemon).await?;
                json(ollama::JSON_TYPE, ollama::listing::pins(&pins))
            }
            Op::Config => json(ollama::JSON_TYPE, ollama::listing::config(&self.daemon.config())),
            Op::Usage => {
                let usage = care::usage(&self.daemon).await?;
                json(ollama::JSON_TYPE, ollama::listing::usage(&usage))
            }
            Op::Loaded => {
                let loaded = ps::list(&self.daemon).await;
                json(ollama::JSON_TYPE, ollama::listing::ps(loaded, Timestamp::now()))
            }
            _ => plain(StatusCode::OK, "Ollama is running"),
        })
    }
}

/// Does work that blocks on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, "a request's work panicked");
        Err(Fault::internal("v4 made a mistake; its log has the details"))
    })
}

/// Does what is asked and writes the answer: in one piece, or as it comes.
async fn answer(
    daemon: &Daemon,
    (ask, used): (Ask, Use),
    stream: bool,
    mut encoder: impl Encode + 'static,
    json_type: &'static str,
) -> Result<Response<Body>, Refusal> {
    match generate::start(daemon, ask, used).await? {
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

/// Answers a request of OpenAI's clients.
async fn openai_answer(
    daemon: &Daemon,
    request: openai::decode::Request<impl Encode + 'static>,
    (lane, caller, parent, used): (Option<Lane>, Caller, Option<Parent>, Use),
) -> Result<Response<Body>, Refusal> {
    let (mut ask, stream) = (request.ask, request.stream);
    ask.options.lane = lane.or(ask.options.lane);
    (ask.caller, ask.parent) = (caller::user(&caller, request.user.as_deref()), parent);
    answer(daemon, (ask, used), stream, request.encoder, openai::JSON_TYPE).await
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

/// Writes the progress of a push as it comes, or only its last word.
async fn pushed(watch: v4_pull::Watch, stream: bool) -> Result<Response<Body>, Refusal> {
    if !stream {
        return match watch.last().await.stage {
            v4_pull::Stage::Failed(fault) => Err(fault.into()),
            _ => Ok(json(ollama::JSON_TYPE, ollama::listing::PullLines::last())),
        };
    }
    let state = Some((watch, ollama::listing::PullLines::of_push()));
    let body = futures_util::stream::unfold(state, async |state| {
        let (mut watch, mut lines) = state?;
        let progress = watch.next().await?;
        let piece = progress_lines(&mut lines, &progress);
        Some((piece, Some((watch, lines)).filter(|_| !progress.is_last())))
    });
    Ok(typed(ollama::STREAM_TYPE, Body::stream(body)))
}

/// How a task ended.
async fn ended(work: tokio::task::JoinHandle<Result<(), Fault>>) -> Result<(), Fault> {
    work.await.unwrap_or_else(|error| {
        tracing::error!(%error, "a request's task panicked");
        Err(Fault::internal("v4 made a mistake; its log has the details"))
    })
}

/// Does work that tells how far it is, a line at a time, or only its last word.
async fn told<F>(
    work: impl FnOnce(create::Say) -> F,
    stream: bool,
    used: Use,
) -> Result<Response<Body>, Refusal>
where
    F: Future<Output = Result<(), Fault>> + Send + 'static,
{
    let (say, mut lines) = tokio::sync::mpsc::channel(limits::CREATE_LINES);
    let work = work(say);
    let work = tokio::spawn(async move {
        let done = work.await;
        drop(used);
        done
    });
    // What cannot be made at all is a refusal, before the first byte.
    let first = lines.recv().await;
    if first.is_none() || !stream {
        while lines.recv().await.is_some() {}
        ended(work).await?;
        return Ok(json(ollama::JSON_TYPE, ollama::listing::PullLines::last()));
    }
    let state = Some((first, lines, work));
    let body = futures_util::stream::unfold(state, async |state| {
        let (first, mut lines, work) = state?;
        let line = match first {
            Some(line) => Some(line),
            None => lines.recv().await,
        };
        if let Some(line) = line {
            let piece = ollama::listing::PullLines::status_line(&line);
            return Some((Bytes::from(piece), Some((None, lines, work))));
        }
        let piece = match ended(work).await {
            Ok(()) => ollama::listing::PullLines::status_line("success"),
            Err(fault) => crate::api::line(&error::ollama_body(&fault)),
        };
        Some((piece.into(), None))
    });
    Ok(typed(ollama::STREAM_TYPE, Body::stream(body)))
}

/// Writes the progress of a pull as it comes, or only its last word. Where another daemon goes on
/// with it, that one's words are passed on.
async fn follow(mut pulling: pull::Pulling, stream: bool) -> Result<Response<Body>, Refusal> {
    if stream {
        let body = Body::stream(lines(pulling));
        return Ok(typed(ollama::STREAM_TYPE, body));
    }
    while let Some(progress) = pulling.next().await {
        match progress.stage {
            v4_pull::Stage::Failed(fault) => return Err(fault.into()),
            v4_pull::Stage::Done { .. } => break,
            v4_pull::Stage::Moved => {
                pulling.elsewhere().await?.end().await?;
                break;
            }
            _ => {}
        }
    }
    Ok(json(ollama::JSON_TYPE, ollama::listing::PullLines::last()))
}

/// Who tells of a pull.
enum Teller {
    Us(pull::Pulling, ollama::listing::PullLines),
    Other(replace::relay::Lines),
}

/// The lines of a pull. A failure after the first byte is a line too.
fn lines(pulling: pull::Pulling) -> impl futures_util::Stream<Item = Bytes> + Send {
    let state = Some(Teller::Us(pulling, ollama::listing::PullLines::default()));
    futures_util::stream::unfold(state, async |state| {
        let mut teller = state?;
        loop {
            let (pulling, lines) = match &mut teller {
                Teller::Us(pulling, lines) => (pulling, lines),
                Teller::Other(lines) => return Some((lines.next().await?, Some(teller))),
            };
            let progress = pulling.next().await?;
            if progress.stage == v4_pull::Stage::Moved {
                match pulling.elsewhere().await {
                    Ok(lines) => teller = Teller::Other(lines),
                    Err(fault) => {
                        return Some((crate::api::line(&error::ollama_body(&fault)).into(), None));
                    }
                }
                continue;
            }
            let piece = progress_lines(lines, &progress);
            if progress.is_last() {
                return Some((piece, None));
            }
            if !piece.is_empty() {
                return Some((piece, Some(teller)));
            }
        }
    })
}

/// The answer to a method that none of a path's routes has.
fn wrong_method(routes: &[&Route]) -> Response<Body> {
    let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "405 method not allowed");
    let mut allowed: Vec<&str> = routes.iter().map(|route| route.method.as_str()).collect();
    if allowed.contains(&"GET") {
        allowed.insert(1, "HEAD");
    }
    let allow = HeaderValue::try_from(allowed.join(", "));
    response.headers_mut().insert(header::ALLOW, allow.expect("methods are a header's value"));
    response
}

/// The lines of a progress, with its failure.
fn progress_lines(lines: &mut ollama::listing::PullLines, progress: &v4_pull::Progress) -> Bytes {
    let mut piece = lines.lines(progress);
    if let v4_pull::Stage::Failed(fault) = &progress.stage {
        piece.extend(crate::api::line(&error::ollama_body(fault)));
    }
    piece.into()
}

/// A part of a path as it was meant: clients write the colon of a tag as `%3A`. `None` where it is
/// not UTF-8.
pub fn percent_decoded(text: &str) -> Option<String> {
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
        Surface::Oci => json("application/json", bytes(&error::registry_body(&refusal.fault))),
    };
    *response.status_mut() = refusal.status;
    if refusal.status == StatusCode::UNAUTHORIZED {
        // Clients of registries send a password only to who asks for one.
        let basic = surface == Surface::Oci;
        let challenge = if basic { "Basic realm=\"v4\"" } else { "Bearer realm=\"v4\"" };
        let challenge = HeaderValue::from_static(challenge);
        response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    }
    if refusal.status == StatusCode::SERVICE_UNAVAILABLE {
        let seconds = HeaderValue::from_static(error::RETRY_AFTER_S);
        response.headers_mut().insert(header::RETRY_AFTER, seconds);
    }
    response
}

#[cfg(test)]
mod tests;
