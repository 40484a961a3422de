//! [`Daemon`]: the parts that operations work with.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock, PoisonError, RwLock},
};

use tokio::sync::mpsc;
use v4_proto::{Digest, Fault, ModelInfo};
use v4_pull::Jobs;
use v4_store::{Store, StoreError};
use v4_supervisor::Supervisor;

use crate::{
    config::{Again, Config},
    error::Error,
    keys::Keys,
    limits, log,
    ops::metrics::Requests,
    otel::Exporter,
    replace::Channel,
    uses::Uses,
};

/// The parts of a running daemon. Shared as `Arc<Daemon>`.
pub struct Daemon {
    /// Blobs and names.
    pub store: Arc<Store>,
    /// Pulls.
    pub jobs: Jobs,
    /// Loaded models.
    pub supervisor: Supervisor,
    /// Where TCP clients are served, once that is known.
    pub listen: OnceLock<SocketAddr>,
    /// The settings, which change while it runs.
    config: RwLock<Arc<Config>>,
    /// Who may call over TCP.
    pub keys: Arc<Keys>,
    /// Where spans go, if anywhere.
    pub exporter: Option<Arc<Exporter>>,
    /// How often what was asked.
    pub requests: Requests,
    /// Who uses the store.
    pub uses: Uses,
    /// Where a daemon goes that wants to replace this one, while it serves.
    pub handovers: OnceLock<mpsc::Sender<Channel>>,
    /// The figures of models asked for lately, by the digest of their weights.
    known: Mutex<HashMap<Digest, ModelInfo>>,
}

impl Daemon {
    /// A daemon of these parts, which wants no keys.
    pub fn new(config: Config, store: Arc<Store>, jobs: Jobs, supervisor: Supervisor) -> Self {
        let (listen, known) = (OnceLock::new(), Mutex::default());
        let (keys, requests) = (Arc::new(Keys::off()), Requests::default());
        let config = RwLock::new(Arc::new(config));
        let (exporter, uses, handovers) = (None, Uses::default(), OnceLock::new());
        Self {
            store,
            jobs,
            supervisor,
            listen,
            config,
            keys,
            exporter,
            requests,
            uses,
            handovers,
            known,
        }
    }

    /// The settings that count now.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the settings again, with what can change while it runs. Blocks.
    ///
    /// # Errors
    /// What is wrong with the file, and in which line; then nothing changes.
    pub fn reload(&self) -> Result<Again, Error> {
        let again = self.config().again()?;
        let config = &again.config;
        self.store.set_quota(config.store_quota());
        if again.changed.contains(&"limit_rate") {
            self.jobs.set_rate(config.limit_rate);
        }
        self.jobs.set_peers(&config.peers);
        self.supervisor.reload(&config.supervisor(), again.changed.contains(&"memory"));
        log::set_level(config.log);
        let next = Arc::new(config.clone());
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = next;
        let (changed, at_start) = (again.changed.join(", "), again.at_start.join(", "));
        tracing::info!(changed, at_start, "the settings were read again");
        Ok(again)
    }

    /// Calls the store, which blocks, on a thread that may.
    ///
    /// # Errors
    /// What the store says, fit for a client; the log gets the whole chain.
    pub async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Fault> {
        let store = Arc::clone(&self.store);
        let done = tokio::task::spawn_blocking(move || work(&store)).await;
        let result = done.map_err(|error| {
            tracing::error!(%error, "a call of the store panicked");
            Fault::internal("v4 made a mistake; its log has the details")
        })?;
        result.map_err(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "the store failed");
            error.fault()
        })
    }

    /// The figures of a weights blob, if they were kept.
    pub fn known(&self, weights: &Digest) -> Option<ModelInfo> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(weights).cloned()
    }

    /// Keeps the figures of a weights blob.
    pub fn keep(&self, weights: Digest, info: ModelInfo) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= limits::KNOWN_MODELS {
            known.clear();
        }
        known.insert(weights, info);
    }
}
