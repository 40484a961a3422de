//! `http(s)`: requests that are tried again, and files that are read from their start. Larger ones
//! are read in several ranges at a time, by `ranges`.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use reqwest::{
    Method, Response, StatusCode, Url,
    header::{
        ACCEPT_ENCODING, AUTHORIZATION, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE,
        RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
    },
};

use super::{
    Net, host,
    ranges::{self, Mirror},
    registry::Session,
};
use crate::{
    error::{PullError, shown},
    limits,
    write::Sink,
};

/// What opens a URL.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Key<'a> {
    /// Nothing is needed.
    None,
    /// A token that is known before.
    Bearer(&'a HeaderValue),
    /// A registry, which says what it wants.
    Registry(&'a Session),
}

/// Where bytes are asked for: a URL, what opens it, and where it led to last. A redirect is
/// remembered, since the place it leads to is often open for a while only and asked for many times;
/// when that place refuses, the URL itself is asked again.
pub(crate) struct Link<'a> {
    pub net: &'a Net,
    pub url: &'a str,
    key: Key<'a>,
    target: Mutex<Option<Url>>,
}

impl<'a> Link<'a> {
    pub fn new(net: &'a Net, url: &'a str, key: Key<'a>) -> Self {
        Self { net, url, key, target: Mutex::default() }
    }

    fn target(&self) -> std::sync::MutexGuard<'_, Option<Url>> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks with a method.
    pub async fn send(&self, method: Method, headers: HeaderMap) -> Result<Response, Failure> {
        self.send_with(method, headers, Bytes::new()).await
    }

    /// Asks with a method and a body.
    pub async fn send_with(
        &self,
        method: Method,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response, Failure> {
        let mut is_opened = false;
        loop {
            let target = self.target().clone();
            let client = self.net.client()?;
            let mut request = match &target {
                Some(url) => client.request(method.clone(), url.clone()),
                None => client.request(method.clone(), self.url),
            };
            request = request.header(ACCEPT_ENCODING, "identity").headers(headers.clone());
            // Whoever was redirected to is not told what opens the first place.
            if target.is_none()
                && let Some(value) = self.authorization()
            {
                request = request.header(AUTHORIZATION, value);
            }
            if !body.is_empty() {
                request = request.body(body.clone());
            }
            let sent = request.send().await;
            let refuses =
                |status: StatusCode| matches!(status.as_u16(), 400 | 401 | 403 | 404 | 410);
            if target.is_some() && sent.as_ref().map_or(true, |answer| refuses(answer.status())) {
                *self.target() = None;
                continue;
            }
            let answer = sent.map_err(|source| self.unsent(source))?;
            if answer.status() == StatusCode::UNAUTHORIZED && !is_opened {
                is_opened = true;
                if self.open(answer.headers()).await? {
                    continue;
                }
            }
            if answer.status().is_success() && target.is_none() && answer.url().as_str() != self.url
            {
                *self.target() = Some(answer.url().clone());
            }
            return Ok(answer);
        }
    }

    fn authorization(&self) -> Option<HeaderValue> {
        match self.key {
            Key::None => None,
            Key::Bearer(value) => Some(value.clone()),
            Key::Registry(session) => session.authorization(),
        }
    }

    /// Does what a refusal asks for. Returns whether the request may be sent again.
    async fn open(&self, headers: &HeaderMap) -> Result<bool, Failure> {
        let Key::Registry(session) = self.key else { return Ok(false) };
        let challenges: Vec<&str> =
            headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|one| one.to_str().ok()).collect();
        Ok(session.open(self.net, &challenges).await?)
    }

    /// A request that got no answer.
    fn unsent(&self, source: reqwest::Error) -> Failure {
        let source = source.without_url();
        if source.is_connect() {
            Failure::Again(PullError::Unreachable { host: host(self.url), source }, None)
        } else if source.is_redirect() || source.is_builder() {
            Failure::Last(PullError::Broken { url: shown(self.url), source })
        } else {
            self.broken(source)
        }
    }

    /// An error in the middle of an answer.
    fn broken(&self, source: reqwest::Error) -> Failure {
        let source = source.without_url();
        if source.is_timeout() {
            return self.stalled();
        }
        Failure::Again(PullError::Broken { url: shown(self.url), source }, None)
    }

