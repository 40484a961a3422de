//! The old daemon's side: it offers what it has, waits until nobody uses the store, and goes on to
//! the end of its answers; or takes everything up again.

use std::{os::fd::AsFd, path::Path, sync::Arc};

use tokio::time::{Instant, interval, sleep};
use v4_proto::{Code, Fault};
use v4_store::StoreError;

use super::{Channel, Estate, Message, PROTOCOL, Refusal, Request, channel::Packet};
use crate::{
    daemon::Daemon,
    limits,
    listen::{Listeners, Server, Socket, Wire},
};

/// Judges what a new daemon asks for, and meets it.
///
/// # Errors
/// `invalid` for another home or protocol; `overloaded` while somebody works on the store.
pub fn meet(daemon: &Daemon, request: &Request, is_tcp: bool) -> Result<(), Fault> {
    if is_tcp {
        return Err(Fault::new(Code::Forbidden, "a v4 is replaced over its unix socket alone"));
    }
    if request.protocol != PROTOCOL {
        return Err(Fault::invalid(format!(
            "v4 {} runs here and cannot be replaced by this other version in place (protocol \
             {PROTOCOL}, not {}); stop it, then run `v4 serve`",
            env!("CARGO_PKG_VERSION"),
            request.protocol
        )));
    }
    let home = daemon.store.home();
    if Path::new(&request.home) != home {
        return Err(Fault::invalid(format!(
            "the v4 at this socket has the home {}; use the same V4_HOME to replace it",
            home.display()
        )));
    }
    if daemon.uses.is_long() {
        return Err(Fault::new(
            Code::Overloaded,
            "a model is being made, imported, sent or checked; try again when that is done",
        ));
    }
    let taken =
        || Fault::new(Code::Overloaded, "this v4 is being replaced already, or is stopping");
    let sender = daemon.handovers.get().ok_or_else(taken)?;
    let permit = sender.try_reserve().map_err(|_| taken())?;
    let channel = Channel::connect(home, request.pid).map_err(|error| {
        Fault::invalid(format!("the new v4 (process {}) is not there: {error}", request.pid))
    })?;
    permit.send(channel);
    Ok(())
}

/// Gives everything to the new daemon at the other end of `channel`. What comes meanwhile waits.
///
/// # Errors
/// Why not; then this daemon serves on.
pub async fn give(
    server: &mut Server,
    listeners: &Listeners,
    daemon: &Arc<Daemon>,
    channel: Channel,
) -> Result<Heir, Refusal> {
    // Until the new one is ready, nothing changes for clients.
    server.serve(listeners, offer(listeners, daemon, &channel)).await?;
    let began = Instant::now();
    match server.pause(release(daemon, &channel)).await {
        Ok(()) => {
            tracing::info!(ms = began.elapsed().as_millis(), "another v4 has taken over");
            daemon.uses.leave();
            daemon.jobs.give_up();
            Ok(Heir { channel })
        }
        Err(refusal) => {
            // The other side ends where it still is there.
            let why = Message::Stopped { why: refusal.to_string() };
            let _ = channel.send(&why, &[], b"").await;
            drop(channel);
            server.pause(take_back(daemon)).await?;
            daemon.jobs.go_on();
            daemon.uses.open();
            server.resume();
            Err(refusal)
        }
    }
}

async fn offer(listeners: &Listeners, daemon: &Daemon, channel: &Channel) -> Result<(), Refusal> {
    let figures = daemon.supervisor.figures().await;
    let message = Message::Offer {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        tcp: listeners.tcp.as_ref().and_then(|listener| listener.local_addr().ok()),
        budget_bytes: figures.budget_bytes,
        keeps_socket: listeners.keeps_socket,
    };
    let tcp = listeners.tcp.as_ref().map(AsFd::as_fd);
    let descriptors: Vec<_> = std::iter::once(listeners.unix.as_fd()).chain(tcp).collect();
    channel.send(&message, &descriptors, b"").await?;
    match channel.expect("got ready", limits::HANDOVER_READY).await? {
        Packet { message: Message::Ready, .. } => Ok(()),
        packet => Err(out_of_place(&packet)),
    }
}

