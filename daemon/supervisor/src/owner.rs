//! The one task that owns the state: it hears clients and runners, asks [`policy::step`] what to
//! do, and does it. It never waits for anybody but for the next message.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until},
};
use v4_proto::{
    Event as Answered, Fault, Inventory, Lane, ModelInfo, ModelName,
    frame::{KvDisk, KvType, LoadOptions, Precision},
};
use v4_store::Lease;

use crate::{
    Figures, KvFolder, Loaded, State, SupervisorConfig, Target, Terms,
    answer::{Begun, Route},
    inventory, limits,
    link::{self, Command, Counts, Report},
    metrics::{Blocks, Now, Register, Series},
    policy::{
        self, AskId, Cause, Decision, Effect, Event, Hold, Kind, Model, Phase, Plan, Rules,
        RunnerId,
    },
    process::Launch,
};

/// What a client asks for.
#[derive(Debug)]
pub(crate) enum Work {
    Generate(Route, Lane),
    Load,
    Swap,
}

/// One call of a client.
#[derive(Debug)]
pub(crate) struct Ask {
    pub id: AskId,
    pub target: Target,
    pub lease: Lease,
    pub terms: Terms,
    pub work: Work,
    pub reply: oneshot::Sender<Result<Begun, Fault>>,
}

/// From the handles.
#[derive(Debug)]
pub(crate) enum Message {
    Ask(Box<Ask>),
    /// Whoever asked has left or has its answer.
    Left(AskId),
    Unload {
        name: ModelName,
        reply: oneshot::Sender<bool>,
    },
    Ps {
        reply: oneshot::Sender<Vec<Loaded>>,
    },
    Figures {
        reply: oneshot::Sender<Figures>,
    },
    Plan {
        target: Box<Target>,
        reply: oneshot::Sender<Plan>,
    },
    Why {
        name: ModelName,
        reply: oneshot::Sender<Vec<(SystemTime, Decision)>>,
    },
    /// Bytes that another process holds.
    HoldBack(u64),
    /// Other settings, and whether the memory is among what changed.
    Rules {
        config: Box<SupervisorConfig>,
        is_memory: bool,
    },
    Shutdown {
        deadline: Duration,
        reply: oneshot::Sender<()>,
    },
}

/// The ways back to a client, as long as they are not with a link.
struct Client {
    /// Taken when the request is on a runner.
    reply: Option<oneshot::Sender<Result<Begun, Fault>>>,
    route: Option<Route>,
}

/// A runner as its link reports it.
struct Linked {
    commands: mpsc::Sender<Command>,
    facts: Option<(ModelInfo, u32)>,
    blocks: Arc<Blocks>,
    /// When it was told to load.
    load_began: Option<Instant>,
}

/// All that lives as long as the daemon.
pub(crate) struct Owner {
    state: policy::State,
    started: Instant,
    launch: Launch,
    kv_type: KvType,
    precision: Precision,
    kv_disk: Option<KvFolder>,
    isa: Option<String>,
    links: HashMap<RunnerId, Linked>,
    clients: HashMap<AskId, Client>,
    reports: mpsc::Sender<(RunnerId, Report)>,
    reported: mpsc::Receiver<(RunnerId, Report)>,
    /// When a runner was last asked for the machine's devices.
    devices_at: Option<Duration>,
    /// Asks that wait for the answer.
    parked: Vec<Ask>,
    /// Told when the last runner is gone.
    closers: Vec<oneshot::Sender<()>>,
    register: Arc<Register>,
}

impl Owner {
    pub fn new(config: &SupervisorConfig, launch: Launch, register: Arc<Register>) -> Self {
        let budget_bytes = config.memory_bytes.unwrap_or_else(inventory::budget_bytes);
        let rules = rules(config, budget_bytes);
        tracing::info!(budget_bytes = rules.budget_bytes, "memory for models");
        let (reports, reported) = mpsc::channel(limits::REPORTS);
        Self {
            state: policy::State::new(rules),
            started: Instant::now(),
            launch,
            kv_type: config.kv_type,
            precision: config.precision,
            kv_disk: config.kv_disk.clone(),
            isa: config.isa.clone(),
            links: HashMap::new(),
            clients: HashMap::new(),
            reports,
            reported,
            devices_at: None,
            parked: Vec::new(),
            closers: Vec::new(),
            register,
        }
    }

