//! Which model has memory, which request runs, which waits and which is refused.
//!
//! Pure: [`step`] takes the state, what happened and the time, and says what to do. It starts no
//! process, reads no clock and sends nothing, so that every rule here is tested by a table and by
//! random histories with a simulated clock.
//!
//! A step first books what happened, then [`plan`](plan::settle) looks at the whole state: requests
//! go to ready runners, models that are asked for get memory, idle ones leave. The rules:
//!
//! - A request is refused at once or it waits; a queue a model is bounded.
//! - Memory is counted, on each [device](devices), from the decision to load until the process is
//!   gone. A model gets the best [place](place) that there is once those that may leave have left.
//! - Room is made by unloading idle models, the least [worth keeping](worth) first. A busy one gets
//!   nothing new and leaves when its answers have ended; a running answer is never cut for memory.
//! - A model that is in use keeps its memory for a [quantum](worth) that is worth the swap.
//! - Within a model's queue [callers take turns](turns).
//! - Cores are divided among the runners that answer, and one that answers alone has all.
//! - A name routes to one runner. Its replacement loads beside it where both fit, else after it.

use std::{
    any::Any,
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use v4_proto::{Code, Fault, Inventory, ModelFiles, ModelName, frame::KvType};

use crate::{KeepAlive, Target, limits};

mod devices;
mod fit;
mod habit;
mod history;
mod models;
mod place;
mod plan;
mod preview;
mod reload;
#[cfg(test)]
mod tests;
mod turns;
mod worth;

pub use devices::{Device, DeviceId, Devices, HOST, Spread};
use habit::Habits;
use history::History;
pub use history::{Blocker, Decision};
pub use models::{ModelRules, ModelTable};
pub use place::{Free, Level, Needs, Placement, Room, Share, place};
pub use preview::{DeviceLine, Outcome, Parts, Plan, Resident, preview};
use turns::Turns;
pub use worth::Worth;

/// Time since the supervisor's start.
pub type Time = Duration;
/// The supervisor's number for a runner process; never used again.
pub type RunnerId = u64;
/// The supervisor's number for an ask; the frames carry it too.
pub type AskId = u64;

/// Who asks, in a few letters: those of one caller take turns with those of others.
pub type Caller = Arc<str>;

/// What a person has said; it changes with [`Event::Rules`] alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Bytes that all models may take of the host's memory.
    pub budget_bytes: u64,
    /// Asks that may wait for one model.
    pub max_queue: usize,
    /// Sequences of one model at a time.
    pub slots: u32,
    /// Tokens of context a sequence gets.
    pub context: u32,
    /// How keys and values are kept.
    pub kv_type: KvType,
    /// Threads that compute, of all runners together; more only where there are more busy runners.
    pub threads: u32,
    /// Whether a started runner is kept ready.
    pub spare: bool,
    /// For loads that nobody asked for by a request.
    pub keep_alive: KeepAlive,
    /// What is said of single models.
    pub models: ModelTable,
}

/// Keeps something (a lease on blobs) for as long as a model is of interest here.
#[derive(Clone, Default)]
pub struct Hold(Option<Arc<dyn Any + Send + Sync>>);

impl Hold {
    /// Keeps `thing`.
    pub fn new(thing: impl Any + Send + Sync) -> Self {
        Self(Some(Arc::new(thing)))
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Hold" } else { "-" })
    }
}

impl PartialEq for Hold {
    /// A hold says nothing about the model.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// A model with its place in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// What is loaded.
    pub target: Target,
    /// Tokens of context a sequence gets.
    pub context: u32,
    /// Sequences at a time.
    pub slots: u32,
    /// Bytes it needs on all devices together, estimated from its header.
    pub bytes: u64,
    /// Where they are.
    pub placement: Placement,
    /// Keeps its blobs.
    pub hold: Hold,
}

impl Model {
    fn files(&self) -> &ModelFiles {
        &self.target.files
    }
}

/// What an ask is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An answer.
    Generate,
    /// An answer that nobody waits for: it is behind the others until it has waited for
    /// [`limits::AGEING`], and holds no place that one of them wants.
    Background,
    /// Only that the model is loaded.
    Load,
    /// That the name's new model takes over from the one that is loaded.
    Swap,
}

/// One call of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Its number.
    pub id: AskId,
    /// What for.
    pub kind: Kind,
    /// How long the model stays after it.
    pub keep_alive: KeepAlive,
    /// Who asks.
    pub caller: Caller,
}

