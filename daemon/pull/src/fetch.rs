//! One pull from recipe to manifest: files from their sources, the header read, the name written.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, RwLock, Weak},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::json;
use tokio::sync::watch;
use v4_proto::{Code, Digest, Fault, Inspection, ModelFiles, ModelName};
use v4_store::{
    Layer, Lease, Manifest, Need, Partial, Room, Store, StoreError,
    manifest::{CONFIG_TYPE, FOLDER_CONFIG_TYPE, FOLDER_WEIGHTS_TYPE, inspection_key},
    sha256,
};

use crate::{
    config,
    error::{PullError, is_wrong},
    jobs::{Inspector, PullConfig},
    limits,
    pace::Pace,
    plan::{self, Step},
    progress::{FileProgress, Progress, Stage},
    recipe::{Location, Part, PeerBlob, Recipe, RecipeFile},
    source::{self, Net, Place, Target},
    team,
    write::{Meter, Sink, Turn, Writer, blocking},
};

/// What all pulls share.
pub(crate) struct Fetcher {
    pub store: Arc<Store>,
    inspector: Arc<dyn Inspector>,
    pub net: Net,
    turns: Turns,
    /// How fast the bytes of all pulls together may come.
    pub pace: Pace,
    /// Other v4 that are asked for blobs: what [`PullConfig::peers`] says, until that changes.
    peers: RwLock<Vec<String>>,
}

/// Who may write which key: two names may need the same file.
#[derive(Default)]
pub(crate) struct Turns(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Turns {
    /// Waits for the right to write a key.
    pub async fn take(&self, key: &str) -> Turn {
        let lock = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, lock| lock.strong_count() > 0);
            let known = turns.get(key).and_then(Weak::upgrade);
            let lock = known.unwrap_or_default();
            turns.insert(key.to_owned(), Arc::downgrade(&lock));
            lock
        };
        Arc::new(lock.lock_owned().await)
    }
}

/// A file that is in the store.
#[derive(Debug, Clone, Copy)]
struct Got {
    digest: Digest,
    size: u64,
}

/// What is to be done: a step a file, the manifest's digest when nothing is, and the room for what
/// is to come.
type Looked = (Vec<Step>, Option<Digest>, Option<Room>);

impl Fetcher {
    pub fn new(store: Arc<Store>, inspector: Arc<dyn Inspector>, config: PullConfig) -> Self {
        let (pace, peers) = (Pace::new(config.rate), RwLock::new(config.peers.clone()));
        Self { store, inspector, net: Net::new(config), turns: Turns::default(), pace, peers }
    }

    /// From now on these are asked for blobs too.
    pub fn set_peers(&self, peers: &[String]) {
        *self.peers.write().unwrap_or_else(PoisonError::into_inner) = peers.to_vec();
    }

    /// Makes the recipe's name point to its files; how it ended is the last stage.
    pub async fn make(&self, recipe: &Recipe, job: Watched<'_>) -> Stage {
        match self.try_make(recipe, job).await {
            Ok(done) => done,
            Err(fault) => Stage::Failed(fault),
        }
    }

    async fn try_make(&self, recipe: &Recipe, job: Watched<'_>) -> Result<Stage, Fault> {
        let progress = job.progress;
        // From here on nothing that is fetched or found can be collected under us.
        let texts = recipe.texts.iter().map(|(_, _, text)| sha256(text.as_bytes()));
        let known: Vec<Digest> =
            recipe.files.iter().filter_map(|file| file.digest).chain(texts).collect();
        let _lease = self.store.lease(&known);
        let (steps, current, _room) = self.look(recipe).await.map_err(|error| error.fault())?;
        progress.send_modify(|progress| begin(&mut progress.files, file_progress(recipe, &steps)));
        if let Some(digest) = current {
            held_to(job.locked, recipe, digest).map_err(|error| error.fault())?;
            let unsupported = self.known_unsupported(&recipe.name).await;
            return Ok(Stage::Done { digest, unsupported });
        }
        let (mut got, mut staged) = (Vec::new(), Vec::new());
        for (i, (file, step)) in recipe.files.iter().zip(&steps).enumerate() {
            if let Step::Have { digest, size } = *step {
                got.push(Got { digest, size });
                continue;
            }
            progress.send_modify(|progress| progress.stage = Stage::File(i));
            let meter = Meter::new(progress, [&self.pace, job.pace], i);
            let (one, archives) = self.file(file, job.peers, meter).await.map_err(|e| e.fault())?;
            got.push(one);
            staged.extend(archives);
            progress.send_modify(|progress| {
                if let Some(file) = progress.files.get_mut(i) {
                    (file.digest, file.total) = (Some(one.digest), Some(one.size));
                    (file.completed, file.is_done) = (one.size, true);
                }
            });
        }
        let _lease = self.store.lease(&got.iter().map(|one| one.digest).collect::<Vec<_>>());
        // Only now: several files may have come out of one archive.
        self.discard(staged).await.map_err(|error| error.fault())?;
        progress.send_modify(|progress| progress.stage = Stage::Verifying);
        let (inspection, unsupported) = self.inspect(recipe, &got).await?;
        progress.send_modify(|progress| progress.stage = Stage::Writing);
        let written = self.write(recipe, &got, inspection, job.locked).await;
        let digest = written.map_err(|error| error.fault())?;
        Ok(Stage::Done { digest, unsupported })
    }