    /// Runs until a shutdown is complete or all handles are gone; links kill their runners then.
    pub async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        self.step(Event::Tick);
        while !self.state.is_over() {
            if self.next_look().is_some_and(|at| at <= self.now()) {
                self.ask_devices();
            }
            if self.parked_until().is_some_and(|at| at <= self.now()) {
                self.unpark();
            }
            let looks = self.next_look().into_iter().chain(self.parked_until());
            let deadline = self.state.next_deadline().into_iter().chain(looks).min();
            // A keep-alive of centuries is beyond the clock, and as good as none.
            let deadline = deadline.and_then(|at| self.started.checked_add(at));
            let tick = async {
                match deadline {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                message = messages.recv() => match message {
                    Some(message) => self.take(message),
                    None => return,
                },
                // This task holds a sender itself, so there is always a next report.
                Some((runner, report)) = self.reported.recv() => self.hear(runner, report),
                () = tick => self.step(Event::Tick),
            }
        }
        for closer in self.closers {
            // Whoever asked may have given up.
            let _ = closer.send(());
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Ask(ask) => self.park(*ask),
            Message::Left(ask) => {
                self.parked.retain(|parked| parked.id != ask);
                self.step(Event::Left(ask));
            }
            Message::Unload { name, reply } => {
                let was_loaded = self.state.is_loaded(&name);
                self.step(Event::Unload(name));
                // Whoever asked may have left; so below.
                let _ = reply.send(was_loaded);
            }
            Message::Ps { reply } => {
                let _ = reply.send(self.ps());
            }
            Message::Figures { reply } => {
                let _ = reply.send(self.figures());
            }
            Message::Plan { target, reply } => {
                let _ = reply.send(policy::preview(&self.state, &target, self.now()));
            }
            Message::Why { name, reply } => {
                let _ = reply.send(self.why(&name));
            }
            Message::HoldBack(bytes) => self.step(Event::HoldBack(bytes)),
            Message::Rules { config, is_memory } => self.reload(&config, is_memory),
            Message::Shutdown { deadline, reply } => {
                self.closers.push(reply);
                self.step(Event::Shutdown { deadline });
            }
        }
    }

    /// Takes other settings: those of [`Rules`], the others count at the next start.
    fn reload(&mut self, config: &SupervisorConfig, is_memory: bool) {
        let budget_bytes = match config.memory_bytes {
            _ if !is_memory => self.state.budget_bytes(),
            Some(bytes) => bytes,
            // What models have is not available, and is theirs to have.
            None => inventory::budget_bytes().saturating_add(self.state.used_bytes()),
        };
        tracing::info!(budget_bytes, "the rules for models were read again");
        self.step(Event::Rules(Box::new(Rules {
            threads: self.state.threads(),
            kv_type: self.kv_type,
            ..rules(config, budget_bytes)
        })));
    }

    fn ask(&mut self, ask: Ask) {
        let Ask { id, target, lease, terms, work, reply } = ask;
        let (kind, route) = match work {
            Work::Generate(route, Lane::Interactive) => (Kind::Generate, Some(route)),
            Work::Generate(route, Lane::Background) => (Kind::Background, Some(route)),
            Work::Load => (Kind::Load, None),
            Work::Swap => (Kind::Swap, None),
        };
        self.clients.insert(id, Client { reply: Some(reply), route });
        let Terms { keep_alive, caller } = terms;
        let keep_alive = keep_alive.unwrap_or_else(|| self.state.keep_alive(&target.name));
        let ask = policy::Ask { id, kind, keep_alive, caller };
        self.step(Event::Ask { ask, target: Box::new(target), hold: Hold::new(lease) });
    }