/// Why a runner is gone.
#[derive(Debug, Clone, PartialEq)]
pub enum Cause {
    /// It said why it cannot work, or could not be started.
    Refused(Fault),
    /// It crashed, hung, or broke the protocol.
    Died,
    /// It was told to leave.
    Left,
}

/// Why a runner is told to leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// Nobody asked for its model within the keep-alive.
    Idle,
    /// Somebody wanted its model out of memory.
    Asked,
    /// The model of this name needs the memory.
    Room(ModelName),
    /// Models take more than they may.
    OverBudget,
    /// Its settings have changed: it is loaded again with the new ones.
    Settings,
    /// The name's new model takes over.
    Replaced,
    /// Other programs need the memory of this device.
    Others(DeviceId),
    /// This device has gone.
    Lost(DeviceId),
    /// The daemon ends.
    Shutdown,
}

impl Reason {
    /// Every [`Reason::word`].
    pub const WORDS: [&str; 9] = [
        "idle",
        "asked",
        "room",
        "over_budget",
        "settings",
        "replaced",
        "others",
        "lost",
        "shutdown",
    ];

    /// The reason in a word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Asked => "asked",
            Self::Room(_) => "room",
            Self::OverBudget => "over_budget",
            Self::Settings => "settings",
            Self::Replaced => "replaced",
            Self::Others(_) => "others",
            Self::Lost(_) => "lost",
            Self::Shutdown => "shutdown",
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A client asks.
    Ask {
        /// What.
        ask: Ask,
        /// Of which model; its `info` is known.
        target: Box<Target>,
        /// Keeps its blobs.
        hold: Hold,
    },
    /// A client lost interest, or has its answer.
    Left(AskId),
    /// A runner has said `Hello`.
    Started(RunnerId),
    /// A runner is `Ready`.
    Loaded {
        /// Which.
        runner: RunnerId,
        /// Bytes it takes.
        bytes: u64,
    },
    /// A runner has ended an answer.
    Ended {
        /// Which runner.
        runner: RunnerId,
        /// Which answer.
        ask: AskId,
    },
    /// A runner's process has ended.
    Gone {
        /// Which.
        runner: RunnerId,
        /// Why.
        cause: Cause,
        /// Answers that were cut after their first token.
        begun: BTreeSet<AskId>,
    },
    /// Somebody wants a model out of memory.
    Unload(ModelName),
    /// A runner has told of the machine's devices.
    Devices(Inventory),
    /// Another process, which is about to leave, holds so many bytes.
    HoldBack(u64),
    /// The settings were read again.
    Rules(Box<Rules>),
    /// The daemon ends.
    Shutdown {
        /// What running answers get.
        deadline: Duration,
    },
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Start a process and shake hands.
    Spawn(RunnerId),
    /// Send `Load`.
    Load {
        /// To which runner.
        runner: RunnerId,
        /// What.
        model: Arc<Model>,
    },
    /// Send `Generate`.
    Send {
        /// To which runner.
        runner: RunnerId,
        /// Which ask.
        ask: AskId,
        /// How long it waited for the model to be loaded.
        load: Duration,
    },
    /// Send `Cancel`.
    Cancel {
        /// To which runner.
        runner: RunnerId,
        /// Which ask.
        ask: AskId,
    },
    /// Send `Cores`.
    Cores {
        /// To which runner.
        runner: RunnerId,
        /// Its share.
        threads: u32,
    },
    /// Send `Drain`; kill it some time after the deadline.
    Stop {
        /// Which.
        runner: RunnerId,
        /// What its answers get.
        deadline: Duration,
        /// Why.
        reason: Reason,
    },
    /// A `Load` or `Swap` is done.
    Done {
        /// Which ask.
        ask: AskId,
        /// How long it waited for the model to be loaded.
        load: Duration,
    },
    /// An ask ends with a fault.
    Fail {
        /// Which ask.
        ask: AskId,
        /// Why.
        fault: Fault,
    },
    /// An ask ends without a word: its client has left.
    Forget(AskId),
}

/// An ask and what became of it so far.
#[derive(Debug, Clone)]
struct Pending {
    ask: Ask,
    asked_at: Time,
    sent_at: Time,
    /// It was on a runner that died before the first token.
    retried: bool,
    /// Its client has left; it only waits for the runner's word.
    left: bool,
}

