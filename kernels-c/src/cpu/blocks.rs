//! The bytes of one block of the cache over all layers, out and in: what outlives a process.

use crate::device::KvCache;

/// The order of a block's bytes, by name: blocks of another order are of no use here. It changes
/// with `enum v4_kv` in v4.h and with what [`KvCache::read_block`] writes first.
pub const BLOCK_LAYOUT: &str = "cpu slab 16, layers of keys, layers of values, 1";

impl KvCache {
    /// Appends the bytes of a block: its keys of each layer, then its values,
    /// [`crate::KvShape::block_bytes`] in all.
    ///
    /// # Panics
    /// When there is no such block: our own mistake.
    pub fn read_block(&self, block: u32, out: &mut Vec<u8>) {
        for half in [self.data.keys(), self.data.values()] {
            for layer in 0..self.shape.n_layers {
                let at = self.offset(layer, block);
                out.extend_from_slice(&half[at..at + self.part_bytes()]);
            }
        }
    }

    /// Makes a block what [`KvCache::read_block`] gave, of this cache or of one of the same shape.
    ///
    /// # Panics
    /// When there is no such block, or the bytes are of another shape: our own mistake.
    pub fn write_block(&mut self, block: u32, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.shape.block_bytes(), "the bytes of one block");
        let n = self.part_bytes();
        let offsets: Vec<usize> =
            (0..self.shape.n_layers).map(|layer| self.offset(layer, block)).collect();
        let (keys, values) = self.data.both_mut();
        let mut parts = bytes.chunks_exact(n);
        for half in [keys, values] {
            for (&at, part) in offsets.iter().zip(&mut parts) {
                half[at..at + n].copy_from_slice(part);
            }
        }
    }

    /// Bytes of a block's keys (or values) in one layer.
    fn part_bytes(&self) -> usize {
        self.shape.block_bytes() / self.shape.n_layers / 2
    }

    fn offset(&self, layer: usize, block: u32) -> usize {
        assert!((block as usize) < self.n_blocks, "block {block} of {}", self.n_blocks);
        (layer * self.n_blocks + block as usize) * self.part_bytes()
    }
}

#[cfg(test)]
mod tests {
    use crate::device::{Device, KvShape, KvType};
    use crate::{Cpu, cpu::CpuOptions};

    #[test]
    fn a_block_is_moved_whole_and_touches_no_other() {
        let cpu =
            Cpu::open(&CpuOptions { threads: 1, isa: None, is_exact: false }).expect("a processor");
        for kv_type in KvType::ALL {
            let shape =
                KvShape { n_layers: 3, n_kv_heads: 2, head_dim: 32, block_tokens: 64, kv_type };
            let (mut from, mut to) =
                (cpu.kv_cache(shape, 4).expect("memory"), cpu.kv_cache(shape, 5).expect("memory"));
            let (keys, values) = from.data.both_mut();
            for (at, byte) in keys.iter_mut().chain(values).enumerate() {
                *byte = u8::try_from(at * 7 % 251).expect("below 251");
            }
            let mut bytes = Vec::new();
            from.read_block(2, &mut bytes);
            assert_eq!(bytes.len(), shape.block_bytes());
            to.write_block(4, &bytes);
            let mut back = Vec::new();
            to.read_block(4, &mut back);
            assert!(back == bytes, "{kv_type:?}");
            // Every byte of the block, and none beside it, is what was written.
            let n_set = |half: &[u8]| half.iter().filter(|&&byte| byte != 0).count();
            let n_own = bytes.iter().filter(|&&byte| byte != 0).count();
            assert_eq!(n_set(to.data.keys()) + n_set(to.data.values()), n_own);
            for other in 0..4 {
                back.clear();
                to.read_block(other, &mut back);
                assert!(back.iter().all(|&byte| byte == 0), "{kv_type:?} {other}");
            }
        }
    }
}
