//! Connections that have asked something once and ask nothing now.

use std::io::{Read as _, Write as _};

use serde_json::json;
use v4_tests::process::memory;

use super::Args;
use super::server::{kept_home, start};

/// Connections.
const CONNECTIONS: usize = 1000;
/// A small request that leaves its connection open.
const REQUEST: &[u8] = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// Measures ours.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    let daemon = start(kept_home(), &[]);
    let failed = |error: std::io::Error| format!("a connection of {CONNECTIONS}: {error}");
    let before = resident(daemon.pid())?;
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut wire = daemon.tcp.connect().map_err(failed)?;
        wire.write_all(REQUEST).map_err(failed)?;
        let mut answer = [0; 512];
        let n = wire.read(&mut answer).map_err(failed)?;
        if !answer[..n].starts_with(b"HTTP/1.1 200") {
            return Err(format!("connection {} was not answered", open.len() + 1));
        }
        open.push(wire);
    }
    let with = resident(daemon.pid())?;
    let n = open.len();
    args.say(
        &format!(
            "idle     v4         {n} connections: {:.1} MB resident, {:.1} without them",
            with / 1e6,
            before / 1e6
        ),
        &json!({
            "part": "idle", "engine": "v4", "connections": n,
            "resident_bytes": with, "resident_bytes_without": before,
        }),
    );
    Ok(())
}

/// Bytes of a process that are in memory.
fn resident(pid: u32) -> Result<f64, String> {
    memory(pid, "VmRSS").map(|bytes| bytes as f64).ok_or_else(|| "the daemon has ended".to_owned())
}
