//! Which runners live: admission, loading, eviction, swap, restart.
//!
//! **Owns** the runner processes, the sockets to them, the queue of each model, and the decision
//! which model has memory.
//!
//! **Never** parses a weight file, speaks HTTP, or decides anything outside [`policy`].
//!
//! **Start reading at** [`Supervisor`], then [`policy::step`].

#![forbid(unsafe_code)]

mod answer;
mod config;
mod error;
mod inspect;
mod inventory;
mod limits;
mod link;
pub mod metrics;
mod owner;
pub mod policy;
mod process;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::sync::{Semaphore, mpsc, oneshot};
use v4_proto::{
    Code, Digest, Fault, Generate, Inspection, ModelFiles, ModelInfo, ModelName,
    frame::{self, ToRunner},
};
use v4_store::Store;

pub use answer::Answer;
pub use config::{KeepAlive, KvFolder, SupervisorConfig, Target, Terms};
pub use error::Error;
pub use metrics::Figures;
use metrics::{Meter, Register};
use owner::{Ask, Message, Work};
pub use policy::Caller;
use policy::{Decision, Plan};
use process::Launch;

/// Where a loaded model stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is brought into memory.
    Loading,
    /// It answers.
    Ready,
    /// It finishes what it has and takes nothing new.
    Draining,
}

/// One line of `ps`.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The name it was loaded by.
    pub name: ModelName,
    /// The digest of the manifest it was loaded from.
    pub digest: Digest,
    /// Bytes of memory it takes: an estimate until it is ready.
    pub size_bytes: u64,
    /// Of these, bytes on GPUs.
    pub gpu_bytes: u64,
    /// On which devices it lies, if there is a choice.
    pub place: Option<String>,
    /// Tokens of context a sequence gets.
    pub context: u32,
    /// When it is unloaded if nobody asks; `None` is never, or not while it works.
    pub expires: Option<SystemTime>,
    /// Its figures.
    pub info: ModelInfo,
    /// Where it stands.
    pub state: State,
    /// Why the last attempt to replace it failed.
    pub error: Option<Fault>,
}

/// The handle to the one task that owns all runners. Clones are the same supervisor.
#[derive(Debug, Clone)]
pub struct Supervisor {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    mailbox: mpsc::Sender<Message>,
    next_id: AtomicU64,
    launch: Launch,
    inspectors: Semaphore,
    store: Arc<Store>,
    register: Arc<Register>,
}

impl Supervisor {
    /// Starts the owner task on the current tokio runtime.
    pub fn start(config: &SupervisorConfig, store: Arc<Store>) -> Self {
        let launch = Launch::of(&config.exe);
        Self::start_with(config, store, launch)
    }

    fn start_with(config: &SupervisorConfig, store: Arc<Store>, launch: Launch) -> Self {
        let (mailbox, messages) = mpsc::channel(limits::MAILBOX_MESSAGES);
        let register: Arc<Register> = Arc::default();
        let owner = owner::Owner::new(config, launch.clone(), Arc::clone(&register));
        tokio::spawn(owner.run(messages));
        let inspectors = Semaphore::new(limits::INSPECTORS);
        let next_id = AtomicU64::new(1);
        let shared = Shared { mailbox, next_id, launch, inspectors, store, register };
        Self { shared: Arc::new(shared) }
    }

    /// Gives a request to a runner of `target`, which is loaded first where it is not. The answer
    /// is there when the runner has the request.
    ///
    /// # Errors
    /// `overloaded` at once when the model's queue is full or the model is out of service;
    /// `out_of_memory` when it cannot fit; what the load says when it fails.
    pub async fn generate(
        &self,
        target: &Target,
        request: Generate,
        terms: Terms,
    ) -> Result<Answer, Fault> {
        let (id, lane) = (self.next_id(), request.lane);
        let message = ToRunner::Generate { id, request: Box::new(request) };
        let frame = frame::encode(&message, &[])
            .map_err(|error| Fault::invalid(format!("the request is too large: {error}")))?;
        let (_, series) = self.shared.register.find(&target.name);
        let (route, waiting) = answer::route(frame, Meter::new(series));
        let (begun, alive) = self.ask(id, target, terms, Work::Generate(route, lane)).await?;
        Ok(waiting.begin(begun, alive))
    }

    /// Loads `target` where it is not, and starts its keep-alive anew.
    ///
    /// # Errors
    /// As [`Supervisor::generate`].
    pub async fn load(&self, target: &Target, terms: Terms) -> Result<(), Fault> {
        self.ask(self.next_id(), target, terms, Work::Load).await.map(drop)
    }

    /// Unloads a model as soon as its answers have ended. `false` where it is not loaded.
    pub async fn unload(&self, name: &ModelName) -> bool {
        let (reply, answer) = oneshot::channel();
        self.tell(Message::Unload { name: name.clone(), reply }).is_ok()
            && answer.await.unwrap_or(false)
    }

