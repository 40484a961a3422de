//! `http(s)` with ranges: what comes is appended only when it is what was asked for.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    time::Duration,
};

use reqwest::{
    Response, StatusCode,
    header::{
        ACCEPT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE, RANGE, RETRY_AFTER,
    },
};

use super::{Net, host};
use crate::{
    error::{PullError, shown},
    limits,
    write::Sink,
};

/// How one request failed.
enum Failure {
    /// For good.
    Last(PullError),
    /// It may be tried again, after a while where the server says so.
    Again(PullError, Option<Duration>),
}

impl From<PullError> for Failure {
    fn from(error: PullError) -> Self {
        Self::Last(error)
    }
}

/// Counts tries that bring nothing, and the waits between them.
struct Tries<'a> {
    net: &'a Net,
    n: u32,
    has_come: bool,
}

impl<'a> Tries<'a> {
    fn new(net: &'a Net) -> Self {
        Self { net, n: 0, has_come: false }
    }

    /// After a failure that came behind `n_new` new bytes: waits, or gives the error back.
    async fn again(&mut self, failure: Failure, n_new: u64) -> Result<(), PullError> {
        let (error, after) = match failure {
            Failure::Last(error) => return Err(error),
            Failure::Again(error, after) => (error, after),
        };
        self.has_come |= n_new > 0;
        self.n = if n_new >= limits::TRY_BYTES { 1 } else { self.n + 1 };
        // A host that never answered gets no second try: the next source may be better.
        let is_dead = !self.has_come && matches!(error, PullError::Unreachable { .. });
        if is_dead || self.n >= self.net.config.tries {
            return Err(error);
        }
        let backoff = self.net.config.backoff.saturating_mul(1 << (self.n - 1).min(10));
        let wait = after.map_or(backoff, |after| after.max(backoff)).min(limits::BACKOFF_MAX);
        tracing::debug!(%error, ?wait, "trying again");
        tokio::time::sleep(jitter(wait)).await;
        Ok(())
    }
}

/// Between all and five quarters of a wait, so that many clients do not come back at once.
fn jitter(wait: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    wait + wait.mul_f64(0.25 * (random >> 40) as f64 / (1_u64 << 24) as f64)
}

/// Reads a URL into the sink, from where the sink is. Returns the size of the whole.
pub(crate) async fn read(
    net: &Net,
    url: &str,
    expected: Option<u64>,
    sink: &mut Sink<'_>,
) -> Result<u64, PullError> {
    let mut tries = Tries::new(net);
    let mut tag = None;
    loop {
        let before = sink.have();
        match attempt(net, url, expected, &mut tag, sink).await {
            Ok(size) => return Ok(size),
            Err(failure) => tries.again(failure, sink.have() - before).await?,
        }
    }
}

/// Reads a small answer whole.
pub(crate) async fn read_small(
    net: &Net,
    url: &str,
    max_bytes: usize,
) -> Result<Vec<u8>, PullError> {
    let mut tries = Tries::new(net);
    loop {
        match attempt_small(net, url, max_bytes).await {
            Ok(bytes) => return Ok(bytes),
            Err(failure) => tries.again(failure, 0).await?,
        }
    }
}

