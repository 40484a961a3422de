//! What can stop the daemon from starting, and the only map from a fault to a status and a body.

use std::{io, net::SocketAddr, path::PathBuf};

use http::StatusCode;
use serde::Serialize;
use v4_proto::{Code, Fault};

use crate::limits;

/// Why the daemon did not start, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting cannot be meant.
    #[error("{setting} is {value:?}, but must be {expected}")]
    Setting {
        /// The variable, the switch, or the key with its line.
        setting: String,
        /// What it says.
        value: String,
        /// What it may say.
        expected: &'static str,
    },
    /// The file of settings cannot be read, or says what no setting is.
    #[error("{}, line {line}: {what}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Where in it.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// There is no directory for the daemon's files.
    #[error("no home for the daemon's files: set V4_HOME, or HOME")]
    NoHome,
    /// The home cannot be used.
    #[error(transparent)]
    Store(#[from] v4_store::StoreError),
    /// Another program has the port.
    #[error(
        "port {port} of {host} is taken by another program; stop it, or choose another port with \
         --listen {host}:PORT or V4_LISTEN",
        port = .0.port(),
        host = .0.ip()
    )]
    PortTaken(SocketAddr),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}; choose another with --listen or V4_LISTEN")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The unix socket cannot be made.
    #[error("cannot make the socket {}; choose another path with V4_SOCKET", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another daemon answers on the unix socket.
    #[error(
        "another daemon answers on {}; stop it, or give this one its own V4_SOCKET",
        path.display()
    )]
    SocketTaken {
        /// Its path.
        path: PathBuf,
    },
    /// The daemon that runs is not replaced.
    #[error("the v4 that runs was not replaced: {0}")]
    Replace(String),
    /// The log file cannot be opened.
    #[error("cannot write the log {}", path.display())]
    Log {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file of keys cannot be read, or has a line that is none.
    #[error("cannot use the keys in {}: {what}", path.display())]
    Keys {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Threads, signals or the daemon's own executable are not to be had.
    #[error("the daemon cannot start: {what}")]
    Start {
        /// What failed.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// The status of a fault that arrives before the first byte of an answer. A new code does not
/// compile until it has its line here.
pub fn status(code: Code) -> StatusCode {
    match code {
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Invalid | Code::ContextOverflow | Code::Unsupported => StatusCode::BAD_REQUEST,
        Code::Unauthorized => StatusCode::UNAUTHORIZED,
        Code::Forbidden => StatusCode::FORBIDDEN,
        Code::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
        Code::SlowClient => StatusCode::REQUEST_TIMEOUT,
        Code::Cancelled => {
            StatusCode::from_u16(CLIENT_CLOSED_REQUEST).expect("499 is a three-digit number")
        }
        Code::Upstream => StatusCode::BAD_GATEWAY,
        Code::Disk => StatusCode::INSUFFICIENT_STORAGE,
        Code::OutOfMemory | Code::Corrupt | Code::RunnerDied | Code::Internal => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

/// A refusal before the first byte of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    /// The status.
    pub status: StatusCode,
    /// Why.
    pub fault: Fault,
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self { status: status(fault.code), fault }
    }
}

impl Refusal {
    /// A body beyond the limit: the one refusal of an invalid request with a status of its own.
    pub fn too_large() -> Self {
        let mib = limits::BODY_BYTES >> 20;
        Self {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            fault: Fault::invalid(format!("the request body has more than {mib} MiB")),
        }
    }
}

/// An error as clients of registries read it.
#[derive(Serialize)]
pub struct RegistryBody<'a> {
    errors: [RegistryError<'a>; 1],
}

#[derive(Serialize)]
struct RegistryError<'a> {
    code: &'static str,
    message: &'a str,
}

/// `fault` as clients of registries read it.
pub fn registry_body(fault: &Fault) -> RegistryBody<'_> {
    let code = match fault.code {
        Code::Unauthorized => "UNAUTHORIZED",
        Code::Forbidden => "DENIED",
        Code::Overloaded => "TOOMANYREQUESTS",
        Code::Invalid => "UNSUPPORTED",
        _ => "UNKNOWN",
    };
    RegistryBody { errors: [RegistryError { code, message: &fault.message }] }
}

/// What proxies and Ollama call a request whose client left.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// Seconds after which an overloaded daemon may be asked again.
pub const RETRY_AFTER_S: &str = "1";

/// An error as Ollama's clients read it. `code` is v4's own, from the closed list of
/// [`v4_proto::Code`].
#[derive(Serialize)]
pub struct OllamaBody<'a> {
    error: &'a str,
    code: Code,
}

