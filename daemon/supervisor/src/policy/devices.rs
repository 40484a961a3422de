//! The devices that models have memory on: the host, and the GPUs that a runner has told of and
//! that this build computes on. What others use there is theirs.

use std::{collections::BTreeMap, fmt, sync::Arc};

use v4_proto::{
    Gpu, Inventory,
    frame::{GpuShare, OnGpus},
};

use super::{Level, Model, Placement, Reason, Share, State, worth::Mib};
use crate::limits;

/// What a device is called: `host`, or `gpu0` and so on by the driver's order. One name means one
/// device as long as the daemon runs.
pub type DeviceId = Arc<str>;

/// The host's name among the devices.
pub const HOST: &str = "host";

/// Bytes by device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spread(BTreeMap<DeviceId, u64>);

impl Spread {
    /// All of `bytes` on the host.
    pub fn on_host(bytes: u64) -> Self {
        let mut spread = Self::default();
        spread.add(&HOST.into(), bytes);
        spread
    }

    /// Bytes on one device.
    pub fn of(&self, device: &str) -> u64 {
        self.0.get(device).copied().unwrap_or(0)
    }

    /// Bytes on all of them.
    pub fn total(&self) -> u64 {
        self.0.values().copied().fold(0, u64::saturating_add)
    }

    /// Bytes on all but the host.
    pub fn on_gpus(&self) -> u64 {
        self.total().saturating_sub(self.of(HOST))
    }

    /// The devices with any bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&DeviceId, u64)> {
        self.0.iter().filter(|(_, bytes)| **bytes > 0).map(|(device, bytes)| (device, *bytes))
    }

    /// Adds bytes on one device.
    pub fn add(&mut self, device: &DeviceId, bytes: u64) {
        let sum = self.0.entry(Arc::clone(device)).or_default();
        *sum = sum.saturating_add(bytes);
    }

    /// Both together.
    pub fn plus(mut self, other: &Self) -> Self {
        for (device, bytes) in &other.0 {
            self.add(device, *bytes);
        }
        self
    }

    /// What is left of it, on no device less than nothing.
    pub fn minus(mut self, other: &Self) -> Self {
        for (device, bytes) in &mut self.0 {
            *bytes = bytes.saturating_sub(other.of(device));
        }
        self
    }

    /// The lesser of both on each device.
    pub fn least(mut self, other: &Self) -> Self {
        for (device, bytes) in &mut self.0 {
            *bytes = (*bytes).min(other.of(device));
        }
        self
    }

    /// The same on the same devices, but for the one with the most: there the total comes to
    /// `bytes`. A runner says how much it takes, and not where.
    pub(super) fn resized(mut self, bytes: u64) -> Self {
        let total = self.total();
        let most = self.0.values_mut().max_by_key(|bytes| **bytes);
        match most {
            Some(most) => *most = most.saturating_add(bytes).saturating_sub(total),
            None => self = Self::on_host(bytes),
        }
        self
    }
}

/// A GPU as it was last told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name here.
    pub id: DeviceId,
    /// What its driver says.
    pub gpu: Gpu,
    /// Whether the last inventory had it.
    is_there: bool,
    /// Bytes that other programs had, in the last two inventories.
    others: [u64; 2],
    /// Bytes that models of ours had, in the last one.
    own: u64,
}

impl Device {
    /// Whether a model may lie there.
    pub fn is_usable(&self) -> bool {
        self.is_there && self.gpu.can_compute
    }

    /// Bytes that v4 could have if it was alone.
    fn whole(&self) -> u64 {
        let own = if self.is_usable() { self.gpu.total_bytes } else { 0 };
        own.saturating_sub(limits::GPU_RESERVE_BYTES)
    }

    /// Bytes that other programs have. What was there in one inventory alone may be the rest of a
    /// runner that was ending.
    pub fn others_bytes(&self) -> u64 {
        self.others[0].min(self.others[1])
    }

    /// Bytes that models may take.
    pub fn budget_bytes(&self) -> u64 {
        self.whole().saturating_sub(self.others_bytes())
    }

    /// Why no model lies there, if none may.
    pub fn why_not(&self) -> Option<&'static str> {
        match self {
            Self { is_there: false, .. } => Some("it has gone"),
            Self { gpu: Gpu { can_compute: false, .. }, .. } => {
                Some("this build of v4 has no kernels for it")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Gpu { name, total_bytes, capability: [major, minor], .. } = &self.gpu;
        write!(f, "{} ({name}, {}, compute {major}.{minor})", self.id, Mib(*total_bytes))
    }
}

/// All devices but the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices {
    gpus: Vec<Device>,
    complaints: Vec<String>,
    /// Whether any runner has told of them.
    is_known: bool,
}

