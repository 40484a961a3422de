//! Sequences that begin alike: what one has computed, the others take, while it still runs. Several
//! answers to one prompt, and agents with one long instruction, read it once.

use std::time::Instant;

use super::{Active, Engine};
use crate::kv::blocks::BLOCK_TOKENS;

/// Tokens of a block that are worth copying it: fewer are computed as fast.
const WORTH_TOKENS: usize = 8;

impl Engine {
    /// Makes the blocks that have become full known to the prefix cache.
    pub(super) fn publish(&mut self) {
        for active in &mut self.running {
            let full = active.cached / BLOCK_TOKENS;
            if full > active.published {
                self.root.extend(&mut active.chains, &active.tokens);
                let (chains, from) = (&active.chains[..full], active.published);
                self.prefix.keep(&mut self.pool, chains, &active.blocks, from);
                active.published = full;
            }
        }
    }

    /// Whether a waiting sequence begins like one whose prompt is being read, further than is
    /// known: it starts when that has been read. Nobody waits so for one in the background who is
    /// not there too.
    pub(super) fn follows(&self, at: usize) -> bool {
        let now = Instant::now();
        let active = &self.waiting[at];
        let own = &active.chains[..active.before_last()];
        let known = self.prefix.known(own);
        let is_patient = active.load(now).is_background;
        self.running.iter().any(|leader| {
            let load = leader.load(now);
            let same = own.iter().zip(&leader.chains).take_while(|(a, b)| a == b).count();
            load.pending > 1
                && same > known
                && same > load.cached / BLOCK_TOKENS
                && (is_patient || !load.is_background)
        })
    }

    /// Copies the block that a sequence which is about to start would only partly have in common
    /// with one that runs: both go on in a block of their own.
    pub(super) fn copy_alike(&mut self, active: &mut Active) {
        let (n_blocks, start) = (active.blocks.len(), active.cached);
        // The last token is always computed: its logits are wanted.
        let wanted = &active.tokens[start..active.tokens.len() - 1];
        let same = |other: &Active| {
            let chain = n_blocks.checked_sub(1);
            let is_alike =
                chain.is_none_or(|last| other.chains.get(last) == active.chains.get(last));
            let own = other.tokens.get(start..other.cached).filter(|_| is_alike)?;
            let n = own.iter().zip(wanted).take_while(|(a, b)| a == b).count();
            Some((n.min(BLOCK_TOKENS), *other.blocks.get(n_blocks)?))
        };
        let best = self.running.iter().filter_map(same).max_by_key(|&(n, _)| n);
        let Some((n, from)) = best.filter(|&(n, _)| n >= WORTH_TOKENS) else { return };
        let Some(to) = self.try_take_block() else { return };
        let copied = self.model.device_mut().kv_copy(&mut self.kv, &[(from, to)]);
        if copied.is_ok() {
            active.blocks.push(to);
            active.cached += n;
        } else {
            self.pool.release(to);
        }
    }
}
