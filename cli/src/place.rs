//! Where the daemon is: its socket, or the address in `V4_HOST`.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;

use http::HeaderValue;
use v4_proto::paths;

use crate::error::Failure;

/// The variable that names a daemon elsewhere.
const HOST_VARIABLE: &str = "V4_HOST";
/// The variable that has the key of that daemon.
const KEY_VARIABLE: &str = "V4_KEY";
/// The port of an address that names none.
const DEFAULT_PORT: u16 = 11434;

/// How an environment variable is looked up. Given by `main`, the only one who asks the system.
pub type Variable = fn(&str) -> Option<OsString>;

/// What a command needs to know of the world around it.
pub struct Place {
    /// The home of the daemon that would be started.
    pub home: PathBuf,
    /// The log of the daemon that would be started.
    pub log: PathBuf,
    /// Where to connect.
    pub target: Target,
    /// What opens a daemon elsewhere: the value of an `Authorization` field.
    pub key: Option<HeaderValue>,
}

/// Where to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The socket of this user's daemon, which may be started when nobody answers.
    Socket(PathBuf),
    /// A host and port that somebody else looks after.
    Address(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Socket(path) => write!(f, "{}", path.display()),
            Target::Address(address) => write!(f, "http://{address}"),
        }
    }
}

impl Place {
    /// Finds out from the environment. All paths are absolute: the daemon runs in another folder.
    ///
    /// # Errors
    /// No home directory, or a `V4_HOST` that is not an address.
    pub fn find(variable: Variable) -> Result<Self, Failure> {
        Self::find_with(variable)
    }

    fn find_with(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, Failure> {
        let home = paths::home(None, &variable).ok_or(Failure::Homeless)?;
        let absolute = |path: PathBuf| {
            std::path::absolute(path)
                .map_err(|source| Failure::System { what: "tell the current folder", source })
        };
        let home = absolute(home)?;
        let log = paths::log(&variable).unwrap_or_else(|| home.join(paths::LOG_FILE));
        let target = match variable(HOST_VARIABLE).filter(|host| !host.is_empty()) {
            Some(host) => Target::Address(address(&host.to_string_lossy())?),
            None => Target::Socket(absolute(paths::socket(&home, &variable))?),
        };
        let key = match (&target, variable(KEY_VARIABLE)) {
            (Target::Address(_), Some(key)) if !key.is_empty() => Some(bearer(&key)?),
            _ => None,
        };
        Ok(Self { home, log: absolute(log)?, target, key })
    }
}

/// A key as a request shows it.
fn bearer(key: &OsStr) -> Result<HeaderValue, Failure> {
    let wrong = || {
        Failure::Wrong(
            "V4_KEY is not a key; set it to what `v4 keys add` said on the machine of the daemon"
                .to_owned(),
        )
    };
    let text =
        key.to_str().map(str::trim).filter(|text| text.bytes().all(|b| b.is_ascii_graphic()));
    let mut value = HeaderValue::try_from(format!("Bearer {}", text.ok_or_else(wrong)?))
        .map_err(|_| wrong())?;
    value.set_sensitive(true);
    Ok(value)
}

/// `host:port` of what a person wrote in `V4_HOST`: with or without `http://`, port and trailing
/// slash. As everywhere, `http://` without a port means 80; a bare host means the daemon's port.
fn address(text: &str) -> Result<String, Failure> {
    let wrong = || {
        Failure::Wrong(format!(
            "V4_HOST={text} is not an address; write it as http://HOST:PORT, for example \
             http://127.0.0.1:{DEFAULT_PORT}"
        ))
    };
    let (rest, port) = match text.trim().split_once("://") {
        None => (text.trim(), DEFAULT_PORT),
        Some(("http", rest)) => (rest, 80),
        Some(_) => return Err(wrong()),
    };
    let authority: http::uri::Authority =
        rest.trim_end_matches('/').parse().map_err(|_| wrong())?;
    let (host, given) = (authority.host(), authority.port_u16());
    // What is neither host nor port is a user name, or a port beyond 65535.
    let rest = authority.as_str().strip_prefix(host).unwrap_or("@");
    if host.is_empty() || (given.is_none() && !rest.is_empty()) {
        return Err(wrong());
    }
    Ok(format!("{host}:{}", given.unwrap_or(port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_are_those_of_the_current_folder() {
        let place = Place::find(|name| match name {
            "V4_HOME" => Some("h".into()),
            "V4_SOCKET" => Some("s".into()),
            "V4_LOG_FILE" => Some("l".into()),
            _ => None,
        });
        let place = place.expect("a place");
        let here = std::env::current_dir().expect("a current folder");
        assert_eq!((place.home, place.log), (here.join("h"), here.join("l")));
        assert_eq!(place.target, Target::Socket(here.join("s")));
    }

    #[test]
    fn a_key_is_for_a_daemon_elsewhere_alone() {
        let place = |set: &'static [(&str, &str)]| {
            let home = ("V4_HOME", "/h");
            let find = |name: &str| {
                let found = set.iter().chain([&home]).find(|(key, _)| *key == name);
                found.map(|(_, value)| OsString::from(value))
            };
            Place::find_with(find)
        };
        let far = place(&[("V4_HOST", "box"), ("V4_KEY", " v4-1 ")]).expect("a place");
        assert!(far.key.is_some_and(|key| key == "Bearer v4-1" && key.is_sensitive()));
        assert!(place(&[("V4_HOST", "box"), ("V4_KEY", "")]).expect("a place").key.is_none());
        assert!(place(&[("V4_KEY", "v4-1")]).expect("a place").key.is_none());
        assert!(place(&[("V4_HOST", "box"), ("V4_KEY", "a\nb")]).is_err());
    }

    #[test]
    fn hosts_are_read_as_people_write_them() {
        let good = [
            ("127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://127.0.0.1:8080/", "127.0.0.1:8080"),
            ("box", "box:11434"),
            ("http://box", "box:80"),
            (" [::1]:9 ", "[::1]:9"),
        ];
        for (text, expected) in good {
            assert_eq!(address(text).expect(text), expected);
        }
        for text in ["https://x", "", "http://", "a b", "u:p@h", "x/y", "h:99999"] {
            assert!(address(text).is_err(), "{text:?}");
        }
    }
}
