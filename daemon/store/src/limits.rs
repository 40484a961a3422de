//! Bounds of the store, each with its unit and reason.

use std::time::Duration;

/// Bytes of a partial that are written before the next sync of it begins, beside the writing: what
/// a cut of the power can cost, and what came while the disk was at it.
pub const CHECKPOINT_BYTES: u64 = 8 << 20;
/// Bytes of a partial that its journal may not know of yet: what a kill can cost. With what is on
/// its way from the network, less than 8 MiB.
pub const NOTE_BYTES: u64 = 4 << 20;
/// Bytes of a piece in a journal: [`NOTE_BYTES`] and one write.
pub const PIECE_BYTES: u64 = 64 << 20;
/// Bytes of a blob that can be checked alone, and so fetched again alone.
pub const CHUNK_LINK_BYTES: u64 = 8 << 20;
/// Bytes of a blob's chain: enough for 4 TB.
pub const CHAIN_BYTES: usize = 16 << 20;
/// Bytes of what is told of where a manifest came from.
pub const ORIGIN_BYTES: usize = 1 << 20;
/// Bytes of the list of roots, and of that of pinned names.
pub const ROOTS_BYTES: usize = 1 << 20;
/// Writes that may wait to be hashed. Beyond that they are read back from the file, which the
/// system still has in memory.
pub const HASH_QUEUE: usize = 32;
/// Bytes read or hashed at a time.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Bytes of a manifest. One that lists every tensor of a large model as a layer has some 2 MB.
pub const MANIFEST_BYTES: usize = 8 << 20;
/// Bytes of a partial's journal: 43 for each piece. Sixteen ranges at a time make one of each 256
/// KiB, so this is enough for 1.5 TB.
pub const JOURNAL_BYTES: u64 = 256 << 20;
/// Bytes of a cached inspection; a header of 100,000 tensors makes some 10 MB.
pub const INSPECTION_BYTES: usize = 32 << 20;
/// Characters of a partial's key; it is a file name.
pub const KEY_CHARS: usize = 200;
/// Blobs that no manifest names are kept this long, so that a pull that was killed before its last
/// step need not fetch them again.
pub const ORPHAN_AGE: Duration = Duration::from_hours(7 * 24);
/// Deleted names can come back for so long at most, so that what a person deleted does not fill the
/// disk for ever.
pub const DELETED_AGE: Duration = ORPHAN_AGE;
/// A file that was last written so long ago, at least, shows another write by another time: clocks
/// of file systems go in steps of up to two seconds.
pub const SETTLED: Duration = Duration::from_secs(3);
/// Partials, staged archives among them, that nobody went on with for this long are swept at start:
/// as long as a finished blob waits for its name, and no abandoned pull fills the disk for ever.
pub const PARTIAL_AGE: Duration = ORPHAN_AGE;
/// Bytes of memory that the index may use as a cache. It holds little and is read rarely.
pub const INDEX_CACHE_BYTES: u64 = 1 << 20;
/// How long sled's own lock is waited for after the last user of the index in this process left.
pub const INDEX_LOCK_WAIT: Duration = Duration::from_secs(2);
/// Between two looks at that lock.
pub const INDEX_LOCK_STEP: Duration = Duration::from_millis(5);
