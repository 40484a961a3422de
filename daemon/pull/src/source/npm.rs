//! A file inside a package of npm. The tarball is checked against the sha512 that the registry
//! says, then the member is read out of it. Nothing in a package is ever run.

use std::io::Read as _;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use reqwest::header::HeaderMap;
use ring::digest::{Context, SHA512};
use serde::Deserialize;
use v4_store::{fs::File, sha256};

use super::{
    Place, Share, Target,
    archive::{self, Wanted},
    http,
};
use crate::{
    error::{PullError, shown},
    limits,
    write::Sink,
};

/// The registry that is asked unless another one is set.
pub(crate) const DEFAULT_URL: &str = "https://registry.npmjs.org";

/// Which file of which package.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member<'a> {
    pub package: &'a str,
    pub version: Option<&'a str>,
    pub path: &'a str,
}

impl Member<'_> {
    fn wrong(&self, what: impl Into<String>) -> PullError {
        PullError::Package {
            package: self.package.to_owned(),
            version: self.version.unwrap_or("latest").to_owned(),
            what: what.into(),
        }
    }
}

/// What the registry says of a version, as far as it matters here.
#[derive(Deserialize)]
struct Version {
    dist: Dist,
}

#[derive(Deserialize)]
struct Dist {
    tarball: String,
    /// Digests as `ALGORITHM-BASE64`, with blanks between them.
    #[serde(default)]
    integrity: String,
}

/// Reads a member into the sink. The key of the tarball it came from is added to `staged`.
pub(super) async fn read(
    place: Place<'_>,
    member: Member<'_>,
    share: Share,
    sink: &Sink<'_>,
    staged: &mut Vec<String>,
) -> Result<u64, PullError> {
    let (wanted, sha512) = find(place, member).await?;
    let archive = archive::stage(place, &wanted, share, sink).await?;
    let file = archive.open()?;
    let outcome = match is_whole(archive.open()?, sha512, member).await {
        Ok(()) => unpack(place, file, member, sink).await,
        Err(error) => Err(error),
    };
    archive.done(wanted.key, outcome, staged).await
}

/// Asks the registry for the tarball of a version, and the digest that it must have.
async fn find(place: Place<'_>, member: Member<'_>) -> Result<(Wanted, Vec<u8>), PullError> {
    let base = place.net.config.npm_url.trim_end_matches('/');
    let package = member.package.replace('/', "%2f");
    let asked = Target::open(format!("{base}/{package}/{}", member.version.unwrap_or("latest")));
    let link = asked.link(place.net);
    let answer = http::read_small(&link, &HeaderMap::new(), limits::INDEX_ANSWER_BYTES).await;
    let (_, bytes) = match answer {
        Err(PullError::Status { status: 404, .. }) => {
            return Err(member.wrong(format!("no place on the registry {}", shown(base))));
        }
        answer => answer?,
    };
    let Version { dist } = serde_json::from_slice(&bytes)
        .map_err(|error| link.wrong(format!("something that is no version: {error}")))?;
    let sha512 = dist.integrity.split_whitespace().find_map(|one| one.strip_prefix("sha512-"));
    let sha512 = sha512.and_then(|text| BASE64_STANDARD.decode(text).ok());
    let sha512 = sha512.ok_or_else(|| member.wrong("a tarball without a sha512"))?;
    let url = reqwest::Url::parse(&dist.tarball).ok();
    let url = url.filter(|url| matches!(url.scheme(), "http" | "https"));
    let url = url.ok_or_else(|| member.wrong("a tarball without a usable URL"))?;
    let key = format!("npm-{}", sha256(&sha512).hex());
    Ok((Wanted { key, target: Target::open(url), size: None, digest: None }, sha512))
}

/// Makes sure that a tarball is what the registry says.
async fn is_whole(
    mut file: Box<dyn File>,
    sha512: Vec<u8>,
    member: Member<'_>,
) -> Result<(), PullError> {
    let hashed = tokio::task::spawn_blocking(move || {
        let (mut context, mut chunk) = (Context::new(&SHA512), vec![0; limits::CHUNK_BYTES]);
        loop {
            match file.read(&mut chunk)? {
                0 => return Ok::<_, std::io::Error>(context.finish()),
                n => context.update(&chunk[..n]),
            }
        }
    });
    let hashed = hashed.await.map_err(|_| PullError::Writer)?;
    let actual = hashed.map_err(|error| member.wrong(format!("a damaged tarball: {error}")))?;
    if actual.as_ref() == sha512 {
        return Ok(());
    }
    Err(member.wrong("a tarball with another sha512 than the registry says; pull again"))
}

/// Reads the member out of the tarball. All of a package lies in one folder, whatever its name.
async fn unpack(
    place: Place<'_>,
    file: Box<dyn File>,
    member: Member<'_>,
    sink: &Sink<'_>,
) -> Result<u64, PullError> {
    let path = member.path.to_owned();
    let (package, version) = (member.package.to_owned(), member.version.map(str::to_owned));
    let is_it = move |name: &str| name.split_once('/').is_some_and(|(_, inside)| inside == path);
    archive::unpack_tar(place, file, sink, is_it, move |what| {
        Member { package: &package, version: version.as_deref(), path: "" }.wrong(what)
    })
    .await
}
