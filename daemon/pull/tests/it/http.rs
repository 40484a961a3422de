//! `http` and `file` sources, one fault a test.

use std::{io::Write as _, net::TcpListener, sync::Arc};

use v4_proto::Code;
use v4_pull::Stage;
use v4_store::{
    fs::{Fs as _, RealFs},
    sha256,
};

use crate::{
    fault_fs::{Fault, FaultFs},
    server::{End, Reply, Request, Server},
    world::{World, bytes, name},
};

/// Large enough for many pieces.
const SIZE: usize = 3 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_makes_a_name_and_a_second_one_asks_nobody() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    let digest = world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    let record = world.store.find(&name("m")).unwrap().unwrap();
    assert_eq!(record.manifest.layers[0].digest, digest);
    assert_eq!(record.manifest.layers[1].media_type, "application/vnd.ollama.image.license");
    let config = world.store.read_blob(&record.manifest.config.digest, 4096).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let expected = serde_json::json!({
        "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []},
        "model_format": "gguf", "model_family": "llama", "model_families": ["llama"],
        "model_type": "134.52M", "file_type": "Q4_1", "context_length": 8192,
        "embedding_length": 576, "capabilities": ["completion"],
    });
    assert_eq!(config, expected);
    assert!(world.store.inspection(&digest).is_some());
    world.pull_well("m").await;
    assert_eq!(server.requests().len(), 1);
    assert_eq!(world.oracle.n_asked.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_cannot_be_written_fails_no_pull() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    // In the way of the row count, which is written with each new row.
    RealFs.create_dir(&world.store.home().join("index/rows.new")).unwrap();
    let digest = world.recipe("m", &data, &[format!("{}/f", server.url())]);
    let inspection = crate::world::inspection(true);
    assert!(world.store.put_inspection(&sha256(b"x"), &inspection).is_err());
    world.pull_well("m").await;
    world.store.verify(&digest).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_cut_only_the_rest_is_fetched() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| {
        // More often than a source is tried that brings nothing.
        let end = if request.n < 7 { End::Cut(SIZE / 8) } else { End::Whole };
        Reply::file(request, &file).header("ETag", "\"one\"").end(end)
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    assert_eq!(server.body_bytes(), SIZE);
    let starts: Vec<_> = server.requests().iter().map(Request::start).collect();
    let expected: Vec<_> = (0..8).map(|n| (n > 0).then_some(n * SIZE / 8)).collect();
    assert_eq!(starts, expected);
    assert_eq!(server.requests()[1].headers.get("if-range").map(String::as_str), Some("\"one\""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_only_cuts_is_given_up_and_a_later_pull_goes_on() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| {
        let end = match request.n {
            0 => End::Cut(SIZE / 2),
            1..=3 => End::Cut(0),
            _ => End::Whole,
        };
        Reply::file(request, &file).end(end)
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_badly("m", Code::Upstream, &["/f", "pull again"]).await;
    assert_eq!(server.requests().len(), 4, "one that brings something, then three that do not");
    assert_eq!(world.partials(), 1);
    world.pull_well("m").await;
    assert_eq!(server.body_bytes(), SIZE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_is_noticed_and_gone_on_from() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| {
        let end = if request.n == 0 { End::Stall(SIZE / 2) } else { End::Whole };
        Reply::file(request, &file).end(end)
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    server.wait_until_left();
    assert_eq!(server.body_bytes(), SIZE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_drips_is_a_stall_however_often_a_byte_comes() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| {
        let end = match request.n {
            0 => End::Drip,
            1 => End::DripHead,
            _ => End::Whole,
        };
        Reply::file(request, &file).end(end)
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    server.wait_until_left();
    assert_eq!(server.requests().len(), 3);
    // 300 ms are patience for 15 bytes of each.
    assert!(server.dripped() < 150, "{} bytes were waited for", server.dripped());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_wrong_bytes_from_the_only_source_the_next_pull_begins_anew() {
    let (world, data) = (World::new(), bytes(SIZE));
    let (file, mut wrong) = (data.clone(), data.clone());
    wrong[5] ^= 1;
    let server = Server::start(move |request| {
        Reply::file(request, if request.n == 0 { &wrong } else { &file })
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_badly("m", Code::Corrupt, &["expected was", "pull again"]).await;
    assert_eq!(world.partials(), 0, "what is wrong would be in the way");
    world.pull_well("m").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_are_refused_with_both_digests_and_the_next_source_serves() {
    let (world, data) = (World::new(), bytes(SIZE));
    let mut wrong = data.clone();
    wrong[SIZE / 2] ^= 1;
    let (right, bad) = (data.clone(), wrong.clone());
    let server = Server::start(move |request| match request.path.as_str() {
        "/bad" => Reply::file(request, &bad),
        _ => Reply::file(request, &right),
    });
    let bad = format!("{}/bad", server.url());
    let digest = world.recipe("m", &data, std::slice::from_ref(&bad));
    let words = [&digest.to_string(), &sha256(&wrong).to_string(), bad.as_str()];
    world.pull_badly("m", Code::Corrupt, &words).await;
    assert_eq!(world.partials(), 0, "wrong bytes were kept");
    world.recipe("m", &data, &[bad, format!("{}/good", server.url())]);
    world.pull_well("m").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resume_from_wrong_bytes_begins_again() {
    let (world, data) = (World::new(), bytes(SIZE));
    let mut wrong = data.clone();
    wrong[7] ^= 1;
    let right = data.clone();
    let server = Server::start(move |request| match request.path.as_str() {
        // Leaves wrong bytes behind and never gets further.
        "/bad" if request.n == 0 => Reply::file(request, &wrong).end(End::Cut(SIZE / 2)),
        "/bad" => Reply::new(410, "gone"),
        _ => Reply::file(request, &right),
    });
    let sources = ["bad", "good"].map(|path| format!("{}/{path}", server.url()));
    world.recipe("m", &data, &sources);
    world.pull_well("m").await;
    let starts: Vec<_> = server.requests().iter().map(Request::start).collect();
    assert_eq!(starts, [None, Some(SIZE / 2), Some(SIZE / 2), None]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_range_than_was_asked_for_is_never_appended() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| match (request.n, request.start()) {
        (0, _) => Reply::file(request, &file).end(End::Cut(SIZE / 2)),
        // Claims to begin elsewhere, then ends before it begins, then says nothing at all.
        (1, _) => Reply::new(206, &file[..])
            .header("Content-Range", format!("bytes 0-{}/{SIZE}", SIZE - 1)),
        (2, Some(start)) => {
            Reply::new(206, "x").header("Content-Range", format!("bytes {start}-0/{SIZE}"))
        }
        (3, _) => Reply::new(206, &file[..]),
        _ => Reply::file(request, &file),
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_badly("m", Code::Upstream, &["another range"]).await;
    world.pull_well("m").await;
    assert_eq!(server.requests().last().unwrap().start(), Some(SIZE / 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_ranges_serves_all_the_same() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| {
        let end = if request.n == 0 { End::Cut(SIZE / 2) } else { End::Whole };
        Reply::new(200, &file[..]).end(end)
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_changes_under_the_download_is_begun_again() {
    let (world, data) = (World::new(), bytes(SIZE));
    let (file, old) = (data.clone(), vec![7; SIZE]);
    let server = Server::start(move |request| match request.n {
        0 => Reply::file(request, &old).header("ETag", "\"old\"").end(End::Cut(SIZE / 2)),
        // If-Range names the old tag, so the new file comes whole.
        1 => Reply::new(200, &file[..]).header("ETag", "\"new\""),
        _ => Reply::file(request, &file).header("ETag", "\"new\""),
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    assert_eq!(server.requests().last().unwrap().start(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_passing_status_is_tried_again_and_a_lasting_one_is_not() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| match (request.path.as_str(), request.n) {
        ("/f", 0) => Reply::new(429, "").header("Retry-After", "0"),
        ("/f", 1) | ("/busy", _) => Reply::new(503, ""),
        ("/f", _) => Reply::file(request, &file),
        _ => Reply::new(404, "nothing here"),
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    world.pull_well("m").await;
    world.recipe("gone", b"other", &[format!("{}/gone", server.url())]);
    world.pull_badly("gone", Code::Upstream, &["404", "/gone"]).await;
    world.recipe("busy", b"other", &[format!("{}/busy", server.url())]);
    world.pull_badly("busy", Code::Upstream, &["503"]).await;
    let n = |path| server.requests().iter().filter(|request| request.path == path).count();
    assert_eq!((n("/f"), n("/gone"), n("/busy")), (3, 1, 4));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redirects_are_followed_unless_they_run_in_a_circle() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| match request.path.as_str() {
        "/f" => Reply::file(request, &file),
        "/moved" => Reply::new(302, "").header("Location", "/f"),
        _ => Reply::new(302, "").header("Location", "/circle"),
    });
    world.recipe("circle", b"other", &[format!("{}/circle", server.url())]);
    world.pull_badly("circle", Code::Upstream, &["/circle"]).await;
    assert!(server.requests().len() < 20);
    world.recipe("m", &data, &[format!("{}/moved", server.url())]);
    world.pull_well("m").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lying_length_is_noticed() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| match request.path.as_str() {
        // Says all and sends half.
        "/half" => {
            let mut reply = Reply::new(200, &file[..SIZE / 2]);
            reply.content_length = Some(SIZE);
            reply
        }
        // Says half and has all.
        "/less" => {
            let mut reply = Reply::new(200, &file[..]);
            reply.content_length = Some(SIZE / 2);
            reply
        }
        // Another length than the recipe's, and the truth.
        "/short" => Reply::new(200, &file[..SIZE / 2]),
        _ => Reply::new(200, [&file[..], b"more"].concat()),
    });
    for (path, words) in [
        ("half", "broke off"),
        ("less", "expected were"),
        ("short", "expected were"),
        ("long", "expected were"),
    ] {
        world.recipe(path, &data, &[format!("{}/{path}", server.url())]);
        world.pull_badly(path, Code::Upstream, &[words]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_source_is_passed_over() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    // Port 1 of loopback: nobody listens.
    let dead = "http://127.0.0.1:1/f".to_owned();
    world.recipe("alone", b"other", std::slice::from_ref(&dead));
    world.pull_badly("alone", Code::Upstream, &["cannot reach 127.0.0.1:1"]).await;
    world.recipe("m", &data, &[dead, format!("{}/f", server.url())]);
    world.pull_well("m").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_source_is_remembered_and_tried_last() {
    let (world, one, two) = (World::new(), bytes(SIZE), bytes(SIZE / 2));
    // A port where nobody listens yet.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let files = [one.clone(), two.clone()];
    let server = Server::start(move |request| {
        Reply::file(request, if request.path == "/1" { &files[0] } else { &files[1] })
    });
    for (model, data, path) in [("a", &one, "1"), ("b", &two, "2")] {
        let sources = [format!("http://{address}/{path}"), format!("{}/{path}", server.url())];
        world.recipe(model, data, &sources);
    }
    world.pull_well("a").await;
    let late = Server::start_on(&TcpListener::bind(address).unwrap(), |_| Reply::new(404, ""));
    world.pull_well("b").await;
    assert_eq!(late.requests().len(), 0, "it was asked first again");
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_are_joined_and_a_resume_finds_its_part() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let third = SIZE / 3;
    let server = Server::start(move |request| match request.path.as_str() {
        "/0" => Reply::file(request, &file[..third]),
        "/1" if request.n == 0 => {
            Reply::file(request, &file[third..2 * third]).end(End::Cut(third / 2))
        }
        "/1" if request.n < 5 => Reply::new(503, ""),
        "/1" => Reply::file(request, &file[third..2 * third]),
        _ => Reply::file(request, &file[2 * third..]),
    });
    let parts = ["0", "1", "2"].map(|path| format!("{}/{path}", server.url())).join(" ");
    world.recipe("m", &data, &[parts]);
    world.pull_badly("m", Code::Upstream, &["503"]).await;
    world.pull_well("m").await;
    assert_eq!(server.body_bytes(), SIZE, "something was fetched twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_file_is_copied_and_checked() {
    let (world, data) = (World::new(), bytes(SIZE));
    let path = world.folder.path().join("model.gguf");
    RealFs.open(&path).unwrap().write_all(&data).unwrap();
    world.recipe("m", &data, &[format!("file:{}", path.display())]);
    world.pull_well("m").await;
    world.recipe("gone", b"other", &["file:/nowhere/model.gguf".to_owned()]);
    world.pull_badly("gone", Code::Disk, &["/nowhere/model.gguf"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_digest_what_comes_is_taken_but_never_mixed() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let server = Server::start(move |request| match request.n {
        0 => Reply::new(200, vec![7; SIZE]).end(End::Cut(SIZE / 2)),
        1..=3 => Reply::new(503, ""),
        _ => Reply::file(request, &file),
    });
    world.recipe_of("m", None, None, &[format!("{}/f", server.url())]);
    world.pull_badly("m", Code::Upstream, &["503"]).await;
    let progress = world.pull_well("m").await;
    assert_eq!(progress.files[0].digest, Some(sha256(&data)));
    assert_eq!(server.requests().last().unwrap().start(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_pauses_the_pull_and_room_lets_it_go_on() {
    let fs = FaultFs::new(Fault::DiskFull, u64::MAX);
    let world = World::with("http://127.0.0.1:1", Arc::new(fs.clone()));
    let data = bytes(20 << 20);
    let file = data.clone();
    let full = fs.clone();
    let server = Server::start(move |request| {
        if request.n == 0 {
            // There was room when it was asked for; then somebody else took it.
            full.fail_after(12 << 20);
        }
        Reply::file(request, &file)
    });
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    let mut watch = world.start("m");
    loop {
        let progress = watch.next().await.unwrap();
        assert!(!progress.is_last(), "{progress:?}");
        if let Stage::Paused(Some(why)) = &progress.stage {
            assert!(why.contains("disk is full"), "{why}");
            break;
        }
    }
    fs.heal();
    let progress = world.follow(watch).await;
    assert!(matches!(progress.stage, Stage::Done { .. }), "{progress:?}");
    assert!(server.body_bytes() <= SIZE_ON_FULL_DISK, "{} were sent", server.body_bytes());
}

/// Twenty MiB, and what was on its way when the disk was full: eight ranges.
const SIZE_ON_FULL_DISK: usize = 2 * (20 << 20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_little_room_is_said_before_the_first_byte() {
    let fs = FaultFs::new(Fault::DiskFull, u64::MAX);
    let world = World::with("http://127.0.0.1:1", Arc::new(fs.clone()));
    let data = bytes(SIZE);
    let file = data.clone();
    let server = Server::start(move |request| Reply::file(request, &file));
    world.recipe("m", &data, &[format!("{}/f", server.url())]);
    fs.fail_after(1 << 20);
    world.pull_badly("m", Code::Disk, &["3.1 MB more are needed", "1.0 MB free"]).await;
    assert_eq!(server.requests().len(), 0);
    fs.heal();
    world.pull_well("m").await;
}
