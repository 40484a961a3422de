//! Frames to and from one runner: a task that owns its process from start to end.

use std::{collections::HashMap, future::pending, io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    sync::mpsc,
    time::{Instant, sleep_until},
};
use v4_proto::{
    Code, Event, Fault, Inventory, ModelFiles, ModelInfo,
    frame::{self, FromRunner, LENGTHS_BYTES, Lengths, LoadOptions, Stats, ToRunner},
};

use crate::{
    Error,
    answer::Route,
    limits,
    metrics::{Blocks, Meter, Series},
    policy::{AskId, Cause, RunnerId},
    process::{Launch, Process},
};

/// From the owner. When the sender is dropped, the runner is killed.
#[derive(Debug)]
pub(crate) enum Command {
    Load { files: Box<ModelFiles>, options: Box<LoadOptions>, counts: Counts },
    Generate { id: AskId, route: Route },
    Cancel { id: AskId },
    Cores { threads: u32 },
    Devices,
    Drain { deadline: Duration },
}

/// Where a link counts what its runner's heartbeats say.
#[derive(Debug)]
pub(crate) struct Counts {
    pub series: Arc<Series>,
    pub blocks: Arc<Blocks>,
}

/// To the owner.
#[derive(Debug)]
pub(crate) enum Report {
    Started,
    Devices {
        inventory: Inventory,
    },
    Loaded {
        info: Box<ModelInfo>,
        context: u32,
        bytes: u64,
    },
    Ended {
        id: AskId,
    },
    /// The last report: the process has ended.
    Gone {
        cause: Cause,
        unfinished: Vec<Unfinished>,
    },
}

/// A request that the end of a runner cut.
#[derive(Debug)]
pub(crate) struct Unfinished {
    pub id: AskId,
    pub begun: bool,
    pub route: Route,
}

/// Reads frames; cancelling [`FrameReader::next`] loses nothing.
#[derive(Debug)]
pub(crate) struct FrameReader {
    half: OwnedReadHalf,
    buffer: Vec<u8>,
}

impl FrameReader {
    pub fn new(half: OwnedReadHalf) -> Self {
        Self { half, buffer: Vec::new() }
    }

