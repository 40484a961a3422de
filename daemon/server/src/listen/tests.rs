//! Real sockets: slow clients, odd clients, and the stop.

use std::{os::unix::fs::PermissionsExt, path::PathBuf};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::{TcpStream, UnixStream},
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};
use v4_proto::Ability;

use super::*;
use crate::fixture::Fixture;

/// Enough for anything here on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// A server on a port of its own.
struct Server {
    address: SocketAddr,
    socket: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    now: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
    // Its home lives as long as it does.
    _fixture: Fixture,
    _folder: tempfile::TempDir,
}

/// Ends when the other half says so; never when it is dropped.
async fn told(receiver: oneshot::Receiver<()>) {
    if receiver.await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn server(times: Times) -> Server {
    let fixture = Fixture::new(Duration::from_millis(100));
    fixture.store("m", &[Ability::Completion], &[]);
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("run/v4.sock");
    let tcp = super::tcp("127.0.0.1:0".parse().expect("an address")).await.expect("a port");
    let address = tcp.local_addr().expect("bound");
    let unix = super::unix(&socket).expect("a socket");
    let (stop, stopped) = oneshot::channel();
    let (now, at_once) = oneshot::channel();
    let listeners = Listeners { tcp: Some(tcp), unix, keeps_socket: false };
    let service = Arc::clone(&fixture.service);
    let task = tokio::spawn(async move {
        let mut server = super::Server::new(service, times);
        server.serve(&listeners, told(stopped)).await;
        drop(listeners);
        server.end(told(at_once)).await;
    });
    let (stop, now) = (Some(stop), Some(now));
    Server { address, socket, stop, now, task, _fixture: fixture, _folder: folder }
}

impl Server {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("a connection")
    }

    async fn ended(self) {
        timeout(DEADLINE, self.task).await.expect("an end in time").expect("no panic");
    }
}

fn quick() -> Times {
    let ms = Duration::from_millis;
    Times { header: ms(100), write_stall: ms(100), drain: ms(100) }
}

/// What comes until the connection ends.
async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut all = Vec::new();
    // A connection that is cut may end in a reset.
    drop(timeout(DEADLINE, stream.read_to_end(&mut all)).await.expect("an end in time"));
    String::from_utf8(all).expect("UTF-8")
}

/// What comes until it contains `words`.
async fn until(stream: &mut (impl AsyncRead + Unpin), words: &str) -> String {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let n = timeout(DEADLINE, stream.read(&mut buffer)).await.expect("in time").expect("bytes");
        all.extend_from_slice(&buffer[..n]);
        let text = String::from_utf8_lossy(&all);
        if text.contains(words) {
            return text.into_owned();
        }
        assert!(n > 0, "ended after {text}");
    }
}

const ALIVE: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

#[tokio::test]
async fn a_header_that_does_not_end_ends_the_connection() {
    let server = server(quick()).await;
    let mut slow = server.connect().await;
    slow.write_all(b"GET / HTTP/1.1\r\nHost: local").await.expect("sent");
    let mut quick = server.connect().await;
    quick.write_all(ALIVE).await.expect("sent");
    until(&mut quick, "Ollama is running").await;
    let text = rest(&mut slow).await;
    assert!(!text.contains("200 OK"), "{text}");
}