    /// A recipe with what is known of its files from an earlier pull of the very same revision.
    /// What came out of an archive has no digest before, and would be fetched again each time.
    pub async fn known(&self, mut recipe: Recipe) -> Recipe {
        let is_whole = recipe.files.iter().all(|file| file.digest.is_some());
        let Some(revision) = recipe.origin.revision.clone().filter(|_| !is_whole) else {
            return recipe;
        };
        let (store, name) = (Arc::clone(&self.store), recipe.name.clone());
        let found = blocking(move || {
            let record = store.find(&name)?;
            let origin = record.as_ref().and_then(|record| store.origin(&record.digest));
            Ok(record.zip(origin))
        });
        let Ok(Some((record, origin))) = found.await else { return recipe };
        let origin: serde_json::Value = serde_json::from_slice(&origin).unwrap_or_default();
        let layers = &record.manifest.layers;
        if origin["revision"] == revision.as_str() && layers.len() == recipe.files.len() {
            for (file, layer) in recipe.files.iter_mut().zip(layers) {
                if file.digest.is_none() && file.media_type == layer.media_type {
                    (file.digest, file.size) = (Some(layer.digest), Some(layer.size));
                }
            }
        }
        recipe
    }

    /// Whether a pull that waits for the disk may go on.
    pub async fn has_room(&self) -> bool {
        let store = Arc::clone(&self.store);
        blocking(move || store.free_bytes()).await.is_ok_and(|free| free >= limits::DISK_BYTES)
    }

    /// What is here.
    async fn look(&self, recipe: &Recipe) -> Result<Looked, PullError> {
        let (store, recipe) = (Arc::clone(&self.store), recipe.clone());
        blocking(move || {
            let mut sizes = HashMap::new();
            for digest in recipe.files.iter().filter_map(|file| file.digest) {
                sizes.insert(digest, whole(&store, &digest)?);
            }
            let steps = plan::steps(&recipe.files, |digest| sizes.get(digest).copied().flatten());
            let record = match store.find(&recipe.name) {
                Ok(record) => record.filter(|record| plan::is_current(&recipe, record)),
                // What cannot be read is replaced.
                Err(StoreError::Manifest { .. }) => None,
                Err(error) => return Err(error),
            };
            let Some(record) = record else {
                return room(&store, &recipe, &steps).map(|room| (steps, None, Some(room)));
            };
            for layer in record.manifest.blobs() {
                if whole(&store, &layer.digest)? != Some(layer.size) {
                    return Ok((steps, None, None));
                }
            }
            Ok((steps, Some(record.digest), None))
        })
        .await
    }

    /// Removes archives that were staged and are of no more use.
    async fn discard(&self, mut keys: Vec<String>) -> Result<(), PullError> {
        keys.sort_unstable();
        keys.dedup();
        let store = Arc::clone(&self.store);
        blocking(move || {
            for key in keys {
                if let Err(error) = store.discard(&key) {
                    tracing::warn!(%key, %error, "an archive stays until a later start");
                }
            }
            Ok(())
        })
        .await
    }

