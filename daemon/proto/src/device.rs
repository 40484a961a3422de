//! What a runner sees of the machine's devices.

use serde::{Deserialize, Serialize};

/// A GPU as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its place in the driver's order: the `0` of `gpu0`.
    pub index: u32,
    /// What it is sold as.
    pub name: String,
    /// What it is called wherever it is plugged in.
    pub uuid: String,
    /// Bytes of its memory.
    pub total_bytes: u64,
    /// Of these, bytes that are in use, by whomever.
    pub used_bytes: u64,
    /// Compute capability: major and minor.
    pub capability: [u32; 2],
    /// Whether this build's engine can compute there.
    pub can_compute: bool,
}

/// The devices beside the host, which every runner has and can compute on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Those that say what they are.
    pub gpus: Vec<Gpu>,
    /// What drivers and devices complain of, a sentence each; nothing where there is no driver.
    pub complaints: Vec<String>,
    /// Whether a driver is there and says nothing at all, as after an update of it: its devices
    /// are no less there than before.
    #[serde(default)]
    pub is_blind: bool,
}
