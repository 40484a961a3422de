//! Text to tokens and back, from the metadata of a model's file alone.

mod bpe;
pub(crate) mod json;
mod merge;
mod pretokenize;
mod spm;
mod unicode;
mod vocab;

use bpe::Bpe;
use spm::Spm;
use vocab::{Kind, Lookup, Strings, Vocab};

use crate::Error;
use crate::format::Meta;

/// Whether special tokens written in a text count as such.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// They do: rendered chat templates, raw prompts.
    Parse,
    /// They are text like any other.
    Plain,
}

/// A tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    vocab: Vocab,
    model: Model,
    specials: Specials,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    /// Ids that end an answer, sorted.
    ends: Vec<u32>,
}

#[derive(Debug)]
enum Model {
    Bpe(Box<Bpe>),
    Spm(Box<Spm>),
}

/// Texts of tokens that end a turn or a text in the vocabularies seen so far. Files name one or two
/// end tokens; models end with others too. They count where the vocabulary has them as control
/// tokens.
const END_TEXTS: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|user|>",
    "<|observation|>",
    "<EOT>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
];

impl Tokenizer {
    /// The tokenizer that a file's metadata describes (`tokenizer.ggml.*`).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a tokenizer or pre-tokenizer that is not known,
    /// [`Error::Metadata`] where entries are missing or contradict each other.
    pub fn from_meta(meta: &Meta) -> Result<Self, Error> {
        let key = "tokenizer.ggml.model";
        let model = meta.str(key).ok_or_else(|| Error::missing(key))?;
        let is_spm = match model {
            "gpt2" => false,
            "llama" => true,
            other => return Err(Error::unsupported(format!("the tokenizer {other:?}"))),
        };
        let key = "tokenizer.ggml.tokens";
        let texts = meta.strings(key).ok_or_else(|| Error::missing(key))?;
        let kinds = kinds(meta, texts.len())?;
        let vocab = Vocab::new(texts, kinds, |text, kind, bytes| match kind {
            Kind::Control | Kind::Unknown => bytes.extend_from_slice(text.as_bytes()),
            _ if is_spm => spm::to_bytes(text, kind, bytes),
            Kind::UserDefined => bytes.extend_from_slice(text.as_bytes()),
            _ => bpe::to_bytes(text, bytes),
        });
        let specials = Specials::new(texts, &vocab);
        let model = if is_spm {
            Model::Spm(Box::new(Spm::from_meta(meta, &vocab)?))
        } else {
            Model::Bpe(Box::new(Bpe::from_meta(meta, &vocab)?))
        };
        let id = |name: &str| {
            let id = meta.u64(&format!("tokenizer.ggml.{name}_token_id"))?;
            u32::try_from(id).ok().filter(|&id| (id as usize) < vocab.len())
        };
        let (bos, eos) = (id("bos"), id("eos"));
        let flag = |name: &str| meta.bool(&format!("tokenizer.ggml.add_{name}_token"));
        let llama3 = matches!(meta.str("tokenizer.ggml.pre"), Some("llama-bpe" | "llama3"));
        let mut ends: Vec<u32> = [eos, id("eot"), id("eom")].into_iter().flatten().collect();
        let controls = END_TEXTS.iter().filter_map(|text| specials.get(text.as_bytes()));
        ends.extend(controls.filter(|&id| vocab.kind(id) == Kind::Control));
        ends.sort_unstable();
        ends.dedup();
        Ok(Self {
            add_bos: flag("bos").unwrap_or(is_spm || llama3) && bos.is_some(),
            add_eos: flag("eos").unwrap_or(false) && eos.is_some(),
            vocab,
            model,
            specials,
            bos,
            eos,
            ends,
        })
    }

