//! [`Channel`]: packets with descriptors between two daemons.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect,
    listen, recvmsg, sendmsg, socket_with,
};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    time::timeout,
};
use v4_store::fs;

use super::{Message, Refusal};
use crate::limits;

/// Descriptors of one packet: the two listeners.
const DESCRIPTORS: usize = 2;

/// A socket that keeps packets apart, to the other daemon. It is no stream, but the type of one is
/// what waits for a descriptor without unsafe code.
#[derive(Debug)]
pub struct Channel(UnixStream);

/// What comes in a packet.
#[derive(Debug)]
pub(super) struct Packet {
    pub message: Message,
    pub descriptors: Vec<OwnedFd>,
    /// What follows the message.
    pub rest: Vec<u8>,
}

/// A socket of the new daemon, for the old one to connect to. Its file is removed with it.
#[derive(Debug)]
pub(super) struct Meeting {
    listener: UnixListener,
    path: PathBuf,
}

/// Where a new daemon of this process number is met.
pub(super) fn meeting_path(home: &Path, pid: u32) -> PathBuf {
    home.join(format!("replace-{pid}.sock"))
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

impl Meeting {
    /// Listens in a home.
    pub fn new(home: &Path) -> io::Result<Self> {
        let path = meeting_path(home, std::process::id());
        fs::remove_socket(&path)?;
        let socket = new_socket()?;
        bind(&socket, &SocketAddrUnix::new(&path)?)?;
        // Nobody can connect before `listen`, so nobody does before the mode is set.
        fs::set_private(&path)?;
        listen(&socket, 1)?;
        let listener = UnixListener::from_std(socket.into())?;
        Ok(Self { listener, path })
    }

    /// The one who comes.
    pub async fn accept(&self) -> io::Result<Channel> {
        let (socket, _) = self.listener.accept().await?;
        Ok(Channel(socket))
    }
}

impl Drop for Meeting {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_socket(&self.path) {
            tracing::debug!(%error, "the socket of a handover stays behind");
        }
    }
}

impl Channel {
    /// Connects to the new daemon of this process number.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn connect(home: &Path, pid: u32) -> io::Result<Self> {
        let socket = new_socket()?;
        // It listens, so this does not wait.
        connect(&socket, &SocketAddrUnix::new(meeting_path(home, pid))?)?;
        Ok(Self(UnixStream::from_std(socket.into())?))
    }

    /// Sends a message, with descriptors that the other side then has too, and bytes after it.
    pub(super) async fn send(
        &self,
        message: &Message,
        descriptors: &[BorrowedFd<'_>],
        rest: &[u8],
    ) -> Result<(), Refusal> {
        let mut head = serde_json::to_vec(message).map_err(io::Error::from)?;
        head.push(b'\n');
        let slices = [IoSlice::new(&head), IoSlice::new(rest)];
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(descriptors));
            }
            Ok(sendmsg(&self.0, &slices, &mut control, SendFlags::NOSIGNAL)?)
        };
        let sent = self.0.async_io(Interest::WRITABLE, send);
        let sent = timeout(limits::HANDOVER_WORD, sent).await;
        sent.map_err(|_| late("read", limits::HANDOVER_WORD))??;
        Ok(())
    }

    /// The next packet; `None` when the other side is gone.
    pub(super) async fn next(&self) -> Result<Option<Packet>, Refusal> {
        let mut bytes = vec![0; limits::HANDOVER_BYTES];
        let mut descriptors = Vec::new();
        let receive = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let got = recvmsg(&self.0, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(all) = message {
                    descriptors.extend(all);
                }
            }
            Ok(got.bytes)
        };
        let n = match self.0.async_io(Interest::READABLE, receive).await {
            // One that was killed with packets unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            outcome => outcome?,
        };
        if n == 0 {
            return Ok(None);
        }
        bytes.truncate(n);
        let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(n);
        let message = serde_json::from_slice(&bytes[..end])
            .map_err(|error| Refusal::OutOfPlace(error.to_string()))?;
        let rest = bytes.split_off((end + 1).min(n));
        Ok(Some(Packet { message, descriptors, rest }))
    }

    /// The next packet, which must come within `patience`.
    pub(super) async fn expect(
        &self,
        what: &'static str,
        patience: Duration,
    ) -> Result<Packet, Refusal> {
        let next = timeout(patience, self.next()).await.map_err(|_| late(what, patience))??;
        match next {
            Some(Packet { message: Message::Stopped { why }, .. }) => Err(Refusal::Said(why)),
            Some(packet) => Ok(packet),
            None => Err(Refusal::HungUp(what)),
        }
    }
}

fn late(what: &'static str, patience: Duration) -> Refusal {
    Refusal::Late { what, seconds: patience.as_secs() }
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsFd, unix::fs::PermissionsExt as _};

    use super::*;

    #[tokio::test]
    async fn packets_bring_descriptors_and_bytes_and_the_end_is_seen() {
        let folder = tempfile::tempdir().expect("a folder");
        let meeting = Meeting::new(folder.path()).expect("a socket");
        let path = meeting_path(folder.path(), std::process::id());
        assert_eq!(path.metadata().expect("a socket").permissions().mode() & 0o777, 0o600);
        let ours = Channel::connect(folder.path(), std::process::id()).expect("it listens");
        let theirs = meeting.accept().await.expect("one came");
        drop(meeting);
        assert!(!path.exists());
        let (mut near, far) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let message = Message::Connection { is_tcp: false };
        ours.send(&message, &[far.as_fd()], b"GET /\nHost").await.expect("sent");
        ours.send(&Message::Ready, &[], b"").await.expect("sent");
        drop((ours, far));
        let mut packet = theirs.next().await.expect("whole").expect("one");
        assert_eq!((packet.message, &packet.rest[..]), (message, &b"GET /\nHost"[..]));
        let far = std::os::unix::net::UnixStream::from(packet.descriptors.remove(0));
        std::io::Write::write_all(&mut &far, b"x").expect("the same socket");
        std::io::Read::read_exact(&mut near, &mut [0]).expect("the same socket");
        let packet = theirs.next().await.expect("whole").expect("one");
        assert_eq!((packet.message, packet.descriptors.len()), (Message::Ready, 0));
        assert!(theirs.next().await.expect("an end").is_none());
        let refusal = theirs.send(&Message::Ready, &[], b"").await.expect_err("nobody is there");
        assert!(matches!(refusal, Refusal::Socket(_)), "{refusal}");
    }
}
