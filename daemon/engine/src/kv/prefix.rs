//! The prefix cache: full blocks of sequences, found again by their tokens.
//!
//! A block is known by its [`Chain`]: all tokens up to its end, so a match is never a guess. The
//! cache holds its blocks like a sequence does; those that nobody else holds are idle, and are
//! given back, least lately used first, when blocks run out. Nothing here looks at all blocks.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, VecDeque};

use super::blocks::Pool;
use super::chain::Chain;

/// When a block was last used, and what goes first of blocks used together: the later ones. The
/// block itself makes it unique.
type Place = (u64, Reverse<usize>, u32);

#[derive(Debug)]
struct Entry {
    block: u32,
    /// When it was last used, by [`Prefix::clock`].
    used: u64,
    /// Blocks before it.
    depth: usize,
    /// Whether it is to be written to disk.
    is_unsaved: bool,
}

impl Entry {
    fn place(&self) -> Place {
        (self.used, Reverse(self.depth), self.block)
    }
}

/// A cached block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cached {
    /// What it holds.
    pub chain: Chain,
    /// Blocks before it.
    pub depth: usize,
    /// Where.
    pub block: u32,
}

/// A block that the cache has given back. Its bytes are there until it is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evicted {
    /// Which.
    pub cached: Cached,
    /// Whether it was still to be written to disk.
    pub is_unsaved: bool,
}

/// Blocks by what they hold.
#[derive(Debug, Default)]
pub struct Prefix {
    entries: HashMap<Chain, Entry>,
    /// The other way round.
    chains: HashMap<u32, Chain>,
    /// Blocks that the cache alone holds, the one to give back first at the start.
    idle: BTreeSet<Place>,
    /// To be written to disk, oldest first; some may be gone.
    unsaved: VecDeque<Chain>,
    /// Counts look-ups and insertions.
    clock: u64,
    /// Whether new blocks are to be written to disk.
    saves: bool,
}

impl Prefix {
    /// An empty cache; `saves` says whether [`Prefix::next_unsaved`] is asked.
    pub fn new(saves: bool) -> Self {
        Self { saves, ..Self::default() }
    }

    /// The blocks of the longest known beginning of `chains`, each held once more for the caller.
    pub fn find(&mut self, pool: &mut Pool, chains: &[Chain]) -> Vec<u32> {
        self.clock += 1;
        let mut blocks = Vec::new();
        for chain in chains {
            let Some(entry) = self.entries.get_mut(chain) else { break };
            self.idle.remove(&entry.place());
            entry.used = self.clock;
            pool.share(entry.block);
            blocks.push(entry.block);
        }
        blocks
    }

    /// How many of `chains` are known from the first on; they count as used now.
    pub fn touch(&mut self, chains: &[Chain]) -> usize {
        self.clock += 1;
        chains.iter().take_while(|chain| self.used(chain)).count()
    }

    /// Notes a use; false for a chain that is not known.
    fn used(&mut self, chain: &Chain) -> bool {
        let Some(entry) = self.entries.get_mut(chain) else { return false };
        let was_idle = self.idle.remove(&entry.place());
        entry.used = self.clock;
        if was_idle {
            self.idle.insert(entry.place());
        }
        true
    }

    /// Keeps full blocks of a sequence, which holds them, from the one with `from` before it on:
    /// `blocks` are those of `chains`. What is known already stays.
    pub fn keep(&mut self, pool: &mut Pool, chains: &[Chain], blocks: &[u32], from: usize) {
        self.clock += 1;
        for (depth, (&chain, &block)) in chains.iter().zip(blocks).enumerate().skip(from) {
            if !self.used(&chain) {
                pool.share(block);
                self.insert(Cached { chain, depth, block }, self.saves);
            }
        }
    }

    /// How many of `chains` are known from the first on.
    pub fn known(&self, chains: &[Chain]) -> usize {
        chains.iter().take_while(|chain| self.has(chain)).count()
    }

    /// Whether a block is known.
    pub fn has(&self, chain: &Chain) -> bool {
        self.entries.contains_key(chain)
    }

    /// Takes over a block, which the caller holds, whose keys and values came from disk. False, and
    /// the block is free again, where it is of no use: known already, or `before` it nothing is.
    pub fn restore(&mut self, pool: &mut Pool, before: Option<&Chain>, cached: Cached) -> bool {
        let follows = before.is_none_or(|before| self.entries.contains_key(before));
        if !follows || self.entries.contains_key(&cached.chain) {
            pool.release(cached.block);
            return false;
        }
        let place = self.insert(cached, false);
        self.idle.insert(place);
        true
    }

    fn insert(&mut self, cached: Cached, is_unsaved: bool) -> Place {
        let Cached { chain, depth, block } = cached;
        let entry = Entry { block, used: self.clock, depth, is_unsaved };
        let place = entry.place();
        self.entries.insert(chain, entry);
        self.chains.insert(block, chain);
        if is_unsaved {
            self.unsaved.push_back(chain);
        }
        place
    }