    /// Fetches one file from the first source that has it, a large one from all that have it. Gives
    /// back the keys of the archives that were staged for it, too.
    async fn file(
        &self,
        file: &RecipeFile,
        peers: &[String],
        meter: Meter<'_>,
    ) -> Result<(Got, Vec<String>), PullError> {
        let key = key(file);
        let turn = self.turns.take(&key).await;
        if let Some(digest) = file.digest {
            // Another pull may have brought it while this one waited.
            let store = Arc::clone(&self.store);
            let size = blocking(move || {
                let size = whole(&store, &digest)?;
                if size.is_none() && store.blob(&digest)?.is_some() {
                    // It is here and damaged: what is right of it need not come again.
                    let saved = store.salvage(&digest)?;
                    tracing::warn!(%digest, saved, "a damaged blob is fetched again");
                }
                Ok(size)
            });
            let size = size.await?;
            if let Some(size) = size.filter(|size| file.size.is_none_or(|wanted| wanted == *size)) {
                return Ok((Got { digest, size }, Vec::new()));
            }
        }
        let sources = self.sources(file, peers);
        let order = plan::order(&sources, |location| self.net.is_unreachable(location));
        let mut failed: Option<PullError> = None;
        if let (Some(digest), Some(size)) = (file.digest, file.size) {
            let job =
                team::Job { fetcher: self, digest, size, key: &key, turn: &turn, meter: &meter };
            match self.together(&job, &order).await {
                Some(Ok(())) => return Ok((Got { digest, size }, Vec::new())),
                Some(Err(error)) if error.is_ours() => return Err(error),
                Some(Err(error)) => failed = Some(error),
                None => {}
            }
        }
        // Who brought wrong bytes together with others was asked until nobody was left.
        let is_out = matches!(failed, Some(PullError::Wrong { .. }));
        for location in order {
            if is_out && self.is_one_url(location) {
                continue;
            }
            let mut outcome = self.from(location, file, &key, &turn, &meter).await;
            if matches!(outcome, Err(PullError::Wrong { was_resumed: true, .. })) {
                // What was here may have come from elsewhere. It is gone now: once more from 0.
                outcome = self.from(location, file, &key, &turn, &meter).await;
            }
            let error = match outcome {
                Ok(got) => return Ok(got),
                Err(error) if error.is_ours() => return Err(error),
                Err(error) => error,
            };
            tracing::warn!(%location, %error, "a source failed");
            if error.is_refusal() {
                meter.note_refusal(location);
            }
            // That one source is out of reach says less than that another gave wrong bytes.
            if failed.is_none() || !matches!(error, PullError::Unreachable { .. }) {
                failed = Some(error);
            }
        }
        Err(failed.unwrap_or(PullError::NoSource(key)))
    }

    /// Where a file may come from: peers first, which are near.
    fn sources(&self, file: &RecipeFile, peers: &[String]) -> Vec<Location> {
        let ours = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        let all = peers.iter().chain(ours.iter());
        let at = |(base, digest): (&String, Digest)| Part::Peer(PeerBlob::new(base, digest)).into();
        let near =
            file.digest.into_iter().flat_map(|digest| all.clone().map(move |it| (it, digest)));
        near.map(at).chain(file.sources.iter().cloned()).collect()
    }

    /// Whether a place is one URL that has the whole.
    fn is_one_url(&self, location: &Location) -> bool {
        matches!(location.parts(), [part] if Target::of(&self.net, part).is_some())
    }

    /// Fetches a large file from all places that have it whole under one URL, where there are
    /// several, or where a chain tells which part of it is wrong.
    async fn together(
        &self,
        job: &team::Job<'_>,
        order: &[&Location],
    ) -> Option<Result<(), PullError>> {
        let places = order.iter().copied().filter(|place| self.is_one_url(place));
        let places: Vec<Location> = places.cloned().collect();
        let (store, key) = (Arc::clone(&self.store), job.key.to_owned());
        let (digest, size) = (job.digest, job.size);
        let looked = blocking(move || {
            let missing = size.saturating_sub(store.partial_bytes(&key)?);
            Ok((missing, store.chain(&digest, size)?.is_some()))
        });
        match looked.await {
            Ok((missing, has_chain)) => {
                let is_large = missing >= limits::RANGES_FROM_BYTES && places.len() > 1;
                if !is_large && (!has_chain || places.is_empty()) {
                    return None;
                }
                let who: Vec<String> = places.iter().map(|place| self.net.who(place)).collect();
                job.meter.source(who.join(", "));
                Some(team::fetch(job, places).await)
            }
            Err(error) => Some(Err(error)),
        }
    }

