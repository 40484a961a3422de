//! A large file in several ranges at a time, from one mirror or several together.
//!
//! What is missing is cut into ranges that are handed out in order, so that the hash, which goes in
//! order, follows close behind. Workers take them; how many there are is found out while it goes: a
//! few more as long as that makes it faster, fewer at a mirror that has had enough. Each range is
//! asked of the mirror that was fastest so far, and none of them is left alone, so that it can show
//! what it does. Who finds nothing left takes half of what the slowest still has to do. A range
//! that fails is asked for again from where it was, alone; a mirror that only fails is given up.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::{Either, select, try_join_all};
use reqwest::{Method, StatusCode, header::HeaderValue};
use tokio::sync::watch;
use v4_store::Ranges;

use super::http::{
    ContentRange, Drops, Failure, Link, OTHER_RANGE, Tries, check_status, check_tag, other_size,
    range_headers,
};
use crate::{error::PullError, limits, write::Sink};

/// Whether so much of a file of `size` bytes is missing, or in such a way, that one stream from the
/// first gap to the end is not the best.
pub(crate) fn is_worth_it(gaps: &[Range<u64>], size: u64) -> bool {
    let missing: u64 = gaps.iter().map(|gap| gap.end - gap.start).sum();
    let has_more_behind = gaps.first().is_some_and(|gap| gap.end < size);
    missing >= limits::RANGES_FROM_BYTES || has_more_behind
}

/// Reads what is missing of a file of `size` bytes. `false` when the only mirror knows no ranges.
/// An error is that of the mirror that was given up last.
pub(crate) async fn read(
    mirrors: &[Mirror<'_>],
    size: u64,
    sink: &Sink<'_>,
) -> Result<bool, PullError> {
    let crew = Crew::new(mirrors, size, sink);
    let workers = try_join_all((0..limits::RANGES).map(|i| crew.work(i)));
    let foreman = crew.adapt();
    let (workers, foreman) = (std::pin::pin!(workers), std::pin::pin!(foreman));
    match select(workers, foreman).await {
        Either::Left((Ok(_), _)) => {
            Ok(mirrors.len() > 1 || mirrors[0].knows_ranges() != Some(false))
        }
        Either::Left((Err(error), _)) => Err(error),
        Either::Right((never, _)) => match never {},
    }
}

/// A place that has the file.
pub(crate) struct Mirror<'a> {
    link: &'a Link<'a>,
    state: Mutex<State>,
}

/// What is known of a mirror.
#[derive(Debug)]
struct State {
    tag: Option<HeaderValue>,
    /// Known after the first answer.
    knows_ranges: Option<bool>,
    /// It is not asked any more.
    is_gone: bool,
    /// It could not even be reached.
    is_unreachable: bool,
    /// It wants to know who asks.
    is_refusing: bool,
    /// Workers that ask it, and how many may.
    n_workers: usize,
    max_workers: usize,
    /// It asked to be left alone until then.
    rests_until: Option<Instant>,
    /// Bytes a second that its last ranges came with, each.
    speed: Option<f64>,
    /// Bytes that came.
    n_came: u64,
    /// Which they were.
    brought: Ranges,
}

