//! The blocks of the KV cache: which are free, and how many hold each of the others.

/// Tokens of a block. Large enough that a head's keys in a block are one stream of memory (16 KiB
/// at 128 values of 16 bits), small enough that a short sequence wastes little and prefixes are
/// shared finely.
pub const BLOCK_TOKENS: usize = 64;

/// How many blocks `n_tokens` tokens take.
pub fn blocks_for(n_tokens: usize) -> usize {
    n_tokens.div_ceil(BLOCK_TOKENS)
}

/// The blocks there are, and how many sequences hold each.
#[derive(Debug)]
pub struct Pool {
    holders: Vec<u32>,
    /// Blocks that nobody holds; the last is taken next, since it may still be in a cache.
    free: Vec<u32>,
}

impl Pool {
    /// `n_blocks` free blocks, numbered from 0.
    pub fn new(n_blocks: u32) -> Self {
        Self { holders: vec![0; n_blocks as usize], free: (0..n_blocks).rev().collect() }
    }

    /// A free block, now held once.
    pub fn take(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
        self.holders[block as usize] = 1;
        Some(block)
    }

    /// One more holder of a block that is held.
    ///
    /// # Panics
    /// When nobody holds it: our own mistake.
    pub fn share(&mut self, block: u32) {
        let holders = &mut self.holders[block as usize];
        assert!(*holders > 0, "a free block cannot be shared");
        *holders += 1;
    }

    /// One holder less; the last one frees it.
    ///
    /// # Panics
    /// When nobody holds it: our own mistake.
    pub fn release(&mut self, block: u32) {
        let holders = &mut self.holders[block as usize];
        assert!(*holders > 0, "a free block cannot be released");
        *holders -= 1;
        if *holders == 0 {
            self.free.push(block);
        }
    }

    /// How many hold a block.
    pub fn holders(&self, block: u32) -> u32 {
        self.holders[block as usize]
    }

    /// Blocks that nobody holds.
    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks in all.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Whether there are no blocks at all.
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_held_once_and_come_back() {
        let mut pool = Pool::new(2);
        let (a, b) = (pool.take().expect("free"), pool.take().expect("free"));
        assert_ne!(a, b);
        assert_eq!(pool.take(), None);
        pool.share(a);
        pool.release(a);
        assert_eq!((pool.holders(a), pool.n_free()), (1, 0));
        pool.release(a);
        assert_eq!(pool.take(), Some(a));
        assert_eq!((pool.n_free(), pool.len()), (0, 2));
    }

    #[test]
    #[should_panic(expected = "cannot be released")]
    fn releasing_twice_is_our_own_mistake() {
        let mut pool = Pool::new(1);
        let block = pool.take().expect("free");
        pool.release(block);
        pool.release(block);
    }

    #[test]
    fn tokens_are_counted_in_whole_blocks() {
        let table = [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)];
        for (n_tokens, n_blocks) in table {
            assert_eq!(blocks_for(n_tokens), n_blocks);
        }
    }
}
