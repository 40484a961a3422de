//! Listings, versions and pulls as Ollama's clients read them.

use std::{net::SocketAddr, num::NonZeroU64};

use jiff::Timestamp;
use serde::Serialize;
use v4_proto::Ability;
use v4_pull::{Progress, Stage};
use v4_supervisor::{Loaded, State};

use crate::{
    api::{bytes, clock, line, ollama::COMPATIBLE_WITH},
    config::{self, Config},
    keys,
    ops::models::{Facts, Listed},
};

/// What Ollama calls the details of a model.
#[derive(Serialize)]
pub struct Details {
    parent_model: &'static str,
    format: String,
    family: String,
    families: Vec<String>,
    parameter_size: String,
    quantization_level: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    context_length: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding_length: Option<u32>,
}

impl From<Facts> for Details {
    fn from(facts: Facts) -> Self {
        Self {
            parent_model: "",
            format: facts.format,
            families: vec![facts.family.clone()],
            family: facts.family,
            parameter_size: facts.parameter_size,
            quantization_level: facts.quant,
            context_length: facts.context_length,
            embedding_length: facts.embedding_length,
        }
    }
}

#[derive(Serialize)]
struct Models<T> {
    models: Vec<T>,
}

#[derive(Serialize)]
struct Tag {
    name: String,
    model: String,
    modified_at: String,
    size: u64,
    digest: String,
    details: Details,
    #[serde(skip_serializing_if = "Option::is_none")]
    capabilities: Option<Vec<Ability>>,
}

/// `/api/tags`.
pub fn tags(models: Vec<Listed>) -> Vec<u8> {
    let tag = |Listed { entry, mut facts }: Listed| {
        let name = entry.name.to_string();
        Tag {
            model: name.clone(),
            name,
            modified_at: clock::local(entry.modified),
            size: entry.size_bytes,
            digest: entry.digest.hex(),
            capabilities: facts.abilities.take(),
            details: facts.into(),
        }
    };
    bytes(&Models { models: models.into_iter().map(tag).collect() })
}

