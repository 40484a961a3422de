//! Where models lie: tables, then random models on random devices against every placement there is.

use v4_proto::LayerRun;

use super::*;

/// A model of `n` layers of `dense` and `experts` MiB, with 10 MiB of keys and values each.
fn model(n: u32, [dense, experts]: [u64; 2], [embedding, output]: [u64; 2], tied: bool) -> Needs {
    let run = LayerRun { n, dense: dense * MIB, experts: experts * MIB, kv_bytes_per_token: MIB };
    let layout = Layout {
        embedding: embedding * MIB,
        output: output * MIB,
        is_tied: tied,
        layers: vec![run],
    };
    needs(&layout)
}

fn needs(layout: &Layout) -> Needs {
    let kv = layout.layers.iter().map(|run| u64::from(run.n) * run.kv_bytes_per_token).sum();
    let info =
        ModelInfo { kv_bytes_per_token: kv, layout: layout.clone(), ..info(layout.weight_bytes()) };
    Needs::of(&info, KvType::F16, 10)
}

/// Room on the host, and on GPUs of one kind.
fn room(host: u64, gpus: &[u64]) -> Room {
    let gpu = |(at, mib): (usize, &u64)| Free {
        device: format!("gpu{at}").into(),
        capability: [9, 0],
        bytes: mib * MIB,
    };
    Room {
        host: host * MIB,
        gpus: gpus.iter().enumerate().map(gpu).collect(),
        max_gpus: usize::MAX,
    }
}

fn said(needs: &Needs, room: &Room) -> String {
    place(needs, room).map_or_else(|| "nowhere".to_owned(), |found| found.to_string())
}

#[test]
fn the_least_of_the_host_and_then_the_fewest_gpus() {
    // 10 layers of 110 MiB with their keys and values, and 50 each before and after: 1200, and 128
    // of scratch wherever it computes.
    let dense = model(10, [100, 0], [50, 50], false);
    // 10 layers of 30 and 80.
    let mixture = model(10, [20, 80], [50, 50], false);
    let all = "with the experts of 10 layers in the host's memory";
    let table: [(&Needs, u64, &[u64], &str); 18] = [
        (&dense, 9000, &[], "on the host"),
        (&dense, 1328, &[], "on the host"),
        (&dense, 1327, &[], "nowhere"),
        (&dense, 9000, &[1328], "on gpu0"),
        // The one that is left with the least.
        (&dense, 9000, &[4000, 2000, 3000], "on gpu1"),
        (&dense, 127, &[4000], "nowhere"),
        (&dense, 128, &[4000], "on gpu0"),
        // 178 and 6 layers; 178 and 4.
        (&dense, 9000, &[838, 618], "over gpu0 (6 of 10 layers) and gpu1 (4 of 10 layers)"),
        // Only in the other order would the first take a layer less.
        (&dense, 9000, &[618, 839], "over gpu0 (4 of 10 layers) and gpu1 (6 of 10 layers)"),
        // Two are enough.
        (&dense, 9000, &[300, 838, 618], "over gpu1 (6 of 10 layers) and gpu2 (4 of 10 layers)"),
        (
            &dense,
            9000,
            &[838, 617],
            "over gpu0 (6 of 10 layers) and gpu1 (3 of 10 layers), with 1 \
                                     layer on the host",
        ),
        (
            &dense,
            288,
            &[838, 617],
            "over gpu0 (6 of 10 layers) and gpu1 (3 of 10 layers), with 1 \
                                     layer on the host",
        ),
        (&dense, 287, &[838, 617], "nowhere"),
        (&mixture, 9000, &[1328], "on gpu0"),
        (&mixture, 9000, &[1327], "on gpu0, with the experts of 1 layer in the host's memory"),
        (&mixture, 207, &[1327], "nowhere"),
        (&mixture, 9000, &[528], &format!("on gpu0, {all}")),
        (
            &mixture,
            9000,
            &[527],
            "over gpu0 (9 of 10 layers), with 1 layer on the host, with the \
                                  experts of 9 layers in the host's memory",
        ),
    ];
    for (needs, host, gpus, expected) in table {
        let room = room(host, gpus);
        assert_eq!(said(needs, &room), *expected, "{host} {gpus:?}");
    }
    let apart = model(10, [20, 80], [50, 50], false);
    // Shares are cut by bytes after the experts have gone: the first has eight layers without
    // experts, the second two with them.
    let expected = "over gpu0 (8 of 10 layers) and gpu1 (2 of 10 layers), with the experts of 8 \
                    layers in the host's memory";
    assert_eq!(said(&apart, &room(9000, &[418, 398])), expected);
}

