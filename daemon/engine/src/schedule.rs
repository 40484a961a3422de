//! What the next step works on: pure decisions over counts, so that they can be tested as tables.
//!
//! Sequences that write take one token each; what is left of the step's time goes to prompts, in
//! equal shares, so that a short prompt does not wait for a long one; blocks go to the oldest
//! first. When they run out, and only then, the newest sequences give theirs back and wait again.
//!
//! Time is predicted: a token of a prompt takes longer the more are before it, and both parts of
//! its cost are learned from the steps.
//!
//! A sequence in the background counts as one that came [`AGEING`] later: until then it is behind
//! all others, reads what they leave of the budget, and gives its place up to them. Then its turn
//! has come and it is like any other, so it never starves.

use std::time::Duration;

use crate::kv::blocks::{BLOCK_TOKENS, blocks_for};

/// A sequence, in counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Tokens in the KV cache.
    pub cached: usize,
    /// Known tokens that are not: 1 while it writes, more while its prompt is read. Never 0.
    pub pending: usize,
    /// Blocks it holds.
    pub blocks: usize,
    /// Of them, those that an older sequence holds too: giving them back frees nothing.
    pub shared: usize,
    /// Whether its turn has not come yet; of several these are the newest.
    pub is_background: bool,
}

impl Load {
    /// Blocks it still needs until `tokens` more are cached.
    fn lacks(&self, tokens: usize) -> usize {
        blocks_for(self.cached + tokens).saturating_sub(self.blocks)
    }
}

/// What a step works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// How many of the newest running sequences give their blocks back and wait again.
    pub preempt: usize,
    /// For each of the others, oldest first: how many of its pending tokens are run.
    pub tokens: Vec<usize>,
}

/// How many of the `waiting` sequences, first come first, start now. One starts when there is a
/// place and when its prompt fits beside what the `running` ones still have to read. `available`
/// counts blocks that are free or can be made so.
pub fn admit(slots: usize, running: &[Load], waiting: &[Load], available: usize) -> usize {
    let promised: usize = running.iter().map(|load| load.lacks(load.pending)).sum();
    let mut left = available.saturating_sub(promised);
    let mut admitted = 0;
    for load in waiting {
        let needs = load.lacks(load.pending + 1);
        // Alone on the device a sequence fits: its length was checked against the context.
        let is_alone = running.is_empty() && admitted == 0;
        if running.len() + admitted >= slots || (needs > left && !is_alone) {
            break;
        }
        left = left.saturating_sub(needs);
        admitted += 1;
    }
    admitted
}

/// Which of the `running` sequences gives its place up to those that wait, where `admitted` of them
/// start otherwise: the newest in the background, as long as one waits that is not.
pub fn yields(running: &[Load], waiting: &[Load], admitted: usize) -> Option<usize> {
    let next = waiting.get(admitted)?;
    let is_urgent = !next.is_background;
    is_urgent.then(|| running.iter().rposition(|load| load.is_background)).flatten()
}

/// The next step of the `running` sequences, oldest first, within a `budget` beside a token for
/// each that writes, and `available` blocks.
pub fn next(budget: Budget, running: &[Load], available: usize) -> Plan {
    for preempt in 0..running.len() {
        let (kept, given_up) = running.split_at(running.len() - preempt);
        let regained: usize = given_up.iter().map(|load| load.blocks - load.shared).sum();
        if let Some(tokens) = share(budget, kept, available + regained) {
            return Plan { preempt, tokens };
        }
    }
    Plan { preempt: running.len(), tokens: Vec::new() }
}

/// Tokens for each sequence; `None` when blocks do not suffice for each that writes, and for the
/// oldest to go on.
fn share(mut budget: Budget, running: &[Load], mut blocks: usize) -> Option<Vec<usize>> {
    let mut tokens = vec![0; running.len()];
    let (writing, reading): (Vec<usize>, Vec<usize>) =
        (0..running.len()).partition(|&index| running[index].pending == 1);
    for &index in &writing {
        blocks = blocks.checked_sub(running[index].lacks(1))?;
        tokens[index] = 1;
    }
    let (background, urgent): (Vec<usize>, Vec<usize>) =
        reading.into_iter().partition(|&index| running[index].is_background);
    for reading in [urgent, background] {
        budget.deal(running, reading, &mut blocks, &mut tokens);
    }
    tokens.first().is_none_or(|&first| first > 0).then_some(tokens)
}