impl Pending {
    /// When its turn is.
    fn turn(&self) -> Time {
        let patience = match self.ask.kind {
            Kind::Background => limits::AGEING,
            _ => Duration::ZERO,
        };
        self.asked_at.saturating_add(patience)
    }

    /// Whether it gives way to others.
    fn yields(&self, now: Time) -> bool {
        self.ask.kind == Kind::Background && now < self.turn()
    }
}

/// Where a runner stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The process was started, `Hello` has not come.
    Starting,
    /// It has said `Hello` and waits for a model.
    Spare,
    /// It loads a model.
    Loading,
    /// It answers.
    Ready,
    /// It was told to leave.
    Stopping,
}

/// One runner process.
#[derive(Debug, Clone)]
pub struct Runner {
    /// Where it stands.
    pub phase: Phase,
    /// What it has, or will have, in memory.
    pub model: Option<Arc<Model>>,
    /// Bytes it takes: the estimate, then its own figure.
    pub bytes: u64,
    /// Where they are.
    pub held: Spread,
    running: BTreeMap<AskId, Pending>,
    /// Threads it was last told to compute with.
    threads: u32,
    keep_alive: KeepAlive,
    /// Somebody wants its model out of memory, and nobody has asked for it since.
    unwanted: bool,
    /// When its last answer ended, or it became ready.
    idle_since: Time,
    /// When it was last given work.
    used_at: Time,
    ready_at: Time,
    /// When its load was decided on.
    load_began: Time,
    /// Its model's rules say that it stays.
    is_pinned: bool,
    /// It was loaded with another context or number of sequences than the rules say now.
    is_outdated: bool,
    /// Gets nothing new, for its successor needs the memory.
    leaving: bool,
    /// Gets nothing new, for another model needs the memory. Decided anew in each step.
    yielding: bool,
}

impl Runner {
    fn new(threads: u32) -> Self {
        Self {
            phase: Phase::Starting,
            model: None,
            bytes: 0,
            held: Spread::default(),
            running: BTreeMap::new(),
            threads,
            keep_alive: KeepAlive::Forever,
            unwanted: false,
            idle_since: Time::ZERO,
            used_at: Time::ZERO,
            ready_at: Time::ZERO,
            load_began: Time::ZERO,
            is_pinned: false,
            is_outdated: false,
            leaving: false,
            yielding: false,
        }
    }

    /// Whether it takes requests.
    fn is_open(&self) -> bool {
        self.phase == Phase::Ready && !self.leaving && !self.yielding
    }

    /// Requests that it has.
    pub fn n_running(&self) -> usize {
        self.running.len()
    }

    /// Whether it has its model and was not told to leave.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// Whether it is ready and has no answer to finish.
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Ready && self.running.is_empty()
    }

    /// Whether it finishes what it has and takes nothing new.
    pub fn is_draining(&self) -> bool {
        self.phase == Phase::Stopping || self.leaving || self.yielding
    }

    /// When its keep-alive ends: none while it works, or if it never does.
    pub fn expires(&self) -> Option<Time> {
        match self.keep_alive {
            _ if self.is_pinned && !self.unwanted => None,
            KeepAlive::For(time) if self.is_idle() => Some(self.idle_since.saturating_add(time)),
            _ => None,
        }
    }

    /// When its keep-alive ends if it has no more to do from `now` on: what a person is told.
    pub fn would_expire(&self, now: Time) -> Option<Time> {
        match self.keep_alive {
            _ if self.is_pinned && !self.unwanted => None,
            KeepAlive::For(time) if !self.is_idle() => Some(now.saturating_add(time)),
            _ => self.expires(),
        }
    }

    /// When it was last of use.
    pub fn used_at(&self) -> Time {
        self.used_at.max(self.idle_since)
    }
}

/// All that is known of a name.
#[derive(Debug, Clone)]
struct Name {
    /// What the name means.
    want: Arc<Model>,
    /// What it routes to.
    runner: Option<RunnerId>,
    /// Its successor while that loads beside it.
    next: Option<RunnerId>,
    /// What the name means again should its successor fail to load.
    fallback: Option<Arc<Model>>,
    /// The keep-alive that a successor takes over.
    inherited: Option<KeepAlive>,
    /// Loaded even if nobody waits: a swap is under way since then.
    eager_since: Option<Time>,
    queue: VecDeque<Pending>,
    /// Whose turn it is in the queue.
    turns: Turns,
    swaps: Vec<Pending>,
    /// Files that failed to replace what is loaded, and until when they are not tried again.
    refused: Option<(ModelFiles, Time)>,
    /// Files that a swap has replaced, and until when an ask for them counts as an old one.
    replaced: Option<(ModelFiles, Time)>,
    error: Option<Fault>,
    deaths: VecDeque<Time>,
    quarantined_until: Option<Time>,
    /// Deaths since the last answer that ended well.
    streak: u32,
    retry_at: Time,
    /// A running mean of the time an answer takes.
    service: Duration,
}

