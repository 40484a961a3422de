use std::collections::HashMap;

use super::*;
use crate::format::{Array, Value};
use crate::sample::Rng;

/// Texts and where they are cut: the lengths in bytes of the pieces, by pre-tokenizer. Made by the
/// published regular expressions themselves, run by Python's `regex` over random strings of
/// characters of all classes.
const SPLITS: &str = include_str!("splits.jsonl");

#[test]
fn pieces_are_those_of_the_published_expressions() {
    let mut n_texts = 0;
    for line in SPLITS.lines() {
        let (text, by_name): (String, HashMap<String, Vec<usize>>) =
            serde_json::from_str(line).expect("a text and its cuts");
        for (name, expected) in by_name {
            let (splitter, _) = pretokenize::Splitter::from_name(&name).expect("a known name");
            let (mut lengths, mut joined) = (Vec::new(), String::new());
            splitter.split(&text, &mut |piece| {
                lengths.push(piece.len());
                joined.push_str(piece);
            });
            assert_eq!(lengths, expected, "{name}: {text:?}");
            assert_eq!(joined, text);
        }
        n_texts += 1;
    }
    assert!(n_texts >= 200);
}

fn strings(all: &[&str]) -> Value {
    Value::Array(Array::String(all.iter().map(|&text| text.to_owned()).collect()))
}

