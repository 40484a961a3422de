//! The threads that compute: persistent, one job at a time, the caller among them.
//!
//! A model's step is some hundred short jobs, microseconds apart, so handing one over must cost
//! less than a microsecond: workers spin for the next job for a few tens of microseconds, then give
//! up their slice, then park. Work is taken in small shares from one counter, so that a core that
//! is busy elsewhere slows a job by its own share only, and a worker that has not woken by the time
//! the shares are gone is not waited for.

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

/// Turns of the pause instruction before a waiter gives up its slice: some 50 us, more than lies
/// between two jobs of a step, less than a person or a battery notices.
const SPIN_TURNS: u32 = 2_000;
/// Slices given up before a waiter parks.
const YIELD_TURNS: u32 = 16;
/// Threads of a pool at most: more than any machine has cores, less than the counter in the state
/// holds.
pub const MAX_THREADS: usize = 1024;

/// `State`: workers inside the job, in the low bits.
const ACTIVE: u64 = 0xffff;
/// `State`: shares may still be taken.
const OPEN: u64 = 0x1_0000;
/// `State`: one job.
const EPOCH: u64 = 0x2_0000;

/// Working memory of one thread, kept between jobs. It only grows.
#[derive(Debug, Default)]
pub struct Scratch {
    floats: Vec<Line>,
}

/// A cache line of floats: what gives [`Scratch`] its alignment.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Scratch {
    /// `len` floats with what was left in them, on a boundary of a cache line.
    pub fn floats(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.floats.len() < lines {
            self.floats.resize(lines, Line::default());
        }
        // SAFETY: a `Line` is sixteen floats without padding, and there are at least `len` of them.
        unsafe { std::slice::from_raw_parts_mut(self.floats.as_mut_ptr().cast::<f32>(), len) }
    }
}

/// A job: what to do for each share.
type Work<'a> = dyn Fn(usize, &mut Scratch) + Sync + 'a;

/// The job of the hour, valid while the state is open or a worker is active.
struct Job {
    work: *const Work<'static>,
    caller: Thread,
}

#[repr(align(64))]
struct Shared {
    /// Jobs begun, whether shares may be taken, and workers inside.
    state: AtomicU64,
    /// The shares that each thread has left, the caller first.
    left: Vec<Apart<Range>>,
    job: UnsafeCell<Option<Job>>,
    stopping: AtomicBool,
    /// Threads that jobs are given to, the caller's counted. It changes between jobs only.
    active: AtomicUsize,
    /// The first panic of a worker in this job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// A flag a worker: it is parked, or about to.
    asleep: Vec<AtomicBool>,
}

/// On a cache line of its own.
#[repr(align(64))]
struct Apart<T>(T);

/// Shares from a first to a last, of which the owner takes the first and others the last: so each
/// thread goes through memory in order, and one that is held up loses its shares to the others.
/// Begin and end are the halves of one number.
#[derive(Default)]
struct Range(AtomicU64);

impl Range {
    fn set(&self, begin: usize, end: usize) {
        // The caller made sure that both fit.
        self.0.store((begin as u64) << 32 | end as u64, Ordering::Relaxed);
    }

    fn len(&self) -> u64 {
        let packed = self.0.load(Ordering::Relaxed);
        (packed & END).saturating_sub(packed >> 32)
    }

    /// Takes a share, the first one or the last one.
    fn take(&self, is_owner: bool) -> Option<usize> {
        let left = |packed: u64| {
            let (begin, end) = (packed >> 32, packed & END);
            let rest = || if is_owner { (begin + 1) << 32 | end } else { begin << 32 | (end - 1) };
            (begin < end).then(rest)
        };
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).ok()?;
        let share = if is_owner { before >> 32 } else { (before & END) - 1 };
        usize::try_from(share).ok()
    }
}

/// The half of a [`Range`] that is its end.
const END: u64 = 0xffff_ffff;

// SAFETY: `job` is written by the one caller only while the state is closed with no worker active
// (`Pool::run` borrows the pool mutably), and read by workers only while they are counted active.
// All else is atomic or locked. The pointer in it is to a `Sync` closure.
unsafe impl Sync for Shared {}
// SAFETY: see above; nothing in it belongs to one thread.
unsafe impl Send for Shared {}