impl Name {
    fn new(want: Arc<Model>) -> Self {
        Self {
            want,
            runner: None,
            next: None,
            fallback: None,
            inherited: None,
            eager_since: None,
            queue: VecDeque::new(),
            turns: Turns::default(),
            swaps: Vec::new(),
            refused: None,
            replaced: None,
            error: None,
            deaths: VecDeque::new(),
            quarantined_until: None,
            streak: 0,
            retry_at: Time::ZERO,
            service: Duration::from_secs(1),
        }
    }

    /// Makes the name mean `model`. New files are a new chance after deaths.
    fn mean(&mut self, model: Arc<Model>) {
        if self.want.files() != model.files() {
            self.deaths.clear();
            self.quarantined_until = None;
            self.streak = 0;
            self.retry_at = Time::ZERO;
        }
        self.want = model;
    }

    /// Books a death and says how long the name stays out of service, if it does.
    fn die(&mut self, now: Time) {
        self.deaths.retain(|at| now.saturating_sub(*at) < limits::DEATH_WINDOW);
        self.deaths.push_back(now);
        let doubled = limits::BACKOFF_FIRST.saturating_mul(1 << self.streak.min(16));
        self.retry_at = now + doubled.min(limits::BACKOFF_LAST);
        self.streak = self.streak.saturating_add(1);
        if self.deaths.len() >= limits::DEATHS {
            self.quarantined_until = Some(now + limits::DEATH_WINDOW);
            self.deaths.clear();
        }
    }

    fn quarantine(&self, now: Time) -> Option<Fault> {
        let left = self.quarantined_until?.checked_sub(now).filter(|left| !left.is_zero())?;
        Some(Fault::new(
            Code::Overloaded,
            format!(
                "{} is out of service: its process died {} times in {} minutes; the daemon's log \
                 has its last lines; try again in {} s",
                self.want.target.name,
                limits::DEATHS,
                limits::DEATH_WINDOW.as_secs() / 60,
                left.as_secs().max(1),
            ),
        ))
    }

    fn full(&self) -> Fault {
        let rounds = self.queue.len() as u64 / u64::from(self.want.slots.max(1)) + 1;
        let seconds = self.service.as_secs_f64() * rounds as f64;
        Fault::new(
            Code::Overloaded,
            format!(
                "the queue of {} is full ({} requests wait); try again in {:.0} s",
                self.want.target.name,
                self.queue.len(),
                seconds.ceil().max(1.0),
            ),
        )
    }

    /// Since when somebody waits for this name to be loaded, and who.
    fn wanted_since(&self) -> Option<(Time, AskId)> {
        let first = self.queue.iter().map(|pending| (pending.turn(), pending.ask.id)).min();
        first.into_iter().chain(self.eager_since.map(|since| (since, 0))).min()
    }

    /// Whether one more ask of `caller` may wait. One who has none there finds a place where others
    /// have filled the queue.
    fn takes(&self, caller: &Caller, max_queue: usize) -> bool {
        let n_waiting = self.queue.len() + self.swaps.len();
        let waits = |pending: &Pending| pending.ask.caller == *caller;
        let is_new = !self.queue.iter().chain(&self.swaps).any(waits);
        n_waiting < max_queue + if is_new { limits::NEWCOMERS } else { 0 }
    }

    /// Whether nothing of it needs to be remembered.
    fn is_forgettable(&self, now: Time) -> bool {
        let is_past = |time: Option<Time>| time.is_none_or(|time| time <= now);
        self.runner.is_none()
            && self.next.is_none()
            && self.queue.is_empty()
            && self.swaps.is_empty()
            && self.eager_since.is_none()
            && is_past(self.quarantined_until)
            && self.deaths.iter().all(|at| now.saturating_sub(*at) >= limits::DEATH_WINDOW)
    }
}

/// Names are looked up without regard to letter case.
type Key = String;

