//! What systemd gives a service, and what it wants to hear: sockets that it listens on itself
//! (`LISTEN_FDS`), and which process serves (`NOTIFY_SOCKET`), which changes when one daemon takes
//! the place of another. Nothing of it happens where nobody set these variables.

use std::{
    io,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

use rustix::{
    net::{AddressFamily, getsockname},
    process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open},
};
use tokio::net::{TcpListener, UnixListener};

use crate::{config::Config, error::Error, limits, listen};

/// The variables of systemd.
pub const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET"];

/// The number of the first descriptor that systemd gives.
const FIRST: i32 = 3;

/// Sockets that the service manager listens on for this process.
#[derive(Debug, Default)]
pub struct Given {
    /// One of TCP.
    pub tcp: Option<TcpListener>,
    /// A unix socket, whose file is not ours to remove.
    pub unix: Option<UnixListener>,
}

/// What the service manager has given this process.
///
/// # Errors
/// [`Error::Start`] where that cannot be used.
pub fn given(config: &Config) -> Result<Given, Error> {
    let failed = |source: io::Error| Error::Start {
        what: "the sockets of LISTEN_FDS cannot be used",
        source,
    };
    let number = |name| config.variable(name).and_then(|text| text.to_str()?.parse::<u32>().ok());
    let mut given = Given::default();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(given);
    }
    let n = number("LISTEN_FDS").unwrap_or(0).min(limits::LISTEN_SOCKETS);
    for descriptor in (FIRST..).take(n as usize) {
        let socket = duplicate(descriptor).map_err(failed)?;
        match getsockname(&socket).map_err(io::Error::from).map_err(failed)?.address_family() {
            AddressFamily::INET | AddressFamily::INET6 => {
                given.tcp = Some(listen::tcp_from(socket).map_err(failed)?);
            }
            AddressFamily::UNIX => given.unix = Some(listen::unix_from(socket).map_err(failed)?),
            family => tracing::warn!(?family, "a socket of LISTEN_FDS is not served"),
        }
    }
    Ok(given)
}

/// A descriptor of our own for one that this process was started with. There is no other way to
/// own it without unsafe code.
fn duplicate(descriptor: i32) -> io::Result<OwnedFd> {
    let own = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(own, descriptor, PidfdGetfdFlags::empty())?)
}

/// Tells the service manager how it stands, where one listens.
pub fn tell(config: &Config, words: &str) {
    let Some(path) = config.variable("NOTIFY_SOCKET") else { return };
    let send = || -> io::Result<usize> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        match path.as_bytes().strip_prefix(b"@") {
            Some(name) => {
                socket.send_to_addr(words.as_bytes(), &SocketAddr::from_abstract_name(name)?)
            }
            None => socket.send_to(words.as_bytes(), path),
        }
    };
    if let Err(error) = send() {
        tracing::warn!(%error, "the service manager was not told who serves");
    }
}
