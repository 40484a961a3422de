//! Large files, read in several ranges at a time, with the faults of bad networks.

use std::{
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use v4_proto::Code;
use v4_pull::{Change, PullConfig, Stage, Wish};
use v4_store::fs::RealFs;

use crate::{
    server::{End, Reply, Request, Server},
    world::{World, bytes, config, name},
};

/// Large enough for several ranges.
const SIZE: usize = 40 << 20;

/// Bytes of the ranges that were asked for; one more often counts more often.
fn asked(server: &Server) -> usize {
    let len = |request: &Request| {
        let (start, end) = request.range().unwrap_or((0, None));
        end.unwrap_or(SIZE) - start
    };
    server.requests().iter().map(len).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_file_comes_in_ranges_and_nothing_twice() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file).header("ETag", "\"1\""));
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    let requests = server.requests();
    assert!(requests.len() >= 4, "{}", requests.len());
    assert!(requests.iter().all(|request| request.range().is_some()));
    assert_eq!(asked(&server), SIZE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_ranges_sends_one_stream() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |_| Reply::new(200, &file[..]));
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    assert!(server.requests().len() <= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_that_stalls_or_breaks_is_asked_for_again_alone() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| {
        let end = match request.n {
            1 => End::Stall(1 << 20),
            2 => End::Cut(1 << 20),
            3 => return Reply::new(503, ""),
            _ => End::Whole,
        };
        Reply::file(request, &file).end(end)
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    server.wait_until_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_range_than_was_asked_for_costs_that_range_only() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| match request.n {
        2 => Reply::new(206, &file[..]).header("Content-Range", format!("bytes 0-9/{SIZE}")),
        _ => Reply::file(request, &file),
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_that_expires_is_looked_up_again() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let epoch = Arc::new(AtomicUsize::new(0));
    let server = Server::start(move |request| {
        if request.path == "/f" {
            let now = epoch.load(Ordering::SeqCst);
            return Reply::new(302, "").header("Location", format!("/signed?{now}"));
        }
        // Each signature is good for three requests.
        if request.n >= 3 {
            let used: usize = request.path.strip_prefix("/signed?").unwrap().parse().unwrap();
            epoch.fetch_max(used + 1, Ordering::SeqCst);
            return Reply::new(403, "expired");
        }
        Reply::file(request, &file)
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    let lookups = server.requests().iter().filter(|request| request.path == "/f").count();
    assert!(lookups >= 2, "{lookups}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_that_is_cut_off_goes_on_with_what_every_range_had() {
    let patient =
        PullConfig { stall_timeout: Duration::from_hours(1), ..config("http://127.0.0.1:1") };
    let (world, data) = (World::of(patient, Arc::new(RealFs)), bytes(SIZE));
    let file = data.clone();
    let is_slow = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let slow = Arc::clone(&is_slow);
    let server = Server::start(move |request| {
        let is_first = request.n == 0;
        let end =
            if slow.load(Ordering::SeqCst) && !is_first { End::Stall(1 << 20) } else { End::Whole };
        Reply::file(request, &file).end(end)
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    let mut watch = world.start("m");
    // One whole range, and the first MiB of each of the four others.
    while watch.next().await.unwrap().files.first().is_none_or(|file| file.completed < 12 << 20) {}
    drop(watch);
    server.wait_until_left();
    let sent = server.body_bytes();
    is_slow.store(false, Ordering::SeqCst);
    world.pull_well("m").await;
    let again = server.body_bytes().saturating_sub(SIZE);
    assert!(again <= 8 << 20, "{again} of {sent} bytes were sent again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_in_one_range_never_become_a_blob() {
    let (world, data) = (World::new(), bytes(SIZE));
    let (file, mut wrong) = (data.clone(), data.clone());
    wrong[30 << 20] ^= 1;
    let server = Server::start(move |request| {
        Reply::file(request, if request.path == "/bad" { &wrong } else { &file })
    });
    let bad = format!("{}/bad", server.url());
    world.recipe("m", &data, std::slice::from_ref(&bad));
    world.pull_badly("m", Code::Corrupt, &["/bad"]).await;
    world.recipe("m", &data, &[bad, format!("{}/good", server.url())]);
    world.pull_well("m").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_is_paused_resumed_listed_and_cancelled() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    // So slow that it is not done before it is paused.
    let wish = Wish { rate: NonZeroU64::new(4 << 20), is_detached: true, ..Wish::default() };
    let mut watch = world.jobs.pull(&name("m"), wish.clone()).unwrap();
    let stage = async |watch: &mut v4_pull::Watch, is_it: fn(&Stage) -> bool| {
        loop {
            let progress = watch.next().await.unwrap();
            if is_it(&progress.stage) {
                return progress;
            }
        }
    };
    stage(&mut watch, |stage| matches!(stage, Stage::File(_))).await;
    world.jobs.change(&name("m"), Change::Pause).unwrap();
    let paused = stage(&mut watch, |stage| matches!(stage, Stage::Paused(None))).await;
    let listed = world.jobs.list();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].progress, paused);
    assert_eq!((listed[0].rate, listed[0].is_detached), (wish.rate, true));
    // Nobody watches, and it is still there.
    drop(watch);
    world.jobs.change(&name("m"), Change::Rate(None)).unwrap();
    world.jobs.change(&name("m"), Change::Resume).unwrap();
    world.pull_well("m").await;
    assert_eq!(world.jobs.list(), []);
    assert_eq!(world.jobs.change(&name("m"), Change::Pause).unwrap_err().code, Code::NotFound);

    let other = bytes(SIZE / 2);
    let file = other.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    world.recipe("n", &other, &[format!("{}/f", server.url())]);
    let watch = world.jobs.pull(&name("n"), wish.clone()).unwrap();
    world.jobs.change(&name("n"), Change::Cancel).unwrap();
    let Stage::Failed(fault) = watch.last().await.stage else { panic!("it went on") };
    assert_eq!(fault.code, Code::Cancelled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_asks_to_be_left_alone_is() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let refused = Arc::new(std::sync::Mutex::new(Vec::new()));
    let at = Arc::clone(&refused);
    let server = Server::start(move |request| {
        at.lock().unwrap().push(std::time::Instant::now());
        match request.n {
            3 => Reply::new(429, "").header("Retry-After", "2"),
            _ => Reply::file(request, &file),
        }
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    let began = std::time::Instant::now();
    world.pull_well("m").await;
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
    // Those that were on their way came; then nobody did for two seconds.
    let times = refused.lock().unwrap().clone();
    let longest = times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    assert!(longest >= Duration::from_millis(1900), "{longest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_that_lie_about_their_length_or_drip_cost_themselves_only() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| {
        let mut reply = Reply::file(request, &file);
        match request.n {
            1 => reply.content_length = Some(reply.body.len() / 2),
            2 => reply.content_length = Some(2 * reply.body.len()),
            3 => reply.end = End::Drip,
            4 => reply.end = End::DripHead,
            _ => {}
        }
        reply
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    server.wait_until_left();
    assert!(server.dripped() < 150, "{} bytes were waited for", server.dripped());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_in_the_middle_is_all_that_is_asked_for() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    let digest = world.recipe("m", &data, &[format!("{}/f", server.url())]);
    let key = format!("sha256-{}", digest.hex());
    let mut partial = world.store.partial(&key, Some(SIZE as u64)).unwrap();
    let gap = 8 << 20..9 << 20;
    partial.write_at(0, data[..gap.start].to_vec().into()).unwrap();
    partial.write_at(gap.end as u64, data[gap.end..].to_vec().into()).unwrap();
    partial.sync().unwrap();
    drop(partial);
    world.pull_well("m").await;
    assert_eq!(asked(&server), gap.len());
}