impl<'a> Mirror<'a> {
    /// Nothing is known of it yet.
    pub fn new(link: &'a Link<'a>) -> Self {
        let state = State {
            tag: None,
            knows_ranges: None,
            is_gone: false,
            is_unreachable: false,
            is_refusing: false,
            n_workers: 0,
            max_workers: limits::RANGES,
            rests_until: None,
            speed: None,
            n_came: 0,
            brought: Ranges::default(),
        };
        Self { link, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn knows_ranges(&self) -> Option<bool> {
        self.state().knows_ranges
    }

    /// The parts of the file that came from here.
    pub fn brought(&self) -> Ranges {
        self.state().brought.clone()
    }

    /// Whether it could not be reached.
    pub fn is_unreachable(&self) -> bool {
        self.state().is_unreachable
    }

    /// Whether it wants a key, or another one.
    pub fn is_refusing(&self) -> bool {
        self.state().is_refusing
    }

    /// How much a worker would like to ask it; `None` where it may not.
    fn rank(&self) -> Option<(bool, f64)> {
        let state = self.state();
        // One finds out whether it knows ranges.
        let max_workers = if state.knows_ranges.is_some() { state.max_workers } else { 1 };
        let rests = state.rests_until.is_some_and(|until| Instant::now() < until);
        if state.is_gone || rests || state.n_workers >= max_workers {
            return None;
        }
        // One that nobody asks shows what it does; of the others the fastest.
        Some((state.n_workers == 0, state.speed.unwrap_or(f64::MAX)))
    }

    /// Notes what a failure says of how much it can bear.
    fn note_failure(&self, failure: &Failure) {
        let mut state = self.state();
        if failure.is_too_much() {
            state.max_workers = state.max_workers.min((state.n_workers / 2).max(1));
        }
        if let Some(after) = failure.after() {
            state.rests_until = Instant::now().checked_add(after.min(limits::BACKOFF_MAX));
        }
    }

    /// Notes how fast a range came.
    fn note_speed(&self, n: u64, took: Duration) {
        let speed = n as f64 / took.as_secs_f64().max(1e-6);
        let mut state = self.state();
        state.speed = Some(state.speed.map_or(speed, |before| f64::midpoint(before, speed)));
    }
}

/// What a worker has to do: `at` grows as bytes come, `end` shrinks when somebody takes a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Share {
    start: u64,
    at: u64,
    end: u64,
    began: Instant,
    /// Which mirror is asked.
    mirror: usize,
}

impl Share {
    fn new(range: Range<u64>, mirror: usize) -> Self {
        let Range { start, end } = range;
        Self { start, at: start, end, began: Instant::now(), mirror }
    }

    /// Bytes that are still to come.
    fn left(&self) -> u64 {
        self.end.saturating_sub(self.at)
    }

    /// How long the rest takes if it goes on as it began; nothing while it is too early to tell.
    fn takes(&self) -> Duration {
        if self.began.elapsed() < limits::HALF_FROM {
            return Duration::ZERO;
        }
        let per_byte = self.began.elapsed().as_secs_f64() / (self.at - self.start).max(1) as f64;
        Duration::try_from_secs_f64(per_byte * self.left() as f64).unwrap_or(Duration::MAX)
    }
}

/// Who does what.
#[derive(Debug, Default)]
struct Plan {
    /// What nobody works at yet, in order.
    gaps: VecDeque<Range<u64>>,
    /// What each worker works at.
    shares: Vec<Option<Share>>,
}

impl Plan {
    /// Something to do for worker `i`: the next range, or half of the one that takes longest.
    fn take(&mut self, i: usize, n_workers: usize, mirror: usize) -> Option<Share> {
        let share = self.next(n_workers, mirror).or_else(|| self.half(mirror))?;
        self.shares[i] = Some(share);
        Some(share)
    }

    /// The next range: a share of what is left for each of them, within bounds. It ends where a
    /// part of a chain does, so that a part that turns out wrong is one mirror's.
    fn next(&mut self, n_workers: usize, mirror: usize) -> Option<Share> {
        let left: u64 = self.gaps.iter().map(|gap| gap.end - gap.start).sum();
        let gap = self.gaps.front_mut()?;
        let len = left / (2 * n_workers.max(1) as u64);
        let len = len.clamp(limits::RANGE_BYTES.0, limits::RANGE_BYTES.1);
        let end = gap.start.saturating_add(len);
        let part = end - end % v4_store::limits::CHUNK_LINK_BYTES;
        let end = if part > gap.start { part } else { end };
        let share = Share::new(gap.start..gap.end.min(end), mirror);
        gap.start = share.end;
        if gap.start == gap.end {
            self.gaps.pop_front();
        }
        Some(share)
    }