    fn stalled(&self) -> Failure {
        let seconds = self.net.config.stall_timeout.as_secs();
        Failure::Again(PullError::Stalled { url: shown(self.url), seconds }, None)
    }

    /// An answer that breaks the protocol.
    pub fn wrong(&self, what: impl Into<String>) -> PullError {
        PullError::Answer { url: shown(self.url), what: what.into() }
    }

    /// What is there now is not what was there before.
    pub fn changed(&self) -> PullError {
        PullError::Changed { url: shown(self.url) }
    }
}

/// A body as it comes. One that drips counts as stalled, however often a byte comes.
pub(crate) struct Drops<'a> {
    link: &'a Link<'a>,
    response: Response,
    /// Time that was waited for the last [`limits::TRY_BYTES`], and how many of them came.
    waited: Duration,
    n_came: u64,
}

impl<'a> Drops<'a> {
    pub fn of(link: &'a Link<'a>, response: Response) -> Self {
        Self { link, response, waited: Duration::ZERO, n_came: 0 }
    }

    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        let asked = Instant::now();
        let piece = self.response.chunk().await.map_err(|error| self.link.broken(error))?;
        self.waited += asked.elapsed();
        self.n_came += piece.as_ref().map_or(0, |piece| piece.len() as u64);
        if self.n_came >= limits::TRY_BYTES {
            (self.waited, self.n_came) = (Duration::ZERO, 0);
        } else if piece.is_some() && self.waited >= self.link.net.config.stall_timeout {
            return Err(self.link.stalled());
        }
        Ok(piece)
    }
}

/// How one request failed.
pub(crate) enum Failure {
    /// For good.
    Last(PullError),
    /// It may be tried again, after a while where the server says so.
    Again(PullError, Option<Duration>),
}

impl Failure {
    /// Whether the server asks for fewer requests.
    pub fn is_too_much(&self) -> bool {
        matches!(self, Self::Again(PullError::Status { status: 429 | 503, .. }, _))
    }

    /// How long the server asks to be left alone.
    pub fn after(&self) -> Option<Duration> {
        match self {
            Self::Again(_, after) => *after,
            Self::Last(_) => None,
        }
    }
}

impl From<PullError> for Failure {
    fn from(error: PullError) -> Self {
        Self::Last(error)
    }
}

/// Counts tries that bring nothing, and the waits between them.
pub(crate) struct Tries<'a> {
    net: &'a Net,
    n: u32,
    has_come: bool,
}

impl<'a> Tries<'a> {
    pub fn new(net: &'a Net) -> Self {
        Self { net, n: 0, has_come: false }
    }