    fn hear(&mut self, runner: RunnerId, report: Report) {
        let event = match report {
            Report::Started => {
                if !self.state.devices().is_known() {
                    self.ask_devices();
                }
                Event::Started(runner)
            }
            Report::Devices { inventory } => return self.look(inventory),
            Report::Loaded { info, context, bytes } => {
                let series = self.series(runner);
                if let Some(linked) = self.links.get_mut(&runner) {
                    linked.facts = Some((*info, context));
                    if let (Some(series), Some(began)) = (series, linked.load_began) {
                        series.loads.add(1_u64);
                        series.load_time.observe(began.elapsed());
                    }
                }
                Event::Loaded { runner, bytes }
            }
            Report::Ended { id } => Event::Ended { runner, ask: id },
            Report::Gone { cause, unfinished } => {
                self.count_end(runner, &cause);
                self.links.remove(&runner);
                let mut begun = BTreeSet::new();
                for cut in unfinished {
                    if cut.begun {
                        begun.insert(cut.id);
                    }
                    self.clients.insert(cut.id, Client { reply: None, route: Some(cut.route) });
                }
                Event::Gone { runner, cause, begun }
            }
        };
        self.step(event);
    }

    fn step(&mut self, event: Event) {
        let now = self.now();
        let held = self.state.gpu_bytes();
        for effect in policy::step(&mut self.state, event, now) {
            self.act(effect);
        }
        if self.state.gpu_bytes() < held {
            // What has just become free is not somebody else's.
            self.ask_devices();
        }
    }

    /// Takes over what a runner has told of the devices, then what waited for it.
    fn look(&mut self, inventory: Inventory) {
        let before = self.state.devices().unused();
        self.step(Event::Devices(inventory));
        for sentence in self.state.devices().unused() {
            if !before.contains(&sentence) {
                tracing::warn!("{sentence}");
            }
        }
        self.unpark();
    }

    /// An ask waits for a look at devices that nobody has looked at for a while, because nothing
    /// was loaded: what others have of them is not what it was.
    fn park(&mut self, ask: Ask) {
        let at = self.devices_at.unwrap_or_default();
        let is_stale = self.state.has_choice() && self.now() >= at + limits::DEVICES_POLL;
        if self.parked.is_empty() && is_stale && !self.links.is_empty() {
            self.ask_devices();
        } else if self.parked.is_empty() || self.parked.len() >= limits::MAILBOX_MESSAGES {
            return self.ask(ask);
        }
        self.parked.push(ask);
    }

    /// Until when they wait at most.
    fn parked_until(&self) -> Option<Duration> {
        let at = self.devices_at.filter(|_| !self.parked.is_empty())?;
        Some(at + limits::DEVICES_WAIT)
    }

    fn unpark(&mut self) {
        for ask in std::mem::take(&mut self.parked) {
            self.ask(ask);
        }
    }

    /// When somebody is asked again what is in use of the devices.
    fn next_look(&self) -> Option<Duration> {
        let last = self.devices_at.filter(|_| self.state.watches_devices())?;
        Some(last + limits::DEVICES_POLL)
    }

    /// Asks any runner; each of them sees the same devices.
    fn ask_devices(&mut self) {
        if let Some(runner) = self.links.keys().copied().min() {
            self.devices_at = Some(self.now());
            self.tell(runner, Command::Devices);
        }
    }

    fn act(&mut self, effect: Effect) {
        match effect {
            Effect::Spawn(runner) => self.spawn(runner),
            Effect::Load { runner, model } => self.load(runner, &model),
            Effect::Send { runner, ask, load } => self.send(runner, ask, load),
            Effect::Cancel { runner, ask } => self.tell(runner, Command::Cancel { id: ask }),
            Effect::Cores { runner, threads } => self.tell(runner, Command::Cores { threads }),
            Effect::Stop { runner, deadline, reason } => {
                tracing::info!(runner, ?deadline, why = reason.word(), "runner is told to leave");
                if let Some(series) = self.series(runner) {
                    series.unload(&reason);
                }
                self.tell(runner, Command::Drain { deadline });
            }
            Effect::Done { ask, load } => {
                self.reply(ask, Ok(begun(load)));
                self.clients.remove(&ask);
            }
            Effect::Fail { ask, fault } => self.fail(ask, fault),
            Effect::Forget(ask) => {
                let client = self.clients.remove(&ask);
                if let Some(route) = client.and_then(|client| client.route) {
                    route.meter.left();
                }
            }
        }
    }