    /// Half of what still has to be done by the one that takes longest, if that is worth a request;
    /// all of it where that is little and comes from another mirror.
    fn half(&mut self, mirror: usize) -> Option<Share> {
        let shares = self.shares.iter_mut().flatten();
        let slowest = shares.max_by_key(|share| (share.takes(), share.left()))?;
        if slowest.takes() < limits::HALF_FROM {
            return None;
        }
        let middle = if slowest.left() >= 2 * limits::HALF_BYTES {
            slowest.at + slowest.left() / 2
        } else if slowest.mirror != mirror && slowest.left() > 0 {
            slowest.at
        } else {
            return None;
        };
        let share = Share::new(middle..slowest.end, mirror);
        slowest.end = middle;
        Some(share)
    }

    /// Gives back what a worker has not done.
    fn give_back(&mut self, i: usize) {
        if let Some(share) = self.shares[i].take().filter(|share| share.left() > 0) {
            self.gaps.push_front(share.at..share.end);
        }
    }

    /// Whether everything is here. Who is left with nothing may still wait for its mirror.
    fn is_done(&self) -> bool {
        self.gaps.is_empty() && self.shares.iter().flatten().all(|share| share.left() == 0)
    }
}

/// The workers of one file, and what they share.
struct Crew<'a> {
    mirrors: &'a [Mirror<'a>],
    size: u64,
    sink: &'a Sink<'a>,
    plan: Mutex<Plan>,
    /// How many may work.
    n_workers: watch::Sender<usize>,
    /// Bytes that came in all.
    n_came: AtomicU64,
}

