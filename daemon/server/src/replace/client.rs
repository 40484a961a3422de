//! A request to the daemon at a unix socket.

use std::{fmt, io};

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, task::JoinHandle, time::timeout};

use crate::limits;

/// An answer, and the task that brings its body; dropped, the connection ends.
pub struct Answer {
    /// The answer.
    pub response: Response<Incoming>,
    connection: JoinHandle<()>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Posts JSON to `path`; the head of the answer must come within [`limits::HANDOVER_READY`].
///
/// # Errors
/// Why there is no answer.
pub async fn post(wire: UnixStream, path: &str, json: Vec<u8>) -> io::Result<Answer> {
    let asked = timeout(limits::HANDOVER_READY, ask(wire, path, json)).await;
    asked.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

async fn ask(wire: UnixStream, path: &str, json: Vec<u8>) -> io::Result<Answer> {
    let shaken = hyper::client::conn::http1::handshake(TokioIo::new(wire)).await;
    let (mut sender, connection) = shaken.map_err(io::Error::other)?;
    let connection = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the words of the other v4 broke off");
        }
    });
    let request = http::Request::post(path)
        .header(http::header::HOST, "localhost")
        .body(Full::<Bytes>::new(json.into()))
        .map_err(io::Error::other)?;
    match sender.send_request(request).await {
        Ok(response) => Ok(Answer { response, connection }),
        Err(error) => {
            connection.abort();
            Err(io::Error::other(error))
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("status", &self.response.status()).finish_non_exhaustive()
    }
}
