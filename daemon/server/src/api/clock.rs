//! Times as clients read them.

use std::time::{Duration, SystemTime};

use jiff::{Timestamp, tz::TimeZone};

/// What `expires_at` shows for a model that stays for ever: 290 years ahead, as Ollama does.
const FOREVER: Duration = Duration::from_hours(290 * 365 * 24);

/// RFC 3339 in UTC with nanoseconds.
pub fn utc(now: Timestamp) -> String {
    format!("{now:.9}")
}

/// RFC 3339 with the local zone's offset.
pub fn local(time: SystemTime) -> String {
    let time = timestamp(time);
    let offset = TimeZone::system().to_offset(time);
    format!("{:.9}", time.display_with_offset(offset))
}

/// When a model expires; `None` is never.
pub fn expiry(expires: Option<SystemTime>, now: Timestamp) -> String {
    let never = || SystemTime::from(now).checked_add(FOREVER).unwrap_or(SystemTime::UNIX_EPOCH);
    local(expires.unwrap_or_else(never))
}

/// A file's time; one out of range counts as 1970.
pub fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_nine_digits_and_a_zone() {
        let now = Timestamp::new(1_700_000_000, 5_000).expect("in range");
        assert_eq!(utc(now), "2023-11-14T22:13:20.000005000Z");
        let text = local(SystemTime::from(now));
        let again: Timestamp = text.parse().expect("RFC 3339");
        assert_eq!(again, now);
        assert!(text.contains(".000005000"), "{text}");
        assert!(expiry(None, now).starts_with("2313-"), "{}", expiry(None, now));
    }
}