fn key(name: &ModelName) -> Key {
    name.to_string().to_ascii_lowercase()
}

/// All runners and all that wait.
#[derive(Debug, Clone)]
pub struct State {
    rules: Rules,
    runners: BTreeMap<RunnerId, Runner>,
    names: BTreeMap<Key, Name>,
    habits: Habits,
    history: History,
    devices: Devices,
    /// When a model's quantum ends that somebody waits for.
    quantum_ends: Option<Time>,
    /// Bytes that another process holds, which is about to leave.
    held_back: u64,
    /// The budget has become smaller, and models may still be beyond it.
    is_shrunk: bool,
    next_runner: RunnerId,
    spare_retry_at: Time,
    spare_deaths: u32,
    closing: bool,
    stepped_at: Time,
}

impl State {
    /// Nothing is loaded.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            runners: BTreeMap::new(),
            names: BTreeMap::new(),
            habits: Habits::default(),
            history: History::default(),
            devices: Devices::default(),
            quantum_ends: None,
            held_back: 0,
            is_shrunk: false,
            next_runner: 1,
            spare_retry_at: Time::ZERO,
            spare_deaths: 0,
            closing: false,
            stepped_at: Time::ZERO,
        }
    }

    /// The runners that have a model, and why the last attempt to replace it failed.
    pub fn loaded(&self) -> impl Iterator<Item = (RunnerId, &Runner, &Model, Option<&Fault>)> {
        self.runners.iter().filter_map(|(id, runner)| {
            let model = runner.model.as_deref()?;
            let name = self.names.get(&key(&model.target.name));
            Some((*id, runner, model, name.and_then(|name| name.error.as_ref())))
        })
    }

    /// The names that are known, and how many asks wait for each.
    pub fn waiting(&self) -> impl Iterator<Item = (&ModelName, usize)> {
        self.names
            .values()
            .map(|name| (&name.want.target.name, name.queue.len() + name.swaps.len()))
    }

    /// Whether a model stays in memory whoever wants its place.
    fn is_pinned(&self, model: &Model) -> bool {
        self.rules.models.of(&key(&model.target.name)).pinned
    }

    /// How long a model stays after an ask that does not say.
    pub fn keep_alive(&self, name: &ModelName) -> KeepAlive {
        self.rules.models.of(&key(name)).keep_alive.unwrap_or(self.rules.keep_alive)
    }

    /// What was decided for a name, the oldest first.
    pub fn decisions<'a>(
        &'a self,
        name: &ModelName,
    ) -> impl Iterator<Item = &'a (Time, Decision)> + use<'a> {
        self.history.of(&key(name))
    }

    /// Bytes that all models may take of the host's memory.
    pub fn budget_bytes(&self) -> u64 {
        self.rules.budget_bytes
    }

    /// Whether a name has a runner that is not on its way out.
    pub fn is_loaded(&self, name: &ModelName) -> bool {
        self.names.get(&key(name)).is_some_and(|name| name.runner.is_some())
    }

    /// Threads that a runner computes with when it is loaded.
    pub fn threads(&self) -> u32 {
        self.rules.threads
    }

    /// Whether a shutdown is complete.
    pub fn is_over(&self) -> bool {
        self.closing && self.runners.is_empty()
    }

    /// Bytes of the host's memory that are taken or promised to a load that has begun.
    pub fn used_bytes(&self) -> u64 {
        self.used().of(HOST)
    }

    /// When [`Event::Tick`] is due at the latest: maybe in the past, if the last step was long ago.
    /// What that step found due waits for another event.
    pub fn next_deadline(&self) -> Option<Time> {
        let expiries = self.runners.values().filter_map(Runner::expires);
        let names = self.names.values().flat_map(|name| {
            let waits = name.queue.iter().chain(&name.swaps).map(|pending| pending.asked_at);
            let give_up = waits.min().map(|at| at + limits::QUEUE_WAIT);
            let waits_for_retry = name.runner.is_none() && name.wanted_since().is_some();
            give_up.into_iter().chain(waits_for_retry.then_some(name.retry_at))
        });
        let lacks_spare = self.rules.spare && !self.closing && self.free_runner().is_none();
        let spare = lacks_spare.then_some(self.spare_retry_at);
        let quanta = self.quantum_ends;
        expiries.chain(names).chain(spare).chain(quanta).filter(|at| *at > self.stepped_at).min()
    }

    /// A runner without a model, one that has shaken hands first.
    fn free_runner(&self) -> Option<RunnerId> {
        let free = |phase| {
            let is_free = move |runner: &Runner| runner.phase == phase && runner.model.is_none();
            self.runners.iter().find(|(_, runner)| is_free(runner)).map(|(id, _)| *id)
        };
        free(Phase::Spare).or_else(|| free(Phase::Starting))
    }
}

