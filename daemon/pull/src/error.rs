//! What can go wrong in a pull.

use v4_proto::{Code, Digest, Fault};
use v4_store::StoreError;

/// What went wrong in a pull.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// A text is not a location.
    #[error(
        "{text:?} is not a place to pull from; write pypi:PACKAGE@VERSION/FILE, \
         npm:PACKAGE@VERSION:FILE, an http(s) URL or file:/PATH"
    )]
    Location {
        /// The text, cut to 200 characters.
        text: String,
    },
    /// No connection.
    #[error("cannot reach {host}; check the network, or HTTPS_PROXY if there is a proxy")]
    Unreachable {
        /// Which host.
        host: String,
        /// What the HTTP client says.
        source: reqwest::Error,
    },
    /// The HTTP client cannot be made; in practice, no certificate authority was found.
    #[error(
        "the HTTPS client cannot start: no CA certificates can be loaded; install the system's \
         ca-certificates or point SSL_CERT_FILE at a PEM file"
    )]
    Client {
        /// What the HTTP client says.
        source: reqwest::Error,
    },
    /// The connection broke, stalled or redirected in a circle, more often than is tried again.
    #[error("{url} broke off: {source}; pull again to go on from there")]
    Broken {
        /// What was asked for.
        url: String,
        /// What the HTTP client says.
        source: reqwest::Error,
    },
    /// No byte came for too long.
    #[error("{url} sent nothing for {seconds} s; pull again to go on from there")]
    Stalled {
        /// What was asked for.
        url: String,
        /// How long.
        seconds: u64,
    },
    /// A status that is no success.
    #[error("{url} answered with status {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
    },
    /// No registry has the name.
    #[error("model '{name}' not found{}", host.as_ref().map(|host| format!(" on {host}")).unwrap_or_default())]
    Unknown {
        /// The name.
        name: String,
        /// Who was asked last.
        host: Option<String>,
    },
    /// A registry wants to know who asks.
    #[error(
        "{host} refuses access to '{name}'; if it is private, log in with `docker login {host}` or \
         point V4_AUTH_FILE at a file that it wrote (Ollama's registry wants the key \
         ~/.ollama/id_ed25519 that its website knows)"
    )]
    Denied {
        /// The name.
        name: String,
        /// Whose it is.
        host: String,
    },
    /// A repository of Hugging Face that wants to know who asks, or is none.
    #[error(
        "{host} has no '{name}' that everybody may have; check the name, and if it is private or \
         gated, set HF_TOKEN for v4 serve"
    )]
    Gated {
        /// The name.
        name: String,
        /// Whose it is.
        host: String,
    },
    /// A repository without a file that can be used.
    #[error("the repository {repository} has {what}")]
    Repository {
        /// Which.
        repository: String,
        /// What is wrong with it.
        what: String,
    },
    /// It is another version than the one that was locked.
    #[error(
        "'{name}' is now {actual}, but {expected} is locked; nothing was changed: take the new one \
         with `v4 lock`, or find out why it changed"
    )]
    Locked {
        /// The name.
        name: String,
        /// The manifest that was locked.
        expected: Digest,
        /// The manifest that it is.
        actual: Digest,
    },
    /// A name that must be signed and is not.
    #[error(
        "'{name}' has {what}, and the policy asks for a right one; nothing was changed: ask whoever \
         offers it, or change the policy"
    )]
    Unsigned {
        /// The name.
        name: String,
        /// What it has instead of a right signature.
        what: String,
    },
    /// A policy, or a key that it names, cannot be used.
    #[error(
        "the policy's file {path} {what}; mend it, or unset V4_POLICY to ask for no signatures"
    )]
    Policy {
        /// Which file.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// An answer that breaks the protocol.
    #[error("{url} sent {what}")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with it.
        what: String,
    },
    /// What is there now is not what it was when the download began.
    #[error("{url} changed during the download; pull again")]
    Changed {
        /// What was asked for.
        url: String,
    },
    /// A source gave other bytes than those that were asked for.
    #[error("{location} is not what it must be: {source}; nothing of it was kept: pull again")]
    Wrong {
        /// Which source.
        location: String,
        /// Both digests, or both lengths.
        source: StoreError,
        /// Whether it went on from bytes that were here before, which may be what is wrong.
        was_resumed: bool,
    },
    /// The package has no file that can be used.
    #[error("the package {package} {version} has {what}")]
    Package {
        /// Its name.
        package: String,
        /// Its version.
        version: String,
        /// What is wrong with it.
        what: String,
    },
    /// A local file cannot be read.
    #[error("cannot read {path}: {source}")]
    File {
        /// Which.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The store failed, or the bytes are not those that were asked for.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A recipe names no source for a file.
    #[error("no source is known for {0}")]
    NoSource(String),
    /// A thread of ours ended early.
    #[error("the writer of a download ended early")]
    Writer,
}

