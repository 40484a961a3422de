//! Logits to a token.
//!
//! The order is llama.cpp's and so Ollama's: penalties, top-k, typical-p, top-p, min-p,
//! temperature, then a draw. Temperature 0 takes the likeliest after the penalties.

use std::cmp::Ordering;
use std::collections::HashMap;

use v4_proto::SamplingParams;

/// `SplitMix64` (Steele, Lea, Flood 2014): 64 bits of state, equal on every machine.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`, of 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform in `0..n`; 0 where `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        let wide = u128::from(self.next_u64()) * (n as u128);
        // The upper half is below `n`.
        usize::try_from(wide >> 64).unwrap_or_default()
    }
}

/// A token that may still be chosen.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    /// Its probability among the candidates left, once it is known.
    p: f32,
}

/// What chooses the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: Rng,
    /// How often each token was seen in the window of the penalties.
    seen: HashMap<u32, u32>,
    /// Room for [`Sampler::sample`].
    candidates: Vec<Candidate>,
    /// The highest logit of each stretch of the vocabulary.
    maxima: Vec<f32>,
}

impl Sampler {
    /// A sampler for `params`; `seed` counts where they have none.
    pub fn new(params: SamplingParams, seed: u64) -> Self {
        let rng = Rng::new(params.seed.unwrap_or(seed));
        Self { params, rng, seen: HashMap::new(), candidates: Vec::new(), maxima: Vec::new() }
    }

