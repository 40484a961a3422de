//! [`Socket`]: a client's connection, over TCP or the unix socket, that can be laid aside while it
//! is idle and taken up again, here or in another process.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

/// What carries a connection.
#[derive(Debug)]
pub enum Wire {
    /// From a program of this machine or the network.
    Tcp(TcpStream),
    /// From a program of this user.
    Unix(UnixStream),
}

/// What either wire is.
trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// A connection and what was read of it that nobody has understood yet.
#[derive(Debug)]
pub struct Socket {
    /// Carries it.
    pub wire: Wire,
    /// Comes before what the wire brings.
    pub before: Bytes,
    signs: Arc<Signs>,
}

/// What is known of a connection without asking HTTP.
#[derive(Debug, Default)]
pub struct Signs {
    n_requests: AtomicUsize,
    is_stuck: AtomicBool,
}

impl Signs {
    /// Whether no request is being answered and all of the last answer is with the system.
    pub fn is_idle(&self) -> bool {
        self.n_requests.load(Ordering::Acquire) == 0 && !self.is_stuck.load(Ordering::Acquire)
    }
}

/// A request that is being answered, as long as this lives.
#[derive(Debug)]
pub struct Busy(Arc<Signs>);

impl Busy {
    /// One more request of a connection.
    pub fn new(signs: &Arc<Signs>) -> Self {
        signs.n_requests.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(signs))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.n_requests.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Socket {
    /// A connection of which `before` was read already.
    pub fn new(wire: Wire, before: Bytes) -> Self {
        Self { wire, before, signs: Arc::default() }
    }

    /// What is known of it.
    pub fn signs(&self) -> Arc<Signs> {
        Arc::clone(&self.signs)
    }

    fn stream(&mut self) -> Pin<&mut dyn Stream> {
        match &mut self.wire {
            Wire::Tcp(stream) => Pin::new(stream),
            Wire::Unix(stream) => Pin::new(stream),
        }
    }

    fn noted<T>(&self, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        self.signs.is_stuck.store(outcome.is_pending(), Ordering::Release);
        outcome
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.wire {
            Wire::Tcp(stream) => stream.as_fd(),
            Wire::Unix(stream) => stream.as_fd(),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.before.is_empty() {
            let n = this.before.len().min(buffer.remaining());
            buffer.put_slice(&this.before.split_to(n));
            return Poll::Ready(Ok(()));
        }
        this.stream().poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = this.stream().poll_write(context, bytes);
        this.noted(outcome)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = this.stream().poll_write_vectored(context, slices);
        this.noted(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream().poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream().poll_shutdown(context)
    }
}
