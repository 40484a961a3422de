//! [`Parent`]: the span that a request belongs to, as W3C's trace context says it.

use http::HeaderMap;

use crate::limits;

/// A span of whoever asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// The trace, 32 digits of hex.
    pub trace: String,
    /// The span in it, 16 digits.
    pub span: String,
    /// Whether it is kept where it comes from; then ours are, too.
    pub is_sampled: bool,
    /// What its systems say to each other, passed on as it is.
    pub state: Option<String>,
}

impl Parent {
    /// What the headers of a request say. `None` where they say nothing, or what cannot be meant:
    /// then a trace of our own begins.
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        let mut all = headers.get_all("traceparent").iter();
        let text = all.next()?.to_str().ok()?.trim();
        if all.next().is_some() {
            return None;
        }
        let mut fields = text.split('-');
        let mut field = |n_digits: usize| {
            let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            let text = fields.next()?;
            (text.len() == n_digits && text.bytes().all(is_digit)).then_some(text)
        };
        let (version, trace, span, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
        // Later versions may say more behind it.
        let has_more = fields.next().is_some();
        let is_nothing = |text: &str| text.bytes().all(|byte| byte == b'0');
        if version == "ff" || version == "00" && has_more || is_nothing(trace) || is_nothing(span) {
            return None;
        }
        let flags = u8::from_str_radix(flags, 16).ok()?;
        let state: Vec<&str> =
            headers.get_all("tracestate").iter().filter_map(|value| value.to_str().ok()).collect();
        let state = Some(state.join(","))
            .filter(|state| !state.is_empty() && state.len() <= limits::TRACE_STATE_BYTES);
        Some(Self { trace: trace.into(), span: span.into(), is_sampled: flags & 1 == 1, state })
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    fn read(lines: &[(&'static str, &str)]) -> Option<Parent> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_str(value).expect("a value"));
        }
        Parent::read(&headers)
    }

    #[test]
    fn a_parent_is_read_with_its_flag_and_state() {
        let text = format!("00-{TRACE}-{SPAN}-01");
        let lines = [("traceparent", &text[..]), ("tracestate", "a=1"), ("tracestate", "b=2")];
        let parent = read(&lines).expect("a parent");
        assert_eq!((&parent.trace[..], &parent.span[..]), (TRACE, SPAN));
        assert!(parent.is_sampled);
        assert_eq!(parent.state.as_deref(), Some("a=1,b=2"));
        let parent = read(&[("traceparent", &format!("00-{TRACE}-{SPAN}-00"))]).expect("one");
        assert!(!parent.is_sampled && parent.state.is_none());
        // A version that is not known yet may say more.
        assert!(read(&[("traceparent", &format!("cc-{TRACE}-{SPAN}-01-what"))]).is_some());
        let long = "x".repeat(limits::TRACE_STATE_BYTES + 1);
        let state = |text: &str| {
            let parent = format!("00-{TRACE}-{SPAN}-01");
            read(&[("traceparent", &parent), ("tracestate", text)]).expect("a parent").state
        };
        assert_eq!((state(&long), state(&long[1..]).is_some()), (None, true));
    }

    #[test]
    fn what_cannot_be_meant_is_none() {
        let zeros = "0".repeat(32);
        for text in [
            String::new(),
            "00".to_owned(),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("00-{zeros}-{SPAN}-01"),
            format!("00-{TRACE}-{}-01", &zeros[..16]),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("0-{TRACE}-{SPAN}-01"),
        ] {
            assert_eq!(read(&[("traceparent", &text)]), None, "{text}");
        }
        let text = format!("00-{TRACE}-{SPAN}-01");
        assert_eq!(read(&[("traceparent", &text), ("traceparent", &text)]), None);
    }
}