/// One step while it is worked out.
struct Turn {
    now: Time,
    effects: Vec<Effect>,
}

/// Books `event` and says what to do.
pub fn step(state: &mut State, event: Event, now: Time) -> Vec<Effect> {
    let mut turn = Turn { now, effects: Vec::new() };
    state.stepped_at = now;
    match event {
        Event::Ask { ask, target, hold } => admit(state, ask, (*target, hold), &mut turn),
        Event::Left(ask) => leave(state, ask, &mut turn),
        Event::Started(runner) => started(state, runner, &mut turn),
        Event::Loaded { runner, bytes } => loaded(state, runner, bytes, &mut turn),
        Event::Ended { runner, ask } => ended(state, runner, ask, &mut turn),
        Event::Gone { runner, cause, begun } => gone(state, runner, cause, &begun, &mut turn),
        Event::Unload(name) => unload(state, &name),
        Event::Devices(inventory) => {
            let own = state.used();
            state.devices.update(inventory, &own);
        }
        Event::HoldBack(bytes) => state.held_back = bytes,
        Event::Rules(rules) => reload::rules(state, *rules, &mut turn),
        Event::Shutdown { deadline } => shutdown(state, deadline, &mut turn),
        Event::Tick => {}
    }
    plan::settle(state, &mut turn);
    share_cores(state, &mut turn);
    turn.effects
}

/// Divides the threads among the runners that answer, the earliest started first with what is left
/// over. An idle one keeps its share until it is given work.
fn share_cores(state: &mut State, turn: &mut Turn) {
    let threads = state.rules.threads.max(1);
    let is_busy = |runner: &Runner| !runner.running.is_empty();
    let n_busy = state.runners.values().filter(|runner| is_busy(runner)).count();
    let n_busy = u32::try_from(n_busy).unwrap_or(u32::MAX).max(1);
    let (each, mut left) = (threads / n_busy, threads % n_busy);
    for (&id, runner) in state.runners.iter_mut().filter(|(_, runner)| is_busy(runner)) {
        let share = (each + u32::from(left > 0)).max(1);
        left = left.saturating_sub(1);
        if runner.threads != share {
            runner.threads = share;
            turn.effects.push(Effect::Cores { runner: id, threads: share });
        }
    }
}

/// An ask is refused at once, or waits for the plan to find it a place.
fn admit(state: &mut State, ask: Ask, (target, hold): (Target, Hold), turn: &mut Turn) {
    let now = turn.now;
    let id = ask.id;
    let key = key(&target.name);
    let mut refuse = |history: &mut History, fault: Fault| {
        history.note(&key, now, Decision::Refused { fault: fault.clone() });
        turn.effects.push(Effect::Fail { ask: id, fault });
    };
    if state.closing {
        return refuse(&mut state.history, crate::answer::gone());
    }
    // What is loaded lies where it lies: over many GPUs a search takes milliseconds.
    let loaded = state.names.get(&key).filter(|name| name.runner.is_some());
    let loaded = loaded.filter(|name| state.has_choice() && name.want.target == target);
    let model = match loaded {
        Some(name) => Arc::clone(&name.want),
        None => match state.fit(target, hold) {
            Ok(model) => Arc::new(model),
            Err(fault) => return refuse(&mut state.history, fault),
        },
    };
    let max_queue = state.rules.models.of(&key).max_queue.unwrap_or(state.rules.max_queue);
    let name = state.names.entry(key.clone()).or_insert_with(|| Name::new(Arc::clone(&model)));
    let is_barred = name.runner.is_some()
        && name
            .refused
            .iter()
            .chain(&name.replaced)
            .any(|(files, until)| files == model.files() && now < *until);
    // A request that looked its model up a moment ago does not turn a swap back.
    let is_swapping = name.next.is_some() || name.eager_since.is_some();
    if ask.kind == Kind::Swap || !(is_barred || is_swapping) {
        if name.want.files() != model.files() {
            name.refused = None;
        }
        name.mean(model);
    }
    if let Some(fault) = name.quarantine(now) {
        return refuse(&mut state.history, fault);
    }
    if !name.takes(&ask.caller, max_queue) {
        return refuse(&mut state.history, name.full());
    }
    if ask.kind != Kind::Swap {
        let runs = |id: &RunnerId| state.runners.get(id).is_some_and(|it| !it.running.is_empty());
        let is_busy = !name.queue.is_empty() || name.runner.iter().any(runs);
        state.habits.of(&key, now).asked(now, is_busy);
    }
    let pending = Pending { ask, asked_at: now, sent_at: now, retried: false, left: false };
    if pending.ask.kind == Kind::Swap {
        name.swaps.push(pending);
    } else {
        name.queue.push_back(pending);
    }
}

