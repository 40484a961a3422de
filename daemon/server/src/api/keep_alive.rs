//! How long a model stays loaded, as clients write it: seconds as a number, or a Go duration
//! (`5m`, `1h30m`, `-1s`) as text; negative is for ever.

use std::time::Duration;

use serde_json::Value;
use v4_proto::Fault;
use v4_supervisor::KeepAlive;

/// Longer times mean for ever: a hundred years.
const FOREVER_S: f64 = 3_155_760_000.0;

/// A `keep_alive` field; `null` and an empty text say nothing.
///
/// # Errors
/// An `invalid` fault when it is neither a number nor a duration.
pub fn parse(value: &Value) -> Result<Option<KeepAlive>, Fault> {
    let seconds = match value {
        Value::Null => return Ok(None),
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::Number(number) => number.as_f64(),
        Value::String(text) => seconds(text.trim()),
        _ => None,
    };
    let seconds = seconds.ok_or_else(|| {
        Fault::invalid(
            "keep_alive must be a number of seconds or a duration such as \"5m\" or \"1h30m\"; \
             a negative one keeps the model loaded for ever",
        )
    })?;
    Ok(Some(if (0.0..=FOREVER_S).contains(&seconds) {
        KeepAlive::For(Duration::from_secs_f64(seconds))
    } else {
        KeepAlive::Forever
    }))
}

/// The same as text, for a variable or a switch: a bare number is seconds.
pub fn parse_text(text: &str) -> Result<Option<KeepAlive>, Fault> {
    parse(&text.trim().parse::<f64>().map_or_else(|_| Value::from(text), Value::from))
}

/// The seconds of a Go duration: a sign, then numbers each with its unit.
fn seconds(text: &str) -> Option<f64> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0.0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(end);
        let (unit, tail) = tail
            .split_at(tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len()));
        let factor = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * factor;
        rest = tail;
    }
    Some(sign * total)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_and_durations_mean_seconds() {
        for (value, seconds) in [
            (json!(0), 0.0),
            (json!("0"), 0.0),
            (json!(2.5), 2.5),
            (json!("5m"), 300.0),
            (json!("1h30m"), 5400.0),
            (json!("1.5h"), 5400.0),
            (json!("250ms"), 0.25),
            (json!("+10s"), 10.0),
        ] {
            let expected = KeepAlive::For(Duration::from_secs_f64(seconds));
            assert_eq!(parse(&value), Ok(Some(expected)), "{value}");
        }
        for forever in [json!(-1), json!("-1s"), json!("-1m"), json!(1e20), json!("9999999h")] {
            assert_eq!(parse(&forever), Ok(Some(KeepAlive::Forever)), "{forever}");
        }
        assert_eq!(parse(&json!(null)), Ok(None));
        assert_eq!(parse(&json!("")), Ok(None));
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for bad in [json!("5"), json!("m"), json!("5 m"), json!("1..2s"), json!("-"), json!("x")] {
            parse(&bad).expect_err("refused");
        }
        for bad in [json!(true), json!([]), json!({}), json!("5mm"), json!("1hm")] {
            parse(&bad).expect_err("refused");
        }
        assert_eq!(parse_text("90"), Ok(Some(KeepAlive::For(Duration::from_secs(90)))));
    }
}
