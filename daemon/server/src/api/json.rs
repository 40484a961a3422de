//! JSON of strangers: bounded before it is taken into memory, then parsed.

use serde::de::DeserializeOwned;
use v4_proto::Fault;

use crate::limits;

/// `bytes` as a `T`. Fields that `T` does not know are skipped without a copy.
///
/// # Errors
/// An `invalid` fault with the place when the text is empty, too deep, too rich, no JSON, or of
/// the wrong shape.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(Fault::invalid("missing request body"));
    }
    check(bytes)?;
    serde_json::from_slice(bytes)
        .map_err(|error| Fault::invalid(format!("the request body is not valid: {error}")))
}

/// Counts depth and values without parsing: a value beyond the first follows a comma, or opens an
/// array or object.
fn check(bytes: &[u8]) -> Result<(), Fault> {
    let (mut depth, mut values, mut in_string, mut escaped) = (0_usize, 1_usize, false, false);
    for &byte in bytes {
        if in_string {
            (in_string, escaped) = match (escaped, byte) {
                (false, b'\\') => (true, true),
                (false, b'"') => (false, false),
                _ => (true, false),
            };
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                values += 1;
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' => values += 1,
            _ => {}
        }
        if depth > limits::JSON_DEPTH {
            return Err(Fault::invalid(format!(
                "the request body nests deeper than {} levels",
                limits::JSON_DEPTH
            )));
        }
        if values > limits::JSON_VALUES {
            return Err(Fault::invalid(format!(
                "the request body holds more than {} values",
                limits::JSON_VALUES
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use v4_proto::Code;

    use super::*;

    fn refuses(text: &str, words: &str) {
        let fault = parse::<Value>(text.as_bytes()).expect_err("refused");
        assert_eq!(fault.code, Code::Invalid);
        assert!(fault.message.contains(words), "{}", fault.message);
    }

    #[test]
    fn empty_deep_rich_and_broken_texts_are_refused() {
        refuses("", "missing request body");
        refuses(" \r\n", "missing request body");
        refuses("{", "EOF");
        refuses("nonsense", "line 1");
        refuses(&"[".repeat(1_000_000), "nests deeper");
        refuses(&format!("[{}0]", "0,".repeat(limits::JSON_VALUES)), "more than");
        refuses("{\"a\":\"\u{1}\"}", "control character");
        refuses("{\"a\":1} trailing", "trailing");
        parse::<Value>(b"{\"a\":\"\xff\"}").expect_err("not UTF-8");
    }

    #[test]
    fn the_edge_is_inside() {
        let at = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        parse::<Value>(at(limits::JSON_DEPTH).as_bytes()).expect("the deepest there may be");
        refuses(&at(limits::JSON_DEPTH + 1), "nests deeper");
    }

    #[test]
    fn what_stands_in_strings_does_not_count() {
        let text = format!("{{\"a\":\"{}\\\"{}\"}}", "[".repeat(500), "{,\\\\".repeat(500));
        parse::<Value>(text.as_bytes()).expect("a flat object");
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let seed =
            br#"{"model":"m","messages":[{"role":"user","content":"a\"b"}],"x":[1,2.5,null]}"#;
        for _ in 0..5_000 {
            let mut text = seed.to_vec();
            for _ in 0..3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = usize::try_from(state >> 33).expect("31 bits") % text.len();
                text[at] = (state >> 24).to_le_bytes()[0];
            }
            drop(parse::<Value>(&text));
        }
    }
}