    /// After a failure that came behind `n_new` new bytes: waits, or gives the error back.
    pub async fn again(&mut self, failure: Failure, n_new: u64) -> Result<(), PullError> {
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

/// Reads a file into the sink, from where the sink is. Returns the size of the whole.
pub(crate) async fn read(
    link: &Link<'_>,
    expected: Option<u64>,
    sink: &Sink<'_>,
) -> Result<u64, PullError> {
    if let Some(size) = expected
        && ranges::is_worth_it(&sink.gaps(size), size)
        && ranges::read(&[Mirror::new(link)], size, sink).await?
    {
        return Ok(size);
    }
    let mut tries = Tries::new(link.net);
    let mut tag = None;
    loop {
        let before = sink.have();
        match attempt(link, expected, &mut tag, sink).await {
            Ok(size) => return Ok(size),
            Err(failure) => tries.again(failure, sink.have() - before).await?,
        }
    }
}

/// Reads a small answer whole.
pub(crate) async fn read_small(
    link: &Link<'_>,
    headers: &HeaderMap,
    max_bytes: usize,
) -> Result<(HeaderMap, Vec<u8>), PullError> {
    let mut tries = Tries::new(link.net);
    loop {
        match attempt_small(link, headers, max_bytes).await {
            Ok(answer) => return Ok(answer),
            Err(failure) => tries.again(failure, 0).await?,
        }
    }
}

async fn attempt_small(
    link: &Link<'_>,
    headers: &HeaderMap,
    max_bytes: usize,
) -> Result<(HeaderMap, Vec<u8>), Failure> {
    let response = link.send(Method::GET, headers.clone()).await?;
    check_status(link, &response)?;
    let headers = response.headers().clone();
    let mut drops = Drops::of(link, response);
    let mut bytes = Vec::new();
    while let Some(piece) = drops.next().await? {
        if bytes.len() + piece.len() > max_bytes {
            return Err(link.wrong(format!("more than {max_bytes} bytes")).into());
        }
        bytes.extend_from_slice(&piece);
    }
    Ok((headers, bytes))
}

/// One request and its body.
async fn attempt(
    link: &Link<'_>,
    expected: Option<u64>,
    tag: &mut Option<HeaderValue>,
    sink: &Sink<'_>,
) -> Result<u64, Failure> {
    let have = sink.have();
    let response = link.send(Method::GET, range_headers(have, None, tag.as_ref())).await?;
    if response.status() == StatusCode::RANGE_NOT_SATISFIABLE && have > 0 {
        // All of this part is here, when the server says how long it is.
        return match ContentRange::parse(response.headers()) {
            Some(ContentRange { sent: None, size: Some(size) })
                if size <= have && expected.is_none_or(|all| all == size) =>
            {
                Ok(size)
            }
            _ => Err(link.changed().into()),
        };
    }
    check_status(link, &response)?;
    check_tag(link, tag, response.headers())?;
    let (mut at, size) = match response.status() {
        StatusCode::PARTIAL_CONTENT => match ContentRange::parse(response.headers()) {
            Some(ContentRange { sent: Some((start, end)), size })
                if start == have && end >= start =>
            {
                // Where the server does not say how long the whole is, this was asked to its end.
                (start, Some(size.unwrap_or(end.saturating_add(1))))
            }
            _ => return Err(Failure::Again(link.wrong(OTHER_RANGE), None)),
        },
        _ => (0, response.content_length()),
    };
    if let (Some(size), Some(expected)) = (size, expected)
        && size != expected
    {
        return Err(other_size(link, size, expected).into());
    }
    if let Some(size) = size.filter(|size| *size <= have && at == 0) {
        return Ok(size);
    }
    let mut drops = Drops::of(link, response);
    while let Some(piece) = drops.next().await? {
        let len = piece.len() as u64;
        sink.write_at(at, piece).await?;
        at += len;
    }
    match size.or(expected) {
        Some(size) if at < size => {
            Err(Failure::Again(link.wrong(format!("{at} bytes of {size}")), None))
        }
        _ => Ok(at),
    }
}

/// What is wrong with a range that was not asked for.
pub(crate) const OTHER_RANGE: &str = "another range than was asked for";

/// A file of another length than it must have.
pub(crate) fn other_size(link: &Link<'_>, size: u64, expected: u64) -> PullError {
    link.wrong(format!("a file of {size} bytes, expected were {expected}"))
}

/// Asks for the bytes from `start` to before `end`, or to the last one, and only if they are of the
/// same file.
pub(crate) fn range_headers(start: u64, end: Option<u64>, tag: Option<&HeaderValue>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if start > 0 || end.is_some() {
        let last = end.map_or_else(String::new, |end| (end.max(1) - 1).to_string());
        let range = format!("bytes={start}-{last}");
        headers.insert(RANGE, HeaderValue::try_from(range).expect("digits are a header's value"));
        // A weak tag may not be compared for ranges (RFC 9110, 13.1.5).
        if let Some(tag) = tag.filter(|tag| !tag.as_bytes().starts_with(b"W/")) {
            headers.insert(IF_RANGE, tag.clone());
        }
    }
    headers
}

pub(crate) fn check_status(link: &Link<'_>, response: &Response) -> Result<(), Failure> {
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    let error = PullError::Status { url: shown(link.url), status: status.as_u16() };
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
pub(crate) fn check_tag(
    link: &Link<'_>,
    tag: &mut Option<HeaderValue>,
    headers: &HeaderMap,
) -> Result<(), Failure> {
    let now = headers.get(ETAG);
    if tag.is_some() && now.is_some() && tag.as_ref() != now {
        return Err(link.changed().into());
    }
    if tag.is_none() {
        *tag = now.cloned();
    }
    Ok(())
}

/// What `Content-Range` says, as far as it says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentRange {
    /// The first and the last byte of what is sent.
    pub sent: Option<(u64, u64)>,
    /// Bytes of the whole.
    pub size: Option<u64>,
}

impl ContentRange {
    pub fn parse(headers: &HeaderMap) -> Option<Self> {
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
