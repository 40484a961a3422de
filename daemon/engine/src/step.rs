//! The loop: take sequences in, plan a step, run it, choose tokens, say what came of it.

mod active;
mod alike;
mod draft;
mod persist;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use v4_kernels::{KvCache, Span};
use v4_proto::frame::{RequestId, Stats};
use v4_proto::{Event, Finish};

use crate::kv::blocks::{BLOCK_TOKENS, Pool, blocks_for};
use crate::kv::chain::Chain;
use crate::kv::prefix::Prefix;
use crate::model::{Batch, Model};
use crate::prepare::Sequence;
use crate::schedule::{self, Load, Plan};
use crate::tokenizer::Tokenizer;
use crate::{Error, limits};
use active::{Active, Lookup};
use draft::Drafting;
use persist::Persist;

/// Hears the events of requests.
pub type Emit<'a> = &'a mut dyn FnMut(RequestId, Event);

/// A model and the sequences that it works on.
pub struct Engine {
    model: Model,
    tokenizer: Arc<Tokenizer>,
    kv: KvCache,
    pool: Pool,
    prefix: Prefix,
    /// The blocks on disk.
    persist: Option<Persist>,
    /// What all chains of blocks begin with.
    root: Chain,
    slots: usize,
    /// In the batch, whose turn came first first.
    running: Vec<Active>,
    /// Whose turn comes first first.
    waiting: VecDeque<Active>,
    steps: u64,
    pace: schedule::Pace,
    drafting: Drafting,
    rows: Rows,
    logits: Vec<f32>,
}

/// The rows of a step.
#[derive(Debug, Default)]
struct Rows {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    /// Rows whose logits are wanted.
    wanted: Vec<u32>,
}

impl Engine {
    /// An engine for sequences of up to `context` tokens, `slots` of them at a time.
    ///
    /// # Errors
    /// [`Error::Metadata`] when the tokenizer has tokens that the model has no row for, and
    /// [`Error::Device`] when the KV cache does not fit.
    ///
    /// # Panics
    /// When the model keeps blocks of another size: our own mistake.
    pub fn new(
        mut model: Model,
        tokenizer: Arc<Tokenizer>,
        context: u32,
        slots: u32,
    ) -> Result<Self, Error> {
        let (n_tokens, n_rows) = (tokenizer.len(), model.vocabulary());
        if n_tokens > n_rows {
            let problem = format!("has {n_tokens} entries for an embedding of {n_rows} rows");
            return Err(Error::metadata("tokenizer.ggml.tokens", problem));
        }
        let shape = model.kv_shape();
        assert_eq!(shape.block_tokens, BLOCK_TOKENS, "one size of block");
        let slots = slots.max(1) as usize;
        let n_blocks = slots.saturating_mul(blocks_for(context as usize));
        let kv = model.device_mut().kv_cache(shape, n_blocks)?;
        Ok(Self {
            pool: Pool::new(as_u32(n_blocks)),
            model,
            tokenizer,
            kv,
            prefix: Prefix::default(),
            persist: None,
            root: Chain::default(),
            slots,
            running: Vec::new(),
            waiting: VecDeque::new(),
            steps: 0,
            pace: schedule::Pace::default(),
            drafting: Drafting::default(),
            rows: Rows::default(),
            logits: Vec::new(),
        })
    }

    /// Takes a sequence in. Its events come from [`Engine::step`].
    pub fn submit(&mut self, id: RequestId, sequence: Sequence) {
        let mut active = Active::new(id, sequence);
        self.root.extend(&mut active.chains, &active.tokens);
        self.wait(active);
    }

    /// Ends a sequence: the next step says [`Finish::Cancelled`] and does no more for it. An id
    /// that is not known has ended already.
    pub fn cancel(&mut self, id: RequestId) {
        let all = self.running.iter_mut().chain(&mut self.waiting);
        all.filter(|active| active.id == id).for_each(|active| active.is_cancelled = true);
    }