impl<'a> Crew<'a> {
    fn new(mirrors: &'a [Mirror<'a>], size: u64, sink: &'a Sink<'a>) -> Self {
        let plan = Plan { gaps: sink.gaps(size).into(), shares: vec![None; limits::RANGES] };
        // One a mirror finds out whether it knows ranges.
        let n_workers = watch::Sender::new(mirrors.len().min(limits::RANGES));
        Self { mirrors, size, sink, plan: Mutex::new(plan), n_workers, n_came: AtomicU64::new(0) }
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something to do for worker `i`, and whom it asks for that.
    fn take(&self, i: usize, n_workers: usize) -> Option<Share> {
        let mut plan = self.plan();
        let ranks = self.mirrors.iter().map(Mirror::rank).enumerate();
        let ranks = ranks.filter_map(|(mirror, rank)| Some((mirror, rank?)));
        let (mirror, _) = ranks.max_by(|(_, a), (_, b)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)))?;
        let share = plan.take(i, n_workers, mirror)?;
        self.mirrors[mirror].state().n_workers += 1;
        Some(share)
    }

    /// Worker `i`, from its call to the end of the work.
    async fn work(&self, i: usize) -> Result<(), PullError> {
        let mut tries: Vec<Tries<'_>> =
            self.mirrors.iter().map(|mirror| Tries::new(mirror.link.net)).collect();
        let mut came = vec![0; self.mirrors.len()];
        let (mut n_workers, mut end) = (self.n_workers.subscribe(), self.n_workers.subscribe());
        loop {
            // The sender lives as long as the crew.
            let n = n_workers.wait_for(|n| *n == 0 || i < *n).await.map_or(0, |n| *n);
            if n == 0 {
                return Ok(());
            }
            let Some(share) = self.take(i, n) else {
                if self.plan().is_done() {
                    self.n_workers.send_replace(0);
                }
                let done = n_workers.wait_for(|n| *n == 0);
                // Either way it is looked at again.
                drop(tokio::time::timeout(limits::HALF_EVERY, done).await);
                continue;
            };
            let m = share.mirror;
            let mirror = &self.mirrors[m];
            let over = std::pin::pin!(end.wait_for(|n| *n == 0));
            let outcome = match select(std::pin::pin!(self.fetch(i, share)), over).await {
                Either::Left((outcome, _)) => outcome,
                Either::Right(_) => return Ok(()),
            };
            self.plan().give_back(i);
            let now = {
                let mut state = mirror.state();
                state.n_workers -= 1;
                state.n_came
            };
            let Err(failure) = outcome else { continue };
            if self.mirrors.len() == 1 && mirror.knows_ranges() == Some(false) {
                self.n_workers.send_replace(0);
                return Ok(());
            }
            mirror.note_failure(&failure);
            let given_up = tries[m].again(failure, now - came[m]).await.err();
            came[m] = now;
            if let Some(error) = given_up {
                self.give_up(m, error)?;
            }
        }
    }

    /// Asks a mirror no more. The error comes back where it was the last one.
    fn give_up(&self, m: usize, error: PullError) -> Result<(), PullError> {
        // A failure of ours is no mirror's.
        if error.is_ours() {
            return Err(error);
        }
        let mut state = self.mirrors[m].state();
        state.is_gone = true;
        state.is_unreachable = matches!(error, PullError::Unreachable { .. });
        state.is_refusing = error.is_refusal();
        drop(state);
        if self.mirrors.iter().all(|mirror| mirror.state().is_gone) {
            return Err(error);
        }
        tracing::warn!(url = error_url(self.mirrors[m].link), %error, "a mirror is given up");
        Ok(())
    }

    /// Asks for a worker's share and takes it.
    async fn fetch(&self, i: usize, share: Share) -> Result<(), Failure> {
        let Mirror { link, .. } = &self.mirrors[share.mirror];
        let mirror = &self.mirrors[share.mirror];
        let began = Instant::now();
        let tag = mirror.state().tag.clone();
        let headers = range_headers(share.at, Some(share.end), tag.as_ref());
        let response = link.send(Method::GET, headers).await?;
        check_status(link, &response)?;
        check_tag(link, &mut mirror.state().tag, response.headers())?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(self.without_ranges(mirror));
        }
        match ContentRange::parse(response.headers()) {
            Some(ContentRange { size: Some(size), .. }) if size != self.size => {
                return Err(other_size(link, size, self.size).into());
            }
            Some(ContentRange { sent: Some((start, last)), .. })
                if start == share.at && last >= start => {}
            _ => return Err(Failure::Again(link.wrong(OTHER_RANGE), None)),
        }
        self.know_ranges(mirror);
        let mut drops = Drops::of(link, response);
        let mut at = share.at;
        while let Some(mut piece) = drops.next().await? {
            // Somebody may have taken a share of it meanwhile.
            let end = self.plan().shares[i].map_or(at, |share| share.end);
            let wanted = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
            piece.truncate(wanted);
            let n = piece.len() as u64;
            self.sink.write_at(at, piece).await?;
            {
                let mut state = mirror.state();
                state.brought.add(at..at + n);
                state.n_came += n;
            }
            at += n;
            self.n_came.fetch_add(n, Ordering::Relaxed);
            if let Some(share) = &mut self.plan().shares[i] {
                share.at = at;
            }
            if at >= end {
                break;
            }
        }
        mirror.note_speed(at - share.start, began.elapsed());
        let left = self.plan().shares[i].map_or(0, |share| share.left());
        if left == 0 {
            return Ok(());
        }
        Err(Failure::Again(link.wrong(format!("{left} bytes too few of a range")), None))
    }

    /// The first answer was a range: more may work.
    fn know_ranges(&self, mirror: &Mirror<'_>) {
        let is_new = mirror.state().knows_ranges.replace(true).is_none();
        if is_new {
            self.n_workers.send_if_modified(|n| {
                let is_first = (1..limits::RANGES_FIRST).contains(n);
                if is_first {
                    *n = limits::RANGES_FIRST;
                }
                is_first
            });
        }
    }

    /// The answer was the whole file: of one mirror among several no use.
    fn without_ranges(&self, mirror: &Mirror<'_>) -> Failure {
        let mut state = mirror.state();
        if state.knows_ranges.is_none() {
            state.knows_ranges = Some(false);
            if self.mirrors.len() > 1 {
                return Failure::Last(mirror.link.wrong(OTHER_RANGE));
            }
        }
        Failure::Again(mirror.link.wrong(OTHER_RANGE), None)
    }

    /// Calls more workers as long as that makes it faster.
    async fn adapt(&self) -> std::convert::Infallible {
        let (mut before, mut best) = (0, 0);
        loop {
            tokio::time::sleep(limits::ADAPT_EVERY).await;
            let now = self.n_came.load(Ordering::Relaxed);
            let came = now - before;
            before = now;
            if came > best + best / 10 {
                best = came;
                self.n_workers.send_if_modified(|n| {
                    let may_grow = (2..limits::RANGES).contains(n);
                    if may_grow {
                        *n = (*n + 2).min(limits::RANGES);
                    }
                    may_grow
                });
            }
        }
    }
}

