//! Who asks, so that those who share a model take turns: by the key that a request brings, else by
//! where its connection comes from. It opens no doors.

use std::{
    fmt::Write,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use http::{HeaderMap, header};
use tokio::net::UnixStream;
use v4_supervisor::Caller;

/// Where a connection comes from. Each request of it carries this as an extension.
#[derive(Debug, Clone)]
pub struct Peer(Arc<str>);

impl Peer {
    /// A program of this machine or the network.
    pub fn tcp(address: Option<std::net::SocketAddr>) -> Self {
        let name = address.map(|address| address.ip().to_canonical().to_string());
        Self(name.unwrap_or_default().into())
    }

    /// A process of this machine.
    pub fn unix(stream: &UnixStream) -> Self {
        let name = stream.peer_cred().map(|peer| match peer.pid() {
            Some(pid) => format!("uid {} pid {pid}", peer.uid()),
            None => format!("uid {}", peer.uid()),
        });
        Self(name.unwrap_or_default().into())
    }
}

/// The caller of a request. A key is told from another, and not kept.
pub fn of(headers: &HeaderMap, peer: Option<&Peer>) -> Caller {
    let key = headers.get(header::AUTHORIZATION).or_else(|| headers.get("x-api-key"));
    match key {
        Some(key) => {
            let mut hasher = DefaultHasher::new();
            key.as_bytes().hash(&mut hasher);
            format!("key {:016x}", hasher.finish()).into()
        }
        None => peer.map(|peer| Arc::clone(&peer.0)).unwrap_or_default(),
    }
}

/// A caller's own word for whom it asks makes callers of its users.
pub fn user(caller: &Caller, user: Option<&str>) -> Caller {
    let Some(user) = user else { return Arc::clone(caller) };
    let mut name = caller.to_string();
    let mut hasher = DefaultHasher::new();
    user.hash(&mut hasher);
    // The text is a stranger's, of any length.
    let _ = write!(name, " user {:016x}", hasher.finish());
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_tells_callers_apart_and_else_the_connection_does() {
        let peer = Peer::tcp("[::ffff:10.0.0.7]:4242".parse().ok());
        let with = |name: &'static str, value: &'static str| {
            HeaderMap::from_iter([(
                header::HeaderName::from_static(name),
                header::HeaderValue::from_static(value),
            )])
        };
        let none = HeaderMap::new();
        assert_eq!(&*of(&none, Some(&peer)), "10.0.0.7");
        assert_eq!(&*of(&none, None), "");
        let (a, b) = (with("authorization", "Bearer a"), with("authorization", "Bearer b"));
        assert_ne!(of(&a, Some(&peer)), of(&b, Some(&peer)));
        assert_eq!(of(&a, Some(&peer)), of(&a, None));
        assert!(!of(&a, None).contains("Bearer"));
        assert_ne!(of(&with("x-api-key", "k"), Some(&peer)), of(&none, Some(&peer)));
        let caller = of(&none, Some(&peer));
        assert_eq!(user(&caller, None), caller);
        assert_ne!(user(&caller, Some("x")), user(&caller, Some("y")));
    }

    #[tokio::test]
    async fn a_process_of_this_machine_is_known_by_its_number() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let caller = of(&HeaderMap::new(), Some(&Peer::unix(&ours)));
        assert!(caller.ends_with(&format!("pid {}", std::process::id())), "{caller}");
    }
}
