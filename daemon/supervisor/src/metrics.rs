//! What is counted for `/metrics`. Counters are raised where events pass anyway, without a lock; a
//! reader holds up nobody.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use v4_proto::{Event, Finish, ModelName, Usage, frame::Stats};

use crate::{limits, policy::Reason};

/// What models beyond [`limits::COUNTED_MODELS`] are counted under together.
pub const OTHER: &str = "other";

/// Upper bounds of a [`Histogram`]'s buckets, in milliseconds: from a decode step of a small model
/// to the longest wait for a place.
const BOUNDS_MS: [u64; 17] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000,
    300_000,
];

/// A figure that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// What it says now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, n: impl Into<u64>) {
        self.0.fetch_add(n.into(), Ordering::Relaxed);
    }
}

/// How long something took, how often.
#[derive(Debug, Default)]
pub struct Histogram {
    /// One a bound, and one for what is beyond the last.
    buckets: [AtomicU64; BOUNDS_MS.len() + 1],
    sum_ns: AtomicU64,
}

/// A histogram as it was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribution {
    /// Upper bounds in seconds, each with how often it was not exceeded.
    pub within: Vec<(f64, u64)>,
    /// How often in all.
    pub count: u64,
    /// Seconds in all.
    pub sum_s: f64,
}

impl Histogram {
    pub(crate) fn observe(&self, time: Duration) {
        let fits = |bound: &u64| time <= Duration::from_millis(*bound);
        let bucket = BOUNDS_MS.iter().position(fits).unwrap_or(BOUNDS_MS.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// What it says now. The count is that of the buckets, whatever is observed meanwhile.
    pub fn read(&self) -> Distribution {
        let mut count = 0;
        let mut within = Vec::with_capacity(BOUNDS_MS.len());
        for (bucket, bound) in self.buckets.iter().zip(BOUNDS_MS) {
            count += bucket.load(Ordering::Relaxed);
            within.push((Duration::from_millis(bound).as_secs_f64(), count));
        }
        count += self.buckets[BOUNDS_MS.len()].load(Ordering::Relaxed);
        let sum_s = Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed)).as_secs_f64();
        Distribution { within, count, sum_s }
    }
}

/// What is counted of one model since the daemon's start.
#[derive(Debug, Default)]
pub struct Series {
    /// Loads that ended well.
    pub loads: Counter,
    /// Loads that the runner refused.
    pub load_failures: Counter,
    /// From the order to load to a runner that is ready.
    pub load_time: Histogram,
    /// Runners that crashed, hung or broke the protocol.
    pub deaths: Counter,
    /// Runners that were told to leave, in the order of [`Reason::WORDS`].
    unloads: [Counter; Reason::WORDS.len()],
    /// Tokens of prompts, cached ones counted in.
    pub prompt_tokens: Counter,
    /// Of these, tokens from the prefix cache.
    pub cached_tokens: Counter,
    /// Tokens of answers.
    pub generation_tokens: Counter,
    /// Answers that the model or a stop string ended.
    pub stopped: Counter,
    /// Answers that ended at a bound on their length.
    pub cut: Counter,
    /// Requests whose client left.
    pub aborted: Counter,
    /// Requests that ended with a fault.
    pub failed: Counter,
    /// From the request to the first piece of its answer.
    pub first_token: Histogram,
    /// From one piece of an answer to the next.
    pub inter_token: Histogram,
    /// Steps of the engine.
    pub steps: Counter,
    /// Tokens that were guessed.
    pub drafted: Counter,
    /// Of these, those that the model chose too.
    pub accepted: Counter,
    /// Blocks of keys and values given to the disk.
    pub blocks_saved: Counter,
    /// Blocks that came back from there.
    pub blocks_restored: Counter,
}

impl Series {
    /// Runners that were told to leave, by the word for why.
    pub fn unloads(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Reason::WORDS.into_iter().zip(self.unloads.iter().map(Counter::get))
    }

    pub(crate) fn unload(&self, reason: &Reason) {
        let at = Reason::WORDS.iter().position(|word| *word == reason.word());
        if let Some(counter) = at.and_then(|at| self.unloads.get(at)) {
            counter.add(1_u64);
        }
    }

    fn usage(&self, usage: &Usage) {
        self.prompt_tokens.add(usage.prompt_tokens);
        self.cached_tokens.add(usage.cached_tokens);
        self.generation_tokens.add(usage.completion_tokens);
    }

