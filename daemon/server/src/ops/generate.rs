//! Answers: what a surface asks for becomes a request with the model's own settings merged in, and
//! the supervisor's events come back.

use std::time::{Duration, Instant};

use serde_json::Value;
use v4_proto::{
    Ability, Code, Delta, Done, Event, Fault, Generate, Input, Message, ModelInfo, ModelName, Role,
    Think,
};
use v4_supervisor::{Answer, Caller, KeepAlive, Terms};

use crate::{
    daemon::Daemon,
    ops::models::{self, Model, Wanted},
    options::Options,
    otel::Trace,
    parent::Parent,
    uses::Use,
};

/// What a surface asks of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// Which model.
    pub model: Wanted,
    /// What for.
    pub work: Work,
    /// What the request says about how.
    pub options: Options,
    /// What the surface says where neither the request nor the model does.
    pub fallback: Options,
    /// How long the model stays after it; `None` is the daemon's setting.
    pub keep_alive: Option<KeepAlive>,
    /// Whether a conversation that does not fit loses its oldest turns (or is a fault).
    pub truncate: bool,
    /// Who asks.
    pub caller: Caller,
    /// The span that it belongs to.
    pub parent: Option<Parent>,
}

/// What a model is asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// Be in memory.
    Load,
    /// Leave memory.
    Unload,
    /// Answer a conversation.
    Chat {
        /// The turns.
        messages: Vec<Message>,
        /// Tool definitions.
        tools: Vec<Value>,
        /// How much to think.
        think: Option<Think>,
    },
    /// Answer one text, with the chat template.
    Prompt {
        /// The text.
        text: String,
        /// Instead of the model's own.
        system: Option<String>,
        /// How much to think.
        think: Option<Think>,
    },
    /// Continue a text as it is.
    Raw {
        /// The text.
        text: String,
    },
}

/// What happened to a model of which no text was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// It is in memory.
    Loaded,
    /// It is not.
    Unloaded,
}

/// The end of an answer with what the daemon measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct End {
    /// Why it ended and what it cost.
    pub done: Done,
    /// Time spent on loading the model, in nanoseconds.
    pub load_ns: u64,
    /// Time from the request to the end, in nanoseconds.
    pub total_ns: u64,
}

/// What came of an ask.
#[derive(Debug)]
pub enum Started {
    /// No text was asked for.
    Settled(Settled),
    /// The answer has begun: its first event is there and is no failure.
    Answering(Running),
}

/// An answer on its way. Dropping it cancels the request.
#[derive(Debug)]
pub struct Running {
    first: Option<Event>,
    answer: Answer,
    asked: Instant,
    trace: Option<Box<Trace>>,
}

/// What comes next of an answer.
#[derive(Debug)]
pub enum Step {
    /// More of it.
    Delta(Delta),
    /// The end.
    End(End),
    /// The end, for a reason that is not the model's.
    Failed(Fault),
}

impl Running {
    /// The next step; `None` after the last.
    pub async fn next(&mut self) -> Option<Step> {
        let event = match self.first.take() {
            Some(event) => event,
            None => self.answer.next().await?,
        };
        Some(match event {
            Event::Delta(delta) => Step::Delta(delta),
            Event::Failed(fault) => {
                if let Some(trace) = self.trace.take() {
                    trace.failed(&fault);
                }
                Step::Failed(fault)
            }
            Event::Done(done) => {
                if let Some(trace) = self.trace.take() {
                    trace.done(&done, Duration::from_nanos(self.answer.load_ns()));
                }
                let total_ns = u64::try_from(self.asked.elapsed().as_nanos()).unwrap_or(u64::MAX);
                Step::End(End { done, load_ns: self.answer.load_ns(), total_ns })
            }
        })
    }

    /// The whole answer, all deltas joined.
    ///
    /// # Errors
    /// The fault that ended it.
    pub async fn join(mut self) -> Result<(Delta, End), Fault> {
        let mut all = Delta::default();
        while let Some(step) = self.next().await {
            match step {
                Step::Delta(delta) => {
                    all.text.push_str(&delta.text);
                    all.thinking.push_str(&delta.thinking);
                    all.tool_calls.extend(delta.tool_calls);
                }
                Step::End(end) => return Ok((all, end)),
                Step::Failed(fault) => return Err(fault),
            }
        }
        Err(Fault::internal("the answer ended without an end; the daemon's log says why"))
    }
}

/// Has a model in memory, for as long as the settings say.
///
/// # Errors
/// As [`start`].
pub async fn load(daemon: &Daemon, name: &ModelName) -> Result<(), Fault> {
    let ask = Ask {
        model: Wanted { name: name.clone(), text: name.to_string() },
        work: Work::Load,
        options: Options::default(),
        fallback: Options::default(),
        keep_alive: None,
        truncate: true,
        caller: Caller::default(),
        parent: None,
    };
    let used = daemon.uses.begin(false).await?;
    start(daemon, ask, used).await.map(drop)
}