    /// What the header of a model's files says, read by a short-lived runner.
    ///
    /// # Errors
    /// What the runner says of the files; `runner_died` when they end it; `overloaded` when too
    /// many are read already.
    pub async fn inspect(&self, files: ModelFiles) -> Result<Inspection, Fault> {
        let permit = self.shared.inspectors.acquire();
        let Ok(Ok(_permit)) = tokio::time::timeout(limits::INSPECT, permit).await else {
            return Err(Fault::new(
                Code::Overloaded,
                "too many models are inspected at this moment; try again in a minute",
            ));
        };
        inspect::inspect(&self.shared.launch, files).await
    }

    /// What is in memory, the most recently used first.
    pub async fn ps(&self) -> Vec<Loaded> {
        let (reply, answer) = oneshot::channel();
        match self.tell(Message::Ps { reply }) {
            Ok(()) => answer.await.unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }

    /// What is counted, and what every model has now.
    pub async fn figures(&self) -> Figures {
        let (reply, answer) = oneshot::channel();
        match self.tell(Message::Figures { reply }) {
            Ok(()) => answer.await.unwrap_or_default(),
            Err(_) => Figures::default(),
        }
    }

    /// What would happen if `target`, whose header is known, was asked for now.
    ///
    /// # Errors
    /// `overloaded` when the daemon ends or is flooded.
    pub async fn plan(&self, target: &Target) -> Result<Plan, Fault> {
        let (reply, answer) = oneshot::channel();
        self.tell(Message::Plan { target: Box::new(target.clone()), reply })?;
        answer.await.map_err(|_| answer::gone())
    }

    /// What was decided for a name of late, and when; the oldest first.
    ///
    /// # Errors
    /// As [`Supervisor::plan`].
    pub async fn why(&self, name: &ModelName) -> Result<Vec<(SystemTime, Decision)>, Fault> {
        let (reply, answer) = oneshot::channel();
        self.tell(Message::Why { name: name.clone(), reply })?;
        answer.await.map_err(|_| answer::gone())
    }

    /// Says that a name now means `target`. If it is loaded, the new one is loaded beside the old
    /// (or after it, where memory is short) and takes over; `true` when that is done, `false`
    /// where there was nothing to replace.
    ///
    /// # Errors
    /// What the load of the new one says; the old one then stays in service.
    pub async fn retag(&self, target: &Target) -> Result<bool, Fault> {
        if !self.ps().await.iter().any(|loaded| loaded.name.matches(&target.name)) {
            return Ok(false);
        }
        self.ask(self.next_id(), target, Terms::default(), Work::Swap).await.map(|_| true)
    }

    /// Takes other settings for models: budget, queue, context, sequences, keep-alive and the rules
    /// of single models. Where the memory did not change (`is_memory`), the budget stays as it is.
    pub fn reload(&self, config: &SupervisorConfig, is_memory: bool) {
        let message = Message::Rules { config: Box::new(config.clone()), is_memory };
        if let Err(fault) = self.tell(message) {
            tracing::warn!(%fault, "the rules for models stay as they are");
        }
    }

    /// Says how many bytes another process holds that is about to leave: no model gets them before.
    pub fn hold_back(&self, bytes: u64) {
        if self.tell(Message::HoldBack(bytes)).is_err() {
            tracing::debug!(bytes, "the supervisor does not hear what is held back");
        }
    }

    /// Refuses new work, lets running answers end until `deadline` from now, and ends all runners.
    pub async fn shutdown(&self, deadline: Duration) {
        let (reply, answer) = oneshot::channel();
        if self.tell(Message::Shutdown { deadline, reply }).is_ok() {
            let bound = deadline + limits::STOP + limits::EXIT;
            if tokio::time::timeout(bound, answer).await.is_err() {
                tracing::warn!(?bound, "runners were still there when the shutdown gave up");
            }
        }
    }

    fn next_id(&self) -> u64 {
        self.shared.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn tell(&self, message: Message) -> Result<(), Fault> {
        self.shared.mailbox.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                Fault::new(Code::Overloaded, "v4 gets more requests than it can sort; try again")
            }
            mpsc::error::TrySendError::Closed(_) => answer::gone(),
        })
    }

    async fn ask(
        &self,
        id: u64,
        target: &Target,
        terms: Terms,
        work: Work,
    ) -> Result<(answer::Begun, answer::Alive), Fault> {
        let lease = self.shared.store.lease(&target.blobs);
        let mut target = target.clone();
        if target.info.is_none() {
            target.info = Some(self.inspect(target.files.clone()).await?.info);
        }
        let (reply, begun) = oneshot::channel();
        let (alive, left) = oneshot::channel();
        let ask = Ask { id, target, lease, terms, work, reply };
        self.tell(Message::Ask(Box::new(ask)))?;
        let mailbox = self.shared.mailbox.clone();
        tokio::spawn(async move {
            // Resolves when the answer, or the call that waits for it, is dropped.
            let _ = left.await;
            let _ = mailbox.send(Message::Left(id)).await;
        });
        let begun = begun.await.unwrap_or_else(|_| Err(answer::gone()))?;
        Ok((begun, alive))
    }
}

#[cfg(test)]
mod tests;
