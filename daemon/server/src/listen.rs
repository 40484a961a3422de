//! Accepting connections, over TCP and over the unix socket, until somebody says stop. A connection
//! that is idle then can be laid aside and given to the daemon that replaces this one.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    path::Path,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, UnixListener, UnixSocket},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinSet,
};
use v4_store::fs;

use crate::{caller::Peer, error::Error, limits, patience::Patient, routes::Service};

mod socket;
use socket::Busy;
pub use socket::{Socket, Wire};

/// Where connections come from.
pub struct Listeners {
    /// Programs of this machine or the network.
    pub tcp: Option<TcpListener>,
    /// Programs of this user.
    pub unix: UnixListener,
    /// Whether the file of the unix socket is somebody else's, so that it stays.
    pub keeps_socket: bool,
}

/// Times that tests shorten.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// For a request's header to arrive; also how long an idle connection is kept.
    pub header: Duration,
    /// Without a byte taken by the client.
    pub write_stall: Duration,
    /// For running answers to end after the stop.
    pub drain: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            header: limits::HEADER_TIMEOUT,
            write_stall: limits::WRITE_STALL,
            drain: limits::DRAIN,
        }
    }
}

/// Listens on a TCP address.
///
/// # Errors
/// [`Error::PortTaken`] when another program has it; [`Error::Listen`].
pub async fn tcp(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => Error::PortTaken(address),
        _ => Error::Listen { address, source },
    })
}

/// Listens on a unix socket that only this user can open. What an earlier daemon of this home left
/// there is removed: the caller holds the lock of the home, so that daemon is gone.
///
/// # Errors
/// [`Error::Socket`], also when something that is no socket has the path.
pub fn unix(path: &Path) -> Result<UnixListener, Error> {
    let failed = |source| Error::Socket { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        fs::bind_dir(folder).map_err(failed)?;
    }
    // Two homes may have been given one socket.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(Error::SocketTaken { path: path.to_owned() });
    }
    fs::remove_socket(path).map_err(failed)?;
    let socket = UnixSocket::new_stream().map_err(failed)?;
    socket.bind(path).map_err(failed)?;
    // Nobody can connect before `listen`, so nobody does before the mode is set.
    fs::set_private(path).map_err(failed)?;
    socket.listen(BACKLOG).map_err(failed)
}

/// A listener of TCP that another process has made.
///
/// # Errors
/// What the system says.
pub fn tcp_from(descriptor: OwnedFd) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::from(descriptor);
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// A listener of a unix socket that another process has made.
///
/// # Errors
/// What the system says.
pub fn unix_from(descriptor: OwnedFd) -> io::Result<UnixListener> {
    let listener = std::os::unix::net::UnixListener::from(descriptor);
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Connections that the system keeps for us while we are busy.
const BACKLOG: u32 = 128;

/// What connections are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Go on.
    Serve,
    /// Whoever is idle is laid aside.
    Park,
    /// Whoever is idle ends, the others after their answer.
    Close,
}

/// A connection that is idle, and its place among those that are open.
#[derive(Debug)]
pub struct Parked {
    /// The connection.
    pub socket: Socket,
    permit: OwnedSemaphorePermit,
}

/// The connections of a daemon.
pub struct Server {
    service: Arc<Service>,
    times: Times,
    permits: Arc<Semaphore>,
    /// Each gives itself back where it was laid aside.
    connections: JoinSet<Option<Parked>>,
    mode: watch::Sender<Mode>,
    parked: Vec<Parked>,
    /// Connections that another daemon has accepted.
    given: mpsc::Receiver<Socket>,
    giver: mpsc::Sender<Socket>,
}

