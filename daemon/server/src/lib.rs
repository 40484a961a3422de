//! HTTP: what clients ask, in the words of Ollama and of OpenAI, and what they are answered.
//!
//! **Owns** the listeners, the routes, the surfaces with their errors, the operations behind them,
//! the settings and the log.
//!
//! **Never** touches a weight, a template or a kernel: a model's file is read and run by the
//! supervisor's processes. Nothing behind [`api`] knows a dialect.
//!
//! **Start reading at** `routes::ROUTES`, then `ops::generate`.

#![forbid(unsafe_code)]

mod api;
mod body;
mod caller;
mod catalog;
mod config;
mod daemon;
mod error;
#[cfg(test)]
mod fixture;
mod guard;
mod keys;
mod limits;
mod listen;
mod log;
mod ops;
mod options;
mod otel;
mod parent;
mod patience;
mod replace;
mod routes;
mod service_manager;
mod uses;

use std::{net::SocketAddr, path::Path, pin::pin, sync::Arc, time::Duration};

use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use v4_pull::{Jobs, PullConfig};
use v4_store::Store;
use v4_supervisor::Supervisor;

pub use config::{Config, DEFAULT_PORT, Given};
pub use error::Error;

use crate::{
    daemon::Daemon,
    guard::Guard,
    keys::Keys,
    listen::{Listeners, Server, Times},
    ops::generate,
    replace::take::Rest,
    routes::Service,
};

/// Runs the daemon until it is told to stop by SIGTERM or SIGINT: running answers may then end,
/// and a second signal ends them at once.
///
/// # Errors
/// Why it did not start: another daemon has the home, another program the port, and the like.
pub fn serve(config: Config) -> Result<(), Error> {
    log::start(&config)?;
    // Before there are threads: another daemon of this home ends this one here.
    let store = if config.replaces() { None } else { Some(Arc::new(Store::open(&config.home)?)) };
    let runtime = Builder::new_multi_thread()
        .worker_threads(limits::WORKER_THREADS)
        .max_blocking_threads(limits::BLOCKING_THREADS)
        .thread_name("v4-serve")
        .enable_all()
        .build()
        .map_err(|source| Error::Start { what: "no threads", source })?;
    let result = runtime.block_on(run(config, store));
    runtime.shutdown_timeout(limits::LAST_WAIT);
    result
}

/// What a daemon needs of the system: its store and its listeners, and what another one that it
/// replaces still has.
struct Place {
    store: Arc<Store>,
    listeners: Listeners,
    rest: Option<Rest>,
}

/// A home and listeners: of our own, or those of the daemon that is replaced.
async fn place(config: &mut Config, store: Option<Arc<Store>>) -> Result<Place, Error> {
    if store.is_none()
        && let Some(left) = replace::take::take(config).await?
    {
        // Else it is a share of what is free now, which lacks what the old one still has.
        config.memory = config.memory.or(Some(left.budget_bytes));
        let (store, listeners, rest) = left.split();
        return Ok(Place { store, listeners, rest: Some(rest) });
    }
    let store = match store {
        Some(store) => store,
        None => Arc::new(Store::open(&config.home)?),
    };
    let given = service_manager::given(config)?;
    let tcp = match (given.tcp, config.listen) {
        (Some(tcp), _) => Some(tcp),
        (None, Some(address)) => Some(listen::tcp(address).await?),
        (None, None) => None,
    };
    let keeps_socket = given.unix.is_some();
    let unix = match given.unix {
        Some(unix) => unix,
        None => listen::unix(&config.socket)?,
    };
    Ok(Place { store, listeners: Listeners { tcp, unix, keeps_socket }, rest: None })
}

async fn run(mut config: Config, store: Option<Arc<Store>>) -> Result<(), Error> {
    let stops = stops()?;
    let Place { store, listeners, rest } = place(&mut config, store).await?;
    let bound = listeners.tcp.as_ref().and_then(|listener| listener.local_addr().ok());
    let is_far = bound.is_some_and(|address| !address.ip().is_loopback());
    let keys = Arc::new(Keys::open(config.keys.as_deref(), is_far)?);
    if keys.shuts_out() {
        tracing::warn!(
            "nobody is answered over TCP until there is a key: run `v4 keys add NAME --scope use`, \
             or start v4 with V4_KEYS=off to let everybody in"
        );
    }
    let daemon = Arc::new(daemon(&config, store, keys));
    if let Some(address) = bound {
        daemon.listen.get_or_init(|| address);
    }
    let service = Service::new(Arc::clone(&daemon), guard(bound), limits::BODY_STALL);
    for one in &config.origin.ignored {
        let config::Ignored { variable, value, why } = one;
        tracing::warn!(variable, value, why, "a variable of Ollama changes nothing here");
    }
    reload_on_hangup(Arc::clone(&daemon))?;
    let server = Server::new(Arc::new(service), Times::default());
    let (connections, is_heir) = (server.giver(), rest.is_some());
    if let Some(rest) = rest {
        rest.settle(&daemon, connections).await?;
    }
    let (home, socket) = (config.home.display(), config.socket.display());
    let tcp_text = bound.map_or_else(|| "off".to_owned(), |address| address.to_string());
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(version, %home, listen = tcp_text, %socket, is_heir, "ready");
    let pid = std::process::id();
    service_manager::tell(&config, &format!("READY=1\nMAINPID={pid}\n"));
    preload(&daemon);
    serve_on(server, listeners, &daemon, stops).await;
    daemon.supervisor.shutdown(Duration::ZERO).await;
    tracing::info!("stopped");
    Ok(())
}

