//! One model's process: frames in, frames out, three threads.
//!
//! **Owns** the process's end of the socket, its threads (reader, engine, writer), the heartbeat,
//! and how it drains and ends.
//!
//! **Never** touches the network, the store, a path it was not given, or any policy: what to load
//! and when to leave is the daemon's word.
//!
//! **Start reading at** [`run`], then [`work`].

#![forbid(unsafe_code)]

mod backend;
mod engine;
mod error;
mod io;
mod limits;
mod work;

use std::{
    net::Shutdown,
    os::unix::net::UnixStream,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use backend::Backend;
pub use error::Error;
use io::{Out, Reader};
use v4_proto::{
    Fault, Generate,
    frame::{self, FromRunner, RequestId, Stats, ToRunner},
};
use work::{Order, Worker};

/// What the three threads share.
pub(crate) struct Shared<B: Backend> {
    /// Set when the model is loaded, before `Ready` is said.
    prepare: OnceLock<B::Prepare>,
    /// The newest figures; none before a model is loaded.
    stats: Mutex<Option<Stats>>,
    /// Why the process ends, if not in order.
    failure: OnceLock<Fault>,
}

impl<B: Backend> Shared<B> {
    fn beat(&self, stats: Stats) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = Some(stats);
    }
}

/// The main function of `v4 runner`: serves the daemon whose socket is this process's standard
/// input.
///
/// # Errors
/// [`Error::NotASocket`] when started by hand; else what ended the runner other than in order.
pub fn run() -> Result<(), Error> {
    serve::<engine::Native>(io::from_stdin()?)
}

/// Serves the daemon at the other end of `socket` until it leaves, a drain is done, or the engine
/// fails.
fn serve<B: Backend>(socket: UnixStream) -> Result<(), Error> {
    let (out, frames) = sync_channel(limits::FRAMES_OUT);
    let (orders, orders_out) = sync_channel(limits::ORDERS);
    let shared = Arc::new(Shared::<B> {
        prepare: OnceLock::new(),
        stats: Mutex::new(None),
        failure: OnceLock::new(),
    });
    let hello = FromRunner::Hello { protocol: frame::PROTOCOL, build: frame::BUILD.into() };
    // The writer's receiver lives in this function until the thread has it.
    let _ = out.send(Out::Frame(hello));

    let (half, seen) = (socket.try_clone().map_err(Error::Socket)?, Arc::clone(&shared));
    spawn("writer", move || {
        let stats = || *seen.stats.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(fault) = io::write(&half, &frames, stats) {
            let _ = seen.failure.set(fault);
        }
        // Nothing more to say: the reader ends, whether the daemon is there or not.
        let _ = half.shutdown(Shutdown::Both);
    })?;
    let (engine_out, seen) = (out.clone(), Arc::clone(&shared));
    spawn("engine", move || {
        let worker = Worker::new(orders_out, engine_out.clone(), Arc::clone(&seen));
        let result = catch_unwind(AssertUnwindSafe(|| worker.run())).unwrap_or_else(|_| {
            // The panic's own words are on standard error, which the daemon keeps.
            Err(Fault::internal("the engine broke down; the daemon's log has its last lines"))
        });
        if let Err(fault) = result {
            let _ = seen.failure.set(fault.clone());
            let _ = engine_out.send(Out::Last(FromRunner::Fatal { fault }));
        }
    })?;
    read(Reader::new(socket), &orders, &out, &shared)?;
    shared.failure.get().map_or(Ok(()), |fault| Err(Error::Fatal(fault.clone())))
}

/// Starts a thread that nobody waits for: the process ends with its reader.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let thread = thread::Builder::new().name(name.into()).spawn(body);
    thread.map(drop).map_err(Error::Thread)
}

/// Frames to orders, until the daemon closes the socket or the writer does.
fn read<B: Backend>(
    mut reader: Reader<UnixStream>,
    orders: &SyncSender<Order<B>>,
    out: &SyncSender<Out>,
    shared: &Shared<B>,
) -> Result<(), Error> {
    let asked = Arc::new(AtomicBool::new(false));
    while let Some(message) = reader.next()? {
        let order = match message {
            ToRunner::Load { files, options } => Order::Load(files, options),
            ToRunner::Inspect { files } => Order::Inspect(files),
            ToRunner::Devices => {
                tell_devices::<B>(out, &asked)?;
                continue;
            }
            ToRunner::Cancel { id } => Order::Cancel(id),
            ToRunner::Cores { threads } => Order::Cores(threads),
            ToRunner::Drain { deadline_ms } => Order::Drain(Duration::from_millis(deadline_ms)),
            ToRunner::Generate { id, request } => match prepare(shared, id, &request) {
                Ok(order) => order,
                Err(fault) => {
                    let _ = out.send(Out::Frame(FromRunner::Failed { id, fault }));
                    continue;
                }
            },
        };
        // A closed channel is an engine thread that has ended: it has said why, and the socket is
        // about to close.
        let _ = orders.send(order);
    }
    Ok(())
}

/// Asks the drivers on a thread of its own: one that has to wake its device takes a second. Who
/// asks again meanwhile gets the answer that is on its way.
fn tell_devices<B: Backend>(out: &SyncSender<Out>, asked: &Arc<AtomicBool>) -> Result<(), Error> {
    if asked.swap(true, Ordering::AcqRel) {
        return Ok(());
    }
    let (out, asked) = (out.clone(), Arc::clone(asked));
    spawn("devices", move || {
        let inventory = B::devices();
        asked.store(false, Ordering::Release);
        // A closed channel is a daemon that has gone.
        let _ = out.send(Out::Frame(FromRunner::Devices { inventory }));
    })
}

/// Template, tokens and length, here and not on the engine's thread, so that a long prompt does not
/// hold up running answers.
fn prepare<B: Backend>(
    shared: &Shared<B>,
    id: RequestId,
    request: &Generate,
) -> Result<Order<B>, Fault> {
    let Some(prepare) = shared.prepare.get() else {
        return Err(Fault::internal("a request came before its model was loaded"));
    };
    let sequence = catch_unwind(AssertUnwindSafe(|| B::prepare(prepare, request)));
    let sequence = sequence.unwrap_or_else(|_| {
        Err(Fault::internal("the request could not be prepared; the daemon's log says why"))
    })?;
    Ok(Order::Submit(id, sequence))
}

#[cfg(test)]
mod tests;
