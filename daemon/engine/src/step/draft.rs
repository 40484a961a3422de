//! Guesses at the next tokens, for each sequence that writes, as far as they pay.

use super::Engine;
use crate::kv::blocks::{BLOCK_TOKENS, blocks_for};
use crate::schedule::Plan;
use crate::speculate::{self, Cost, Draft};

/// What is known of guesses, and how many there were.
#[derive(Default)]
pub(super) struct Drafting {
    pub cost: Cost,
    pub n_drafted: u64,
    pub n_accepted: u64,
    /// What tests guess instead, given all tokens and how many guesses there may be.
    #[cfg(test)]
    pub told: Option<Told>,
    /// Whether rows cost nothing: those of a tiny model are too quick to be measured well.
    #[cfg(test)]
    pub is_free: bool,
}

/// Guesses of a test.
#[cfg(test)]
pub(super) type Told = Box<dyn Fn(&[u32], usize) -> Vec<u32>>;

impl Drafting {
    fn cost(&self) -> Cost {
        // What a test guesses is checked, whatever it costs.
        #[cfg(test)]
        if self.told.is_some() || self.is_free {
            let mut free = Cost::default();
            free.measure(1, 1.0);
            free.measure(speculate::ROWS, 1.0);
            return free;
        }
        self.cost
    }
}

impl Engine {
    /// Chooses the drafts of a step. While a prompt is read there are none: rows are dear then.
    pub(super) fn draft(&mut self, plan: &Plan) {
        let is_reading = plan.tokens.iter().any(|&n| n > 1);
        let n_writing = plan.tokens.iter().filter(|&&n| n > 0).count();
        if is_reading || n_writing >= speculate::ROWS {
            return;
        }
        let guess = |index| if plan.tokens[index] == 1 { self.guess(index) } else { None };
        let drafts = (0..plan.tokens.len()).map(guess).map(Option::unwrap_or_default);
        let drafts: Vec<Draft> = drafts.collect();
        let allotted = speculate::allot(n_writing, &drafts, &self.drafting.cost());
        for ((active, draft), n) in self.running.iter_mut().zip(drafts).zip(allotted) {
            active.draft = draft.tokens;
            active.draft.truncate(n);
            self.drafting.n_drafted += n as u64;
        }
    }

    /// What may follow in one sequence: as much as it may write, within the blocks that it needs
    /// in any case.
    fn guess(&mut self, index: usize) -> Option<Draft> {
        let active = &mut self.running[index];
        if active.cached + 1 != active.tokens.len() {
            return None;
        }
        let room = blocks_for(active.tokens.len()) * BLOCK_TOKENS - active.tokens.len();
        let most = room.min(active.left().saturating_sub(1)).min(speculate::ROWS - 1);
        let draft = active.guesses.guess(&active.tokens, most);
        #[cfg(test)]
        if let Some(told) = &self.drafting.told {
            let mut tokens = told(&active.tokens, most);
            tokens.truncate(most);
            return Some(Draft { tokens, hits: 1.0 });
        }
        draft
    }
}
