//! Several devices: who makes room where, what others take, what vanishes; then random histories.

use std::collections::HashMap;

use v4_proto::{Gpu, LayerRun};

use super::*;

/// A GPU with so many MiB for models when it is alone.
fn gpu(index: u32, mib: u64) -> Gpu {
    Gpu {
        index,
        name: "Double".into(),
        uuid: format!("GPU-{index}"),
        total_bytes: mib * MIB + limits::GPU_RESERVE_BYTES,
        used_bytes: 0,
        capability: [9, 0],
        can_compute: true,
    }
}

fn told(gpus: &[Gpu]) -> Event {
    Event::Devices(Inventory { gpus: gpus.to_vec(), ..Inventory::default() })
}

/// With so many MiB on each of the GPUs, and 1000 on the host.
fn with(gpus: &[u64], models: &[(&str, ModelRules)]) -> Story {
    let models = models.iter().map(|(name, rules)| ((*name).to_owned(), rules.clone()));
    let mut story = Story::new(Rules { models: ModelTable::new(models), ..rules() });
    let gpus: Vec<Gpu> = (0..).zip(gpus).map(|(index, mib)| gpu(index, *mib)).collect();
    story.on(told(&gpus), "");
    story
}

/// Ten equal layers with `experts` of 100 parts in experts; `mib` in one place.
fn layered(version: &str, mib: u64, experts: u64) -> Target {
    let mut target = target(version, mib);
    let info = target.info.as_mut().expect("set");
    let layer = (info.weight_bytes) / 10;
    let experts = layer / 100 * experts;
    let run = LayerRun { n: 10, dense: layer - experts, experts, kv_bytes_per_token: 0 };
    let output = info.weight_bytes - layer * 10;
    info.layout = Layout { output, layers: vec![run], ..Layout::default() };
    target
}

#[track_caller]
fn ask(story: &mut Story, id: AskId, target: Target, expected: &str) {
    let ask = Ask {
        id,
        kind: Kind::Generate,
        keep_alive: KeepAlive::For(secs(300)),
        caller: "me".into(),
    };
    let event = Event::Ask { ask, target: Box::new(target), hold: Hold::default() };
    story.on(event, expected);
}

/// Loads a model in runner `id` and has it answer once.
#[track_caller]
fn load(story: &mut Story, id: u64, version: &str, mib: u64) {
    ask(story, id, layered(version, mib, 0), &format!("spawn {id}"));
    story.started(id, &format!("load {id} {version}"));
    let bytes = story.state.runners[&id].bytes;
    story.on(Event::Loaded { runner: id, bytes }, &format!("send {id} #{id}"));
    story.ended(id, id, "");
    story.now += secs(10);
}

fn place_of(story: &Story, id: RunnerId) -> String {
    let model = story.state.runners[&id].model.as_ref().expect("a model");
    model.placement.to_string()
}

/// The last that was decided of a name, in words.
fn last(story: &Story, name: &str) -> String {
    let name: ModelName = name.parse().expect("a name");
    let (_, decision) = story.state.decisions(&name).last().expect("decided").clone();
    decision.to_string()
}

fn on(device: &str) -> ModelRules {
    ModelRules { device: Some(device.into()), ..ModelRules::default() }
}

#[test]
fn devices_that_nothing_computes_on_change_nothing() {
    let mut story = Story::new(rules());
    let unable = Gpu { can_compute: false, ..gpu(0, 80_000) };
    let complaint = "gpu1: the NVIDIA driver answers to nvmlDeviceGetHandleByIndex_v2: GPU is lost";
    let complaints = vec![complaint.to_owned()];
    story.on(Event::Devices(Inventory { gpus: vec![unable], complaints, is_blind: false }), "");
    load(&mut story, 1, "a", 600);
    assert_eq!(place_of(&story, 1), "on the host");
    assert_eq!(story.state.used_bytes(), 600 * MIB);
    ask(&mut story, 2, layered("b", 600, 0), "stop 1");
    let plan = preview(&story.state, &target("b", 600), story.now);
    assert_eq!((plan.place, plan.devices.len()), (None, 2));
    assert_eq!(plan.devices[1].why_not, Some("this build of v4 has no kernels for it"));
    assert_eq!((plan.devices[1].budget_bytes, plan.devices[1].used_bytes), (0, 0));
    let unused = story.state.devices().unused();
    let why = "gpu0 (Double, 80512 MiB, compute 9.0) is not used: this build of v4 has no kernels \
               for it";
    assert_eq!(unused, [why, complaint]);
    assert_eq!(last(&story, "b"), "waits for 200 MiB: a:latest is on its way out");
    assert!(!story.state.watches_devices(), "there is nothing to look at");
}

