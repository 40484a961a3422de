//! A large file in several ranges at a time.
//!
//! What is missing is cut into ranges that are handed out in order, so that the hash, which goes in
//! order, follows close behind. Workers take them; how many there are is found out while it goes: a
//! few more as long as that makes it faster, fewer when the server has had enough. Who finds
//! nothing left takes half of what the slowest still has to do. A range that fails is asked for
//! again from where it was, alone.

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

use super::http::{
    ContentRange, Drops, Failure, Link, OTHER_RANGE, Tries, check_status, check_tag, other_size,
    range_headers,
};
use crate::{error::PullError, limits, write::Sink};

/// Whether so much is missing, or in such a way, that one stream from the start is not the best.
pub(crate) fn is_worth_it(gaps: &[Range<u64>]) -> bool {
    let missing: u64 = gaps.iter().map(|gap| gap.end - gap.start).sum();
    missing >= limits::RANGES_FROM_BYTES || gaps.len() > 1
}

/// Reads what is missing of a file of `size` bytes. `false` when the server knows no ranges.
pub(crate) async fn read(link: &Link<'_>, size: u64, sink: &Sink<'_>) -> Result<bool, PullError> {
    let crew = Crew::new(link, size, sink);
    let workers = try_join_all((0..limits::RANGES).map(|i| crew.work(i)));
    let foreman = crew.adapt();
    let (workers, foreman) = (std::pin::pin!(workers), std::pin::pin!(foreman));
    match select(workers, foreman).await {
        Either::Left((Ok(_), _)) => Ok(crew.plan().knows_ranges != Some(false)),
        Either::Left((Err(error), _)) => Err(error),
        Either::Right((never, _)) => match never {},
    }
}

/// What a worker has to do: `at` grows as bytes come, `end` shrinks when somebody takes a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Share {
    start: u64,
    at: u64,
    end: u64,
    began: Instant,
}

impl Share {
    fn new(range: Range<u64>) -> Self {
        let Range { start, end } = range;
        Self { start, at: start, end, began: Instant::now() }
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
    tag: Option<HeaderValue>,
    /// Known after the first answer.
    knows_ranges: Option<bool>,
}

impl Plan {
    /// Something to do for worker `i`: the next range, or half of the one that takes longest.
    fn take(&mut self, i: usize, n_workers: usize) -> Option<Share> {
        let share = self.next(n_workers).or_else(|| self.half())?;
        self.shares[i] = Some(share);
        Some(share)
    }

    /// The next range: a share of what is left for each of them, within bounds.
    fn next(&mut self, n_workers: usize) -> Option<Share> {
        let left: u64 = self.gaps.iter().map(|gap| gap.end - gap.start).sum();
        let gap = self.gaps.front_mut()?;
        let len = left / (2 * n_workers.max(1) as u64);
        let len = len.clamp(limits::RANGE_BYTES.0, limits::RANGE_BYTES.1);
        let share = Share::new(gap.start..gap.end.min(gap.start.saturating_add(len)));
        gap.start = share.end;
        if gap.start == gap.end {
            self.gaps.pop_front();
        }
        Some(share)
    }

    /// Half of what still has to be done by the one that takes longest, if that is worth a request.
    fn half(&mut self) -> Option<Share> {
        let shares = self.shares.iter_mut().flatten();
        let slowest = shares.max_by_key(|share| (share.takes(), share.left()))?;
        if slowest.left() < 2 * limits::HALF_BYTES || slowest.takes() < limits::HALF_FROM {
            return None;
        }
        let middle = slowest.at + slowest.left() / 2;
        let share = Share::new(middle..slowest.end);
        slowest.end = middle;
        Some(share)
    }

    /// Whether everything is here.
    fn is_done(&self) -> bool {
        self.gaps.is_empty() && self.shares.iter().all(Option::is_none)
    }
}

/// The workers of one file, and what they share.
struct Crew<'a> {
    link: &'a Link<'a>,
    size: u64,
    sink: &'a Sink<'a>,
    plan: Mutex<Plan>,
    /// How many may work.
    n_workers: watch::Sender<usize>,
    /// Bytes that came in all.
    n_came: AtomicU64,
}

