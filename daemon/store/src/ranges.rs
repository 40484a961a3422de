//! [`Ranges`]: which bytes of a file are here.

use std::{collections::BTreeMap, ops::Range};

/// Ranges of bytes that do not touch each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds a range, joining it with those it touches.
    pub fn add(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        while let Some((&from, &to)) = self.0.range(..=end).next_back() {
            if to < start {
                break;
            }
            start = start.min(from);
            end = end.max(to);
            self.0.remove(&from);
        }
        self.0.insert(start, end);
    }

    /// Takes a range away.
    pub fn remove(&mut self, range: Range<u64>) {
        let Range { start, end } = range;
        if start >= end {
            return;
        }
        let touched: Vec<(u64, u64)> = self
            .0
            .range(..end)
            .rev()
            .take_while(|(_, to)| **to > start)
            .map(|(&from, &to)| (from, to))
            .collect();
        for (from, to) in touched {
            self.0.remove(&from);
            self.add(from..start.min(to));
            self.add(end.max(from)..to);
        }
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(&start, &end)| start..end)
    }

    /// Whether a byte of a range is here.
    pub fn has_any(&self, range: Range<u64>) -> bool {
        self.0.range(..range.end).next_back().is_some_and(|(_, end)| *end > range.start)
            && range.start < range.end
    }

    /// How far the bytes reach without a gap from `at`; `at` itself where that byte is not here.
    pub fn reach(&self, at: u64) -> u64 {
        let before = self.0.range(..=at).next_back();
        before.map_or(at, |(_, &end)| end.max(at))
    }

    /// Where the next range behind `at` begins, if there is one.
    pub fn next_start(&self, at: u64) -> Option<u64> {
        self.0.range(at..).next().map(|(&start, _)| start)
    }

    /// What is missing of `within`, in order.
    pub fn gaps(&self, within: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = self.reach(within.start);
        while at < within.end {
            let end = self.next_start(at).unwrap_or(u64::MAX).min(within.end);
            gaps.push(at..end);
            at = self.reach(end);
        }
        gaps
    }

    /// Bytes in all ranges.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    /// The end of the last range; 0 where there is none.
    pub fn end(&self) -> u64 {
        self.0.last_key_value().map_or(0, |(_, &end)| end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_where_they_touch_and_know_their_gaps() {
        let mut ranges = Ranges::default();
        for range in [10..20, 30..40, 20..25, 38..50, 60..60, 5..8] {
            ranges.add(range);
        }
        assert_eq!(ranges.0, BTreeMap::from([(5, 8), (10, 25), (30, 50)]));
        assert_eq!((ranges.total(), ranges.end()), (38, 50));
        assert_eq!([0, 5, 8, 12, 25, 49].map(|at| ranges.reach(at)), [0, 8, 8, 25, 25, 50]);
        assert_eq!(ranges.gaps(0..60), [0..5, 8..10, 25..30, 50..60]);
        assert_eq!(ranges.gaps(12..28).first(), Some(&(25..28)));
        assert_eq!(ranges.gaps(12..20), []);
        ranges.add(0..60);
        assert_eq!(ranges.0, BTreeMap::from([(0, 60)]));
        assert!(!ranges.has_any(60..70) && ranges.has_any(59..60) && !ranges.has_any(5..5));
        ranges.remove(10..20);
        ranges.remove(15..30);
        ranges.remove(59..70);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [0..10, 30..59]);
        ranges.remove(0..60);
        assert_eq!(ranges, Ranges::default());
    }

    /// Against a plain list of bytes.
    #[test]
    fn random_ranges_are_what_a_list_of_bytes_says() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for _ in 0..200 {
            let (mut ranges, mut bytes) = (Ranges::default(), [false; 64]);
            for _ in 0..12 {
                let start = random(64);
                let end = (start + random(12)).min(64);
                ranges.add(start..end);
                for at in start..end {
                    bytes[usize::try_from(at).unwrap()] = true;
                }
                let start = random(64);
                let end = (start + random(5)).min(64);
                ranges.remove(start..end);
                for at in start..end {
                    bytes[usize::try_from(at).unwrap()] = false;
                }
            }
            let count = bytes.iter().filter(|here| **here).count() as u64;
            assert_eq!(ranges.total(), count);
            let missing: Vec<u64> = ranges.gaps(0..64).into_iter().flatten().collect();
            let expected: Vec<u64> =
                (0..64).filter(|at| !bytes[usize::try_from(*at).unwrap()]).collect();
            assert_eq!(missing, expected);
        }
    }
}