    fn spawn(&mut self, runner: RunnerId) {
        let (commands, inbox) = mpsc::channel(limits::LINK_COMMANDS);
        tokio::spawn(link::run(runner, self.launch.clone(), inbox, self.reports.clone()));
        self.links.insert(
            runner,
            Linked { commands, facts: None, blocks: Arc::default(), load_began: None },
        );
    }

    fn load(&mut self, runner: RunnerId, model: &Arc<Model>) {
        tracing::info!(runner, model = %model.target.name, bytes = model.bytes, "load");
        let options = LoadOptions {
            on_gpus: self.state.on_gpus(model),
            context: model.context,
            slots: model.slots,
            threads: self.state.threads(),
            kv_type: self.kv_type,
            precision: self.precision,
            kv_disk: self.kv_disk.as_ref().map(|folder| KvDisk {
                root: folder.path.clone(),
                models: model.target.blobs.clone(),
                quota_bytes: folder.quota_bytes,
            }),
            isa: self.isa.clone(),
        };
        let (files, options) = (Box::new(model.target.files.clone()), Box::new(options));
        let Some(linked) = self.links.get_mut(&runner) else { return };
        linked.load_began = Some(Instant::now());
        let (_, series) = self.register.find(&model.target.name);
        let counts = Counts { series, blocks: Arc::clone(&linked.blocks) };
        self.tell(runner, Command::Load { files, options, counts });
    }

    fn send(&mut self, runner: RunnerId, ask: AskId, load: Duration) {
        self.reply(ask, Ok(begun(load)));
        if let Some(route) = self.clients.remove(&ask).and_then(|client| client.route) {
            let unsent = self.command(runner, Command::Generate { id: ask, route });
            if let Err(Command::Generate { route, .. }) = unsent {
                // The report of the runner's end has the policy send it again, to another.
                self.clients.insert(ask, Client { reply: None, route: Some(route) });
            }
        }
    }

    /// Ends an ask: by the call that still waits, else as the last event of its stream.
    fn fail(&mut self, ask: AskId, fault: Fault) {
        let Some(Client { reply, route }) = self.clients.remove(&ask) else { return };
        if let Some(route) = &route {
            route.meter.failed();
        }
        // Whoever asked may have left in both cases.
        if let Some(reply) = reply {
            let _ = reply.send(Err(fault));
        } else if let Some(route) = route {
            let _ = route.end.send(Answered::Failed(fault));
        }
    }

    fn reply(&mut self, ask: AskId, result: Result<Begun, Fault>) {
        if let Some(reply) = self.clients.get_mut(&ask).and_then(|client| client.reply.take()) {
            // Whoever asked may have left; that comes as a message of its own.
            let _ = reply.send(result);
        }
    }

