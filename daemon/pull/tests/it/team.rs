//! Several places at once: fast and slow ones, those that die, and those that lie.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use v4_proto::Code;
use v4_pull::{PullConfig, Stage, Wish};
use v4_store::{fs::RealFs, sha256};

use crate::{
    server::{End, Reply, Request, Server},
    world::{World, bytes, config, name},
};

/// Five parts of a chain.
const SIZE: usize = 40 << 20;
/// What a chain tells apart.
const PART: usize = 8 << 20;

/// Serves a file, whatever is asked for, with this end.
fn serve(file: &[u8], end: End) -> Server {
    let file = file.to_vec();
    Server::start(move |request| Reply::file(request, &file).end(end))
}

fn urls(servers: &[&Server]) -> Vec<String> {
    servers.iter().map(|server| format!("{}/f", server.url())).collect()
}

/// Bytes of the ranges that were asked for.
fn asked(server: &Server) -> usize {
    let len = |request: &Request| {
        let (start, end) = request.range().unwrap_or((0, None));
        end.unwrap_or(SIZE) - start
    };
    server.requests().iter().map(len).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fast_one_brings_most_and_the_slow_one_holds_up_nothing() {
    let (world, data) = (World::new(), bytes(SIZE));
    // 400 KB a second: alone it would take 100 s, and its first range 20 s.
    let (slow, fast) = (serve(&data, End::Slow(400)), serve(&data, End::Whole));
    world.recipe("m", &data, &urls(&[&slow, &fast]));
    world.pull_well("m").await;
    // Its first range is taken from it half by half.
    assert!(slow.slow_bytes() < PART, "{} bytes were waited for", slow.slow_bytes());
    assert!(!slow.requests().is_empty(), "both are asked");
    assert!(asked(&fast) > SIZE / 2, "{}", asked(&fast));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_dies_on_the_way_costs_no_more_than_what_it_had() {
    let (world, data) = (World::new(), bytes(SIZE));
    let file = data.clone();
    let dies = Server::start(move |request| {
        let end = if request.n < 2 { End::Cut(2 << 20) } else { End::Gone };
        Reply::file(request, &file).end(end)
    });
    let lives = serve(&data, End::Whole);
    world.recipe("m", &data, &urls(&[&dies, &lives]));
    world.pull_well("m").await;
    let sent = dies.body_bytes() + lives.body_bytes();
    // A range that takes long on a busy machine is halved, and half of it counts twice.
    assert!(sent <= SIZE + PART, "{sent} bytes were sent");
    // Where nobody is left, it is said, and what came stays.
    let (one, two) = (serve(&data, End::Gone), serve(&data, End::Gone));
    let other = [&data[..], b"x"].concat();
    world.recipe("n", &other, &urls(&[&one, &two]));
    world.pull_badly("n", Code::Upstream, &["broke off"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn places_that_do_not_have_it_or_have_another_size_are_passed_over() {
    let (world, data) = (World::new(), bytes(SIZE));
    let none = Server::start(|_| Reply::new(404, ""));
    let short = serve(&data[..SIZE / 2], End::Whole);
    let file = data.clone();
    let without_ranges = Server::start(move |_| Reply::new(200, &file[..]).end(End::Cut(1 << 20)));
    let good = serve(&data, End::Whole);
    let dead = "http://127.0.0.1:1/f".to_owned();
    let sources = [vec![dead], urls(&[&none, &short, &without_ranges, &good])].concat();
    world.recipe("m", &data, &sources);
    world.pull_well("m").await;
    assert!(asked(&good) >= SIZE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_lies_is_found_without_a_chain_whoever_is_named_first() {
    let data = bytes(SIZE);
    let mut wrong = data.clone();
    wrong.iter_mut().step_by(100_000).for_each(|byte| *byte ^= 1);
    for is_first in [true, false] {
        let world = World::new();
        let (liar, good) = (serve(&wrong, End::Whole), serve(&data, End::Whole));
        let order = if is_first { [&liar, &good] } else { [&good, &liar] };
        world.recipe("m", &data, &urls(&order));
        world.pull_well("m").await;
        assert!(asked(&good) <= 2 * SIZE, "{}", asked(&good));
    }
    // Two that lie alike are a failure that names one of them, and the next pull may do better.
    let world = World::new();
    let liars = [serve(&wrong, End::Whole), serve(&wrong, End::Whole)];
    let sources = urls(&[&liars[0], &liars[1]]);
    world.recipe("m", &data, &sources);
    world.pull_badly("m", Code::Corrupt, &["is not what it must be", "/f"]).await;
    assert_eq!(world.partials(), 0);
    let good = serve(&data, End::Whole);
    world.recipe("m", &data, &[sources, urls(&[&good])].concat());
    world.pull_well("m").await;
}

/// The chain of these bytes, made as a store makes it.
async fn chain(data: &[u8]) -> Vec<u8> {
    let (world, server) = (World::new(), serve(data, End::Whole));
    world.recipe("m", data, &urls(&[&server]));
    world.pull_well("m").await;
    world.store.chain(&sha256(data), data.len() as u64).unwrap().unwrap().encode()
}

/// A peer with a file and a chain.
fn peer(file: &[u8], chain: Vec<u8>) -> Server {
    let file = file.to_vec();
    Server::start(move |request| {
        if request.path.starts_with("/api/chains/sha256:") {
            return Reply::new(200, chain.clone());
        }
        assert!(request.path.starts_with("/v2/v4/peer/blobs/sha256:"), "{}", request.path);
        Reply::file(request, &file)
    })
}

fn with_peer(server: &Server) -> World {
    let peers = vec![server.url().to_owned()];
    World::of(PullConfig { peers, ..config("http://127.0.0.1:1") }, Arc::new(RealFs))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_chain_the_liar_is_found_at_once_and_asked_no_more() {
    let data = bytes(SIZE);
    let mut wrong = data.clone();
    // Whatever it brings has a wrong byte.
    wrong.iter_mut().step_by(1 << 20).for_each(|byte| *byte ^= 1);
    let chain = chain(&data).await;
    // Whoever of them lies, the peer's chain tells what of it is wrong.
    for peer_lies in [true, false] {
        let (of_peer, of_source) = if peer_lies { (&wrong, &data) } else { (&data, &wrong) };
        let is_told = Arc::new(AtomicBool::new(false));
        let later = Arc::new(Mutex::new(Vec::new()));
        let serve = |file: &Vec<u8>, is_liar: bool| {
            let (file, chain) = (file.clone(), chain.clone());
            let (is_told, later) = (Arc::clone(&is_told), Arc::clone(&later));
            Server::start(move |request| {
                if request.path.starts_with("/api/chains") {
                    is_told.store(true, Ordering::SeqCst);
                    return Reply::new(200, chain.clone());
                }
                if is_told.load(Ordering::SeqCst) {
                    later.lock().unwrap().push(is_liar);
                }
                Reply::file(request, &file)
            })
        };
        let (near, far) = (serve(of_peer, peer_lies), serve(of_source, !peer_lies));
        let world = with_peer(&near);
        world.recipe("m", &data, &urls(&[&far]));
        world.pull_well("m").await;
        assert!(is_told.load(Ordering::SeqCst), "nobody asked for the chain");
        let later = later.lock().unwrap();
        assert!(!later.is_empty() && !later.contains(&true), "{later:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_that_lies_costs_time_and_nothing_else() {
    let data = bytes(SIZE);
    let mut false_chain = chain(&data).await;
    false_chain[70] ^= 1;
    let (near, far) = (peer(&data, false_chain), serve(&data, End::Whole));
    let world = with_peer(&near);
    world.recipe("m", &data, &urls(&[&far]));
    world.pull_well("m").await;
    // Nobody lies about bytes, so nobody asks for it; beside a liar it only misleads.
    let mut wrong = data.clone();
    wrong.iter_mut().step_by(100_000).for_each(|byte| *byte ^= 1);
    let mut false_chain = chain(&data).await;
    false_chain[70] ^= 1;
    let near = peer(&wrong, false_chain);
    let world = with_peer(&near);
    world.recipe("m", &data, &urls(&[&far]));
    world.pull_well("m").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_that_came_wrong_once_is_mended_from_the_same_place_where_a_chain_is_here() {
    let (world, data) = (World::new(), bytes(SIZE));
    let (file, n_bad) = (data.clone(), Arc::new(AtomicUsize::new(0)));
    let bad = Arc::clone(&n_bad);
    let server = Server::start(move |request| {
        let mut reply = Reply::file(request, &file);
        if bad.load(Ordering::SeqCst) > 0 {
            bad.fetch_sub(1, Ordering::SeqCst);
            reply.body[100] ^= 1;
        }
        reply
    });
    let digest = world.recipe("m", &data, &urls(&[&server]));
    world.pull_well("m").await;
    // The blob is damaged, and what mends it comes wrong the first time.
    let path = world.store.blob_path(&digest);
    {
        use std::io::{Seek as _, SeekFrom, Write as _};
        use v4_store::fs::Fs as _;
        RealFs.set_mode(&path, 0o600).unwrap();
        let mut file = RealFs.open(&path).unwrap();
        file.seek(SeekFrom::Start(9 << 20)).unwrap();
        file.write_all(b"damage").unwrap();
    }
    n_bad.store(1, Ordering::SeqCst);
    let before = server.body_bytes();
    world.pull_well("m").await;
    let sent = server.body_bytes() - before;
    assert!(sent <= 3 * PART, "{sent} bytes were sent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_may_be_said_for_one_pull_and_must_be_an_address() {
    let (world, data) = (World::new(), bytes(1000));
    let near = peer(&data, Vec::new());
    world.recipe("m", &data, &["http://127.0.0.1:1/f".to_owned()]);
    let with = |peer: &str| Wish { peers: vec![peer.to_owned()], ..Wish::default() };
    let refused = world.jobs.pull(&name("m"), with("near")).unwrap_err();
    assert_eq!(refused.code, Code::Invalid);
    let watch = world.jobs.pull(&name("m"), with(near.url())).unwrap();
    let progress = world.follow(watch).await;
    assert!(matches!(progress.stage, Stage::Done { .. }), "{progress:?}");
}
