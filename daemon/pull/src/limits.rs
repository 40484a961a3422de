//! Bounds of a pull, each with its unit and reason. Those that tests shorten are the defaults of
//! [`crate::PullConfig`].

use std::time::Duration;

/// To connect, name look-up and TLS included: what an unreachable source costs.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Without a byte: the connection is given up and the rest asked for again.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// An unreachable host is tried last for this long.
pub const UNREACHABLE_FOR: Duration = Duration::from_mins(5);
/// The wait before the first retry; each further one doubles it.
pub const BACKOFF: Duration = Duration::from_millis(500);
/// The longest wait before a retry, also when a server asks for more.
pub const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// Tries in a row that bring nothing new before a source is given up.
pub const TRIES: u32 = 6;
/// Bytes that count as something new; less is a server that drips.
pub const TRY_BYTES: u64 = 64 << 10;
/// Redirects that are followed for one request.
pub const REDIRECTS: usize = 10;
/// Bytes of a package index's answer; real ones with a long description have some 200 KB.
pub const INDEX_ANSWER_BYTES: usize = 16 << 20;
/// Bytes of a file whose size no recipe says.
pub const FILE_BYTES: u64 = 1 << 42;
/// Pieces of a download between the network and the disk, each some 16 to 64 KiB.
pub const PIECES: usize = 32;
/// Bytes read from a file or an archive at a time.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Time between two reports of progress: a person sees ten a second as smooth.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Pulls at a time; each has a connection and a writer thread.
pub const PULLS: usize = 16;
/// Characters of a location's text.
pub const LOCATION_CHARS: usize = 4096;
/// Parts of a location.
pub const PARTS: usize = 1024;
