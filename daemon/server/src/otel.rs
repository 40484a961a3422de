//! Spans of answers for a collector of OpenTelemetry: OTLP as JSON over HTTP, or over TLS with the
//! client of pulls. Plain HTTP needs no certificates of the system, and no proxy.
//!
//! An answer never waits for it: spans go into a bounded queue, and what does not fit, or no
//! collector takes, is counted and gone. Prompts and answers are in none.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpStream, sync::mpsc, time::timeout};
use v4_proto::{Done, Fault, Finish};
use v4_pull::Poster;

use crate::{limits, parent::Parent};

/// Where spans go.
#[derive(Debug)]
pub struct Exporter {
    sender: mpsc::Sender<Value>,
    dropped: Arc<AtomicU64>,
}

impl Exporter {
    /// Sends to the collector at `url` with these header fields. Must be called on a tokio runtime.
    pub fn start(url: &str, headers: Vec<(String, String)>) -> Arc<Self> {
        let (sender, receiver) = mpsc::channel(limits::SPANS);
        let dropped = Arc::new(AtomicU64::new(0));
        let collector = Collector::new(url, headers);
        tokio::spawn(send_all(collector, receiver, Arc::clone(&dropped)));
        Arc::new(Self { sender, dropped })
    }

    /// Spans that nobody got.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn put(&self, span: Value) {
        if self.sender.try_send(span).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Where spans are posted.
struct Collector {
    /// Host and port, for people and for the header.
    host: String,
    way: Way,
}

enum Way {
    /// To this path, with these fields.
    Plain(String, Vec<(String, String)>),
    Tls(Poster),
    /// It cannot be reached, and why.
    None(String),
}

impl Collector {
    /// The collector at a URL that the settings have checked.
    fn new(url: &str, headers: Vec<(String, String)>) -> Self {
        let base = url.trim_end_matches('/');
        let full = if base.ends_with(PATH) { base.to_owned() } else { format!("{base}{PATH}") };
        let uri: Uri = match full.parse() {
            Ok(uri) => uri,
            Err(error) => {
                let why = format!("its URL cannot be meant: {error}");
                return Self { host: String::new(), way: Way::None(why) };
            }
        };
        let host = uri.host().unwrap_or_default();
        let is_plain = uri.scheme_str() == Some("http");
        let port = uri.port_u16().unwrap_or(if is_plain { 80 } else { 443 });
        let host = format!("{host}:{port}");
        if is_plain {
            return Self { host, way: Way::Plain(uri.path().to_owned(), headers) };
        }
        let way = match Poster::new(full, headers, limits::SPAN_SEND) {
            Ok(poster) => Way::Tls(poster),
            Err(error) => Way::None(error.to_string()),
        };
        Self { host, way }
    }