#[derive(Serialize)]
struct Running {
    name: String,
    model: String,
    size: u64,
    digest: String,
    details: Details,
    expires_at: String,
    size_vram: u64,
    context_length: u32,
    /// v4's own: on which devices it lies, if there is a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    placement: Option<String>,
    /// v4's own: `loading`, `ready` or `draining`.
    state: &'static str,
    /// v4's own: why the last attempt to replace it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// `/api/ps`.
pub fn ps(models: Vec<Loaded>, now: Timestamp) -> Vec<u8> {
    let running = |loaded: Loaded| {
        let name = loaded.name.to_string();
        Running {
            model: name.clone(),
            name,
            size: loaded.size_bytes,
            digest: loaded.digest.hex(),
            details: Facts::from(&loaded.info).into(),
            expires_at: match loaded.state {
                // It is on its way out whatever its keep-alive was.
                State::Draining => clock::local(now.into()),
                State::Loading | State::Ready => clock::expiry(loaded.expires, now),
            },
            size_vram: loaded.gpu_bytes,
            context_length: loaded.context,
            placement: loaded.place,
            state: match loaded.state {
                State::Loading => "loading",
                State::Ready => "ready",
                State::Draining => "draining",
            },
            error: loaded.error.map(|fault| fault.message),
        }
    };
    bytes(&Models { models: models.into_iter().map(running).collect() })
}

#[derive(Serialize)]
struct Version {
    version: &'static str,
    v4: Ours,
}

#[derive(Serialize)]
struct Ours {
    version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<String>,
}

/// `/api/version`: the level of the interface, and in `v4` our own version and where TCP clients
/// are served.
pub fn version(listen: Option<&SocketAddr>) -> Vec<u8> {
    let version = env!("CARGO_PKG_VERSION");
    let ours = Ours { version, listen: listen.map(ToString::to_string) };
    bytes(&Version { version: COMPATIBLE_WITH, v4: ours })
}

#[derive(Serialize)]
struct Pulls {
    pulls: Vec<Pull>,
    limit_rate: Option<NonZeroU64>,
}

#[derive(Serialize)]
struct Pull {
    name: String,
    status: String,
    completed: u64,
    /// Of the files whose sizes are known.
    total: u64,
    limit_rate: Option<NonZeroU64>,
    detached: bool,
}

/// `/api/pulls`, v4's own: the pulls that run, and the bound on all of them together in bytes a
/// second.
pub fn pulls(running: &[v4_pull::Running], limit_rate: Option<NonZeroU64>) -> Vec<u8> {
    let pull = |one: &v4_pull::Running| Pull {
        name: one.name.to_string(),
        status: match &one.progress.stage {
            Stage::Manifest => "pulling manifest".to_owned(),
            Stage::File(_) => "pulling".to_owned(),
            Stage::Paused(None) => "paused".to_owned(),
            Stage::Paused(Some(why)) => format!("paused: {why}"),
            Stage::Verifying => "verifying sha256 digest".to_owned(),
            Stage::Writing => "writing manifest".to_owned(),
            Stage::Done { .. } => "success".to_owned(),
            Stage::Moved => "moved to the new v4".to_owned(),
            Stage::Failed(fault) => fault.message.clone(),
        },
        completed: one.progress.files.iter().map(|file| file.completed).sum(),
        total: one.progress.files.iter().filter_map(|file| file.total).sum(),
        limit_rate: one.rate,
        detached: one.is_detached,
    };
    bytes(&Pulls { pulls: running.iter().map(pull).collect(), limit_rate })
}

#[derive(Serialize)]
struct Costs {
    models: Vec<OneCost>,
    orphans: u64,
    deleted: u64,
    partials: u64,
    kv: u64,
    total: u64,
}

#[derive(Serialize)]
struct OneCost {
    name: String,
    own: u64,
    shared: u64,
}

/// `/api/du`, v4's own: bytes that each name has alone and with others, that none has, that only
/// deleted names have, of downloads that are not done, of idle conversations, and of everything
/// once.
pub fn usage(usage: &v4_store::Usage) -> Vec<u8> {
    let cost = |one: &v4_store::Cost| OneCost {
        name: one.name.to_string(),
        own: one.own_bytes,
        shared: one.shared_bytes,
    };
    bytes(&Costs {
        models: usage.names.iter().map(cost).collect(),
        orphans: usage.orphan_bytes,
        deleted: usage.deleted_bytes,
        partials: usage.partial_bytes,
        kv: usage.kv_bytes,
        total: usage.total_bytes,
    })
}

#[derive(Serialize)]
struct Roots {
    roots: Vec<Root>,
}

#[derive(Serialize)]
struct Root {
    path: String,
    kind: &'static str,
}

/// `/api/roots`, v4's own: the other programs' stores that are read in place.
pub fn roots(roots: &[v4_store::Root]) -> Vec<u8> {
    let root = |one: &v4_store::Root| Root {
        path: one.path.display().to_string(),
        kind: match one.kind {
            v4_store::RootKind::Ollama => "ollama",
            v4_store::RootKind::HuggingFace => "huggingface",
        },
    };
    bytes(&Roots { roots: roots.iter().map(root).collect() })
}

#[derive(Serialize)]
struct Removed {
    name: String,
    digest: String,
    size: u64,
    deleted_at: String,
}

/// `/api/deleted`, v4's own: the names that can come back.
pub fn deleted(entries: &[v4_store::Entry]) -> Vec<u8> {
    let one = |entry: &v4_store::Entry| Removed {
        name: entry.name.to_string(),
        digest: entry.digest.hex(),
        size: entry.size_bytes,
        deleted_at: clock::local(entry.modified),
    };
    bytes(&Models { models: entries.iter().map(one).collect() })
}

/// `/api/pins`, v4's own: the names that no quota removes.
pub fn pins(names: &[v4_proto::ModelName]) -> Vec<u8> {
    bytes(&Models { models: names.iter().map(ToString::to_string).collect() })
}

#[derive(Serialize)]
struct Keys<'a> {
    keys: Vec<Key<'a>>,
}

