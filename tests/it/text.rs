//! Rust and C text without its comments, so that rules look at code only.

/// What of a source stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Neither comments nor the insides of strings.
    Code,
    /// No comments.
    CodeAndStrings,
}

/// `text` with everything else replaced by blanks, line by line.
pub fn strip(text: &str, keep: Keep) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let (taken, is_kept) = match piece(rest) {
            Some((length, kind)) => (length, kind == Kind::String && keep == Keep::CodeAndStrings),
            None => (c.len_utf8(), true),
        };
        let (now, later) = rest.split_at(taken);
        let blanked = now.chars().map(|c| if is_kept || c == '\n' { c } else { ' ' });
        out.extend(blanked);
        rest = later;
        // A name that ends in r or b must not make a raw string of what follows.
        if c.is_alphanumeric() || c == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            let (word, later) = rest.split_at(if taken == c.len_utf8() { end } else { 0 });
            out.push_str(word);
            rest = later;
        }
    }
    out
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Comment,
    String,
}

/// The comment, string or character that `text` begins with: its length in bytes and its kind.
fn piece(text: &str) -> Option<(usize, Kind)> {
    if text.starts_with("//") {
        return Some((text.find('\n').unwrap_or(text.len()), Kind::Comment));
    }
    if text.starts_with("/*") {
        return Some((text.find("*/").map_or(text.len(), |end| end + 2), Kind::Comment));
    }
    if text.starts_with('"') || text.starts_with("b\"") || text.starts_with("c\"") {
        return Some((quoted(text, '"'), Kind::String));
    }
    if let Some(hashes) = raw_hashes(text) {
        let end = format!("\"{}", "#".repeat(hashes));
        let open = text.find('"').map_or(0, |at| at + 1);
        let close = text[open..].find(&end).map_or(text.len(), |at| open + at + end.len());
        return Some((close, Kind::String));
    }
    // 'x' and '\n' are characters, 'a is a lifetime.
    let mut chars = text.strip_prefix('\'')?.chars();
    let (first, second) = (chars.next()?, chars.next()?);
    (first == '\\' || second == '\'').then(|| (quoted(text, '\''), Kind::String))
}

fn raw_hashes(text: &str) -> Option<usize> {
    let after = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].starts_with('"').then_some(hashes)
}

/// The length of a literal between two `quote`s, escapes minded.
fn quoted(text: &str, quote: char) -> usize {
    let open = text.find(quote).map_or(0, |at| at + 1);
    let mut is_escaped = false;
    for (at, c) in text[open..].char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            c if c == quote => return open + at + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

#[test]
fn comments_and_strings_are_told_from_code() {
    let table = [
        ("a // b\nc", "a     \nc", "a     \nc"),
        ("a /* b\n c */ d", "a     \n      d", "a     \n      d"),
        ("f(\"x // \\\" y\") // z", "f(           )     ", "f(\"x // \\\" y\")     "),
        ("r#\"a\"b\"# c", "         c", "r#\"a\"b\"# c"),
        ("for<'a> '\"' 'b'", "for<'a>        ", "for<'a> '\"' 'b'"),
        ("bar\"x\"", "bar   ", "bar\"x\""),
    ];
    for (text, code, with_strings) in table {
        assert_eq!(strip(text, Keep::Code), code, "{text}");
        assert_eq!(strip(text, Keep::CodeAndStrings), with_strings, "{text}");
    }
}
