//! The new daemon's side: it finds the old one, gets its listeners, and waits for the home.

use std::{io, net::SocketAddr, os::fd::OwnedFd, sync::Arc};

use http::StatusCode;
use http_body_util::{BodyExt, Limited};
use tokio::{
    net::{TcpStream, UnixStream},
    sync::mpsc,
    time::{sleep, timeout},
};
use v4_pull::{Change, Jobs};
use v4_store::Store;
use v4_supervisor::Supervisor;

use super::{
    Channel, Estate, Message, PROTOCOL, Refusal, Request,
    channel::{Meeting, Packet},
    client,
};
use crate::{
    config::Config,
    daemon::Daemon,
    error::Error,
    limits,
    listen::{self, Listeners, Socket, Wire},
    ops::generate,
};

/// What an old daemon left.
pub struct Inheritance {
    /// Its store, and from now on ours.
    pub store: Arc<Store>,
    /// Its listeners, as far as the settings want them.
    pub listeners: Listeners,
    /// Bytes that models might take there.
    pub budget_bytes: u64,
    estate: Estate,
    channel: Channel,
}

/// Takes over from the daemon at the socket of these settings. `None` where there is none.
///
/// # Errors
/// [`Error::Replace`], and whatever keeps a daemon from starting; the old one then serves on.
pub async fn take(config: &Config) -> Result<Option<Inheritance>, Error> {
    let wire = match UnixStream::connect(&config.socket).await {
        Ok(wire) => wire,
        Err(error) if is_nobody(&error) => {
            tracing::info!("no v4 runs here that could be replaced");
            return Ok(None);
        }
        Err(source) => return Err(Error::Socket { path: config.socket.clone(), source }),
    };
    let failed = |refusal: Refusal| Error::Replace(refusal.to_string());
    let meeting = Meeting::new(&config.home).map_err(Refusal::from).map_err(failed)?;
    ask(wire, config).await?;
    // The old one has connected before it answered, so this does not wait.
    let channel = meeting.accept().await.map_err(Refusal::from).map_err(failed)?;
    drop(meeting);
    let (listeners, budget_bytes) = offered(config, &channel).await?;
    channel.send(&Message::Ready, &[], b"").await.map_err(failed)?;
    let estate = match channel.expect("let go of its home", limits::HANDOVER_RELEASED).await {
        Ok(Packet { message: Message::Released(estate), .. }) => estate,
        Ok(packet) => {
            return Err(failed(Refusal::OutOfPlace(format!("{:?}", packet.message))));
        }
        Err(refusal) => return Err(failed(refusal)),
    };
    let home = config.home.clone();
    let opened = tokio::task::spawn_blocking(move || Store::open(&home)).await;
    let store = opened.map_err(|error| Error::Replace(error.to_string()))??;
    let store = Arc::new(store);
    Ok(Some(Inheritance { store, listeners, budget_bytes, estate, channel }))
}

fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Asks the old daemon for a meeting.
async fn ask(wire: UnixStream, config: &Config) -> Result<(), Error> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::Replace(format!("the old v4 does not answer: {error}"))
    };
    let request = Request {
        protocol: PROTOCOL,
        home: config.home.to_string_lossy().into_owned(),
        pid: std::process::id(),
    };
    let body = serde_json::to_vec(&request).map_err(|error| failed(&error))?;
    let mut answer =
        client::post(wire, "/api/replace", body).await.map_err(|error| failed(&error))?;
    let status = answer.response.status();
    let body = Limited::new(answer.response.body_mut(), limits::HANDOVER_BYTES).collect();
    let body = timeout(limits::HANDOVER_WORD, body).await.map_err(|error| failed(&error))?;
    let body = body.map_err(|error| failed(&error))?.to_bytes();
    if status == StatusCode::OK {
        return Ok(());
    }
    let said: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    Err(Error::Replace(match said["error"].as_str() {
        Some(why) => why.to_owned(),
        None => "the v4 that runs is too old for it; stop it, then run `v4 serve`".to_owned(),
    }))
}

/// The listeners of the old daemon. Where the settings say another address for TCP, that is
/// listened on before the old one gives anything up.
async fn offered(config: &Config, channel: &Channel) -> Result<(Listeners, u64), Error> {
    let failed = |refusal: Refusal| Error::Replace(refusal.to_string());
    let packet =
        channel.expect("offered anything", limits::HANDOVER_READY).await.map_err(failed)?;
    let Packet {
        message: Message::Offer { version, tcp, budget_bytes, keeps_socket },
        descriptors,
        ..
    } = packet
    else {
        return Err(failed(Refusal::OutOfPlace(format!("{:?}", packet.message))));
    };
    let mut descriptors = descriptors.into_iter();
    let unix = descriptors
        .next()
        .ok_or_else(|| failed(Refusal::OutOfPlace("an offer without a listener".to_owned())))?;
    let (ours, of) = (std::process::id(), tcp.map(|address| address.to_string()));
    tracing::info!(version, listen = of, pid = ours, "taking over from a v4");
    let unix = listen::unix_from(unix).map_err(Refusal::from).map_err(failed)?;
    let tcp = match (config.listen, tcp.zip(descriptors.next())) {
        (None, _) => None,
        (Some(wanted), Some((theirs, descriptor))) if is_same(wanted, theirs) => {
            Some(listen::tcp_from(descriptor).map_err(Refusal::from).map_err(failed)?)
        }
        (Some(wanted), _) => Some(listen::tcp(wanted).await?),
    };
    Ok((Listeners { tcp, unix, keeps_socket }, budget_bytes))
}

