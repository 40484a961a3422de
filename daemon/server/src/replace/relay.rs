//! Words of the new daemon for those who ask the old one: the rest of a pull that moved.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::UnixStream, task::JoinHandle};
use v4_proto::{Code, Fault, ModelName};

use crate::daemon::Daemon;

/// What the new daemon writes of a pull.
pub struct Lines {
    body: hyper::body::Incoming,
    connection: JoinHandle<()>,
}

/// Watches a pull of the new daemon.
///
/// # Errors
/// `upstream` when it does not answer.
pub async fn pull(daemon: &Daemon, name: &ModelName) -> Result<Lines, Fault> {
    let failed = |error: &dyn std::fmt::Display| {
        Fault::new(
            Code::Upstream,
            format!("the new v4 goes on with the pull of '{name}' and does not answer: {error}"),
        )
    };
    let wire =
        UnixStream::connect(&daemon.config().socket).await.map_err(|error| failed(&error))?;
    let shaken = hyper::client::conn::http1::handshake(TokioIo::new(wire)).await;
    let (mut sender, connection) = shaken.map_err(|error| failed(&error))?;
    let connection = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the words of the new v4 broke off");
        }
    });
    let body = json!({"model": name, "stream": true}).to_string();
    let request = http::Request::post("/api/pull")
        .header(http::header::HOST, "localhost")
        .body(Full::<Bytes>::new(body.into()))
        .map_err(|error| failed(&error))?;
    let answer = sender.send_request(request).await.map_err(|error| failed(&error))?;
    Ok(Lines { body: answer.into_body(), connection })
}

impl Lines {
    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            let frame = self.body.frame().await?.ok()?;
            if let Ok(bytes) = frame.into_data() {
                return Some(bytes);
            }
        }
    }

    /// Waits for the end of the pull.
    ///
    /// # Errors
    /// The fault that ended it.
    pub async fn end(mut self) -> Result<(), Fault> {
        let mut last = Vec::new();
        while let Some(bytes) = self.next().await {
            last.extend_from_slice(&bytes);
            let start = last[..last.len().saturating_sub(1)].iter().rposition(|b| *b == b'\n');
            last.drain(..start.map_or(0, |start| start + 1));
        }
        let line: Value = serde_json::from_slice(&last).unwrap_or_default();
        if line["status"] == "success" {
            return Ok(());
        }
        let code = serde_json::from_value(line["code"].clone()).unwrap_or(Code::Upstream);
        let why = line["error"].as_str().unwrap_or("the new v4 ended in the middle of the pull");
        Err(Fault::new(code, why))
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.connection.abort();
    }
}