impl<'a> Crew<'a> {
    fn new(link: &'a Link<'a>, size: u64, sink: &'a Sink<'a>) -> Self {
        let plan = Plan {
            gaps: sink.gaps(size).into(),
            shares: vec![None; limits::RANGES],
            ..Plan::default()
        };
        // One finds out whether the server knows ranges.
        let n_workers = watch::Sender::new(1);
        Self { link, size, sink, plan: Mutex::new(plan), n_workers, n_came: AtomicU64::new(0) }
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Worker `i`, from its call to the end of the work.
    async fn work(&self, i: usize) -> Result<(), PullError> {
        let mut tries = Tries::new(self.link.net);
        let mut n_workers = self.n_workers.subscribe();
        let mut came = 0;
        loop {
            // The sender lives as long as the crew.
            let n = n_workers.wait_for(|n| *n == 0 || i < *n).await.map_or(0, |n| *n);
            if n == 0 {
                return Ok(());
            }
            if self.plan().take(i, n).is_none() {
                if self.plan().is_done() {
                    self.n_workers.send_replace(0);
                }
                let done = n_workers.wait_for(|n| *n == 0);
                // Either way it is looked at again.
                drop(tokio::time::timeout(limits::HALF_EVERY, done).await);
                continue;
            }
            loop {
                let outcome = self.fetch(i).await;
                let now = self.n_came.load(Ordering::Relaxed);
                let failure = match outcome {
                    Ok(()) => break,
                    Err(failure) => failure,
                };
                if self.plan().knows_ranges == Some(false) {
                    self.n_workers.send_replace(0);
                    return Ok(());
                }
                if failure.is_too_much() {
                    self.n_workers.send_modify(|n| *n = (*n).min((*n / 2).max(1)));
                }
                tries.again(failure, now - came).await?;
                came = now;
                if let Some(share) = &mut self.plan().shares[i] {
                    (share.start, share.began) = (share.at, Instant::now());
                }
            }
            self.plan().shares[i] = None;
        }
    }

    /// Asks for the rest of a worker's share and takes it.
    async fn fetch(&self, i: usize) -> Result<(), Failure> {
        let (share, tag) = {
            let plan = self.plan();
            let Some(share) = plan.shares[i].filter(|share| share.left() > 0) else {
                return Ok(());
            };
            (share, plan.tag.clone())
        };
        let headers = range_headers(share.at, Some(share.end), tag.as_ref());
        let response = self.link.send(Method::GET, headers).await?;
        check_status(self.link, &response)?;
        check_tag(self.link, &mut self.plan().tag, response.headers())?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(self.without_ranges());
        }
        match ContentRange::parse(response.headers()) {
            Some(ContentRange { size: Some(size), .. }) if size != self.size => {
                return Err(other_size(self.link, size, self.size).into());
            }
            Some(ContentRange { sent: Some((start, last)), .. })
                if start == share.at && last >= start => {}
            _ => return Err(Failure::Again(self.link.wrong(OTHER_RANGE), None)),
        }
        self.know_ranges();
        let mut drops = Drops::of(self.link, response);
        let mut at = share.at;
        while let Some(mut piece) = drops.next().await? {
            // Somebody may have taken a share of it meanwhile.
            let end = self.plan().shares[i].map_or(at, |share| share.end);
            let wanted = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
            piece.truncate(wanted);
            let n = piece.len() as u64;
            self.sink.write_at(at, piece).await?;
            at += n;
            self.n_came.fetch_add(n, Ordering::Relaxed);
            if let Some(share) = &mut self.plan().shares[i] {
                share.at = at;
            }
            if at >= end {
                return Ok(());
            }
        }
        let left = self.plan().shares[i].map_or(0, |share| share.left());
        if left == 0 {
            return Ok(());
        }
        Err(Failure::Again(self.link.wrong(format!("{left} bytes too few of a range")), None))
    }

    /// The first answer was a range: more may work.
    fn know_ranges(&self) {
        let mut plan = self.plan();
        if plan.knows_ranges.is_none() {
            plan.knows_ranges = Some(true);
            drop(plan);
            self.n_workers.send_modify(|n| *n = if *n == 1 { limits::RANGES_FIRST } else { *n });
        }
    }

    /// The answer was the whole file.
    fn without_ranges(&self) -> Failure {
        let mut plan = self.plan();
        if plan.knows_ranges.is_none() {
            plan.knows_ranges = Some(false);
        }
        Failure::Again(self.link.wrong(OTHER_RANGE), None)
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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn plan(gaps: &[Range<u64>], n_workers: usize) -> Plan {
        Plan {
            gaps: gaps.iter().cloned().collect(),
            shares: vec![None; n_workers],
            ..Plan::default()
        }
    }

    #[test]
    fn ranges_are_handed_out_in_order_and_the_slow_are_helped() {
        let mut plan = plan(&[0..10 * MIB, 50 * MIB..60 * MIB], 4);
        let take = |plan: &mut Plan, i| plan.take(i, 2).map(|one| (one.at / MIB, one.end / MIB));
        let taken: Vec<_> = (0..4).map(|i| take(&mut plan, i)).collect();
        assert_eq!(taken, [Some((0, 8)), Some((8, 10)), Some((50, 58)), Some((58, 60))]);
        // What goes fast is left alone: a second request would fetch bytes that are on their way.
        let began = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        plan.shares = vec![Some(Share { start: 0, at: 6 * MIB, end: 8 * MIB, began }), None];
        assert_eq!(take(&mut plan, 1), Some((7, 8)), "3 s are a long time");
        plan.shares = vec![Some(Share { start: 0, at: 60 * MIB, end: 62 * MIB, began }), None];
        assert_eq!(take(&mut plan, 1), None);
        assert!(!plan.is_done());
        plan.shares[0] = None;
        assert!(plan.is_done());
    }

    #[test]
    fn ranges_grow_with_what_is_left_within_bounds() {
        let mut large = plan(&[0..100_000 * MIB, 0..0], 2);
        assert_eq!(large.take(0, 8).unwrap().end, limits::RANGE_BYTES.1);
        let mut small = plan(&[0..20 * MIB, 0..0], 2);
        assert_eq!(small.take(0, 8).unwrap().end, limits::RANGE_BYTES.0);
    }

    #[test]
    fn small_and_whole_rests_are_streamed() {
        assert!(!is_worth_it(&[]));
        let one = |len| is_worth_it(std::slice::from_ref(&(0..len)));
        assert!(!one(limits::RANGES_FROM_BYTES - 1));
        assert!(one(limits::RANGES_FROM_BYTES));
        assert!(is_worth_it(&[0..1, 5..6]));
    }
}