/// Whether a listener at `theirs` is what the settings want; port 0 wants any.
fn is_same(wanted: SocketAddr, theirs: SocketAddr) -> bool {
    wanted.ip() == theirs.ip() && (wanted.port() == 0 || wanted.port() == theirs.port())
}

fn socket(is_tcp: bool, descriptor: OwnedFd, before: Vec<u8>) -> io::Result<Socket> {
    let wire = if is_tcp {
        let stream = std::net::TcpStream::from(descriptor);
        stream.set_nonblocking(true)?;
        Wire::Tcp(TcpStream::from_std(stream)?)
    } else {
        let stream = std::os::unix::net::UnixStream::from(descriptor);
        stream.set_nonblocking(true)?;
        Wire::Unix(UnixStream::from_std(stream)?)
    };
    Ok(Socket::new(wire, before.into()))
}

/// What is still to come from an old daemon.
pub struct Rest {
    estate: Estate,
    channel: Channel,
}

impl Inheritance {
    /// The parts for the daemon, and what is still to come.
    pub fn split(self) -> (Arc<Store>, Listeners, Rest) {
        let Self { store, listeners, estate, channel, .. } = self;
        (store, listeners, Rest { estate, channel })
    }
}

impl Rest {
    /// Says that this daemon serves, and takes what the old one still has, in the background.
    ///
    /// # Errors
    /// [`Error::Replace`] when the old one is not there to hear it, which then has taken
    /// everything up again or has ended.
    pub async fn settle(
        self,
        daemon: &Arc<Daemon>,
        connections: mpsc::Sender<Socket>,
    ) -> Result<(), Error> {
        let Self { estate, channel } = self;
        daemon.supervisor.hold_back(estate.memory_bytes);
        match channel.send(&Message::Serving, &[], b"").await {
            Ok(()) => {}
            // It was killed: there is nobody who would serve instead.
            Err(Refusal::Socket(_)) => tracing::warn!("the old v4 ended before its time"),
            Err(refusal) => return Err(Error::Replace(refusal.to_string())),
        }
        go_on(&daemon.jobs, estate.pulls);
        tokio::spawn(follow(channel, daemon.supervisor.clone(), connections));
        let daemon = Arc::clone(daemon);
        tokio::spawn(async move {
            for name in estate.models.iter().rev().filter_map(|name| name.parse().ok()) {
                if let Err(fault) = generate::load(&daemon, &name).await {
                    tracing::info!(%name, %fault, "what the old v4 had loaded is not loaded");
                }
            }
        });
        Ok(())
    }
}

/// Goes on with pulls. One that somebody watches has a while to be found by them.
fn go_on(jobs: &Jobs, orders: Vec<v4_pull::Order>) {
    for order in orders {
        let v4_pull::Order { name, wish, is_paused } = order;
        let watch = match jobs.pull(&name, wish) {
            Ok(watch) => watch,
            Err(fault) => {
                tracing::warn!(%name, %fault, "a pull of the old v4 does not go on");
                continue;
            }
        };
        if is_paused {
            // It may have ended already.
            let _ = jobs.change(&name, Change::Pause);
        }
        tokio::spawn(async move {
            sleep(limits::HANDOVER_WATCHERS).await;
            drop(watch);
        });
    }
}

/// Takes connections of the old daemon, and knows how much memory it holds, until it has ended.
async fn follow(channel: Channel, supervisor: Supervisor, connections: mpsc::Sender<Socket>) {
    loop {
        let packet = match channel.next().await {
            Ok(Some(packet)) => packet,
            Ok(None) => break,
            Err(refusal) => {
                tracing::warn!(%refusal, "the old v4 is no longer listened to");
                break;
            }
        };
        match (packet.message, packet.descriptors.into_iter().next()) {
            (Message::Memory { bytes }, _) => supervisor.hold_back(bytes),
            (Message::Connection { is_tcp }, Some(descriptor)) => {
                match socket(is_tcp, descriptor, packet.rest) {
                    Ok(socket) => drop(connections.send(socket).await),
                    Err(error) => tracing::debug!(%error, "a connection was not taken over"),
                }
            }
            (message, _) => tracing::warn!(?message, "the old v4 said something out of place"),
        }
    }
    supervisor.hold_back(0);
    tracing::info!("the old v4 has ended");
}