async fn attempt_small(net: &Net, url: &str, max_bytes: usize) -> Result<Vec<u8>, Failure> {
    let mut response = send(net, url, HeaderMap::new()).await?;
    check_status(url, &response)?;
    let mut bytes = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| broken(net, url, error))? {
        if bytes.len() + piece.len() > max_bytes {
            let what = format!("more than {max_bytes} bytes");
            return Err(PullError::Answer { url: shown(url), what }.into());
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// One request and its body.
async fn attempt(
    net: &Net,
    url: &str,
    expected: Option<u64>,
    tag: &mut Option<HeaderValue>,
    sink: &mut Sink<'_>,
) -> Result<u64, Failure> {
    let answer = |what: String| PullError::Answer { url: shown(url), what };
    let have = sink.have();
    let mut response = send(net, url, range_headers(have, tag.as_ref())).await?;
    if response.status() == StatusCode::RANGE_NOT_SATISFIABLE && have > 0 {
        // All of this part is here, when the server says how long it is.
        return match ContentRange::parse(response.headers()) {
            Some(ContentRange { sent: None, size: Some(size) })
                if size <= have && expected.is_none_or(|all| all == size) =>
            {
                Ok(size)
            }
            _ => Err(PullError::Changed { url: shown(url) }.into()),
        };
    }
    check_status(url, &response)?;
    check_tag(url, tag, response.headers())?;
    let (mut at, size) = match response.status() {
        StatusCode::PARTIAL_CONTENT => match ContentRange::parse(response.headers()) {
            Some(ContentRange { sent: Some((start, end)), size })
                if start == have && end >= start =>
            {
                // Where the server does not say how long the whole is, this was asked to its end.
                (start, Some(size.unwrap_or(end.saturating_add(1))))
            }
            _ => {
                return Err(Failure::Again(
                    answer("another range than was asked for".into()),
                    None,
                ));
            }
        },
        _ => (0, response.content_length()),
    };
    if let (Some(size), Some(expected)) = (size, expected)
        && size != expected
    {
        return Err(answer(format!("a file of {size} bytes, expected were {expected}")).into());
    }
    if let Some(size) = size.filter(|size| *size <= have && at == 0) {
        return Ok(size);
    }
    while let Some(piece) = response.chunk().await.map_err(|error| broken(net, url, error))? {
        let len = piece.len() as u64;
        sink.write_at(at, piece).await?;
        at += len;
    }
    match size.or(expected) {
        Some(size) if at < size => {
            Err(Failure::Again(answer(format!("{at} bytes of {size}")), None))
        }
        _ => Ok(at),
    }
}

/// Asks for the rest, and only if it is the rest of the same.
fn range_headers(have: u64, tag: Option<&HeaderValue>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if have > 0 {
        let range = format!("bytes={have}-");
        headers.insert(RANGE, HeaderValue::try_from(range).expect("digits are a header's value"));
        // A weak tag may not be compared for ranges (RFC 9110, 13.1.5).
        if let Some(tag) = tag.filter(|tag| !tag.as_bytes().starts_with(b"W/")) {
            headers.insert(IF_RANGE, tag.clone());
        }
    }
    headers
}

async fn send(net: &Net, url: &str, headers: HeaderMap) -> Result<Response, Failure> {
    let request = net.client()?.get(url).header(ACCEPT_ENCODING, "identity").headers(headers);
    request.send().await.map_err(|source| {
        let source = source.without_url();
        if source.is_connect() {
            Failure::Again(PullError::Unreachable { host: host(url), source }, None)
        } else if source.is_redirect() || source.is_builder() {
            Failure::Last(PullError::Broken { url: shown(url), source })
        } else {
            broken(net, url, source)
        }
    })
}

/// An error in the middle of an answer.
fn broken(net: &Net, url: &str, source: reqwest::Error) -> Failure {
    let url = shown(url);
    let source = source.without_url();
    let error = if source.is_timeout() {
        PullError::Stalled { url, seconds: net.config.stall_timeout.as_secs() }
    } else {
        PullError::Broken { url, source }
    };
    Failure::Again(error, None)
}

fn check_status(url: &str, response: &Response) -> Result<(), Failure> {
    let status = response.status();
    if matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
        return Ok(());
    }
    let error = PullError::Status { url: shown(url), status: status.as_u16() };
    let is_passing = status.is_server_error()
        || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
    if !is_passing {
        return Err(Failure::Last(error));
    }
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let after = seconds.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
    Err(Failure::Again(error, after))
}

/// Remembers the first tag; another one later means that the bytes here belong to something else.
fn check_tag(url: &str, tag: &mut Option<HeaderValue>, headers: &HeaderMap) -> Result<(), Failure> {
    let now = headers.get(ETAG);
    if tag.is_some() && now.is_some() && tag.as_ref() != now {
        return Err(PullError::Changed { url: shown(url) }.into());
    }
    if tag.is_none() {
        *tag = now.cloned();
    }
    Ok(())
}

/// What `Content-Range` says, as far as it says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ContentRange {
    /// The first and the last byte of what is sent.
    sent: Option<(u64, u64)>,
    /// Bytes of the whole.
    size: Option<u64>,
}

impl ContentRange {
    fn parse(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
        let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
        let sent = match range.split_once('-') {
            Some((first, last)) => Some((first.parse().ok()?, last.parse().ok()?)),
            None => None,
        };
        Some(Self { sent, size: size.parse().ok() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read() {
        for (text, expected) in [
            ("bytes 5-9/10", Some((Some((5, 9)), Some(10)))),
            ("bytes 5-9/*", Some((Some((5, 9)), None))),
            ("bytes */10", Some((None, Some(10)))),
            ("bytes 5-/10", None),
            ("bytes -5/10", None),
            ("5-9/10", None),
            ("bytes 99999999999999999999-1/10", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, HeaderValue::from_static(text));
            let expected = expected.map(|(sent, size)| ContentRange { sent, size });
            assert_eq!(ContentRange::parse(&headers), expected, "{text}");
        }
    }

    #[test]
    fn a_wait_never_shrinks_nor_grows_by_more_than_a_quarter() {
        let wait = Duration::from_secs(4);
        for _ in 0..100 {
            assert!((wait..=wait.mul_f64(1.25)).contains(&jitter(wait)));
        }
    }
}