#[test]
fn a_model_lies_whole_on_a_gpu_then_over_several_then_with_its_experts_on_the_host() {
    let mut story = with(&[1000, 600], &[]);
    load(&mut story, 1, "a", 500);
    assert_eq!(place_of(&story, 1), "on gpu1", "the one that is left with the least");
    let words =
        "is loaded on gpu1, somebody asked for it: it needs 628 MiB, and 1600 MiB were free";
    let decisions: Vec<String> = story
        .state
        .decisions(&"a".parse().expect("a name"))
        .map(|(_, decision)| decision.to_string())
        .collect();
    assert_eq!(decisions[0], words);
    story.on(Event::Unload("a".parse().expect("a name")), "stop 1");
    story.gone(1, Cause::Left, &[], "");
    ask(&mut story, 2, layered("b", 1300, 0), "spawn 2");
    assert_eq!(place_of(&story, 2), "over gpu0 (7 of 10 layers) and gpu1 (3 of 10 layers)");
    story.started(2, "load 2 b");
    let mut story = with(&[1000], &[]);
    ask(&mut story, 1, layered("c", 1328, 80), "spawn 1");
    let words = "on gpu0, with the experts of 4 layers in the host's memory";
    assert_eq!(place_of(&story, 1), words);
    let plan = preview(&story.state, &layered("c", 1328, 80), story.now);
    assert_eq!(plan.place.as_deref(), Some(words));
}

#[test]
fn room_is_made_on_the_device_where_it_is_needed() {
    // Idle models on gpu0, gpu1 and the host, the one on the host for the longest.
    let world = |rules: ModelRules| {
        let models = [("a", on("host")), ("b", on("gpu0")), ("c", on("GPU-1")), ("d", rules)];
        let mut story = with(&[1000, 1000], &models);
        load(&mut story, 1, "a", 600);
        load(&mut story, 2, "b", 600);
        load(&mut story, 3, "c", 500);
        story
    };
    let table = [
        (on("gpu0"), 900, "stop 2"),
        (on("gpu1"), 900, "stop 3"),
        (on("host"), 700, "stop 1"),
        // Anywhere: on which device the least is lost. b is idle for longer, and larger.
        (ModelRules::default(), 900, "stop 2"),
        // No room has to be made.
        (ModelRules::default(), 500, "spawn 4"),
        // Over both GPUs.
        (ModelRules::default(), 1500, "stop 2; stop 3"),
    ];
    for (rules, mib, expected) in table {
        let mut story = world(rules);
        ask(&mut story, 4, layered("d", mib, 0), expected);
    }
}

#[test]
fn a_busy_gpu_is_not_waited_for_where_an_idle_one_will_do() {
    let mut story = with(&[1000, 1000], &[("a", on("gpu0")), ("b", on("gpu1"))]);
    load(&mut story, 1, "a", 900);
    load(&mut story, 2, "b", 900);
    ask(&mut story, 3, layered("a", 900, 0), "send 1 #3");
    // a is the longer idle before, and now busy.
    ask(&mut story, 4, layered("c", 900, 0), "stop 2");
    assert_eq!(last(&story, "c"), "waits for 800 MiB on gpu1: b:latest is on its way out");
    story.gone(2, Cause::Left, &[], "spawn 3");
    assert_eq!(place_of(&story, 3), "on gpu1");
}

#[test]
fn a_gpu_is_waited_for_rather_than_half_of_it_taken() {
    let mut story = with(&[1000], &[]);
    load(&mut story, 1, "a", 600);
    ask(&mut story, 2, layered("a", 600, 0), "send 1 #2");
    // The host has room for all of b, the rest of the GPU for some; but a has it for a moment only.
    ask(&mut story, 3, layered("b", 700, 0), "");
    story.now += limits::QUANTUM_MAX;
    story.ended(1, 2, "stop 1");
    story.gone(1, Cause::Left, &[], "spawn 2");
    assert_eq!(place_of(&story, 2), "on gpu0");
}

