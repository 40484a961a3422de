//! The engine of this build, as the runner sees it.

use std::{sync::Arc, time::Duration};

use v4_engine::{
    load,
    prepare::{Prepare, Sequence},
    step::Engine,
};
use v4_proto::{
    Fault, Generate, Inspection, Inventory, ModelFiles,
    frame::{LoadOptions, RequestId, Stats},
};

use crate::backend::{Backend, Loaded, OnEvent, OnProgress};

/// [`v4_engine`].
pub struct Native;

/// A client gets the fault; the chain of causes goes to standard error, which the daemon keeps.
fn told(error: &v4_engine::Error) -> Fault {
    crate::io::complain(error);
    error.fault()
}

impl Backend for Native {
    type Prepare = Arc<Prepare>;
    type Sequence = Sequence;
    type Engine = Engine;

    fn devices() -> Inventory {
        v4_engine::devices()
    }

    fn inspect(files: &ModelFiles) -> Result<Inspection, Fault> {
        v4_engine::inspect(files).map_err(|error| told(&error))
    }

    fn load(
        files: &ModelFiles,
        options: &LoadOptions,
        on_progress: OnProgress<'_>,
    ) -> Result<Loaded<Self>, Fault> {
        let loaded = load::load(files, options, on_progress).map_err(|error| told(&error))?;
        let load::Loaded { prepare, engine, info, context, memory_bytes, disk_error } = loaded;
        if let Some(error) = disk_error {
            crate::io::complain(&error);
        }
        Ok(Loaded { prepare, engine, info, context, memory_bytes })
    }

    fn prepare(prepare: &Arc<Prepare>, request: &Generate) -> Result<Sequence, Fault> {
        prepare.prepare(request)
    }

    fn submit(engine: &mut Engine, id: RequestId, sequence: Sequence) {
        engine.submit(id, sequence);
    }

    fn cancel(engine: &mut Engine, id: RequestId) {
        engine.cancel(id);
    }

    fn set_threads(engine: &mut Engine, threads: u32) {
        engine.set_threads(threads);
    }

    fn step(engine: &mut Engine, on_event: OnEvent<'_>) -> Result<bool, Fault> {
        engine.step(on_event).map_err(|error| told(&error))
    }

    fn rest(engine: &mut Engine) -> bool {
        engine.rest()
    }

    fn flush(engine: &mut Engine, patience: Duration) {
        engine.flush(patience);
    }

    fn stats(engine: &Engine) -> Stats {
        engine.stats()
    }
}