    /// The next token. `logits` has one a token of the vocabulary, `history` the tokens so far,
    /// prompt and answer. Values that are not numbers count as impossible; where nothing is left,
    /// the first token is taken.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> u32 {
        self.penalise(logits, history);
        if self.params.temperature <= 0.0 || self.params.top_k == 1 {
            return likeliest(logits);
        }
        self.collect(logits);
        self.keep_typical();
        self.keep_top_p();
        self.keep_min_p();
        self.draw()
    }

    /// Lowers the logits of tokens seen lately.
    fn penalise(&mut self, logits: &mut [f32], history: &[u32]) {
        let SamplingParams { repeat_penalty, presence_penalty, frequency_penalty, .. } =
            self.params;
        let is_off = (repeat_penalty - 1.0).abs() < f32::EPSILON
            && presence_penalty.abs() < f32::EPSILON
            && frequency_penalty.abs() < f32::EPSILON;
        let window = match self.params.repeat_last_n {
            n if n < 0 => history.len(),
            n => usize::try_from(n).expect("not negative").min(history.len()),
        };
        if is_off || window == 0 {
            return;
        }
        self.seen.clear();
        for &id in &history[history.len() - window..] {
            *self.seen.entry(id).or_insert(0) += 1;
        }
        for (&id, &count) in &self.seen {
            let Some(logit) = logits.get_mut(id as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repeat_penalty } else { *logit * repeat_penalty };
            *logit -= presence_penalty + frequency_penalty * count as f32;
        }
    }

    /// Fills `candidates` with the `top_k` likeliest tokens, best first, or with all that could
    /// have any weight, by id.
    fn collect(&mut self, logits: &[f32]) {
        let k = match self.params.top_k as usize {
            0 => logits.len(),
            k => k.min(logits.len()),
        };
        // One pass over the vocabulary finds the highest of each stretch; most stretches have
        // nothing above the floor and are not looked at again.
        self.maxima.clear();
        self.maxima.extend(logits.chunks(STRETCH).map(highest));
        let top =
            self.maxima.iter().copied().filter(|max| max.is_finite()).fold(f32::MIN, f32::max);
        let mut floor = top - NEVER_DRAWN * self.params.temperature.max(1.0);
        if k < self.maxima.len() {
            // `k` stretches have a token at least this high, so the `k` likeliest are too.
            let mut maxima = self.maxima.clone();
            let (_, kth, _) = maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
            floor = floor.max(*kth);
        }
        self.candidates.clear();
        for (index, (stretch, max)) in logits.chunks(STRETCH).zip(&self.maxima).enumerate() {
            if *max >= floor {
                let first = u32::try_from(index * STRETCH).expect("ids have 32 bits");
                let ids = (first..).zip(stretch);
                let likely = ids.filter(|&(_, &logit)| logit.is_finite() && logit >= floor);
                self.candidates.extend(likely.map(|(id, &logit)| Candidate { id, logit, p: 0.0 }));
            }
        }
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, best_first);
            self.candidates.truncate(k);
        }
        if self.params.top_k > 0 {
            self.candidates.sort_unstable_by(best_first);
        }
        self.weigh(1.0);
    }

    /// Gives each candidate its probability at a temperature.
    fn weigh(&mut self, temperature: f32) {
        let Some(first) = self.candidates.first() else { return };
        let highest = self.candidates.iter().map(|c| c.logit).fold(first.logit, f32::max);
        let mut sum = 0.0;
        for candidate in &mut self.candidates {
            candidate.p = ((candidate.logit - highest) / temperature).exp();
            sum += candidate.p;
        }
        for candidate in &mut self.candidates {
            candidate.p /= sum;
        }
    }

    /// Locally typical sampling (Meister et al. 2022, arXiv 2202.00666): the tokens whose surprise
    /// is nearest to the entropy, until their probability reaches `typical_p`.
    fn keep_typical(&mut self) {
        let target = self.params.typical_p;
        if !(0.0..1.0).contains(&target) {
            return;
        }
        let surprise = |c: &Candidate| -c.p.max(f32::MIN_POSITIVE).ln();
        let entropy: f32 = self.candidates.iter().map(|c| c.p * surprise(c)).sum();
        let distance = |c: &Candidate| (surprise(c) - entropy).abs();
        self.candidates.sort_by(|a, b| distance(a).total_cmp(&distance(b)).then(best_first(a, b)));
        if let Some(n) = reaches(&self.candidates, target) {
            self.candidates.truncate(n);
        }
        self.candidates.sort_unstable_by(best_first);
        self.weigh(1.0);
    }

    /// Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751). The nucleus is mostly small: the
    /// best few are sorted, and more only where they do not suffice.
    fn keep_top_p(&mut self) {
        let target = self.params.top_p;
        if !(0.0..1.0).contains(&target) {
            return;
        }
        let mut n_sorted = 256;
        loop {
            if n_sorted < self.candidates.len() {
                self.candidates.select_nth_unstable_by(n_sorted - 1, best_first);
            }
            let n = n_sorted.min(self.candidates.len());
            self.candidates[..n].sort_unstable_by(best_first);
            if let Some(n) = reaches(&self.candidates[..n], target) {
                self.candidates.truncate(n);
                break;
            }
            if n == self.candidates.len() {
                break;
            }
            n_sorted *= 8;
        }
        self.weigh(1.0);
    }

    fn keep_min_p(&mut self) {
        if self.params.min_p > 0.0 {
            let best = self.candidates.iter().map(|c| c.p).fold(0.0, f32::max);
            let least = best * self.params.min_p.min(1.0);
            self.candidates.retain(|c| c.p >= least);
        }
    }

    /// Draws one of the candidates at the temperature.
    fn draw(&mut self) -> u32 {
        self.weigh(self.params.temperature);
        let mut left = self.rng.unit();
        for candidate in &self.candidates {
            left -= f64::from(candidate.p);
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Rounding can leave a hair's breadth above the last.
        self.candidates.first().map_or(0, |c| c.id)
    }
}

/// A token this far below the likeliest, in units of the temperature, has a weight below 1e-26: no
/// draw of 53 bits meets it.
const NEVER_DRAWN: f32 = 60.0;

/// Higher logits first, of equal ones the lower id.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// How many of the first candidates have a probability of `target` together.
fn reaches(candidates: &[Candidate], target: f32) -> Option<usize> {
    let mut sum = 0.0;
    let last = candidates.iter().position(|c| {
        sum += c.p;
        sum >= target
    });
    last.map(|last| last + 1)
}

/// Logits that are looked at together.
const STRETCH: usize = 128;