#[test]
fn an_output_that_is_the_embedding_is_needed_at_both_ends() {
    // 2 layers of 110, an embedding of 300 that the output multiplies by too.
    let tied = model(2, [100, 0], [300, 10], true);
    assert_eq!(said(&tied, &room(9000, &[658])), "on gpu0");
    let over = "over gpu0 (1 of 2 layers) and gpu1 (1 of 2 layers)";
    assert_eq!(said(&tied, &room(9000, &[538, 548])), over);
    let needed = place(&tied, &room(9000, &[538, 548])).expect("it fits").spread;
    assert_eq!((needed.of("gpu0"), needed.of("gpu1")), (538 * MIB, 548 * MIB));
    // The output alone is 310 and as much of the embedding as it multiplies by: all of it.
    let end = "over gpu0 (1 of 2 layers) and gpu1 (no layer, but an end), with 1 layer on the host";
    assert_eq!(said(&tied, &room(9000, &[537, 547])), end);
    let free = model(2, [100, 0], [300, 10], false);
    assert_eq!(said(&free, &room(9000, &[538, 248])), over);
}

#[test]
fn the_ablest_is_taken_first_and_no_more_than_allowed() {
    let needs = model(10, [100, 0], [50, 50], false);
    let mut room = room(9000, &[4000, 2000, 2000]);
    room.gpus[1].capability = [8, 9];
    room.gpus[2].capability = [8, 9];
    assert_eq!(said(&needs, &room), "on gpu0");
    room.gpus[0].bytes = 1000 * MIB;
    assert_eq!(said(&needs, &room), "on gpu1");
    for gpu in &mut room.gpus {
        gpu.bytes = 1000 * MIB;
    }
    assert_eq!(place(&needs, &room).expect("it fits").shares.len(), 2);
    room.max_gpus = 1;
    let found = place(&needs, &room).expect("it fits");
    assert_eq!((found.shares.len(), found.level), (1, Level::Layers(3, 0)));
}

#[test]
fn a_header_without_a_layout_lies_in_one_place() {
    let info = info(1000 * MIB);
    let needs = Needs::of(&info, KvType::F16, 1);
    assert_eq!(said(&needs, &room(9000, &[1128])), "on gpu0");
    assert_eq!(said(&needs, &room(9000, &[1127, 1127])), "on the host");
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }

    fn pick(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).expect("below a usize")
    }

    fn layout(&mut self, n_layers: u64) -> Layout {
        let is_mixture = self.below(2) == 0;
        let mut layout = Layout {
            embedding: self.below(200) * MIB,
            output: self.below(200) * MIB,
            is_tied: self.below(2) == 0,
            layers: Vec::new(),
        };
        for _ in 0..=self.below(n_layers - 1) {
            layout.push(LayerRun {
                n: 1,
                dense: self.below(60) * MIB,
                experts: if is_mixture { self.below(200) * MIB } else { 0 },
                kv_bytes_per_token: self.below(2) * MIB,
            });
        }
        layout
    }

    fn room(&mut self, n_gpus: usize, mib: u64) -> Room {
        let mut room = room(self.below(3 * mib), &vec![0; self.pick(n_gpus + 1)]);
        for gpu in &mut room.gpus {
            gpu.bytes = self.below(mib) * MIB;
            gpu.capability = [8, if self.below(2) == 0 { 0 } else { 9 }];
        }
        room.gpus.sort_by_key(|gpu| std::cmp::Reverse(gpu.capability));
        room
    }
}

/// What must be so of every placement.
fn check(layout: &Layout, room: &Room, found: &Placement) {
    assert!(found.spread.of(HOST) <= room.host, "{found:?}");
    for gpu in &room.gpus {
        assert!(found.spread.of(&gpu.device) <= gpu.bytes, "{found:?} of {room:?}");
    }
    let kv: u64 = layout.layers.iter().map(|run| u64::from(run.n) * run.kv_bytes_per_token).sum();
    assert!(found.spread.total() >= layout.weight_bytes() + kv * 10 + 128 * MIB, "{found:?}");
    // Every layer once, in order.
    let n_layers: u32 = layout.layers.iter().map(|run| run.n).sum();
    let mut next = match found.level {
        Level::Layers(layers, _) => layers,
        Level::Host => n_layers,
        _ => 0,
    };
    for share in &found.shares {
        assert_eq!(share.layers.start, next, "{found:?}");
        next = share.layers.end;
    }
    assert_eq!(next, n_layers, "{found:?}");
}