/// What a step may read of prompts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// Tokens.
    tokens: usize,
    /// Time, in the time that a token takes which has none before it.
    left: f64,
    /// How much more a token takes for each that is before it, in the same unit.
    slope: f64,
}

impl Budget {
    /// What the next tokens of `load` take each: 1 at the beginning of a sequence.
    fn price(&self, load: &Load) -> f64 {
        1.0 + self.slope * load.cached as f64
    }

    /// Shares what is left of time and blocks among some that read, oldest first.
    fn deal(
        &mut self,
        running: &[Load],
        mut reading: Vec<usize>,
        blocks: &mut usize,
        tokens: &mut [usize],
    ) {
        let price: Vec<f64> = running.iter().map(|load| self.price(load)).collect();
        // Where there is no room for a token of each, the oldest read.
        reading.truncate(self.tokens);
        let mut owed = 0.0;
        reading.retain(|&index| {
            owed += price[index];
            owed <= self.left
        });
        let mut owed: f64 = reading.iter().map(|&index| price[index]).sum();
        // Short prompts first, and most of it to one that is far shorter than another: few tokens
        // are before its own, so they cost little. What they leave goes to the longer ones.
        let mut shortest = reading.clone();
        shortest.sort_by_key(|&index| running[index].pending);
        let longest = shortest.last().map_or(0, |&index| running[index].pending);
        for (done, &index) in shortest.iter().enumerate() {
            let load = &running[index];
            let others = shortest.len() - done - 1;
            owed -= price[index];
            let is_short = done == 0 && load.pending <= longest / 4;
            let part = |left: f64, owed: f64| {
                let fair = left / (others + 1) as f64;
                if is_short { fair.max(left * SHORT_SHARE) } else { fair }.min(left - owed)
            };
            let most = whole(part(self.left, owed) / price[index]);
            let most = most.min(whole(part(self.tokens as f64, others as f64))).max(1);
            tokens[index] = load.pending.min(most);
            self.tokens -= tokens[index];
            self.left -= tokens[index] as f64 * price[index];
        }
        // Old ones first: what blocks there are is theirs, and what tokens blocks keep from others.
        for index in reading {
            let load = &running[index];
            let room = (load.blocks + *blocks) * BLOCK_TOKENS - load.cached;
            let more = whole(self.left / price[index]).min(self.tokens);
            let chunk = load.pending.min(tokens[index] + more).min(room);
            self.tokens = self.tokens + tokens[index] - chunk;
            self.left += (tokens[index] as f64 - chunk as f64) * price[index];
            *blocks -= load.lacks(chunk);
            tokens[index] = chunk;
        }
    }
}

/// Tokens of one step at most: as many as go through the layers at once.
pub const STEP_TOKENS: usize = 512;
/// The least that a prompt gets of a step, lest its reading never ends: a token, and as many more
/// at the beginning of a sequence.
const LEAST_TOKENS: usize = 8;
/// So many prompts get that each.
const MOST_LEASTS: usize = 2;
/// The least of a step in which nobody writes: of one so long hardly less is read a second than of
/// the longest (92 % on a two-core machine).
const LEAST_ALONE: usize = 128;
/// What a prompt that is far shorter than another gets of a step.
const SHORT_SHARE: f64 = 0.75;
/// How long a step may take while other sequences write: so many steps that only write, within
/// bounds. Tokens then come at half their pace; no reader notices a pause below the one bound, and
/// chunks that fill the other are read hardly slower than longer ones.
const WRITES: u32 = 2;
const STEP_TARGET: [Duration; 2] = [Duration::from_millis(60), Duration::from_millis(200)];
/// The same where nobody waits for what is read.
const BACKGROUND_TARGET: Duration = Duration::from_millis(40);
/// The same where nobody writes: a prompt that comes meanwhile waits so long for its first chunk.
const ALONE_TARGET: Duration = Duration::from_millis(200);
/// How long a sequence in the background stays behind the others.
pub const AGEING: Duration = Duration::from_secs(20);