#[tokio::test]
async fn one_connection_carries_many_requests() {
    let server = server(Times::default()).await;
    let mut stream = server.connect().await;
    for _ in 0..3 {
        stream.write_all(ALIVE).await.expect("sent");
        until(&mut stream, "Ollama is running").await;
    }
    stream
        .write_all(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .await
        .expect("sent");
    let text = rest(&mut stream).await;
    assert!(text.contains("content-length: 17") && text.ends_with("\r\n\r\n"), "{text}");
}

#[tokio::test]
async fn a_body_that_stalls_is_answered_with_408() {
    let server = server(Times::default()).await;
    let mut stream = server.connect().await;
    let head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{";
    stream.write_all(head).await.expect("sent");
    let text = until(&mut stream, "slow_client").await;
    assert!(text.starts_with("HTTP/1.1 408"), "{text}");
}

#[tokio::test]
async fn headers_have_their_limits() {
    let server = server(Times::default()).await;
    let long = "a".repeat(2 * limits::HEADER_BYTES);
    let many = "a: b\r\n".repeat(2 * limits::HEADERS);
    for extra in [format!("x: {long}\r\n"), many] {
        let mut stream = server.connect().await;
        let head = format!("GET / HTTP/1.1\r\nHost: localhost\r\n{extra}\r\n");
        stream.write_all(head.as_bytes()).await.expect("sent");
        let text = until(&mut stream, "\r\n\r\n").await;
        assert!(text.starts_with("HTTP/1.1 431"), "{text}");
    }
}

#[tokio::test]
async fn what_is_no_http_harms_nobody() {
    let server = server(Times::default()).await;
    let mut state = 7_u64;
    for _ in 0..50 {
        let mut noise = [0; 256];
        for byte in &mut noise {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = state.to_le_bytes()[7];
        }
        let mut stream = server.connect().await;
        stream.write_all(&noise).await.expect("sent");
        stream.write_all(b"\r\n\r\n").await.expect("sent");
        stream.shutdown().await.expect("shut");
        rest(&mut stream).await;
    }
    let mut stream = server.connect().await;
    stream.write_all(ALIVE).await.expect("sent");
    until(&mut stream, "Ollama is running").await;
}

#[tokio::test]
async fn the_unix_socket_is_for_its_owner() {
    let server = server(Times::default()).await;
    let meta = server.socket.symlink_metadata().expect("a socket");
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    let mut stream = UnixStream::connect(&server.socket).await.expect("a connection");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: anything.example\r\n\r\n").await.expect("sent");
    until(&mut stream, "Ollama is running").await;
    // Somebody answers there: it is not taken away.
    let error = super::unix(&server.socket).expect_err("refused");
    assert!(matches!(error, Error::SocketTaken { .. }), "{error}");
}

#[tokio::test]
async fn a_socket_that_was_left_behind_is_replaced_and_a_file_is_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("v4.sock");
    drop(super::unix(&path).expect("a socket"));
    assert!(path.symlink_metadata().is_ok(), "dropping a listener leaves its path");
    drop(super::unix(&path).expect("a socket again"));
    let file = folder.path().join("notes");
    drop(v4_store::fs::open_append(&file).expect("a file"));
    let error = super::unix(&file).expect_err("refused");
    assert!(error.to_string().contains("V4_SOCKET"), "{error}");
}

#[tokio::test]
async fn a_taken_port_is_said_by_its_number() {
    let server = server(Times::default()).await;
    let error = super::tcp(server.address).await.expect_err("refused");
    assert!(error.to_string().contains(&server.address.port().to_string()), "{error}");
}

/// What the answer to [`FOR_EVER`] has in it.
const SPEAKS: &str = "\"response\":\"again \"";

const FOR_EVER: &[u8] =
    b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33\r\n\r\n\
    {\"model\":\"m\",\"prompt\":\"for ever\"}";

#[tokio::test]
async fn the_stop_closes_idle_connections_and_cuts_running_ones_in_time() {
    let mut server = server(quick()).await;
    let mut running = server.connect().await;
    running.write_all(FOR_EVER).await.expect("sent");
    until(&mut running, SPEAKS).await;
    let mut idle = server.connect().await;
    idle.write_all(ALIVE).await.expect("sent");
    until(&mut idle, "Ollama is running").await;
    server.stop.take().expect("once").send(()).expect("heard");
    rest(&mut idle).await;
    rest(&mut running).await;
    let address = server.address;
    server.ended().await;
    TcpStream::connect(address).await.expect_err("nobody listens");
}

#[tokio::test]
async fn a_second_stop_waits_for_nobody() {
    let times = Times { drain: 10 * DEADLINE, ..Times::default() };
    let mut server = server(times).await;
    let mut running = server.connect().await;
    running.write_all(FOR_EVER).await.expect("sent");
    until(&mut running, SPEAKS).await;
    server.stop.take().expect("once").send(()).expect("heard");
    server.now.take().expect("once").send(()).expect("heard");
    server.ended().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_given_up() {
    let server = server(quick()).await;
    let mut stream = server.connect().await;
    // Answers pile up in the system's buffers until no more fits.
    let deadline = tokio::time::Instant::now() + DEADLINE;
    let flood = ALIVE.repeat(1000);
    while timeout(DEADLINE, stream.write_all(&flood)).await.expect("given up in time").is_ok() {
        assert!(tokio::time::Instant::now() < deadline, "it is still read");
    }
}

#[test]
fn connections_leave_descriptors_to_others() {
    assert_eq!([1024, 4096].map(super::permits), [768, 3072]);
    assert_eq!([1 << 20, u64::MAX].map(super::permits), [limits::CONNECTIONS; 2]);
}

/// The first answer to what was written to a connection.
async fn answered(stream: &mut TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).await.expect("sent");
    until(stream, "Ollama is running").await;
}

#[tokio::test]
async fn idle_connections_are_laid_aside_whole_and_taken_up_by_another() {
    let fixture = Fixture::new(Duration::from_millis(100));
    fixture.store("m", &[Ability::Completion], &[]);
    let folder = tempfile::tempdir().expect("a folder");
    let tcp = super::tcp("127.0.0.1:0".parse().expect("an address")).await.expect("a port");
    let address = tcp.local_addr().expect("bound");
    let unix = super::unix(&folder.path().join("v4.sock")).expect("a socket");
    let listeners = Listeners { tcp: Some(tcp), unix, keeps_socket: false };
    let service = Arc::clone(&fixture.service);
    let mut old = super::Server::new(Arc::clone(&service), Times::default());
    let connect = async || TcpStream::connect(address).await.expect("a connection");
    // One that was used, one that has said nothing, one that begins again, one that is answered.
    let mut streams = [connect().await, connect().await, connect().await];
    let mut busy = connect().await;
    let begin = async {
        answered(&mut streams[0], ALIVE).await;
        answered(&mut streams[2], ALIVE).await;
        streams[2].write_all(&ALIVE[..20]).await.expect("sent");
        busy.write_all(FOR_EVER).await.expect("sent");
        until(&mut busy, SPEAKS).await;
    };
    old.serve(&listeners, begin).await;
    old.pause(tokio::time::sleep(Duration::from_millis(100))).await;
    assert_eq!((old.parked.len(), old.connections.len()), (3, 1));
    let mut new = super::Server::new(service, Times::default());
    for _ in 0..3 {
        let socket = timeout(DEADLINE, old.next_parked()).await.expect("at once").expect("one");
        new.giver().send(socket).await.expect("room");
    }
    let [first, second, third] = &mut streams;
    let ask = async {
        answered(first, ALIVE).await;
        answered(second, ALIVE).await;
        answered(third, &ALIVE[20..]).await;
        answered(third, ALIVE).await;
    };
    timeout(DEADLINE, new.serve(&listeners, ask)).await.expect("answers in time");
    // The old one still writes its answer.
    timeout(DEADLINE, old.pause(until(&mut busy, SPEAKS))).await.expect("more of it");
    // What came to nothing is taken up where it was.
    new.pause(tokio::time::sleep(Duration::from_millis(100))).await;
    assert_eq!(new.parked.len(), 3);
    new.resume();
    timeout(DEADLINE, new.serve(&listeners, answered(first, ALIVE))).await.expect("an answer");
}