/// A link's URL as it may be logged.
fn error_url(link: &Link<'_>) -> String {
    crate::error::shown(link.url)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn plan(gaps: &[Range<u64>], n_workers: usize) -> Plan {
        Plan { gaps: gaps.iter().cloned().collect(), shares: vec![None; n_workers] }
    }

    #[test]
    fn ranges_are_handed_out_in_order_and_the_slow_are_helped() {
        let mut plan = plan(&[0..10 * MIB, 50 * MIB..60 * MIB], 4);
        let take = |plan: &mut Plan, i| plan.take(i, 2, 0).map(|one| (one.at / MIB, one.end / MIB));
        let taken: Vec<_> = (0..4).map(|i| take(&mut plan, i)).collect();
        assert_eq!(taken, [Some((0, 8)), Some((8, 10)), Some((50, 56)), Some((56, 60))]);
        // What goes fast is left alone: a second request would fetch bytes that are on their way.
        let began = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        plan.shares =
            vec![Some(Share { start: 0, at: 6 * MIB, end: 8 * MIB, began, mirror: 0 }), None];
        assert_eq!(take(&mut plan, 1), Some((7, 8)), "3 s are a long time");
        let mirror = 0;
        plan.shares =
            vec![Some(Share { start: 0, at: 60 * MIB, end: 62 * MIB, began, mirror }), None];
        assert_eq!(take(&mut plan, 1), None);
        // The last bit of a slow mirror is left to itself, unless another one is at hand.
        plan.shares = vec![Some(Share { start: 0, at: MIB / 9, end: MIB, began, mirror }), None];
        assert_eq!(take(&mut plan, 1), None);
        let rest = plan.take(1, 2, 1).unwrap();
        assert_eq!((rest.at, rest.end, rest.mirror), (MIB / 9, MIB, 1));
        assert_eq!(plan.shares[0].unwrap().left(), 0);
        assert!(!plan.is_done());
        plan.shares[1] = None;
        assert!(plan.is_done(), "who has nothing to do may still wait for its mirror");
    }

    #[test]
    fn ranges_grow_with_what_is_left_within_bounds() {
        let mut large = plan(&[0..100_000 * MIB, 0..0], 2);
        assert_eq!(large.take(0, 8, 0).unwrap().end, limits::RANGE_BYTES.1);
        let mut small = plan(&[0..20 * MIB, 0..0], 2);
        assert_eq!(small.take(0, 8, 0).unwrap().end, limits::RANGE_BYTES.0);
    }

    #[test]
    fn small_and_whole_rests_are_streamed() {
        assert!(!is_worth_it(&[], 6));
        let one = |len| is_worth_it(std::slice::from_ref(&(5..5 + len)), 5 + len);
        assert!(!one(limits::RANGES_FROM_BYTES - 1));
        assert!(one(limits::RANGES_FROM_BYTES));
        assert!(is_worth_it(&[0..1, 5..6], 6));
        assert!(is_worth_it(std::slice::from_ref(&(0..1)), 6), "what is behind the gap is here");
    }
}