    /// Fetches one file from one source and commits it. The archives it came out of stay.
    async fn from(
        &self,
        location: &Location,
        file: &RecipeFile,
        key: &str,
        turn: &Turn,
        meter: &Meter<'_>,
    ) -> Result<(Got, Vec<String>), PullError> {
        let writer = Writer::open(&self.store, key, file.size, turn).await?;
        if file.digest.is_none() {
            // Nothing could tell whether what is here belongs to what comes.
            writer.restart().await?;
        }
        let was_resumed = writer.total() > 0;
        meter.source(self.net.who(location));
        let place = Place { store: &self.store, turns: &self.turns, net: &self.net };
        let mut staged = read_parts(place, location, file, &writer, meter).await;
        if matches!(staged, Err(PullError::Changed { .. })) {
            writer.restart().await?;
            staged = read_parts(place, location, file, &writer, meter).await;
        }
        // Also after an error: the next source begins when this one's writer is done.
        let partial = writer.finish().await;
        let (staged, mut partial) = match (staged, partial) {
            (Ok(staged), Ok(partial)) => (staged, partial),
            // That the writer ended is known here, why it did there.
            (Ok(_) | Err(PullError::Writer), Err(error)) => {
                return Err(error.at(location, was_resumed));
            }
            (Err(error), partial) => {
                discard_empty(partial, turn).await?;
                self.net.note(location, &error);
                return Err(error.at(location, was_resumed));
            }
        };
        let (digest, size) = (file.digest, file.size);
        let (store, turn) = (Arc::clone(&self.store), Arc::clone(turn));
        let commit = blocking(move || {
            let digest = digest.map_or_else(|| partial.digest(), Ok)?;
            let size = size.unwrap_or_else(|| partial.offset());
            let committed = partial.commit(&digest, size);
            if committed.is_ok() {
                store.note_intact(&digest);
            }
            drop(turn);
            // Refused bytes came out of these archives, so they are of no use either. After a
            // failure of the disk they are, to the next try.
            if committed.as_ref().err().is_some_and(is_wrong) {
                for key in &staged {
                    if let Err(error) = store.discard(key) {
                        tracing::warn!(%key, %error, "an archive stays until a later start");
                    }
                }
            }
            committed.map(|()| (Got { digest, size }, staged))
        });
        commit.await.map_err(|error| error.at(location, was_resumed))
    }

    /// What the header says, and why this build cannot run the model, where that is so.
    async fn inspect(
        &self,
        recipe: &Recipe,
        got: &[Got],
    ) -> Result<(Option<Inspection>, Option<String>), Fault> {
        let (weights, names) = opened(recipe, got);
        let Some(key) = inspection_key(&weights, &names) else { return Ok((None, None)) };
        let inspection = if let Some(known) = self.store.inspection(&key) {
            known
        } else {
            let paths = weights.iter().map(|digest| self.store.blob_path(digest)).collect();
            let files = ModelFiles { weights: paths, names, ..ModelFiles::default() };
            match self.inspector.inspect(files).await {
                Ok(inspection) => inspection,
                Err(fault) if fault.code == Code::Unsupported => {
                    return Ok((None, Some(fault.message)));
                }
                Err(fault) => return Err(fault),
            }
        };
        let unsupported = unsupported(&inspection);
        Ok((Some(inspection), unsupported))
    }

    /// What is remembered of a model that is here already.
    async fn known_unsupported(&self, name: &ModelName) -> Option<String> {
        let (store, name) = (Arc::clone(&self.store), name.clone());
        let known = blocking(move || {
            let key = store.find(&name)?.and_then(|record| record.manifest.inspection_key());
            Ok(key.and_then(|key| store.inspection(&key)))
        });
        unsupported(&known.await.ok().flatten()?)
    }

    /// What a name that is locked comes to without a source: its manifest and all its blobs are
    /// here and right, under this name or another. `None` where something is to be fetched.
    pub async fn locked_here(&self, name: &ModelName, locked: Digest) -> Option<Stage> {
        let (store, wanted) = (Arc::clone(&self.store), name.clone());
        let found = blocking(move || {
            let mut record = store.find(&wanted)?.filter(|record| record.digest == locked);
            if record.is_none() {
                let other = store.names()?.into_iter().find(|entry| entry.digest == locked);
                record = other.map(|entry| store.find(&entry.name)).transpose()?.flatten();
            }
            let Some(record) = record else { return Ok(false) };
            let _lease = store.lease(&record.manifest.digests());
            for layer in record.manifest.blobs() {
                if whole(&store, &layer.digest)? != Some(layer.size) {
                    return Ok(false);
                }
            }
            if !record.name.matches(&wanted) {
                let Some((_, bytes)) = store.manifest(&record.name)? else { return Ok(false) };
                store.put_manifest(&wanted, &bytes)?;
            }
            Ok(true)
        });
        if !found.await.ok()? {
            return None;
        }
        Some(Stage::Done { digest: locked, unsupported: self.known_unsupported(name).await })
    }

