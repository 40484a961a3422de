//! How text is cut into pieces before byte-level BPE: no merge crosses a cut.
//!
//! The published tokenizers say this with regular expressions; each is said here as a function that
//! finds the end of the piece at a position in one pass, without backtracking over the text. The
//! expression stands above the function it describes.

use super::unicode::Class;

/// A way to cut text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Splitter {
    /// GPT-2's expression; `single_digits` first cuts out every digit.
    Words {
        /// Whether each digit is a piece of its own.
        single_digits: bool,
    },
    /// Llama 3's expression and its relatives.
    Lines {
        /// Most digits of a piece.
        digits: usize,
        /// Whether combining marks belong to words.
        marks: bool,
    },
    /// o200k's expression: words are also cut where lower case turns to upper case.
    Cases {
        /// Most digits of a piece.
        digits: usize,
        /// Whether `'s` and the like stay with the word before them.
        contractions: bool,
    },
    /// DeepSeek V3's three expressions, one after another.
    Stages,
}

/// Which names of `tokenizer.ggml.pre` mean what. The last field: whether a piece that is a token
/// is taken whole before any merge (tokenizers that come from tiktoken ranks).
const NAMES: &[(&[&str], Splitter, bool)] = &[
    (
        &[
            "default",
            "gpt-2",
            "gpt2",
            "phi-2",
            "olmo",
            "mpt",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "gigachat",
            "roberta-bpe",
            "modern-bert",
            "mellum",
        ],
        Splitter::Words { single_digits: false },
        false,
    ),
    (
        &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        Splitter::Words { single_digits: true },
        false,
    ),
    (
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"],
        Splitter::Lines { digits: 3, marks: false },
        true,
    ),
    (
        &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"],
        Splitter::Lines { digits: 3, marks: false },
        false,
    ),
    (
        &["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"],
        Splitter::Lines { digits: 1, marks: false },
        false,
    ),
    (&["qwen35"], Splitter::Lines { digits: 1, marks: true }, false),
    (&["gpt-4o", "llama4", "kanana2"], Splitter::Cases { digits: 3, contractions: true }, true),
    (&["tekken"], Splitter::Cases { digits: 1, contractions: false }, true),
    (&["deepseek-v3", "deepseek-v4"], Splitter::Stages, false),
];

impl Splitter {
    /// The splitter that `tokenizer.ggml.pre` names, and whether whole pieces come before merges.
    pub fn from_name(name: &str) -> Option<(Self, bool)> {
        let (_, splitter, whole) = NAMES.iter().find(|(names, ..)| names.contains(&name))?;
        Some((*splitter, *whole))
    }

    /// Hands each piece of `text` to `piece`, in order; together they are `text`.
    pub fn split<'a>(self, text: &'a str, piece: Piece<'_, 'a>) {
        match self {
            Splitter::Words { single_digits: false } => each(text, words, piece),
            Splitter::Words { single_digits: true } => {
                let digit = |c| Class::of(c) == Class::Number;
                isolate(text, digit, 1, piece, &mut |rest, piece| each(rest, words, piece));
            }
            Splitter::Lines { digits, marks } => {
                each(text, |text, at| lines(text, at, digits, marks), piece);
            }
            Splitter::Cases { digits, contractions } => {
                each(text, |text, at| cases(text, at, digits, contractions), piece);
            }
            Splitter::Stages => {
                let digit = |c| Class::of(c) == Class::Number;
                isolate(text, digit, 3, piece, &mut |rest, piece| {
                    isolate(rest, is_east_asian, usize::MAX, piece, &mut |rest, piece| {
                        each_or_gap(rest, piece);
                    });
                });
            }
        }
    }
}

/// The characters that DeepSeek's second expression cuts out: `[一-龥぀-ゟ゠-ヿ]`.
fn is_east_asian(c: char) -> bool {
    matches!(c, '\u{4e00}'..='\u{9fa5}' | '\u{3040}'..='\u{30ff}')
}

/// Hears of a piece.
type Piece<'f, 'a> = &'f mut dyn FnMut(&'a str);

/// Cuts with a function that always finds a piece.
fn each<'a>(text: &'a str, end_of_piece: impl Fn(&str, usize) -> usize, piece: Piece<'_, 'a>) {
    let mut at = 0;
    while at < text.len() {
        let end = end_of_piece(text, at);
        debug_assert!(end > at);
        piece(&text[at..end]);
        at = end;
    }
}

