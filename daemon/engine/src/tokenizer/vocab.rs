//! The tokens of a vocabulary: their bytes, their kinds, and the way back from bytes to an id.

use std::hash::{BuildHasher, Hasher, RandomState};

/// What a token is, as `tokenizer.ggml.token_type` numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A piece of text.
    Normal,
    /// Stands for what the vocabulary cannot say.
    Unknown,
    /// Steers the model; never text.
    Control,
    /// Text that is always a token of its own.
    UserDefined,
    /// A place that no text uses.
    Unused,
    /// One byte, for characters that the vocabulary does not have.
    Byte,
}

impl Kind {
    /// The kind of a number of the metadata; numbers outside it are normal.
    pub fn from_number(number: i64) -> Self {
        match number {
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            _ => Kind::Normal,
        }
    }

    /// Whether text may become such a token; control and byte tokens are never the result of a
    /// merge.
    fn is_merged(self) -> bool {
        !matches!(self, Kind::Control | Kind::Unknown | Kind::Byte)
    }
}

/// The tokens of a model.
#[derive(Debug)]
pub struct Vocab {
    strings: Strings,
    kinds: Vec<Kind>,
    lookup: Lookup,
    longest: usize,
}

impl Vocab {
    /// The vocabulary of `texts` and their `kinds`, as many; `to_bytes` says what a text stands
    /// for, by appending it.
    pub fn new(
        texts: &[String],
        kinds: Vec<Kind>,
        mut to_bytes: impl FnMut(&str, Kind, &mut Vec<u8>),
    ) -> Self {
        let mut strings = Strings::default();
        for (text, &kind) in texts.iter().zip(&kinds) {
            strings.push_with(|bytes| to_bytes(text, kind, bytes));
        }
        let lookup = Lookup::new(&strings, |id| kinds[id as usize].is_merged());
        let longest = (0_u32..).zip(&kinds).map(|(id, _)| strings.get(id).len()).max();
        Self { strings, kinds, lookup, longest: longest.unwrap_or(0) }
    }

    /// The bytes of a token.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.strings.get(id)
    }

    /// The kind of a token; one that is not there is unused.
    pub fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Unused)
    }

    /// The token of text whose bytes are `bytes`.
    pub fn id(&self, bytes: &[u8]) -> Option<u32> {
        if bytes.len() > self.longest {
            return None;
        }
        self.lookup.get(&self.strings, bytes)
    }

    /// Whether `id` is a token of text whose bytes are `bytes`: cheaper than [`Vocab::id`] where
    /// there is a guess.
    pub fn is_text(&self, id: u32, bytes: &[u8]) -> bool {
        !bytes.is_empty() && self.bytes(id) == bytes && self.kind(id).is_merged()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.strings.len()
    }

    /// Bytes of the longest.
    pub fn longest(&self) -> usize {
        self.longest
    }
}

/// Byte strings one after another, numbered from 0.
#[derive(Debug, Default)]
pub struct Strings {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Strings {
    /// Adds a string.
    pub fn push(&mut self, string: &[u8]) {
        self.push_with(|bytes| bytes.extend_from_slice(string));
    }

    /// Adds what `write` appends.
    fn push_with(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.bytes);
        self.ends.push(self.bytes.len());
    }

    /// The string numbered `index`; empty for one that is not there.
    pub fn get(&self, index: u32) -> &[u8] {
        let index = index as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..end]
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }
}

/// From bytes to the number of that string in a [`Strings`]: open addressing, numbers only, no
/// allocation a string. Seeded, so a file cannot be made to collide.
#[derive(Debug)]
pub struct Lookup {
    seed: u64,
    /// Number plus one; 0 is a free place. A power of two long, at most half full.
    places: Vec<u32>,
}

impl Lookup {
    /// The look-up of those `strings` that are `wanted`. Of equal strings the first counts.
    pub fn new(strings: &Strings, wanted: impl Fn(u32) -> bool) -> Self {
        let seed = RandomState::new().build_hasher().finish();
        let mut lookup =
            Self { seed, places: vec![0; (2 * strings.len() + 1).next_power_of_two()] };
        let count = u32::try_from(strings.len()).expect("vocabularies are far below 2^32");
        for index in (0..count).filter(|&index| wanted(index)) {
            let bytes = strings.get(index);
            if !bytes.is_empty() {
                let place = lookup.find(strings, bytes);
                if lookup.places[place] == 0 {
                    lookup.places[place] = index + 1;
                }
            }
        }
        lookup
    }

    /// The number of `bytes` in `strings`, which must be those of [`Lookup::new`].
    pub fn get(&self, strings: &Strings, bytes: &[u8]) -> Option<u32> {
        self.places[self.find(strings, bytes)].checked_sub(1)
    }

    /// Where `bytes` are, or the free place where they would be.
    fn find(&self, strings: &Strings, bytes: &[u8]) -> usize {
        let mask = self.places.len() - 1;
        let mut place = low_bits(mix_bytes(self.seed, bytes)) & mask;
        loop {
            match self.places[place].checked_sub(1) {
                Some(index) if strings.get(index) != bytes => place = (place + 1) & mask,
                _ => return place,
            }
        }
    }
}

/// The low bits of a hash as an index, before a mask.
fn low_bits(hash: u64) -> usize {
    usize::try_from(hash & 0xffff_ffff).expect("32 bits fit")
}

/// Both halves of a product: one multiplication mixes all bits into all.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    let [low, high] = [product & u128::from(u64::MAX), product >> 64];
    u64::try_from(low ^ high).expect("both halves have 64 bits")
}

const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix_bytes(seed: u64, bytes: &[u8]) -> u64 {
    let mut hash = seed ^ (bytes.len() as u64);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = fold(hash ^ u64::from_le_bytes(word), ODD);
    }
    fold(hash, ODD)
}

/// A fast hash of one `u64`, for maps whose keys are pairs of ids.
#[derive(Debug, Clone)]
pub struct PairHash(u64);

impl Default for PairHash {
    fn default() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }
}

impl BuildHasher for PairHash {
    type Hasher = PairHasher;

    fn build_hasher(&self) -> PairHasher {
        PairHasher(self.0)
    }
}

/// See [`PairHash`].
#[derive(Debug)]
pub struct PairHasher(u64);

impl Hasher for PairHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = mix_bytes(self.0, bytes);
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = fold(self.0 ^ word, ODD);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_found_again() {
        let mut strings = Strings::default();
        for index in 0_u32..5000 {
            strings.push(format!("{}", index * 7).as_bytes());
        }
        strings.push(b"7");
        strings.push(b"");
        let lookup = Lookup::new(&strings, |index| index != 3);
        for index in 0..5000 {
            let expected = (index != 3).then_some(index);
            assert_eq!(lookup.get(&strings, strings.get(index)), expected);
        }
        assert_eq!(lookup.get(&strings, b"7"), Some(1), "the first of equal strings");
        assert_eq!(lookup.get(&strings, b""), None);
        assert_eq!(lookup.get(&strings, b"not there"), None);
        assert_eq!(strings.get(9999), b"");
    }
}
