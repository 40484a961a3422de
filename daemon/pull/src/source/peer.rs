//! Another v4 on the network, which serves its blobs by digest, and what tells their parts apart.
//!
//! Nothing that it says is believed: a blob counts when its digest does, and a chain only narrows
//! down where to look.

use reqwest::header::{HeaderMap, HeaderValue};
use v4_proto::{Digest, Fault};
use v4_store::{Chain, limits::CHAIN_BYTES};

use super::{Door, Net, Target, http};
use crate::recipe::PeerBlob;

/// Holds a peer's address against what one looks like: `http(s)://[KEY@]HOST[:PORT]`.
///
/// # Errors
/// [`v4_proto::Code::Invalid`].
pub(crate) fn check(base: &str) -> Result<(), Fault> {
    let url = reqwest::Url::parse(base).ok();
    let is_peer = url.is_some_and(|url| {
        let is_bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
        matches!(url.scheme(), "http" | "https") && url.has_host() && is_bare
    });
    if is_peer {
        return Ok(());
    }
    let shown = crate::error::shown(base);
    Err(Fault::invalid(format!("{shown:?} is no address of a v4; write http://HOST:PORT")))
}

/// Where a peer has a blob.
pub(super) fn blob(blob: &PeerBlob) -> Target {
    target(&blob.base, &format!("v2/v4/peer/blobs/{}", blob.digest))
}

/// What a peer says of the parts of a blob.
pub(crate) async fn chain(net: &Net, blob: &PeerBlob, size: u64) -> Option<Chain> {
    let target = target(&blob.base, &format!("api/chains/{}", blob.digest));
    let link = target.link(net);
    let (_, bytes) = http::read_small(&link, &HeaderMap::new(), CHAIN_BYTES).await.ok()?;
    Chain::decode(&bytes, size).filter(|chain| !chain.is_empty())
}

/// What is said of a peer that wants a key, or another one.
pub(crate) fn refusal(blob: &PeerBlob) -> String {
    let peer = super::host(&blob.base);
    format!(
        "the v4 at {peer} refuses: it wants a key with the scope read, written as \
         http://KEY@{peer}; what it would have sent comes from elsewhere"
    )
}

/// A path at a peer. A key in its address is shown as a token, as everywhere.
fn target(base: &str, path: &str) -> Target {
    let base = base.trim_end_matches('/');
    let (scheme, rest) = base.split_once("://").unwrap_or(("http", base));
    let (key, host) = rest.rsplit_once('@').map_or((None, rest), |(key, host)| (Some(key), host));
    let token = key.and_then(|key| HeaderValue::try_from(format!("Bearer {key}")).ok());
    let door = token.map_or(Door::Open, |mut token| {
        token.set_sensitive(true);
        Door::Bearer(token)
    });
    Target { url: format!("{scheme}://{host}/{path}"), door }
}

impl PeerBlob {
    /// A blob at a peer.
    pub(crate) fn new(base: &str, digest: Digest) -> Self {
        Self { base: base.to_owned(), digest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_and_a_key_becomes_a_token() {
        for good in ["http://10.0.0.2:11434", "https://box/", "http://secret@box:1"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "box:11434", "ftp://box", "http://", "http://box/path", "http://box/?q"] {
            assert!(check(bad).is_err(), "{bad}");
        }
        let target = target("http://secret@box:1/", "api/chains/x");
        assert_eq!(target.url, "http://box:1/api/chains/x");
        assert!(matches!(target.door, Door::Bearer(token) if token == "Bearer secret"));
    }
}
