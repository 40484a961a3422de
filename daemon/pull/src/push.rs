//! A stored name to a registry: what is not there yet is sent in chunks, and a chunk that breaks
//! off is sent again from where the registry says it is. The manifest goes last, so the name never
//! points to something that is not whole.

use std::{collections::BTreeSet, io::Read as _, io::Seek as _, io::SeekFrom, sync::Arc};

use bytes::Bytes;
use reqwest::{
    Method, Response, StatusCode, Url,
    header::{CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, RANGE},
};
use tokio::sync::watch;
use v4_proto::{Fault, ModelName};
use v4_store::{Layer, Manifest, Store, fs::Fs as _, fs::RealFs};

use crate::{
    error::{PullError, shown},
    limits,
    progress::{FileProgress, Progress, Stage},
    source::{
        Net, host,
        http::{Failure, Key, Link, Tries, check_status},
        registry::{Repository, Session, manifest_type},
    },
    write::blocking,
};

/// Sends a name to its registry; how it ended is the last stage.
pub(crate) async fn push(
    store: &Arc<Store>,
    net: &Net,
    name: &ModelName,
    is_plain: bool,
    progress: &watch::Sender<Progress>,
) {
    let stage = match try_push(store, net, name, is_plain, progress).await {
        Ok(digest) => Stage::Done { digest, unsupported: None },
        Err(fault) => Stage::Failed(fault),
    };
    progress.send_modify(|progress| progress.stage = stage);
}

async fn try_push(
    store: &Arc<Store>,
    net: &Net,
    name: &ModelName,
    is_plain: bool,
    progress: &watch::Sender<Progress>,
) -> Result<v4_proto::Digest, Fault> {
    let (home, wanted) = (Arc::clone(store), name.clone());
    let found = blocking(move || home.manifest(&wanted)).await.map_err(|error| error.fault())?;
    let unknown = || PullError::Unknown { name: name.to_string(), host: None }.fault();
    let (record, bytes) = found.ok_or_else(unknown)?;
    let _lease = store.lease(&record.manifest.digests());
    let repository = Repository::of(net, name, is_plain).into_iter().next().ok_or_else(unknown)?;
    let session = net.session(&repository.base, &repository.path, "pull,push");
    let sender = Sender { store, net, repository: &repository, session: &session };
    let layers = once_each(&record.manifest);
    let file = |layer: &&Layer| FileProgress {
        digest: Some(layer.digest),
        total: Some(layer.size),
        completed: 0,
        is_done: false,
        source: None,
    };
    progress.send_modify(|progress| progress.files = layers.iter().map(file).collect());
    let refused = |error: PullError| sender.refused(error, name).fault();
    for (i, layer) in layers.iter().enumerate() {
        progress.send_modify(|progress| progress.stage = Stage::File(i));
        let told = |done: u64| {
            progress.send_modify(|progress| {
                if let Some(file) = progress.files.get_mut(i) {
                    file.completed = file.completed.max(done);
                    file.is_done = file.completed == layer.size;
                }
            });
        };
        sender.blob(layer, told).await.map_err(refused)?;
        told(layer.size);
    }
    progress.send_modify(|progress| progress.stage = Stage::Writing);
    sender.manifest(name, bytes).await.map_err(refused)?;
    Ok(record.digest)
}

/// The blobs of a manifest, each once: two roles may share one.
fn once_each(manifest: &Manifest) -> Vec<&Layer> {
    let mut seen = BTreeSet::new();
    let layers = manifest.layers.iter().chain([&manifest.config]);
    layers.filter(|layer| seen.insert(layer.digest)).collect()
}

/// What one push needs.
struct Sender<'a> {
    store: &'a Arc<Store>,
    net: &'a Net,
    repository: &'a Repository,
    session: &'a Session,
}

