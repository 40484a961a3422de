//! What a pull needs around it: a home, a catalog, an inspector.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;
use v4_proto::{
    Ability, Code, Digest, Fault, Inspection, Layout, ModelFiles, ModelInfo, ModelName,
};
use v4_pull::{
    Catalog, Inspecting, Inspector, Jobs, Origin, Progress, PullConfig, Recipe, RecipeFile, Stage,
    Upstream, Watch, Wish,
};
use v4_store::{Role, Store, fs::Fs, fs::RealFs, sha256};

/// Bytes that no two offsets share for long, so that a hole or a shift changes them.
pub fn bytes(n: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(byte).take(n).collect()
}

pub fn name(text: &str) -> ModelName {
    text.parse().unwrap()
}

/// The name of the catalog that means a repository, and which.
pub const SHORT: (&str, &str) = ("short", "hf.co/me/x-GGUF:Q4_K_M");

#[derive(Default)]
struct Recipes(Mutex<BTreeMap<ModelName, Recipe>>);

impl Catalog for Recipes {
    fn find(&self, name: &ModelName) -> Option<Recipe> {
        self.0.lock().unwrap().get(name).cloned()
    }

    fn upstream(&self, asked: &ModelName) -> Option<Upstream> {
        let license = (Role::License, Role::License.media_type(), "free".to_owned());
        let upstream = Upstream { name: name(SHORT.1), revision: None, texts: vec![license] };
        (*asked == name(SHORT.0)).then_some(upstream)
    }

    fn names(&self) -> Vec<String> {
        self.0.lock().unwrap().keys().map(|name| name.model().to_owned()).collect()
    }
}

/// Says the same of every file.
pub struct Oracle {
    pub says: Mutex<Result<Inspection, Fault>>,
    pub n_asked: AtomicUsize,
}

impl Inspector for Oracle {
    fn inspect(&self, files: ModelFiles) -> Inspecting<'_> {
        self.n_asked.fetch_add(1, Ordering::SeqCst);
        assert!(files.weights.iter().all(|path| path.is_file()), "the blob is not there");
        let says = self.says.lock().unwrap().clone();
        Box::pin(async { says })
    }
}

pub fn inspection(is_supported: bool) -> Inspection {
    let info = ModelInfo {
        format: "gguf".into(),
        arch: "llama".into(),
        supported: is_supported,
        quant: "Q4_1".into(),
        n_params: 134_515_008,
        context_length: 8192,
        embedding_length: 576,
        n_layers: 30,
        weight_bytes: 1,
        kv_bytes_per_token: 1,
        layout: Layout::default(),
        abilities: vec![Ability::Completion],
    };
    let (metadata, tensors) = (serde_json::Map::new(), Vec::new());
    Inspection { info, metadata, chat_template: None, tensors }
}

/// A home and what pulls into it.
pub struct World {
    pub folder: TempDir,
    pub store: Arc<Store>,
    pub oracle: Arc<Oracle>,
    pub jobs: Jobs,
    recipes: Arc<Recipes>,
}

/// Waits that suit a test.
pub fn config(index_url: &str) -> PullConfig {
    PullConfig {
        index_url: index_url.to_owned(),
        npm_url: index_url.to_owned(),
        registries: Vec::new(),
        hf_endpoint: "http://127.0.0.1:1".to_owned(),
        hf_token: None,
        auth_file: None,
        ollama_key: None,
        policy: None,
        peers: Vec::new(),
        rate: None,
        connect_timeout: Duration::from_secs(3),
        stall_timeout: Duration::from_millis(300),
        backoff: Duration::from_millis(1),
        tries: 4,
        unreachable_for: Duration::from_mins(1),
        disk_every: Duration::from_millis(20),
    }
}

impl World {
    pub fn new() -> Self {
        Self::with("http://127.0.0.1:1", Arc::new(RealFs))
    }

    pub fn with(index_url: &str, fs: Arc<dyn Fs>) -> Self {
        Self::of(config(index_url), fs)
    }

    pub fn of(config: PullConfig, fs: Arc<dyn Fs>) -> Self {
        let folder = TempDir::new().unwrap();
        let home = folder.path().join("home");
        Self { folder, ..Self::in_home(config, fs, &home) }
    }