#[test]
fn no_device_is_given_more_than_it_has_and_more_memory_is_never_worse() {
    let mut dice = Dice(7);
    let mut levels = BTreeSet::new();
    for _ in 0..3000 {
        let layout = dice.layout(40);
        let needs = needs(&layout);
        let mut room = dice.room(4, 3000);
        let mut before = place(&needs, &room);
        assert_eq!(place(&needs, &room), before, "the same twice");
        for _ in 0..8 {
            if let Some(found) = &before {
                check(&layout, &room, found);
                levels.insert(match found.level {
                    Level::Gpus => 0,
                    Level::Experts(_) => 1,
                    Level::Layers(..) => 2,
                    Level::Host => 3,
                });
            }
            let more = dice.below(600) * MIB;
            match dice.pick(room.gpus.len() + 1) {
                0 => room.host += more,
                n => room.gpus[n - 1].bytes += more,
            }
            let after = place(&needs, &room);
            let level = |found: &Option<Placement>| {
                found.as_ref().map_or((1, Level::Host), |found| (0, found.level))
            };
            assert!(level(&after) <= level(&before), "{before:?} then {after:?} of {room:?}");
            before = after;
        }
    }
    assert_eq!(levels.len(), 4, "every level was met");
}

/// Weights but for experts, with keys and values, and experts: of each layer.
fn layers(layout: &Layout) -> Vec<[u64; 2]> {
    let layer = |run: &LayerRun| [run.dense + run.kv_bytes_per_token * 10, run.experts];
    let all = layout.layers.iter();
    all.flat_map(|run| std::iter::repeat_n(layer(run), run.n as usize)).collect()
}

/// Whether GPUs in this order take the layers between these cuts, those before `whole` without
/// their experts.
fn fits(layout: &Layout, gpus: &[&Free], cuts: &[usize], whole: usize) -> bool {
    let layers = layers(layout);
    let tied = if layout.is_tied { layout.embedding } else { 0 };
    (0..gpus.len()).all(|at| {
        let (is_first, is_last) = (at == 0 && cuts[0] == 0, at + 1 == gpus.len());
        let own = cuts[at]..cuts[at + 1];
        let cost = |at: usize| layers[at][0] + if at < whole { 0 } else { layers[at][1] };
        let bytes = own.map(cost).sum::<u64>()
            + 128 * MIB
            + if is_first { layout.embedding } else { 0 }
            + if is_last { layout.output } else { 0 }
            + if is_last && !is_first { tied } else { 0 };
        bytes <= gpus[at].bytes
    })
}

/// All rows of some of the GPUs, in every order.
fn orders(gpus: &[Free]) -> Vec<Vec<&Free>> {
    let mut orders: Vec<Vec<&Free>> = vec![Vec::new()];
    let mut at = 0;
    while let Some(order) = orders.get(at).cloned() {
        for gpu in gpus.iter().filter(|gpu| !order.contains(gpu)) {
            orders.push(order.iter().copied().chain([gpu]).collect());
        }
        at += 1;
    }
    orders.split_off(1)
}

/// Whether there are cuts so that GPUs in this order take the layers from `cuts` on.
fn is_there(layout: &Layout, gpus: &[&Free], cuts: &[usize], (whole, n): (usize, usize)) -> bool {
    if cuts.len() == gpus.len() {
        return fits(layout, gpus, &[cuts, &[n]].concat(), whole);
    }
    let start = cuts[cuts.len() - 1];
    (start..=n).any(|cut| is_there(layout, gpus, &[cuts, &[cut]].concat(), (whole, n)))
}

/// The best level of all placements there are: whatever the order of GPUs, wherever the cuts.
fn best(layout: &Layout, room: &Room) -> Option<Level> {
    let layers = layers(layout);
    let n = layers.len();
    let orders = orders(&room.gpus);
    let mut levels = Vec::new();
    let all: u64 = layers.iter().flatten().sum::<u64>() + layout.embedding + layout.output;
    if all + 128 * MIB <= room.host {
        levels.push(Level::Host);
    }
    for on_host in 0..n {
        for whole in on_host..=n {
            let host = layers[..on_host].iter().flatten().sum::<u64>()
                + layers[on_host..whole].iter().map(|layer| layer[1]).sum::<u64>()
                + if on_host > 0 { layout.embedding } else { 0 }
                + 128 * MIB;
            let is_there = |gpus: &Vec<&Free>| is_there(layout, gpus, &[on_host], (whole, n));
            if host <= room.host && orders.iter().any(is_there) {
                let count = |n: usize| u32::try_from(n).expect("few");
                levels.push(match (count(on_host), count(whole - on_host)) {
                    (0, 0) => Level::Gpus,
                    (0, experts) => Level::Experts(experts),
                    (on_host, experts) => Level::Layers(on_host, experts),
                });
            }
        }
    }
    levels.into_iter().min()
}

#[test]
fn no_placement_is_better_than_what_is_found() {
    let mut dice = Dice(3);
    for _ in 0..2000 {
        let layout = dice.layout(6);
        let room = dice.room(3, 700);
        let found = place(&needs(&layout), &room).map(|found| found.level);
        assert_eq!(found, best(&layout, &room), "{layout:?} {room:?}");
    }
}