#[test]
fn what_one_waits_for_is_not_given_to_who_came_later() {
    let mut story = with(&[1000], &[]);
    load(&mut story, 1, "a", 600);
    ask(&mut story, 2, layered("a", 600, 0), "send 1 #2");
    ask(&mut story, 3, layered("b", 900, 0), "");
    // There is room for c beside a, but not beside b, which is before it.
    ask(&mut story, 4, layered("c", 300, 0), "");
    story.now += limits::QUANTUM_MAX;
    story.ended(1, 2, "stop 1");
    story.gone(1, Cause::Left, &[], "spawn 2");
    assert_eq!(story.state.runners[&2].model.as_ref().expect("b").bytes, 1028 * MIB);
}

#[test]
fn a_pinned_model_keeps_its_device_and_others_are_placed_beside_it() {
    let pinned = ModelRules { pinned: true, ..on("gpu0") };
    let mut story = with(&[1000], &[("a", pinned), ("b", on("gpu0"))]);
    load(&mut story, 1, "a", 700);
    // 172 MiB of the GPU are left, with 128 of scratch: nothing but the host's memory for b.
    ask(&mut story, 2, layered("b", 600, 0), "spawn 2");
    assert_eq!(place_of(&story, 2), "over gpu0 (3 of 10 layers), with 7 layers on the host");
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let ask_for = |device: &str, known: bool| {
        let models = [("a".to_owned(), on(device))];
        let mut story = Story::new(Rules { models: ModelTable::new(models), ..rules() });
        if known {
            let unable = Gpu { can_compute: false, ..gpu(0, 1000) };
            story.on(told(&[unable]), "");
        }
        let fault = story.state.fit(target("a", 500), Hold::default()).expect_err("refused");
        (fault.code, fault.message)
    };
    let (code, words) = ask_for("gpu7", true);
    assert_eq!(code, Code::Unsupported);
    let expected = "the settings want a:latest on gpu7, and there is no such device here; change \
                    its `device` in the settings";
    assert_eq!(words, expected.replace("a:latest", &key(&"a".parse().expect("a name"))));
    let (code, words) = ask_for("gpu0", true);
    assert!(words.contains("cannot be used: this build of v4 has no kernels for it"), "{words}");
    assert_eq!(code, Code::Unsupported);
    assert_eq!(ask_for("gpu0", false).0, Code::Overloaded);
}

#[test]
fn an_idle_model_leaves_when_other_programs_need_its_device() {
    let mut story = with(&[1000, 1000], &[("a", on("gpu0")), ("b", on("gpu1"))]);
    load(&mut story, 1, "a", 600);
    load(&mut story, 2, "b", 600);
    let taken = |mib: u64| {
        // Ours and theirs.
        let used_bytes = 600 * MIB + mib * MIB;
        let gpus =
            [Gpu { used_bytes, ..gpu(0, 1000) }, Gpu { used_bytes: 600 * MIB, ..gpu(1, 1000) }];
        told(&gpus)
    };
    story.on(taken(500), "");
    story.on(taken(100), "");
    // What is there twice is somebody's.
    story.on(taken(500), "");
    story.on(taken(450), "stop 1");
    assert_eq!(last(&story, "a"), "is unloaded: other programs need the memory of gpu0");
    story.gone(1, Cause::Left, &[], "");
    // What others have taken meanwhile counts at once: nothing of ours was there.
    story.on(taken(0), "");
    story.on(told(&[gpu(0, 1000), gpu(1, 1000)]), "");
    let used_bytes = 450 * MIB;
    story.on(told(&[Gpu { used_bytes, ..gpu(0, 1000) }, gpu(1, 1000)]), "");
    // 550 MiB are left: what does not fit there has some layers on the host.
    ask(&mut story, 3, layered("a", 600, 0), "spawn 3");
    assert_eq!(place_of(&story, 3), "over gpu0 (8 of 10 layers), with 2 layers on the host");
}