impl Sender<'_> {
    /// What a registry's refusal means.
    fn refused(&self, error: PullError, name: &ModelName) -> PullError {
        match error {
            PullError::Status { status: 401 | 403, .. } => {
                PullError::Denied { name: name.to_string(), host: host(&self.repository.base) }
            }
            error => error,
        }
    }

    /// Asks with tries. What opens the registry is shown to the registry alone.
    async fn ask(
        &self,
        method: Method,
        url: &str,
        headers: HeaderMap,
        body: Bytes,
        is_fine: fn(StatusCode) -> bool,
    ) -> Result<Response, PullError> {
        let is_own = host(url) == host(&self.repository.base);
        let key = if is_own { Key::Registry(self.session) } else { Key::None };
        let link = Link::new(self.net, url, key);
        let mut tries = Tries::new(self.net);
        loop {
            let sent = link.send_with(method.clone(), headers.clone(), body.clone()).await;
            let failure = match sent {
                Ok(response) if is_fine(response.status()) => return Ok(response),
                Ok(response) => match check_status(&link, &response) {
                    Err(failure) => failure,
                    Ok(()) => {
                        Failure::Last(link.wrong(format!("the status {}", response.status())))
                    }
                },
                Err(failure) => failure,
            };
            tries.again(failure, 0).await?;
        }
    }

    fn url(&self, rest: &str) -> String {
        let Repository { base, path } = self.repository;
        format!("{base}/v2/{path}/{rest}")
    }

    /// Sends a blob unless it is there, or can be taken from another repository of the registry.
    async fn blob(&self, layer: &Layer, told: impl Fn(u64)) -> Result<(), PullError> {
        let url = self.url(&format!("blobs/{}", layer.digest));
        let may_miss = |status: StatusCode| status.is_success() || status == StatusCode::NOT_FOUND;
        let none = HeaderMap::new;
        let there = self.ask(Method::HEAD, &url, none(), Bytes::new(), may_miss).await?;
        if there.status().is_success() {
            return Ok(());
        }
        let mut start = self.url("blobs/uploads/");
        if let Some(from) = layer.extra.get("from").and_then(|from| from.as_str()) {
            start = format!("{start}?mount={}&from={from}", layer.digest);
        }
        let is_begun =
            |status: StatusCode| matches!(status, StatusCode::ACCEPTED | StatusCode::CREATED);
        let begun = self.ask(Method::POST, &start, none(), Bytes::new(), is_begun).await?;
        if begun.status() == StatusCode::CREATED {
            return Ok(());
        }
        let mut place = self.place(&begun)?;
        let mut at = 0;
        let mut tries = Tries::new(self.net);
        while at < layer.size {
            let chunk = self.read(layer, at).await?;
            let end = at + chunk.len() as u64;
            match self.chunk(&place, at, chunk).await {
                Ok(next) => (place, at) = (next, end),
                Err(failure) => {
                    tries.again(failure, 0).await?;
                    // The registry knows how much of it came.
                    (place, at) = self.look(&place, at).await?;
                }
            }
            told(at);
        }
        let mut done = Url::parse(&place).map_err(|_| self.wrong("a place that is no URL"))?;
        done.query_pairs_mut().append_pair("digest", &layer.digest.to_string());
        let is_done = |status: StatusCode| status == StatusCode::CREATED;
        let ended = self.ask(Method::PUT, done.as_str(), none(), Bytes::new(), is_done).await;
        let Err(error) = ended else { return Ok(()) };
        // A registry that hashes it all may take so long that its answer is not waited for.
        let there = self.ask(Method::HEAD, &url, none(), Bytes::new(), may_miss).await?;
        if there.status().is_success() { Ok(()) } else { Err(error) }
    }

    /// Sends a chunk, once. Returns where the next one goes.
    async fn chunk(&self, place: &str, at: u64, chunk: Bytes) -> Result<String, Failure> {
        let mut headers = HeaderMap::new();
        let last = at + chunk.len() as u64 - 1;
        let range = HeaderValue::try_from(format!("{at}-{last}")).expect("digits");
        headers.insert(CONTENT_RANGE, range);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        let is_own = host(place) == host(&self.repository.base);
        let key = if is_own { Key::Registry(self.session) } else { Key::None };
        let link = Link::new(self.net, place, key);
        let response = link.send_with(Method::PATCH, headers, chunk).await?;
        check_status(&link, &response)?;
        Ok(self.place(&response)?)
    }

    /// Where an upload is, and how many bytes of it the registry has.
    async fn look(&self, place: &str, at: u64) -> Result<(String, u64), PullError> {
        let is_fine = |status: StatusCode| status.is_success();
        let asked = self.ask(Method::GET, place, HeaderMap::new(), Bytes::new(), is_fine).await?;
        let range = asked.headers().get(RANGE).and_then(|range| range.to_str().ok());
        let last = range.and_then(|range| range.rsplit_once('-')?.1.parse::<u64>().ok());
        // Before the first byte some say `0-0`, which is what they say of one byte too.
        let has = last.map_or(at, |last| if last == 0 { 0 } else { last.saturating_add(1) });
        let next = self.place(&asked).unwrap_or_else(|_| place.to_owned());
        Ok((next, has))
    }

    /// Where the next request of an upload goes.
    fn place(&self, response: &Response) -> Result<String, PullError> {
        let location = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
        let location = location.ok_or_else(|| self.wrong("no place to upload to"))?;
        let base = Url::parse(&self.repository.base);
        let url = base.and_then(|base| base.join(location)).ok();
        let url = url.filter(|url| matches!(url.scheme(), "http" | "https"));
        url.map(Into::into).ok_or_else(|| self.wrong("a place that is no URL"))
    }

    fn wrong(&self, what: &str) -> PullError {
        PullError::Answer { url: shown(&self.repository.base), what: what.to_owned() }
    }

    /// The next bytes of a blob.
    async fn read(&self, layer: &Layer, at: u64) -> Result<Bytes, PullError> {
        let path = self.store.blob_path(&layer.digest);
        let len = (layer.size - at).min(limits::UPLOAD_BYTES);
        let read = tokio::task::spawn_blocking(move || {
            let failed = |source| PullError::File { path: path.display().to_string(), source };
            let mut file = RealFs.open_read(&path).map_err(failed)?;
            file.seek(SeekFrom::Start(at)).map_err(failed)?;
            let mut bytes = Vec::new();
            file.take(len).read_to_end(&mut bytes).map_err(failed)?;
            if bytes.len() as u64 == len {
                return Ok(Bytes::from(bytes));
            }
            Err(failed(std::io::ErrorKind::UnexpectedEof.into()))
        });
        read.await.map_err(|_| PullError::Writer)?
    }

    /// Makes the name point to what was sent.
    async fn manifest(&self, name: &ModelName, bytes: Vec<u8>) -> Result<(), PullError> {
        let mut headers = HeaderMap::new();
        let media_type = HeaderValue::try_from(manifest_type(&bytes));
        let media_type = media_type.map_err(|_| self.wrong("a manifest of an odd type"))?;
        headers.insert(CONTENT_TYPE, media_type);
        let url = self.url(&format!("manifests/{}", name.tag()));
        let is_fine = |status: StatusCode| status.is_success();
        self.ask(Method::PUT, &url, headers, bytes.into(), is_fine).await.map(drop)
    }
}
