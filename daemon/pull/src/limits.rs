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
/// Ranges of a file that are read at a time, at most.
pub const RANGES: usize = 16;
/// Ranges of a file at a time before more are tried.
pub const RANGES_FIRST: usize = 8;
/// Missing bytes from which on a file is read in ranges. Less is over before more than one
/// connection is warm.
pub const RANGES_FROM_BYTES: u64 = 16 << 20;
/// Bytes of a range, at least and at most: a request costs a round trip, and the end of one stands
/// between the hash and what came behind it.
pub const RANGE_BYTES: (u64, u64) = (8 << 20, 64 << 20);
/// Bytes that are worth a request of their own when a range is halved.
pub const HALF_BYTES: u64 = 1 << 20;
/// A range that takes longer than this is halved by whoever has nothing to do.
pub const HALF_FROM: Duration = Duration::from_secs(2);
/// Time between two looks at whether somebody needs help.
pub const HALF_EVERY: Duration = Duration::from_millis(500);
/// Time between two looks at whether more ranges at a time make it faster.
pub const ADAPT_EVERY: Duration = Duration::from_secs(1);
/// What a bound on the rate lets through at once after a pause: short enough that no second has
/// noticeably more.
pub const PACE_BURST: Duration = Duration::from_millis(50);
/// Redirects that are followed for one request.
pub const REDIRECTS: usize = 10;
/// Bytes of a package index's answer; real ones with a long description have some 200 KB.
pub const INDEX_ANSWER_BYTES: usize = 16 << 20;
/// Bytes of a chunk that is sent to a registry: what a broken connection costs.
pub const UPLOAD_BYTES: u64 = 8 << 20;
/// Pages of a repository's list of files, each of some 1,000.
pub const TREE_PAGES: usize = 50;
/// Bytes of a token server's answer; real ones have some 5 KB.
pub const TOKEN_BYTES: usize = 1 << 20;
/// Bytes of a file of credentials.
pub const AUTH_FILE_BYTES: usize = 1 << 20;
/// Members of an archive that are looked at.
pub const MEMBERS: usize = 100_000;
/// Bytes of what an archive says of a member's name.
pub const MEMBER_NAME_BYTES: u64 = 64 << 10;
/// Bytes of a policy, and of a public key's file.
pub const POLICY_BYTES: usize = 1 << 20;
/// Bytes of what a signature signs; real ones have some 250.
pub const PAYLOAD_BYTES: usize = 64 << 10;
/// Signatures of a manifest that are looked at.
pub const SIGNATURES: usize = 32;
/// Bytes of a private key's file; real ones have some 400.
pub const KEY_BYTES: usize = 16 << 10;
/// Repositories whose tokens are kept.
pub const SESSIONS: usize = 256;
/// Time between two looks at a full disk that a pull waits for.
pub const DISK_EVERY: Duration = Duration::from_secs(2);
/// Bytes that must be free before a pull that waits for the disk goes on, where more is missing.
pub const DISK_BYTES: u64 = 64 << 20;
/// Bytes of a file whose size no recipe says.
pub const FILE_BYTES: u64 = 1 << 42;
/// Pieces of a download between the network and the disk, each up to some 400 KiB. They are lost by
/// a kill; with what the journal does not know yet that is less than 8 MiB.
pub const PIECES: usize = 8;
/// Bytes read from a file or an archive at a time.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Time between two reports of progress: a person sees ten a second as smooth.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Notes of a pull, a sentence each; a pull of many peers without keys has one of each.
pub const NOTES: usize = 32;

/// Pulls at a time; each has a connection and a writer thread.
pub const PULLS: usize = 16;
/// Characters of a location's text.
pub const LOCATION_CHARS: usize = 4096;
/// Parts of a location.
pub const PARTS: usize = 1024;