#[test]
fn a_busy_model_finishes_first_and_a_pinned_one_stays() {
    let pinned = ModelRules { pinned: true, ..on("gpu1") };
    let mut story = with(&[1000, 1000], &[("a", on("gpu0")), ("b", pinned)]);
    load(&mut story, 1, "a", 600);
    load(&mut story, 2, "b", 600);
    ask(&mut story, 3, layered("a", 600, 0), "send 1 #3");
    let full = |index| Gpu { used_bytes: 1500 * MIB, ..gpu(index, 1000) };
    for _ in 0..3 {
        story.on(told(&[full(0), full(1)]), "");
    }
    story.ended(1, 3, "stop 1");
}

#[test]
fn what_lies_on_a_device_that_has_gone_leaves_and_finds_another_place() {
    let pinned = ModelRules { pinned: true, ..ModelRules::default() };
    let mut story = with(&[1000, 1000], &[("b", pinned)]);
    load(&mut story, 1, "a", 900);
    load(&mut story, 2, "b", 900);
    assert_eq!(place_of(&story, 1), "on gpu0");
    story.on(told(&[gpu(1, 1000)]), "stop 1");
    assert_eq!(last(&story, "a"), "is unloaded: gpu0 has gone");
    story.gone(1, Cause::Left, &[], "");
    ask(&mut story, 3, layered("a", 900, 0), "fail #3 OutOfMemory");
    // What now stands where gpu0 was is another device.
    let other = Gpu { uuid: "GPU-other".into(), ..gpu(0, 950) };
    story.on(told(&[other, gpu(1, 1000)]), "");
    ask(&mut story, 4, layered("a", 900, 0), "spawn 3");
    assert_eq!(place_of(&story, 3), "on gpu2");
}

#[test]
fn a_driver_that_says_nothing_takes_no_device_away() {
    let mut story = with(&[1000], &[]);
    load(&mut story, 1, "a", 900);
    let complaints = vec!["the NVIDIA driver answers to nvmlInit_v2: mismatch".to_owned()];
    let blind =
        Inventory { complaints: complaints.clone(), is_blind: true, ..Inventory::default() };
    story.on(Event::Devices(blind), "");
    assert_eq!(story.state.devices().unused(), complaints);
    ask(&mut story, 2, layered("b", 800, 0), "stop 1");
}

#[test]
fn who_waits_for_a_device_that_goes_is_told_or_placed_elsewhere() {
    let mut story = with(&[1000], &[("a", on("gpu0"))]);
    load(&mut story, 1, "a", 900);
    ask(&mut story, 2, layered("a", 900, 0), "send 1 #2");
    ask(&mut story, 3, layered("b", 800, 0), "");
    ask(&mut story, 4, layered("c", 1100, 0), "");
    story.on(told(&[]), "spawn 2; fail #4 OutOfMemory");
    assert_eq!(place_of(&story, 2), "on the host");
    // The process dies with its device; its answer had not begun, and its settings name the device.
    story.gone(1, Cause::Died, &[], "");
    story.after(secs(1), "fail #2 Unsupported");
}

mod random {
    use super::*;

    struct Dice(u64);

    impl Dice {
        fn below(&mut self, n: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            usize::try_from((self.0 >> 11) % n as u64).expect("below a usize")
        }

        fn pick<T>(&mut self, mut items: Vec<T>) -> Option<T> {
            let n = items.len();
            (n > 0).then(|| items.swap_remove(self.below(n)))
        }
    }

    /// A process that does as it is told.
    #[derive(Default)]
    struct Process {
        is_started: bool,
        loading: Option<u64>,
        running: BTreeSet<AskId>,
        is_stopping: bool,
    }

    /// A machine whose GPUs come and go, with other programs on it.
    struct World {
        state: State,
        now: Time,
        dice: Dice,
        /// MiB of each GPU, what others have of it, and whether it is there.
        gpus: Vec<(u64, u64, bool)>,
        processes: BTreeMap<RunnerId, Process>,
        open: BTreeSet<AskId>,
        next_ask: AskId,
        reasons: HashMap<&'static str, u32>,
        n_split: u32,
    }

    impl World {
        fn new(seed: u64, gpus: &[u64]) -> Self {
            let models = [
                ("b".to_owned(), on("gpu0")),
                ("c".to_owned(), on("host")),
                ("d".to_owned(), ModelRules { pinned: true, ..ModelRules::default() }),
                ("e".to_owned(), ModelRules { gpus: Some(1), ..ModelRules::default() }),
            ];
            let rules =
                Rules { models: ModelTable::new(models), spare: seed.is_multiple_of(2), ..rules() };
            let mut world = Self {
                state: State::new(rules),
                now: secs(1),
                dice: Dice(seed * 2 + 1),
                gpus: gpus.iter().map(|mib| (*mib, 0, true)).collect(),
                processes: BTreeMap::new(),
                open: BTreeSet::new(),
                next_ask: 1,
                reasons: HashMap::new(),
                n_split: 0,
            };
            world.tell();
            world
        }