/// A client left: a waiting ask ends here, a running one when its runner says so.
fn leave(state: &mut State, ask: AskId, turn: &mut Turn) {
    for name in state.names.values_mut() {
        let before = name.queue.len() + name.swaps.len();
        name.queue.retain(|pending| pending.ask.id != ask);
        name.swaps.retain(|pending| pending.ask.id != ask);
        if name.queue.len() + name.swaps.len() < before {
            turn.effects.push(Effect::Forget(ask));
            return;
        }
    }
    for (id, runner) in &mut state.runners {
        if let Some(pending) = runner.running.get_mut(&ask) {
            if !pending.left {
                pending.left = true;
                turn.effects.push(Effect::Cancel { runner: *id, ask });
            }
            return;
        }
    }
}

fn started(state: &mut State, id: RunnerId, turn: &mut Turn) {
    state.spare_deaths = 0;
    let Some(runner) = state.runners.get_mut(&id) else { return };
    if runner.phase != Phase::Starting {
        return;
    }
    match &runner.model {
        Some(model) => {
            runner.phase = Phase::Loading;
            turn.effects.push(Effect::Load { runner: id, model: Arc::clone(model) });
        }
        None => runner.phase = Phase::Spare,
    }
}

fn loaded(state: &mut State, id: RunnerId, bytes: u64, turn: &mut Turn) {
    let now = turn.now;
    let Some(runner) = state.runners.get_mut(&id) else { return };
    let (Phase::Loading, Some(model)) = (runner.phase, runner.model.clone()) else { return };
    runner.phase = Phase::Ready;
    runner.bytes = bytes;
    runner.held = std::mem::take(&mut runner.held).resized(bytes);
    (runner.idle_since, runner.ready_at) = (now, now);
    let key = key(&model.target.name);
    let took = now.saturating_sub(runner.load_began);
    state.habits.of(&key, now).loaded(took);
    state.history.note(&key, now, Decision::Ready { bytes, took });
    let Some(name) = state.names.get_mut(&key) else { return };
    let mut old = None;
    if name.next == Some(id) {
        old = name.runner.replace(id);
        name.next = None;
    }
    if let Some(before) = name.fallback.take() {
        name.replaced = Some((before.files().clone(), now + limits::STALE_ASK));
    }
    name.inherited = None;
    name.eager_since = None;
    if model.files() == name.want.files() {
        if name.refused.is_none() {
            name.error = None;
        }
        for swap in name.swaps.drain(..) {
            let load = now.saturating_sub(swap.asked_at);
            turn.effects.push(Effect::Done { ask: swap.ask.id, load });
        }
    }
    if let Some(old) = old {
        plan::stop(state, old, limits::SWAP_DRAIN, Reason::Replaced, turn);
    }
}

fn ended(state: &mut State, id: RunnerId, ask: AskId, turn: &mut Turn) {
    let now = turn.now;
    let Some(runner) = state.runners.get_mut(&id) else { return };
    let Some(pending) = runner.running.remove(&ask) else { return };
    if runner.running.is_empty() {
        runner.idle_since = now;
    }
    if pending.left {
        turn.effects.push(Effect::Forget(ask));
    }
    let Some(model) = &runner.model else { return };
    let key = key(&model.target.name);
    if let Some(name) = state.names.get_mut(&key) {
        state.habits.of(&key, now).quiet(now);
        name.streak = 0;
        // A mean over about the last eight answers.
        name.service = (name.service * 7 + now.saturating_sub(pending.sent_at)) / 8;
    }
}

