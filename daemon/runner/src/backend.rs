//! What a runner needs of an engine, so that its threads and its drain are tested with one that
//! does as it is told.

use std::time::Duration;

use v4_proto::{
    Event, Fault, Generate, Inspection, Inventory, ModelFiles, ModelInfo,
    frame::{LoadOptions, RequestId, Stage, Stats},
};

/// Hears how far a load is: stage, bytes done, bytes in all.
pub type OnProgress<'a> = &'a mut dyn FnMut(Stage, u64, u64);
/// Hears the events of requests.
pub type OnEvent<'a> = &'a mut dyn FnMut(RequestId, Event);

/// A loaded model.
pub struct Loaded<B: Backend + ?Sized> {
    /// Turns requests into sequences; shared with the reader.
    pub prepare: B::Prepare,
    /// Steps them; stays on its thread.
    pub engine: B::Engine,
    /// The model's figures.
    pub info: ModelInfo,
    /// Tokens of context a sequence gets.
    pub context: u32,
    /// Bytes this process needs.
    pub memory_bytes: u64,
}

/// An engine.
pub trait Backend: 'static {
    /// Turns a request into a sequence, off the engine's thread.
    type Prepare: Send + Sync;
    /// A request as the engine takes it.
    type Sequence: Send;
    /// What steps.
    type Engine;

    /// The devices beside the host, and whether it computes on them. Called from any thread.
    fn devices() -> Inventory;
    /// What the header of these files says.
    fn inspect(files: &ModelFiles) -> Result<Inspection, Fault>;
    /// Puts a model on its device.
    fn load(
        files: &ModelFiles,
        options: &LoadOptions,
        on_progress: OnProgress<'_>,
    ) -> Result<Loaded<Self>, Fault>;
    /// Template, tokens, length.
    fn prepare(prepare: &Self::Prepare, request: &Generate) -> Result<Self::Sequence, Fault>;
    /// Takes a sequence in.
    fn submit(engine: &mut Self::Engine, id: RequestId, sequence: Self::Sequence);
    /// Ends a sequence at the next step.
    fn cancel(engine: &mut Self::Engine, id: RequestId);
    /// Computes with at most this many threads from the next step on.
    fn set_threads(engine: &mut Self::Engine, threads: u32);
    /// One step; `false` when nothing is left to do.
    fn step(engine: &mut Self::Engine, on_event: OnEvent<'_>) -> Result<bool, Fault>;
    /// Some milliseconds of work in the background; `false` when there is none.
    fn rest(engine: &mut Self::Engine) -> bool;
    /// Finishes that work as far as `patience` goes.
    fn flush(engine: &mut Self::Engine, patience: Duration);
    /// The figures of now.
    fn stats(engine: &Self::Engine) -> Stats;
}
