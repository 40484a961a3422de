//! A pull that is killed again and again, at moments that a seeded generator chooses. The child is
//! this very test executable, so the product has no hook for it.

use std::{
    io::{BufRead as _, BufReader},
    num::NonZeroU64,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use tempfile::TempDir;
use v4_pull::{Stage, Wish};
use v4_store::{Store, fs::RealFs, sha256};

use crate::{
    server::{Reply, Server},
    world::{World, bytes, config, name},
};

/// Tells a child which home and which server.
const CHILD: &str = "V4_PULL_KILL_TEST";
const SIZE: usize = 48 << 20;
const KILLS: usize = 20;
/// What a kill may cost.
const LOST: u64 = 8 << 20;

/// The child: pulls and says how far it is. Without the variable it is no child.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::disallowed_methods)] // How a test tells its child what to do.
async fn child() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let [url, digest, home] = order.splitn(3, ' ').collect::<Vec<_>>()[..] else {
        panic!("{order}")
    };
    let world = World::in_home(config("http://127.0.0.1:1"), Arc::new(RealFs), Path::new(home));
    let (digest, size) = (digest.parse().unwrap(), SIZE as u64);
    world.recipe_of("m", Some(digest), Some(size), &[url.to_owned()]);
    // Slow enough that a kill finds it at work.
    let wish = Wish { rate: NonZeroU64::new(48 << 20), ..Wish::default() };
    let mut watch = world.jobs.pull(&name("m"), wish).unwrap();
    while let Some(progress) = watch.next().await {
        if let Some(file) = progress.files.first() {
            println!("\ncompleted {}", file.completed);
        }
        assert!(!matches!(progress.stage, Stage::Failed(_)), "{progress:?}");
    }
}

/// Runs a child and kills it after so many reports; gives the last report, and whether it came to
/// its end before.
fn run(home: &Path, order: &str, n_reports: usize, spins: u64) -> (Vec<u64>, bool) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["kill::child", "--exact", "--test-threads=1", "--nocapture"])
        .env(CHILD, format!("{order} {}", home.display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut reports = Vec::new();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for line in lines.map_while(Result::ok) {
        if let Some(n) = line.strip_prefix("completed ") {
            reports.push(n.parse().unwrap());
            if reports.len() == n_reports {
                (0..spins).for_each(|_| std::thread::yield_now());
                child.kill().unwrap();
            }
        }
    }
    (reports, child.wait().unwrap().success())
}

#[test]
fn a_kill_at_any_moment_costs_little_and_never_a_wrong_byte() {
    let data = bytes(SIZE);
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    let order = format!("{}/f {}", server.url(), sha256(&data));
    let folder = TempDir::new().unwrap();
    let home = folder.path().join("home");
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let (mut last, mut n_kills) = (0, 0);
    while n_kills < KILLS {
        let n_reports = 2 + usize::try_from(random(4)).unwrap();
        let (reports, is_done) = run(&home, &order, n_reports, random(3000));
        // The first report that counts what is here already.
        if let Some(first) = reports.iter().find(|n| **n > 0) {
            assert!(*first + LOST >= last, "it was at {last} and went on at {first}");
        }
        last = reports.last().copied().unwrap_or(0).max(last);
        let store = Store::open(&home).unwrap();
        let record = store.find(&name("m")).unwrap();
        assert!(!is_done || record.is_some());
        if record.is_some() {
            store.verify(&sha256(&data)).unwrap();
            assert!(store.remove(&name("m")).unwrap());
            last = 0;
        }
        // A committed blob without a name is kept for the next pull; here it is to be fetched anew.
        if store.blob(&sha256(&data)).unwrap().is_some() {
            store.verify(&sha256(&data)).unwrap();
            store.prune(true).unwrap();
            last = 0;
        }
        n_kills += usize::from(!is_done);
    }
    let (_, is_done) = run(&home, &order, usize::MAX, 0);
    assert!(is_done);
    Store::open(&home).unwrap().verify(&sha256(&data)).unwrap();
}
