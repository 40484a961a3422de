//! One daemon takes the place of another, and clients do not notice.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix,
    SocketType, accept, bind, listen, recvmsg, send, socket,
};
use serde_json::{Value, json};
use v4_tests::DEADLINE;
use v4_tests::daemon::{Daemon, Successor};
use v4_tests::home::{ENDLESS, Home, noise};
use v4_tests::http::Address;
use v4_tests::process::{until, v4};
use v4_tests::registry::OneModel;

use crate::persist::{turn, written};

const TINY: &str = "llama-q4_0.gguf";

/// Starts a daemon in the place of `old`.
#[track_caller]
fn replaced<'a>(old: &Daemon<'a>, variables: &[(&str, &str)]) -> Daemon<'a> {
    let (new, words) = Daemon::replacing(old.home, variables);
    new.unwrap_or_else(|| panic!("not replaced: {words}\nthe old one: {}", old.log()))
}

/// A request on a connection of its own.
fn ask(at: &Address) -> io::Result<()> {
    let body = json!({"model": "tiny", "prompt": "a", "stream": false,
                      "options": {"num_predict": 2}});
    let (body, mut wire) = (body.to_string(), at.connect()?);
    let head = format!(
        "POST /api/generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    wire.write_all(head.as_bytes())?;
    let mut text = String::new();
    wire.read_to_string(&mut text)?;
    let is_whole = text.starts_with("HTTP/1.1 200") && text.contains("\"done\":true");
    if is_whole { Ok(()) } else { Err(io::Error::other(text)) }
}

/// Requests one after the other on one connection, until `is_over`. Gives how many.
fn ask_on(at: &Address, is_over: &AtomicBool) -> io::Result<u32> {
    let Address::Tcp(address) = at else { unreachable!("TCP is asked for") };
    let mut wire = BufReader::new(TcpStream::connect(address)?);
    wire.get_ref().set_read_timeout(Some(DEADLINE))?;
    let mut n = 0;
    while !is_over.load(Ordering::Relaxed) {
        wire.get_mut().write_all(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
        let mut length = 0;
        loop {
            let mut line = String::new();
            if wire.read_line(&mut line)? == 0 {
                return Err(io::Error::other(format!("closed after {n} answers")));
            }
            if let Some(text) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = text.trim().parse().map_err(io::Error::other)?;
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        wire.read_exact(&mut body)?;
        assert!(String::from_utf8_lossy(&body).contains("tiny"));
        n += 1;
        // Now and then it is idle for longer than a handover takes, and for shorter.
        thread::park_timeout(Duration::from_millis(u64::from(n % 7) * 5));
    }
    Ok(n)
}

/// Tells those who ask to end.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_request_is_refused_or_lost_over_several_replacements() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let mut daemon = Daemon::start(&home);
    let (tcp, unix) = (daemon.tcp.clone(), daemon.unix.clone());
    let (is_over, n_asked) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let is_over = &is_over;
        // Those who ask end, whatever happens here.
        let end = End(is_over);
        let asks = |at: Address| {
            let n_asked = &n_asked;
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    ask(&at).expect("an answer");
                    n_asked.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let asking = [asks(tcp.clone()), asks(tcp.clone()), asks(unix.clone())];
        let kept = scope.spawn(|| ask_on(&tcp, is_over));
        for _ in 0..3 {
            let before = n_asked.load(Ordering::Relaxed);
            until("some answers", || (n_asked.load(Ordering::Relaxed) > before + 5).then_some(()));
            let new = replaced(&daemon, &[]);
            assert_eq!((&new.tcp, &new.unix), (&tcp, &unix));
            let old = std::mem::replace(&mut daemon, new);
            assert!(old.ended().success());
        }
        let before = n_asked.load(Ordering::Relaxed);
        until("more answers", || (n_asked.load(Ordering::Relaxed) > before + 5).then_some(()));
        drop(end);
        for asking in asking {
            asking.join().expect("no request failed");
        }
        let n = kept.join().expect("no panic").expect("the connection was never closed");
        assert!(n > 5, "{n}");
    });
    // The last one ends as any daemon does, and leaves no socket.
    assert!(daemon.stop().success());
    assert!(!home.socket().exists());
    let left = std::fs::read_dir(home.path()).expect("a home");
    let names = left.map(|entry| entry.expect("an entry").file_name());
    assert!(!names.into_iter().any(|name| name.to_string_lossy().starts_with("replace")));
}

#[test]
fn a_stream_that_runs_ends_whole() {
    const TOKENS: u64 = 5000;
    let home = Home::new();
    home.put_endless("tiny");
    let old = Daemon::start_with(&home, &[ENDLESS]);
    let body = json!({"model": "tiny", "prompt": "a", "options": {"num_predict": TOKENS}});
    let mut stream = old.tcp.stream("/api/generate", &body);
    assert_eq!(stream.json().expect("a first piece")["done"], false);
    let reader = thread::spawn(move || {
        let mut last = Value::Null;
        while let Some(line) = stream.json() {
            last = line;
        }
        last
    });
    let new = replaced(&old, &[ENDLESS]);
    let is_running = !reader.is_finished();
    // The new one serves while the old one writes.
    ask(&new.tcp).expect("an answer");
    let last = reader.join().expect("a whole stream");
    assert_eq!((&last["done"], &last["done_reason"]), (&json!(true), &json!("length")), "{last}");
    assert_eq!(last["eval_count"], TOKENS);
    assert!(is_running, "the stream was over before; ask for more tokens");
    assert!(old.ended().success());
    ask(&new.tcp).expect("an answer");
}

#[test]
fn the_next_turn_of_a_conversation_goes_on_from_disk() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let old = Daemon::start(&home);
    let first = turn(&old, "first");
    written(&home, &[&first]);
    let new = replaced(&old, &[]);
    turn(&new, "first").continues(&first);
    assert!(old.ended().success());
}