    /// Writes texts, config and manifest, in this order.
    async fn write(
        &self,
        recipe: &Recipe,
        got: &[Got],
        inspection: Option<Inspection>,
        locked: Option<Digest>,
    ) -> Result<Digest, PullError> {
        let (store, recipe, got) = (Arc::clone(&self.store), recipe.clone(), got.to_vec());
        let (manifest, _lease) = {
            let (store, recipe, got) = (Arc::clone(&store), recipe.clone(), got.clone());
            blocking(move || manifest(&store, &recipe, &got, inspection.as_ref())).await?
        };
        held_to(locked, &recipe, sha256(&manifest))?;
        blocking(move || {
            let digest = store.put_manifest(&recipe.name, &manifest)?;
            note_origin(&store, &recipe, &got, &digest);
            Ok(digest)
        })
        .await
    }
}

/// Refuses a manifest that is not the one that was locked.
fn held_to(locked: Option<Digest>, recipe: &Recipe, actual: Digest) -> Result<(), PullError> {
    match locked.filter(|locked| *locked != actual) {
        None => Ok(()),
        Some(expected) => {
            Err(PullError::Locked { name: recipe.name.to_string(), expected, actual })
        }
    }
}

/// The bytes of a recipe's manifest: those that came, or new ones over texts and config, which are
/// stored first and leased.
fn manifest(
    store: &Arc<Store>,
    recipe: &Recipe,
    got: &[Got],
    inspection: Option<&Inspection>,
) -> Result<(Vec<u8>, Vec<Lease>), StoreError> {
    let (weights, names) = opened(recipe, got);
    if let (Some(inspection), Some(key)) = (inspection, inspection_key(&weights, &names)) {
        // The header can be read again; a model that is here is worth more than its row.
        if let Err(error) = store.put_inspection(&key, inspection) {
            tracing::warn!(%error, "what the header says is not kept");
        }
    }
    if let Some(manifest) = &recipe.manifest {
        return Ok((manifest.clone(), Vec::new()));
    }
    let config = config::encode(inspection.map(|one| &one.info));
    let lease = store.lease(&[sha256(&config)]);
    let config_layer = Layer::new(CONFIG_TYPE, store.put_blob(&config)?, config.len() as u64);
    let mut layers = layers(recipe, got);
    for (_, media_type, text) in &recipe.texts {
        let digest = store.put_blob(text.as_bytes())?;
        layers.push(Layer::new(media_type, digest, text.len() as u64));
    }
    Ok((Manifest::new(config_layer, layers).encode(), vec![lease]))
}

/// Writes down where a model came from, and when. It is whole without that.
fn note_origin(store: &Store, recipe: &Recipe, got: &[Got], manifest: &Digest) {
    let file = |(file, one): (&RecipeFile, &Got)| {
        let sources: Vec<String> = file.sources.iter().map(ToString::to_string).collect();
        // Without a digest in the recipe there is nothing it was held to.
        json!({ "digest": one.digest, "verified": file.digest.is_some(), "sources": sources })
    };
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let origin = json!({
        "from": recipe.origin.from,
        "revision": recipe.origin.revision,
        "license": recipe.license(),
        "signed_with": recipe.origin.signature,
        "pulled_at": since.as_secs(),
        "files": recipe.files.iter().zip(got).map(file).collect::<Vec<_>>(),
    });
    if let Err(error) = store.put_origin(manifest, origin.to_string().as_bytes()) {
        tracing::warn!(%error, "where the model came from is not kept");
    }
}

/// What a job is told by, and how fast it may be.
#[derive(Clone, Copy)]
pub(crate) struct Watched<'a> {
    pub progress: &'a watch::Sender<Progress>,
    pub pace: &'a Pace,
    /// What the manifest must be.
    pub locked: Option<Digest>,
    /// Other v4 that may have the files.
    pub peers: &'a [String],
}

/// The files of a job that begins, or goes on: what was told of it before stays true.
fn begin(files: &mut Vec<FileProgress>, mut now: Vec<FileProgress>) {
    if files.len() == now.len() {
        for (before, now) in files.iter().zip(&mut now) {
            now.completed = now.completed.max(before.completed);
        }
    }
    *files = now;
}