/// `fault` as Ollama's clients read it.
pub fn ollama_body(fault: &Fault) -> OllamaBody<'_> {
    OllamaBody { error: &fault.message, code: fault.code }
}

/// An error as OpenAI's clients read it.
#[derive(Serialize)]
pub struct OpenAiBody<'a> {
    error: OpenAiError<'a>,
}

#[derive(Serialize)]
struct OpenAiError<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    ty: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

/// `fault` as OpenAI's clients read it. The `code` words are OpenAI's own; agents look for
/// them.
pub fn openai_body(fault: &Fault) -> OpenAiBody<'_> {
    let ty = match status(fault.code) {
        StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED => "invalid_request_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        _ => "api_error",
    };
    let code = match fault.code {
        Code::ContextOverflow => Some("context_length_exceeded"),
        Code::NotFound => Some("model_not_found"),
        Code::Unauthorized => Some("invalid_api_key"),
        _ => None,
    };
    OpenAiBody { error: OpenAiError { message: &fault.message, ty, param: None, code } }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One line a code: its status, and the type OpenAI's clients see.
    const TABLE: [(Code, u16, &str); Code::ALL.len()] = [
        (Code::NotFound, 404, "not_found_error"),
        (Code::Invalid, 400, "invalid_request_error"),
        (Code::Unauthorized, 401, "invalid_request_error"),
        (Code::Forbidden, 403, "permission_error"),
        (Code::ContextOverflow, 400, "invalid_request_error"),
        (Code::Overloaded, 503, "api_error"),
        (Code::OutOfMemory, 500, "api_error"),
        (Code::Unsupported, 400, "invalid_request_error"),
        (Code::Corrupt, 500, "api_error"),
        (Code::RunnerDied, 500, "api_error"),
        (Code::SlowClient, 408, "api_error"),
        (Code::Cancelled, 499, "api_error"),
        (Code::Upstream, 502, "api_error"),
        (Code::Disk, 507, "api_error"),
        (Code::Internal, 500, "api_error"),
    ];

    #[test]
    fn every_code_has_its_status_and_bodies() {
        for ((code, expected, ty), listed) in TABLE.into_iter().zip(Code::ALL) {
            assert_eq!(code, listed, "the table is in the order of the list");
            assert_eq!(status(code).as_u16(), expected, "{code:?}");
            let fault = Fault::new(code, "what to do");
            let body = serde_json::to_value(openai_body(&fault)).expect("a body");
            assert_eq!(body["error"]["type"], ty, "{code:?}");
            assert_eq!(body["error"]["message"], "what to do");
            assert!(body["error"]["param"].is_null());
            let body = serde_json::to_value(ollama_body(&fault)).expect("a body");
            assert_eq!(body["error"], "what to do");
            assert_eq!(body["code"], serde_json::to_value(code).expect("a word"));
        }
    }

    #[test]
    fn agents_find_the_words_they_look_for() {
        let code = |code| {
            let fault = Fault::new(code, "x");
            serde_json::to_value(openai_body(&fault)).expect("a body")["error"]["code"].clone()
        };
        assert_eq!(code(Code::ContextOverflow), "context_length_exceeded");
        assert_eq!(code(Code::NotFound), "model_not_found");
        assert_eq!(code(Code::Unauthorized), "invalid_api_key");
        assert!(code(Code::Invalid).is_null());
    }

    #[test]
    fn a_taken_port_names_itself_and_the_switch() {
        let address = "127.0.0.1:11434".parse().expect("an address");
        let text = Error::PortTaken(address).to_string();
        assert!(text.contains("port 11434"), "{text}");
        assert!(text.contains("--listen 127.0.0.1:PORT or V4_LISTEN"), "{text}");
    }
}
