//! A sequence that is being worked on: its tokens, and the text that they become.

use std::time::{Duration, Instant};

use v4_proto::frame::RequestId;
use v4_proto::{Delta, Done, Event, Finish, Lane, Usage};

use super::{Emit, as_u32};
use crate::dialect::Reader;
use crate::kv::blocks::BLOCK_TOKENS;
use crate::kv::chain::Chain;
use crate::kv::disk::Fetching;
use crate::prepare::Sequence;
use crate::sample::Sampler;
use crate::schedule::{self, Load};
use crate::speculate;
use crate::text::Detokenizer;
use crate::tokenizer::Tokenizer;

/// What the disk was asked for.
#[derive(Debug)]
pub(super) enum Lookup {
    /// Nothing yet.
    Due,
    /// Blocks, which are on their way into the cache.
    Coming {
        fetching: Fetching,
        /// Depth of the next one.
        next: usize,
        /// When the last one came.
        since: Instant,
    },
    /// All that it had.
    Over,
}

/// A sequence that is being worked on.
#[derive(Debug)]
pub(super) struct Active {
    pub id: RequestId,
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// When it came; in the background it counts as having come later.
    pub turn: Instant,
    lane: Lane,
    pub n_prompt: usize,
    /// How many of `tokens` are in the KV cache.
    pub cached: usize,
    pub blocks: Vec<u32>,
    /// What each full block of `tokens` holds.
    pub chains: Vec<Chain>,
    /// Blocks that the prefix cache knows since the sequence is in the batch.
    pub published: usize,
    /// Tokens that may follow, checked in this step.
    pub draft: Vec<u32>,
    /// What guesses them.
    pub guesses: speculate::Lookup,
    /// Whether the disk was asked for its blocks since it began to wait.
    pub lookup: Lookup,
    context: usize,
    max_tokens: usize,
    sampler: Sampler,
    detokenizer: Detokenizer,
    reader: Option<Reader>,
    visible: Vec<u32>,
    pub usage: Usage,
    pub is_cancelled: bool,
    /// When work on it began.
    pub started: Option<Instant>,
    /// Whether it was in the batch before.
    pub was_admitted: bool,
    /// When its prompt had been read.
    pub read: Option<Instant>,
}

impl Active {
    pub fn new(id: RequestId, sequence: Sequence) -> Self {
        let n_prompt = sequence.prompt.len();
        let patience = match sequence.lane {
            Lane::Interactive => Duration::ZERO,
            Lane::Background => schedule::AGEING,
        };
        Self {
            id,
            turn: Instant::now() + patience,
            lane: sequence.lane,
            n_prompt,
            cached: 0,
            blocks: Vec::new(),
            chains: Vec::new(),
            published: 0,
            draft: Vec::new(),
            guesses: speculate::Lookup::default(),
            lookup: Lookup::Due,
            context: sequence.context,
            max_tokens: sequence.max_tokens,
            sampler: Sampler::new(sequence.sampling, sequence.seed),
            detokenizer: Detokenizer::new(sequence.stop),
            reader: sequence.reader,
            visible: sequence.visible,
            usage: Usage {
                prompt_tokens: as_u32(n_prompt),
                sent_tokens: sequence.sent_tokens,
                ..Usage::default()
            },
            tokens: sequence.prompt,
            is_cancelled: false,
            started: None,
            was_admitted: false,
            read: None,
        }
    }

    /// Full blocks before its last token, whose logits are wanted.
    pub fn before_last(&self) -> usize {
        self.tokens.len().saturating_sub(1) / BLOCK_TOKENS
    }

    /// In counts, as if it shared no block.
    pub fn load(&self, now: Instant) -> Load {
        Load {
            cached: self.cached,
            pending: self.tokens.len() - self.cached,
            blocks: self.blocks.len(),
            shared: 0,
            is_background: self.lane == Lane::Background && now < self.turn,
        }
    }

