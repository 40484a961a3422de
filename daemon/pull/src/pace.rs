//! [`Pace`]: how fast bytes may come. One for all pulls, one a pull; both may change at any time.

use std::{
    num::NonZeroU64,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::limits;

/// A bound on bytes a second, or none.
#[derive(Debug)]
pub struct Pace {
    rate: watch::Sender<Option<NonZeroU64>>,
    /// When all bytes that were let through are paid for.
    paid: Mutex<Instant>,
    /// Bytes that were let through since the start.
    taken: AtomicU64,
}

impl Pace {
    /// At most so many bytes a second; `None` is as fast as they come.
    pub fn new(rate: Option<NonZeroU64>) -> Self {
        let (rate, paid) = (watch::Sender::new(rate), Mutex::new(Instant::now()));
        Self { rate, paid, taken: AtomicU64::new(0) }
    }

    /// Another bound from now on, also for those who wait.
    pub fn set(&self, rate: Option<NonZeroU64>) {
        *self.paid.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.rate.send_replace(rate);
    }

    /// The bound.
    pub fn rate(&self) -> Option<NonZeroU64> {
        *self.rate.borrow()
    }

    /// Bytes that were let through since the start.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Waits until `n` more bytes may come.
    pub(crate) async fn take(&self, n: u64) {
        self.taken.fetch_add(n, Ordering::Relaxed);
        let mut rates = self.rate.subscribe();
        loop {
            let Some(rate) = *rates.borrow_and_update() else { return };
            let due = {
                let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
                *paid = due(*paid, Instant::now(), n, rate);
                *paid
            };
            tokio::select! {
                () = tokio::time::sleep_until(due) => return,
                // The sender lives as long as this does.
                _ = rates.changed() => {}
            }
        }
    }
}

/// When `n` more bytes are paid for, given when those before them are. What was not used a while
/// ago is not saved up.
fn due(paid: Instant, now: Instant, n: u64, rate: NonZeroU64) -> Instant {
    let wait = Duration::from_secs_f64(n as f64 / rate.get() as f64);
    paid.max(now - limits::PACE_BURST) + wait
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_at_the_rate_whatever_their_pieces() {
        let rate = NonZeroU64::new(2_000_000).unwrap();
        let start = Instant::now();
        let mut paid = start;
        for _ in 0..100 {
            for n in [50_000, 150_000] {
                // Each comes when the one before is paid for, as it does behind a socket.
                paid = due(paid, paid, n, rate);
            }
        }
        let seconds = (paid - start).as_secs_f64();
        assert!((9.9..10.1).contains(&seconds), "20 MB took {seconds} s");
        // After a pause of an hour there is no burst of an hour.
        let later = paid + Duration::from_hours(1);
        assert!(due(paid, later, 200_000, rate) >= later + limits::PACE_BURST / 2);
    }

    #[tokio::test]
    async fn a_change_reaches_those_who_wait() {
        let pace = Pace::new(NonZeroU64::new(1));
        tokio::join!(pace.take(1_000_000), async {
            tokio::task::yield_now().await;
            pace.set(NonZeroU64::new(u64::MAX));
        });
        pace.set(None);
        pace.take(2_000_000).await;
        assert_eq!(pace.taken(), 3_000_000);
    }
}
