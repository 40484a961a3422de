//! v4's policy, with runners that start and shake hands at once.

use std::{collections::BTreeSet, time::Duration};

use v4_proto::{Ability, Digest, Layout, ModelFiles, ModelInfo, frame::KvType};
use v4_supervisor::{
    KeepAlive, Target,
    policy::{Ask, Cause, Effect, Event, Hold, Kind, ModelTable, Rules, State, step},
};

use crate::{Do, SLOTS, Scheduler, Time, What, trace::Trace};

pub struct V4<'a> {
    trace: &'a Trace,
    state: State,
}

const KEEP_ALIVE: KeepAlive = KeepAlive::For(Duration::from_mins(5));
/// What the policy adds to the weights for the process and its activations.
const SCRATCH_MIB: u64 = 128;

impl<'a> V4<'a> {
    pub fn new(trace: &'a Trace) -> Self {
        let rules = Rules {
            budget_bytes: trace.budget_mib << 20,
            max_queue: 512,
            slots: u32::try_from(SLOTS).expect("a few"),
            context: 4096,
            kv_type: KvType::F16,
            threads: 8,
            spare: false,
            keep_alive: KEEP_ALIVE,
            models: ModelTable::default(),
        };
        Self { trace, state: State::new(rules) }
    }

    fn ask(&self, at: usize) -> Event {
        let line = &self.trace.asks[at];
        let info = ModelInfo {
            format: "gguf".into(),
            arch: "x".into(),
            supported: true,
            quant: "Q4_K_M".into(),
            n_params: 1,
            context_length: 4096,
            embedding_length: 1,
            n_layers: 1,
            weight_bytes: (self.trace.models[&line.model].mib - SCRATCH_MIB) << 20,
            kv_bytes_per_token: 0,
            layout: Layout::default(),
            abilities: vec![Ability::Completion],
        };
        let target = Target {
            name: line.model.parse().expect("a name"),
            digest: Digest::from_bytes([1; 32]),
            files: ModelFiles { weights: vec![line.model.clone().into()], ..Default::default() },
            blobs: Vec::new(),
            info: Some(info),
        };
        let caller = line.caller.as_str().into();
        let ask = Ask { id: at as u64, kind: Kind::Generate, keep_alive: KEEP_ALIVE, caller };
        Event::Ask { ask, target: Box::new(target), hold: Hold::default() }
    }
}

impl Scheduler for V4<'_> {
    fn on(&mut self, what: What, now: Time) -> Vec<Do> {
        let first = match what {
            What::Arrives(at) => self.ask(at),
            What::Loaded(runner) => {
                let loaded = self.state.loaded().find(|(id, ..)| *id == runner);
                let bytes = loaded.map_or(0, |(_, _, model, _)| model.bytes);
                Event::Loaded { runner, bytes }
            }
            What::Ended(runner, ask) => Event::Ended { runner, ask: ask as u64 },
            What::Gone(runner) => {
                Event::Gone { runner, cause: Cause::Left, begun: BTreeSet::new() }
            }
            What::Tick => Event::Tick,
        };
        let mut orders = Vec::new();
        let mut events = vec![first];
        while let Some(event) = events.pop() {
            for effect in step(&mut self.state, event, now) {
                match effect {
                    Effect::Spawn(runner) => events.push(Event::Started(runner)),
                    Effect::Load { runner, model } => {
                        let name = model.target.name.path()[2].to_owned();
                        orders.push(Do::Load(runner, name));
                    }
                    Effect::Send { runner, ask, .. } => {
                        orders.push(Do::Answer(runner, usize::try_from(ask).expect("a line")));
                    }
                    Effect::Stop { runner, .. } => orders.push(Do::Unload(runner)),
                    Effect::Cores { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        }
        assert!(self.state.used_bytes() <= self.state.budget_bytes());
        orders
    }

    fn deadline(&self) -> Option<Time> {
        self.state.next_deadline()
    }
}
