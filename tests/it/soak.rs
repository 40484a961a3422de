//! A daemon that is killed again and again, at moments that a seeded generator chooses: in a pull,
//! at its commit, while it prunes, while it checks and repairs. After every kill nothing is lost,
//! no blob is other than its name, and what a resume fetches again is bounded.
//!
//! `cargo xtask soak store --kills 200` does more of them than the test does.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use v4_proto::Digest;
use v4_tests::daemon::Daemon;
use v4_tests::home::{Home, digest, file_digest, noise};
use v4_tests::process::{until, v4};
use v4_tests::random::Random;
use v4_tests::registry::OneModel;

/// How many kills; not said is a few.
const KILLS: &str = "V4_SOAK_KILLS";
const FEW: usize = 20;
/// Large enough for ranges and for a chain of five links.
const SIZE: usize = 44 << 20;
/// What a kill may cost, and the part of a blob that a repair fetches.
const PART: usize = 8 << 20;
/// Blobs that nobody names, and the bytes of each.
const ORPHANS: (u64, usize) = (12, 1 << 20);
/// Bytes a second of a pull that is to be hit in the middle.
const RATE: u64 = 60 << 20;

/// A daemon in this home.
fn start(home: &Home) -> Daemon<'_> {
    until("a daemon", || {
        let mut command = v4(home, &["serve"]);
        // One that finds the socket held by a child of the one before ends, and is tried again.
        Daemon::spawn(home, command.env("V4_LISTEN", "127.0.0.1:0"))
    })
}

/// One home that is killed in.
struct Soak {
    home: Home,
    registry: OneModel,
    random: Random,
    /// A model that is there all the time.
    keeper: Digest,
    n_kills: usize,
    /// Bytes of the partial that the last daemon spoke of.
    known: usize,
    /// The most that a resume fetched again.
    worst: usize,
}

impl Soak {
    fn new() -> Self {
        let home = Home::new();
        let keeper = home.put_golden("keeper", "llama-q4_0.gguf");
        let registry = OneModel::new(&noise(SIZE));
        let random = Random::new(0x2545_f491_4f6c_dd1d);
        Self { home, registry, random, keeper, n_kills: 0, known: 0, worst: 0 }
    }

    fn name(&self) -> String {
        self.registry.name()
    }

    /// Whether a name is there.
    fn has(daemon: &Daemon<'_>, name: &str) -> bool {
        let models = daemon.tcp.get("/api/tags").expect(200);
        let wanted = format!("{name}:latest");
        models["models"].as_array().expect("a list").iter().any(|model| model["name"] == wanted)
    }

    /// Every blob is what its name says, but for one that was damaged on purpose.
    fn look(&self, but: Option<Digest>) {
        for blob in self.home.blobs() {
            if Some(blob) != but {
                assert_eq!(file_digest(&self.home.blob(&blob)), blob, "kill {}", self.n_kills);
            }
        }
        let daemon = start(&self.home);
        assert!(Self::has(&daemon, "keeper"), "kill {}", self.n_kills);
        assert!(self.home.blobs().contains(&self.keeper));
        if but.is_none() && Self::has(&daemon, &self.name()) {
            assert!(
                self.home.blobs().contains(&self.registry.weights()),
                "a name without its blob"
            );
        }
    }

    /// A pull, and a kill in the middle of it, or with `is_late` at its end.
    fn pull(&mut self, is_late: bool) {
        let daemon = start(&self.home);
        let rate = if is_late { json!(null) } else { json!(RATE.to_string()) };
        self.registry.take_asked();
        let body = json!({"model": self.name(), "limit_rate": rate});
        let mut stream = daemon.tcp.stream("/api/pull", &body);
        let strike = self.random.below(SIZE as u64);
        let strike = if is_late { SIZE } else { usize::try_from(strike).expect("small") };
        let mut done = self.known;
        let mut is_whole = false;
        while let Some(line) = stream.json() {
            assert!(line["error"].is_null(), "{line}");
            if line["digest"] == self.registry.weights().to_string() {
                let completed = line["completed"].as_u64().unwrap_or(0);
                done = done.max(usize::try_from(completed).expect("small"));
            }
            is_whole |= line["status"] == "success";
            if done >= strike || is_whole {
                break;
            }
        }
        let moment = if is_late { 60 } else { 5 };
        thread::park_timeout(self.random.within(Duration::from_millis(moment)));
        daemon.kill();
        self.n_kills += 1;
        drop(stream);
        // What was missing at the start of this one is what the last one had not.
        let asked = self.registry.take_asked();
        let again = asked.saturating_sub(SIZE - self.known.min(SIZE));
        self.worst = self.worst.max(again);
        assert!(again <= PART, "kill {}: {again} bytes were fetched again", self.n_kills);
        self.known = done;
        self.look(None);
        self.settle();
    }

