//! On which devices a model lies. Pure: sizes and free bytes in, a placement out.
//!
//! The best first:
//!
//! 1. All of it on one GPU: of those with room, the ablest, and among equals the one that is left
//!    with the least, so that a large model finds another one whole.
//! 2. Layers in a row over several GPUs, over as few as will do, in the order in which most fit.
//! 3. Of a mixture, the experts of the first layers in the host's memory: of all weights they are
//!    read least. All else, keys and values too, stays on GPUs. Each GPU's share is cut by bytes
//!    after that, so none is left half empty.
//! 4. The first layers on the host with all they have.
//! 5. All of it on the host.
//!
//! Among what is looked at, the least of the host is found exactly; so more free memory never leads
//! to a worse level.

use std::{cmp::Reverse, fmt, ops::Range};

use v4_proto::{ModelInfo, frame::KvType};

use super::devices::{DeviceId, HOST, Spread};
use crate::limits;

/// What a model needs, in bytes.
#[derive(Debug, Clone)]
pub struct Needs {
    /// Of all layers before a layer: their weights but for experts, and their keys and values.
    dense: Vec<u64>,
    /// Of all layers before a layer: their experts.
    experts: Vec<u64>,
    embedding: u64,
    output: u64,
    /// Where the output multiplies by the embedding: what it needs of it on another device.
    tied: u64,
    /// Weights, keys and values in one place.
    whole: u64,
    /// On each device that computes, and on the host for the process.
    scratch: u64,
}

impl Needs {
    /// Of a model that keeps `tokens` tokens of context in all.
    pub fn of(info: &ModelInfo, kv_type: KvType, tokens: u64) -> Self {
        let layout = &info.layout;
        let (mut dense, mut experts) = (vec![0_u64], vec![0_u64]);
        for run in &layout.layers {
            let kv = kv_type.bytes(run.kv_bytes_per_token).saturating_mul(tokens);
            for _ in 0..run.n {
                let before = |sums: &[u64]| sums.last().copied().unwrap_or(0);
                dense.push(before(&dense).saturating_add(run.dense).saturating_add(kv));
                experts.push(before(&experts).saturating_add(run.experts));
            }
        }
        let kv = kv_type.bytes(info.kv_bytes_per_token).saturating_mul(tokens);
        Self {
            dense,
            experts,
            embedding: layout.embedding,
            output: layout.output,
            tied: if layout.is_tied { layout.embedding } else { 0 },
            whole: info.weight_bytes.saturating_add(kv),
            scratch: limits::SCRATCH_BYTES,
        }
    }

    /// Bytes in one place.
    pub fn in_one_place(&self) -> u64 {
        self.whole.saturating_add(self.scratch)
    }

    fn n_layers(&self) -> usize {
        self.dense.len() - 1
    }

    /// Bytes that layers take on GPUs.
    fn on_gpus(&self, layers: &Range<usize>, cut: Cut) -> u64 {
        let with_experts = layers.start.max(cut.layers + cut.experts).min(layers.end);
        (self.dense[layers.end] - self.dense[layers.start])
            .saturating_add(self.experts[layers.end] - self.experts[with_experts])
    }

    /// Bytes that are left to the host.
    fn on_host(&self, cut: Cut) -> u64 {
        let embedding = if cut.layers > 0 { self.embedding } else { 0 };
        self.scratch
            .saturating_add(embedding)
            .saturating_add(self.dense[cut.layers])
            .saturating_add(self.experts[cut.layers + cut.experts])
    }
}

/// What is left to the host.
#[derive(Debug, Clone, Copy)]
struct Cut {
    /// Of the first layers, all.
    layers: usize,
    /// Of as many layers after these, the experts.
    experts: usize,
}

/// A GPU and what is free of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Free {
    /// Which.
    pub device: DeviceId,
    /// How able it is.
    pub capability: [u32; 2],
    /// Bytes.
    pub bytes: u64,
}

/// Where a model may lie.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Room {
    /// Bytes of the host.
    pub host: u64,
    /// The GPUs, the ablest first, in an order that does not depend on what is free.
    pub gpus: Vec<Free>,
    /// Over how many of them at most.
    pub max_gpus: usize,
}

