//! Blocks to disk and back, between the steps. What comes back goes into the prefix cache, where
//! the sequence that waits for it finds it like any other.

use std::time::{Duration, Instant};

use v4_kernels::cpu::BLOCK_LAYOUT;
use v4_proto::frame::KvDisk;

use super::active::Lookup;
use super::{Active, Engine};
use crate::kv::blocks::BLOCK_TOKENS;
use crate::kv::chain::Chain;
use crate::kv::disk::{Disk, Fetched};
use crate::kv::prefix::{Cached, Evicted, Prefix};
use crate::{Error, limits};

/// The blocks on disk.
#[derive(Debug)]
pub(super) struct Persist {
    disk: Disk,
    pub n_saved: u64,
    pub n_restored: u64,
}

impl Engine {
    /// Keeps blocks on disk from now on, and takes up those that are there. `precision` names what
    /// keys and values depend on beside the model and their type: the arithmetic of its products.
    ///
    /// # Errors
    /// [`Error::KvDisk`]: the folder cannot be used. The engine works without it.
    pub fn keep_on_disk(&mut self, options: &KvDisk, precision: &str) -> Result<(), Error> {
        let digests: Vec<String> = options.models.iter().map(ToString::to_string).collect();
        // Without a digest nobody knows what the blocks would be of.
        let Some(first) = digests.first() else { return Ok(()) };
        let name = first.replace(':', "-");
        let disk = Disk::open(options, &name, self.kv.shape.block_bytes());
        let disk = disk.map_err(|source| Error::KvDisk { path: options.root.clone(), source })?;
        let shape = format!("{:?}", self.kv.shape);
        let mut parts = vec![BLOCK_LAYOUT, precision, &shape];
        parts.extend(digests.iter().map(String::as_str));
        self.root = Chain::root(&parts);
        self.prefix = Prefix::new(true);
        self.persist = Some(Persist { disk, n_saved: 0, n_restored: 0 });
        Ok(())
    }

    /// Works in the background while there are no sequences, for some milliseconds; false when
    /// there is nothing to do.
    pub fn rest(&mut self) -> bool {
        let Some(persist) = &self.persist else { return false };
        if !self.prefix.has_unsaved() {
            return false;
        }
        persist.disk.wait_for_room(limits::SAVE_WAIT);
        self.save(1);
        true
    }

    /// Has every cached block on disk, as far as that is done within `patience`.
    pub fn flush(&mut self, patience: Duration) {
        let until = Instant::now() + patience;
        while Instant::now() < until && self.rest() {}
        if let Some(persist) = &self.persist {
            persist.disk.wait_for_writer(0, until);
        }
    }

    /// Copies up to `most` cached blocks for the disk, as far as it has room for them.
    pub(super) fn save(&mut self, most: usize) {
        let Some(persist) = &mut self.persist else { return };
        for _ in 0..most {
            if !persist.disk.has_room() {
                return;
            }
            let Some(cached) = self.prefix.next_unsaved() else { return };
            let mut bytes = Vec::with_capacity(self.kv.shape.block_bytes());
            self.kv.read_block(cached.block, &mut bytes);
            persist.disk.save(cached, bytes);
            persist.n_saved += 1;
        }
    }

    /// The last moment to save a block that the cache has given up.
    pub(super) fn save_evicted(&mut self, evicted: Evicted) {
        if let Some(persist) = &mut self.persist
            && evicted.is_unsaved
            && persist.disk.has_room()
        {
            let mut bytes = Vec::with_capacity(self.kv.shape.block_bytes());
            self.kv.read_block(evicted.cached.block, &mut bytes);
            persist.disk.save(evicted.cached, bytes);
            persist.n_saved += 1;
        }
    }

    /// Whether a waiting sequence gets blocks from disk: it is asked now if it was not before.
    pub(super) fn is_coming(&mut self, at: usize) -> bool {
        let Some(active) = self.waiting.get_mut(at) else { return false };
        if let Lookup::Coming { since, .. } = &active.lookup
            && since.elapsed() > limits::FETCH_STALL
        {
            active.lookup = Lookup::Over;
        }
        if matches!(active.lookup, Lookup::Due) {
            let asked = self.ask(at);
            self.waiting[at].lookup = asked;
        }
        matches!(self.waiting[at].lookup, Lookup::Coming { .. })
    }