    /// A sequence holds a block no more. Every block of a sequence is given up here, so that the
    /// cache knows what is idle.
    pub fn release(&mut self, pool: &mut Pool, block: u32) {
        pool.release(block);
        if pool.holders(block) == 1
            && let Some(entry) = self.chains.get(&block).and_then(|chain| self.entries.get(chain))
        {
            self.idle.insert(entry.place());
        }
    }

    /// Gives back the block that is worth least; `None` when every one is in use.
    pub fn evict(&mut self, pool: &mut Pool) -> Option<Evicted> {
        let (_, _, block) = self.idle.pop_first()?;
        let chain = self.chains.remove(&block)?;
        let Entry { depth, is_unsaved, .. } = self.entries.remove(&chain)?;
        pool.release(block);
        Some(Evicted { cached: Cached { chain, depth, block }, is_unsaved })
    }

    /// How many blocks [`Prefix::evict`] can give back.
    pub fn n_idle(&self) -> usize {
        self.idle.len()
    }

    /// Whether there may be blocks that are to be written to disk.
    pub fn has_unsaved(&self) -> bool {
        !self.unsaved.is_empty()
    }

    /// The next block that is to be written to disk; it counts as written.
    pub fn next_unsaved(&mut self) -> Option<Cached> {
        while let Some(chain) = self.unsaved.pop_front() {
            if let Some(entry) = self.entries.get_mut(&chain)
                && std::mem::take(&mut entry.is_unsaved)
            {
                return Some(Cached { chain, depth: entry.depth, block: entry.block });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::sample::Rng;

    fn chains(n: usize, first: u32) -> Vec<Chain> {
        let tokens: Vec<u32> = (first..).take(n).collect();
        let mut chains = Vec::new();
        Chain::default().extend(&mut chains, &tokens);
        chains
    }

    fn take(pool: &mut Pool, n: usize) -> Vec<u32> {
        (0..n).map(|_| pool.take().expect("free")).collect()
    }

    fn give_back(prefix: &mut Prefix, pool: &mut Pool, blocks: &[u32]) {
        for &block in blocks {
            prefix.release(pool, block);
        }
    }

    #[test]
    fn full_blocks_are_found_again() {
        let mut pool = Pool::new(8);
        let mut prefix = Prefix::default();
        let known = chains(200, 0);
        let blocks = take(&mut pool, 4);
        prefix.keep(&mut pool, &known, &blocks, 0);
        assert_eq!(prefix.n_idle(), 0, "the sequence still holds them");
        give_back(&mut prefix, &mut pool, &blocks);
        // Three blocks were full; the fourth is free again.
        assert_eq!((pool.n_free(), prefix.n_idle()), (5, 3));
        let mut other = known.clone();
        other[2] = Chain::default();
        for (wanted, n) in
            [(&known[..], 3), (&known[..2], 2), (&[], 0), (&other, 2), (&chains(200, 1), 0)]
        {
            let found = prefix.find(&mut pool, wanted);
            assert_eq!(found.len(), n, "{wanted:?}");
            assert_eq!(prefix.n_idle(), 3 - n);
            give_back(&mut prefix, &mut pool, &found);
        }
    }

    #[test]
    fn what_is_known_stays_where_it_is() {
        let mut pool = Pool::new(8);
        let mut prefix = Prefix::default();
        let chains = chains(128, 0);
        let (first, second) = (take(&mut pool, 2), take(&mut pool, 2));
        prefix.keep(&mut pool, &chains, &first, 0);
        prefix.keep(&mut pool, &chains, &second, 0);
        give_back(&mut prefix, &mut pool, &second);
        assert_eq!((pool.n_free(), prefix.n_idle()), (6, 0), "the second's are free");
        give_back(&mut prefix, &mut pool, &first);
        assert_eq!(prefix.find(&mut pool, &chains), first);
    }

    #[test]
    fn the_least_lately_used_goes_first_and_ends_go_before_beginnings() {
        let mut pool = Pool::new(4);
        let mut prefix = Prefix::default();
        let (old, new) = (chains(128, 0), chains(128, 1000));
        for chains in [&old, &new] {
            let blocks = take(&mut pool, 2);
            prefix.keep(&mut pool, chains, &blocks, 0);
            give_back(&mut prefix, &mut pool, &blocks);
        }
        let held = prefix.find(&mut pool, &old[..1]);
        assert_eq!(held.len(), 1);
        // Of the old two the second is older than the first, which was just used.
        let evicted = prefix.evict(&mut pool).expect("idle ones");
        assert_eq!((evicted.cached.chain, evicted.cached.depth), (old[1], 1));
        let found = prefix.find(&mut pool, &old);
        assert_eq!(found, held);
        give_back(&mut prefix, &mut pool, &found);
        // The first of the old is held: the new two go, then none is left to give.
        assert!(prefix.evict(&mut pool).is_some());
        let beginning = prefix.find(&mut pool, &new);
        assert_eq!(beginning.len(), 1, "a beginning is worth more than what follows it");
        give_back(&mut prefix, &mut pool, &beginning);
        assert!(prefix.evict(&mut pool).is_some());
        assert_eq!(pool.n_free(), 3);
        assert!(prefix.evict(&mut pool).is_none());
        give_back(&mut prefix, &mut pool, &held);
        assert!(prefix.evict(&mut pool).is_some());
        assert_eq!(pool.n_free(), 4);
    }

    #[test]
    fn what_comes_from_disk_follows_what_is_here() {
        let mut pool = Pool::new(4);
        let mut prefix = Prefix::new(true);
        let chains = chains(192, 0);
        let mut restore = |prefix: &mut Prefix, depth: usize| {
            let block = pool.take().expect("free");
            let before = depth.checked_sub(1).map(|before| &chains[before]);
            prefix.restore(&mut pool, before, Cached { chain: chains[depth], depth, block })
        };
        assert!(!restore(&mut prefix, 1), "nothing is before it");
        assert!(restore(&mut prefix, 0) && restore(&mut prefix, 1));
        assert!(!restore(&mut prefix, 1), "it is here");
        assert_eq!((pool.n_free(), prefix.n_idle(), prefix.touch(&chains)), (2, 2, 2));
        assert_eq!(prefix.next_unsaved(), None, "it is on disk");
    }

    #[test]
    fn each_new_block_is_written_once() {
        let mut pool = Pool::new(4);
        let mut prefix = Prefix::new(true);
        let chains = chains(192, 0);
        let blocks = take(&mut pool, 3);
        prefix.keep(&mut pool, &chains[..2], &blocks, 0);
        prefix.keep(&mut pool, &chains, &blocks, 0);
        give_back(&mut prefix, &mut pool, &blocks);
        let first = prefix.next_unsaved().expect("three");
        assert_eq!(first, Cached { chain: chains[0], depth: 0, block: blocks[0] });
        // The last goes first when blocks run out, and says that nobody has written it.
        let evicted = prefix.evict(&mut pool).expect("idle");
        assert_eq!((evicted.cached.chain, evicted.is_unsaved), (chains[2], true));
        assert_eq!(prefix.next_unsaved().map(|cached| cached.chain), Some(chains[1]));
        assert_eq!(prefix.next_unsaved(), None);
        assert!(!prefix.evict(&mut pool).expect("idle").is_unsaved);
    }

    /// The list of idle blocks is what a look at all of them finds, whatever happens.
    #[test]
    fn idle_blocks_are_those_that_nobody_holds() {
        let mut rng = Rng::new(9);
        let mut pool = Pool::new(40);
        let mut prefix = Prefix::default();
        let mut running: Vec<(Vec<Chain>, Vec<u32>)> = Vec::new();
        for round in 0..3000 {
            if rng.below(2) == 0 {
                let n = 1 + rng.below(6);
                let chains = chains(64 * n, u32::try_from(rng.below(4)).expect("small"));
                let mut blocks = prefix.find(&mut pool, &chains[..rng.below(n + 1)]);
                while blocks.len() < n {
                    match pool.take() {
                        Some(block) => blocks.push(block),
                        None if prefix.evict(&mut pool).is_some() => {}
                        None => break,
                    }
                }
                running.push((chains, blocks));
            } else if !running.is_empty() {
                let (chains, blocks) = running.swap_remove(rng.below(running.len()));
                prefix.keep(&mut pool, &chains, &blocks, 0);
                give_back(&mut prefix, &mut pool, &blocks);
            }
            let is_idle = |entry: &&Entry| pool.holders(entry.block) == 1;
            let slow: BTreeSet<Place> =
                prefix.entries.values().filter(is_idle).map(Entry::place).collect();
            assert_eq!(prefix.idle, slow, "round {round}");
            assert_eq!(prefix.entries.len(), prefix.chains.len());
        }
    }

    /// What each step asks costs the same with many blocks: a look at all of them for each block
    /// that is given back would take hours here.
    #[test]
    fn a_hundred_thousand_blocks_cost_no_more_than_a_few() {
        const N: u32 = 100_000;
        let mut pool = Pool::new(N);
        let mut prefix = Prefix::default();
        let began = Instant::now();
        let chains: Vec<Chain> = (0..N).map(|n| Chain::default().then(&[n])).collect();
        let blocks = take(&mut pool, N as usize);
        prefix.keep(&mut pool, &chains, &blocks, 0);
        give_back(&mut prefix, &mut pool, &blocks);
        for left in (0..N as usize).rev() {
            assert_eq!(prefix.n_idle(), left + 1);
            assert!(prefix.evict(&mut pool).is_some());
        }
        assert_eq!(pool.n_free(), N as usize);
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    }
}
