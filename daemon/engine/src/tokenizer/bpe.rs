//! Byte-level byte pair encoding (GPT-2 and after): text is cut into pieces, the bytes of a piece
//! are merged by rank.

use std::collections::HashMap;

use super::merge::{Merger, as_u32};
use super::pretokenize::Splitter;
use super::vocab::{PairHash, Vocab};
use crate::Error;
use crate::format::Meta;

/// The merges of a byte-level vocabulary.
#[derive(Debug)]
pub struct Bpe {
    splitter: Splitter,
    /// Whether a piece that is a token is taken whole, before any merge.
    whole_pieces: bool,
    /// From (left id, right id) to (rank, id of both together).
    merges: HashMap<u64, (u32, u32), PairHash>,
    /// The token of each byte.
    bytes: [Option<u32>; 256],
}

impl Bpe {
    /// The merges in `meta`, over the tokens of `vocab`.
    pub fn from_meta(meta: &Meta, vocab: &Vocab) -> Result<Self, Error> {
        let name = meta.str("tokenizer.ggml.pre").unwrap_or("default");
        let (splitter, whole_pieces) = Splitter::from_name(name)
            .ok_or_else(|| Error::unsupported(format!("the pre-tokenizer {name:?}")))?;
        let key = "tokenizer.ggml.merges";
        let lines = meta.strings(key).ok_or_else(|| Error::missing(key))?;
        let mut merges = HashMap::with_capacity_and_hasher(lines.len(), PairHash::default());
        let mut both = Vec::new();
        // Merges come in the order of the tokens that they make, mostly: the next one is tried
        // before it is looked up.
        let mut last = 0;
        for (rank, line) in lines.iter().enumerate() {
            let Some((left, right)) = line.split_once(' ') else {
                return Err(Error::metadata(key, format!("has an entry {line:?} without a space")));
            };
            both.clear();
            to_bytes(left, &mut both);
            let middle = both.len();
            to_bytes(right, &mut both);
            let is_known = |id: &u32| vocab.is_text(*id, &both);
            let id = [last, last + 1].into_iter().find(is_known).or_else(|| vocab.id(&both));
            let ids = (vocab.id(&both[..middle]), vocab.id(&both[middle..]), id);
            // A merge whose parts are not tokens can never be reached.
            if let (Some(left), Some(right), Some(id)) = ids {
                last = id;
                merges.entry(pair_key(left, right)).or_insert((as_u32(rank), id));
            }
        }
        let bytes = std::array::from_fn(|byte| {
            vocab.id(&[u8::try_from(byte).expect("the array has 256 places")])
        });
        Ok(Self { splitter, whole_pieces, merges, bytes })
    }

    /// Appends the tokens of `text` to `ids`. A byte that the vocabulary lacks is left out.
    pub fn encode(&self, vocab: &Vocab, text: &str, ids: &mut Vec<u32>) {
        let mut merger = Merger::default();
        self.splitter.split(text, &mut |piece| {
            if self.whole_pieces
                && let Some(id) = vocab.id(piece.as_bytes())
            {
                ids.push(id);
                return;
            }
            merger.clear();
            for (at, &byte) in piece.as_bytes().iter().enumerate() {
                if let Some(id) = self.bytes[usize::from(byte)] {
                    merger.push(as_u32(at), as_u32(at + 1), id);
                }
            }
            merger.merge(
                |left, right| self.merges.get(&pair_key(left.id, right.id)).copied(),
                |symbol| ids.push(symbol.id),
            );
        });
    }
}

fn pair_key(left: u32, right: u32) -> u64 {
    (u64::from(left) << 32) | u64::from(right)
}

/// Appends the bytes that a token stands for. A byte-level vocabulary writes each byte as one
/// character: printable Latin-1 as itself, the other 68 as U+0100 and up, in order. A character
/// outside this alphabet stands for itself.
pub fn to_bytes(token: &str, bytes: &mut Vec<u8>) {
    for c in token.chars() {
        match byte_of(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_has_one_character() {
        let mut seen = [false; 256];
        for c in (0..0x200).filter_map(char::from_u32) {
            if let Some(byte) = byte_of(c) {
                assert!(!std::mem::replace(&mut seen[usize::from(byte)], true), "{c:?}");
            }
        }
        assert_eq!(seen, [true; 256]);
        let table = [("Ġa", " a"), ("Ċ", "\n"), ("Ã©", "é"), ("｜", "｜")];
        for (token, text) in table {
            let mut bytes = Vec::new();
            to_bytes(token, &mut bytes);
            assert_eq!(bytes, text.as_bytes());
        }
    }
}