impl PullError {
    /// A text that is no location.
    pub(crate) fn location(text: &str) -> Self {
        Self::Location { text: shown(text).chars().take(200).collect() }
    }

    /// The same for a client.
    pub fn fault(&self) -> Fault {
        let code = match self {
            Self::Store(error) => return error.fault(),
            Self::Location { .. } | Self::Policy { .. } => Code::Invalid,
            Self::Unreachable { .. }
            | Self::Client { .. }
            | Self::Broken { .. }
            | Self::Stalled { .. }
            | Self::Status { .. }
            | Self::Denied { .. }
            | Self::Gated { .. }
            | Self::Repository { .. }
            | Self::Answer { .. }
            | Self::Changed { .. }
            | Self::Package { .. } => Code::Upstream,
            Self::Wrong { .. } | Self::Locked { .. } | Self::Unsigned { .. } => Code::Corrupt,
            Self::File { .. } => Code::Disk,
            Self::NoSource(_) | Self::Unknown { .. } => Code::NotFound,
            Self::Writer => Code::Internal,
        };
        Fault::new(code, self.to_string())
    }

    /// Whether another source cannot help, since our own side failed.
    pub(crate) fn is_ours(&self) -> bool {
        match self {
            Self::Store(error) => !is_wrong(error),
            Self::Client { .. } | Self::Writer | Self::Policy { .. } => true,
            _ => false,
        }
    }

    /// Whether somebody wants to know who asks.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Status { status: 401 | 403, .. })
    }

    /// Says which source gave wrong bytes, where that is what went wrong.
    pub(crate) fn at(self, location: &impl std::fmt::Display, was_resumed: bool) -> Self {
        match self {
            Self::Store(source) if is_wrong(&source) => {
                Self::Wrong { location: shown(&location.to_string()), source, was_resumed }
            }
            other => other,
        }
    }
}

/// Whether the store refused bytes, rather than failed.
pub(crate) fn is_wrong(error: &StoreError) -> bool {
    matches!(error, StoreError::Digest { .. } | StoreError::Length { .. })
}

/// A text without the user info (`user:password@`) of the URLs in it: what may be shown and logged.
/// Every URL of an error comes through here.
pub(crate) fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        let is_end = |c: char| c.is_whitespace() || matches!(c, '/' | '?' | '#' | '\\');
        let (authority, tail) = after.split_at(after.find(is_end).unwrap_or(after.len()));
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        shown.extend([before, "://", host]);
        rest = tail;
    }
    shown + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_info_is_never_shown() {
        for (text, expected) in [
            ("https://u:p@host/a@b", "https://host/a@b"),
            ("http://u:p@w@host:1?c", "http://host:1?c"),
            ("pypi:a@1/x https://token@host", "pypi:a@1/x https://host"),
            ("https://host/a#b", "https://host/a#b"),
            ("https://u:p@", "https://"),
            ("no url @ all", "no url @ all"),
        ] {
            assert_eq!(shown(text), expected, "{text}");
        }
    }
}
