//! What is remembered of how a model is used: how long its loads take, how soon it is asked for
//! again, and how often. It outlives the model's time in memory, for it decides who gets that next.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use super::{Key, Time};
use crate::limits;

/// How one model is used.
#[derive(Debug, Clone, PartialEq)]
pub struct Habit {
    /// A running mean of the time a load takes; `None` before the first.
    load: Option<Duration>,
    /// Between the end of its last answer and the next ask, the newest last; zero where it was
    /// busy then.
    gaps: VecDeque<Duration>,
    /// When its last answer ended.
    quiet_since: Time,
    /// Asks until `asked_at`, those of long ago counted less.
    asks: f64,
    asked_at: Time,
}

impl Habit {
    /// Of a model that nobody has asked for yet.
    fn new(now: Time) -> Self {
        Self { load: None, gaps: VecDeque::new(), quiet_since: now, asks: 0.0, asked_at: now }
    }

    /// Books an ask, of a model that has others at this moment or not.
    pub fn asked(&mut self, now: Time, is_busy: bool) {
        if self.asks > 0.0 {
            let quiet = now.saturating_sub(self.quiet_since.max(self.asked_at));
            self.gaps.push_back(if is_busy { Duration::ZERO } else { quiet });
            if self.gaps.len() > limits::REMEMBERED_GAPS {
                self.gaps.pop_front();
            }
        }
        self.asks = self.asks(now) + 1.0;
        self.asked_at = now;
    }

    /// Books the end of its last answer.
    pub fn quiet(&mut self, now: Time) {
        self.quiet_since = now;
    }

    /// Books how long a load took. The newest counts half: whether its pages are in memory matters
    /// more than its size.
    pub fn loaded(&mut self, took: Duration) {
        self.load = Some(self.load.map_or(took, |before| (before + took) / 2));
    }

    /// How long it takes to bring `bytes` of it into memory: as measured, else as a disk reads.
    pub fn wake(&self, bytes: u64) -> Duration {
        self.load.unwrap_or_else(|| unmeasured_wake(bytes))
    }

    /// Whether a load of it was measured.
    pub fn is_measured(&self) -> bool {
        self.load.is_some()
    }

    /// How soon it is asked for again once it is quiet, as a rule: the median of the last times.
    pub fn usual_gap(&self) -> Option<Duration> {
        let mut gaps: Vec<Duration> = self.gaps.iter().copied().collect();
        gaps.sort_unstable();
        gaps.get(gaps.len() / 2).copied()
    }

    /// How likely it is asked for within [`limits::FORESIGHT`], by how often it was of late.
    pub fn probability(&self, now: Time) -> f64 {
        // Asks that are counted half after a half-life number rate * half-life / ln 2.
        let half_life = limits::ASKS_HALF_LIFE.as_secs_f64();
        let rate = self.asks(now) * std::f64::consts::LN_2 / half_life;
        1.0 - (-rate * limits::FORESIGHT.as_secs_f64()).exp()
    }

    fn asks(&self, now: Time) -> f64 {
        let age = now.saturating_sub(self.asked_at).as_secs_f64();
        self.asks * (-age / limits::ASKS_HALF_LIFE.as_secs_f64()).exp2()
    }
}

fn unmeasured_wake(bytes: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / limits::WAKE_BYTES_PER_S as f64)
}

/// The habits of all models that were asked for of late.
#[derive(Debug, Clone, Default)]
pub struct Habits(BTreeMap<Key, Habit>);

impl Habits {
    /// The habit of `key`; where there are too many, the one asked for longest ago is forgotten.
    pub fn of(&mut self, key: &Key, now: Time) -> &mut Habit {
        if !self.0.contains_key(key) && self.0.len() >= limits::REMEMBERED_MODELS {
            let oldest = self.0.iter().min_by_key(|(_, habit)| habit.asked_at);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.0.remove(&oldest);
            }
        }
        self.0.entry(key.clone()).or_insert_with(|| Habit::new(now))
    }

    /// What is remembered of `key`.
    pub fn get(&self, key: &str) -> Option<&Habit> {
        self.0.get(key)
    }

    /// How long it takes to bring `bytes` of `key` into memory.
    pub fn wake(&self, key: &str, bytes: u64) -> Duration {
        self.get(key).map_or_else(|| unmeasured_wake(bytes), |habit| habit.wake(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn the_gap_is_the_median_of_the_last_ones_and_one_long_pause_changes_nothing() {
        let mut habit = Habit::new(secs(0));
        let mut now = secs(0);
        habit.asked(now, false);
        assert_eq!(habit.usual_gap(), None);
        for gap in [2, 3, 2, 600, 3] {
            habit.quiet(now);
            now += secs(gap);
            habit.asked(now, false);
        }
        assert_eq!(habit.usual_gap(), Some(secs(3)));
        // Busy when it is asked for: no gap at all.
        for _ in 0..limits::REMEMBERED_GAPS {
            habit.asked(now, true);
        }
        assert_eq!(habit.usual_gap(), Some(secs(0)));
        assert_eq!(habit.gaps.len(), limits::REMEMBERED_GAPS);
    }

    #[test]
    fn what_is_asked_for_often_is_likely_asked_for_again_and_less_so_with_time() {
        let mut often = Habit::new(secs(0));
        let mut once = Habit::new(secs(0));
        once.asked(secs(300), false);
        for n in 0..30 {
            often.asked(secs(n * 10), false);
        }
        let (now, later) = (secs(300), secs(300) + limits::ASKS_HALF_LIFE * 4);
        assert!(often.probability(now) > 0.99, "{}", often.probability(now));
        assert!((0.2..0.5).contains(&once.probability(now)), "{}", once.probability(now));
        assert!(often.probability(later) < often.probability(now) * 0.6);
        assert!(often.probability(later) > once.probability(later));
    }

    #[test]
    fn a_load_is_estimated_until_it_was_measured() {
        let mut habit = Habit::new(secs(0));
        assert_eq!(habit.wake(limits::WAKE_BYTES_PER_S * 3), secs(3));
        habit.loaded(secs(8));
        assert_eq!(habit.wake(1), secs(8));
        habit.loaded(secs(2));
        assert_eq!(habit.wake(1), secs(5));
    }

    #[test]
    fn the_model_asked_for_longest_ago_is_forgotten_first() {
        let mut habits = Habits::default();
        for n in 0..=limits::REMEMBERED_MODELS {
            habits.of(&n.to_string(), secs(n as u64)).asked(secs(n as u64), false);
        }
        assert_eq!(habits.0.len(), limits::REMEMBERED_MODELS);
        assert!(habits.get("0").is_none() && habits.get("1").is_some());
    }
}
