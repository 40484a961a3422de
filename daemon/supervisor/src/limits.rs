//! Bounds of the supervisor, each with its unit and the reason for its value.

use std::time::Duration;

/// Asks that wait for the owner task, of all clients. It answers within microseconds, so a full
/// mailbox is a flood.
pub const MAILBOX_MESSAGES: usize = 1024;
/// Reports of runners that wait for the owner task.
pub const REPORTS: usize = 1024;
/// Commands that wait for one runner's link. A link answers at once; more than this is our own
/// mistake.
pub const LINK_COMMANDS: usize = 1024;
/// Frames that wait for one runner's socket. A runner that leaves so many unread hangs.
pub const LINK_FRAMES: usize = 1024;
/// Deltas a client may leave unread before it counts as slow: half a minute at 140 tokens a second.
pub const EVENTS_PER_REQUEST: usize = 4096;

/// From the start of a process to its `Hello`. A cold binary on a slow disk needs seconds.
pub const HANDSHAKE: Duration = Duration::from_secs(20);
/// A load that reports no progress for so long is a hang.
pub const LOAD_STALL: Duration = Duration::from_mins(2);
/// From `Inspect` to `Info`: only a header is read.
pub const INSPECT: Duration = Duration::from_secs(30);
/// Short-lived runners that inspect at a time. More would only share the same cores.
pub const INSPECTORS: usize = 2;
/// No frame for so long with work in flight is a hang; ten heartbeats.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
/// No new step for so long with work in flight is a hang. One step may be a prefill chunk of a
/// large model on few cores.
pub const STEP_STALL: Duration = Duration::from_mins(3);
/// Between the end of a runner's socket and the end of its process; then it is killed.
pub const EXIT: Duration = Duration::from_secs(2);
/// From the end of a process to the end of its standard error, which a grandchild could hold open.
pub const STDERR_END: Duration = Duration::from_millis(500);
/// What an idle runner gets to leave in order.
pub const STOP: Duration = Duration::from_secs(5);
/// What the old runner of a swap gets to finish its answers.
pub const SWAP_DRAIN: Duration = Duration::from_mins(2);
/// So long after a swap, a request for the replaced files counts as one that looked its model up
/// before it: an inspection and the wait for one lie between at most.
pub const STALE_ASK: Duration = Duration::from_mins(1);
/// A place in the queue is given up after so long: loads of large models from slow disks included.
pub const QUEUE_WAIT: Duration = Duration::from_mins(5);

/// How long a request in the background stays behind the others; as the engine has it.
pub const AGEING: Duration = Duration::from_secs(20);

/// Places beyond a model's queue, one a caller that has no ask in it: a client that fills the queue
/// does not lock the others out.
pub const NEWCOMERS: usize = 64;
/// Each answer that a caller has running puts its next one so far back behind those of others.
pub const RUNNING_SETS_BACK: Duration = Duration::from_secs(5);

/// A model in use keeps its memory, while another waits for it, for so many times the price of the
/// swap, which is both loads: swaps then take no more than a fifth of the time.
pub const QUANTUM_PRICES: u32 = 4;
/// The longest that it keeps it: what a person waits for a slow model without giving up.
pub const QUANTUM_MAX: Duration = Duration::from_mins(1);
/// So much waiting is a step of a model's priority worth: a model of the next lower one that has
/// waited for longer is before it.
pub const PRIORITY_STEP: Duration = Duration::from_secs(20);
/// A load is thought to read so many bytes a second until one was measured: a plain solid-state
/// disk.
pub const WAKE_BYTES_PER_S: u64 = 1 << 30;
/// After so long an ask counts half: what was used an hour ago says little of now.
pub const ASKS_HALF_LIFE: Duration = Duration::from_mins(10);
/// A model is worth its memory if it is asked for within so long: the usual keep-alive.
pub const FORESIGHT: Duration = Duration::from_mins(5);
/// Models whose use is remembered after they have left memory, some 300 bytes each.
pub const REMEMBERED_MODELS: usize = 256;
/// Decisions that are remembered of each of them for `v4 why`, some 200 bytes each.
pub const REMEMBERED_DECISIONS: usize = 32;
/// The last gaps between asks of a model whose median counts: enough that one long pause does not.
pub const REMEMBERED_GAPS: usize = 5;

/// The first wait before a model whose runner died is loaded again; doubled for each further death.
pub const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// The longest such wait.
pub const BACKOFF_LAST: Duration = Duration::from_mins(1);
/// So many deaths within [`DEATH_WINDOW`] put a model out of service.
pub const DEATHS: usize = 3;
/// The window of [`DEATHS`], and how long the model stays out of service.
pub const DEATH_WINDOW: Duration = Duration::from_mins(5);

/// Models whose figures are counted by name, some 700 bytes each; those beyond are counted
/// together. A collector of metrics keeps each name as some 90 time series.
pub const COUNTED_MODELS: usize = 128;

/// Bytes of a runner's standard error that are kept.
pub const STDERR_BYTES: usize = 64 << 10;
/// Lines of it that go to the log at a death.
pub const STDERR_LINES: usize = 20;

/// Bytes for activations, logits and the process itself, beside weights and KV.
pub const SCRATCH_BYTES: u64 = 128 << 20;
/// Bytes of each GPU that are left alone: what a process takes there beside what is planned, and
/// what the driver calls used and is not. An assumption: it was never measured on a device.
pub const GPU_RESERVE_BYTES: u64 = 512 << 20;
/// GPUs that are remembered, those that have gone counted in: what a driver lists, twice.
pub const DEVICES: usize = 128;
/// GPUs that one model is spread over at most, of the ablest: every set of them is looked at.
pub const SPLIT_DEVICES: usize = 8;
/// Between two looks at what others use of the GPUs, while a model is loaded: a person who starts
/// another program waits for its memory this long, twice.
pub const DEVICES_POLL: Duration = Duration::from_secs(3);
/// What the answer to such a look gets before an ask goes on without it: a driver that has to wake
/// its devices takes a second.
pub const DEVICES_WAIT: Duration = Duration::from_secs(2);
/// The share of the available memory that models may take, in percent, where the configuration does
/// not say: the rest is for the page cache of everybody else.
pub const MEMORY_SHARE_PERCENT: u64 = 85;
/// Bytes read of one file of `/proc` or of a control group.
pub const INVENTORY_FILE_BYTES: usize = 1 << 20;