    /// Begins anew where the pull came to its end.
    fn settle(&mut self) {
        let daemon = start(&self.home);
        if Self::has(&daemon, &self.name()) {
            daemon.tcp.request("DELETE", "/api/delete", self.asking().to_string().as_bytes());
            self.known = 0;
        }
        // A blob without a name is kept for the next pull; here it is to be fetched anew.
        if self.home.blobs().contains(&self.registry.weights()) {
            daemon.tcp.post("/api/prune", &json!({"partials": true})).expect(200);
            self.known = 0;
        }
    }

    fn asking(&self) -> Value {
        json!({"model": self.name()})
    }

    /// Has the model here, whole.
    fn have(&mut self) {
        let daemon = start(&self.home);
        let lines = daemon.tcp.patient_post("/api/pull", &self.asking()).lines();
        assert_eq!(lines.last().expect("lines")["status"], "success", "{lines:?}");
        self.registry.take_asked();
        self.known = 0;
    }

    /// Asks and kills at a moment of the work, given what it takes in whole.
    fn strike(&mut self, path: &str, body: &Value, takes: Duration) {
        let daemon = start(&self.home);
        let asked = daemon.tcp.open_only("POST", path, body.to_string().as_bytes());
        thread::park_timeout(self.random.within(takes + takes / 4));
        daemon.kill();
        drop(asked);
        self.n_kills += 1;
    }

    /// Blobs that nobody names, and a kill while they are pruned.
    fn prune(&mut self, takes: &mut Duration) {
        self.have();
        let orphans: Vec<Vec<u8>> = (0..ORPHANS.0)
            .map(|i| {
                [&noise(ORPHANS.1)[..], &(i + self.random.below(1 << 40)).to_le_bytes()].concat()
            })
            .collect();
        let stock = |daemon: &Daemon<'_>| {
            for orphan in &orphans {
                let path = format!("/api/blobs/{}", digest(orphan));
                assert_eq!(daemon.tcp.request("POST", &path, orphan).status, 201);
            }
        };
        let body = json!({"partials": true});
        if takes.is_zero() {
            let daemon = start(&self.home);
            stock(&daemon);
            let began = Instant::now();
            daemon.tcp.post("/api/prune", &body).expect(200);
            *takes = began.elapsed();
        }
        stock(&start(&self.home));
        self.strike("/api/prune", &body, *takes);
        self.look(None);
        let daemon = start(&self.home);
        assert!(Self::has(&daemon, &self.name()), "a prune took a name with it");
        daemon.tcp.post("/api/prune", &body).expect(200);
        let left = self.home.blobs();
        assert!(!orphans.iter().any(|orphan| left.contains(&digest(orphan))));
        assert!(left.contains(&self.registry.weights()), "a prune took a named blob");
    }

    /// A damaged blob, and a kill while it is found and mended.
    fn repair(&mut self, takes: &mut Duration) {
        self.have();
        let weights = self.registry.weights();
        let body = json!({"repair": true});
        let mended = |soak: &Self| {
            let daemon = start(&soak.home);
            let lines = daemon.tcp.patient_post("/api/fsck", &body).lines();
            assert_eq!(lines.last().expect("lines")["status"], "success", "{lines:?}");
            assert_eq!(file_digest(&soak.home.blob(&weights)), weights);
        };
        if takes.is_zero() {
            self.damage();
            let began = Instant::now();
            mended(self);
            *takes = began.elapsed();
            assert!(self.registry.take_asked() <= PART, "more than the damaged part was fetched");
        }
        self.damage();
        self.strike("/api/fsck", &body, *takes);
        self.look(Some(weights));
        mended(self);
        // The damaged part, and what the kill cost.
        let asked = self.registry.take_asked();
        assert!(asked <= 2 * PART, "kill {}: {asked} bytes for one part", self.n_kills);
        self.look(None);
    }

    /// Turns one bit of the blob over.
    fn damage(&mut self) {
        let path = self.home.blob(&self.registry.weights());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("ours");
        let mut file = fs::OpenOptions::new().write(true).open(&path).expect("writable");
        // Within one part.
        let at = self.random.below(SIZE as u64) & !7;
        file.seek(SeekFrom::Start(at)).expect("a file");
        file.write_all(b"damage?!").expect("writable");
    }
}

#[test]
fn kills_at_any_moment_lose_nothing() {
    let n_kills = std::env::var(KILLS).ok().and_then(|n| n.parse().ok()).unwrap_or(FEW);
    let mut soak = Soak::new();
    let (mut prune, mut repair) = (Duration::ZERO, Duration::ZERO);
    let mut kinds = [0; 4];
    while soak.n_kills < n_kills {
        let kind = soak.n_kills % kinds.len();
        match kind {
            0 => soak.pull(false),
            1 => soak.pull(true),
            2 => soak.prune(&mut prune),
            _ => soak.repair(&mut repair),
        }
        kinds[kind] += 1;
        if kind > 1 {
            // The pulls begin with nothing here.
            soak.settle();
        }
    }
    let [pulls, commits, prunes, repairs] = kinds;
    println!(
        "{n_kills} kills: {pulls} in pulls, {commits} at commits, {prunes} in prunes, {repairs} in \
         repairs; at most {} bytes were fetched again",
        soak.worst
    );
}