/// A byte-level tokenizer of 26 letters, space, and some merges.
fn letters() -> Meta {
    let mut tokens: Vec<String> = ('a'..='z').map(String::from).collect();
    tokens.push("Ġ".to_owned());
    let merges = ["a b", "b c", "ab c", "Ġ a", "c c", "cc cc", "Ġa b", "ab ab"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    tokens.extend(["<s>", "</s>", "<|x|>", "<|x|>y"].map(String::from));
    let mut kinds = vec![1; tokens.len()];
    let n = kinds.len();
    kinds[n - 4..].copy_from_slice(&[3, 3, 3, 4]);
    let mut meta = Meta::default();
    meta.insert("tokenizer.ggml.model", Value::String("gpt2".into()));
    meta.insert("tokenizer.ggml.pre", Value::String("gpt-2".into()));
    meta.insert("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    meta.insert("tokenizer.ggml.token_type", Value::Array(Array::I64(kinds)));
    meta.insert("tokenizer.ggml.merges", strings(&merges));
    meta.insert("tokenizer.ggml.bos_token_id", Value::U64(n as u64 - 4));
    meta.insert("tokenizer.ggml.eos_token_id", Value::U64(n as u64 - 3));
    meta
}

fn pieces(tokenizer: &Tokenizer, text: &str, special: Special) -> Vec<String> {
    let ids = tokenizer.encode(text, special);
    ids.iter().map(|&id| String::from_utf8_lossy(tokenizer.bytes(id)).into_owned()).collect()
}

#[test]
fn merges_go_by_rank_then_from_the_left() {
    let tokenizer = Tokenizer::from_meta(&letters()).expect("a good tokenizer");
    let table: [(&str, &[&str]); 9] = [
        ("", &[]),
        ("abc", &["abc"]),
        ("bbc", &["b", "bc"]),
        ("ababc", &["ab", "abc"]),
        ("ccc", &["cc", "c"]),
        ("ccccc", &["cccc", "c"]),
        ("x ab abab aa", &["x", " ", "ab", " ", "abab", " a", "a"]),
        // Bytes that the vocabulary lacks are left out, and then do not part their neighbours.
        ("aéc ébz", &["a", "c", " ", "b", "z"]),
        ("aéb", &["ab"]),
    ];
    for (text, expected) in table {
        assert_eq!(pieces(&tokenizer, text, Special::Parse), expected, "{text:?}");
    }
}

#[test]
fn special_tokens_are_found_where_they_count() {
    let tokenizer = Tokenizer::from_meta(&letters()).expect("a good tokenizer");
    let table: [(&str, Special, &[&str]); 5] = [
        ("a<s>b", Special::Parse, &["a", "<s>", "b"]),
        ("<s><s>", Special::Parse, &["<s>", "<s>"]),
        // The longest counts.
        ("<|x|>yz<|x|>z", Special::Parse, &["<|x|>y", "z", "<|x|>", "z"]),
        ("<s", Special::Parse, &["s"]),
        // A user's own tokens are text, control tokens are not.
        ("a<s><|x|>y", Special::Plain, &["a", "s", "<|x|>y"]),
    ];
    for (text, special, expected) in table {
        assert_eq!(pieces(&tokenizer, text, special), expected, "{text:?}");
    }
    let [bos, eos] = [tokenizer.bos().expect("bos"), tokenizer.eos().expect("eos")];
    assert!(tokenizer.is_end(eos) && !tokenizer.is_end(bos) && !tokenizer.add_bos());
    assert_eq!(tokenizer.decode(&[bos, 0, eos], false), "<s>a</s>");
    assert_eq!(tokenizer.decode(&[bos, 0, eos], true), "a");
    assert_eq!(tokenizer.special("<|x|>"), Some(eos + 1));
    assert_eq!((tokenizer.bytes(u32::MAX), tokenizer.is_end(u32::MAX)), (&b""[..], false));
}

/// A SentencePiece vocabulary with all bytes.
fn scored() -> Meta {
    let words = [("▁", -9.0), ("a", -8.0), ("b", -8.0), ("ab", -3.0), ("▁a", -2.0), ("ba", -1.0)];
    let mut tokens: Vec<String> = vec!["<unk>".into(), "<s>".into(), "</s>".into()];
    let mut scores = vec![0.0; 3];
    let mut kinds = vec![2, 3, 3];
    for byte in 0..256 {
        tokens.push(format!("<0x{byte:02X}>"));
        scores.push(0.0);
        kinds.push(6);
    }
    for (word, score) in words {
        tokens.push(word.into());
        scores.push(score);
        kinds.push(1);
    }
    let mut meta = Meta::default();
    meta.insert("tokenizer.ggml.model", Value::String("llama".into()));
    meta.insert("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    meta.insert("tokenizer.ggml.scores", Value::Array(Array::F64(scores)));
    meta.insert("tokenizer.ggml.token_type", Value::Array(Array::I64(kinds)));
    meta.insert("tokenizer.ggml.bos_token_id", Value::U64(1));
    meta.insert("tokenizer.ggml.eos_token_id", Value::U64(2));
    meta
}

#[test]
fn scores_decide_and_bytes_say_the_rest() {
    let mut meta = scored();
    let prefixed = Tokenizer::from_meta(&meta).expect("a good tokenizer");
    meta.insert("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    let bare = Tokenizer::from_meta(&meta).expect("a good tokenizer");
    let table: [(&Tokenizer, &str, &[&str]); 7] = [
        (&prefixed, "", &[]),
        (&prefixed, "ab", &[" a", "b"]),
        (&bare, "ab", &["ab"]),
        // `ba` has the best score wherever it stands.
        (&bare, "abab", &["a", "ba", "b"]),
        (&bare, "a b▁a", &["a", " ", "b", " a"]),
        (&bare, "aéb", &["a", "\u{fffd}", "\u{fffd}", "b"]),
        (&prefixed, "a</s>a", &[" a", "</s>", " a"]),
    ];
    for (tokenizer, text, expected) in table {
        assert_eq!(pieces(tokenizer, text, Special::Parse), expected, "{text:?}");
    }
    assert!(prefixed.add_bos() && prefixed.adds_space_prefix() && !bare.adds_space_prefix());
    for text in ["", "a b", " a  b ", "é😀\n<0x41>"] {
        for tokenizer in [&prefixed, &bare] {
            let ids = tokenizer.encode(text, Special::Plain);
            assert_eq!(tokenizer.decode(&ids, true), text);
        }
    }
}

/// Merging with a heap against merging as the definition says: again and again the best pair.
#[test]
fn the_heap_merges_as_the_definition_does() {
    let tokenizer = Tokenizer::from_meta(&letters()).expect("a good tokenizer");
    let merges = ["a b", "b c", "ab c", " |a", "c c", "cc cc", " a|b", "ab ab"];
    let merges = merges.map(|m| m.split_once('|').or(m.split_once(' ')).expect("two parts"));
    let mut rng = Rng::new(2);
    for _ in 0..3000 {
        let n = 1 + rng.below(14);
        let text: String = (0..n).map(|_| ['a', 'b', 'c'][rng.below(3)]).collect();
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        let rank = |parts: &[String], at: usize| {
            merges.iter().position(|(l, r)| parts[at] == *l && parts[at + 1] == *r)
        };
        while let Some((_, at)) =
            (0..parts.len().saturating_sub(1)).filter_map(|at| Some((rank(&parts, at)?, at))).min()
        {
            let right = parts.remove(at + 1);
            parts[at].push_str(&right);
        }
        assert_eq!(pieces(&tokenizer, &text, Special::Parse), parts, "{text}");
    }
}

#[test]
fn bad_metadata_is_refused_by_name() {
    let change = |key: &str, value: Value| {
        let mut meta = letters();
        meta.insert(key, value);
        Tokenizer::from_meta(&meta).expect_err(key).to_string()
    };
    let text = |text: &str| Value::String(text.into());
    let model = change("tokenizer.ggml.model", text("rwkv"));
    assert!(model.contains("\"rwkv\""), "{model}");
    let pre = change("tokenizer.ggml.pre", text("none-such"));
    assert!(pre.contains("\"none-such\""), "{pre}");
    let merges = change("tokenizer.ggml.merges", strings(&["ab"]));
    assert!(merges.contains("without a space"), "{merges}");
    let kinds = change("tokenizer.ggml.token_type", Value::Array(Array::I64(vec![1])));
    assert!(kinds.contains("1 entries for"), "{kinds}");
    let mut meta = scored();
    meta.insert("tokenizer.ggml.scores", Value::Array(Array::F64(vec![0.0])));
    assert!(Tokenizer::from_meta(&meta).is_err());
    assert!(Tokenizer::from_meta(&Meta::default()).is_err());
    // An id beyond the vocabulary is none.
    let mut meta = letters();
    meta.insert("tokenizer.ggml.bos_token_id", Value::U64(1 << 40));
    assert_eq!(Tokenizer::from_meta(&meta).expect("usable").bos(), None);
}

/// Texts that make a careless tokenizer take quadratic time.
#[test]
fn long_texts_without_spaces_take_their_time_only_once() {
    let n = 200_000;
    let tokenizers = [letters(), scored()].map(|meta| Tokenizer::from_meta(&meta).expect("good"));
    for unit in ["ab", "c", " ", "\n ", "<", "<|x|", "1", "é", "'", "aB", "あA"] {
        let text = unit.repeat(n / unit.len());
        let started = std::time::Instant::now();
        for tokenizer in &tokenizers {
            tokenizer.encode(&text, Special::Parse);
        }
        // Linear growth takes under a second here even unoptimised; quadratic takes hours.
        assert!(started.elapsed().as_secs() < 20, "{unit:?}");
    }
}
