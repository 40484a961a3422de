//! Bounds on what a client may cost, each with its unit and reason. Bounds on a request's content
//! (messages, stop strings) are [`v4_proto::limits`].

use std::time::Duration;

/// Connections open at a time, over all listeners, and at most three quarters of [`DESCRIPTORS`] as
/// far as the system grants them: the rest is for runners, pulls and the store. An idle one costs
/// some 20 KB of memory.
pub const CONNECTIONS: usize = 4096;

/// Descriptors that the daemon asks the system for; services start with 1,024 and may raise that
/// themselves.
pub const DESCRIPTORS: u64 = 8192;

/// Bytes of a request's line and headers together. Browsers and agents stay below 16 KiB.
pub const HEADER_BYTES: usize = 64 << 10;

/// Header lines of a request.
pub const HEADERS: usize = 100;

/// Bytes of a request's body. A conversation of this size has about eight million tokens, as many
/// as a frame to a runner carries.
pub const BODY_BYTES: usize = 32 << 20;

/// Bytes of a blob that are read at a time to be sent; a client that stalls holds as many.
pub const SEND_BYTES: u64 = 256 << 10;

/// How deep the JSON of a request may nest. Tool schemas in the wild stay below 20; the parser
/// itself ends at 128.
pub const JSON_DEPTH: usize = 96;

/// Values in the JSON of a request, about 100 bytes of memory each at worst. 16,384 messages of
/// eight fields are an eighth of it.
pub const JSON_VALUES: usize = 1 << 20;

/// Time from a connection's start, or the end of its last answer, to the last byte of the next
/// header. Also how long an idle connection is kept.
pub const HEADER_TIMEOUT: Duration = Duration::from_mins(1);

/// Time without a byte of a body that is still to come.
pub const BODY_STALL: Duration = Duration::from_secs(30);

/// Time without a byte taken by a client whose answer waits; then its connection is ended. The
/// supervisor cancels an answer earlier if its buffer of deltas is full before.
pub const WRITE_STALL: Duration = Duration::from_mins(1);

/// Time that running answers get to end after the first signal to stop.
pub const DRAIN: Duration = Duration::from_secs(10);

/// Pause after the system refused a connection (no descriptors left), so that the refusal is not
/// asked for in a busy loop.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bytes of a small role (template, system text, parameters, licence) that is read into memory.
/// The longest licences have 100 KiB.
pub const ROLE_BYTES: usize = 1 << 20;

/// Characters of a client's text that a message repeats.
pub const ECHO_CHARS: usize = 80;

/// Threads of the control plane: it copies bytes and waits, the arithmetic is in the runners.
pub const WORKER_THREADS: usize = 2;

/// Threads at most for calls that block: the store, and a writer for each pull. They are made when
/// needed and end when idle for ten seconds.
pub const BLOCKING_THREADS: usize = 64;

/// Models of a folder that are imported at once. Downloads keep some ten quants of one model
/// together.
pub const IMPORTS: usize = 64;
/// Lines of a model that is being made which may wait for their reader.
pub const CREATE_LINES: usize = 16;

/// Pieces of a blob that a client sends which may wait for the disk, each some 16 to 400 KiB.
pub const BLOB_PIECES: usize = 16;

/// Models whose figures are kept in memory, some 300 bytes each.
pub const KNOWN_MODELS: usize = 256;

/// Bytes above which a body counts as large.
pub const LARGE_BODY_BYTES: usize = 1 << 20;

/// Large bodies in memory at a time, until they are decoded: with that, a few hundred MiB at worst.
/// Others wait for [`BODY_STALL`], then they are refused with 503. A decoded request that waits for
/// its model is no longer counted here: the queue of the model bounds how many do.
pub const LARGE_BODIES: usize = 4;

/// Bytes of the file of settings; one that says everything has some 2 KiB, and 100 a model.
pub const CONFIG_BYTES: usize = 1 << 20;

/// Bytes of the file of keys; a line has some 130.
pub const KEYS_BYTES: usize = 1 << 20;

/// Keys at a time. Each is compared with the one that a request has: 1,024 take some microseconds.
pub const KEYS: usize = 1024;

/// Characters of a key's name.
pub const KEY_NAME_CHARS: usize = 64;

/// Time between two looks at whether somebody else changed the file of keys. A change by the
/// daemon itself, which is what `v4 keys` asks for, counts at once.
pub const KEYS_LOOK: Duration = Duration::from_millis(500);

/// Spans that wait for their collector, some 700 bytes each: a thousand answers of a moment.
pub const SPANS: usize = 4096;

/// Spans that are sent together.
pub const SPAN_BATCH: usize = 256;

/// Bytes of what the systems of a trace say to each other; W3C has them keep 512.
pub const TRACE_STATE_BYTES: usize = 512;

/// How long a span waits for others.
pub const SPAN_WAIT: Duration = Duration::from_millis(500);

/// What a collector gets to take them.
pub const SPAN_SEND: Duration = Duration::from_secs(5);

/// Sockets that a service manager may give: one of TCP, one of unix.
pub const LISTEN_SOCKETS: u32 = 2;

/// Connections of an old daemon that wait for the new one to take them up.
pub const GIVEN_CONNECTIONS: usize = 64;

/// Bytes of a packet between an old daemon and a new one: a message (128 pulls have some 60 KB), or
/// what was read of a connection, which is a header at most. The system takes some 200 KB at once.
pub const HANDOVER_BYTES: usize = 160 << 10;

/// Time that a daemon gets to read a packet of the other.
pub const HANDOVER_WORD: Duration = Duration::from_secs(5);

/// Time that a new daemon gets to take the listeners, and an old one to answer at all.
pub const HANDOVER_READY: Duration = Duration::from_secs(10);

/// Time between the last connection that an old daemon accepts and its asking whether requests are
/// under way: what was accepted is read by then.
pub const HANDOVER_PAUSE: Duration = Duration::from_millis(20);

/// Time that requests which use the store get to end while nobody accepts. Connections wait as
/// long; nearly all of these requests take milliseconds.
pub const HANDOVER_QUIET: Duration = Duration::from_secs(5);

/// Time between two looks at whether files and locks are free.
pub const HANDOVER_LOOK: Duration = Duration::from_millis(5);

/// Time that an old daemon gets to let go of its home: both times above, twice.
pub const HANDOVER_RELEASED: Duration = Duration::from_secs(15);

/// Time that a new daemon gets to open the home. It reads the index once.
pub const HANDOVER_SERVES: Duration = Duration::from_secs(20);

/// Time that the system gets to give the lock of a new daemon that died to the old one.
pub const HANDOVER_BACK: Duration = Duration::from_secs(10);

/// Time that the answers of an old daemon get to end. The longest that models write take minutes.
pub const HANDOVER_DRAIN: Duration = Duration::from_hours(1);

/// Time between two words of an old daemon about its memory.
pub const HANDOVER_MEMORY: Duration = Duration::from_millis(250);

/// Time that those who watched a pull at the old daemon get to watch it at the new one.
pub const HANDOVER_WATCHERS: Duration = Duration::from_secs(30);

/// Time that threads get to end at the very last; what still runs then is cut off.
pub const LAST_WAIT: Duration = Duration::from_secs(1);
