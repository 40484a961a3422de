//! Jobs: one a name, many watchers, and what comes after the files.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use v4_proto::{Code, Fault};
use v4_pull::{PullConfig, Stage, Wish};
use v4_store::fs::RealFs;

use crate::{
    server::{End, Reply, Server},
    world::{World, bytes, config, inspection, name},
};

const SIZE: usize = 3 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_who_watch_share_one_job() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    let one = world.start("m");
    let two = world.start("m");
    let (one, two) = tokio::join!(one.last(), two.last());
    assert_eq!(one, two);
    assert!(matches!(one.stage, Stage::Done { .. }), "{one:?}");
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_names_with_one_file_fetch_it_once() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    for model in ["m:a", "m:b"] {
        world.recipe(model, &data, &[format!("{}/f", server.url())]);
    }
    let one = world.start("m:a");
    let two = world.start("m:b");
    let (one, two) = tokio::join!(one.last(), two.last());
    assert!(matches!(one.stage, Stage::Done { .. }), "{one:?}");
    assert!(matches!(two.stage, Stage::Done { .. }), "{two:?}");
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_to_leave_cancels_and_the_next_goes_on() {
    // Only a cancelled pull leaves the stalled server early.
    let patient =
        PullConfig { stall_timeout: Duration::from_hours(1), ..config("http://127.0.0.1:1") };
    let (world, data) = (World::of(patient, Arc::new(RealFs)), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| {
        let end = if request.n == 0 { End::Stall(SIZE / 2) } else { End::Whole };
        Reply::file(request, &file).end(end)
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    let mut one = world.start("m");
    let two = world.start("m");
    while one.next().await.unwrap().files.first().is_none_or(|file| file.completed == 0) {}
    drop(one);
    assert_eq!(server.requests().len(), 1, "the pull ended although somebody watches");
    drop(two);
    server.wait_until_left();
    assert_eq!(world.store.find(&name("m")).unwrap(), None);
    world.pull_well("m").await;
    let start = server.requests()[1].start();
    assert!(start.is_some_and(|start| start > 0), "{start:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_nobody_knows_is_told_what_there_is() {
    let world = World::new();
    world.recipe("smollm2", b"x", &[]);
    world.recipe("gemma3:270m", b"y", &[]);
    let fault = world.jobs.pull(&name("nonsense"), Wish::default()).unwrap_err();
    assert_eq!(fault.code, Code::NotFound);
    assert!(fault.message.contains("'nonsense:latest' not found"), "{fault}");
    assert!(fault.message.contains("smollm2") && fault.message.contains("gemma3"), "{fault}");
    world.pull_badly("smollm2", Code::NotFound, &["no source"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unsupported_model_is_kept_and_said() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    world.recipe("m:a", &data, &[format!("{}/f", server.url())]);
    *world.oracle.says.lock().unwrap() = Ok(inspection(false));
    // The second pull finds everything here and says it again.
    for _ in 0..2 {
        let progress = world.pull_well("m:a").await;
        let Stage::Done { unsupported: Some(why), .. } = progress.stage else {
            panic!("{progress:?}")
        };
        assert!(why.contains("llama"), "{why}");
    }
    let other = bytes(SIZE / 2);
    let file = other.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    world.recipe("m:b", &other, &[format!("{}/f", server.url())]);
    let fault = Fault::new(Code::Unsupported, "a format of the future");
    *world.oracle.says.lock().unwrap() = Err(fault);
    let progress = world.pull_well("m:b").await;
    assert!(
        matches!(&progress.stage, Stage::Done { unsupported: Some(why), .. } if why.contains("future")),
        "{progress:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_inspection_fails_the_pull_and_costs_no_download() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    *world.oracle.says.lock().unwrap() = Err(Fault::new(Code::RunnerDied, "it died"));
    world.pull_badly("m", Code::RunnerDied, &["it died"]).await;
    *world.oracle.says.lock().unwrap() = Ok(inspection(true));
    world.pull_well("m").await;
    assert_eq!(server.requests().len(), 1);
    assert_eq!(world.oracle.n_asked.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_is_removed_meanwhile_takes_nothing_from_a_pull() {
    let (world, shared, other) = (World::new(), bytes(SIZE), bytes(SIZE / 2));
    let (one, two, store) = (shared.clone(), other.clone(), Arc::clone(&world.store));
    let server = Server::start(move |request| {
        if request.path == "/shared" {
            return Reply::file(request, &one);
        }
        // The pull has found the shared file in the store; now its only name goes.
        assert!(store.remove(&name("m:a")).unwrap());
        Reply::file(request, &two)
    });
    world.recipe("m:a", &shared, &[format!("{}/shared", server.url())]);
    world.recipe("m:b", &other, &[format!("{}/other", server.url())]);
    world.also("m:b", "m:a");
    world.pull_well("m:a").await;
    world.pull_well("m:b").await;
    assert_eq!(world.store.find(&name("m:a")).unwrap(), None);
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_pull_never_stands_in_the_way_of_the_next() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    for _ in 0..20 {
        let mut watch = world.start("m");
        watch.next().await;
        watch.next().await;
    }
    world.pull_well("m").await;
}