impl Server {
    /// Nobody is connected yet.
    pub fn new(service: Arc<Service>, times: Times) -> Self {
        let permits = Arc::new(Semaphore::new(permits(fs::descriptors(limits::DESCRIPTORS))));
        let (giver, given) = mpsc::channel(limits::GIVEN_CONNECTIONS);
        let (mode, connections) = (watch::Sender::new(Mode::Serve), JoinSet::new());
        Self { service, times, permits, connections, mode, parked: Vec::new(), given, giver }
    }

    /// Serves connections until `until` ends.
    pub async fn serve<T>(&mut self, listeners: &Listeners, until: impl Future<Output = T>) -> T {
        let mut until = pin!(until);
        loop {
            tokio::select! {
                done = &mut until => return done,
                Some(ended) = self.connections.join_next() => {
                    // One that was told to lay itself aside by a handover that came to nothing.
                    if let Some(parked) = ended.unwrap_or_else(ended_badly) {
                        self.spawn(parked);
                    }
                }
                // This end of the channel is held here too.
                Some(socket) = self.given.recv() => {
                    if let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
                        self.spawn(Parked { socket, permit });
                    } else {
                        tracing::warn!("no room for a connection of the old v4");
                    }
                }
                (wire, permit) = accept(listeners, &self.permits) => {
                    self.spawn(Parked { socket: Socket::new(wire, Bytes::new()), permit });
                }
            }
        }
    }

    /// Takes connections that another daemon has accepted.
    pub fn giver(&self) -> mpsc::Sender<Socket> {
        self.giver.clone()
    }

    /// Accepts nobody and lays aside who is idle, until `until` ends.
    pub async fn pause<T>(&mut self, until: impl Future<Output = T>) -> T {
        self.mode.send_replace(Mode::Park);
        let mut until = pin!(until);
        loop {
            tokio::select! {
                done = &mut until => return done,
                Some(ended) = self.connections.join_next() => {
                    self.parked.extend(ended.unwrap_or_else(ended_badly));
                }
            }
        }
    }

    /// Takes up again what [`Server::pause`] has laid aside.
    pub fn resume(&mut self) {
        // Who has heard the old word still lays itself aside, and is taken up at once.
        self.mode = watch::Sender::new(Mode::Serve);
        for parked in std::mem::take(&mut self.parked) {
            self.spawn(parked);
        }
    }

    /// The next connection that was laid aside; `None` when none is left.
    pub async fn next_parked(&mut self) -> Option<Socket> {
        loop {
            if let Some(parked) = self.parked.pop() {
                return Some(parked.socket);
            }
            let ended = self.connections.join_next().await?;
            self.parked.extend(ended.unwrap_or_else(ended_badly));
        }
    }

    /// Lets running answers end within the drain time, or until `now` ends.
    pub async fn end(mut self, now: impl Future<Output = ()>) {
        let n_open = self.connections.len();
        tracing::info!(n_open, "stopping: running answers may end");
        self.mode.send_replace(Mode::Close);
        let all = async {
            while let Some(ended) = self.connections.join_next().await {
                ended.unwrap_or_else(ended_badly);
            }
        };
        tokio::select! {
            () = all => {}
            () = tokio::time::sleep(self.times.drain) => tracing::warn!("the time to stop is over"),
            () = now => tracing::warn!("stopping at once"),
        }
        self.connections.shutdown().await;
    }

    fn spawn(&mut self, parked: Parked) {
        let (service, mode) = (Arc::clone(&self.service), self.mode.subscribe());
        self.connections.spawn(connection(parked, service, mode, self.times));
    }
}

/// Of a connection whose task ended badly nothing is left.
#[allow(clippy::needless_pass_by_value, reason = "it is given to `unwrap_or_else`")]
fn ended_badly(error: tokio::task::JoinError) -> Option<Parked> {
    tracing::error!(%error, "a connection's task ended badly");
    None
}

/// Connections at a time, of a process that may have so many descriptors.
fn permits(descriptors: u64) -> usize {
    usize::try_from(descriptors / 4 * 3).map_or(limits::CONNECTIONS, |n| n.min(limits::CONNECTIONS))
}

