//! The prefix cache: full blocks of ended sequences, found again by their tokens.
//!
//! A block is known by the block before it and its own tokens, all of them, so a match is never a
//! guess. The cache holds its blocks like a sequence does; those that nobody else holds are given
//! back, least lately used first, when blocks run out.

use std::collections::HashMap;

use super::blocks::{BLOCK_TOKENS, Pool};

/// A number of one cached block, never used again.
type Serial = u64;

/// What a block continues, and its tokens.
type Key = (Option<Serial>, Box<[u32]>);

#[derive(Debug)]
struct Entry {
    block: u32,
    serial: Serial,
    /// When it was last used, by [`Prefix::clock`].
    used: u64,
    /// Blocks before it. Of blocks used together the later ones go first.
    depth: usize,
}

/// Blocks by what they hold.
#[derive(Debug, Default)]
pub struct Prefix {
    entries: HashMap<Key, Entry>,
    /// Counts look-ups and insertions, and gives serials.
    clock: u64,
}

impl Prefix {
    /// The blocks that hold the longest known beginning of `tokens`, each held once more for the
    /// caller. At least one token is left over: its logits are wanted.
    pub fn find(&mut self, pool: &mut Pool, tokens: &[u32]) -> Vec<u32> {
        self.clock += 1;
        let mut blocks = Vec::new();
        let mut before = None;
        let most = tokens.len().saturating_sub(1) / BLOCK_TOKENS;
        for own in tokens.chunks_exact(BLOCK_TOKENS).take(most) {
            let Some(entry) = self.entries.get_mut(&(before, own.into())) else { break };
            entry.used = self.clock;
            before = Some(entry.serial);
            pool.share(entry.block);
            blocks.push(entry.block);
        }
        blocks
    }

    /// Keeps the full blocks of a sequence: `blocks` hold `tokens`. What is known already stays.
    pub fn keep(&mut self, pool: &mut Pool, tokens: &[u32], blocks: &[u32]) {
        self.clock += 1;
        let used = self.clock;
        let mut before = None;
        let full = tokens.chunks_exact(BLOCK_TOKENS).zip(blocks);
        for (depth, (own, &block)) in full.enumerate() {
            let entry = self.entries.entry((before, own.into())).or_insert_with(|| {
                pool.share(block);
                self.clock += 1;
                Entry { block, serial: self.clock, used, depth }
            });
            entry.used = used;
            before = Some(entry.serial);
        }
    }

    /// Gives back the block that is worth least; false when every one is in use.
    pub fn evict(&mut self, pool: &mut Pool) -> bool {
        let idle = self.entries.iter().filter(|(_, entry)| pool.holders(entry.block) == 1);
        let least = idle.min_by_key(|(_, entry)| (entry.used, std::cmp::Reverse(entry.depth)));
        let least = least.map(|(key, _)| key.clone());
        let entry = least.and_then(|key| self.entries.remove(&key));
        entry.inspect(|entry| pool.release(entry.block)).is_some()
    }

    /// How many blocks [`Prefix::evict`] can give back.
    pub fn n_idle(&self, pool: &Pool) -> usize {
        self.entries.values().filter(|entry| pool.holders(entry.block) == 1).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(n: usize, first: u32) -> Vec<u32> {
        (0..u32::try_from(n).expect("small")).map(|i| i + first).collect()
    }

    fn take(pool: &mut Pool, n: usize) -> Vec<u32> {
        (0..n).map(|_| pool.take().expect("free")).collect()
    }

    fn give_back(pool: &mut Pool, blocks: &[u32]) {
        for &block in blocks {
            pool.release(block);
        }
    }

    #[test]
    fn the_longest_known_beginning_is_found() {
        let mut pool = Pool::new(8);
        let mut prefix = Prefix::default();
        let known = tokens(200, 0);
        let blocks = take(&mut pool, 4);
        prefix.keep(&mut pool, &known, &blocks);
        give_back(&mut pool, &blocks);
        // Three blocks were full; the fourth is free again.
        assert_eq!((pool.n_free(), prefix.n_idle(&pool)), (5, 3));

        let mut other = known.clone();
        other[130] += 1;
        for (wanted, n) in [
            (known.clone(), 3),
            (tokens(192, 0), 2),
            (tokens(193, 0), 3),
            (tokens(64, 0), 0),
            (other, 2),
            (tokens(200, 1), 0),
            (vec![], 0),
        ] {
            let found = prefix.find(&mut pool, &wanted);
            assert_eq!(found, blocks[..n], "{} tokens", wanted.len());
            assert_eq!(prefix.n_idle(&pool), 3 - n);
            give_back(&mut pool, &found);
        }
    }

    #[test]
    fn the_same_tokens_after_others_are_another_block() {
        let mut pool = Pool::new(8);
        let mut prefix = Prefix::default();
        let both = [tokens(64, 0), tokens(64, 500)].concat();
        let blocks = take(&mut pool, 2);
        prefix.keep(&mut pool, &both, &blocks);
        let turned = [tokens(64, 500), tokens(64, 0), vec![1]].concat();
        assert_eq!(prefix.find(&mut pool, &turned), [0; 0]);
    }

    #[test]
    fn the_least_lately_used_goes_first_and_ends_go_before_beginnings() {
        let mut pool = Pool::new(4);
        let mut prefix = Prefix::default();
        let (old, new) = (tokens(128, 0), tokens(128, 1000));
        for tokens in [&old, &new] {
            let blocks = take(&mut pool, 2);
            prefix.keep(&mut pool, tokens, &blocks);
            give_back(&mut pool, &blocks);
        }
        let with_rest = |tokens: &[u32]| [tokens, &[7]].concat();
        let held = prefix.find(&mut pool, &with_rest(&old)[..65]);
        assert_eq!(held.len(), 1);
        // Of the old two the second is older than the first, which was just used.
        assert!(prefix.evict(&mut pool));
        let found = prefix.find(&mut pool, &with_rest(&old));
        assert_eq!(found, held);
        give_back(&mut pool, &found);
        // The first of the old is held: the new two go, then none is left to give.
        assert!(prefix.evict(&mut pool));
        let beginning = prefix.find(&mut pool, &with_rest(&new));
        assert_eq!(beginning.len(), 1, "a beginning is worth more than what follows it");
        give_back(&mut pool, &beginning);
        assert!(prefix.evict(&mut pool));
        assert_eq!(pool.n_free(), 3);
        assert!(!prefix.evict(&mut pool));
        give_back(&mut pool, &held);
        assert!(prefix.evict(&mut pool));
        assert_eq!(pool.n_free(), 4);
    }
}