    async fn send(&self, spans: &[Value]) -> Result<(), String> {
        let body = body(spans);
        let status = match &self.way {
            Way::Plain(path, headers) => plain(&self.host, path, headers, body).await?,
            Way::Tls(poster) => poster.post(body).await?,
            Way::None(why) => return Err(why.clone()),
        };
        match status {
            200 | 202 => Ok(()),
            status => Err(format!("it answered {status}")),
        }
    }
}

/// What collectors call the place for spans.
const PATH: &str = "/v1/traces";

/// Sends what comes, several spans at a time, until the daemon ends.
async fn send_all(collector: Collector, mut spans: mpsc::Receiver<Value>, dropped: Arc<AtomicU64>) {
    let mut is_heard = true;
    while let Some(first) = spans.recv().await {
        let mut batch = vec![first];
        // What ends within a moment goes together.
        let more = async {
            while batch.len() < limits::SPAN_BATCH {
                let Some(span) = spans.recv().await else { break };
                batch.push(span);
            }
        };
        drop(timeout(limits::SPAN_WAIT, more).await);
        let n = batch.len() as u64;
        let sent = timeout(limits::SPAN_SEND, collector.send(&batch)).await;
        let why = match sent {
            Ok(Ok(())) => None,
            Ok(Err(why)) => Some(why),
            Err(_) => Some("no answer in time".to_owned()),
        };
        if let Some(why) = &why {
            dropped.fetch_add(n, Ordering::Relaxed);
            if is_heard {
                let host = &collector.host;
                tracing::warn!(host, why, "the collector takes no spans; they are dropped");
            }
        }
        is_heard = why.is_none();
    }
}

/// Spans in OTLP's words.
fn body(spans: &[Value]) -> Vec<u8> {
    let service = attribute("service.name", json!({"stringValue": "v4"}));
    let version = json!({"stringValue": env!("CARGO_PKG_VERSION")});
    let body = json!({"resourceSpans": [{
        "resource": {"attributes": [service, attribute("service.version", version)]},
        "scopeSpans": [{"scope": {"name": "v4"}, "spans": spans}],
    }]});
    body.to_string().into_bytes()
}

/// Posts a body over plain HTTP; gives the status of the answer.
async fn plain(
    host: &str,
    path: &str,
    headers: &[(String, String)],
    body: Vec<u8>,
) -> Result<u16, String> {
    let wire = TcpStream::connect(host).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(wire))
        .await
        .map_err(|error| error.to_string())?;
    let mut request = Request::post(path)
        .header(header::HOST, host)
        .header(header::CONTENT_TYPE, "application/json");
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let request = request.body(Full::<Bytes>::new(body.into()));
    let request = request.map_err(|error| error.to_string())?;
    let answer = async {
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        Ok(answer.status().as_u16())
    };
    tokio::select! {
        answer = answer => answer,
        _ = connection => Err("it hung up".to_owned()),
    }
}

fn attribute(key: &str, value: Value) -> Value {
    let mut attribute = json!({ "key": key });
    attribute["value"] = value;
    attribute
}

fn text(key: &str, value: &str) -> Value {
    attribute(key, json!({"stringValue": value}))
}

/// 64-bit numbers are text in OTLP's JSON.
fn number(key: &str, value: u64) -> Value {
    attribute(key, json!({"intValue": value.to_string()}))
}

/// One answer, from its request to its end. Dropped without one, its client left.
#[derive(Debug)]
pub struct Trace {
    exporter: Arc<Exporter>,
    operation: &'static str,
    model: String,
    parent: Option<Parent>,
    began: SystemTime,
    is_over: bool,
}

impl Trace {
    /// The answer of `model` begins, within a span of its client or in a trace of its own.
    pub fn new(
        exporter: &Arc<Exporter>,
        operation: &'static str,
        model: String,
        parent: Option<Parent>,
    ) -> Self {
        let (exporter, began) = (Arc::clone(exporter), SystemTime::now());
        Self { exporter, operation, model, parent, began, is_over: false }
    }

    /// It ended as it should.
    pub fn done(mut self, done: &Done, load: Duration) {
        let usage = &done.usage;
        let finish = match done.finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
            Finish::Cancelled => "cancelled",
        };
        let reasons = json!({"arrayValue": {"values": [{"stringValue": finish}]}});
        let facts = vec![
            number("gen_ai.usage.input_tokens", usage.prompt_tokens.into()),
            number("gen_ai.usage.output_tokens", usage.completion_tokens.into()),
            number("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens.into()),
            attribute("gen_ai.response.finish_reasons", reasons),
        ];
        let (began, end) = (nanos(self.began), nanos(SystemTime::now()));
        let load = u64::try_from(load.as_nanos()).unwrap_or(u64::MAX);
        let decode = end.saturating_sub(usage.completion_ns).max(began);
        let prefill = decode.saturating_sub(usage.prompt_ns).max(began);
        let mut parts = vec![("prefill", prefill, decode), ("decode", decode, end)];
        if load > 0 {
            parts.insert(0, ("load", began, began.saturating_add(load).min(prefill)));
        }
        self.tell(end, facts, None, &parts);
    }