/// Makes sure that there is room for what is missing of all files, before the first byte.
fn room(store: &Store, recipe: &Recipe, steps: &[Step]) -> Result<Room, StoreError> {
    let need = |(file, step): (&RecipeFile, &Step)| {
        let size = file.size.filter(|_| *step == Step::Fetch)?;
        Some(Need { key: key(file), size })
    };
    let needs: Vec<Need> = recipe.files.iter().zip(steps).filter_map(need).collect();
    let room = store.make_room(needs)?;
    if !room.gone.is_empty() {
        tracing::info!(names = ?room.gone, "removed to stay within the quota");
    }
    Ok(room)
}

/// Removes what holds nothing. A partial that failed has been told of already.
pub(crate) async fn discard_empty(
    partial: Result<Partial, PullError>,
    turn: &Turn,
) -> Result<(), PullError> {
    let Some(partial) = partial.ok().filter(|partial| partial.here().total() == 0) else {
        return Ok(());
    };
    let turn = Arc::clone(turn);
    blocking(move || partial.discard().map(|()| drop(turn))).await
}

/// Reads all parts of a location, in order. Gives back the keys of the archives
/// that were staged for it.
async fn read_parts(
    place: Place<'_>,
    location: &Location,
    file: &RecipeFile,
    writer: &Writer,
    meter: &Meter<'_>,
) -> Result<Vec<String>, PullError> {
    let n_parts = location.parts().len() as u64;
    let mut staged = Vec::new();
    let mut base = 0_u64;
    for (i, part) in (0_u64..).zip(location.parts()) {
        if file.size == Some(writer.offset()) {
            break;
        }
        let expected = file.size.filter(|_| n_parts == 1);
        let share = source::Share { part: i, n_parts, expected };
        let sink = Sink::new(writer, base, meter.again());
        base += source::read(place, part, share, &sink, &mut staged).await?;
    }
    Ok(staged)
}

/// The size of a blob that is here and is what its digest says. One that was changed is fetched
/// again.
fn whole(store: &Store, digest: &Digest) -> Result<Option<u64>, StoreError> {
    match store.intact(digest) {
        Ok(()) => store.blob(digest),
        Err(StoreError::Missing(_) | StoreError::Digest { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The files that were got as layers. Those of a model folder keep their names.
fn layers(recipe: &Recipe, got: &[Got]) -> Vec<Layer> {
    let layer = |(file, one): (&RecipeFile, &Got)| {
        let is_named = [FOLDER_WEIGHTS_TYPE, FOLDER_CONFIG_TYPE].contains(&&*file.media_type);
        match file.file_name().filter(|_| is_named) {
            Some(name) => Layer::file(&file.media_type, name, one.digest, one.size),
            None => Layer::new(&file.media_type, one.digest, one.size),
        }
    };
    recipe.files.iter().zip(got).map(layer).collect()
}

/// What a runner opens of what was got, and what each is called in its folder.
fn opened(recipe: &Recipe, got: &[Got]) -> (Vec<Digest>, Vec<String>) {
    let came = recipe.manifest.as_deref().and_then(|bytes| Manifest::parse(bytes).ok());
    // Only the layers are looked at.
    let config = || Layer::new(CONFIG_TYPE, sha256(b""), 0);
    came.unwrap_or_else(|| Manifest::new(config(), layers(recipe, got))).weights()
}

/// Why this build cannot run a model, where that is so.
fn unsupported(inspection: &Inspection) -> Option<String> {
    let info = &inspection.info;
    (!info.supported)
        .then(|| format!("this version of v4 cannot run the architecture {}", info.arch))
}

/// The key of a file's partial: its digest, or a hash of where it comes from.
fn key(file: &RecipeFile) -> String {
    if let Some(digest) = file.digest {
        return format!("sha256-{}", digest.hex());
    }
    let places: Vec<String> = file.sources.iter().map(ToString::to_string).collect();
    format!("source-{}", sha256(places.join("\n").as_bytes()).hex())
}

fn file_progress(recipe: &Recipe, steps: &[Step]) -> Vec<FileProgress> {
    let one = |(file, step): (&RecipeFile, &Step)| match *step {
        Step::Have { digest, size } => FileProgress {
            digest: Some(digest),
            total: Some(size),
            completed: size,
            is_done: true,
            source: None,
        },
        Step::Fetch => FileProgress {
            digest: file.digest,
            total: file.size,
            completed: 0,
            is_done: false,
            source: None,
        },
    };
    recipe.files.iter().zip(steps).map(one).collect()
}