/// A process has ended. Its answers that had no token yet get one more chance.
fn gone(state: &mut State, id: RunnerId, cause: Cause, begun: &BTreeSet<AskId>, turn: &mut Turn) {
    let now = turn.now;
    let Some(runner) = state.runners.remove(&id) else { return };
    let Some(model) = runner.model else {
        return spare_gone(state, now);
    };
    let key = key(&model.target.name);
    match (runner.phase, &cause) {
        (Phase::Stopping, _) => {}
        (Phase::Ready, _) | (_, Cause::Died | Cause::Left) => {
            state.history.note(&key, now, Decision::Died);
        }
        (_, Cause::Refused(fault)) => {
            state.history.note(&key, now, Decision::Refused { fault: fault.clone() });
        }
    }
    // A name whose runner was told to leave may have been forgotten meanwhile.
    let name = state.names.entry(key);
    let name = name.or_insert_with(|| Name::new(Arc::clone(&model)));
    let was_next = name.next == Some(id);
    if name.runner == Some(id) {
        name.runner = None;
    }
    if was_next {
        name.next = None;
    }
    for pending in runner.running.into_values().rev() {
        let ask = pending.ask.id;
        if pending.left {
            turn.effects.push(Effect::Forget(ask));
        } else if begun.contains(&ask) || pending.retried {
            turn.effects.push(Effect::Fail { ask, fault: died(&model.target.name) });
        } else {
            name.queue.push_front(Pending { retried: true, ..pending });
        }
    }
    match (runner.phase, cause) {
        (Phase::Stopping, _) => {}
        (Phase::Ready, _) => name.die(now),
        (_, Cause::Refused(fault)) => refused(name, &model, was_next, &fault, turn),
        (_, _) if name.fallback.is_some() => {
            let fault = died(&model.target.name);
            refused(name, &model, was_next, &fault, turn);
        }
        (_, _) => name.die(now),
    }
    if state.closing {
        fail_all(name, &crate::answer::gone(), turn);
    } else if let Some(fault) = name.quarantine(now) {
        fail_all(name, &fault, turn);
    }
}

/// A load has failed for a reason that another try would not change. What was loaded before stays,
/// or is loaded again; where there was nothing, all who wait are told.
fn refused(name: &mut Name, model: &Arc<Model>, was_next: bool, fault: &Fault, turn: &mut Turn) {
    let now = turn.now;
    let Some(fallback) = name.fallback.take() else {
        return fail_all(name, fault, turn);
    };
    name.error = Some(fault.clone());
    name.refused = Some((model.files().clone(), now + limits::BACKOFF_LAST));
    for swap in name.swaps.drain(..) {
        turn.effects.push(Effect::Fail { ask: swap.ask.id, fault: fault.clone() });
    }
    name.want = fallback;
    name.eager_since = (!was_next).then_some(now);
}

fn fail_all(name: &mut Name, fault: &Fault, turn: &mut Turn) {
    name.eager_since = None;
    for pending in name.queue.drain(..).chain(name.swaps.drain(..)) {
        turn.effects.push(Effect::Fail { ask: pending.ask.id, fault: fault.clone() });
    }
}

fn spare_gone(state: &mut State, now: Time) {
    let doubled = limits::BACKOFF_FIRST.saturating_mul(1 << state.spare_deaths.min(16));
    state.spare_retry_at = now + doubled.min(limits::BACKOFF_LAST);
    state.spare_deaths = state.spare_deaths.saturating_add(1);
}

fn died(name: &ModelName) -> Fault {
    Fault::new(
        Code::RunnerDied,
        format!(
            "the process of {name} ended in the middle of the answer; ask again, and look into the \
             daemon's log if it happens twice"
        ),
    )
}

/// The model leaves as soon as its answers have ended and nobody waits for it.
fn unload(state: &mut State, name: &ModelName) {
    let Some(name) = state.names.get_mut(&key(name)) else { return };
    name.eager_since = None;
    for id in name.runner.iter().chain(&name.next) {
        if let Some(runner) = state.runners.get_mut(id) {
            runner.keep_alive = KeepAlive::For(Duration::ZERO);
            runner.unwanted = true;
        }
    }
}

fn shutdown(state: &mut State, deadline: Duration, turn: &mut Turn) {
    state.closing = true;
    for name in state.names.values_mut() {
        fail_all(name, &crate::answer::gone(), turn);
    }
    let ids: Vec<RunnerId> = state.runners.keys().copied().collect();
    for id in ids {
        plan::stop(state, id, deadline, Reason::Shutdown, turn);
    }
}
