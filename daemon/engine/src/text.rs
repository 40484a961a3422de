//! Tokens to text as they come: whole characters only, and nothing that a stop string may yet
//! claim.

/// What one push made known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Text that is final.
    pub text: String,
    /// Whether a stop string was found; the text ends before it, and nothing may follow.
    pub stopped: bool,
}

/// The bytes of one answer on their way to text.
#[derive(Debug, Default)]
pub struct Detokenizer {
    stops: Vec<String>,
    /// Bytes at the end that are not yet a whole character; at most three.
    partial: Vec<u8>,
    /// Whole characters that could be the start of a stop string.
    held: String,
    stopped: bool,
}

impl Detokenizer {
    /// Ends at the first of `stops`; empty ones count for nothing.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { stops, ..Self::default() }
    }

    /// Takes the bytes of the next token. Bytes that can be no part of UTF-8 become U+FFFD, as
    /// [`String::from_utf8_lossy`] makes them.
    pub fn push(&mut self, bytes: &[u8]) -> Chunk {
        self.partial.extend_from_slice(bytes);
        let whole = self.partial.len() - unfinished(&self.partial);
        let text = String::from_utf8_lossy(&self.partial[..whole]).into_owned();
        self.partial.drain(..whole);
        self.take(&text)
    }

    /// The rest when no token follows: a character that never became whole is U+FFFD.
    pub fn finish(&mut self) -> Chunk {
        let partial = std::mem::take(&mut self.partial);
        let mut chunk = self.take(&String::from_utf8_lossy(&partial));
        if !self.stopped {
            chunk.text.push_str(&std::mem::take(&mut self.held));
        }
        chunk
    }

    fn take(&mut self, text: &str) -> Chunk {
        if self.stopped {
            return Chunk { text: String::new(), stopped: true };
        }
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = found {
            self.stopped = true;
            self.held.truncate(at);
            return Chunk { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Chunk { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }
}

/// Bytes at the end of `text` that are the longest proper beginning of `tag`.
pub(crate) fn overlap(text: &str, tag: &str) -> usize {
    let most = text.len().min(tag.len().saturating_sub(1));
    (1..=most)
        .rev()
        .find(|&len| text.as_bytes().ends_with(&tag.as_bytes()[..len]) && tag.is_char_boundary(len))
        .unwrap_or(0)
}

/// How many bytes at the end begin a character that further bytes may complete.
fn unfinished(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    (1..=tail.len())
        .rev()
        .find(|&n| {
            let end = &tail[tail.len() - n..];
            // `error_len` is `None` exactly where the input ends in the middle of a character.
            std::str::from_utf8(end)
                .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Rng;

    fn stops(all: &[&str]) -> Vec<String> {
        all.iter().map(|&stop| stop.to_owned()).collect()
    }

    #[test]
    fn stop_strings_end_the_text_across_tokens() {
        let table: &[(&[&str], &[&str], &str, bool)] = &[
            (&[], &["a", "b"], "ab", false),
            (&["END"], &["one E", "N", "D two"], "one ", true),
            (&["END"], &["one EN", "TER"], "one ENTER", false),
            (&["END"], &["one EN"], "one EN", false),
            (&["ab", "b"], &["xxa", "b"], "xx", true),
            (&["b", "ab"], &["xxab"], "xx", true),
            (&["aab"], &["aaa", "ab"], "aa", true),
            (&[""], &["a", "b"], "ab", false),
            (&["ß"], &["Stra", "ße"], "Stra", true),
            (&["\n\n"], &["a\n", "b\n", "\nc"], "a\nb", true),
        ];
        for (stop, tokens, text, stopped) in table {
            let mut detokenizer = Detokenizer::new(stops(stop));
            let mut all = String::new();
            let mut found = false;
            for token in *tokens {
                let chunk = detokenizer.push(token.as_bytes());
                assert!(!found || chunk.text.is_empty(), "text after a stop");
                all.push_str(&chunk.text);
                found |= chunk.stopped;
            }
            let last = detokenizer.finish();
            all.push_str(&last.text);
            assert_eq!((all.as_str(), found | last.stopped), (*text, *stopped), "{stop:?}");
        }
    }

    #[test]
    fn nothing_is_held_back_longer_than_needed() {
        let mut detokenizer = Detokenizer::new(stops(&["<end>"]));
        assert_eq!(detokenizer.push(b"a <e").text, "a ");
        assert_eq!(detokenizer.push(b"m>").text, "<em>");
        assert_eq!(detokenizer.push(&[0xf0, 0x9f]).text, "");
        assert_eq!(detokenizer.push(&[0x98, 0x80, b'x']).text, "😀x");
        // 0xc3 wants one more byte; 0x28 is none of its kind, so the text is known at once.
        assert_eq!(detokenizer.push(&[0xc3]).text, "");
        assert_eq!(detokenizer.push(&[0x28]).text, "\u{fffd}(");
    }

    #[test]
    fn chunks_together_are_the_decoded_whole() {
        let mut rng = Rng::new(7);
        let pool: &[&[u8]] = &[b"a", "é".as_bytes(), "漢".as_bytes(), "😀".as_bytes(), b"\n"];
        for _ in 0..4000 {
            let mut bytes = Vec::new();
            for _ in 0..rng.below(12) {
                if rng.below(3) == 0 {
                    bytes.push(u8::try_from(rng.below(256)).expect("a byte"));
                } else {
                    bytes.extend_from_slice(pool[rng.below(pool.len())]);
                }
            }
            let mut detokenizer = Detokenizer::new(stops(&["éa"]));
            let mut all = String::new();
            let mut rest = bytes.as_slice();
            let mut stopped = false;
            while !rest.is_empty() {
                let (token, after) = rest.split_at(1 + rng.below(rest.len()));
                let chunk = detokenizer.push(token);
                stopped |= chunk.stopped;
                all.push_str(&chunk.text);
                rest = after;
            }
            let last = detokenizer.finish();
            stopped |= last.stopped;
            all.push_str(&last.text);
            let whole = String::from_utf8_lossy(&bytes);
            let expected = whole.find("éa").map_or(&*whole, |at| &whole[..at]);
            assert_eq!((all.as_str(), stopped), (expected, expected != whole), "{bytes:?}");
        }
    }
}