/// Does what is asked, up to the first event of the answer. The store is no longer `used` when the
/// supervisor has the request, which may wait there.
///
/// # Errors
/// `not_found`, `unsupported` where the model lacks an ability, and what the supervisor or the
/// runner says.
pub async fn start(daemon: &Daemon, mut ask: Ask, used: Use) -> Result<Started, Fault> {
    let asked = Instant::now();
    let config = daemon.config();
    ask.truncate &= config.truncate;
    let model = models::resolve(daemon, &ask.model).await?;
    if ask.work == Work::Unload {
        daemon.supervisor.unload(&model.record.name).await;
        return Ok(Started::Settled(Settled::Unloaded));
    }
    let info = models::info(daemon, &model).await?;
    let target = model.target(Some(info.clone()));
    drop(used);
    let of_model = config.model(&model.record.name).and_then(|table| table.keep_alive);
    let keep_alive = ask.keep_alive.or(of_model).or(Some(config.keep_alive));
    let terms = Terms { keep_alive, caller: ask.caller.clone() };
    let operation = match ask.work {
        Work::Chat { .. } => "chat",
        _ => "text_completion",
    };
    let parent = ask.parent.take();
    let Some(request) = request(&model, &info, ask)? else {
        daemon.supervisor.load(&target, terms).await?;
        touch(daemon, &model);
        return Ok(Started::Settled(Settled::Loaded));
    };
    // What its own system does not keep would be a trace without its beginning.
    let is_kept = parent.as_ref().is_none_or(|parent| parent.is_sampled);
    let named = |exporter| Trace::new(exporter, operation, model.record.name.to_string(), parent);
    let mut trace = daemon.exporter.as_ref().filter(|_| is_kept).map(named);
    let begun = async {
        let mut answer = daemon.supervisor.generate(&target, request, terms).await?;
        match answer.next().await {
            Some(Event::Failed(fault)) => Err(fault),
            first => Ok((answer, first)),
        }
    };
    match begun.await {
        Ok((answer, first)) => {
            // Not before: it would take a core from the engine.
            touch(daemon, &model);
            let trace = trace.map(Box::new);
            Ok(Started::Answering(Running { first, answer, asked, trace }))
        }
        Err(fault) => {
            if let Some(trace) = trace.take() {
                trace.failed(&fault);
            }
            Err(fault)
        }
    }
}

/// Notes the use of a name. Only figures for listings: nobody waits for it, and a failure is in
/// the log.
fn touch(daemon: &Daemon, model: &Model) {
    let (store, name) = (daemon.store.clone(), model.record.name.clone());
    tokio::task::spawn_blocking(move || {
        if let Err(error) = store.touch(&name) {
            tracing::debug!(%name, %error, "the last use could not be noted");
        }
    });
}

/// The domain request: the model's own settings merged in. `None` when no text is asked for.
fn request(model: &Model, info: &ModelInfo, ask: Ask) -> Result<Option<Generate>, Fault> {
    let input = match ask.work {
        Work::Load | Work::Unload => return Ok(None),
        Work::Raw { text } => {
            needs(info, Ability::Completion, &ask.model, "generate")?;
            Input::Raw { text }
        }
        Work::Prompt { text, system, think } => {
            needs(info, Ability::Completion, &ask.model, "generate")?;
            needs_thinking(info, think, &ask.model)?;
            let user = vec![Message::new(Role::User, text)];
            Input::Chat { messages: turns(model, system, user), tools: Vec::new(), think }
        }
        Work::Chat { messages, tools, think } => {
            needs(info, Ability::Completion, &ask.model, "chat")?;
            needs_thinking(info, think, &ask.model)?;
            if !tools.is_empty() && !info.abilities.contains(&Ability::Tools) {
                return Err(lacks(&ask.model.name, "tools"));
            }
            Input::Chat { messages: turns(model, None, messages), tools, think }
        }
    };
    let options = ask.options.or(model.options()?).or(ask.fallback);
    Ok(Some(Generate {
        input,
        sampling: options.sampling(),
        max_tokens: options.max_tokens(),
        context: options.num_ctx,
        stop: options.stop.unwrap_or_default(),
        truncate: ask.truncate,
        lane: options.lane.unwrap_or_default(),
    }))
}

/// The turns that the model sees: the system message, then those it brings along, then those of
/// the request.
fn turns(model: &Model, system: Option<String>, request: Vec<Message>) -> Vec<Message> {
    let own = &model.texts.messages;
    let has_system =
        own.iter().chain(&request).next().is_some_and(|first| first.role == Role::System);
    let system = match system {
        None if has_system => None,
        None => model.texts.system.clone(),
        said => said,
    };
    let system = system.map(|text| Message::new(Role::System, text));
    system.into_iter().chain(own.iter().cloned()).chain(request).collect()
}

fn needs(info: &ModelInfo, ability: Ability, model: &Wanted, what: &str) -> Result<(), Fault> {
    if info.abilities.contains(&ability) {
        return Ok(());
    }
    Err(Fault::new(Code::Unsupported, format!("\"{}\" does not support {what}", model.text)))
}

/// Only a wish to think needs a model that can; a wish not to is always met.
fn needs_thinking(info: &ModelInfo, think: Option<Think>, model: &Wanted) -> Result<(), Fault> {
    match think {
        None | Some(Think::Off) => Ok(()),
        Some(_) => needs(info, Ability::Thinking, model, "thinking"),
    }
}

/// What a model cannot do, in the words that clients know: its full name, unquoted.
pub fn lacks(model: &ModelName, ability: &str) -> Fault {
    let [host, namespace, name, tag] = model.path();
    Fault::new(
        Code::Unsupported,
        format!("{host}/{namespace}/{name}:{tag} does not support {ability}"),
    )
}