#[test]
fn a_pull_goes_on_and_who_watches_it_sees_its_end() {
    let home = Home::new();
    let weights = noise(24 << 20);
    let model = OneModel::new(&weights);
    let mut old = Daemon::start(&home);
    let body = json!({"model": model.name(), "limit_rate": "6M"});
    let mut stream = old.tcp.stream("/api/pull", &body);
    until("the first MiB", || {
        let line = stream.json().expect("more lines");
        (line["completed"].as_u64()? > 1 << 20).then_some(())
    });
    let new = replaced(&old, &[]);
    let listed = new.tcp.get("/api/pulls").expect(200);
    assert_eq!(listed["pulls"][0]["limit_rate"], 6 << 20, "{listed}");
    assert!(old.is_running(), "somebody watches a pull there");
    let mut last = Value::Null;
    while let Some(line) = stream.json() {
        last = line;
    }
    assert_eq!(last["status"], "success", "{last}");
    assert!(old.ended().success());
    assert!(home.blobs().contains(&model.weights()));
    // What the old one had was not fetched again; a piece of each range may be.
    let asked = model.take_asked();
    assert_eq!(asked, weights.len());
}

#[test]
fn where_nobody_serves_it_just_serves_and_elsewhere_it_listens_elsewhere() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let (first, words) = Daemon::replacing(&home, &[]);
    let first = first.unwrap_or_else(|| panic!("{words}"));
    ask(&first.tcp).expect("an answer");
    // Another address is listened on beside the old one's socket.
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    let wanted = free.local_addr().expect("bound").to_string();
    // It is taken: the old one serves on.
    let (none, words) = Daemon::replacing(&home, &[("V4_LISTEN", &wanted)]);
    assert!(none.is_none() && words.contains("is taken by another program"), "{words}");
    ask(&first.tcp).expect("an answer");
    drop(free);
    let second = replaced(&first, &[("V4_LISTEN", &wanted)]);
    assert_eq!(second.tcp, Address::Tcp(wanted));
    ask(&second.tcp).expect("an answer");
    let Address::Tcp(before) = first.tcp.clone() else { unreachable!("it has a port") };
    assert!(first.ended().success());
    TcpStream::connect(before).expect_err("nobody listens there any more");
}

/// What plays a new daemon, to stop at any step.
struct Pretender(OwnedFd);

impl Pretender {
    /// Asks the daemon of `home` to meet it.
    fn meet(home: &Home) -> Self {
        let pid = std::process::id();
        let path = home.path().join(format!("replace-{pid}.sock"));
        let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("a socket");
        bind(&listener, &SocketAddrUnix::new(&path).expect("a path")).expect("bound");
        listen(&listener, 1).expect("listens");
        let body = json!({"protocol": 1, "home": home.path(), "pid": pid});
        let reply = Address::unix(&home.socket()).post("/api/replace", &body);
        assert_eq!(reply.status, 200, "{}", reply.text());
        let met = Self(accept(&listener).expect("it came"));
        std::fs::remove_file(path).expect("there");
        met
    }

