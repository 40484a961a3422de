//! Bodies: reading a client's within bounds, and writing an answer in one piece or as it comes.

use std::{
    any::Any,
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use v4_proto::{Code, Fault};

use crate::{error::Refusal, limits};

/// The body of an answer. Dropping it before its end is how the daemon learns that a client left.
pub struct Body {
    content: Content,
    line: Option<Line>,
    /// Dropped with it.
    held: Vec<Box<dyn Any + Send>>,
}

enum Content {
    Whole(Option<Bytes>),
    Stream(Pin<Box<dyn Stream<Item = Bytes> + Send>>),
}

/// What is logged of a request when its answer has ended.
pub struct Line {
    /// The number of the request.
    pub id: u64,
    /// What everything that is logged on the way of the answer belongs to.
    pub span: tracing::Span,
    /// What was asked: method and path.
    pub what: String,
    /// The name of the key it came with.
    pub caller: Option<String>,
    /// The status.
    pub status: u16,
    /// When it came.
    pub began: Instant,
    /// Bytes of the answer so far.
    pub bytes: u64,
    /// Whether the answer was taken to its end. To `HEAD`, that is its header.
    pub is_whole: bool,
}

impl Drop for Line {
    fn drop(&mut self) {
        let Self { id, what, caller, status, began, bytes, is_whole, .. } = self;
        let ms = began.elapsed().as_secs_f64() * 1e3;
        let outcome = if *is_whole { "done" } else { "client left" };
        let ms = (ms * 10.0).round() / 10.0;
        tracing::info!(id, key = caller.as_deref(), status, bytes, ms, outcome, "{what}");
    }
}

impl Body {
    /// An answer in one piece.
    pub fn whole(bytes: impl Into<Bytes>) -> Self {
        Self { content: Content::Whole(Some(bytes.into())), line: None, held: Vec::new() }
    }

    /// No bytes.
    pub fn empty() -> Self {
        Self { content: Content::Whole(None), line: None, held: Vec::new() }
    }

    /// An answer as it comes.
    pub fn stream(stream: impl Stream<Item = Bytes> + Send + 'static) -> Self {
        Self { content: Content::Stream(Box::pin(stream)), line: None, held: Vec::new() }
    }

    /// Keeps `thing` as long as the answer is not all sent.
    pub fn holding(mut self, thing: impl Any + Send) -> Self {
        self.held.push(Box::new(thing));
        self
    }

    /// Has a line logged when the answer has ended.
    pub fn logged(mut self, line: Line) -> Self {
        self.line = Some(line);
        self.note_end();
        self
    }

    fn note_end(&mut self) {
        let is_whole = self.is_end_stream();
        if let Some(line) = &mut self.line {
            line.is_whole |= is_whole;
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        let span = this.line.as_ref().map(|line| line.span.clone());
        let _within = span.as_ref().map(tracing::Span::enter);
        let next = match &mut this.content {
            Content::Whole(bytes) => bytes.take(),
            Content::Stream(stream) => match stream.as_mut().poll_next(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(next) => next,
            },
        };
        if let Some(line) = &mut this.line {
            match &next {
                Some(bytes) => line.bytes += bytes.len() as u64,
                None => line.is_whole = true,
            }
        }
        if matches!(this.content, Content::Whole(_)) {
            this.note_end();
        }
        Poll::Ready(next.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.content, Content::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64)
            }
            Content::Stream(_) => SizeHint::default(),
        }
    }
}

/// Bounds on bodies that are read.
#[derive(Debug, Clone)]
pub struct Reader {
    /// Without a byte.
    stall: Duration,
    /// A permit for each large body that is in memory.
    large: Arc<Semaphore>,
}

/// A body that was read. Its room is given back when this is dropped.
#[derive(Debug)]
pub struct Taken {
    /// The bytes.
    pub bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

impl Reader {
    /// Gives a client up that sends no byte for `stall`.
    pub fn new(stall: Duration) -> Self {
        Self { stall, large: Arc::new(Semaphore::new(limits::LARGE_BODIES)) }
    }

    /// Reads a body into memory.
    ///
    /// # Errors
    /// 413 when it is too large, 408 when the client stalls, 503 when too many large ones are in
    /// memory, 400 when it breaks off.
    pub async fn read<B>(&self, mut body: B) -> Result<Taken, Refusal>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        // What says itself that it is far too large need not be sent.
        if body.size_hint().lower() > 2 * limits::BODY_BYTES as u64 {
            return Err(Refusal::too_large());
        }
        let mut bytes = BytesMut::new();
        let mut room = None;
        let mut n_read = 0_usize;
        loop {
            let frame = timeout(self.stall, body.frame()).await.map_err(|_| stalled(self.stall))?;
            let Some(frame) = frame else { break };
            let broken = |_| Fault::invalid("the request body broke off before its end");
            let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
            n_read = n_read.saturating_add(data.len());
            // A little more is taken and dropped, so that a client that sends all before it reads
            // gets to see the refusal.
            if n_read > 2 * limits::BODY_BYTES {
                break;
            }
            if n_read > limits::BODY_BYTES {
                bytes.clear();
                continue;
            }
            if n_read > limits::LARGE_BODY_BYTES && room.is_none() {
                room = Some(self.room().await?);
            }
            bytes.extend_from_slice(&data);
        }
        if n_read > limits::BODY_BYTES {
            return Err(Refusal::too_large());
        }
        Ok(Taken { bytes: bytes.freeze(), _room: room })
    }

    /// The next bytes of a body that is not kept in memory; `None` at its end.
    ///
    /// # Errors
    /// 408 when the client stalls, 400 when it breaks off.
    pub async fn piece<B>(&self, body: &mut B) -> Result<Option<Bytes>, Refusal>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        loop {
            let frame = timeout(self.stall, body.frame()).await.map_err(|_| stalled(self.stall))?;
            let Some(frame) = frame else { return Ok(None) };
            let broken = |_| Fault::invalid("the request body broke off before its end");
            if let Ok(data) = frame.map_err(broken)?.into_data() {
                return Ok(Some(data));
            }
        }
    }

    async fn room(&self) -> Result<OwnedSemaphorePermit, Fault> {
        let permit = timeout(self.stall, Arc::clone(&self.large).acquire_owned()).await;
        permit.ok().and_then(Result::ok).ok_or_else(|| {
            Fault::new(Code::Overloaded, "too many large requests at this moment; try again")
        })
    }
}

fn stalled(limit: Duration) -> Refusal {
    let seconds = limit.as_secs_f64();
    Fault::new(
        Code::SlowClient,
        format!("no byte of the request body came for {seconds} s; send it again"),
    )
    .into()
}