        fn tell(&mut self) {
            let there = (0..).zip(&self.gpus).filter(|(_, (.., is_there))| *is_there);
            let gpus: Vec<Gpu> = there
                .map(|(index, (mib, others, _))| {
                    let device: DeviceId = format!("gpu{index}").into();
                    let used = self.state.used().of(&device) + others * MIB;
                    let all = gpu(index, *mib);
                    Gpu { used_bytes: used.min(all.total_bytes), ..all }
                })
                .collect();
            self.feed(told(&gpus));
        }

        fn feed(&mut self, event: Event) {
            let before = self.state.used();
            for effect in step(&mut self.state, event, self.now) {
                match effect {
                    Effect::Spawn(id) => {
                        assert!(self.processes.insert(id, Process::default()).is_none());
                    }
                    Effect::Load { runner, model } => {
                        let process = self.processes.get_mut(&runner).expect("alive");
                        assert!(process.is_started && process.loading.is_none());
                        process.loading = Some(model.bytes);
                        self.n_split += u32::from(model.placement.shares.len() > 1);
                    }
                    Effect::Send { runner, ask, .. } => {
                        let process = self.processes.get_mut(&runner).expect("alive");
                        assert!(!process.is_stopping);
                        process.running.insert(ask);
                    }
                    Effect::Stop { runner, reason, .. } => {
                        let process = self.processes.get_mut(&runner).expect("alive");
                        assert!(process.running.is_empty(), "a busy runner was told to leave");
                        process.is_stopping = true;
                        *self.reasons.entry(reason.word()).or_default() += 1;
                    }
                    Effect::Done { ask, .. } | Effect::Fail { ask, .. } | Effect::Forget(ask) => {
                        assert!(self.open.remove(&ask), "two ends");
                    }
                    Effect::Cancel { .. } | Effect::Cores { .. } => {}
                }
            }
            // Nothing was given that was not there: others may have taken what was given before.
            let (used, budgets) = (self.state.used(), self.state.budgets());
            for (device, bytes) in used.iter().filter(|(device, n)| *n > before.of(device)) {
                assert!(bytes <= budgets.of(device), "{device} is over its budget");
            }
            for (_, runner, model, _) in self.state.loaded() {
                assert_eq!(runner.held.total(), runner.bytes);
                let own = self.state.rules.models.of(&key(&model.target.name));
                let at_most = own.gpus.unwrap_or(u32::MAX) as usize;
                assert!(model.placement.shares.len() <= at_most);
                assert!(own.device.as_deref() != Some(HOST) || runner.held.on_gpus() == 0);
            }
        }

        fn those(&self, is: impl Fn(&Process) -> bool) -> Vec<RunnerId> {
            self.processes.iter().filter(|(_, it)| is(it)).map(|(id, _)| *id).collect()
        }

        fn ask(&mut self) {
            let models = [
                ("a", 700, 0),
                ("b", 500, 0),
                ("c", 300, 0),
                ("d", 250, 0),
                ("e", 1500, 80),
                ("f", 2500, 90),
                ("g", 1400, 0),
            ];
            let (name, mib, experts) = models[self.dice.below(models.len())];
            let id = self.next_ask;
            self.next_ask += 1;
            self.open.insert(id);
            let keep_alive = KeepAlive::For(secs([1, 30, 300][self.dice.below(3)]));
            let ask = Ask { id, kind: Kind::Generate, keep_alive, caller: "x".into() };
            let target = Box::new(layered(name, mib, experts));
            self.feed(Event::Ask { ask, target, hold: Hold::default() });
        }

        fn end_one(&mut self, id: RunnerId) {
            let process = self.processes.get_mut(&id).expect("alive");
            let ask = process.running.pop_first().expect("it has work");
            self.open.remove(&ask);
            self.feed(Event::Ended { runner: id, ask });
        }