/// Makes runs of up to `most` characters that are `wanted` pieces; what lies between goes to
/// `rest`.
fn isolate<'a>(
    text: &'a str,
    wanted: impl Fn(char) -> bool,
    most: usize,
    piece: Piece<'_, 'a>,
    rest: &mut dyn FnMut(&'a str, Piece<'_, 'a>),
) {
    let mut at = 0;
    while at < text.len() {
        let end = run(text, at, most, &wanted);
        if end > at {
            piece(&text[at..end]);
            at = end;
        } else {
            let end = run(text, at, usize::MAX, |c| !wanted(c));
            rest(&text[at..end], piece);
            at = end;
        }
    }
}

/// Cuts with [`stage`]; what it does not match between two matches is one piece.
fn each_or_gap<'a>(text: &'a str, piece: Piece<'_, 'a>) {
    let mut gap = 0;
    let mut at = 0;
    while at < text.len() {
        if let Some(end) = stage(text, at) {
            if gap < at {
                piece(&text[gap..at]);
            }
            piece(&text[at..end]);
            (gap, at) = (end, end);
        } else {
            at += char_at(text, at).map_or(1, char::len_utf8);
        }
    }
    if gap < at {
        piece(&text[gap..at]);
    }
}

fn char_at(text: &str, at: usize) -> Option<char> {
    text.get(at..)?.chars().next()
}

/// The end of the run of at most `most` characters that are `wanted`.
fn run(text: &str, at: usize, most: usize, wanted: impl Fn(char) -> bool) -> usize {
    let rest = &text[at..];
    rest.char_indices()
        .enumerate()
        .find(|&(n, (_, c))| n == most || !wanted(c))
        .map_or(text.len(), |(_, (offset, _))| at + offset)
}

/// `'s` and its kin at `at`. Case folding takes in the long s, as regular expressions do.
fn contraction(text: &str, at: usize, any_case: bool) -> Option<usize> {
    let mut chars = text[at..].chars();
    if chars.next() != Some('\'') {
        return None;
    }
    let fold = |c: char| match c {
        '\u{17f}' if any_case => 's',
        _ if any_case => c.to_ascii_lowercase(),
        _ => c,
    };
    let first = chars.next()?;
    match fold(first) {
        's' | 't' | 'm' | 'd' => Some(at + 1 + first.len_utf8()),
        'r' | 'v' if chars.next().map(fold) == Some('e') => Some(at + 3),
        'l' if chars.next().map(fold) == Some('l') => Some(at + 3),
        _ => None,
    }
}

/// `\s+(?!\S)|\s+` at white space: all of it before the end of the text, else all but the last
/// character, which belongs to what follows, unless it is the only one.
fn blanks(text: &str, at: usize) -> usize {
    let end = run(text, at, usize::MAX, char::is_whitespace);
    if end == text.len() {
        return end;
    }
    let last = text[at..end].chars().next_back().map_or(0, char::len_utf8);
    if end - last > at { end - last } else { end }
}

/// `\s*[\r\n]+` at white space: up to the last line break of the run.
fn line_breaks(text: &str, at: usize) -> Option<usize> {
    let end = run(text, at, usize::MAX, char::is_whitespace);
    text[at..end].rfind(['\r', '\n']).map(|offset| at + offset + 1)
}

/// ```text
/// '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
/// ```
fn words(text: &str, at: usize) -> usize {
    if let Some(end) = contraction(text, at, false) {
        return end;
    }
    let start = at + usize::from(text[at..].starts_with(' '));
    let end = match char_at(text, start) {
        Some(c) if Class::of(c).is_letter() => {
            run(text, start, usize::MAX, |c| Class::of(c).is_letter())
        }
        Some(c) if Class::of(c) == Class::Number => {
            run(text, start, usize::MAX, |c| Class::of(c) == Class::Number)
        }
        Some(c) if !c.is_whitespace() => run(text, start, usize::MAX, |c| is_mark_of(c, false)),
        _ => start,
    };
    if end > start { end } else { blanks(text, at) }
}

/// `[^\s\p{L}\p{N}]`, with `letters_have_marks` also not `\p{M}`.
fn is_mark_of(c: char, letters_have_marks: bool) -> bool {
    let class = Class::of(c);
    let is_word = class.is_letter() || (letters_have_marks && class == Class::Mark);
    !(c.is_whitespace() || is_word || class == Class::Number)
}

