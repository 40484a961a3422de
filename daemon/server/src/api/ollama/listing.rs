//! Listings, versions and pulls as Ollama's clients read them.

use std::net::SocketAddr;

use jiff::Timestamp;
use serde::Serialize;
use v4_proto::Ability;
use v4_pull::{Progress, Stage};
use v4_supervisor::{Loaded, State};

use crate::{
    api::{bytes, clock, line, ollama::COMPATIBLE_WITH},
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
            // This build computes on the CPU alone.
            size_vram: 0,
            context_length: loaded.context,
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
struct PullLine<'a> {
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed: Option<u64>,
}

impl<'a> PullLine<'a> {
    fn status(status: &'a str) -> Self {
        Self { status, digest: None, total: None, completed: None }
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
}

impl PullLines {
    /// The lines that are new since the last call. A failure is not written here.
    pub fn lines(&mut self, progress: &Progress) -> Vec<u8> {
        let mut out = Vec::new();
        self.reach(1, "pulling manifest", &mut out);
        self.files(progress, &mut out);
        if !matches!(progress.stage, Stage::Manifest | Stage::File(_) | Stage::Failed(_)) {
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
        for (file, written) in progress.files.iter().zip(&mut self.written) {
            let is_waiting = file.completed == 0 && !file.is_done;
            let is_told = *written == Some(file.completed) || (written.is_none() && is_waiting);
            if is_told {
                continue;
            }
            *written = Some(file.completed);
            let status = match &file.digest {
                Some(digest) => format!("pulling {}", digest.short()),
                None => "pulling a file".to_owned(),
            };
            out.extend(line(&PullLine {
                status: &status,
                digest: file.digest.as_ref().map(ToString::to_string),
                total: file.total,
                completed: Some(file.completed).filter(|&n| n > 0),
            }));
        }
    }

    /// The last word of a pull that was not watched: `success`.
    pub fn last() -> Vec<u8> {
        bytes(&PullLine::status("success"))
    }
}
