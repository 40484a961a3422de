//! Accepting connections, over TCP and over the unix socket, until somebody says stop.

use std::{convert::Infallible, io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use http::Request;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixSocket, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};
use v4_store::fs;

use crate::{caller::Peer, error::Error, limits, patience::Patient, routes::Service};

/// Where connections come from.
pub struct Listeners {
    /// Programs of this machine or the network.
    pub tcp: Option<TcpListener>,
    /// Programs of this user.
    pub unix: UnixListener,
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

/// Connections that the system keeps for us while we are busy.
const BACKLOG: u32 = 128;

enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

/// Serves connections until `stop` ends, then lets running answers end within the drain time, or
/// until `now` ends.
pub async fn serve(
    service: Arc<Service>,
    listeners: Listeners,
    times: Times,
    stop: impl Future<Output = ()>,
    now: impl Future<Output = ()>,
) {
    let permits = Arc::new(Semaphore::new(permits(fs::descriptors(limits::DESCRIPTORS))));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let (accepted, permit) = tokio::select! {
            () = &mut stop => break,
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a connection's task ended badly");
                }
                continue;
            }
            accepted = accept(&listeners, &permits) => accepted,
        };
        let (service, watcher) = (Arc::clone(&service), graceful.watcher());
        match accepted {
            Accepted::Tcp(stream, address) => {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "a connection keeps its delay");
                }
                let client = Client { peer: Peer::tcp(address), is_tcp: true, permit };
                connections.spawn(connection(stream, service, watcher, times, client))
            }
            Accepted::Unix(stream) => {
                let client = Client { peer: Peer::unix(&stream), is_tcp: false, permit };
                connections.spawn(connection(stream, service, watcher, times, client))
            }
        };
    }
    drop(listeners);
    let n_open = connections.len();
    tracing::info!(n_open, "stopping: running answers may end");
    tokio::select! {
        () = graceful.shutdown() => {}
        () = tokio::time::sleep(times.drain) => tracing::warn!("the time to stop is over"),
        () = now => tracing::warn!("stopping at once"),
    }
    connections.shutdown().await;
}

/// Connections at a time, of a process that may have so many descriptors.
fn permits(descriptors: u64) -> usize {
    usize::try_from(descriptors / 4 * 3).map_or(limits::CONNECTIONS, |n| n.min(limits::CONNECTIONS))
}

/// The next connection, when there is room for one.
async fn accept(
    listeners: &Listeners,
    permits: &Arc<Semaphore>,
) -> (Accepted, OwnedSemaphorePermit) {
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
            accepted = tcp => accepted.map(|(stream, address)| Accepted::Tcp(stream, address)),
            accepted = listeners.unix.accept() => {
                accepted.map(|(stream, _)| Accepted::Unix(stream))
            }
        };
        match accepted {
            Ok(accepted) => return (accepted, permit),
            Err(error) => {
                tracing::warn!(%error, "a connection was refused by the system");
                tokio::time::sleep(limits::ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Who is at the other end of a connection.
struct Client {
    peer: Peer,
    is_tcp: bool,
    permit: OwnedSemaphorePermit,
}

/// One connection from its first byte to its last.
async fn connection<S>(
    stream: S,
    service: Arc<Service>,
    watcher: hyper_util::server::graceful::Watcher,
    times: Times,
    client: Client,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Client { peer, is_tcp, permit } = client;
    let respond = service_fn(move |mut request: Request<_>| {
        let service = Arc::clone(&service);
        request.extensions_mut().insert(peer.clone());
        async move { Ok::<_, Infallible>(service.respond(request, is_tcp).await) }
    });
    let io = TokioIo::new(Patient::new(stream, times.write_stall));
    let connection = http1::Builder::new()
        // Without a timer there is no header timeout.
        .timer(TokioTimer::new())
        .header_read_timeout(times.header)
        .max_headers(limits::HEADERS)
        .max_header_size(limits::HEADER_BYTES)
        .serve_connection(io, respond);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "a connection ended early");
    }
    drop(permit);
}

#[cfg(test)]
mod tests;
