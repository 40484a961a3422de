//! The process aborts at every single change of the story in turn, a write in its middle. A child
//! is this very test executable, so the product has no hook for it.
//!
//! Seen red: with `Store::remove` collecting the blobs before it removes the manifest's file, the
//! abort between the two leaves a name whose blobs are gone. With `put_file` writing to its goal
//! instead of to the staging path, an abort in a write leaves a torn manifest and a torn blob.

use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    sync::Arc,
};

use tempfile::TempDir;
use v4_store::fs::{Fs, RealFs};

use crate::{
    fault_fs::{Fault, FaultFs},
    story,
};

/// Tells a child where its home is and at which change it ends.
const CHILD: &str = "V4_STORE_CRASH_TEST";

/// What [`std::process::abort`] raises.
const SIGABRT: i32 = 6;

/// The child: tells the story on a file system that aborts. Without the variable it is no child and
/// has nothing to do.
#[test]
#[allow(clippy::disallowed_methods)] // How a test tells its child what to do.
fn child() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let (at, home) = order.split_once(' ').unwrap();
    let fs: Arc<dyn Fs> = Arc::new(FaultFs::new(Fault::Abort, at.parse().unwrap()));
    story::tell(home.as_ref(), &fs).unwrap();
}

#[test]
fn a_kill_at_any_change_loses_nothing() {
    let real: Arc<dyn Fs> = Arc::new(RealFs);
    for at in 1.. {
        let folder = TempDir::new().unwrap();
        let home = folder.path().join("home");
        story::before(&home, Arc::clone(&real)).unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["crash::child", "--exact", "--test-threads=1"])
            .env(CHILD, format!("{at} {}", home.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        if status.success() {
            // It came to the end: there was no such change any more.
            assert!(at > 40, "the story has only {at} changes");
            return;
        }
        assert_eq!(status.signal(), Some(SIGABRT), "the child failed by itself at change {at}");
        println!("aborted at change {at}");
        story::check(&home, &real);
    }
}