impl Devices {
    /// Takes over what a runner has told; `own` says what models of ours take on a device.
    pub(super) fn update(&mut self, inventory: Inventory, own: &Spread) {
        self.is_known = true;
        self.complaints = inventory.complaints;
        if inventory.is_blind {
            return;
        }
        for known in &mut self.gpus {
            known.is_there = inventory.gpus.iter().any(|gpu| gpu.uuid == known.gpu.uuid);
        }
        for gpu in inventory.gpus {
            let known = self.gpus.iter_mut().find(|known| known.gpu.uuid == gpu.uuid);
            if let Some(known) = known {
                let own = own.of(&known.id);
                let others = gpu.used_bytes.saturating_sub(own);
                // Where nothing of ours was, nothing of it can be ending.
                let before = if own.max(known.own) == 0 { others } else { known.others[1] };
                (known.others, known.own) = ([before, others], own);
                known.gpu = gpu;
            } else if self.gpus.len() < limits::DEVICES {
                let (id, used) = (self.free_id(gpu.index), gpu.used_bytes);
                self.gpus.push(Device { id, gpu, is_there: true, others: [used; 2], own: 0 });
            }
        }
    }

    /// A name that no device had yet.
    fn free_id(&self, index: u32) -> DeviceId {
        let is_free = |id: &DeviceId| self.gpus.iter().all(|known| known.id != *id);
        let mut ids = (index..=u32::MAX).map(|n| format!("gpu{n}").into());
        ids.find(is_free).unwrap_or_else(|| format!("gpu-{index}").into())
    }

    /// Whether any runner has told of them.
    pub fn is_known(&self) -> bool {
        self.is_known
    }

    /// All that were ever told of.
    pub fn all(&self) -> impl Iterator<Item = &Device> {
        self.gpus.iter()
    }

    /// Those that models may lie on, the ablest first; this order does not depend on what is free.
    pub(super) fn usable(&self) -> Vec<&Device> {
        let mut usable: Vec<&Device> = self.gpus.iter().filter(|it| it.is_usable()).collect();
        usable.sort_by_key(|it| {
            let Gpu { capability, total_bytes, index, .. } = it.gpu;
            (std::cmp::Reverse((capability, total_bytes)), index)
        });
        usable
    }

    /// What drivers complain of.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// Why devices are not used, a sentence each.
    pub fn unused(&self) -> Vec<String> {
        let why = |it: &Device| Some(format!("{it} is not used: {}", it.why_not()?));
        self.gpus.iter().filter_map(why).chain(self.complaints.iter().cloned()).collect()
    }

    /// The device of that name or UUID.
    pub(super) fn find(&self, name: &str) -> Option<&Device> {
        let is_it = |it: &&Device| {
            it.id.eq_ignore_ascii_case(name) || it.gpu.uuid.eq_ignore_ascii_case(name)
        };
        self.gpus.iter().find(is_it)
    }
}

impl State {
    /// Bytes that models may take of each device.
    pub(super) fn budgets(&self) -> Spread {
        let mut budgets = Spread::on_host(self.rules.budget_bytes);
        for device in self.devices.usable() {
            budgets.add(&device.id, device.budget_bytes());
        }
        budgets
    }

    /// Bytes that are taken, or promised to a load that has begun.
    pub(super) fn used(&self) -> Spread {
        let held = self.runners.values().map(|runner| &runner.held);
        held.fold(self.held_back(), Spread::plus)
    }

    /// What another process holds that is about to leave: all of it counts for the host.
    pub(super) fn held_back(&self) -> Spread {
        Spread::on_host(self.held_back)
    }

    /// Why models must leave a device where they take more than they may.
    pub(super) fn excess(&self, device: &DeviceId, used: u64) -> Reason {
        match self.devices.find(device) {
            Some(it) if !it.is_usable() => Reason::Lost(Arc::clone(device)),
            Some(it) if used <= it.whole() => Reason::Others(Arc::clone(device)),
            _ => Reason::OverBudget,
        }
    }

    /// Bytes that models take on all GPUs together.
    pub fn gpu_bytes(&self) -> u64 {
        self.runners.values().map(|runner| runner.held.on_gpus()).fold(0, u64::saturating_add)
    }

    /// The devices beside the host.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Where a model lies, in words, if it could lie elsewhere.
    pub fn place_of(&self, model: &Model) -> Option<String> {
        self.has_choice().then(|| model.placement.to_string())
    }

    /// The same for its runner; nothing where it lies on the host.
    pub fn on_gpus(&self, model: &Model) -> Option<OnGpus> {
        let Placement { level, shares, .. } = &model.placement;
        let experts_from = match *level {
            Level::Host => return None,
            Level::Gpus => 0,
            Level::Experts(experts) => experts,
            Level::Layers(layers, experts) => layers.saturating_add(experts),
        };
        let share = |share: &Share| {
            let uuid = self.devices.find(&share.device)?.gpu.uuid.clone();
            Some(GpuShare { uuid, layers: [share.layers.start, share.layers.end] })
        };
        let shares = shares.iter().map(share).collect::<Option<Vec<GpuShare>>>()?;
        Some(OnGpus { shares, experts_from })
    }

    /// Whether a model may lie on more than the host.
    pub fn has_choice(&self) -> bool {
        self.devices.gpus.iter().any(Device::is_usable)
    }

    /// Whether what other programs take on a device matters now.
    pub fn watches_devices(&self) -> bool {
        let has_work = self.runners.values().any(|runner| runner.model.is_some());
        has_work && self.has_choice()
    }
}
