//! Speculation without a draft model: text repeats itself, so what followed the last few tokens
//! before is a guess at what follows now. Several guesses are checked in one step; those that the
//! model chooses too are steps saved, and the text is the same in any case, since every token is
//! still drawn by the sampler from the model's own logits, in order.
//!
//! Whether it pays is measured: how often guesses were right, which costs nothing to know since
//! each chosen token tells it of the guess that was or would have been made, and what a further row
//! costs a step. All of it is arithmetic on counts and times, without a clock.

use std::collections::HashMap;

/// The longest run of tokens that is looked up, and the shortest: longer ones are right more often,
/// shorter ones are found more often.
const LONGEST: usize = 4;
const SHORTEST: usize = 2;
/// Kinds of matches, by their length.
const KINDS: usize = LONGEST - SHORTEST + 1;

/// Rows of a step within which each costs the same, be they of one sequence or several: so many
/// tokens are multiplied in one pass over the weights.
pub const ROWS: usize = 8;

/// The guesses for one sequence.
#[derive(Debug)]
pub struct Lookup {
    /// Where each run of tokens was seen last: the index of the token after it. A run's own
    /// length is part of it.
    after: HashMap<Run, u32>,
    /// Tokens that are in `after`.
    n_known: usize,
    /// What was guessed for the next token, and by which kind of match.
    guess: Option<(u32, usize)>,
    /// How often guesses of each kind were right, lately.
    hits: [f64; KINDS],
}

/// A run of tokens, filled up with ids that no token has.
type Run = [u32; LONGEST];

/// What speculation may cost until it is known.
const FIRST_HITS: f64 = 0.5;
/// How much a guess moves the share of right ones.
const LEARN: f64 = 0.1;

impl Default for Lookup {
    fn default() -> Self {
        Self { after: HashMap::new(), n_known: 0, guess: None, hits: [FIRST_HITS; KINDS] }
    }
}

/// Tokens that may follow, and the share of first ones that were right lately.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Draft {
    /// In order.
    pub tokens: Vec<u32>,
    /// Between 0 and 1.
    pub hits: f64,
}

impl Lookup {
    /// Guesses up to `most` tokens after `tokens`, which only grow from call to call. Learns from
    /// the token that came since the last call.
    pub fn guess(&mut self, tokens: &[u32], most: usize) -> Option<Draft> {
        self.learn(tokens);
        let found = (SHORTEST..=LONGEST).rev().find_map(|n| {
            let run = run(tokens.get(tokens.len().checked_sub(n)?..)?);
            self.after.get(&run).map(|&next| (next as usize, n - SHORTEST))
        });
        let (next, kind) = found?;
        self.guess = Some((tokens[next], kind));
        let drafted = &tokens[next..tokens.len().min(next + most)];
        Some(Draft { tokens: drafted.to_vec(), hits: self.hits[kind] })
    }

    /// Takes in the tokens that are new, and judges the last guess by the first of them.
    fn learn(&mut self, tokens: &[u32]) {
        if let Some((guess, kind)) = self.guess.take()
            && let Some(&chosen) = tokens.get(self.n_known)
        {
            let hit = if guess == chosen { 1.0 } else { 0.0 };
            self.hits[kind] += LEARN * (hit - self.hits[kind]);
        }
        for at in self.n_known..tokens.len() {
            for n in (SHORTEST..=LONGEST).filter(|&n| n <= at) {
                let index = u32::try_from(at).expect("a sequence has far fewer than 2^32 tokens");
                self.after.insert(run(&tokens[at - n..at]), index);
            }
        }
        self.n_known = tokens.len();
    }

    /// Judges guesses that a step has checked, beyond the first, which [`Lookup::guess`] judges.
    pub fn checked(&mut self, n_drafted: usize, n_accepted: usize) {
        let Some((_, kind)) = self.guess else { return };
        for n in 1..n_drafted.min(n_accepted + 1) {
            let hit = if n < n_accepted { 1.0 } else { 0.0 };
            self.hits[kind] += LEARN * (hit - self.hits[kind]);
        }
    }
}

fn run(tokens: &[u32]) -> Run {
    let mut run = [u32::MAX; LONGEST];
    run[..tokens.len()].copy_from_slice(tokens);
    run
}

/// How the time of a step grows with its rows: a line through what was measured lately.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    /// Sums of weights, rows, rows squared, seconds, rows times seconds.
    n: f64,
    x: f64,
    xx: f64,
    y: f64,
    xy: f64,
}

/// How much of what was measured is left after a further step.
const KEEP: f64 = 0.95;
/// What a further row costs, as a share of the first, until both were measured.
const FIRST_SLOPE: f64 = 0.3;

