//! Figures as people read them.

use std::time::Duration;

use jiff::Timestamp;

/// Bytes in decimal units: whole from 10 on, else with one decimal where there is one.
pub fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] =
        [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1000)];
    let Some((unit, one)) = UNITS.into_iter().find(|(_, one)| bytes >= *one) else {
        return format!("{bytes} B");
    };
    let (whole, tenths) = (bytes / one, bytes % one / (one / 10));
    if whole >= 10 || tenths == 0 {
        format!("{whole} {unit}")
    } else {
        format!("{whole}.{tenths} {unit}")
    }
}

/// A span in one unit, roughly.
pub fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    match () {
        () if seconds < 1 => "Less than a second".to_owned(),
        () if seconds == 1 => "1 second".to_owned(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".to_owned(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".to_owned(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 14 => format!("{} days", hours / 24),
        () if hours < 24 * 60 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 730 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", hours / 24 / 365),
    }
}

/// Beyond this a date only says that there is no end.
const FOREVER: Duration = Duration::from_hours(100 * 365 * 24);

/// An RFC 3339 time as seen from `now`: `3 days ago`, `4 minutes from now`, `Forever`.
pub fn when(time: &str, now: Timestamp) -> String {
    let Ok(time) = time.parse::<Timestamp>() else {
        return "Unknown".to_owned();
    };
    let distance = now.duration_since(time);
    match (distance.is_negative(), distance.unsigned_abs()) {
        (true, ahead) if ahead > FOREVER => "Forever".to_owned(),
        (true, ahead) => format!("{} from now", span(ahead)),
        (false, ago) if ago > FOREVER => "Never".to_owned(),
        (false, ago) => format!("{} ago", span(ago)),
    }
}

/// A time of `nanoseconds` as exactly as a person cares: `1.234s`, `56.789ms`, `12.3µs`.
pub fn exact(nanoseconds: u64) -> String {
    let ns = nanoseconds as f64;
    match nanoseconds {
        0..1_000 => format!("{nanoseconds}ns"),
        1_000..1_000_000 => format!("{:.3}µs", ns / 1e3),
        1_000_000..1_000_000_000 => format!("{:.3}ms", ns / 1e6),
        _ => format!("{:.3}s", ns / 1e9),
    }
}

/// Rows under a header: left aligned, four spaces between columns, no borders.
pub fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = header.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: [&str; N]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        text.push_str(padded.collect::<Vec<_>>().join("    ").trim_end());
        text.push('\n');
    };
    line(header);
    for row in rows {
        line(row.each_ref().map(String::as_str));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_cut_not_rounded() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1 KB"),
            (4_700_000_000, "4.7 GB"),
            (4_000_000_001, "4 GB"),
            (9_999_999_999, "9.9 GB"),
            (47_900_000_000, "47 GB"),
            (98_362_432, "98 MB"),
            (u64::MAX, "18446744 TB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn times_are_told_from_now() {
        let now: Timestamp = "2026-11-23T12:00:00Z".parse().expect("a time");
        let cases = [
            ("2026-11-23T11:59:59.5Z", "Less than a second ago"),
            ("2026-11-23T11:59:59Z", "1 second ago"),
            ("2026-11-23T12:58:50+01:00", "About a minute ago"),
            ("2026-11-23T12:04:10Z", "4 minutes from now"),
            ("2026-11-23T11:00:00Z", "About an hour ago"),
            ("2026-11-20T12:00:00Z", "3 days ago"),
            ("2026-10-20T12:00:00Z", "4 weeks ago"),
            ("2026-05-20T12:00:00Z", "6 months ago"),
            ("2021-05-20T12:00:00Z", "5 years ago"),
            ("2318-05-20T12:00:00Z", "Forever"),
            ("0001-01-01T00:00:00Z", "Never"),
            ("yesterday", "Unknown"),
        ];
        for (time, text) in cases {
            assert_eq!(when(time, now), text, "{time}");
        }
    }

    #[test]
    fn tables_line_up_by_characters() {
        let rows = [["ä".to_owned(), "1 GB".to_owned()], ["longer".to_owned(), String::new()]];
        let expected = "NAME      SIZE\nä         1 GB\nlonger\n";
        assert_eq!(table(["NAME", "SIZE"], &rows), expected);
    }

    #[test]
    fn exact_times_change_their_unit() {
        let cases = [(7, "7ns"), (12_300, "12.300µs"), (56_789_000, "56.789ms")];
        for (ns, text) in cases {
            assert_eq!(exact(ns), text);
        }
        assert_eq!(exact(1_234_000_000), "1.234s");
    }
}
