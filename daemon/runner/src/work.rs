//! The engine's thread: orders in, steps, events out.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TryRecvError},
    },
    time::{Duration, Instant},
};

use v4_proto::{
    Code, Done, Event, Fault, Finish, ModelFiles, Usage,
    frame::{FromRunner, LoadOptions, RequestId},
};

use crate::{
    Shared,
    backend::{Backend, Loaded},
    io::Out,
    limits,
};

/// From the reader.
pub enum Order<B: Backend> {
    /// Load a model.
    Load(ModelFiles, LoadOptions),
    /// Read a header.
    Inspect(ModelFiles),
    /// Answer a request.
    Submit(RequestId, B::Sequence),
    /// Stop answering it.
    Cancel(RequestId),
    /// Compute with this many threads.
    Cores(u32),
    /// Take nothing new; finish within this time.
    Drain(Duration),
}

/// The state of the engine's thread.
pub struct Worker<B: Backend> {
    orders: Receiver<Order<B>>,
    out: SyncSender<Out>,
    shared: Arc<Shared<B>>,
    engine: Option<B::Engine>,
    live: BTreeSet<RequestId>,
    drain_by: Option<Instant>,
}

impl<B: Backend> Worker<B> {
    pub fn new(orders: Receiver<Order<B>>, out: SyncSender<Out>, shared: Arc<Shared<B>>) -> Self {
        Self { orders, out, shared, engine: None, live: BTreeSet::new(), drain_by: None }
    }

    /// Works until a drain is done or nobody is left to work for.
    ///
    /// # Errors
    /// The fault that the process cannot go on with.
    pub fn run(mut self) -> Result<(), Fault> {
        loop {
            if !self.take_orders()? {
                return Ok(());
            }
            if self.live.is_empty() {
                if self.drain_by.is_some() {
                    if let Some(engine) = &mut self.engine {
                        B::flush(engine, limits::FLUSH);
                    }
                    // A closed channel is a daemon that has gone; so everywhere here.
                    let _ = self.out.send(Out::Last(FromRunner::Drained));
                    return Ok(());
                }
                continue;
            }
            self.step()?;
            self.enforce_drain();
        }
    }

    /// Takes all orders there are; where there is nothing to do, works in the background until
    /// there is one, then waits for it. `false` when nobody is left to work for.
    fn take_orders(&mut self) -> Result<bool, Fault> {
        if self.live.is_empty() && self.drain_by.is_none() {
            if self.engine.as_mut().is_some_and(B::rest) {
                return self.take_waiting();
            }
            match self.orders.recv() {
                Ok(order) => self.obey(order)?,
                Err(_) => return Ok(false),
            }
        }
        self.take_waiting()
    }

    /// Takes the orders that are there.
    fn take_waiting(&mut self) -> Result<bool, Fault> {
        loop {
            match self.orders.try_recv() {
                Ok(order) => self.obey(order)?,
                Err(TryRecvError::Empty) => return Ok(true),
                Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
    }

    fn say(&self, message: FromRunner) {
        let _ = self.out.send(Out::Frame(message));
    }

    fn obey(&mut self, order: Order<B>) -> Result<(), Fault> {
        match order {
            Order::Load(files, options) => self.load(&files, &options)?,
            Order::Inspect(files) => {
                let inspection = Box::new(B::inspect(&files)?);
                self.say(FromRunner::Info { inspection });
            }
            Order::Submit(id, sequence) => match &mut self.engine {
                Some(engine) if self.drain_by.is_none() && self.live.insert(id) => {
                    B::submit(engine, id, sequence);
                }
                _ => {
                    let fault = Fault::new(Code::Overloaded, "the model is about to be unloaded");
                    self.say(FromRunner::Failed { id, fault });
                }
            },
            Order::Cancel(id) => {
                if let Some(engine) = &mut self.engine
                    && self.live.contains(&id)
                {
                    B::cancel(engine, id);
                }
            }
            Order::Cores(threads) => {
                if let Some(engine) = &mut self.engine {
                    B::set_threads(engine, threads);
                }
            }
            Order::Drain(time) => {
                self.drain_by = Some(Instant::now() + time.min(limits::DRAIN));
            }
        }
        Ok(())
    }

    fn load(&mut self, files: &ModelFiles, options: &LoadOptions) -> Result<(), Fault> {
        if self.engine.is_some() {
            return Err(Fault::internal("a runner was given a second model"));
        }
        let out = self.out.clone();
        let mut said: Option<(v4_proto::frame::Stage, Instant)> = None;
        let loaded = B::load(files, options, &mut |stage, done, total| {
            let is_due = said.is_none_or(|(last, at)| {
                last != stage || at.elapsed() >= limits::PROGRESS || done >= total
            });
            if is_due {
                said = Some((stage, Instant::now()));
                let _ = out.send(Out::Frame(FromRunner::Progress { stage, done, total }));
            }
        })?;
        let Loaded { prepare, engine, info, context, memory_bytes } = loaded;
        self.shared.beat(B::stats(&engine));
        self.engine = Some(engine);
        if self.shared.prepare.set(prepare).is_err() {
            return Err(Fault::internal("a runner was given a second model"));
        }
        self.say(FromRunner::Ready { info, context, memory_bytes });
        Ok(())
    }

    fn step(&mut self) -> Result<(), Fault> {
        let Some(engine) = &mut self.engine else { return Ok(()) };
        let (live, out) = (&mut self.live, &self.out);
        let has_work = B::step(engine, &mut |id, event| {
            let message = match event {
                Event::Delta(delta) => FromRunner::Delta { id, delta },
                Event::Done(done) => FromRunner::Done { id, done },
                Event::Failed(fault) => FromRunner::Failed { id, fault },
            };
            if !matches!(message, FromRunner::Delta { .. }) {
                live.remove(&id);
            }
            let _ = out.send(Out::Frame(message));
        })?;
        self.shared.beat(B::stats(engine));
        if !has_work {
            self.close_all(Finish::Cancelled);
        }
        Ok(())
    }

    /// Every request gets its end, also those that an engine without work has said nothing of.
    fn close_all(&mut self, finish: Finish) {
        for id in std::mem::take(&mut self.live) {
            let done = Done { finish, usage: Usage::default() };
            self.say(FromRunner::Done { id, done });
        }
    }

    /// Past the deadline of a drain, what still runs is cancelled; the engine has a moment to say
    /// what it cost.
    fn enforce_drain(&mut self) {
        let (Some(drain_by), Some(engine)) = (self.drain_by, &mut self.engine) else { return };
        let now = Instant::now();
        if now >= drain_by + limits::CANCEL {
            self.close_all(Finish::Cancelled);
        } else if now >= drain_by {
            for id in &self.live {
                B::cancel(engine, *id);
            }
        }
    }
}
