//! Blocks that outlive the process: two threads write and read their files, so that no step waits
//! for a disk. Queues are bounded; what finds no room is not written, and computed again if it is
//! ever missed.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use v4_proto::frame::KvDisk;

use super::chain::Chain;
use super::files::{Folder, Reading};
use super::prefix::Cached;
use crate::limits;

/// Which call of [`Disk::fetch`] a block belongs to.
pub type Ticket = u64;

/// A block that is to be written.
struct Save {
    chain: Chain,
    depth: usize,
    bytes: Vec<u8>,
    now: SystemTime,
}

/// Blocks that are to be read.
struct Fetch {
    ticket: Ticket,
    chains: Vec<Chain>,
    /// Depth of the first.
    depth: usize,
    is_over: Arc<AtomicBool>,
}

/// What the reader found.
#[derive(Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The next block, from the first one asked for.
    Block {
        /// Of which fetch.
        ticket: Ticket,
        /// As [`v4_kernels::KvCache::read_block`] gave them.
        bytes: Vec<u8>,
    },
    /// There are no more.
    End {
        /// Of which fetch.
        ticket: Ticket,
    },
}

/// What is shared with the threads.
#[derive(Debug)]
struct Shared {
    folder: Folder,
    /// Blocks in the writer's queue or hands.
    unwritten: Mutex<usize>,
    /// Rung when that falls.
    written: Condvar,
    /// Bytes that the reader gets a second; 0 is not known.
    read_rate: AtomicU64,
    refused: AtomicU64,
}