/// How good a placement is, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// On GPUs.
    Gpus,
    /// On GPUs, but for the experts of so many layers.
    Experts(u32),
    /// So many layers on the host, and the experts of so many more.
    Layers(u32, u32),
    /// On the host.
    Host,
}

/// What a GPU has of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Which.
    pub device: DeviceId,
    /// These layers.
    pub layers: Range<u32>,
}

/// Where a model lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// How good that is.
    pub level: Level,
    /// The GPUs in the order of their layers. The embedding goes before the first layer, the output
    /// with the last.
    pub shares: Vec<Share>,
    /// Layers in all, as far as they are known.
    pub n_layers: u32,
    /// Bytes on each device.
    pub spread: Spread,
}

/// Finds the best place for a model.
pub fn place(needs: &Needs, room: &Room) -> Option<Placement> {
    on_one_gpu(needs, room).or_else(|| over_gpus(needs, room)).or_else(|| on_host(needs, room))
}

fn on_one_gpu(needs: &Needs, room: &Room) -> Option<Placement> {
    let bytes = needs.in_one_place();
    let fits = |gpu: &&Free| gpu.bytes >= bytes;
    let ablest = room.gpus.iter().find(fits)?.capability;
    let equals = room.gpus.iter().filter(|gpu| gpu.capability == ablest).filter(fits);
    let gpu = equals.min_by_key(|gpu| gpu.bytes)?;
    if room.host < needs.scratch {
        return None;
    }
    let mut spread = Spread::on_host(needs.scratch);
    spread.add(&gpu.device, bytes);
    let n_layers = as_u32(needs.n_layers());
    let shares = vec![Share { device: gpu.device.clone(), layers: 0..n_layers }];
    Some(Placement { level: Level::Gpus, shares, n_layers, spread })
}

fn on_host(needs: &Needs, room: &Room) -> Option<Placement> {
    let bytes = needs.in_one_place();
    let n_layers = as_u32(needs.n_layers());
    let spread = Spread::on_host(bytes);
    let placement = Placement { level: Level::Host, shares: Vec::new(), n_layers, spread };
    (bytes <= room.host).then_some(placement)
}

fn over_gpus(needs: &Needs, room: &Room) -> Option<Placement> {
    let gpus = &room.gpus[..room.gpus.len().min(limits::SPLIT_DEVICES)];
    let n_layers = needs.n_layers();
    if gpus.is_empty() || n_layers == 0 {
        return None;
    }
    // What is nowhere near is not searched for.
    let free = gpus.iter().map(|gpu| gpu.bytes).fold(room.host, u64::saturating_add);
    if needs.in_one_place() > free {
        return None;
    }
    let chain = |cut: Cut| chain(needs, (gpus, room.max_gpus), cut);
    let without_experts = |layers: usize| Cut { layers, experts: n_layers - layers };
    // More on the host is never harder for the GPUs.
    let fewest = first(n_layers, |layers| chain(without_experts(layers)).is_some());
    for layers in fewest..n_layers {
        if needs.on_host(Cut { layers, experts: 0 }) > room.host {
            break;
        }
        let experts = first(n_layers - layers, |experts| chain(Cut { layers, experts }).is_some());
        let cut = Cut { layers, experts };
        // With fewer experts there, the GPUs have too little; with more, the host has less yet.
        if needs.on_host(cut) <= room.host
            && let Some(links) = chain(cut)
        {
            return Some(placement(needs, cut, gpus, &links));
        }
    }
    None
}