    /// A world whose home is elsewhere.
    pub fn in_home(config: PullConfig, fs: Arc<dyn Fs>, home: &Path) -> Self {
        let folder = TempDir::new().unwrap();
        let store = Arc::new(Store::open_with(home, fs).unwrap());
        let recipes = Arc::new(Recipes::default());
        let says = Mutex::new(Ok(inspection(true)));
        let oracle = Arc::new(Oracle { says, n_asked: AtomicUsize::new(0) });
        let (catalog, inspector) = (Arc::clone(&recipes), Arc::clone(&oracle));
        let jobs = Jobs::new(Arc::clone(&store), catalog, inspector, config);
        Self { folder, store, oracle, jobs, recipes }
    }

    /// Makes a name known whose one file has these bytes and sources.
    pub fn recipe(&self, model: &str, bytes: &[u8], sources: &[String]) -> Digest {
        let digest = sha256(bytes);
        self.recipe_of(model, Some(digest), Some(bytes.len() as u64), sources);
        digest
    }

    pub fn recipe_of(
        &self,
        model: &str,
        digest: Option<Digest>,
        size: Option<u64>,
        sources: &[String],
    ) {
        let file = RecipeFile {
            role: Role::Model,
            media_type: Role::Model.media_type(),
            digest,
            size,
            sources: sources.iter().map(|text| text.parse().unwrap()).collect(),
        };
        let license = (Role::License, Role::License.media_type(), "Be kind.".to_owned());
        let recipe = Recipe {
            name: name(model),
            files: vec![file],
            texts: vec![license],
            manifest: None,
            origin: Origin::default(),
        };
        self.recipes.0.lock().unwrap().insert(recipe.name.clone(), recipe);
    }

    /// Adds the file of another name to a name's recipe.
    pub fn also(&self, model: &str, other: &str) {
        let mut recipes = self.recipes.0.lock().unwrap();
        let file = recipes[&name(other)].files[0].clone();
        recipes.get_mut(&name(model)).unwrap().files.push(file);
    }

    /// Pulls to the end, holding every step against the one before: progress never goes backwards.
    pub async fn pull(&self, model: &str) -> Progress {
        self.follow(self.start(model)).await
    }

    /// Starts a pull as most do.
    pub fn start(&self, model: &str) -> Watch {
        self.jobs.pull(&name(model), Wish::default()).unwrap()
    }

    /// Follows a pull to its end.
    pub async fn follow(&self, mut watch: Watch) -> Progress {
        let mut last = watch.current();
        let deadline = Duration::from_secs(30);
        while let Some(now) = tokio::time::timeout(deadline, watch.next()).await.expect("too long")
        {
            for (before, after) in last.files.iter().zip(&now.files) {
                assert!(after.completed >= before.completed, "{before:?} then {after:?}");
                assert!(after.total.is_none_or(|total| after.completed <= total), "{after:?}");
            }
            last = now;
        }
        assert!(last.is_last(), "{last:?}");
        last
    }

    /// Pulls, and the name is there after, whole.
    pub async fn pull_well(&self, model: &str) -> Progress {
        let progress = self.pull(model).await;
        let Stage::Done { digest, .. } = progress.stage else { panic!("{progress:?}") };
        let record = self.store.find(&name(model)).unwrap().unwrap();
        assert_eq!(record.digest, digest);
        for digest in record.manifest.digests() {
            self.store.verify(&digest).unwrap();
        }
        assert!(progress.files.iter().all(|file| file.is_done), "{progress:?}");
        assert_eq!(self.partials(), 0, "something is left in partial/");
        progress
    }

    /// Pulls, and it fails so; the name is not there.
    pub async fn pull_badly(&self, model: &str, code: Code, words: &[&str]) {
        let progress = self.pull(model).await;
        let Stage::Failed(fault) = progress.stage else { panic!("{progress:?}") };
        assert_eq!(fault.code, code, "{fault}");
        for word in words {
            assert!(fault.message.contains(word), "{word:?} is not in {:?}", fault.message);
        }
        assert_eq!(self.store.find(&name(model)).unwrap(), None);
    }

    /// How many downloads lie in `partial/`. Small files on their way to their place, of a job that
    /// was cancelled while it wrote them, are none.
    pub fn partials(&self) -> usize {
        let names = RealFs.list(&self.store.home().join("partial")).unwrap();
        let is_download = |name: &&String| !name.ends_with(".journal") && !name.starts_with("put-");
        names.iter().filter(is_download).count()
    }
}