    /// Counts what a runner did between two heartbeats: its figures begin at zero with it.
    pub(crate) fn beat(&self, before: &Stats, now: &Stats) {
        let more = |counter: &Counter, of: fn(&Stats) -> u64| {
            counter.add(of(now).saturating_sub(of(before)));
        };
        more(&self.steps, |stats| stats.steps);
        more(&self.drafted, |stats| stats.drafted);
        more(&self.accepted, |stats| stats.accepted);
        more(&self.blocks_saved, |stats| stats.blocks_saved);
        more(&self.blocks_restored, |stats| stats.blocks_restored);
    }
}

/// What one runner said last of its memory for keys and values.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    used: AtomicU32,
    total: AtomicU32,
}

impl Blocks {
    pub fn set(&self, stats: &Stats) {
        self.used.store(stats.blocks_used, Ordering::Relaxed);
        self.total.store(stats.blocks_total, Ordering::Relaxed);
    }

    /// Used, and all there are.
    pub fn get(&self) -> (u64, u64) {
        let read = |of: &AtomicU32| u64::from(of.load(Ordering::Relaxed));
        (read(&self.used), read(&self.total))
    }
}

/// Counts one request. Travels with it.
#[derive(Debug, Clone)]
pub(crate) struct Meter {
    series: Arc<Series>,
    asked: Instant,
    /// When the last piece came.
    last: Option<Instant>,
}

impl Meter {
    /// Of a request that comes now.
    pub fn new(series: Arc<Series>) -> Self {
        Self { series, asked: Instant::now(), last: None }
    }

    /// A piece of the answer is here.
    pub fn piece(&mut self, now: Instant) {
        match self.last.replace(now) {
            None => self.series.first_token.observe(now.saturating_duration_since(self.asked)),
            Some(last) => self.series.inter_token.observe(now.saturating_duration_since(last)),
        }
    }

    /// The runner has ended the answer.
    pub fn end(&self, event: &Event) {
        match event {
            Event::Done(done) => {
                self.series.usage(&done.usage);
                match done.finish {
                    Finish::Stop | Finish::ToolCalls => self.series.stopped.add(1_u64),
                    Finish::Length => self.series.cut.add(1_u64),
                    Finish::Cancelled => self.left(),
                }
            }
            Event::Failed(_) => self.failed(),
            Event::Delta(_) => {}
        }
    }

    /// The client has left.
    pub fn left(&self) {
        self.series.aborted.add(1_u64);
    }

    /// The request has ended with a fault.
    pub fn failed(&self) {
        self.series.failed.add(1_u64);
    }
}

/// What a model has at this moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Now {
    /// Requests that a runner has.
    pub running: u64,
    /// Requests that wait for a place or for the model to be loaded.
    pub waiting: u64,
    /// Bytes of memory that its runners take.
    pub bytes: u64,
    /// Blocks of keys and values in use, as its runners said last.
    pub blocks_used: u64,
    /// Blocks there are.
    pub blocks_total: u64,
}

/// The figures of one model.
#[derive(Debug, Clone)]
pub struct ModelFigures {
    /// Its name, or [`OTHER`].
    pub name: String,
    /// What it has now.
    pub now: Now,
    /// What was counted.
    pub series: Arc<Series>,
}

/// All figures.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Bytes that all models may take.
    pub budget_bytes: u64,
    /// Bytes that are taken or promised.
    pub used_bytes: u64,
    /// By name; a model is here from its first request on.
    pub models: Vec<ModelFigures>,
}

/// The series of all models. The lock is taken once a request, never for a token.
#[derive(Debug, Default)]
pub(crate) struct Register(Mutex<BTreeMap<String, Arc<Series>>>);

impl Register {
    /// The series of a model, and what it is called: a daemon that is asked for more names than it
    /// counts puts the rest together.
    pub fn find(&self, name: &ModelName) -> (String, Arc<Series>) {
        let mut series = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // As the policy has it, names differ in more than the case of their letters.
        let mut label = name.to_string().to_ascii_lowercase();
        if !series.contains_key(&label) && series.len() >= limits::COUNTED_MODELS {
            OTHER.clone_into(&mut label);
        }
        let found = Arc::clone(series.entry(label.clone()).or_default());
        (label, found)
    }