/// Lets go of the home and waits until the new daemon serves.
async fn release(daemon: &Daemon, channel: &Channel) -> Result<(), Refusal> {
    // Connections that were just accepted get their word in.
    sleep(limits::HANDOVER_PAUSE).await;
    if !daemon.uses.shut(limits::HANDOVER_QUIET).await {
        let why =
            "requests that change models did not end in time; the old v4 serves on, try again";
        return Err(Refusal::Said(why.to_owned()));
    }
    let pulls = daemon.jobs.rest();
    let end = Instant::now() + limits::HANDOVER_QUIET;
    while daemon.store.is_written() {
        if Instant::now() > end {
            let why = "downloads did not let go of their files; the old v4 serves on, try again";
            return Err(Refusal::Said(why.to_owned()));
        }
        sleep(limits::HANDOVER_LOOK).await;
    }
    let figures = daemon.supervisor.figures().await;
    let loaded = daemon.supervisor.ps().await;
    let estate = Estate {
        memory_bytes: figures.used_bytes,
        models: loaded.iter().map(|loaded| loaded.name.to_string()).collect(),
        pulls,
    };
    let store = Arc::clone(&daemon.store);
    let released = tokio::task::spawn_blocking(move || store.hand_over()).await;
    released.map_err(|error| Refusal::Said(format!("the store could not be closed: {error}")))?;
    channel.send(&Message::Released(estate), &[], b"").await?;
    match channel.expect("served", limits::HANDOVER_SERVES).await? {
        Packet { message: Message::Serving, .. } => Ok(()),
        packet => Err(out_of_place(&packet)),
    }
}

/// Takes the home again. The system gives its lock back when the last process that has it ends.
async fn take_back(daemon: &Daemon) -> Result<(), Refusal> {
    let end = Instant::now() + limits::HANDOVER_BACK;
    loop {
        let store = Arc::clone(&daemon.store);
        let taken = tokio::task::spawn_blocking(move || store.take_back()).await;
        match taken.map_err(|error| Refusal::Said(error.to_string()))? {
            Err(StoreError::Locked { .. }) if Instant::now() < end => {}
            outcome => return Ok(outcome?),
        }
        sleep(limits::HANDOVER_LOOK).await;
    }
}

fn out_of_place(packet: &Packet) -> Refusal {
    Refusal::OutOfPlace(format!("{:?}", packet.message))
}

/// Whom this daemon left everything to.
#[derive(Debug)]
pub struct Heir {
    channel: Channel,
}

impl Heir {
    /// Serves what is still being answered, and gives connections away that become idle, until
    /// none is left, or `stop` ends. Gives whether it was told to stop.
    pub async fn outlive(
        &self,
        server: &mut Server,
        daemon: &Daemon,
        stop: impl Future<Output = ()>,
    ) -> bool {
        // Nobody asks for these models any more. Those that answer leave with this process.
        for loaded in daemon.supervisor.ps().await {
            daemon.supervisor.unload(&loaded.name).await;
        }
        let connections = async {
            while let Some(socket) = server.next_parked().await {
                if let Err(refusal) = self.pass(socket).await {
                    tracing::debug!(%refusal, "a connection could not be passed on");
                }
            }
        };
        tokio::select! {
            () = connections => false,
            () = self.tell_memory(daemon) => false,
            () = stop => true,
            () = sleep(limits::HANDOVER_DRAIN) => {
                tracing::warn!("the last answers took too long");
                false
            }
        }
    }

    async fn pass(&self, socket: Socket) -> Result<(), Refusal> {
        let is_tcp = matches!(socket.wire, Wire::Tcp(_));
        let message = Message::Connection { is_tcp };
        self.channel.send(&message, &[socket.as_fd()], &socket.before).await
    }

    /// Says how much memory is still held, whenever that changes. Never ends.
    async fn tell_memory(&self, daemon: &Daemon) {
        let mut looks = interval(limits::HANDOVER_MEMORY);
        let mut said = None;
        loop {
            looks.tick().await;
            let bytes = daemon.supervisor.figures().await.used_bytes;
            if said != Some(bytes) {
                said = Some(bytes);
                // Where the new one is gone nobody wants to know.
                let _ = self.channel.send(&Message::Memory { bytes }, &[], b"").await;
            }
        }
    }
}