    /// Computes with at most this many threads from the next step on.
    pub fn set_threads(&mut self, threads: u32) {
        self.model.device_mut().set_threads(threads as usize);
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// The figures of now. Cached blocks that nobody uses count as free.
    pub fn stats(&self) -> Stats {
        let total = self.pool.len();
        Stats {
            running: as_u32(self.running.len()),
            waiting: as_u32(self.waiting.len()),
            blocks_used: as_u32(total - self.available()),
            blocks_total: as_u32(total),
            steps: self.steps,
            blocks_saved: self.persist.as_ref().map_or(0, |persist| persist.n_saved),
            blocks_restored: self.persist.as_ref().map_or(0, |persist| persist.n_restored),
            drafted: self.drafting.n_drafted,
            accepted: self.drafting.n_accepted,
        }
    }

    /// Works on the sequences once and says what came of it: true while there is more to do.
    ///
    /// # Errors
    /// What makes further work impossible. What only the sequences of this step suffer from is told
    /// to them as [`Event::Failed`].
    pub fn step(&mut self, emit: Emit<'_>) -> Result<bool, Error> {
        self.end_cancelled(emit);
        self.take_fetched(limits::RESTORE_STEP_BYTES);
        self.admit();
        if self.running.is_empty() {
            self.wait_for_fetched();
            return Ok(!self.waiting.is_empty());
        }
        let loads = self.loads();
        let budget = schedule::budget(&loads, &self.pace);
        let plan = schedule::next(budget, &loads, self.available());
        let step = schedule::Step::of(&plan, &loads);
        for _ in 0..plan.preempt {
            self.preempt(self.running.len() - 1);
        }
        self.draft(&plan);
        let began = Instant::now();
        match self.forward(&plan) {
            Ok(()) => self.take_logits(&plan, emit),
            // The device could not do this step; other sequences may fit.
            Err(error @ Error::Device(_)) => self.fail_all(&error, emit),
            Err(error) => return Err(error),
        }
        self.steps += 1;
        self.measure(step, began.elapsed());
        self.publish();
        self.save(limits::SAVE_STEP_BLOCKS);
        Ok(!self.is_idle())
    }

    /// Blocks that are free or can be made so.
    fn available(&self) -> usize {
        self.pool.n_free() + self.prefix.n_idle()
    }

    /// The running sequences in counts, oldest first.
    fn loads(&self) -> Vec<Load> {
        let now = Instant::now();
        let mut is_held = vec![false; self.pool.len()];
        let count = |active: &Active| {
            let mut load = active.load(now);
            for &block in &active.blocks {
                load.shared += usize::from(std::mem::replace(&mut is_held[block as usize], true));
            }
            load
        };
        self.running.iter().map(count).collect()
    }

    /// Puts a sequence among those that wait, by its turn.
    fn wait(&mut self, active: Active) {
        let at = self.waiting.partition_point(|other| other.turn <= active.turn);
        self.waiting.insert(at, active);
    }

    fn end_cancelled(&mut self, emit: Emit<'_>) {
        for index in (0..self.waiting.len()).rev() {
            if self.waiting[index].is_cancelled
                && let Some(active) = self.waiting.remove(index)
            {
                self.end(active, Finish::Cancelled, emit);
            }
        }
        for index in (0..self.running.len()).rev() {
            if self.running[index].is_cancelled {
                let active = self.running.remove(index);
                self.end(active, Finish::Cancelled, emit);
            }
        }
    }

    /// Starts waiting sequences as far as there is room, with what the prefix cache knows of them;
    /// those in the background make room for others. One whose blocks are on their way, from disk
    /// or from a sequence that begins alike, keeps its place.
    fn admit(&mut self) {
        let n = loop {
            let (now, running) = (Instant::now(), self.loads());
            let waiting: Vec<Load> = self.waiting.iter().map(|active| active.load(now)).collect();
            let n = schedule::admit(self.slots, &running, &waiting, self.available());
            match schedule::yields(&running, &waiting, n) {
                Some(index) => self.preempt(index),
                None => break n,
            }
        };
        let mut at = 0;
        for _ in 0..n {
            if self.is_coming(at) || self.follows(at) {
                at += 1;
            } else if let Some(active) = self.waiting.remove(at) {
                self.start(active);
            }
        }
    }

    fn start(&mut self, mut active: Active) {
        let known = active.before_last();
        active.blocks = self.prefix.find(&mut self.pool, &active.chains[..known]);
        active.cached = active.blocks.len() * BLOCK_TOKENS;
        active.published = active.blocks.len();
        self.copy_alike(&mut active);
        active.started.get_or_insert_with(Instant::now);
        if !std::mem::replace(&mut active.was_admitted, true) {
            active.usage.cached_tokens = as_u32(active.cached);
        }
        let at = self.running.partition_point(|other| other.turn <= active.turn);
        self.running.insert(at, active);
    }

    /// Takes a sequence out of the batch; it will be read again.
    fn preempt(&mut self, index: usize) {
        let mut active = self.running.remove(index);
        self.give_back(&mut active);
        self.wait(active);
    }

    /// Frees the blocks of a sequence; the prefix cache keeps the full ones as long as it may.
    fn give_back(&mut self, active: &mut Active) {
        self.root.extend(&mut active.chains, &active.tokens);
        let full = &active.chains[..active.cached / BLOCK_TOKENS];
        self.prefix.keep(&mut self.pool, full, &active.blocks, 0);
        for block in active.blocks.drain(..) {
            self.prefix.release(&mut self.pool, block);
        }
        active.cached = 0;
        active.lookup = Lookup::Due;
    }

    fn take_block(&mut self) -> u32 {
        self.try_take_block().expect("the plan counted the blocks there are")
    }

    /// A block that was free, or idle in the prefix cache.
    fn try_take_block(&mut self) -> Option<u32> {
        if self.pool.n_free() == 0 {
            let evicted = self.prefix.evict(&mut self.pool)?;
            self.save_evicted(evicted);
        }
        self.pool.take()
    }

    /// Runs the planned tokens of each sequence.
    fn forward(&mut self, plan: &Plan) -> Result<(), Error> {
        let mut rows = std::mem::take(&mut self.rows);
        rows.clear();
        for (index, &n) in plan.tokens.iter().enumerate() {
            // A draft fits the blocks that the known tokens need.
            while self.running[index].blocks.len() < blocks_for(self.running[index].cached + n) {
                let block = self.take_block();
                self.running[index].blocks.push(block);
            }
            rows.push(&self.running[index], n);
        }
        let mut first_row = 0;
        let spans = self.running.iter().zip(&plan.tokens).filter(|&(_, &n)| n > 0);
        let spans = spans.map(|(active, &n)| {
            let n_rows = n + active.draft.len();
            let kv_len = active.cached + n_rows;
            let span = Span { first_row, n_rows, kv_len, blocks: &active.blocks };
            first_row += n_rows;
            span
        });
        let spans: Vec<Span<'_>> = spans.collect();
        let batch = Batch {
            tokens: &rows.tokens,
            positions: &rows.positions,
            slots: &rows.slots,
            spans: &spans,
            logit_rows: &rows.wanted,
        };
        let result = self.model.forward(&mut self.kv, &batch, &mut self.logits);
        self.rows = rows;
        result
    }

    /// Chooses tokens for each sequence whose known tokens are all read: one, and one more for each
    /// guess that was right.
    fn take_logits(&mut self, plan: &Plan, emit: Emit<'_>) {
        let mut logits = std::mem::take(&mut self.logits);
        let mut rows = logits.chunks_exact_mut(self.model.vocabulary());
        let mut ended = Vec::new();
        for (index, &n) in plan.tokens.iter().enumerate() {
            let active = &mut self.running[index];
            active.cached += n;
            if active.cached < active.tokens.len() {
                continue;
            }
            let own = rows.by_ref().take(1 + active.draft.len());
            let (finish, accepted) = active.choose(&self.tokenizer, own, emit);
            self.drafting.n_accepted += accepted;
            if let Some(finish) = finish {
                ended.push((index, finish));
            }
        }
        for (index, finish) in ended.into_iter().rev() {
            let active = self.running.remove(index);
            self.end(active, finish, emit);
        }
        self.logits = logits;
    }

    fn end(&mut self, mut active: Active, finish: Finish, emit: Emit<'_>) {
        self.give_back(&mut active);
        let done = active.done(finish);
        emit(active.id, Event::Done(done));
    }

    /// Ends the sequences of a step that the device could not do.
    fn fail_all(&mut self, error: &Error, emit: Emit<'_>) {
        for mut active in std::mem::take(&mut self.running) {
            self.give_back(&mut active);
            emit(active.id, Event::Failed(error.fault()));
        }
    }

    /// Learns how fast prompts are read, from steps that mostly do that, and what rows cost, from
    /// those that only write.
    fn measure(&mut self, step: schedule::Step, took: Duration) {
        self.pace.measure(step, took);
        if step.read == 0 {
            self.drafting.cost.measure(self.rows.tokens.len(), took.as_secs_f64());
        }
    }
}

impl Rows {
    fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.wanted.clear();
    }

    /// Adds the next `n` tokens of a sequence and its draft, and asks for logits where they are its
    /// last: of that and of each guess.
    fn push(&mut self, active: &Active, n: usize) {
        let end = active.cached + n;
        let is_last = n > 0 && end == active.tokens.len();
        let known = &active.tokens[active.cached..end];
        let first_wanted = self.tokens.len() + n - usize::from(is_last);
        self.tokens.extend(known.iter().chain(&active.draft));
        for position in active.cached..end + active.draft.len() {
            self.positions.push(as_u32(position));
            let block = active.blocks[position / BLOCK_TOKENS] as usize;
            self.slots.push(as_u32(block * BLOCK_TOKENS + position % BLOCK_TOKENS));
        }
        if is_last {
            self.wanted.extend((first_wanted..self.tokens.len()).map(as_u32));
        }
    }
}

/// Positions, slots and counts: all are below the blocks' number times their size.
fn as_u32(n: usize) -> u32 {
    u32::try_from(n).expect("the KV cache has far fewer than 2^32 slots")
}

#[cfg(test)]
mod tests;
