//! The grammar: lines, quotes, and where a mistake is.

// A Modelfile may come from a stranger.
#![deny(clippy::indexing_slicing, clippy::string_slice, clippy::arithmetic_side_effects)]

use crate::directive::{self, Directive};

/// Bytes of a Modelfile; the longest real ones carry a licence of some 30 KB.
pub const LIMIT_BYTES: usize = 4 << 20;

/// A mistake in a Modelfile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("(line {line}): {problem}")]
pub struct ParseError {
    /// The line it begins on, from 1.
    pub line: usize,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with a Modelfile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A word that is no directive.
    #[error("{0:?} is not an instruction; there are {words}", words = directive::words())]
    Word(String),
    /// A directive without its value.
    #[error("the instruction has no value")]
    Empty,
    /// A quoted value without its end.
    #[error("the quote that begins here has no end")]
    Quote,
    /// A message by somebody else.
    #[error("a message is by system, user or assistant")]
    Role,
    /// A parameter that does not exist.
    #[error("{0:?} is not a parameter")]
    Parameter(String),
    /// A parameter's value of the wrong type.
    #[error("the parameter {name} must be {expected}")]
    Value {
        /// Which parameter.
        name: String,
        /// What it must be.
        expected: &'static str,
    },
    /// Not a version.
    #[error("a version is three numbers, for example 0.1.0")]
    Version,
    /// Not a digest.
    #[error("a digest is sha256: and 64 hexadecimal digits in lower case")]
    Digest,
    /// Not a size.
    #[error("a size is a number of bytes")]
    Size,
    /// `SOURCE`, `DIGEST` or `SIZE` before any file.
    #[error("SOURCE, DIGEST and SIZE come after the FROM, ADAPTER or DRAFT they are about")]
    NoFile,
    /// Nothing to make the model of.
    #[error("no FROM line; the first line of a Modelfile says what the model is made of")]
    NoFrom,
    /// More bytes than a Modelfile may have.
    #[error("a Modelfile has at most {LIMIT_BYTES} bytes")]
    TooLong,
}

/// What begins and ends a value over lines.
const TRIPLE: &str = "\"\"\"";

/// All directives, each with the line it begins on.
pub(crate) fn lines(text: &str) -> Result<Vec<(usize, Directive)>, ParseError> {
    if text.len() > LIMIT_BYTES {
        return Err(ParseError { line: 1, problem: Problem::TooLong });
    }
    let mut rest = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut line = 1_usize;
    let mut directives = Vec::new();
    while !rest.is_empty() {
        let at = |problem| ParseError { line, problem };
        let (head, tail) = split_line(rest);
        let trimmed = head.trim();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            (rest, line) = (tail, line.saturating_add(1));
            continue;
        }
        let body = rest.trim_start();
        let (word, body) = split_word(body);
        let (name, body) = if directive::has_name(word) { split_word(body) } else { ("", body) };
        let (value, tail) = value(body).map_err(at)?;
        let value = if name.is_empty() { value.to_owned() } else { format!("{name} {value}") };
        directives.push((line, directive::read(word, &value).map_err(at)?));
        let read = rest.strip_suffix(tail).unwrap_or(rest);
        line = line.saturating_add(read.matches('\n').count());
        rest = tail;
    }
    Ok(directives)
}

/// The first line without its end, and what follows it.
fn split_line(text: &str) -> (&str, &str) {
    text.split_once('\n').unwrap_or((text, ""))
}

/// The first word, and what follows the white space behind it on the same line.
fn split_word(text: &str) -> (&str, &str) {
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    (word, rest.trim_start_matches([' ', '\t']))
}

/// A value and what follows its line: `"""…"""` over lines, `"…"` on one, or bare to the end of the
/// line.
fn value(text: &str) -> Result<(&str, &str), Problem> {
    if let Some(inside) = text.strip_prefix(TRIPLE) {
        return triple(inside);
    }
    let (head, tail) = split_line(text);
    let bare = head.trim();
    match bare.strip_prefix('"') {
        Some(inside) => Ok((inside.strip_suffix('"').ok_or(Problem::Quote)?, tail)),
        None => Ok((bare, tail)),
    }
}

