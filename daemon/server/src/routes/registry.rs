//! This daemon as a registry that is only read: manifests by name, blobs by digest in ranges, and
//! the chains that tell the parts of a blob apart. What other v4 on the network pull from, and any
//! client of the distribution protocol can.

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};
use v4_proto::{Digest, Fault, ModelName};

use super::{json, plain, typed, with};
use crate::{body::Body, daemon::Daemon, ops::blobs};

/// What blobs and chains are.
const BYTES_TYPE: &str = "application/octet-stream";
/// What a manifest is that does not say it.
const MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Says that this is a registry.
const VERSION: (&str, &str) = ("docker-distribution-api-version", "registry/2.0");

/// What the path behind `/v2/` means.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// Whether this is a registry.
    Version,
    /// A manifest, by its name.
    Manifest(ModelName),
    /// A blob, of whatever repository.
    Blob(Digest),
}

impl Asked {
    fn parse(path: &str) -> Option<Self> {
        if path.is_empty() {
            return Some(Self::Version);
        }
        let (rest, reference) = path.rsplit_once('/')?;
        let (repository, kind) = rest.rsplit_once('/')?;
        match kind {
            "blobs" => Some(Self::Blob(reference.parse().ok()?)),
            "manifests" => Some(Self::Manifest(format!("{repository}:{reference}").parse().ok()?)),
            _ => None,
        }
    }
}

/// Answers what is asked below `/v2/`.
///
/// # Errors
/// What the store says.
pub async fn answer(
    daemon: &Daemon,
    path: &str,
    range: Option<&HeaderValue>,
) -> Result<Response<Body>, Fault> {
    let answer = match Asked::parse(path) {
        Some(Asked::Version) => json("application/json", b"{}".to_vec()),
        Some(Asked::Manifest(name)) => manifest(daemon, name).await?,
        Some(Asked::Blob(digest)) => blob(daemon, digest, range).await?,
        None => unknown("NAME_INVALID"),
    };
    let mut headers = HeaderMap::new();
    headers.insert(VERSION.0, HeaderValue::from_static(VERSION.1));
    Ok(with(answer, headers))
}

/// What tells the parts of a blob apart.
///
/// # Errors
/// `invalid` for what is no digest; what the store says.
pub async fn chain(daemon: &Daemon, digest: &str) -> Result<Response<Body>, Fault> {
    let digest = digest.parse::<Digest>().map_err(|error| Fault::invalid(error.to_string()))?;
    Ok(match blobs::chain(daemon, digest).await? {
        Some(bytes) => json(BYTES_TYPE, bytes),
        None => plain(StatusCode::NOT_FOUND, ""),
    })
}

/// The words of a registry for what it does not have.
fn unknown(code: &str) -> Response<Body> {
    let body = json!({"errors": [{"code": code, "message": "not here"}]});
    let mut response = json("application/json", body.to_string().into_bytes());
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

async fn manifest(daemon: &Daemon, name: ModelName) -> Result<Response<Body>, Fault> {
    let found = daemon.blocking(move |store| store.manifest(&name)).await?;
    let Some((record, bytes)) = found else { return Ok(unknown("MANIFEST_UNKNOWN")) };
    let said = serde_json::from_slice::<Value>(&bytes).unwrap_or_default();
    let media_type = said["mediaType"].as_str().filter(|text| !text.is_empty());
    let media_type = HeaderValue::try_from(media_type.unwrap_or(MANIFEST_TYPE));
    let mut headers = HeaderMap::new();
    let fallback = HeaderValue::from_static(MANIFEST_TYPE);
    headers.insert(header::CONTENT_TYPE, media_type.unwrap_or(fallback));
    headers.insert("docker-content-digest", text(&record.digest.to_string()));
    Ok(with(Response::new(Body::whole(bytes)), headers))
}

/// Digits, words and dashes as a header's value.
fn text(text: &str) -> HeaderValue {
    HeaderValue::try_from(text).expect("made of digits, letters and dashes")
}

async fn blob(
    daemon: &Daemon,
    digest: Digest,
    range: Option<&HeaderValue>,
) -> Result<Response<Body>, Fault> {
    let Some(blob) = blobs::open(daemon, digest).await? else {
        return Ok(unknown("BLOB_UNKNOWN"));
    };
    let size = blob.size;
    let mut headers = HeaderMap::new();
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::ETAG, text(&format!("\"{digest}\"")));
    headers.insert("docker-content-digest", text(&digest.to_string()));
    let part = if let Some(said) = range.and_then(|range| range.to_str().ok()) {
        let Some(part) = parse_range(said, size) else {
            headers.insert(header::CONTENT_RANGE, text(&format!("bytes */{size}")));
            return Ok(with(plain(StatusCode::RANGE_NOT_SATISFIABLE, ""), headers));
        };
        let words = format!("bytes {}-{}/{size}", part.start, part.end - 1);
        headers.insert(header::CONTENT_RANGE, text(&words));
        part
    } else {
        0..size
    };
    headers.insert(header::CONTENT_LENGTH, (part.end - part.start).into());
    let is_part = headers.contains_key(header::CONTENT_RANGE);
    let mut response = with(typed(BYTES_TYPE, Body::stream(blob.read(part))), headers);
    if is_part {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    Ok(response)
}

/// One range of bytes of something of `size`, as RFC 9110 writes it; `None` where none of it is
/// there, or more than one is asked for.
fn parse_range(text: &str, size: u64) -> Option<std::ops::Range<u64>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let range = if first.is_empty() {
        size.saturating_sub(last.parse().ok()?)..size
    } else {
        let end = if last.is_empty() { size } else { last.parse::<u64>().ok()?.checked_add(1)? };
        first.parse().ok()?..end.min(size)
    };
    (range.start < range.end).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_standard_says() {
        for (text, expected) in [
            ("bytes=0-9", Some(0..10)),
            ("bytes=5-", Some(5..100)),
            ("bytes=90-900", Some(90..100)),
            ("bytes=-10", Some(90..100)),
            ("bytes=-1000", Some(0..100)),
            ("bytes=100-", None),
            ("bytes=-0", None),
            ("bytes=9-5", None),
            ("bytes=0-1,5-6", None),
            ("bytes=0-18446744073709551615", None),
            ("items=0-9", None),
        ] {
            assert_eq!(parse_range(text, 100), expected, "{text}");
        }
        assert_eq!(parse_range("bytes=0-", 0), None);
    }

    #[test]
    fn paths_mean_names_and_digests() {
        let digest = v4_store::sha256(b"x");
        let name = |text: &str| Some(Asked::Manifest(text.parse().expect("a name")));
        assert_eq!(Asked::parse(""), Some(Asked::Version));
        assert_eq!(Asked::parse("library/m/manifests/latest"), name("m"));
        assert_eq!(Asked::parse("hf.co/a/b/manifests/Q4"), name("hf.co/a/b:Q4"));
        assert_eq!(Asked::parse(&format!("a/b/blobs/{digest}")), Some(Asked::Blob(digest)));
        for bad in ["x", "a/b", "a/blobs/sha256:1", "a/../../b/manifests/x", "a/b/tags/list"] {
            assert_eq!(Asked::parse(bad), None, "{bad}");
        }
    }
}
