//! SentencePiece with scores: characters are merged by the score of what they become; what is left
//! over is said in bytes.

use super::merge::{Merger, NONE, as_u32};
use super::vocab::{Kind, Vocab};
use crate::Error;
use crate::format::Meta;

/// The character that stands for a space in the vocabulary.
pub const SPACE: char = '\u{2581}';

/// The scores of a SentencePiece vocabulary.
#[derive(Debug)]
pub struct Spm {
    /// A rank a token: the higher its score, the lower.
    ranks: Vec<u32>,
    /// The token of each byte.
    bytes: [Option<u32>; 256],
    /// What stands for a character that has neither a token nor bytes.
    unknown: Option<u32>,
    /// Whether text gets a space before it.
    pub space_prefix: bool,
}

impl Spm {
    /// The scores in `meta`, over the tokens of `vocab`.
    pub fn from_meta(meta: &Meta, vocab: &Vocab) -> Result<Self, Error> {
        let key = "tokenizer.ggml.scores";
        let scores = meta.f64s(key).ok_or_else(|| Error::missing(key))?;
        if scores.len() != vocab.len() {
            let problem = format!("has {} entries for {} tokens", scores.len(), vocab.len());
            return Err(Error::metadata(key, problem));
        }
        let mut order: Vec<f64> = scores.to_vec();
        order.sort_unstable_by(|a, b| b.total_cmp(a));
        order.dedup();
        let rank = |score: &f64| as_u32(order.partition_point(|o| o.total_cmp(score).is_gt()));
        let mut bytes = [None; 256];
        for id in (0..as_u32(vocab.len())).filter(|&id| vocab.kind(id) == Kind::Byte) {
            if let [byte] = vocab.bytes(id) {
                bytes[usize::from(*byte)] = Some(id);
            }
        }
        let ids = 0..as_u32(vocab.len());
        Ok(Self {
            ranks: scores.iter().map(rank).collect(),
            bytes,
            unknown: ids.into_iter().find(|&id| vocab.kind(id) == Kind::Unknown),
            space_prefix: meta.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true),
        })
    }

    /// Appends the tokens of `text`, which begins the prompt or follows a special token, to `ids`.
    pub fn encode(&self, vocab: &Vocab, text: &str, ids: &mut Vec<u32>) {
        let prefix = if self.space_prefix { " " } else { "" };
        // The vocabulary is kept with spaces, so that a token's bytes are its text.
        let text = [prefix, text].concat().replace(SPACE, " ");
        let bytes = text.as_bytes();
        let mut merger = Merger::default();
        for (at, c) in text.char_indices() {
            let end = at + c.len_utf8();
            merger.push(as_u32(at), as_u32(end), vocab.id(&bytes[at..end]).unwrap_or(NONE));
        }
        merger.merge(
            |left, right| {
                let id = vocab.id(&bytes[left.start as usize..right.end as usize])?;
                Some((self.ranks[id as usize], id))
            },
            |symbol| {
                if symbol.id != NONE {
                    ids.push(symbol.id);
                    return;
                }
                for &byte in &bytes[symbol.start as usize..symbol.end as usize] {
                    ids.extend(self.bytes[usize::from(byte)].or(self.unknown));
                }
            },
        );
    }
}

/// Appends the bytes of a token of a SentencePiece vocabulary: `<0x41>` of kind byte is that byte,
/// the space character is a space.
pub fn to_bytes(token: &str, kind: Kind, bytes: &mut Vec<u8>) {
    if kind == Kind::Byte
        && let Some(hex) = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'))
        && let Ok(byte) = u8::from_str_radix(hex, 16)
    {
        bytes.push(byte);
        return;
    }
    for (index, part) in token.split(SPACE).enumerate() {
        bytes.extend((index > 0).then_some(b' '));
        bytes.extend_from_slice(part.as_bytes());
    }
}