/// A value up to the first three quotes that nothing follows on their line, so that a value may
/// hold or end with quotes of its own.
fn triple(inside: &str) -> Result<(&str, &str), Problem> {
    let mut quotes = inside.char_indices().filter(|(_, c)| *c == '"').map(|(at, _)| at);
    let end = quotes.find_map(|at| {
        let (content, end) = inside.split_at_checked(at)?;
        let (after, tail) = split_line(end.strip_prefix(TRIPLE)?);
        after.trim().is_empty().then_some((content, tail))
    });
    end.ok_or(Problem::Quote)
}

#[cfg(test)]
mod tests {
    use crate::{Directive, Modelfile, library};

    use super::*;

    /// An example a directive, in the order of the table.
    const EXAMPLES: [(&str, &str); 14] = [
        ("FROM", include_str!("../examples/from.modelfile")),
        ("ADAPTER", include_str!("../examples/adapter.modelfile")),
        ("DRAFT", include_str!("../examples/draft.modelfile")),
        ("PARAMETER", include_str!("../examples/parameter.modelfile")),
        ("TEMPLATE", include_str!("../examples/template.modelfile")),
        ("SYSTEM", include_str!("../examples/system.modelfile")),
        ("LICENSE", include_str!("../examples/license.modelfile")),
        ("MESSAGE", include_str!("../examples/message.modelfile")),
        ("RENDERER", include_str!("../examples/renderer.modelfile")),
        ("PARSER", include_str!("../examples/parser.modelfile")),
        ("REQUIRES", include_str!("../examples/requires.modelfile")),
        ("SOURCE", include_str!("../examples/source.modelfile")),
        ("DIGEST", include_str!("../examples/digest.modelfile")),
        ("SIZE", include_str!("../examples/size.modelfile")),
    ];

    #[test]
    fn every_directive_has_an_example_that_reads_back() {
        let words: Vec<&str> = EXAMPLES.iter().map(|example| example.0).collect();
        assert_eq!(words.join(", "), directive::words());
        for (word, text) in EXAMPLES {
            let modelfile = Modelfile::parse(text).expect(word);
            let written = modelfile.to_string();
            assert!(written.lines().any(|line| line.starts_with(word)), "{word}:\n{written}");
            assert_eq!(Modelfile::parse(&written), Ok(modelfile), "{word}");
        }
    }

    #[test]
    fn values_are_bare_quoted_or_over_lines() {
        let table = [
            ("SYSTEM hello there  ", "hello there"),
            ("system\thello", "hello"),
            ("SYSTEM \"  kept \"", "  kept "),
            ("SYSTEM \"\"\"one\n two\n\"\"\"  ", "one\n two\n"),
            ("SYSTEM \"\"\"says \"\"\"here\"\"\" and \"\"\"", "says \"\"\"here\"\"\" and "),
            ("SYSTEM \"\"\"ends with \"quotes\"\"\"\"", "ends with \"quotes\""),
            ("SYSTEM don't \"quote\" me", "don't \"quote\" me"),
            ("SYSTEM \"\"\"\"\"\"", ""),
            ("SYSTEM # is no comment here", "# is no comment here"),
            ("SYSTEM crlf\r", "crlf"),
        ];
        for (line, value) in table {
            let text = format!("\u{feff}# a comment\nFROM x\n\n{line}\n# the end");
            let modelfile = Modelfile::parse(&text).expect(line);
            assert_eq!(modelfile.system(), Some(value), "{line}");
            assert_eq!(Modelfile::parse(&modelfile.to_string()), Ok(modelfile), "{line}");
        }
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        let long = "x".repeat(LIMIT_BYTES + 1);
        let table: [(&str, usize, Problem); 16] = [
            ("", 1, Problem::NoFrom),
            ("SYSTEM x\n\n", 1, Problem::NoFrom),
            ("FROM x\n\nBAKE a cake", 3, Problem::Word("BAKE".into())),
            ("FROM", 1, Problem::Empty),
            ("FROM x\nPARAMETER", 2, Problem::Empty),
            ("FROM x\nSYSTEM \"\"\"a\nb\nc", 2, Problem::Quote),
            ("FROM x\nSYSTEM \"\"\"a\nb\"\"\"\nSYSTEM \"open", 4, Problem::Quote),
            ("FROM x\nMESSAGE robot beep", 2, Problem::Role),
            ("FROM x\nPARAMETER warmth 3", 2, Problem::Parameter("warmth".into())),
            (
                "FROM x\nPARAMETER top_k 1.5",
                2,
                Problem::Value { name: "top_k".into(), expected: "a whole number" },
            ),
            (
                "FROM x\nPARAMETER temperature NaN",
                2,
                Problem::Value { name: "temperature".into(), expected: "a number" },
            ),
            ("FROM x\nREQUIRES soon", 2, Problem::Version),
            ("FROM x\nDIGEST sha256:12", 2, Problem::Digest),
            ("FROM x\nSIZE -1", 2, Problem::Size),
            ("SIZE 1\nFROM x", 1, Problem::NoFile),
            (&long, 1, Problem::TooLong),
        ];
        for (text, line, problem) in table {
            let expected = Err(ParseError { line, problem });
            assert_eq!(Modelfile::parse(text), expected, "{:?}", text.get(..40));
        }
    }

