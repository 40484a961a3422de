//! Bounds of the engine, each with its unit and the reason for its value.

use std::time::Duration;

/// Bytes of blocks that wait to be written to disk, at least two blocks: what a slow disk may hold
/// in memory.
pub const SAVE_QUEUE_BYTES: usize = 64 << 20;
/// Bytes of blocks that were read from disk and wait for the engine, at least two blocks.
pub const FETCH_QUEUE_BYTES: usize = 64 << 20;
/// Blocks that are kept in memory in the one queue or the other, at most: of tiny models.
pub const QUEUE_BLOCKS: usize = 1024;
/// Conversations whose blocks are asked for from disk and that wait for the reader.
pub const FETCHES: usize = 256;
/// Bytes of blocks from disk that a step puts into the cache while others write: some ten
/// milliseconds of copying.
pub const RESTORE_STEP_BYTES: usize = 32 << 20;
/// Blocks that a step copies for the disk while it works on sequences: a share of a millisecond.
pub const SAVE_STEP_BLOCKS: usize = 1;
/// A disk that gives no block for so long is not waited for: the tokens are computed instead.
pub const FETCH_STALL: Duration = Duration::from_secs(2);
/// Without other work the engine waits so long for a block from disk before it looks for orders: a
/// cancel is that late at worst.
pub const FETCH_WAIT: Duration = Duration::from_millis(20);
/// Without other work the engine waits so long for room in the writer's queue before it looks for
/// orders: a request is that late at worst.
pub const SAVE_WAIT: Duration = Duration::from_millis(5);
/// The share of the quota (one in so many) that is written before the files are counted again, and
/// that a count leaves free.
pub const QUOTA_SHARE: u64 = 32;
/// A half-written file that is older was left behind by a process that was killed.
pub const LEFT_BEHIND: Duration = Duration::from_hours(1);