/// Serves until the daemon is told to stop, or another one has taken its place and the last answer
/// has ended.
async fn serve_on(
    mut server: Server,
    listeners: Listeners,
    daemon: &Arc<Daemon>,
    stops: watch::Receiver<u32>,
) {
    let (sender, mut handovers) = mpsc::channel(1);
    daemon.handovers.get_or_init(|| sender);
    let mut first = pin!(nth(stops.clone(), 1));
    let keeps_socket;
    loop {
        let next = async {
            tokio::select! {
                () = &mut first => None,
                channel = handovers.recv() => channel,
            }
        };
        let Some(channel) = server.serve(&listeners, next).await else {
            service_manager::tell(&daemon.config(), "STOPPING=1\n");
            keeps_socket = listeners.keeps_socket;
            drop(listeners);
            server.end(nth(stops, 2)).await;
            break;
        };
        match replace::give::give(&mut server, &listeners, daemon, channel).await {
            Ok(heir) => {
                // The socket's path is the new one's now.
                drop(listeners);
                if heir.outlive(&mut server, daemon, first).await {
                    server.end(nth(stops, 2)).await;
                }
                return;
            }
            Err(refusal) => tracing::warn!(%refusal, "this v4 is not replaced and serves on"),
        }
    }
    if keeps_socket {
        return;
    }
    if let Err(error) = v4_store::fs::remove_socket(&daemon.config().socket) {
        tracing::debug!(%error, "the socket stays behind");
    }
}

/// The parts of a daemon with these settings.
fn daemon(config: &Config, store: Arc<Store>, keys: Arc<Keys>) -> Daemon {
    store.set_quota(config.store_quota());
    let supervisor = Supervisor::start(&config.supervisor(), Arc::clone(&store));
    let mut pull = PullConfig::default();
    if let Some(url) = &config.index_url {
        pull.index_url.clone_from(url);
    }
    if let Some(url) = &config.npm_url {
        pull.npm_url.clone_from(url);
    }
    if let Some(registries) = &config.registry {
        pull.registries.clone_from(registries);
    }
    if let Some(endpoint) = &config.hf_endpoint {
        pull.hf_endpoint.clone_from(endpoint);
    }
    pull.hf_token.clone_from(&config.hf_token);
    pull.auth_file.clone_from(&config.auth_file);
    pull.ollama_key.clone_from(&config.ollama_key);
    pull.policy.clone_from(&config.policy);
    pull.peers.clone_from(&config.peers);
    pull.rate = config.limit_rate;
    let headers = Arc::new(catalog::Headers(supervisor.clone()));
    let jobs = Jobs::new(Arc::clone(&store), Arc::new(catalog::Library), headers, pull);
    let mut daemon = Daemon::new(config.clone(), store, jobs, supervisor);
    daemon.keys = keys;
    daemon.exporter =
        config.otlp.as_deref().map(|url| otel::Exporter::start(url, config.otlp_headers.clone()));
    daemon
}

/// Who may call a daemon that listens on `bound`.
fn guard(bound: Option<SocketAddr>) -> Guard {
    let file = v4_store::fs::read(&v4_store::fs::RealFs, Path::new(HOSTNAME), HOSTNAME_BYTES);
    let hostname = file.ok().and_then(|bytes| String::from_utf8(bytes).ok());
    Guard {
        hostname: hostname.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()),
        checks_host: bound.is_some_and(|address| address.ip().is_loopback()),
    }
}

/// Reads the settings again whenever SIGHUP says so.
fn reload_on_hangup(daemon: Arc<Daemon>) -> Result<(), Error> {
    let mut hangup = signal(SignalKind::hangup())
        .map_err(|source| Error::Start { what: "no signals can be heard", source })?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            let daemon = Arc::clone(&daemon);
            match tokio::task::spawn_blocking(move || daemon.reload()).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::error!(%error, "the settings stay as they are"),
                Err(error) => tracing::error!(%error, "the settings could not be read again"),
            }
        }
    });
    Ok(())
}

/// Loads the models that are to be there from the start, one after the other.
fn preload(daemon: &Arc<Daemon>) {
    let daemon = Arc::clone(daemon);
    tokio::spawn(async move {
        let config = daemon.config();
        for model in config.models.iter().filter(|model| model.preload) {
            let name = &model.name;
            match generate::load(&daemon, name).await {
                Ok(()) => tracing::info!(%name, "loaded at the start"),
                Err(fault) => tracing::warn!(%name, %fault, "not loaded at the start"),
            }
        }
    });
}

/// Where Linux says the name of the machine; elsewhere the guard does without.
const HOSTNAME: &str = "/proc/sys/kernel/hostname";

/// Bytes of a host's name at most: 64 on Linux.
const HOSTNAME_BYTES: usize = 256;

/// How often the daemon was told to stop.
fn stops() -> Result<watch::Receiver<u32>, Error> {
    let listen = |kind| {
        signal(kind).map_err(|source| Error::Start { what: "no signals can be heard", source })
    };
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let (sender, receiver) = watch::channel(0);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            sender.send_modify(|count| *count += 1);
        }
    });
    Ok(receiver)
}

/// Ends when the daemon was told to stop `n` times.
async fn nth(mut stops: watch::Receiver<u32>, n: u32) {
    if stops.wait_for(|&count| count >= n).await.is_err() {
        tracing::error!("nobody hears signals any more; stopping");
    }
}