/// The highest of some logits; not-a-numbers are passed over. By lanes, so that the compiler makes
/// vectors of it.
fn highest(logits: &[f32]) -> f32 {
    const LANES: usize = 16;
    let higher = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = logits.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = higher(*lane, logit);
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &logit| higher(max, logit))
}

/// The first of the highest logits.
fn likeliest(logits: &[f32]) -> u32 {
    let max = highest(logits);
    let equal = |&(_, &logit): &(u32, &f32)| logit >= max;
    (0_u32..).zip(logits).find(equal).map_or(0, |(id, _)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            seed: Some(1),
            ..SamplingParams::default()
        }
    }

    /// Which tokens `n` draws give, and how often.
    fn counts(params: &SamplingParams, logits: &[f32], history: &[u32], n: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(params.clone(), 0);
        let mut counts = vec![0; logits.len()];
        for _ in 0..n {
            counts[sampler.sample(&mut logits.to_vec(), history) as usize] += 1;
        }
        counts
    }

    fn drawn(params: &SamplingParams, logits: &[f32], history: &[u32]) -> Vec<usize> {
        let counts = counts(params, logits, history, 2000);
        (0..logits.len()).filter(|&id| counts[id] > 0).collect()
    }

    #[test]
    fn each_filter_keeps_what_it_says() {
        // Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625.
        let logits = [0.5_f32, 0.25, 0.125, 0.0625, 0.0625].map(f32::ln);
        let base = params();
        let table: [(SamplingParams, &[usize]); 13] = [
            (base.clone(), &[0, 1, 2, 3, 4]),
            (SamplingParams { temperature: 0.0, ..base.clone() }, &[0]),
            (SamplingParams { top_k: 1, ..base.clone() }, &[0]),
            (SamplingParams { top_k: 2, ..base.clone() }, &[0, 1]),
            (SamplingParams { top_k: 99, ..base.clone() }, &[0, 1, 2, 3, 4]),
            (SamplingParams { top_p: 0.0, ..base.clone() }, &[0]),
            (SamplingParams { top_p: 0.7, ..base.clone() }, &[0, 1]),
            (SamplingParams { top_p: 0.8, ..base.clone() }, &[0, 1, 2]),
            (SamplingParams { min_p: 0.3, ..base.clone() }, &[0, 1]),
            (SamplingParams { min_p: 2.0, ..base.clone() }, &[0]),
            // The entropy is 1.30: the surprise of the second (1.39) is nearest, then the first
            // (0.69), then the third (2.08).
            (SamplingParams { typical_p: 0.2, ..base.clone() }, &[1]),
            (SamplingParams { typical_p: 0.7, ..base.clone() }, &[0, 1]),
            (SamplingParams { temperature: 1e-9, ..base.clone() }, &[0]),
        ];
        for (params, expected) in table {
            assert_eq!(drawn(&params, &logits, &[]), expected, "{params:?}");
        }
    }

    #[test]
    fn penalties_lower_what_was_seen() {
        let logits = [2.0, 1.9, -1.0];
        let greedy = SamplingParams::greedy();
        let table: [(SamplingParams, &[u32], usize); 8] = [
            (greedy.clone(), &[0], 0),
            (SamplingParams { repeat_penalty: 1.2, ..greedy.clone() }, &[0], 1),
            (SamplingParams { repeat_penalty: 1.2, ..greedy.clone() }, &[0, 1], 0),
            (SamplingParams { presence_penalty: 0.2, ..greedy.clone() }, &[0], 1),
            (SamplingParams { frequency_penalty: 0.06, ..greedy.clone() }, &[0], 0),
            (SamplingParams { frequency_penalty: 0.06, ..greedy.clone() }, &[0, 0], 1),
            // Only the last token counts, and none.
            (
                SamplingParams { presence_penalty: 0.2, repeat_last_n: 1, ..greedy.clone() },
                &[0, 2],
                0,
            ),
            (SamplingParams { presence_penalty: 9.0, repeat_last_n: 0, ..greedy.clone() }, &[0], 0),
        ];
        for (params, history, expected) in table {
            let mut sampler = Sampler::new(params.clone(), 0);
            let id = sampler.sample(&mut logits.to_vec(), history);
            assert_eq!(id as usize, expected, "{params:?} {history:?}");
        }
        // Impossible ids in a history are passed over.
        let params = SamplingParams { repeat_penalty: 1.2, repeat_last_n: -1, ..greedy };
        assert_eq!(Sampler::new(params, 0).sample(&mut logits.to_vec(), &[u32::MAX, 0]), 1);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let p = [0.5_f64, 0.3, 0.15, 0.05];
        let logits = [0.5_f32, 0.3, 0.15, 0.05].map(f32::ln);
        let n = 20_000;
        for (temperature, power) in [(1.0, 1.0), (2.0, 0.5), (0.5, 2.0)] {
            let counts = counts(&SamplingParams { temperature, ..params() }, &logits, &[], n);
            let weights = p.map(|p| p.powf(power));
            let sum: f64 = weights.iter().sum();
            let chi_square: f64 = weights
                .iter()
                .zip(&counts)
                .map(|(w, &count)| {
                    let expected = n as f64 * w / sum;
                    (count as f64 - expected).powi(2) / expected
                })
                .sum();
            // 3 degrees of freedom: 16.3 is met once in a thousand.
            assert!(chi_square < 16.3, "{counts:?} at {temperature}: {chi_square}");
        }
    }

    #[test]
    fn equal_seeds_give_equal_tokens() {
        let mut rng = Rng::new(3);
        let logits: Vec<f32> = (0..500).map(|_| rng.below(800) as f32 / 100.0).collect();
        let draw = |seed| {
            let mut sampler = Sampler::new(SamplingParams { seed, ..params() }, 11);
            (0..20).map(|_| sampler.sample(&mut logits.clone(), &[])).collect::<Vec<_>>()
        };
        assert_eq!(draw(Some(5)), draw(Some(5)));
        assert_ne!(draw(Some(5)), draw(Some(6)));
        assert_eq!(draw(None), draw(Some(11)), "the drawn seed counts where none is given");
    }

    #[test]
    fn top_k_of_a_large_vocabulary_is_that_of_a_full_sort() {
        let mut rng = Rng::new(9);
        for n in [1, 7, 100, 5000] {
            // Coarse values, so that there are ties.
            let logits: Vec<f32> = (0..n).map(|_| (rng.below(200) as f32) / 10.0).collect();
            for k in [1, 2, 40, 400] {
                let mut sampler = Sampler::new(SamplingParams { top_k: k, ..params() }, 0);
                sampler.collect(&logits);
                let mut sorted: Vec<Candidate> = (0_u32..)
                    .zip(&logits)
                    .map(|(id, &logit)| Candidate { id, logit, p: 0.0 })
                    .collect();
                sorted.sort_by(best_first);
                sorted.truncate(k as usize);
                let ids = |all: &[Candidate]| all.iter().map(|c| c.id).collect::<Vec<_>>();
                assert_eq!(ids(&sampler.candidates), ids(&sorted), "{k} of {n}");
            }
        }
    }

    #[test]
    fn broken_logits_and_settings_never_panic() {
        let nan = f32::NAN;
        let inf = f32::INFINITY;
        let logits: [&[f32]; 6] =
            [&[], &[nan], &[nan, 1.0, nan], &[inf, 1.0], &[-inf, -inf], &[-inf, 3.0, -inf, nan]];
        let odd = [0.0, 1.0, -1.0, 1e30, 1e-30, nan, inf];
        for logits in logits {
            for x in odd {
                for k in [0, 1, 3, u32::MAX] {
                    let params = SamplingParams {
                        temperature: x,
                        top_k: k,
                        top_p: x,
                        min_p: x,
                        typical_p: x,
                        repeat_penalty: x,
                        presence_penalty: x,
                        frequency_penalty: x,
                        ..params()
                    };
                    let mut sampler = Sampler::new(params, 0);
                    let id = sampler.sample(&mut logits.to_vec(), &[0, 1, 9]);
                    assert!((id as usize) < logits.len().max(1), "{logits:?} {x}");
                }
            }
        }
        assert_eq!(drawn(&params(), &[-inf, 3.0, -inf, nan], &[]), [1]);
    }
}
