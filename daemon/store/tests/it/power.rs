//! The power is cut at every single change of the story in turn, and the disk comes back in each of
//! four ways. sled's own files are on the real disk; they are only an index.
//!
//! Seen red: without the sync of the data in `put_file`, a manifest comes back empty
//! (`NamesSurvive`). Without the sync of `blobs/` in `Partial::commit`, a manifest names a blob
//! that is gone (`Strict`). Without the sync of the folders in `Store::remove`, a name comes back
//! whose blobs are gone (`BlobsSurvive`). Without the sync before a commit, a blob comes back
//! empty.

use std::sync::Arc;

use tempfile::TempDir;
use v4_store::fs::Fs;

use crate::{
    memory_fs::{Cut, MemoryFs},
    story,
};

#[test]
fn a_power_cut_at_any_change_loses_nothing() {
    let folder = TempDir::new().unwrap();
    let home = folder.path().join("home");
    let start = MemoryFs::new(&home);
    story::before(&home, Arc::new(start.clone())).unwrap();
    for at in 1.. {
        let disk = start.with_power_until(at);
        let fs: Arc<dyn Fs> = Arc::new(disk.clone());
        if story::tell(&home, &fs).is_ok() {
            assert!(at > 40, "the story has only {at} changes");
            return;
        }
        for cut in [Cut::Strict, Cut::NamesSurvive, Cut::BytesSurvive, Cut::BlobsSurvive] {
            println!("power cut at change {at}, {cut:?}");
            let disk: Arc<dyn Fs> = Arc::new(disk.after(cut));
            story::check(&home, &disk);
        }
    }
}