        fn kill(&mut self, id: RunnerId, cause: Cause) {
            let process = self.processes.remove(&id).expect("alive");
            self.feed(Event::Gone { runner: id, cause, begun: process.running });
        }

        /// A GPU vanishes with the processes that compute there, or comes back.
        fn unplug(&mut self) {
            let Some(at) = self.dice.pick((0..self.gpus.len()).collect()) else { return };
            self.gpus[at].2 = !self.gpus[at].2;
            let device = format!("gpu{at}");
            let dead = self.state.runners.iter().filter(|(_, it)| it.held.of(&device) > 0);
            let dead: Vec<RunnerId> = dead.map(|(id, _)| *id).collect();
            let is_first = self.dice.below(2) == 0;
            if is_first {
                self.tell();
            }
            for id in dead {
                let is_over = !self.gpus[at].2 && self.dice.below(3) > 0;
                if is_over && self.processes.contains_key(&id) {
                    self.kill(id, Cause::Died);
                }
            }
            if !is_first {
                self.tell();
            }
        }

        fn turn(&mut self) {
            self.now += secs(2).mul_f64(self.dice.below(1000) as f64 / 1000.0);
            match self.dice.below(16) {
                0..=3 => self.ask(),
                4 => {
                    if let Some(at) = self.dice.pick((0..self.gpus.len()).collect()) {
                        self.gpus[at].1 = [0, 0, 300, 900][self.dice.below(4)];
                    }
                }
                5 | 6 => self.tell(),
                7 if self.dice.below(4) == 0 => self.unplug(),
                _ => {
                    self.work();
                }
            }
        }

        /// One thing that processes do by themselves.
        fn work(&mut self) -> bool {
            let mut kinds = vec![0, 1, 2, 3];
            while let Some(kind) = self.dice.pick(std::mem::take(&mut kinds)) {
                let ids = match kind {
                    0 => self.those(|it| !it.is_started),
                    1 => self.those(|it| it.loading.is_some() && !it.is_stopping),
                    2 => self.those(|it| !it.running.is_empty()),
                    _ => self.those(|it| it.is_stopping),
                };
                let Some(id) = self.dice.pick(ids) else {
                    kinds = (0..4).filter(|other| *other != kind).collect();
                    if self.those(|_| true).is_empty() || self.is_at_rest() {
                        return false;
                    }
                    continue;
                };
                let process = self.processes.get_mut(&id).expect("alive");
                match kind {
                    0 => {
                        process.is_started = true;
                        self.feed(Event::Started(id));
                    }
                    1 => {
                        let bytes = process.loading.take().expect("it loads");
                        self.feed(Event::Loaded { runner: id, bytes });
                    }
                    2 => self.end_one(id),
                    _ => self.kill(id, Cause::Left),
                }
                return true;
            }
            false
        }

        fn is_at_rest(&self) -> bool {
            self.processes.values().all(|it| {
                let has_to_load = it.loading.is_some() && !it.is_stopping;
                it.is_started && !has_to_load && it.running.is_empty() && !it.is_stopping
            })
        }

        fn settle(&mut self) {
            for _ in 0..10_000 {
                if self.work() {
                    continue;
                }
                let Some(due) = self.state.next_deadline() else { return };
                self.now = self.now.max(due);
                self.feed(Event::Tick);
            }
            panic!("the world does not come to rest");
        }
    }

    #[test]
    fn histories_on_none_one_two_and_four_gpus_keep_the_rules() {
        let mut reasons: HashMap<&str, u32> = HashMap::new();
        let mut n_split = 0;
        let machines: [&[u64]; 5] =
            [&[], &[1500], &[1000, 1000], &[2000, 700], &[500, 1000, 1500, 800]];
        for (seed, gpus) in (0..200).zip(machines.iter().cycle()) {
            let mut world = World::new(seed, gpus);
            for _ in 0..300 {
                world.turn();
            }
            world.settle();
            assert!(world.open.is_empty(), "seed {seed}: {:?} have no end", world.open);
            for (word, n) in world.reasons {
                *reasons.entry(word).or_default() += n;
            }
            n_split += world.n_split;
        }
        for word in ["idle", "room", "others", "lost"] {
            assert!(reasons.get(word).is_some_and(|n| *n > 20), "{word}: {reasons:?}");
        }
        assert!(n_split > 100, "{n_split}");
    }
}
