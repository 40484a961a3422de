//! What a block holds, as one number: the hash of every token up to its end and of what computed
//! them. Equal chains are equal keys and values, in this process or in another.

use std::fmt;

use sha2::{Digest as _, Sha256};

use super::blocks::BLOCK_TOKENS;

/// SHA-256: a match of other tokens is out of reach even for who chooses the tokens.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Chain([u8; 32]);

impl Chain {
    /// Before the first block, for what computes it as `parts` name it.
    pub fn root(parts: &[&str]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hash.finalize().into())
    }

    /// After one block more.
    pub fn then(self, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        let mut bytes = [0; 4 * BLOCK_TOKENS];
        for (bytes, token) in bytes.chunks_exact_mut(4).zip(tokens) {
            bytes.copy_from_slice(&token.to_le_bytes());
        }
        hash.update(&bytes[..4 * tokens.len().min(BLOCK_TOKENS)]);
        Self(hash.finalize().into())
    }

    /// Extends the chains of the first blocks of `tokens` to all that are full.
    pub fn extend(self, chains: &mut Vec<Self>, tokens: &[u32]) {
        for own in tokens.chunks_exact(BLOCK_TOKENS).skip(chains.len()) {
            let before = chains.last().copied().unwrap_or(self);
            chains.push(before.then(own));
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chain({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_of_all_that_came_before() {
        let tokens: Vec<u32> = (0..200).collect();
        let root = Chain::root(&["a", "b"]);
        let mut chains = Vec::new();
        root.extend(&mut chains, &tokens[..130]);
        assert_eq!(chains.len(), 2);
        root.extend(&mut chains, &tokens);
        assert_eq!(chains.len(), 3, "the rest is no block");
        let mut again = Vec::new();
        root.extend(&mut again, &tokens);
        assert_eq!(chains, again);
        // The same tokens elsewhere, of another model, or after others, are another block.
        let mut other = tokens.clone();
        other[3] += 1;
        let mut of_other = Vec::new();
        root.extend(&mut of_other, &other);
        assert!(chains.iter().zip(&of_other).all(|(a, b)| a != b));
        for parts in [&["ab"][..], &["a", "bc"], &["", "ab"], &["a", "b", ""]] {
            assert_ne!(Chain::root(parts), root, "{parts:?}");
        }
        assert_eq!(root.to_string().len(), 64);
    }
}