    /// Gives a command back where the link takes none any more: its report is on the way.
    fn command(&mut self, runner: RunnerId, command: Command) -> Result<(), Command> {
        let Some(linked) = self.links.get(&runner) else { return Err(command) };
        linked.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Closed(command) => command,
            mpsc::error::TrySendError::Full(command) => {
                tracing::error!(runner, "the link takes no commands; its runner is killed");
                // Dropping the sender kills the runner; the report of its end follows.
                self.links.remove(&runner);
                command
            }
        })
    }

    /// Sends what means nothing to a runner that has ended.
    fn tell(&mut self, runner: RunnerId, command: Command) {
        // The report of the end says all that is to be done.
        let _ = self.command(runner, command);
    }

    /// What is counted of a runner's model.
    fn series(&self, runner: RunnerId) -> Option<Arc<Series>> {
        let (_, _, model, _) = self.state.loaded().find(|(id, ..)| *id == runner)?;
        Some(self.register.find(&model.target.name).1)
    }

    /// Counts the end of a runner that nobody told to leave.
    fn count_end(&self, runner: RunnerId, cause: &Cause) {
        let Some(series) = self.series(runner) else { return };
        let is_ready = self.state.loaded().any(|(id, it, ..)| id == runner && it.is_ready());
        match cause {
            Cause::Refused(_) if !is_ready => series.load_failures.add(1_u64),
            Cause::Died | Cause::Refused(_) => series.deaths.add(1_u64),
            Cause::Left => {}
        }
    }

    fn figures(&self) -> Figures {
        let in_memory = self.state.loaded().map(|(id, runner, model, _)| {
            let blocks = self.links.get(&id).map(|linked| linked.blocks.get());
            let (blocks_used, blocks_total) = blocks.unwrap_or_default();
            let (running, bytes) = (runner.n_running() as u64, runner.bytes);
            let now = Now { running, bytes, blocks_used, blocks_total, ..Now::default() };
            (model.target.name.clone(), now)
        });
        let waiting = self
            .state
            .waiting()
            .map(|(name, n)| (name.clone(), Now { waiting: n as u64, ..Now::default() }));
        Figures {
            budget_bytes: self.state.budget_bytes(),
            used_bytes: self.state.used_bytes(),
            models: self.register.figures(in_memory.chain(waiting)),
        }
    }

    /// What was decided for a model, by the clock on the wall.
    fn why(&self, name: &ModelName) -> Vec<(SystemTime, Decision)> {
        let (now, wall) = (self.now(), SystemTime::now());
        let at = |at: Duration| wall.checked_sub(now.saturating_sub(at)).unwrap_or(wall);
        let decisions = self.state.decisions(name);
        decisions.map(|(since, decision)| (at(*since), decision.clone())).collect()
    }

    fn ps(&self) -> Vec<Loaded> {
        let now = self.now();
        let wall = SystemTime::now();
        let mut lines: Vec<_> = self
            .state
            .loaded()
            .filter_map(|(id, runner, model, error)| {
                let facts = self.links.get(&id).and_then(|linked| linked.facts.clone());
                let (info, context) =
                    facts.or_else(|| Some((model.target.info.clone()?, model.context)))?;
                let state = match runner.phase {
                    Phase::Starting | Phase::Spare | Phase::Loading => State::Loading,
                    _ if runner.is_draining() => State::Draining,
                    _ => State::Ready,
                };
                let line = Loaded {
                    name: model.target.name.clone(),
                    digest: model.target.digest,
                    size_bytes: runner.bytes,
                    gpu_bytes: runner.held.on_gpus(),
                    place: self.state.place_of(model),
                    context,
                    expires: runner
                        .would_expire(now)
                        .and_then(|at| wall.checked_add(at.saturating_sub(now))),
                    info,
                    state,
                    error: error.cloned(),
                };
                Some((runner.used_at(), line))
            })
            .collect();
        lines.sort_by_key(|(used_at, _)| std::cmp::Reverse(*used_at));
        lines.into_iter().map(|(_, line)| line).collect()
    }
}

fn begun(load: Duration) -> Begun {
    Begun { load_ns: u64::try_from(load.as_nanos()).unwrap_or(u64::MAX) }
}

/// What the policy is told of settings.
fn rules(config: &SupervisorConfig, budget_bytes: u64) -> Rules {
    Rules {
        budget_bytes,
        max_queue: config.max_queue,
        slots: config.slots,
        context: config.context,
        kv_type: config.kv_type,
        threads: if config.threads == 0 { inventory::cores() } else { config.threads },
        spare: config.spare,
        keep_alive: config.keep_alive,
        models: config.models.clone(),
    }
}