    /// Asks the disk for what the prefix cache lacks of a waiting sequence.
    fn ask(&mut self, at: usize) -> Lookup {
        let Some(persist) = &mut self.persist else { return Lookup::Over };
        let active = &mut self.waiting[at];
        let chains = &active.chains[..active.before_last()];
        let known = self.prefix.touch(chains);
        let block_bytes = self.kv.shape.block_bytes();
        if !is_worth(block_bytes, persist.disk.read_rate(), self.pace.tokens_per_s()) {
            return Lookup::Over;
        }
        let Some(fetching) = persist.disk.fetch(&chains[known..], known) else {
            return Lookup::Over;
        };
        active.started.get_or_insert_with(Instant::now);
        Lookup::Coming { fetching, next: known, since: Instant::now() }
    }

    /// Takes the blocks that have come from disk, up to `most_bytes`.
    pub(super) fn take_fetched(&mut self, most_bytes: usize) {
        let mut left = most_bytes;
        while left > 0
            && let Some(fetched) = self.fetched(Duration::ZERO)
        {
            left = left.saturating_sub(self.put(fetched));
        }
    }

    /// Waits a moment for a block where there is nothing else to do.
    pub(super) fn wait_for_fetched(&mut self) {
        let is_coming = |active: &Active| matches!(active.lookup, Lookup::Coming { .. });
        if self.waiting.iter().any(is_coming)
            && let Some(fetched) = self.fetched(limits::FETCH_WAIT)
        {
            self.put(fetched);
        }
    }

    fn fetched(&self, patience: Duration) -> Option<Fetched> {
        self.persist.as_ref()?.disk.fetched(patience)
    }

    /// Puts what came into the prefix cache, in the name of the sequence that waits for it; how
    /// many bytes that were.
    fn put(&mut self, fetched: Fetched) -> usize {
        let (Fetched::Block { ticket, .. } | Fetched::End { ticket }) = fetched;
        let is_its = |active: &Active| match &active.lookup {
            Lookup::Coming { fetching, .. } => fetching.ticket == ticket,
            _ => false,
        };
        // Who asked may have left.
        let Some(at) = self.waiting.iter().position(is_its) else { return 0 };
        let Fetched::Block { bytes, .. } = fetched else {
            self.waiting[at].lookup = Lookup::Over;
            return 0;
        };
        if !self.restore(at, &bytes) {
            self.waiting[at].lookup = Lookup::Over;
        }
        bytes.len()
    }

    /// Puts the next block of a waiting sequence into the prefix cache; false where no more can.
    fn restore(&mut self, at: usize, bytes: &[u8]) -> bool {
        let active = &mut self.waiting[at];
        let Lookup::Coming { next, since, .. } = &mut active.lookup else { return false };
        let depth = *next;
        (*next, *since) = (depth + 1, Instant::now());
        let chain = active.chains[depth];
        let before = depth.checked_sub(1).map(|before| active.chains[before]);
        if self.prefix.has(&chain) {
            // Another sequence that begins alike was faster.
            return true;
        }
        let Some(block) = self.try_take_block() else { return false };
        self.kv.write_block(block, bytes);
        let cached = Cached { chain, depth, block };
        let is_kept = self.prefix.restore(&mut self.pool, before.as_ref(), cached);
        if let Some(persist) = &mut self.persist {
            persist.n_restored += u64::from(is_kept);
        }
        is_kept
    }
}

/// Whether reading a block is faster than computing it, by what is known of both: mostly by far,
/// so where one is not known it is tried.
fn is_worth(block_bytes: usize, bytes_per_s: Option<f64>, tokens_per_s: Option<f64>) -> bool {
    match (bytes_per_s, tokens_per_s) {
        (Some(bytes_per_s), Some(tokens_per_s)) => {
            block_bytes as f64 / bytes_per_s < BLOCK_TOKENS as f64 / tokens_per_s
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_where_that_is_faster() {
        // A megabyte a block: 64 tokens at that rate are 0.64 s.
        let is_worth = |bytes_per_s, tokens_per_s| is_worth(1 << 20, bytes_per_s, tokens_per_s);
        assert!(is_worth(Some(1e9), Some(100.0)));
        assert!(is_worth(Some(2e6), Some(100.0)));
        assert!(!is_worth(Some(1e6), Some(100.0)));
        assert!(is_worth(None, Some(1e9)) && is_worth(Some(1.0), None) && is_worth(None, None));
    }
}
