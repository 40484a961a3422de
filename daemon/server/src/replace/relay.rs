//! Words of the new daemon for those who ask the old one: the rest of a pull that moved.

use bytes::Bytes;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use v4_proto::{Code, Fault, ModelName};

use super::client::{self, Answer};
use crate::daemon::Daemon;

/// What the new daemon writes of a pull.
#[derive(Debug)]
pub struct Lines(Answer);

/// Watches a pull of the new daemon.
///
/// # Errors
/// `upstream` when it does not answer.
pub async fn pull(daemon: &Daemon, name: &ModelName) -> Result<Lines, Fault> {
    let body = json!({"model": name, "stream": true}).to_string();
    let answer = match UnixStream::connect(&daemon.config().socket).await {
        Ok(wire) => client::post(wire, "/api/pull", body.into()).await,
        Err(error) => Err(error),
    };
    answer.map(Lines).map_err(|error| {
        Fault::new(
            Code::Upstream,
            format!("the new v4 goes on with the pull of '{name}' and does not answer: {error}"),
        )
    })
}

impl Lines {
    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            let frame = self.0.response.frame().await?.ok()?;
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
