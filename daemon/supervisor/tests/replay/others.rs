//! What others do: requests in the order they came in. The first whose model is not loaded has
//! others leave for it, and those behind it that need a load wait for that; those whose model is
//! loaded and stays go on.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::{Do, SLOTS, Scheduler, Time, What, trace::Trace};

/// Which model leaves.
#[derive(Clone, Copy)]
pub enum Rule {
    /// There may be `n` at a time, whatever their size, and never more than fit: the least recently
    /// used leaves.
    LeastRecent { n: usize },
    /// As many as fit; an idle one leaves first, and the one whose keep-alive ends first.
    ShortestKeepAlive,
}

struct Runner {
    model: String,
    is_loaded: bool,
    running: usize,
    used_at: Time,
    is_leaving: bool,
    is_told: bool,
}

pub struct Others<'a> {
    trace: &'a Trace,
    rule: Rule,
    queue: VecDeque<usize>,
    runners: BTreeMap<u64, Runner>,
    next: u64,
}

const KEEP_ALIVE: Duration = Duration::from_mins(5);

impl<'a> Others<'a> {
    pub fn new(trace: &'a Trace, rule: Rule) -> Self {
        Self { trace, rule, queue: VecDeque::new(), runners: BTreeMap::new(), next: 1 }
    }

    fn dispatch(&mut self, now: Time) -> Vec<Do> {
        let mut orders = Vec::new();
        let mut is_loading = self.runners.values().any(|runner| !runner.is_loaded);
        for ask in std::mem::take(&mut self.queue) {
            let model = &self.trace.asks[ask].model;
            let runner = self.runners.iter_mut().find(|(_, runner)| runner.model == *model);
            match runner {
                Some((id, runner))
                    if runner.is_loaded && !runner.is_leaving && runner.running < SLOTS =>
                {
                    runner.running += 1;
                    runner.used_at = now;
                    orders.push(Do::Answer(*id, ask));
                    continue;
                }
                None if !is_loading => {
                    is_loading = true;
                    if self.make_room(model) {
                        let id = self.next;
                        self.next += 1;
                        let model = model.clone();
                        orders.push(Do::Load(id, model.clone()));
                        let runner = Runner {
                            model,
                            is_loaded: false,
                            running: 0,
                            used_at: now,
                            is_leaving: false,
                            is_told: false,
                        };
                        self.runners.insert(id, runner);
                    }
                }
                _ => {}
            }
            self.queue.push_back(ask);
        }
        for (id, runner) in &mut self.runners {
            if runner.is_leaving && runner.running == 0 && !runner.is_told {
                runner.is_told = true;
                orders.push(Do::Unload(*id));
            }
        }
        orders
    }

    /// Whether there is room for a model; else one that has to leave for it is chosen.
    fn make_room(&mut self, model: &str) -> bool {
        let mib = |model: &str| self.trace.models[model].mib;
        let used: u64 = self.runners.values().map(|runner| mib(&runner.model)).sum();
        let fits = used + mib(model) <= self.trace.budget_mib;
        let is_allowed = match self.rule {
            Rule::LeastRecent { n } => self.runners.len() < n,
            Rule::ShortestKeepAlive => true,
        };
        if fits && is_allowed {
            return true;
        }
        if self.runners.values().any(|runner| runner.is_leaving) {
            return false;
        }
        let order = |runner: &Runner| match self.rule {
            Rule::LeastRecent { .. } => (false, runner.used_at),
            Rule::ShortestKeepAlive => (runner.running > 0, runner.used_at),
        };
        let victim = self.runners.iter().min_by_key(|(_, runner)| order(runner));
        if let Some(id) = victim.map(|(id, _)| *id) {
            self.runners.get_mut(&id).expect("it is there").is_leaving = true;
        }
        false
    }
}

impl Scheduler for Others<'_> {
    fn on(&mut self, what: What, now: Time) -> Vec<Do> {
        match what {
            What::Arrives(ask) => self.queue.push_back(ask),
            What::Loaded(id) => {
                let runner = self.runners.get_mut(&id).expect("it loads");
                runner.is_loaded = true;
                runner.used_at = now;
            }
            What::Ended(id, _) => {
                let runner = self.runners.get_mut(&id).expect("it answers");
                runner.running -= 1;
                runner.used_at = now;
            }
            What::Gone(id) => {
                self.runners.remove(&id);
            }
            What::Tick => {}
        }
        let mut orders = self.dispatch(now);
        for (id, runner) in &mut self.runners {
            let is_idle = runner.is_loaded && runner.running == 0 && !runner.is_leaving;
            if is_idle && now.saturating_sub(runner.used_at) >= KEEP_ALIVE {
                (runner.is_leaving, runner.is_told) = (true, true);
                orders.push(Do::Unload(*id));
            }
        }
        orders
    }

    fn deadline(&self) -> Option<Time> {
        let idle = |runner: &&Runner| runner.is_loaded && runner.running == 0 && !runner.is_leaving;
        self.runners.values().filter(idle).map(|runner| runner.used_at + KEEP_ALIVE).min()
    }
}
