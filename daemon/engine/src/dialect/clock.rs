//! Dates for templates that tell the model what day it is, in UTC.

use std::time::Duration;

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Year, month and day (both from 1) of a day since 1970, in the Gregorian calendar. Years are
/// counted from March, so that the leap day comes last; 400 of them have 146,097 days.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day_of_month)
}

/// `strftime` for the directives that templates use, of a time since 1970.
pub fn format(format: &str, now: Duration) -> Result<String, Error> {
    let seconds = now.as_secs();
    let (year, month, day) = civil(seconds / 86_400);
    let month_name = MONTHS[usize::try_from(month - 1).unwrap_or(0) % 12];
    let weekday = WEEKDAYS[usize::try_from(seconds / 86_400 % 7).unwrap_or(0)];
    let hour = seconds / 3600 % 24;
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let pad = directive != Some('-');
        if !pad {
            directive = chars.next();
        }
        let two = |n: u64| if pad { format!("{n:02}") } else { n.to_string() };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(seconds / 60 % 60),
            Some('S') => two(seconds % 60),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => {
                format!("{hour:02}:{:02}:{:02}", seconds / 60 % 60, seconds % 60)
            }
            Some('%') => "%".to_owned(),
            other => {
                let name = other.map(String::from).unwrap_or_default();
                let message = format!("the date directive %{name} is not known");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        let table = [
            (0, "1970-01-01 Thursday 12:00 AM"),
            (951_782_400, "2000-02-29 Tuesday 12:00 AM"),
            (951_868_799, "2000-02-29 Tuesday 11:59 PM"),
            (951_868_800, "2000-03-01 Wednesday 12:00 AM"),
            (1_768_478_400, "2026-01-15 Thursday 12:00 PM"),
            (4_107_542_400, "2100-03-01 Monday 12:00 AM"),
        ];
        for (seconds, text) in table {
            let got = format("%Y-%m-%d %A %I:%M %p", Duration::from_secs(seconds));
            assert_eq!(got.expect("known directives"), text);
        }
        let day = Duration::from_secs(1_768_478_405);
        assert_eq!(format("%-d %b %y, %T%%", day).expect("known"), "15 Jan 26, 12:00:05%");
        assert!(format("%Q", day).is_err());
        assert!(format("%", day).is_err());
    }
}