impl Shared {
    fn unwritten(&self) -> MutexGuard<'_, usize> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The blocks of one model on disk.
#[derive(Debug)]
pub struct Disk {
    shared: Arc<Shared>,
    saves: SyncSender<Save>,
    fetches: SyncSender<Fetch>,
    fetched: Receiver<Fetched>,
    tickets: Ticket,
    /// Blocks that may wait to be written.
    room: usize,
}

/// The end of a fetch that is dropped: the reader stops.
#[derive(Debug)]
pub struct Fetching {
    /// Its number.
    pub ticket: Ticket,
    is_over: Arc<AtomicBool>,
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

impl Disk {
    /// Opens the folder and starts the threads, which end when this is dropped.
    ///
    /// # Errors
    /// What the system says of the folder or the threads.
    pub fn open(options: &KvDisk, name: &str, block_bytes: usize) -> io::Result<Self> {
        let folder = Folder::open(&options.root, name, options.quota_bytes, block_bytes)?;
        let shared = Arc::new(Shared {
            folder,
            unwritten: Mutex::new(0),
            written: Condvar::new(),
            read_rate: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let blocks = |bytes: usize| (bytes / block_bytes.max(1)).clamp(2, limits::QUEUE_BLOCKS);
        let room = blocks(limits::SAVE_QUEUE_BYTES);
        let (saves, to_write) = sync_channel(room);
        let (fetches, to_read) = sync_channel(limits::FETCHES);
        let (found, fetched) = sync_channel(blocks(limits::FETCH_QUEUE_BYTES));
        let ours = Arc::clone(&shared);
        thread::Builder::new().name("kv-writer".into()).spawn(move || write(&ours, &to_write))?;
        let ours = Arc::clone(&shared);
        thread::Builder::new()
            .name("kv-reader".into())
            .spawn(move || read(&ours, &to_read, &found))?;
        Ok(Self { shared, saves, fetches, fetched, tickets: 0, room })
    }

    /// Whether one more block may be given to [`Disk::save`].
    pub fn has_room(&self) -> bool {
        *self.shared.unwritten() < self.room
    }

    /// Has a block written; nothing happens without room.
    pub fn save(&self, cached: Cached, bytes: Vec<u8>) {
        let Cached { chain, depth, .. } = cached;
        let save = Save { chain, depth, bytes, now: SystemTime::now() };
        *self.shared.unwritten() += 1;
        if self.saves.try_send(save).is_err() {
            // Full, or the writer has died: it was a wish, not a duty.
            *self.shared.unwritten() -= 1;
        }
    }

    /// Waits until the writer has at most `most` blocks to write; false when `until` comes first.
    pub fn wait_for_writer(&self, most: usize, until: Instant) -> bool {
        let mut unwritten = self.shared.unwritten();
        while *unwritten > most {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.written.wait_timeout(unwritten, left);
            unwritten = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Waits for room for one block, `patience` at most.
    pub fn wait_for_room(&self, patience: Duration) -> bool {
        self.wait_for_writer(self.room - 1, Instant::now() + patience)
    }

    /// Asks for the blocks `chains`, the first of which has `depth` blocks before it. `None` where
    /// there is none, or too much is asked for already.
    pub fn fetch(&mut self, chains: &[Chain], depth: usize) -> Option<Fetching> {
        if !self.shared.folder.has(chains.first()?, depth) {
            return None;
        }
        self.tickets += 1;
        let (ticket, is_over) = (self.tickets, Arc::new(AtomicBool::new(false)));
        let fetching = Fetching { ticket, is_over: Arc::clone(&is_over) };
        let fetch = Fetch { ticket, chains: chains.to_vec(), depth, is_over };
        self.fetches.try_send(fetch).is_ok().then_some(fetching)
    }

    /// What the reader has found; waits `patience` at most.
    pub fn fetched(&self, patience: Duration) -> Option<Fetched> {
        if patience.is_zero() {
            return self.fetched.try_recv().ok();
        }
        self.fetched.recv_timeout(patience).ok()
    }

    /// Bytes that the reader got a second, lately.
    pub fn read_rate(&self) -> Option<f64> {
        let rate = self.shared.read_rate.load(Ordering::Relaxed);
        (rate > 0).then_some(rate as f64)
    }

    /// Files that were not what their name said.
    pub fn n_refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }
}

/// The writer's thread.
fn write(shared: &Shared, saves: &Receiver<Save>) {
    // Files of earlier runs count too.
    let mut left = trimmed(&shared.folder);
    while let Ok(Save { chain, depth, bytes, now }) = saves.recv() {
        let file = shared.folder.file_bytes();
        if left < file {
            left = trimmed(&shared.folder);
        }
        if left >= file {
            // A block that cannot be written is computed again.
            left -= shared.folder.write((&chain, depth), &bytes, now).unwrap_or(0);
        }
        *shared.unwritten() -= 1;
        shared.written.notify_all();
    }
}

/// Trims a folder; bytes that may be written before it is due again.
fn trimmed(folder: &Folder) -> u64 {
    match folder.trim() {
        Ok(()) => folder.allowance(),
        // Nothing is written as long as nobody knows how much is there; the next block asks again.
        Err(_) => 0,
    }
}

/// The reader's thread.
fn read(shared: &Shared, fetches: &Receiver<Fetch>, found: &SyncSender<Fetched>) {
    while let Ok(Fetch { ticket, chains, depth, is_over }) = fetches.recv() {
        let now = SystemTime::now();
        for (chain, depth) in chains.iter().zip(depth..) {
            if is_over.load(Ordering::Relaxed) {
                break;
            }
            let began = Instant::now();
            match shared.folder.read(chain, depth, now) {
                Reading::Whole(bytes) => {
                    learn(&shared.read_rate, bytes.len(), began.elapsed());
                    if found.send(Fetched::Block { ticket, bytes }).is_err() {
                        return;
                    }
                }
                Reading::Refused => {
                    shared.refused.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Reading::Missing => break,
            }
        }
        if found.send(Fetched::End { ticket }).is_err() {
            return;
        }
    }
}

/// Moves a rate an eighth towards what was just seen.
fn learn(rate: &AtomicU64, n_bytes: usize, took: Duration) {
    let nanoseconds = took.as_nanos().max(1);
    let seen = u64::try_from(n_bytes as u128 * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX);
    let known = rate.load(Ordering::Relaxed);
    let next = if known == 0 { seen } else { known - known / 8 + seen / 8 };
    rate.store(next.max(1), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const BLOCK: usize = 4096;
    const PATIENCE: Duration = Duration::from_secs(20);

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("v4-disk-{}-{name}", std::process::id()));
            Self(path)
        }

        fn open(&self, quota_bytes: u64) -> Disk {
            let options = KvDisk { root: self.0.clone(), models: Vec::new(), quota_bytes };
            Disk::open(&options, "m", BLOCK).expect("a folder")
        }
    }

    impl Drop for Scratch {
        #[expect(clippy::disallowed_methods, reason = "a test clears up")]
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn chains(n: usize) -> Vec<Chain> {
        let mut chains = vec![Chain::root(&["disk"])];
        for _ in 1..n {
            let last = chains[chains.len() - 1];
            chains.push(last.then(&[1]));
        }
        chains
    }

    fn save(disk: &Disk, chains: &[Chain]) {
        for (depth, &chain) in chains.iter().enumerate() {
            assert!(disk.wait_for_room(PATIENCE));
            let bytes = vec![u8::try_from(depth % 256).expect("a byte"); BLOCK];
            disk.save(Cached { chain, depth, block: 0 }, bytes);
        }
        assert!(disk.wait_for_writer(0, Instant::now() + PATIENCE));
    }

    fn fetch(disk: &mut Disk, chains: &[Chain], depth: usize) -> Vec<Vec<u8>> {
        let Some(fetching) = disk.fetch(chains, depth) else { return Vec::new() };
        let mut all = Vec::new();
        loop {
            match disk.fetched(PATIENCE).expect("an end") {
                Fetched::Block { ticket, bytes } => {
                    assert_eq!(ticket, fetching.ticket);
                    all.push(bytes);
                }
                Fetched::End { ticket } => {
                    assert_eq!(ticket, fetching.ticket);
                    return all;
                }
            }
        }
    }

    #[test]
    fn blocks_come_back_in_order_in_another_process() {
        let scratch = Scratch::new("order");
        let all = chains(9);
        save(&scratch.open(1 << 30), &all[..7]);
        let mut disk = scratch.open(1 << 30);
        assert_eq!(disk.read_rate(), None);
        let found = fetch(&mut disk, &all, 0);
        assert_eq!(found.len(), 7, "there are no more");
        assert!(found.iter().zip(0..).all(|(bytes, n)| *bytes == vec![n; BLOCK]));
        assert!(disk.read_rate().is_some_and(|rate| rate > 0.0));
        assert_eq!(fetch(&mut disk, &all[3..5], 3).len(), 2);
        assert!(disk.fetch(&all[7..], 7).is_none() && disk.fetch(&[], 0).is_none());
        // What nobody waits for any more ends early, and the next is served.
        drop(disk.fetch(&all, 0));
        while !matches!(disk.fetched(PATIENCE), Some(Fetched::End { .. })) {}
        assert_eq!(fetch(&mut disk, &all, 0).len(), 7);
        assert_eq!(disk.n_refused(), 0);
    }

    #[test]
    fn the_quota_holds_while_blocks_are_written() {
        let scratch = Scratch::new("quota");
        let all = chains(200);
        let mut disk = scratch.open(64 * 4200);
        save(&disk, &all);
        // The first are the oldest: written one after the other, at times of their own.
        let kept =
            all.iter().enumerate().filter(|(depth, chain)| disk.shared.folder.has(chain, *depth));
        let kept: Vec<usize> = kept.map(|(depth, _)| depth).collect();
        assert!((60..=64).contains(&kept.len()), "{kept:?}");
        assert_eq!(kept.last(), Some(&199), "the newest is there");
        assert_eq!(fetch(&mut disk, &all[199..], 199).len(), 1);
    }

    #[test]
    fn a_rate_follows_what_is_seen() {
        let rate = AtomicU64::new(0);
        learn(&rate, 1000, Duration::from_millis(1));
        assert_eq!(rate.load(Ordering::Relaxed), 1_000_000);
        learn(&rate, 9000, Duration::from_millis(1));
        assert_eq!(rate.load(Ordering::Relaxed), 2_000_000);
        learn(&rate, usize::MAX, Duration::ZERO);
        assert!(rate.load(Ordering::Relaxed) > 0);
    }
}