    /// The tokens of `text`. Neither BOS nor EOS is added.
    pub fn encode(&self, text: &str, special: Special) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        let mut plain_from = 0;
        let mut at = 0;
        while at < text.len() {
            match self.specials.at(&self.vocab, &text.as_bytes()[at..], special) {
                Some((id, len)) => {
                    self.encode_plain(text, plain_from..at, &mut ids);
                    ids.push(id);
                    at += len;
                    plain_from = at;
                }
                None => at += 1,
            }
        }
        self.encode_plain(text, plain_from..text.len(), &mut ids);
        ids
    }

    fn encode_plain(&self, text: &str, range: std::ops::Range<usize>, ids: &mut Vec<u32>) {
        let text = &text[range];
        if text.is_empty() {
            return;
        }
        match &self.model {
            Model::Bpe(bpe) => bpe.encode(&self.vocab, text, ids),
            Model::Spm(spm) => spm.encode(&self.vocab, text, ids),
        }
    }

    /// The bytes that a token stands for; a control token's are its name. Empty for an id that is
    /// not in the vocabulary.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.vocab.bytes(id)
    }

    /// Whether a token is no text: control tokens and the unknown token.
    pub fn is_control(&self, id: u32) -> bool {
        matches!(self.vocab.kind(id), Kind::Control | Kind::Unknown)
    }

    /// The text of `ids`. Bytes that are not UTF-8 become U+FFFD. `skip_special` leaves control
    /// tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if skip_special && self.is_control(id) {
                continue;
            }
            bytes.extend_from_slice(self.bytes(id));
        }
        let text = String::from_utf8_lossy(&bytes);
        let first_is_text = ids.first().is_some_and(|&id| !self.is_control(id));
        if self.adds_space_prefix() && first_is_text {
            text.strip_prefix(' ').unwrap_or(&text).to_owned()
        } else {
            text.into_owned()
        }
    }

    /// Whether text gets a space before it that is no part of it.
    pub fn adds_space_prefix(&self) -> bool {
        matches!(&self.model, Model::Spm(spm) if spm.space_prefix)
    }

    /// The special token whose text is `text`.
    pub fn special(&self, text: &str) -> Option<u32> {
        self.specials.get(text.as_bytes())
    }

    /// Whether a token ends an answer.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// Whether the model wants [`Tokenizer::bos`] before a prompt.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether the model wants [`Tokenizer::eos`] after a text (embeddings).
    pub fn add_eos(&self) -> bool {
        self.add_eos
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Tokens of the vocabulary.
    pub fn len(&self) -> usize {
        self.vocab.len()
    }

    /// Whether the vocabulary has no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the longest token: a text of n bytes has at least n divided by this many tokens.
    pub fn longest_token_bytes(&self) -> usize {
        self.vocab.longest()
    }
}

/// The kinds of `count` tokens; all normal where the file does not say.
fn kinds(meta: &Meta, count: usize) -> Result<Vec<Kind>, Error> {
    let key = "tokenizer.ggml.token_type";
    let Some(numbers) = meta.i64s(key) else { return Ok(vec![Kind::Normal; count]) };
    if numbers.len() != count {
        let problem = format!("has {} entries for {count} tokens", numbers.len());
        return Err(Error::metadata(key, problem));
    }
    Ok(numbers.iter().map(|&number| Kind::from_number(number)).collect())
}

/// Tokens that are looked for in a text before anything else.
#[derive(Debug)]
struct Specials {
    texts: Strings,
    ids: Vec<u32>,
    lookup: Lookup,
    /// By first byte: the lengths of the texts that begin with it, longest first.
    lengths: Vec<Vec<usize>>,
}

impl Specials {
    fn new(all: &[String], vocab: &Vocab) -> Self {
        let mut texts = Strings::default();
        let mut ids = Vec::new();
        let mut lengths = vec![Vec::new(); 256];
        for (id, text) in (0_u32..).zip(all) {
            let is_special = matches!(vocab.kind(id), Kind::Control | Kind::UserDefined);
            if is_special && let Some(&first) = text.as_bytes().first() {
                texts.push(text.as_bytes());
                ids.push(id);
                lengths[usize::from(first)].push(text.len());
            }
        }
        for lengths in &mut lengths {
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths.dedup();
        }
        let lookup = Lookup::new(&texts, |_| true);
        Self { texts, ids, lookup, lengths }
    }

    fn get(&self, text: &[u8]) -> Option<u32> {
        self.lookup.get(&self.texts, text).map(|index| self.ids[index as usize])
    }

    /// The longest special token that `rest` begins with, and its length.
    fn at(&self, vocab: &Vocab, rest: &[u8], special: Special) -> Option<(u32, usize)> {
        let lengths = &self.lengths[usize::from(*rest.first()?)];
        lengths.iter().find_map(|&len| {
            let id = self.get(rest.get(..len)?)?;
            let counts = special == Special::Parse || vocab.kind(id) == Kind::UserDefined;
            counts.then_some((id, len))
        })
    }
}

#[cfg(test)]
mod tests;