    /// The next message, and how many descriptors came with it.
    fn next(&self) -> (String, usize) {
        let mut bytes = vec![0; 1 << 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [io::IoSliceMut::new(&mut bytes)];
        let got = recvmsg(&self.0, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC);
        let n = got.expect("a packet").bytes;
        let n_descriptors = control
            .drain()
            .map(|message| match message {
                RecvAncillaryMessage::ScmRights(all) => all.count(),
                _ => 0,
            })
            .sum();
        (String::from_utf8_lossy(&bytes[..n]).into_owned(), n_descriptors)
    }

    fn say(&self, message: &str) {
        send(&self.0, message.as_bytes(), SendFlags::NOSIGNAL).expect("sent");
    }
}

#[test]
fn a_new_one_that_leaves_at_any_step_leaves_the_old_one_serving() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let old = Daemon::start(&home);
    for step in 0..4 {
        let new = Pretender::meet(&home);
        let (offer, n_descriptors) = new.next();
        assert!(offer.contains("\"offer\"") && n_descriptors == 2, "{offer}");
        let body = json!({"protocol": 1, "home": home.path(), "pid": 1});
        if step == 0 {
            // While it makes up its mind, everything goes on, and nobody else is let in.
            ask(&old.tcp).expect("an answer");
        }
        if step > 0 {
            new.say("\"ready\"");
        }
        if step > 1 {
            let (released, _) = new.next();
            assert!(released.contains("\"released\""), "{released}");
            let lock = std::fs::File::open(home.path().join("lock")).expect("a lock");
            lock.try_lock().expect("the home is free");
        }
        if step > 2 {
            new.say("{\"nonsense\":1}");
            let (stopped, _) = new.next();
            assert!(stopped.contains("\"stopped\""), "{stopped}");
        }
        drop(new);
        ask(&old.tcp).expect("an answer");
        // It has its home again: what is written is there, and no other daemon gets in.
        let copied = json!({"source": "tiny", "destination": format!("copy{step}")});
        old.unix.post("/api/copy", &copied).expect(200);
        let lock = std::fs::File::open(home.path().join("lock")).expect("a lock");
        lock.try_lock().expect_err("the home is taken");
        let refused = old.unix.post("/api/replace", &body).error(400);
        assert!(refused.contains("is not there"), "{refused}");
    }
    let new = replaced(&old, &[]);
    assert!(old.ended().success());
    ask(&new.tcp).expect("an answer");
}

#[test]
fn what_asks_for_it_wrongly_is_told_so() {
    let home = Home::new();
    let daemon = Daemon::start(&home);
    let body = |protocol: u32, home: &str| json!({"protocol": protocol, "home": home, "pid": 1});
    let path = home.path().to_string_lossy().into_owned();
    let other = daemon.unix.post("/api/replace", &body(99, &path)).error(400);
    assert!(other.contains("protocol 1, not 99") && other.contains("v4 serve"), "{other}");
    let other = daemon.unix.post("/api/replace", &body(1, "/elsewhere")).error(400);
    assert!(other.contains("V4_HOME"), "{other}");
    let far = daemon.tcp.post("/api/replace", &body(1, &path));
    assert!(far.status == 401 || far.status == 403, "{}", far.text());
}

#[test]
fn a_new_one_that_is_killed_at_any_moment_leaves_somebody_serving() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let mut daemon = Daemon::start(&home);
    let mut n_taken = 0;
    for step in 0..24_u64 {
        let successor = Successor::start(&home, &[]);
        let at = Instant::now() + Duration::from_millis(step * 5);
        until("the moment", || (Instant::now() >= at || successor.is_ready()).then_some(()));
        let was_ready = successor.kill();
        if was_ready {
            // It had taken over; the old one has nothing left to serve with.
            n_taken += 1;
            assert!(daemon.ended().success());
            daemon = Daemon::start(&home);
            continue;
        }
        // A connection may wait until the old one has its home again.
        if let Err(error) = ask(&daemon.tcp) {
            // It can have been killed between its word that it serves and the line in its log.
            until(&format!("a word of the old one, at step {step}: {error}"), || {
                daemon.log().contains("another v4 has taken over").then_some(())
            });
            assert!(daemon.ended().success());
            daemon = Daemon::start(&home);
        }
    }
    println!("killed 24 times, {n_taken} of them after it had taken over");
}

/// A daemon as systemd starts it: with a listener as descriptor 3, and a socket for its words.
fn activated<'a>(home: &'a Home, listener: TcpListener, notify: &str) -> Daemon<'a> {
    let plain = v4(home, &["serve"]);
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg("exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$0\" serve")
        .arg(plain.get_program())
        .env_clear()
        .envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .env("NOTIFY_SOCKET", notify)
        .stdin(OwnedFd::from(listener));
    Daemon::spawn(home, &mut command).expect("it starts")
}

#[test]
fn a_service_manager_gives_the_socket_and_is_told_who_serves() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let path = home.beside().join("notify");
    let notified = UnixDatagram::bind(&path).expect("a socket");
    notified.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    let word = || {
        let mut bytes = [0; 256];
        let n = notified.recv(&mut bytes).expect("a word");
        String::from_utf8_lossy(&bytes[..n]).into_owned()
    };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = Address::Tcp(listener.local_addr().expect("bound").to_string());
    let notify = path.to_string_lossy().into_owned();
    let old = activated(&home, listener, &notify);
    assert_eq!(old.tcp, address);
    ask(&address).expect("an answer");
    assert_eq!(word(), format!("READY=1\nMAINPID={}\n", old.pid()));
    let new = replaced(&old, &[("NOTIFY_SOCKET", &notify)]);
    assert_eq!(word(), format!("READY=1\nMAINPID={}\n", new.pid()));
    assert!(old.ended().success());
    ask(&address).expect("an answer");
    assert!(new.stop().success());
    // Not from the old one, which the service has outlived.
    assert_eq!(word(), "STOPPING=1\n");
}