    #[test]
    fn files_know_their_sources_and_parameters_become_json() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        let text = format!(
            "FROM a.gguf\nSIZE 7\nDIGEST {digest}\nSOURCE file:/a\nSOURCE \"\"\"\nfile:/b\n file:/c\n\"\"\"\n\
             ADAPTER b.gguf\nSOURCE file:/d\nPARAMETER stop \"<end>\\n\"\nPARAMETER top_k 3\n\
             PARAMETER temperature 0.5\nPARAMETER top_k 4\nPARAMETER stop \"\"\"\n\"\"\"\nPARAMETER use_mmap TRUE\n\
             MESSAGE user hi\nMESSAGE assistant \"\"\"a \"b\"\"\"\"\n"
        );
        let modelfile = Modelfile::parse(&text).unwrap();
        let files = modelfile.files();
        assert_eq!((files[0].kind, files[0].from, files[0].size), ("FROM", "a.gguf", Some(7)));
        assert_eq!(files[0].digest, Some(digest.as_str()));
        assert_eq!(
            files[0].sources,
            [&["file:/a".to_owned()][..], &["file:/b".into(), "file:/c".into()]]
        );
        assert_eq!((files[1].kind, files[1].digest, files[1].sources.len()), ("ADAPTER", None, 1));
        assert_eq!(
            modelfile.params_json().unwrap(),
            r#"{"stop":["<end>\\n","\u000a"],"top_k":4,"temperature":0.5,"use_mmap":true}"#
        );
        assert_eq!(
            modelfile.messages_json().unwrap(),
            r#"[{"role":"user","content":"hi"},{"role":"assistant","content":"a \"b\""}]"#
        );
        assert_eq!(Modelfile::parse("FROM x").unwrap().params_json(), None);
    }

    /// Seeded mutations of every text there is. Nothing may panic, and what reads must read back.
    #[test]
    #[allow(clippy::arithmetic_side_effects)] // Of a random number generator.
    fn mutated_modelfiles_never_panic_and_read_back() {
        let seeds: Vec<&str> = EXAMPLES
            .iter()
            .map(|example| example.1)
            .chain(library::all().iter().map(|entry| entry.text))
            .collect();
        let pieces =
            ["\"", "\"\"\"", "\n", "\r\n", " ", "\t", "#", "FROM ", "\u{a0}", "é", "\0", "stop"];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state % below as u64).unwrap()
        };
        let mut n_read = 0;
        for _ in 0..20_000 {
            let mut text: Vec<char> = seeds[random(seeds.len())].chars().collect();
            for _ in 0..=random(6) {
                let at = random(text.len().max(1)).min(text.len());
                match random(3) {
                    0 => text.truncate(at.max(1)),
                    1 => {
                        let end = (at + random(8)).min(text.len());
                        text.drain(at..end);
                    }
                    _ => {
                        let piece = pieces[random(pieces.len())].chars();
                        text.splice(at..at, piece);
                    }
                }
            }
            let text: String = text.into_iter().collect();
            if let Ok(modelfile) = Modelfile::parse(&text) {
                n_read += 1;
                let written = modelfile.to_string();
                assert_eq!(
                    Modelfile::parse(&written).as_ref(),
                    Ok(&modelfile),
                    "{text:?}\n{written:?}"
                );
            }
        }
        assert!(n_read > 2_000, "only {n_read} mutations could be read: the test tests little");
    }

    #[test]
    fn a_directive_is_written_so_that_it_reads_back() {
        for value in ["plain", " padded ", "\"", "\"quoted\"", "a\nb", "\n", "", "a\r", "\"\"\""] {
            let directive = Directive::Template(value.to_owned());
            let text = format!("FROM x\n{directive}\n");
            let modelfile = Modelfile::parse(&text).expect(&text);
            assert_eq!(modelfile.template(), Some(value), "{text}");
        }
    }
}