/// The budget of a step, which should end soon: for those that write, and for those that may come.
/// Before it is known how fast prompts are read, little is.
pub fn budget(running: &[Load], pace: &Pace) -> Budget {
    let is_written = running.iter().any(|load| load.pending == 1);
    let n_urgent = running.iter().filter(|load| load.pending > 1 && !load.is_background).count();
    let (target, least) = match (is_written, n_urgent) {
        (false, _) => (ALONE_TARGET, LEAST_ALONE),
        (_, 0) => (BACKGROUND_TARGET, LEAST_TOKENS),
        (_, n) => (pace.target(), LEAST_TOKENS * n.min(MOST_LEASTS)),
    };
    let mut budget = Budget { tokens: STEP_TOKENS, left: 0.0, slope: pace.slope };
    // The first goes on, however dear its tokens are.
    let first = running.iter().find(|load| load.pending > 1);
    let least = least as f64 + first.map_or(0.0, |load| budget.price(load) - 1.0);
    let soon = pace.units_per_s.map_or(0.0, |rate| rate * target.as_secs_f64());
    budget.left = soon.max(least);
    budget
}

/// A step, as far as [`Pace`] learns from it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Step {
    /// Tokens of prompts that it read.
    pub read: usize,
    /// Of each of them, how many tokens were before it, in sum.
    pub before: usize,
    /// Whether it also wrote.
    pub wrote: bool,
}

impl Step {
    /// What a plan does.
    pub fn of(plan: &Plan, running: &[Load]) -> Self {
        let mut step = Self::default();
        for (&n, load) in plan.tokens.iter().zip(running) {
            if load.pending == 1 {
                step.wrote = true;
            } else {
                step.read += n;
                step.before += n * load.cached + n * n.saturating_sub(1) / 2;
            }
        }
        step
    }
}

/// How fast prompts were read lately, and tokens written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    /// Tokens of prompts a second; `None` before a step has read any.
    tokens_per_s: Option<f64>,
    /// The same, each token counted as its price.
    units_per_s: Option<f64>,
    /// Seconds of a step that only writes.
    write_s: Option<f64>,
    /// How much longer a token takes for each that is before it, as a share of what one takes that
    /// has none before it.
    slope: f64,
    /// What the slope is fitted to.
    seen: Seen,
}

impl Pace {
    /// Tokens of prompts a second; `None` before a step has read any.
    pub fn tokens_per_s(self) -> Option<f64> {
        self.tokens_per_s
    }

    /// Learns from a step; a few tokens of prompts say nothing.
    pub fn measure(&mut self, step: Step, took: Duration) {
        const WEIGHT: f64 = 0.5;
        let learn = |known: &mut Option<f64>, new: f64| {
            let old = known.unwrap_or(new);
            *known = Some(old + WEIGHT * (new - old));
        };
        let took = took.as_secs_f64();
        if took <= 0.0 {
            return;
        }
        match step.read {
            0 => learn(&mut self.write_s, took),
            LEAST_TOKENS.. => {
                let write = if step.wrote { self.write_s.unwrap_or(0.0) } else { 0.0 };
                // Both share the weights, so a step is shorter than its parts: what is read has
                // a quarter at least.
                self.seen.add(step, (took - write).max(took / 4.0));
                self.slope = self.seen.slope().unwrap_or(self.slope);
                let (read, before) = (step.read as f64, step.before as f64);
                learn(&mut self.tokens_per_s, read / took);
                learn(&mut self.units_per_s, (read + self.slope * before) / took);
            }
            _ => {}
        }
    }

    /// How long a step may take while somebody writes.
    fn target(&self) -> Duration {
        let [least, most] = STEP_TARGET;
        let write = self.write_s.map_or(Duration::ZERO, Duration::from_secs_f64);
        write.saturating_mul(WRITES).clamp(least, most)
    }
}

/// Sums over the steps that read, each counting as its tokens and older ones less: of 1, of the
/// tokens before a token, of their square, of the seconds a token took, and of those times the
/// tokens before it.
#[derive(Debug, Clone, Copy, Default)]
struct Seen([f64; 5]);

impl Seen {
    /// What a step counts of the one after it.
    const MEMORY: f64 = 0.9;
    /// Depths must differ by so much, in shares of their mean, to tell what depth costs.
    const SPREAD: f64 = 0.1;
    /// What a token that has none before it costs at least, as a share of the average.
    const LEAST_FIRST: f64 = 0.1;

    fn add(&mut self, step: Step, seconds: f64) {
        let n = step.read as f64;
        let before = step.before as f64 / n;
        let new = [n, n * before, n * before * before, seconds, seconds * before];
        for (sum, new) in self.0.iter_mut().zip(new) {
            *sum = *sum * Self::MEMORY + new;
        }
    }