/// With `n` for `digits`, and with `marks` `[\p{L}\p{M}]` where a word's letters stand:
/// ```text
/// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n]*
/// |\s*[\r\n]+|\s+(?!\S)|\s+
/// ```
fn lines(text: &str, at: usize, digits: usize, marks: bool) -> usize {
    if let Some(end) = contraction(text, at, true) {
        return end;
    }
    let in_word = |c: char| {
        let class = Class::of(c);
        class.is_letter() || (marks && class == Class::Mark)
    };
    let prefixed = word_prefix(text, at);
    for start in [prefixed, at] {
        let end = run(text, start, usize::MAX, in_word);
        if end > start {
            return end;
        }
    }
    not_words(text, at, digits, marks, &['\r', '\n'])
}

/// The end of `[^\r\n\p{L}\p{N}]?` at `at`.
fn word_prefix(text: &str, at: usize) -> usize {
    match char_at(text, at) {
        Some(c) if !matches!(c, '\r' | '\n') => {
            let class = Class::of(c);
            let taken = !class.is_letter() && class != Class::Number;
            if taken { at + c.len_utf8() } else { at }
        }
        _ => at,
    }
}

/// ```text
/// \p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
/// ```
/// with the characters of `tail` in place of `[\r\n]`.
fn not_words(text: &str, at: usize, digits: usize, marks: bool, tail: &[char]) -> usize {
    let end = run(text, at, digits, |c| Class::of(c) == Class::Number);
    if end > at {
        return end;
    }
    let start = at + usize::from(text[at..].starts_with(' '));
    let end = run(text, start, usize::MAX, |c| is_mark_of(c, marks));
    if end > start {
        return run(text, end, usize::MAX, |c| tail.contains(&c));
    }
    line_breaks(text, at).unwrap_or_else(|| blanks(text, at))
}

/// With `U` for `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`, `L` for `[\p{Ll}\p{Lm}\p{Lo}\p{M}]`, `C` for the
/// contractions, `n` for `digits`:
/// ```text
/// [^\r\n\p{L}\p{N}]?U*L+C?|[^\r\n\p{L}\p{N}]?U+L*C?|\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n/]*
/// |\s*[\r\n]+|\s+(?!\S)|\s+
/// ```
fn cases(text: &str, at: usize, digits: usize, contractions: bool) -> usize {
    let prefixed = word_prefix(text, at);
    let upper = |c| matches!(Class::of(c), Class::Upper | Class::OtherLetter | Class::Mark);
    let lower = |c| matches!(Class::of(c), Class::Lower | Class::OtherLetter | Class::Mark);
    let word = [prefixed, at].into_iter().find_map(|start| {
        let turn = run(text, start, usize::MAX, upper);
        let end = run(text, turn, usize::MAX, lower);
        if end > turn {
            return Some(end);
        }
        // No lower case follows: the last character that may count as one ends the word.
        let (offset, c) = text[start..turn].char_indices().rfind(|&(_, c)| lower(c))?;
        Some(start + offset + c.len_utf8())
    });
    let word = word.or_else(|| {
        let run_from = |start| run(text, start, usize::MAX, upper);
        [prefixed, at]
            .into_iter()
            .map(|start| (start, run_from(start)))
            .find_map(|(start, end)| (end > start).then_some(end))
    });
    match word {
        Some(end) if contractions => contraction(text, end, true).unwrap_or(end),
        Some(end) => end,
        None => not_words(text, at, digits, false, &['\r', '\n', '/']),
    }
}

/// DeepSeek's third expression, where it matches:
/// ```text
/// [!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+
/// | ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
/// ```
fn stage(text: &str, at: usize) -> Option<usize> {
    let first = char_at(text, at)?;
    if first.is_ascii_punctuation() {
        let end = run(text, at + 1, usize::MAX, |c| c.is_ascii_alphabetic());
        if end > at + 1 {
            return Some(end);
        }
    }
    let class = Class::of(first);
    let is_sign = |c| matches!(Class::of(c), Class::Punctuation | Class::Symbol);
    let takes_prefix = !matches!(first, '\r' | '\n') && !class.is_letter() && !is_sign(first);
    let prefixed = if takes_prefix { at + first.len_utf8() } else { at };
    for start in [prefixed, at] {
        let in_word = |c| {
            let class = Class::of(c);
            class.is_letter() || class == Class::Mark
        };
        let end = run(text, start, usize::MAX, in_word);
        if end > start {
            return Some(end);
        }
    }
    let start = at + usize::from(first == ' ');
    let end = run(text, start, usize::MAX, is_sign);
    if end > start {
        return Some(run(text, end, usize::MAX, |c| matches!(c, '\r' | '\n')));
    }
    if first.is_whitespace() {
        return Some(line_breaks(text, at).unwrap_or_else(|| blanks(text, at)));
    }
    None
}