    /// Tokens that it may write yet.
    pub fn left(&self) -> usize {
        let n_written = self.tokens.len() - self.n_prompt;
        let of_context = self.context.saturating_sub(self.tokens.len());
        self.max_tokens.saturating_sub(n_written).min(of_context)
    }

    /// Chooses tokens from the logits after the last known one and after each of the draft, up to
    /// the first that was not guessed. How the sequence ends, if it does, and how many guesses were
    /// right. Each is drawn as if there had been no draft: from the same logits, after the same
    /// tokens, with the same random number. The keys and values of wrong guesses are overwritten by
    /// the next step.
    pub fn choose<'r>(
        &mut self,
        tokenizer: &Tokenizer,
        rows: impl Iterator<Item = &'r mut [f32]>,
        emit: Emit<'_>,
    ) -> (Option<Finish>, u64) {
        let draft = std::mem::take(&mut self.draft);
        let (mut finish, mut accepted) = (None, 0);
        let mut is_over = false;
        // Every row is taken, wanted or not: the next sequence's follow.
        for (at, row) in rows.enumerate() {
            if is_over {
                continue;
            }
            finish = self.write(tokenizer, row, emit);
            let is_right = draft.get(at).is_some_and(|guess| self.tokens.last() == Some(guess));
            if finish.is_none() && is_right {
                self.cached += 1;
                accepted += 1;
            } else {
                is_over = true;
            }
        }
        self.guesses.checked(draft.len(), accepted);
        (finish, accepted as u64)
    }

    /// Chooses the next token and says what text it makes certain; how the sequence ends, if it
    /// does.
    pub fn write(
        &mut self,
        tokenizer: &Tokenizer,
        logits: &mut [f32],
        emit: Emit<'_>,
    ) -> Option<Finish> {
        self.read.get_or_insert_with(Instant::now);
        if self.tokens.len() - self.n_prompt >= self.max_tokens {
            return Some(self.finish(Finish::Length, emit));
        }
        let token = self.sampler.sample(logits, &self.tokens);
        if tokenizer.is_end(token) {
            return Some(self.finish(Finish::Stop, emit));
        }
        self.tokens.push(token);
        self.usage.completion_tokens += 1;
        let is_text = !tokenizer.is_control(token) || self.visible.contains(&token);
        let bytes = if is_text { tokenizer.bytes(token) } else { &[] };
        let chunk = self.detokenizer.push(bytes);
        self.say(&chunk.text, emit);
        if chunk.stopped {
            return Some(self.finish(Finish::Stop, emit));
        }
        let n_written = self.tokens.len() - self.n_prompt;
        if n_written >= self.max_tokens || self.tokens.len() >= self.context {
            return Some(self.finish(Finish::Length, emit));
        }
        None
    }

    /// Says text through the reader.
    fn say(&mut self, text: &str, emit: Emit<'_>) {
        let delta = match &mut self.reader {
            Some(reader) => reader.push(text),
            None => Delta { text: text.to_owned(), ..Delta::default() },
        };
        self.emit(delta, emit);
    }

    /// Says what was held back.
    fn finish(&mut self, finish: Finish, emit: Emit<'_>) -> Finish {
        let rest = self.detokenizer.finish();
        self.say(&rest.text, emit);
        let Some(reader) = &mut self.reader else { return finish };
        let delta = reader.finish();
        let has_calls = reader.has_calls();
        self.emit(delta, emit);
        if has_calls && finish == Finish::Stop { Finish::ToolCalls } else { finish }
    }

    fn emit(&self, delta: Delta, emit: Emit<'_>) {
        if delta != Delta::default() {
            emit(self.id, Event::Delta(delta));
        }
    }

    pub fn done(&self, finish: Finish) -> Done {
        let now = Instant::now();
        let read = self.read.unwrap_or(now);
        let nanoseconds =
            |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let prompt = self.started.map_or(Duration::ZERO, |started| read - started);
        let usage = Usage {
            prompt_ns: nanoseconds(prompt),
            completion_ns: nanoseconds(now - read),
            ..self.usage
        };
        Done { finish, usage }
    }
}
