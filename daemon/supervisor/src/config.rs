//! What the supervisor is told once, and what it is asked for each time.

use std::{path::PathBuf, time::Duration};

use v4_proto::frame::{KvType, Precision};
use v4_proto::{Digest, ModelFiles, ModelInfo, ModelName};

use crate::policy::{Caller, ModelTable};

/// How long a model stays loaded after its last answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepAlive {
    /// So long; zero unloads it as soon as nobody uses it.
    For(Duration),
    /// Until it is unloaded or its memory is needed.
    Forever,
}

impl From<Duration> for KeepAlive {
    fn from(duration: Duration) -> Self {
        Self::For(duration)
    }
}

/// What a client says beside what it asks for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Terms {
    /// How long the model stays loaded after it; `None` is the daemon's setting.
    pub keep_alive: Option<KeepAlive>,
    /// Who it is: those of one caller take turns with those of others.
    pub caller: Caller,
}

/// Where keys and values of idle conversations are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvFolder {
    /// The folder; each model has one of its own in it.
    pub path: PathBuf,
    /// Bytes that it may take.
    pub quota_bytes: u64,
}

/// What the supervisor is told at its start.
#[derive(Debug, Clone)]
pub struct SupervisorConfig {
    /// The executable that is started with `runner`. `/proc/self/exe` stays the running build even
    /// after an upgrade on disk.
    pub exe: PathBuf,
    /// For asks that say nothing about it.
    pub keep_alive: KeepAlive,
    /// Requests that may wait for one model; one more is refused at once.
    pub max_queue: usize,
    /// Bytes that all loaded models may take; `None` is a share of what is available at the start.
    pub memory_bytes: Option<u64>,
    /// Tokens of context a sequence gets; cut to what the model was trained for.
    pub context: u32,
    /// Sequences of one model that run at a time.
    pub slots: u32,
    /// Threads for kernels; 0 is one a physical core.
    pub threads: u32,
    /// How keys and values are kept.
    pub kv_type: KvType,
    /// How exact products are.
    pub precision: Precision,
    /// Where they outlive a runner; `None` is nowhere.
    pub kv_disk: Option<KvFolder>,
    /// An instruction set by name instead of the machine's best.
    pub isa: Option<String>,
    /// Whether one more runner is kept started, so that a load does not wait for a process.
    pub spare: bool,
    /// What is said of single models.
    pub models: ModelTable,
}

impl Default for SupervisorConfig {
    fn default() -> Self {
        Self {
            exe: PathBuf::from("/proc/self/exe"),
            keep_alive: KeepAlive::For(Duration::from_mins(5)),
            max_queue: 512,
            memory_bytes: None,
            context: 4096,
            slots: 4,
            threads: 0,
            kv_type: KvType::F16,
            precision: Precision::Fast,
            kv_disk: None,
            isa: None,
            spare: true,
            models: ModelTable::default(),
        }
    }
}

/// A model as the store knows it at the moment of an ask.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The name it was asked for by.
    pub name: ModelName,
    /// The digest of the manifest.
    pub digest: Digest,
    /// What a runner opens.
    pub files: ModelFiles,
    /// The blobs behind `files`: leased as long as a runner has them open.
    pub blobs: Vec<Digest>,
    /// The figures, where they are known; else a short-lived runner reads them first.
    pub info: Option<ModelInfo>,
}