impl Cost {
    /// Notes a step of `rows` rows, none of which read a prompt.
    pub fn measure(&mut self, rows: usize, seconds: f64) {
        let rows = rows as f64;
        for sum in [&mut self.n, &mut self.x, &mut self.xx, &mut self.y, &mut self.xy] {
            *sum *= KEEP;
        }
        self.n += 1.0;
        self.x += rows;
        self.xx += rows * rows;
        self.y += seconds;
        self.xy += rows * seconds;
    }

    /// Seconds of a step of `rows` rows, and of a further row. `None` before anything was measured.
    pub fn of(&self, rows: usize) -> Option<(f64, f64)> {
        if self.n <= 0.0 {
            return None;
        }
        let (x, y) = (self.x / self.n, self.y / self.n);
        let spread = self.xx / self.n - x * x;
        let slope = if spread > 0.05 {
            (self.xy / self.n - x * y) / spread
        } else {
            // All steps were alike.
            y * FIRST_SLOPE / (1.0 + FIRST_SLOPE * (x - 1.0).max(0.0))
        };
        let slope = slope.clamp(0.0, y / x.max(1.0));
        let step = (y + slope * (rows as f64 - x)).max(slope);
        (step > 0.0).then_some((step, slope))
    }
}

/// How many tokens of each draft are checked, `n_writing` sequences writing at a time: a further
/// row is worth its cost if it makes tokens come faster in all. The likeliest goes first.
pub fn allot(n_writing: usize, drafts: &[Draft], cost: &Cost) -> Vec<usize> {
    let mut allotted = vec![0; drafts.len()];
    let Some((mut seconds, slope)) = cost.of(n_writing) else { return allotted };
    let mut tokens = n_writing as f64;
    for _ in n_writing..ROWS {
        // The next of a draft counts only if all before it are right.
        let next = |(index, draft): (usize, &Draft)| {
            let depth = allotted[index] + 1;
            let exponent = i32::try_from(depth).unwrap_or(i32::MAX);
            (depth <= draft.tokens.len()).then(|| (index, draft.hits.powi(exponent)))
        };
        let best = drafts.iter().enumerate().filter_map(next).max_by(|a, b| a.1.total_cmp(&b.1));
        let Some((index, chance)) = best else { break };
        if (tokens + chance) / (seconds + slope) <= tokens / seconds {
            break;
        }
        (tokens, seconds) = (tokens + chance, seconds + slope);
        allotted[index] += 1;
    }
    allotted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Rng;

    /// Sequences that write, their drafts, what rows cost, and how many of each are checked.
    type Row<'a> = (usize, &'a [Draft], Cost, &'a [usize]);

    fn draft(n: u32, hits: f64) -> Draft {
        Draft { tokens: (0..n).collect(), hits }
    }

    /// A step of `rows` takes `first + (rows - 1) * more`.
    fn cost(first: f64, more: f64) -> Cost {
        let mut cost = Cost::default();
        for rows in [1, 3, 2, 5, 1, 8, 4] {
            cost.measure(rows, first + (rows as f64 - 1.0) * more);
        }
        cost
    }

    #[test]
    fn what_followed_before_is_guessed() {
        let mut lookup = Lookup::default();
        assert_eq!(lookup.guess(&[], 4), None);
        assert_eq!(lookup.guess(&[1, 2, 3, 4, 5, 6], 4), None, "nothing was seen twice");
        let tokens = [1, 2, 3, 4, 5, 6, 2, 3];
        assert_eq!(lookup.guess(&tokens, 3).map(|draft| draft.tokens), Some(vec![4, 5, 6]));
        // The longest run decides: 9 2 3 was followed by 7.
        let tokens = [1, 2, 3, 4, 5, 6, 2, 3, 9, 2, 3, 7, 2, 3, 8, 9, 2, 3];
        assert_eq!(lookup.guess(&tokens, 2).map(|draft| draft.tokens), Some(vec![7, 2]));
        // Of equal ones the last; and never more than there is.
        let tokens = [&tokens[..], &[5, 2, 3]].concat();
        assert_eq!(lookup.guess(&tokens, 9).map(|draft| draft.tokens), Some(vec![5, 2, 3]));
    }

    #[test]
    fn guesses_are_judged_whether_they_are_checked_or_not() {
        let mut lookup = Lookup::default();
        let mut tokens: Vec<u32> = (0..40).flat_map(|_| [1, 2, 3, 4, 5]).collect();
        for n in 10..tokens.len() {
            lookup.guess(&tokens[..n], 0);
        }
        let sure = lookup.guess(&tokens, 1).expect("it repeats");
        assert!(sure.hits > 0.95, "{sure:?}");
        // From here on the same runs go on otherwise each time.
        for n in 0..60 {
            tokens.extend([1, 2, 3, 100 + n]);
            lookup.guess(&tokens[..tokens.len() - 1], 0);
            lookup.guess(&tokens, 0);
        }
        tokens.extend([1, 2, 3]);
        let unsure = lookup.guess(&tokens, 1).expect("it was seen");
        assert!(unsure.hits < 0.2, "{unsure:?}");
    }

    #[test]
    fn rows_that_do_not_pay_are_not_drafted() {
        let sure = [draft(9, 0.95)];
        let table: [Row<'_>; 8] = [
            // Nearly free rows: all there may be.
            (1, &sure, cost(1.0, 0.01), &[ROWS - 1]),
            // Rows as dear as a step: none, however sure.
            (1, &sure, cost(1.0, 1.0), &[0]),
            // Half as dear: a sure one pays for a while, an unsure one does not.
            (1, &sure, cost(1.0, 0.5), &[5]),
            (1, &[draft(9, 0.4)], cost(1.0, 0.5), &[0]),
            (1, &[draft(9, 0.7)], cost(1.0, 0.5), &[1]),
            // The likeliest first; a short draft ends; no draft, no row.
            (3, &[draft(2, 0.9), Draft::default(), draft(9, 0.3)], cost(1.0, 0.01), &[2, 0, 2]),
            // A full batch has no room.
            (ROWS, &[draft(9, 1.0)], cost(1.0, 0.01), &[0]),
            // Nothing is known yet.
            (1, &sure, Cost::default(), &[0]),
        ];
        for (n_writing, drafts, cost, expected) in table {
            assert_eq!(allot(n_writing, drafts, &cost), expected, "{n_writing} {drafts:?}");
        }
    }

    #[test]
    fn the_cost_is_a_line_through_what_was_measured() {
        assert!(Cost::default().of(1).is_none());
        let known = cost(2.0, 0.25);
        let (step, slope) = known.of(1).expect("measured");
        assert!((step - 2.0).abs() < 1e-6 && (slope - 0.25).abs() < 1e-6, "{step} {slope}");
        let (step, _) = known.of(5).expect("measured");
        assert!((step - 3.0).abs() < 1e-6);
        // Before two kinds of steps were seen a row is taken to be cheap, so that one is tried.
        let mut alike = Cost::default();
        (0..50).for_each(|_| alike.measure(1, 2.0));
        let (step, slope) = alike.of(1).expect("measured");
        assert!((step - 2.0).abs() < 1e-6 && (slope - 0.6).abs() < 1e-6, "{step} {slope}");
        // Times that fall with the rows, as noise may have them, cost nothing more.
        let mut noise = Cost::default();
        noise.measure(1, 2.0);
        noise.measure(4, 1.0);
        assert!(noise.of(1).expect("measured").1.abs() < 1e-9);
    }

    /// A model whose text repeats as often as `hits` says, and steps of that cost: tokens a second
    /// with speculation and without.
    fn simulate(hits: f64, more: f64, seed: u64) -> (f64, f64) {
        let mut rng = Rng::new(seed);
        let (mut lookup, mut known) = (Lookup::default(), Cost::default());
        let phrase: Vec<u32> = (0..50).collect();
        let mut tokens: Vec<u32> = phrase.iter().chain(&phrase).copied().collect();
        let mut fresh = 1000;
        let mut next = |tokens: &[u32]| {
            fresh += 1;
            let last = tokens[tokens.len() - 1];
            if rng.unit() < hits { (last + 1) % 50 } else { fresh % 50 }
        };
        let (mut seconds, began) = (0.0, tokens.len());
        while tokens.len() < 3000 {
            let draft = lookup.guess(&tokens, 7).unwrap_or_default();
            let n = allot(1, std::slice::from_ref(&draft), &known)[0];
            let drafted = draft.tokens;
            let took = 1.0 + n as f64 * more;
            known.measure(1 + n, took);
            seconds += took;
            let mut accepted = 0;
            loop {
                let token = next(&tokens);
                tokens.push(token);
                if accepted < n && drafted[accepted] == token {
                    accepted += 1;
                } else {
                    break;
                }
            }
            lookup.checked(n, accepted);
        }
        let written = (tokens.len() - began) as f64;
        (written / seconds, 1.0)
    }

    #[test]
    fn it_pays_or_it_is_off() {
        // Text that repeats, cheap rows: much faster.
        let (with, without) = simulate(0.98, 0.1, 1);
        assert!(with > 2.0 * without, "{with}");
        // Whatever the text and the cost, never much slower.
        for (hits, more) in [(0.0, 0.9), (0.3, 0.7), (0.5, 0.5), (0.98, 1.2), (0.9, 0.8)] {
            let (with, without) = simulate(hits, more, 2);
            assert!(with > 0.97 * without, "{hits} {more}: {with}");
        }
    }
}