    /// It ended with a fault.
    pub fn failed(mut self, fault: &Fault) {
        let code = serde_json::to_value(fault.code).unwrap_or_default();
        let facts = vec![text("error.type", code.as_str().unwrap_or("internal"))];
        self.tell(nanos(SystemTime::now()), facts, Some(&fault.message), &[]);
    }

    fn tell(
        &mut self,
        end: u64,
        facts: Vec<Value>,
        error: Option<&str>,
        parts: &[(&str, u64, u64)],
    ) {
        self.is_over = true;
        let (parent, root) = (self.parent.take(), id(8));
        let trace = parent.as_ref().map_or_else(|| id(16), |parent| parent.trace.clone());
        let mut attributes = vec![
            text("gen_ai.operation.name", self.operation),
            text("gen_ai.provider.name", "v4"),
            text("gen_ai.request.model", &self.model),
        ];
        attributes.extend(facts);
        let status = error.map_or_else(|| json!({}), |why| json!({"code": 2, "message": why}));
        // Kind 2 is a server's, 1 is of the inside.
        let mut first = json!({
            "traceId": trace, "spanId": root, "kind": 2,
            "name": format!("{} {}", self.operation, self.model),
            "startTimeUnixNano": nanos(self.began).to_string(),
            "endTimeUnixNano": end.to_string(),
            "attributes": attributes, "status": status,
        });
        let state = parent.as_ref().and_then(|parent| parent.state.clone());
        if let Some(parent) = parent {
            first["parentSpanId"] = parent.span.into();
        }
        if let Some(state) = &state {
            first["traceState"] = state.as_str().into();
        }
        self.exporter.put(first);
        for (name, start, end) in parts {
            self.exporter.put(json!({
                "traceId": trace, "spanId": id(8), "parentSpanId": root, "kind": 1,
                "name": name,
                "startTimeUnixNano": start.to_string(), "endTimeUnixNano": end.to_string(),
            }));
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if !self.is_over {
            let facts = vec![text("error.type", "cancelled")];
            self.tell(nanos(SystemTime::now()), facts, Some("the client left"), &[]);
        }
    }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// So many random bytes in hex; zeros, which collectors refuse, if the system has none.
fn id(n_bytes: usize) -> String {
    let mut bytes = [0; 16];
    let flags = rustix::rand::GetRandomFlags::empty();
    if let Err(error) = rustix::rand::getrandom(&mut bytes, flags) {
        tracing::debug!(%error, "no random bytes for a span");
    }
    let number = u128::from_be_bytes(bytes) >> (8 * (16 - n_bytes));
    format!("{number:0width$x}", width = 2 * n_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_queue_drops_and_counts_and_nobody_waits() {
        let (sender, receiver) = mpsc::channel(limits::SPANS);
        let exporter = Arc::new(Exporter { sender, dropped: Arc::default() });
        for _ in 0..limits::SPANS + 3 {
            drop(Trace::new(&exporter, "chat", "m".to_owned(), None));
        }
        assert_eq!((receiver.len(), exporter.dropped()), (limits::SPANS, 3));
    }

    #[tokio::test]
    async fn a_collector_is_where_its_url_says() {
        let of = |url: &str| {
            let Collector { host, way } = Collector::new(url, Vec::new());
            match way {
                Way::Plain(path, _) => format!("{host} {path}"),
                Way::Tls(_) => format!("{host} tls"),
                Way::None(why) => why,
            }
        };
        assert_eq!(of("http://127.0.0.1:4318"), "127.0.0.1:4318 /v1/traces");
        assert_eq!(of("http://otel/base/"), "otel:80 /base/v1/traces");
        assert_eq!(of("http://[::1]:1/v1/traces"), "[::1]:1 /v1/traces");
        assert_eq!(of("https://otel.example"), "otel.example:443 tls");
    }

    #[test]
    fn ids_have_their_length_and_differ() {
        assert_eq!((id(16).len(), id(8).len()), (32, 16));
        assert_ne!(id(8), id(8));
    }
}