/// A pool of threads. Dropping it joins them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    scratch: Scratch,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `threads`, the caller's counted: `threads - 1` are started.
    ///
    /// # Errors
    /// When the system gives no more threads; those already started are joined.
    pub fn new(threads: usize) -> io::Result<Self> {
        let n_workers = threads.clamp(1, MAX_THREADS) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            left: (0..=n_workers).map(|_| Apart(Range::default())).collect(),
            job: UnsafeCell::new(None),
            stopping: AtomicBool::new(false),
            active: AtomicUsize::new(n_workers + 1),
            panic: Mutex::new(None),
            asleep: (0..n_workers).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut pool = Self { shared, workers: Vec::new(), scratch: Scratch::default() };
        for index in 0..n_workers {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new()
                .name(format!("v4-compute-{}", index + 1))
                .spawn(move || shared.serve(index))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that compute, the caller's counted.
    pub fn threads(&self) -> usize {
        self.shared.active.load(Ordering::Relaxed)
    }

    /// Gives the jobs that follow to `threads` threads: at least to the caller's, at most to all
    /// that were started. The others sleep.
    pub fn set_threads(&mut self, threads: usize) {
        let threads = threads.clamp(1, self.workers.len() + 1);
        self.shared.active.store(threads, Ordering::SeqCst);
    }

    /// Calls `work` once for each share below `n_shares`, on the threads of the pool, and returns
    /// when all are done.
    ///
    /// # Panics
    /// When `work` does; shares not yet taken are then left.
    pub fn run(&mut self, n_shares: usize, work: &Work<'_>) {
        if self.threads() == 1 || n_shares < 2 {
            for share in 0..n_shares {
                work(share, &mut self.scratch);
            }
            return;
        }
        self.open(n_shares, work);
        let mine = catch_unwind(AssertUnwindSafe(|| {
            self.shared.take_shares(0, work, &mut self.scratch);
        }));
        if mine.is_err() {
            self.shared.drop_shares();
        }
        self.close();
        let theirs = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = mine.err().or(theirs) {
            resume_unwind(payload);
        }
    }

    /// Lets workers in.
    fn open(&mut self, n_shares: usize, work: &Work<'_>) {
        // SAFETY: only the lifetime changes. `close`, which `run` calls before it returns or
        // unwinds, waits until no worker is inside the job and none can enter, so the pointer is
        // not used after the borrow it was made of.
        let work = unsafe { std::mem::transmute::<&Work<'_>, &Work<'static>>(work) };
        let shared = &*self.shared;
        // SAFETY: the state is closed and no worker is active: nobody else looks at `job`.
        unsafe { *shared.job.get() = Some(Job { work, caller: thread::current() }) };
        let threads = self.threads().min(n_shares);
        shared.divide(n_shares, threads);
        // Sequentially consistent against a worker's `asleep`: either it sees the job, or we see
        // that it sleeps.
        shared.state.fetch_add(EPOCH | OPEN, Ordering::SeqCst);
        for (asleep, worker) in shared.asleep.iter().zip(&self.workers).take(threads - 1) {
            if asleep.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    /// Lets no more workers in and waits for those inside.
    fn close(&mut self) {
        let shared = &*self.shared;
        shared.state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut turns = 0;
        while shared.state.load(Ordering::Acquire) & ACTIVE != 0 {
            wait(&mut turns, thread::park);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker hands every panic on to `run` and has none of its own.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The life of a worker.
    fn serve(&self, index: usize) {
        let mut scratch = Scratch::default();
        let mut seen = 0;
        while let Some(state) = self.await_job(index, seen) {
            let entered = self
                .state
                .compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
            if !entered {
                continue;
            }
            seen = state / EPOCH;
            self.work(index + 1, &mut scratch);
        }
    }

    /// Gives each of the first threads as many shares as the others, in order.
    fn divide(&self, n_shares: usize, threads: usize) {
        assert!(n_shares as u64 <= END, "{n_shares} shares are more than can be counted");
        for (thread, left) in self.left.iter().enumerate() {
            let cut = |thread: usize| thread.min(threads) * n_shares / threads;
            left.0.set(cut(thread), cut(thread + 1));
        }
    }

    /// Leaves no share to anybody.
    fn drop_shares(&self) {
        self.left.iter().for_each(|left| left.0.set(0, 0));
    }

    /// Whether `state` is an open job for this worker that it has not `seen`. The number of threads
    /// is looked at after the state, so that it is the job's or a later one's.
    fn is_for(&self, index: usize, state: u64, seen: u64) -> bool {
        let is_new = state & OPEN != 0 && state / EPOCH != seen;
        is_new && index + 1 < self.active.load(Ordering::SeqCst)
    }

    /// Waits for an open job that is not `seen`; `None` when the pool stops.
    fn await_job(&self, index: usize, seen: u64) -> Option<u64> {
        let mut turns = 0;
        loop {
            let state = self.state.load(Ordering::SeqCst);
            if self.is_for(index, state, seen) {
                return Some(state);
            }
            if self.stopping.load(Ordering::SeqCst) {
                return None;
            }
            wait(&mut turns, || {
                self.asleep[index].store(true, Ordering::SeqCst);
                let state = self.state.load(Ordering::SeqCst);
                if !self.is_for(index, state, seen) && !self.stopping.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.asleep[index].store(false, Ordering::SeqCst);
            });
        }
    }

    /// A worker's part of the job it has entered.
    fn work(&self, thread: usize, scratch: &mut Scratch) {
        // SAFETY: this worker is counted active, so the caller neither writes `job` nor lets its
        // closure go.
        let (work, caller) = unsafe {
            let job = (*self.job.get()).as_ref().expect("an open state has a job");
            (&*job.work, job.caller.clone())
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| self.take_shares(thread, work, scratch)));
        if let Err(payload) = outcome {
            self.drop_shares();
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
        let before = self.state.fetch_sub(1, Ordering::AcqRel);
        if before & (OPEN | ACTIVE) == 1 {
            // The last one out after closing: the caller may be parked. A token too many costs it
            // one turn.
            caller.unpark();
        }
    }

    /// A thread's own shares, then those that others have left.
    fn take_shares(&self, thread: usize, work: &Work<'_>, scratch: &mut Scratch) {
        while let Some(share) = self.left[thread].0.take(true) {
            work(share, scratch);
        }
        while let Some(share) = self.steal() {
            work(share, scratch);
        }
    }

    /// The last share of who has most left.
    fn steal(&self) -> Option<usize> {
        loop {
            let richest = self.left.iter().max_by_key(|left| left.0.len())?;
            if richest.0.len() == 0 {
                return None;
            }
            if let Some(share) = richest.0.take(false) {
                return Some(share);
            }
        }
    }
}

/// One turn of waiting: spin, then yield, then `park`.
fn wait(turns: &mut u32, park: impl FnOnce()) {
    if *turns < SPIN_TURNS {
        *turns += 1;
        std::hint::spin_loop();
    } else if *turns < SPIN_TURNS + YIELD_TURNS {
        *turns += 1;
        thread::yield_now();
    } else {
        park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_share_is_done_once() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for n_shares in [0, 1, 2, 3, 17, 1000] {
                let done: Vec<AtomicUsize> = (0..n_shares).map(|_| AtomicUsize::new(0)).collect();
                pool.run(n_shares, &|share, _| {
                    done[share].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    done.iter().all(|n| n.load(Ordering::Relaxed) == 1),
                    "{threads} {n_shares}"
                );
            }
        }
    }

    #[test]
    fn shares_are_taken_in_order_and_lost_from_the_end() {
        let range = Range::default();
        assert_eq!((range.take(true), range.take(false), range.len()), (None, None, 0));
        range.set(7, 11);
        let taken = [true, false, true, false].map(|is_owner| range.take(is_owner));
        assert_eq!(taken, [Some(7), Some(10), Some(8), Some(9)]);
        assert_eq!((range.take(true), range.take(false), range.len()), (None, None, 0));
    }

    #[test]
    fn many_short_jobs_follow_each_other() {
        let mut pool = Pool::new(4).unwrap();
        let total = AtomicUsize::new(0);
        for _ in 0..20_000 {
            pool.run(5, &|share, _| {
                total.fetch_add(share, Ordering::Relaxed);
            });
        }
        assert_eq!(total.into_inner(), 200_000);
    }

    /// With fewer threads the others sleep, and with more again they work.
    #[test]
    fn a_job_is_done_by_as_many_threads_as_it_may() {
        let mut pool = Pool::new(4).unwrap();
        for (wanted, threads) in [(2, 2), (1, 1), (3, 3), (0, 1), (9, 4), (2, 2), (4, 4)] {
            pool.set_threads(wanted);
            assert_eq!(pool.threads(), threads);
            for _ in 0..200 {
                let seen = Mutex::new(std::collections::HashSet::new());
                let n_done = AtomicUsize::new(0);
                pool.run(64, &|_, _| {
                    seen.lock().unwrap().insert(thread::current().id());
                    n_done.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(n_done.into_inner(), 64);
                assert!(seen.into_inner().unwrap().len() <= threads);
            }
        }
        // Shares that wait for each other: all of them are there again.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let arrived = AtomicUsize::new(0);
        pool.run(4, &|_, _| {
            arrived.fetch_add(1, Ordering::SeqCst);
            while arrived.load(Ordering::SeqCst) < 4 {
                assert!(std::time::Instant::now() < deadline, "a worker did not wake");
                thread::yield_now();
            }
        });
    }

    #[test]
    fn workers_that_parked_wake_up() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..20 {
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while !pool.shared.asleep.iter().all(|asleep| asleep.load(Ordering::SeqCst)) {
                assert!(std::time::Instant::now() < deadline, "workers never parked");
                thread::yield_now();
            }
            // Shares that wait for each other: only three threads at once get through.
            let arrived = AtomicUsize::new(0);
            pool.run(3, &|_, _| {
                arrived.fetch_add(1, Ordering::SeqCst);
                while arrived.load(Ordering::SeqCst) < 3 {
                    assert!(std::time::Instant::now() < deadline, "a worker did not wake");
                    thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3).unwrap();
        for culprit in [0, 1, 50, 99] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|share, _| assert!(share != culprit, "share {share}"));
            }));
            let payload = outcome.unwrap_err();
            assert_eq!(payload.downcast_ref::<String>(), Some(&format!("share {culprit}")));
        }
        let total = AtomicUsize::new(0);
        pool.run(10, &|_, _| {
            total.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(total.into_inner(), 10);
    }

    #[test]
    fn scratch_is_aligned_and_kept() {
        let mut pool = Pool::new(1).unwrap();
        pool.run(1, &|_, scratch| scratch.floats(33).fill(7.0));
        pool.run(1, &|_, scratch| {
            let floats = scratch.floats(33);
            assert_eq!(floats.as_ptr().addr() % 64, 0);
            assert!(floats.iter().all(|value| value.to_bits() == 7.0f32.to_bits()));
        });
    }
}