    /// Least squares of what a token costs over the tokens before it; `None` where these were too
    /// much alike to tell.
    fn slope(&self) -> Option<f64> {
        let tokens = self.0[0];
        let [_, before, square, each, product] = self.0.map(|sum| sum / tokens);
        let variance = square - before * before;
        if variance <= (Self::SPREAD * before).powi(2).max(1.0) {
            return None;
        }
        // No token is cheaper for being late, and the first are not free.
        let more = ((product - each * before) / variance).max(0.0);
        let first = (each - more * before).max(each * Self::LEAST_FIRST);
        Some(more.min((each - first) / before) / first)
    }
}

/// The whole part of a count; huge ones are as good as any above [`STEP_TOKENS`].
fn whole(x: f64) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is clamped")]
    let n = x.clamp(0.0, STEP_TOKENS as f64) as usize;
    n
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Rng;

    fn load(cached: usize, pending: usize) -> Load {
        Load { cached, pending, blocks: blocks_for(cached), shared: 0, is_background: false }
    }

    /// Room for so many tokens, wherever they are.
    fn flat(tokens: usize) -> Budget {
        Budget { tokens, left: tokens as f64, slope: 0.0 }
    }

    /// Who runs, who waits, how many of those start, and who gives its place up.
    type Yielding<'a> = (&'a [Load], &'a [Load], usize, Option<usize>);

    fn writers(running: &[Load]) -> usize {
        running.iter().filter(|load| load.pending == 1).count()
    }

    fn patient(cached: usize, pending: usize) -> Load {
        Load { is_background: true, ..load(cached, pending) }
    }

    #[test]
    fn steps_are_shared_as_said() {
        let table: [(&[Load], usize, usize, &[usize]); 12] = [
            (&[], 100, 0, &[]),
            (&[load(0, 10)], 100, 0, &[10]),
            (&[load(0, 1000)], 100, 0, &[512]),
            // Writers first, one token each.
            (&[load(9, 1), load(0, 1000)], 100, 0, &[1, 511]),
            // Equal shares; the short one's rest goes to the long one.
            (&[load(0, 1000), load(0, 1000)], 100, 0, &[256, 256]),
            (&[load(0, 1000), load(0, 20)], 100, 0, &[492, 20]),
            // Most of it goes to one that is far shorter.
            (&[load(0, 9000), load(0, 900)], 200, 0, &[128, 384]),
            // Blocks bound a prompt.
            (&[load(0, 1000)], 2, 0, &[128]),
            (&[load(60, 1000)], 1, 0, &[68]),
            // A writer at a block's edge needs one more; the newest pays.
            (&[load(64, 1), load(64, 1)], 1, 1, &[1]),
            (&[load(64, 1), load(10, 1)], 0, 1, &[1]),
            (&[load(63, 1), load(10, 1)], 0, 0, &[1, 1]),
        ];
        for (running, available, preempt, tokens) in table {
            let plan = next(flat(512 - writers(running)), running, available);
            assert_eq!((plan.preempt, plan.tokens.as_slice()), (preempt, tokens), "{running:?}");
        }
    }

    /// However many read, and however short the oldest prompt, each of the oldest gets a token as
    /// long as there are tokens, and nobody gives blocks back that do not lack.
    #[test]
    fn many_readers_are_served_oldest_first() {
        let mut rng = Rng::new(7);
        for n in [64, 600] {
            for round in 0..200 {
                let any = |rng: &mut Rng| load(rng.below(300), 1 + rng.below(1000));
                let running: Vec<Load> = (0..n).map(|_| any(&mut rng)).collect();
                let n_writing = writers(&running);
                let for_readers = LEAST_TOKENS + rng.below(STEP_TOKENS - LEAST_TOKENS);
                let plan = next(flat(for_readers), &running, usize::MAX / BLOCK_TOKENS / 2);
                assert_eq!(plan.preempt, 0, "{n} round {round}");
                let read = || running.iter().zip(&plan.tokens).filter(|(load, _)| load.pending > 1);
                let n_served = read().take_while(|&(_, &tokens)| tokens > 0).count();
                assert_eq!(n_served, for_readers.min(n - n_writing), "{n} round {round}");
                let total: usize = read().map(|(_, &tokens)| tokens).sum();
                let wanted: usize = read().map(|(load, _)| load.pending).sum();
                assert_eq!(total, for_readers.min(wanted), "{n} round {round}");
            }
        }
    }

    #[test]
    fn the_oldest_prompt_takes_the_last_blocks() {
        // The younger one is shorter: it waits, and keeps its place.
        let plan = next(flat(512), &[load(0, 1000), load(0, 20)], 1);
        assert_eq!(plan, Plan { preempt: 0, tokens: vec![64, 0] });
        // Tokens that blocks keep from one are read by another.
        let plan = next(flat(512), &[load(0, 1000), load(60, 1000)], 7);
        assert_eq!(plan, Plan { preempt: 0, tokens: vec![256, 196] });
    }

    #[test]
    fn blocks_that_an_older_sequence_holds_too_are_not_regained() {
        let sharing = Load { shared: 3, ..load(200, 1) };
        // Two lack a block each; the newest has but one of its own.
        let running = [load(256, 1), load(256, 1), sharing];
        assert_eq!(next(flat(512), &running, 0), Plan { preempt: 2, tokens: vec![1] });
        let plan = next(flat(512), &[running[0], running[1], load(200, 1)], 0);
        assert_eq!(plan, Plan { preempt: 1, tokens: vec![1, 1] });
    }

    #[test]
    fn sequences_start_when_there_is_room() {
        let table: [(&[Load], &[Load], usize, usize); 7] = [
            (&[], &[], 9, 0),
            (&[], &[load(0, 100)], 9, 1),
            (&[], &[load(0, 100), load(0, 100), load(0, 100), load(0, 100)], 9, 3),
            (&[load(5, 1); 3], &[load(0, 1)], 9, 0),
            // 100 tokens and the first of the answer take two blocks.
            (&[load(5, 1)], &[load(0, 100)], 1, 0),
            // What a running prompt still needs is not given away.
            (&[load(0, 100)], &[load(0, 100)], 3, 0),
            // Alone it starts in any case.
            (&[], &[load(0, 100)], 0, 1),
        ];
        for (running, waiting, available, admitted) in table {
            assert_eq!(admit(3, running, waiting, available), admitted, "{running:?} {waiting:?}");
        }
    }

    #[test]
    fn a_step_that_also_reads_takes_as_long_as_two_that_only_write() {
        let target = |write_ms: u64| {
            let mut pace = Pace::default();
            pace.measure(Step { wrote: true, ..Step::default() }, Duration::from_millis(write_ms));
            pace.target().as_millis()
        };
        // Within bounds.
        assert_eq!([1, 30, 45, 90, 400].map(target), [60, 60, 90, 180, 200]);
    }

    #[test]
    fn steps_are_short_while_somebody_writes() {
        let (reading, writing) = (load(0, 1000), load(9, 1));
        let table: [(&[Load], Option<f64>, usize); 9] = [
            (&[reading], Some(100.0), LEAST_ALONE),
            (&[reading], Some(1000.0), 200),
            (&[reading, reading], None, LEAST_ALONE),
            (&[reading, writing], None, LEAST_TOKENS),
            (&[patient(0, 1000), writing], Some(1000.0), 40),
            (&[patient(0, 1000)], Some(1e9), STEP_TOKENS),
            (&[reading, writing], Some(1000.0), 60),
            (&[reading, writing], Some(1.0), LEAST_TOKENS),
            (&[reading, writing], Some(1e9), STEP_TOKENS),
        ];
        for (running, rate, tokens) in table {
            let pace = rate.map_or(Pace::default(), |rate| read(&[(100, 0, 100.0 / rate)]));
            let plan = next(budget(running, &pace), &[running[0]], 1000);
            assert_eq!(plan.tokens, [tokens], "{running:?} {rate:?}");
        }
    }

    /// What is known after steps that read so many tokens after so many others in so many seconds.
    fn read(steps: &[(usize, usize, f64)]) -> Pace {
        let mut pace = Pace::default();
        for &(read, cached, seconds) in steps {
            let step = Step { read, before: read * cached, wrote: false };
            pace.measure(step, Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX));
        }
        pace
    }

    #[test]
    fn what_depth_costs_is_learned() {
        let near = |pace: &Pace, slope: f64| {
            let found = pace.slope;
            assert!((found - slope).abs() <= 1e-6 * slope, "{found} for {slope}");
        };
        near(&Pace::default(), 0.0);
        // One depth tells nothing of others.
        near(&read(&[(100, 0, 0.5), (50, 0, 0.25)]), 0.0);
        near(&read(&[(100, 1000, 0.5)]), 0.0);
        // A millisecond a token, twice that after a thousand.
        near(&read(&[(100, 0, 0.1), (100, 1000, 0.2)]), 1e-3);
        let deep = |at: usize| (10, 100 * at, 0.01 + 1e-3 * at as f64);
        let mut pace = read(&(50..90).map(deep).collect::<Vec<_>>());
        near(&pace, 1e-3);
        // It is remembered where all are alike.
        for _ in 0..100 {
            let step = Step { read: 10, before: 90_000, wrote: false };
            pace.measure(step, Duration::from_millis(100));
        }
        near(&pace, 1e-3);
        // A deeper token that took less time is noise, and so is a first one that is free.
        near(&read(&[(100, 0, 0.2), (100, 1000, 0.1)]), 0.0);
        let free = read(&[(100, 100, 1e-9), (100, 1000, 0.2)]);
        assert!(free.slope > 0.0 && free.slope < 0.1, "{free:?}");
        // What writing takes is no cost of depth.
        let mut pace = Pace { write_s: Some(0.05), ..Pace::default() };
        for (n, cached) in [(200, 1000), (100, 4000), (50, 9000)] {
            let took = 0.05 + 1e-3 * n as f64 * (1.0 + cached as f64 / 5000.0);
            let step = Step { read: n, before: n * cached, wrote: true };
            pace.measure(step, Duration::from_secs_f64(took));
        }
        near(&pace, 1.0 / 5000.0);
    }

    #[test]
    fn deep_tokens_are_dear() {
        let budget = |left| Budget { tokens: 512, left, slope: 1e-3 };
        let table: [(&[Load], f64, &[usize]); 9] = [
            (&[load(0, 1000)], 100.0, &[100]),
            (&[load(1000, 1000)], 100.0, &[50]),
            // Equal shares of time.
            (&[load(3000, 1000), load(0, 1000)], 80.0, &[10, 40]),
            // The rest of a short one goes to a long one.
            (&[load(3000, 1000), load(0, 20)], 80.0, &[15, 20]),
            // Whoever came first reads at least a token.
            (&[load(9000, 1000), load(0, 20)], 11.0, &[1, 1]),
            (&[load(9000, 1000), load(0, 20)], 10.5, &[1, 0]),
            // However fast they are read, so many go through the layers at once.
            (&[load(9000, 1000)], 1e9, &[512]),
            (&[load(9000, 1000), load(0, 1000)], 1e9, &[256, 256]),
            (&[load(9000, 1000), load(0, 200)], 1e9, &[312, 200]),
        ];
        for (running, left, tokens) in table {
            assert_eq!(next(budget(left), running, 1000).tokens, tokens, "{running:?} {left}");
        }
    }

    #[test]
    fn the_background_has_what_others_leave() {
        let table: [(&[Load], usize, &[usize]); 5] = [
            (&[load(0, 1000), patient(0, 1000)], 100, &[100, 0]),
            (&[load(0, 30), patient(0, 1000)], 100, &[30, 70]),
            (&[patient(0, 1000), patient(0, 1000)], 100, &[50, 50]),
            // It writes like any other: a row costs little.
            (&[load(0, 1000), patient(9, 1)], 99, &[99, 1]),
            (&[load(0, 30), load(0, 30), patient(0, 9)], 50, &[25, 25, 0]),
        ];
        for (running, budget, tokens) in table {
            assert_eq!(next(flat(budget), running, 1000).tokens, tokens, "{running:?}");
        }
    }

    #[test]
    fn the_background_gives_its_place_up() {
        let (urgent, later) = (load(9, 1), patient(9, 1));
        let table: [Yielding<'_>; 6] = [
            (&[urgent, later, later], &[urgent], 0, Some(2)),
            (&[urgent, later], &[urgent, urgent], 1, Some(1)),
            // Nobody urgent waits, or all of them start.
            (&[later, later], &[later], 0, None),
            (&[later, later], &[urgent], 1, None),
            (&[later], &[], 0, None),
            // Nobody is in the background.
            (&[urgent, urgent], &[urgent], 0, None),
        ];
        for (running, waiting, admitted, expected) in table {
            assert_eq!(yields(running, waiting, admitted), expected, "{running:?} {waiting:?}");
        }
    }

    /// Seconds of a step on a machine that reads `rate` tokens a second, slower the more is before
    /// them.
    fn seconds(rate: f64, loads: &[Load], tokens: &[usize]) -> f64 {
        let one = |(load, &n): (&Load, &usize)| {
            let depth = (load.cached + n) as f64;
            n as f64 / rate * (1.0 + depth / 10_000.0)
        };
        0.01 + loads.iter().zip(tokens).map(one).sum::<f64>()
    }

    /// What is promised while a prompt of 30,000 tokens is read: between two tokens of a running
    /// answer lie never more than two chunks of the target's length, on slow machines and fast
    /// ones; and the prompt is read without a break.
    #[test]
    fn a_long_prompt_does_not_stall_an_answer() {
        for rate in [400.0, 2000.0, 20_000.0] {
            let mut pace = Pace::default();
            let mut running = [load(500, 1), load(0, 30_000)];
            let (mut worst, mut total) = (0.0_f64, 0.0);
            while running[1].pending > 1 {
                let plan = next(budget(&running, &pace), &running, 10_000);
                assert_eq!((plan.preempt, plan.tokens[0]), (0, 1), "the answer goes on each step");
                assert!(plan.tokens[1] > 0, "so does the prompt");
                let took = seconds(rate, &running, &plan.tokens);
                pace.measure(Step::of(&plan, &running), Duration::from_secs_f64(took));
                (worst, total) = (worst.max(took), total + took);
                running[0].cached += 1;
                running[1].cached += plan.tokens[1];
                running[1].pending -= plan.tokens[1];
                for load in &mut running {
                    load.blocks = blocks_for(load.cached);
                }
            }
            // On the slowest machine the least chunk is longer than the target.
            let least = LEAST_TOKENS as f64 / rate * 4.5;
            let chunk = STEP_TARGET[0].as_secs_f64().max(least);
            assert!(worst <= 2.0 * chunk, "{rate}: {worst}");
            let alone: f64 = 30_000.0 / rate * 2.5;
            assert!(total < 2.0 * alone, "{rate}: {total} of {alone}");
        }
    }

    /// A short prompt that comes while a long one is read has been read two chunks later, wherever
    /// the long one is: its tokens are cheap, and this is known.
    #[test]
    fn a_short_prompt_does_not_wait_for_a_long_one() {
        for (rate, comes) in [400.0, 2000.0, 20_000.0]
            .into_iter()
            .flat_map(|rate| [1000, 8000, 20_000].map(|comes| (rate, comes)))
        {
            let mut pace = Pace::default();
            let mut running = vec![load(0, 30_000)];
            let mut waited = 0.0;
            while running.iter().all(|load| load.pending > 0) {
                let plan = next(budget(&running, &pace), &running, 10_000);
                let took = seconds(rate, &running, &plan.tokens);
                pace.measure(Step::of(&plan, &running), Duration::from_secs_f64(took));
                for (load, &n) in running.iter_mut().zip(&plan.tokens) {
                    load.cached += n;
                    load.pending -= n;
                    load.blocks = blocks_for(load.cached);
                }
                // It came when the step that ends it had just begun, and did not know of it.
                if running[0].cached >= comes {
                    waited += took;
                    running.resize(2, load(0, 40));
                }
            }
            assert_eq!(running[1].pending, 0, "{rate} {comes}");
            let chunk = ALONE_TARGET.as_secs_f64().max(LEAST_ALONE as f64 / rate * 1.1);
            assert!(waited <= 2.1 * chunk, "{rate} {comes}: {waited}");
        }
    }

    /// A sequence of the simulation below.
    #[derive(Debug, Clone, Copy)]
    struct Job {
        load: Load,
        /// Tokens it will write after the known ones.
        to_write: usize,
        arrived: usize,
    }

    /// Any mix of jobs ends, in bounded time, within the budget, and gives all blocks back.
    #[test]
    fn nobody_starves_and_no_block_leaks() {
        let mut rng = Rng::new(5);
        for round in 0..300 {
            let dear = rng.below(2) as f64 * 0.2;
            let pace = read(&[(100, 0, 0.2), (100, 100, 0.2 + dear)]);
            let n_blocks = 4 + rng.below(20);
            let slots = 1 + rng.below(5);
            let context = n_blocks * BLOCK_TOKENS;
            let mut jobs: Vec<Job> = (0..=rng.below(12))
                .map(|_| {
                    let prompt = 1 + rng.below(context - 1);
                    let to_write = rng.below(context - prompt + 1);
                    Job { load: load(0, prompt), to_write, arrived: rng.below(50) }
                })
                .collect();
            jobs.sort_by_key(|job| job.arrived);
            let (mut running, mut waiting) = (Vec::<Job>::new(), Vec::<Job>::new());
            let mut free = n_blocks;
            let mut now = 0;
            // Each preemption is paid for by an older sequence that goes on; 100,000 is far beyond.
            while !(jobs.is_empty() && running.is_empty() && waiting.is_empty()) {
                now += 1;
                assert!(now < 100_000, "round {round} does not end");
                let n_new = jobs.iter().take_while(|job| job.arrived <= now).count();
                waiting.extend(jobs.drain(..n_new));
                let loads = |jobs: &[Job]| jobs.iter().map(|job| job.load).collect::<Vec<_>>();
                let n = admit(slots, &loads(&running), &loads(&waiting), free);
                running.extend(waiting.drain(..n));
                assert!(running.len() <= slots);
                let budget = budget(&loads(&running), &pace);
                let plan = next(budget, &loads(&running), free);
                for _ in 0..plan.preempt {
                    let mut job = running.pop().expect("it was counted");
                    free += job.load.blocks;
                    let pending = job.load.cached + job.load.pending;
                    job.load = load(0, pending);
                    waiting.insert(0, job);
                }
                assert_eq!(plan.tokens.len(), running.len());
                let read = Step::of(&plan, &loads(&running)).read;
                assert!(read <= STEP_TOKENS && read as f64 <= budget.left, "{read} {budget:?}");
                assert!(running.is_empty() || plan.tokens[0] > 0, "the oldest goes on");
                for (job, &n) in running.iter_mut().zip(&plan.tokens) {
                    let taken = job.load.lacks(n);
                    free = free.checked_sub(taken).expect("no block is taken twice");
                    job.load.blocks += taken;
                    job.load.cached += n;
                    job.load.pending -= n;
                    if job.load.pending == 0 && job.to_write > 0 {
                        job.to_write -= 1;
                        job.load.pending = 1;
                    }
                }
                running.retain(|job| {
                    let is_done = job.load.pending == 0;
                    free += if is_done { job.load.blocks } else { 0 };
                    !is_done
                });
            }
            assert_eq!(free, n_blocks, "round {round}");
        }
    }

    /// However many come that are urgent, one in the background is answered: its turn comes, and
    /// then nobody who came later is before it. Those who are urgent hardly notice it until then.
    #[test]
    fn the_background_never_starves() {
        const STEP_MS: u64 = 50;
        let ageing = u64::try_from(AGEING.as_millis()).expect("small");
        let mut rng = Rng::new(11);
        // When it came, when its turn is, how many tokens are left, whether it is the one.
        let mut all: Vec<(u64, u64, usize, bool)> = vec![(0, ageing, 40, true)];
        let (mut now, mut ended, mut waits) = (0, None, Vec::new());
        let mut running: Vec<(u64, u64, usize, bool)> = Vec::new();
        while ended.is_none() {
            now += STEP_MS;
            assert!(now < 10 * ageing, "it starves");
            // Twice as many as there is time for.
            if rng.below(10) < 4 {
                all.push((now, now, 10, false));
            }
            all.sort_by_key(|job| job.1);
            let as_load = |job: &(u64, u64, usize, bool)| Load {
                is_background: job.3 && now < job.1,
                ..load(10, 1)
            };
            loop {
                let loads: Vec<Load> = running.iter().map(as_load).collect();
                let waiting: Vec<Load> = all.iter().map(as_load).collect();
                let n = admit(2, &loads, &waiting, 1000);
                if let Some(index) = yields(&loads, &waiting, n) {
                    let job = running.remove(index);
                    let at = all.partition_point(|other| other.1 <= job.1);
                    all.insert(at, job);
                    continue;
                }
                waits.extend(all.iter().take(n).filter(|job| !job.3).map(|job| now - job.0));
                running.extend(all.drain(..n));
                running.sort_by_key(|job| job.1);
                break;
            }
            for job in &mut running {
                job.2 -= 1;
            }
            if running.iter().any(|job| job.3 && job.2 == 0) {
                ended = Some(now);
            }
            running.retain(|job| job.2 > 0);
        }
        // Behind it in the queue are only those who came after its turn.
        let ended = ended.expect("it ended");
        assert!(ended > ageing && ended < 3 * ageing, "{ended}");
        assert!(waits.len() > 100);
    }
}
