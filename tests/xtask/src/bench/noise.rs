//! Numbers that are the same in every run and follow no pattern.

use v4_kernels::{Quant, quant};

/// A generator (Marsaglia 2003, xorshift64).
#[derive(Debug, Clone)]
pub struct Noise(u64);

/// Weights are no smaller and no larger than those of models, zeros aside: a multiplication with
/// the smallest of all floats, which some processors do slowly, would measure something else.
const SIZES: std::ops::Range<f32> = 1e-6..1e3;

impl Noise {
    /// Begins with a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// `n` values between -1 and 1.
    #[expect(clippy::cast_possible_truncation, reason = "24 bits are a float")]
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        let float = |word: u64| ((word >> 40) as f64 / f64::from(1 << 23) - 1.0) as f32;
        (0..n).map(|_| float(self.word())).collect()
    }

    /// `n` blocks of a format: random bytes that decode to weights of ordinary size.
    pub fn blocks(&mut self, quant: Quant, n: usize) -> Vec<u8> {
        let mut blocks = Vec::new();
        let mut block = vec![0; quant.block_bytes()];
        let mut weights = vec![0.0; quant.block_len()];
        while blocks.len() < n * block.len() {
            for bytes in block.chunks_mut(8) {
                bytes.copy_from_slice(&self.word().to_le_bytes()[..bytes.len()]);
            }
            quant::dequantize(quant, &block, &mut weights);
            let is_ordinary = |x: &f32| *x == 0.0 || SIZES.contains(&x.abs());
            if weights.iter().all(is_ordinary) {
                blocks.extend_from_slice(&block);
            }
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_weights_of_every_format() {
        let mut noise = Noise::new(1);
        for quant in Quant::all() {
            assert_eq!(noise.blocks(quant, 7).len(), 7 * quant.block_bytes(), "{quant}");
        }
        let floats = noise.floats(1000);
        assert!(floats.iter().all(|x| x.abs() <= 1.0));
        let mean = floats.iter().sum::<f32>() / 1000.0;
        assert!(mean.abs() < 0.1, "{mean}");
    }
}