#[derive(Serialize)]
struct Key<'a> {
    name: &'a str,
    scope: keys::Scope,
    made: &'a str,
}

/// `/api/keys`, v4's own: what is known of the keys.
pub fn keys(keys: &[keys::Key]) -> Vec<u8> {
    bytes(&Keys { keys: keys.iter().map(Key::of).collect() })
}

impl<'a> Key<'a> {
    fn of(key: &'a keys::Key) -> Self {
        Self { name: &key.name, scope: key.scope, made: &key.made }
    }
}

#[derive(Serialize)]
struct NewKey<'a> {
    key: &'a str,
}

/// `/api/keys`, v4's own: a key that was made, the only time that it is told.
pub fn new_key(text: &str) -> Vec<u8> {
    bytes(&NewKey { key: text })
}

#[derive(Serialize)]
struct Effective<'a> {
    file: Option<String>,
    settings: Vec<One<'a>>,
    ignored: Vec<Ignored<'a>>,
}

#[derive(Serialize)]
struct One<'a> {
    key: &'static str,
    variable: &'static str,
    value: Option<&'a str>,
    source: String,
    /// Whether a change counts without a restart.
    live: bool,
}

#[derive(Serialize)]
struct Ignored<'a> {
    variable: &'static str,
    value: &'a str,
    why: &'a str,
}

/// `/api/config`, v4's own: what counts now, and who said it.
pub fn config(config: &Config) -> Vec<u8> {
    let origin = &config.origin;
    bytes(&Effective {
        file: origin.file.as_ref().map(|path| path.display().to_string()),
        settings: config::SETTINGS.iter().zip(&origin.said).map(One::of).collect(),
        ignored: origin.ignored.iter().map(Ignored::of).collect(),
    })
}

impl<'a> One<'a> {
    fn of((setting, said): (&config::Setting, &'a config::Said)) -> Self {
        let shown = |text| if setting.is_secret() { "…" } else { text };
        Self {
            key: setting.key,
            variable: setting.variable,
            value: said.text.as_deref().map(shown),
            source: said.source.to_string(),
            live: setting.change == config::Change::Live,
        }
    }
}

impl<'a> Ignored<'a> {
    fn of(one: &'a config::Ignored) -> Self {
        Self { variable: one.variable, value: &one.value, why: &one.why }
    }
}

#[derive(Serialize)]
struct Reloaded<'a> {
    changed: &'a [&'static str],
    at_next_start: &'a [&'static str],
}

/// `/api/config/reload`, v4's own: what changed, and what will at the next start.
pub fn reloaded(again: &config::Again) -> Vec<u8> {
    bytes(&Reloaded { changed: &again.changed, at_next_start: &again.at_start })
}

#[derive(Serialize)]
struct Freed {
    freed: u64,
}

/// `/api/prune`, v4's own: the bytes that came free.
pub fn freed(freed: u64) -> Vec<u8> {
    bytes(&Freed { freed })
}

#[derive(Serialize)]
struct PullLine<'a> {
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed: Option<u64>,
    /// v4's own: who sends the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'a str>,
    /// v4's own: all files together.
    #[serde(skip_serializing_if = "Option::is_none")]
    overall: Option<Overall>,
}

/// Bytes of all files whose sizes are known, and those of them that are here.
#[derive(Serialize, Clone, Copy)]
struct Overall {
    total: u64,
    completed: u64,
}

impl<'a> PullLine<'a> {
    fn status(status: &'a str) -> Self {
        Self { status, digest: None, total: None, completed: None, source: None, overall: None }
    }
}

/// Writes a pull's progress. A reader that sees only some of the progress still gets each status
/// once, in order, and each file at its end.
#[derive(Debug, Default)]
pub struct PullLines {
    /// Statuses written so far, as a number that only grows.
    reached: u8,
    /// Bytes last written of each file.
    written: Vec<Option<u64>>,
    /// How many notes were written.
    n_notes: usize,
    /// Whether the last word was that it waits.
    is_paused: bool,
    /// Whether it goes the other way.
    is_push: bool,
}

