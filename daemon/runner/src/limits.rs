//! Bounds of a runner, each with its unit and the reason for its value.

use std::time::Duration;

/// Frames that wait for the socket. The daemon always reads; a full channel only holds the engine
/// until it does.
pub const FRAMES_OUT: usize = 1024;
/// Orders that wait for the engine: more than the daemon ever sends while one step runs.
pub const ORDERS: usize = 1024;
/// Between two `Stats`. The daemon takes ten missing ones for a hang.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// Between two `Progress` frames: often enough for a moving bar.
pub const PROGRESS: Duration = Duration::from_millis(100);
/// The longest that a drain may take: far beyond any answer, and within what a clock can count.
pub const DRAIN: Duration = Duration::from_hours(365 * 24);
/// What cancelled sequences get after the deadline of a drain; a cancel takes one step.
pub const CANCEL: Duration = Duration::from_secs(1);
/// What blocks of keys and values get to reach the disk before a drained runner leaves: less than
/// the two seconds that the daemon waits for it then.
pub const FLUSH: Duration = Duration::from_millis(1500);