    /// The next message, or `None` at the end of the stream.
    pub async fn next(&mut self) -> Result<Option<FromRunner>, Error> {
        loop {
            if let Some(message) = take(&mut self.buffer)? {
                return Ok(Some(message));
            }
            let n = self.half.read_buf(&mut self.buffer).await.map_err(Error::Socket)?;
            if n == 0 && self.buffer.is_empty() {
                return Ok(None);
            } else if n == 0 {
                return Err(Error::Socket(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}

/// A whole message from the start of the buffer; `None` while some of it is missing.
fn take(buffer: &mut Vec<u8>) -> Result<Option<FromRunner>, Error> {
    let Some((start, rest)) = buffer.split_first_chunk::<LENGTHS_BYTES>() else {
        return Ok(None);
    };
    let lengths = Lengths::parse(*start)?;
    let Some(header) = rest.get(..lengths.header) else { return Ok(None) };
    if rest.len() - lengths.header < lengths.body {
        return Ok(None);
    }
    let message = frame::decode(header)?;
    buffer.drain(..LENGTHS_BYTES + lengths.header + lengths.body);
    Ok(Some(message))
}

/// Writes frames in a task of its own, so that a runner that does not read holds up nobody.
#[derive(Debug)]
pub(crate) struct FrameWriter(mpsc::Sender<Arc<[u8]>>);

impl FrameWriter {
    pub fn new(mut half: OwnedWriteHalf) -> Self {
        let (sender, mut frames) = mpsc::channel::<Arc<[u8]>>(limits::LINK_FRAMES);
        tokio::spawn(async move {
            while let Some(frame) = frames.recv().await {
                // The reading half notices a broken socket too, and says more about it.
                if half.write_all(&frame).await.is_err() {
                    return;
                }
            }
        });
        Self(sender)
    }

    pub fn send(&self, message: &ToRunner) -> Result<(), Error> {
        self.send_bytes(frame::encode(message, &[])?.into())
    }

    fn send_bytes(&self, frame: Arc<[u8]>) -> Result<(), Error> {
        match self.0.try_send(frame) {
            // A closed channel is a broken socket: the reading half says so.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(Error::TooLate { what: "read its frames", limit: limits::HEARTBEAT })
            }
        }
    }
}

/// Checks the first frame of a runner.
///
/// # Errors
/// [`Error::Handshake`] for another protocol or build, [`Error::TooLate`] when none comes.
pub(crate) async fn shake_hands(reader: &mut FrameReader) -> Result<(), Error> {
    let first = tokio::time::timeout(limits::HANDSHAKE, reader.next()).await;
    match first.map_err(|_| Error::TooLate { what: "say hello", limit: limits::HANDSHAKE })?? {
        Some(FromRunner::Hello { protocol, build })
            if protocol == frame::PROTOCOL && build == frame::BUILD =>
        {
            Ok(())
        }
        Some(FromRunner::Hello { protocol, build }) => Err(Error::Handshake { protocol, build }),
        Some(_) => Err(Error::OutOfPlace("something before Hello")),
        None => Err(Error::Ended("before its Hello".into())),
    }
}

/// One request on the runner.
#[derive(Debug)]
struct Live {
    /// Gone when the client has had its end while the runner has not yet said so.
    route: Option<Route>,
    begun: bool,
    is_cancelled: bool,
    meter: Meter,
}

/// Where the runner stands, as its link sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Spare,
    Loading,
    Ready,
}

/// The task of one runner.
pub(crate) struct Link {
    id: RunnerId,
    reports: mpsc::Sender<(RunnerId, Report)>,
    writer: FrameWriter,
    stage: Stage,
    live: HashMap<AskId, Live>,
    /// When the last sign of life came: any frame.
    heard_at: Instant,
    /// The last heartbeat.
    stats: Stats,
    stepped_at: Instant,
    counts: Option<Counts>,
    /// The end of a drain.
    leave_by: Option<Instant>,
    has_drained: bool,
    heartbeat: Duration,
}

/// Starts a runner and serves it to its end. Everything that happens goes to `reports`; the last is
/// [`Report::Gone`].
pub(crate) async fn run(
    id: RunnerId,
    launch: Launch,
    mut commands: mpsc::Receiver<Command>,
    reports: mpsc::Sender<(RunnerId, Report)>,
) {
    let (cause, unfinished) = match launch.spawn() {
        Err(error) => {
            tracing::error!(runner = id, error = &error as &dyn std::error::Error, "no runner");
            (Cause::Refused(error.fault()), Vec::new())
        }
        Ok((process, socket)) => {
            tracing::debug!(runner = id, pid = process.pid(), "runner started");
            let (read, write) = socket.into_split();
            let mut reader = FrameReader::new(read);
            let mut link = Link::new(id, &launch, reports.clone(), FrameWriter::new(write));
            let end = link.serve(&mut reader, &mut commands).await;
            // From here on the owner keeps what it would have sent.
            commands.close();
            // Closes the socket: a runner that still lives takes that as its end.
            let Link { live, stage, leave_by, has_drained, .. } = link;
            drop(reader);
            let mut unfinished = unsent(&mut commands).await;
            unfinished.extend(live.into_iter().filter_map(|(id, live)| {
                let Live { route, begun, .. } = live;
                route.map(|route| Unfinished { id, begun, route })
            }));
            let cause = bury(id, process, end, leave_by.is_some() || has_drained).await;
            tracing::debug!(runner = id, ?stage, ?cause, "runner ended");
            (cause, unfinished)
        }
    };
    // A closed channel means that the owner has ended, and with it whoever could care.
    let _ = reports.send((id, Report::Gone { cause, unfinished })).await;
}

/// The requests that a closed inbox still holds.
async fn unsent(commands: &mut mpsc::Receiver<Command>) -> Vec<Unfinished> {
    let mut unsent = Vec::new();
    while let Some(command) = commands.recv().await {
        if let Command::Generate { id, route } = command {
            unsent.push(Unfinished { id, begun: false, route });
        }
    }
    unsent
}

/// Sees the process to its end and says in the log how it was.
async fn bury(id: RunnerId, process: Process, end: Result<(), Error>, was_told: bool) -> Cause {
    let has_hung = matches!(end, Err(Error::TooLate { .. }));
    let ending = process.end(if has_hung { Duration::ZERO } else { limits::EXIT }).await;
    let status = match &ending.status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    match end {
        Ok(()) if was_told => Cause::Left,
        Ok(()) => {
            tracing::error!(runner = id, status, last_lines = ending.last_lines, "runner died");
            Cause::Died
        }
        Err(error) => {
            let cause = &error as &dyn std::error::Error;
            let last_lines = ending.last_lines;
            tracing::error!(runner = id, error = cause, status, last_lines, "runner failed");
            match error {
                Error::Fatal(_) | Error::Handshake { .. } => Cause::Refused(error.fault()),
                _ => Cause::Died,
            }
        }
    }
}

impl Link {
    fn new(
        id: RunnerId,
        launch: &Launch,
        reports: mpsc::Sender<(RunnerId, Report)>,
        writer: FrameWriter,
    ) -> Self {
        let now = Instant::now();
        Self {
            id,
            reports,
            writer,
            stage: Stage::Spare,
            live: HashMap::new(),
            heard_at: now,
            stats: Stats::default(),
            stepped_at: now,
            counts: None,
            leave_by: None,
            has_drained: false,
            heartbeat: launch.heartbeat,
        }
    }

    /// Until the socket ends, a deadline passes or the owner lets go.
    async fn serve(
        &mut self,
        reader: &mut FrameReader,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Result<(), Error> {
        shake_hands(reader).await?;
        self.report(Report::Started).await;
        loop {
            let deadline = self.deadline();
            let too_late = async {
                match deadline {
                    Some((at, what, limit)) => {
                        sleep_until(at).await;
                        Error::TooLate { what, limit }
                    }
                    None => pending().await,
                }
            };
            tokio::select! {
                message = reader.next() => match message? {
                    Some(message) => self.hear(message).await?,
                    None => return Ok(()),
                },
                command = commands.recv() => match command {
                    Some(command) => self.obey(command)?,
                    None => return Err(Error::TooLate { what: "be let go", limit: Duration::ZERO }),
                },
                error = too_late => return Err(error),
            }
        }
    }

    /// What the runner must do next, and by when.
    fn deadline(&self) -> Option<(Instant, &'static str, Duration)> {
        let mut earliest: Option<(Instant, &'static str, Duration)> = None;
        let mut at = |since: Instant, what, limit| {
            let candidate = (since + limit, what, limit);
            earliest = Some(earliest.map_or(candidate, |other| other.min(candidate)));
        };
        match self.stage {
            Stage::Loading => at(self.heard_at, "go on with a load", limits::LOAD_STALL),
            Stage::Ready if !self.live.is_empty() => {
                at(self.heard_at, "give a sign of life", self.heartbeat);
                at(self.stepped_at, "make a step", limits::STEP_STALL);
            }
            Stage::Ready | Stage::Spare => {}
        }
        if let Some(leave_by) = self.leave_by {
            at(leave_by, "leave", limits::EXIT);
        }
        earliest
    }

    async fn report(&self, report: Report) {
        // A closed channel means that the owner has ended; the command channel says so as well.
        let _ = self.reports.send((self.id, report)).await;
    }

    fn obey(&mut self, command: Command) -> Result<(), Error> {
        match command {
            Command::Load { files, options, counts } => {
                self.counts = Some(counts);
                self.stage = Stage::Loading;
                self.heard_at = Instant::now();
                self.writer.send(&ToRunner::Load { files: *files, options: *options })
            }
            Command::Generate { id, route } => {
                if self.live.is_empty() {
                    self.heard_at = Instant::now();
                    self.stepped_at = self.heard_at;
                }
                let frame = Arc::clone(&route.frame);
                let meter = route.meter.clone();
                let live = Live { route: Some(route), begun: false, is_cancelled: false, meter };
                self.live.insert(id, live);
                self.writer.send_bytes(frame)
            }
            Command::Cancel { id } => self.cancel(id),
            Command::Cores { threads } => self.writer.send(&ToRunner::Cores { threads }),
            Command::Devices => self.writer.send(&ToRunner::Devices),
            Command::Drain { deadline } => {
                self.leave_by = Some(Instant::now() + deadline);
                let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
                self.writer.send(&ToRunner::Drain { deadline_ms })
            }
        }
    }

    fn cancel(&mut self, id: AskId) -> Result<(), Error> {
        match self.live.get_mut(&id) {
            Some(live) if !live.is_cancelled => {
                live.is_cancelled = true;
                self.writer.send(&ToRunner::Cancel { id })
            }
            _ => Ok(()),
        }
    }

    async fn hear(&mut self, message: FromRunner) -> Result<(), Error> {
        self.heard_at = Instant::now();
        match message {
            FromRunner::Delta { id, delta } => return self.pass_on(id, delta),
            FromRunner::Done { id, done } => self.end(id, Event::Done(done)).await,
            FromRunner::Failed { id, fault } => self.end(id, Event::Failed(fault)).await,
            FromRunner::Stats(stats) => self.beat(stats),
            FromRunner::Progress { stage, done, total } => {
                tracing::debug!(runner = self.id, ?stage, done, total, "load");
            }
            FromRunner::Ready { info, context, memory_bytes } if self.stage == Stage::Loading => {
                self.stage = Stage::Ready;
                let report = Report::Loaded { info: Box::new(info), context, bytes: memory_bytes };
                self.report(report).await;
            }
            FromRunner::Devices { inventory } => self.report(Report::Devices { inventory }).await,
            FromRunner::Drained => self.has_drained = true,
            FromRunner::Fatal { fault } => return Err(Error::Fatal(fault)),
            FromRunner::Ready { .. } => return Err(Error::OutOfPlace("Ready")),
            FromRunner::Hello { .. } => return Err(Error::OutOfPlace("Hello")),
            FromRunner::Info { .. } => return Err(Error::OutOfPlace("Info")),
        }
        Ok(())
    }

    fn beat(&mut self, stats: Stats) {
        if stats.steps != self.stats.steps {
            self.stepped_at = self.heard_at;
        }
        if let Some(counts) = &self.counts {
            counts.series.beat(&self.stats, &stats);
            counts.blocks.set(&stats);
        }
        self.stats = stats;
    }

    /// Puts a delta into its request's buffer. A client whose buffer is full is cut off; nobody
    /// else waits for it.
    fn pass_on(&mut self, id: AskId, delta: v4_proto::Delta) -> Result<(), Error> {
        let Some(live) = self.live.get_mut(&id) else { return Ok(()) };
        let Some(route) = &live.route else { return Ok(()) };
        live.begun = true;
        live.meter.piece(self.heard_at);
        match route.deltas.try_send(delta) {
            Ok(()) => return Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                let fault = Fault::new(
                    Code::SlowClient,
                    "the answer was not read fast enough and was cancelled; read the stream as it \
                     comes, or ask without streaming",
                );
                if let Some(route) = live.route.take() {
                    // The client may have left at this very moment.
                    let _ = route.end.send(Event::Failed(fault));
                }
            }
            Err(mpsc::error::TrySendError::Closed(_)) => live.route = None,
        }
        self.cancel(id)
    }

    async fn end(&mut self, id: AskId, event: Event) {
        let Some(live) = self.live.remove(&id) else { return };
        live.meter.end(&event);
        if let Some(route) = live.route {
            // The client may have left.
            let _ = route.end.send(event);
        }
        self.report(Report::Ended { id }).await;
    }
}

#[cfg(test)]
mod tests {
    use v4_proto::{Delta, Done, Finish, Usage};

    use super::*;

    fn stream() -> Vec<u8> {
        let delta = Delta { text: "ein Wort".into(), ..Delta::default() };
        let done = Done { finish: Finish::Stop, usage: Usage::default() };
        let messages = [
            FromRunner::Hello { protocol: frame::PROTOCOL, build: frame::BUILD.into() },
            FromRunner::Delta { id: 7, delta },
            FromRunner::Done { id: 7, done },
        ];
        messages.iter().flat_map(|m| frame::encode(m, b"body").expect("encodes")).collect()
    }

    #[test]
    fn messages_come_whole_however_they_are_cut() {
        let mut buffer = Vec::new();
        let mut n_messages = 0;
        for byte in stream() {
            buffer.push(byte);
            n_messages += usize::from(take(&mut buffer).expect("frames").is_some());
        }
        assert_eq!((n_messages, buffer.len()), (3, 0));
    }

    #[tokio::test]
    async fn every_frame_is_a_sign_of_life() {
        let (ours, _theirs) = tokio::net::UnixStream::pair().expect("a socket");
        let (reports, _reported) = mpsc::channel(1);
        let launch = Launch::of(std::path::Path::new("v4"));
        let mut link = Link::new(1, &launch, reports, FrameWriter::new(ours.into_split().1));
        let delta = FromRunner::Delta { id: 7, delta: Delta::default() };
        for message in [delta, FromRunner::Drained, FromRunner::Stats(Stats::default())] {
            let before = link.heard_at;
            tokio::task::yield_now().await;
            link.hear(message).await.expect("in place");
            assert!(link.heard_at > before);
        }
    }

    #[test]
    fn damaged_bytes_are_an_error_or_a_wait_and_never_a_panic() {
        let mut seed = 1_u64;
        let mut dice = |n: usize| {
            // An xorshift generator is enough to spread the damage.
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            usize::try_from(seed % n as u64).expect("below a usize")
        };
        let mut n_errors = 0;
        for _ in 0..5000 {
            let mut buffer = stream();
            for _ in 0..=dice(4) {
                let at = dice(buffer.len());
                buffer[at] = u8::try_from(dice(256)).expect("below 256");
            }
            buffer.truncate(dice(buffer.len() + 1));
            loop {
                match take(&mut buffer) {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => {
                        n_errors += 1;
                        break;
                    }
                }
            }
        }
        assert!(n_errors > 100, "the damage does nothing");
    }
}