impl PullLines {
    /// The lines that are new since the last call. A failure is not written here.
    pub fn lines(&mut self, progress: &Progress) -> Vec<u8> {
        let mut out = Vec::new();
        if self.is_push {
            self.reach(1, "retrieving manifest", &mut out);
            self.files(progress, &mut out);
            if matches!(progress.stage, Stage::Writing | Stage::Done { .. }) {
                self.reach(2, "pushing manifest", &mut out);
            }
            if matches!(progress.stage, Stage::Done { .. }) {
                self.reach(3, "success", &mut out);
            }
            return out;
        }
        self.reach(1, "pulling manifest", &mut out);
        for note in progress.notes.iter().skip(self.n_notes) {
            out.extend(line(&PullLine::status(note)));
        }
        self.n_notes = progress.notes.len();
        self.files(progress, &mut out);
        if let Stage::Paused(why) = &progress.stage {
            let status = why.as_ref().map_or("paused".to_owned(), |why| format!("paused: {why}"));
            if !self.is_paused {
                out.extend(line(&PullLine::status(&status)));
            }
        }
        self.is_paused = matches!(progress.stage, Stage::Paused(_));
        let is_early = matches!(progress.stage, Stage::Manifest | Stage::File(_));
        if !is_early && !matches!(progress.stage, Stage::Paused(_) | Stage::Failed(_)) {
            self.reach(2, "verifying sha256 digest", &mut out);
        }
        if matches!(progress.stage, Stage::Writing | Stage::Done { .. }) {
            self.reach(3, "writing manifest", &mut out);
        }
        if let Stage::Done { unsupported, .. } = &progress.stage {
            if let Some(why) = unsupported {
                let note = format!("warning: the model is stored, but cannot run: {why}");
                self.reach(4, &note, &mut out);
            }
            self.reach(5, "success", &mut out);
        }
        out
    }

    fn reach(&mut self, number: u8, status: &str, out: &mut Vec<u8>) {
        if self.reached < number {
            self.reached = number;
            out.extend(line(&PullLine::status(status)));
        }
    }

    fn files(&mut self, progress: &Progress, out: &mut Vec<u8>) {
        self.written.resize(progress.files.len(), None);
        let known = || progress.files.iter().filter(|file| file.total.is_some());
        let overall = Overall {
            total: known().filter_map(|file| file.total).sum(),
            completed: known().map(|file| file.completed).sum(),
        };
        for (file, written) in progress.files.iter().zip(&mut self.written) {
            let is_waiting = file.completed == 0 && !file.is_done;
            let is_told = *written == Some(file.completed) || (written.is_none() && is_waiting);
            if is_told {
                continue;
            }
            *written = Some(file.completed);
            let status = match &file.digest {
                Some(digest) if self.is_push => format!("pushing {}", digest.short()),
                Some(digest) => format!("pulling {}", digest.short()),
                None => "pulling a file".to_owned(),
            };
            out.extend(line(&PullLine {
                status: &status,
                digest: file.digest.as_ref().map(ToString::to_string),
                total: file.total,
                completed: Some(file.completed).filter(|&n| n > 0),
                source: file.source.as_deref(),
                overall: Some(overall),
            }));
        }
    }

    /// The lines of a push.
    pub fn of_push() -> Self {
        Self { is_push: true, ..Self::default() }
    }

    /// A line that only says a status.
    pub fn status_line(status: &str) -> Vec<u8> {
        line(&PullLine::status(status))
    }

    /// The first word of a pull: all that is said of one that nobody watches.
    pub fn first() -> Vec<u8> {
        bytes(&PullLine::status("pulling manifest"))
    }

    /// The last word of a pull that was not watched: `success`.
    pub fn last() -> Vec<u8> {
        bytes(&PullLine::status("success"))
    }
}