/// The next connection, when there is room for one.
async fn accept(listeners: &Listeners, permits: &Arc<Semaphore>) -> (Wire, OwnedSemaphorePermit) {
    let permit = Arc::clone(permits).acquire_owned().await;
    let permit = permit.expect("the semaphore of connections is never closed");
    loop {
        let tcp = async {
            match &listeners.tcp {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        let accepted = tokio::select! {
            accepted = tcp => accepted.map(|(stream, _)| Wire::Tcp(stream)),
            accepted = listeners.unix.accept() => accepted.map(|(stream, _)| Wire::Unix(stream)),
        };
        match accepted {
            Ok(wire) => return (wire, permit),
            Err(error) => {
                tracing::warn!(%error, "a connection was refused by the system");
                tokio::time::sleep(limits::ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Who is at the other end of a wire.
fn peer(wire: &Wire) -> Peer {
    match wire {
        Wire::Tcp(stream) => {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "a connection keeps its delay");
            }
            Peer::tcp(stream.peer_addr().ok())
        }
        Wire::Unix(stream) => Peer::unix(stream),
    }
}

/// One connection from its first byte to its last, or until it is laid aside.
async fn connection(
    parked: Parked,
    service: Arc<Service>,
    mode: watch::Receiver<Mode>,
    times: Times,
) -> Option<Parked> {
    let Parked { socket, permit } = parked;
    let (peer, signs) = (peer(&socket.wire), socket.signs());
    let is_tcp = matches!(socket.wire, Wire::Tcp(_));
    let seen = Arc::clone(&signs);
    let respond = service_fn(move |mut request: Request<_>| {
        let (service, busy) = (Arc::clone(&service), Busy::new(&seen));
        request.extensions_mut().insert(peer.clone());
        Box::pin(async move {
            let response = service.respond(request, is_tcp).await;
            Ok::<_, Infallible>(response.map(|body| body.holding(busy)))
        })
    });
    let io = TokioIo::new(Patient::new(socket, times.write_stall));
    let mut connection = http1::Builder::new()
        // Without a timer there is no header timeout.
        .timer(TokioTimer::new())
        .header_read_timeout(times.header)
        .max_headers(limits::HEADERS)
        .max_header_size(limits::HEADER_BYTES)
        .serve_connection(io, respond);
    let mut told = pin!(told(mode));
    let (mut heard, mut is_asked) = (None, false);
    let (ended, is_parked) = poll_fn(|context| {
        if heard.is_none()
            && let Poll::Ready(mode) = told.as_mut().poll(context)
        {
            heard = Some(mode);
        }
        let is_idle = signs.is_idle();
        // Before anything is read: a request that has come meanwhile is for the other daemon.
        if !is_asked && (heard == Some(Mode::Close) || heard == Some(Mode::Park) && is_idle) {
            is_asked = true;
            Pin::new(&mut connection).graceful_shutdown();
            let ended = connection.poll_without_shutdown(context);
            return ended.map(|ended| (ended, is_idle && heard == Some(Mode::Park)));
        }
        connection.poll_without_shutdown(context).map(|ended| (ended, false))
    })
    .await;
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
        return None;
    }
    let parts = connection.into_parts();
    let mut io = parts.io.into_inner();
    if is_parked {
        let mut socket = io.into_inner();
        let unread = [&parts.read_buf[..], &socket.before[..]].concat();
        socket = Socket::new(socket.wire, unread.into());
        return Some(Parked { socket, permit });
    }
    // The client may have left.
    let _ = io.shutdown().await;
    None
}

/// What a connection is told, once that is anything but to go on. The server lives as long as its
/// connections.
async fn told(mut mode: watch::Receiver<Mode>) -> Mode {
    let heard = mode.wait_for(|mode| *mode != Mode::Serve).await.map(|mode| *mode).ok();
    match heard {
        Some(mode) => mode,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