    /// All of them, with what is so now.
    pub fn figures(&self, now: impl Iterator<Item = (ModelName, Now)>) -> Vec<ModelFigures> {
        let mut sums: BTreeMap<String, Now> = BTreeMap::new();
        for (name, more) in now {
            let sum = sums.entry(self.find(&name).0).or_default();
            sum.running += more.running;
            sum.waiting += more.waiting;
            sum.bytes = sum.bytes.saturating_add(more.bytes);
            sum.blocks_used += more.blocks_used;
            sum.blocks_total += more.blocks_total;
        }
        let series = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let figures = series.iter().map(|(name, series)| ModelFigures {
            name: name.clone(),
            now: sums.get(name).copied().unwrap_or_default(),
            series: Arc::clone(series),
        });
        figures.collect()
    }
}

#[cfg(test)]
mod tests {
    use v4_proto::{Code, Done, Fault};

    use super::*;

    #[test]
    fn a_histogram_is_cumulative_and_ends_with_all() {
        let histogram = Histogram::default();
        let ms = Duration::from_millis;
        // At a bound, just above it, and beyond the last.
        for time in [Duration::ZERO, ms(1), ms(1) + Duration::from_nanos(1), ms(300_001)] {
            histogram.observe(time);
        }
        let read = histogram.read();
        assert_eq!(read.within[..3], [(0.001, 2), (0.002, 3), (0.005, 3)]);
        assert_eq!(read.within.last(), Some(&(300.0, 3)));
        assert_eq!(read.count, 4);
        assert!((read.sum_s - 300.003).abs() < 1e-6, "{}", read.sum_s);
        assert!(BOUNDS_MS.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn a_meter_tells_the_first_piece_from_the_others_and_counts_the_end_once() {
        let series = Arc::new(Series::default());
        let mut meter = Meter::new(Arc::clone(&series));
        let at = |ms| meter.asked + Duration::from_millis(ms);
        for time in [at(30), at(34), at(39)] {
            meter.piece(time);
        }
        let first = series.first_token.read();
        assert_eq!((first.count, first.within[3], first.within[4]), (1, (0.01, 0), (0.02, 0)));
        assert!((first.sum_s - 0.03).abs() < 1e-9);
        assert_eq!(series.inter_token.read().within[2], (0.005, 2));
        let usage =
            Usage { prompt_tokens: 9, cached_tokens: 4, completion_tokens: 3, ..Usage::default() };
        for finish in [Finish::Stop, Finish::ToolCalls, Finish::Length, Finish::Cancelled] {
            meter.end(&Event::Done(Done { finish, usage }));
        }
        meter.end(&Event::Failed(Fault::new(Code::Internal, "x")));
        let counts = [&series.stopped, &series.cut, &series.aborted, &series.failed];
        assert_eq!(counts.map(Counter::get), [2, 1, 1, 1]);
        let tokens = [&series.prompt_tokens, &series.cached_tokens, &series.generation_tokens];
        assert_eq!(tokens.map(Counter::get), [36, 16, 12]);
    }

    #[test]
    fn a_new_runner_begins_at_zero_and_takes_nothing_back() {
        let series = Series::default();
        let stats = |drafted| Stats { drafted, ..Stats::default() };
        series.beat(&stats(0), &stats(5));
        series.beat(&stats(5), &stats(7));
        series.beat(&stats(7), &stats(0));
        series.beat(&stats(0), &stats(1));
        assert_eq!(series.drafted.get(), 8);
    }

    #[test]
    fn names_beyond_the_limit_are_counted_together() {
        let register = Register::default();
        let name = |n: usize| -> ModelName { format!("m{n}").parse().expect("a name") };
        for n in 0..limits::COUNTED_MODELS {
            assert_eq!(register.find(&name(n)).0, format!("m{n}:latest"));
        }
        let (label, series) = register.find(&name(limits::COUNTED_MODELS));
        series.loads.add(1_u64);
        assert_eq!(label, OTHER);
        assert_eq!(register.find(&name(limits::COUNTED_MODELS + 1)).1.loads.get(), 1);
        assert_eq!(register.find(&"M0".parse().expect("a name")).0, "m0:latest");
        let now = Now { running: 1, waiting: 2, bytes: 3, blocks_used: 4, blocks_total: 5 };
        let many = [name(0), name(limits::COUNTED_MODELS), name(limits::COUNTED_MODELS + 7)];
        let figures = register.figures(many.into_iter().map(|name| (name, now)));
        assert_eq!(figures.len(), limits::COUNTED_MODELS + 1);
        let other = figures.iter().find(|model| model.name == OTHER).expect("it is there");
        assert_eq!((other.now.running, other.now.blocks_total), (2, 10));
    }
}