/// The first number below `end` for which `is_so`, which stays so for all that follow; else `end`.
fn first(end: usize, is_so: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, end);
    while low < high {
        let middle = usize::midpoint(low, high);
        if is_so(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

/// A GPU, by its place in the list, and its layers.
type Link = (usize, Range<usize>);

/// Layers in a row over the fewest of the GPUs, in whichever order of them takes most.
///
/// For each set of GPUs, how many layers they take at most: those of the set without its last GPU,
/// and as many more as that takes.
fn chain(needs: &Needs, (gpus, max): (&[Free], usize), cut: Cut) -> Option<Vec<Link>> {
    let n_layers = needs.n_layers();
    let has_embedding = cut.layers == 0;
    // How far a set gets, and with which GPU last.
    let mut reach: Vec<Option<(usize, usize)>> = vec![None; 1 << gpus.len()];
    reach[0] = Some((cut.layers, 0));
    // The fewest GPUs, of these the ablest, and the ablest first.
    let mut whole: Option<(u32, usize, Reverse<usize>)> = None;
    for set in 1..reach.len() {
        if set.count_ones() as usize > max {
            continue;
        }
        for last in (0..gpus.len()).filter(|gpu| set & (1 << gpu) != 0) {
            let before = set & !(1 << last);
            let Some((start, _)) = reach[before] else { continue };
            let is_first = before == 0 && has_embedding;
            let own = if is_first { needs.embedding } else { 0 };
            let fixed = needs.scratch.saturating_add(own);
            let Some(free) = gpus[last].bytes.checked_sub(fixed) else { continue };
            let tied = if is_first { 0 } else { needs.tied };
            let rest = needs.on_gpus(&(start..n_layers), cut);
            if rest.saturating_add(needs.output).saturating_add(tied) <= free {
                let found = (set.count_ones(), set, Reverse(last));
                whole = Some(whole.map_or(found, |other| other.min(found)));
            }
            let fits = |n: usize| needs.on_gpus(&(start..start + n), cut) <= free;
            // The first number that does not fit is one too many.
            let n = first(n_layers - start + 1, |n| !fits(n)).saturating_sub(1);
            if reach[set].is_none_or(|(other, _)| other <= start + n) {
                reach[set] = Some((start + n, last));
            }
        }
    }
    let (_, mut set, Reverse(mut last)) = whole?;
    let mut links = Vec::new();
    let mut end = n_layers;
    while set != 0 {
        set &= !(1 << last);
        let (start, before) = reach[set]?;
        links.push((last, start..end));
        (end, last) = (start, before);
    }
    links.reverse();
    Some(links)
}

fn placement(needs: &Needs, cut: Cut, gpus: &[Free], links: &[Link]) -> Placement {
    let mut spread = Spread::on_host(needs.on_host(cut));
    let has_embedding = cut.layers == 0;
    for (at, (gpu, layers)) in links.iter().enumerate() {
        let (is_first, is_last) = (at == 0 && has_embedding, at + 1 == links.len());
        let tied = if is_first { 0 } else { needs.tied };
        let bytes = needs
            .on_gpus(layers, cut)
            .saturating_add(needs.scratch)
            .saturating_add(if is_first { needs.embedding } else { 0 })
            .saturating_add(if is_last { needs.output.saturating_add(tied) } else { 0 });
        spread.add(&gpus[*gpu].device, bytes);
    }
    let share = |(gpu, layers): &Link| Share {
        device: gpus[*gpu].device.clone(),
        layers: as_u32(layers.start)..as_u32(layers.end),
    };
    let level = match (as_u32(cut.layers), as_u32(cut.experts)) {
        (0, 0) => Level::Gpus,
        (0, experts) => Level::Experts(experts),
        (layers, experts) => Level::Layers(layers, experts),
    };
    let n_layers = as_u32(needs.n_layers());
    Placement { level, shares: links.iter().map(share).collect(), n_layers, spread }
}

/// A count of layers, which a header bounds.
fn as_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.n_layers;
        match self.shares.as_slice() {
            [] => f.write_str("on the host")?,
            [share] if share.layers.len() == n as usize => write!(f, "on {}", share.device)?,
            shares => {
                f.write_str("over")?;
                for (at, Share { device, layers }) in shares.iter().enumerate() {
                    let joint = if at == 0 { "" } else { " and" };
                    match layers.len() {
                        0 => write!(f, "{joint} {device} (no layer, but an end)")?,
                        own => write!(f, "{joint} {device} ({own} of {n} layers)")?,
                    }
                }
            }
        }
        let experts = match self.level {
            Level::Experts(experts) => experts,
            Level::Layers(layers, experts) => {
                write!(f, ", with {} on the {HOST}", Layers(layers))?;
                experts
            }
            Level::Gpus | Level::Host => 0,
        };
        match experts {
            0 => Ok(()),
            _ => write!(f, ", with the experts of {} in the {HOST}'s memory", Layers(experts)),
        }
    }
}

/// So many layers, as a person says it.
struct Layers(u32);

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layer{}", self.0, if self.0 == 1 { "" } else { "s" })
    }
}
