//! Real models against golden figures. The models are pulled by v4 itself (`.ci/run`) to a folder
//! that `V4_TEST_MODELS` names; a test whose model is not there says so by name.

#![expect(clippy::print_stdout, reason = "figures are for people, `--nocapture` shows them")]

#[path = "../vectors/mod.rs"]
mod vectors;

use std::path::PathBuf;

use v4_engine::model::{Alone, Model};
use v4_kernels::{Cpu, cpu::CpuOptions};
use v4_proto::ModelFiles;
use vectors::{Vectors, argmax, folder, log_sum_exp};

/// A model, and how far from the golden figures it may be.
struct Case {
    /// In the folder of models.
    file: &'static str,
    /// In `tests/golden/real`.
    golden: &'static str,
    /// Mean difference of the log-probability of the passage's next token.
    log_p: f64,
    /// Share of the passage's tokens whose likeliest successor is the same.
    top1: f64,
    /// Difference of the mean log-likelihood: the logarithm of the perplexities' ratio.
    nll: f64,
    /// Mean Kullback-Leibler divergence at positions of the passage.
    kl: f64,
    /// A smaller golden gap between the two likeliest tokens may close by rounding.
    gap: f32,
}

// By int8 activations, the golden files' README accepts twice what llama.cpp, which has them too,
// is away from float32. The log-likelihoods are the exception: the mean of 1,700 differences of 0.1
// either way has a standard error of 0.002, so that what one engine happens to get says little.

const SMOLLM2: Case = Case {
    file: "smollm2.gguf",
    golden: "smollm2-135m-q4_1",
    log_p: 2.0 * 0.051,
    top1: 1.0 - 2.0 * (1.0 - 0.959),
    nll: 1e-2,
    kl: 8e-3,
    gap: 0.35,
};

const GEMMA3: Case = Case {
    file: "gemma3-270m.gguf",
    golden: "gemma-3-270m-q4_k_m",
    log_p: 2.0 * 0.063,
    top1: 1.0 - 2.0 * (1.0 - 0.965),
    ..SMOLLM2
};

const QWEN25: Case =
    Case { file: "qwen2.5-coder-0.5b.gguf", golden: "qwen2.5-coder-0.5b-q4_k_m", ..SMOLLM2 };

/// By exact products, the README's row for float32.
const SMOLLM2_EXACT: Case =
    Case { log_p: 1e-3, top1: 0.998, nll: 1e-3, kl: 1e-4, gap: 1e-2, ..SMOLLM2 };

#[expect(clippy::disallowed_methods, reason = "a test's folder comes from who runs it")]
fn path(case: &Case) -> Option<PathBuf> {
    let path =
        std::env::var_os("V4_TEST_MODELS").map(|models| PathBuf::from(models).join(case.file));
    let found = path.filter(|path| path.is_file());
    if found.is_none() {
        println!("skipped: {} is not in $V4_TEST_MODELS; `.ci/run` pulls it", case.file);
    }
    found
}

/// Holds a model against its golden figures.
fn check(case: &Case, is_exact: bool) {
    let Some(path) = path(case) else { return };
    let files = ModelFiles { weights: vec![path], ..ModelFiles::default() };
    let cpu = Cpu::open(&CpuOptions { is_exact, ..CpuOptions::default() }).expect("a processor");
    let model = Model::open(&files, Box::new(cpu), &mut |_, _, _| {});
    let mut model = model.expect("a good model");
    let golden = Vectors::open(&folder().join("real").join(format!("{}.safetensors", case.golden)));
    for prompt in ["plain", "list", "numbers", "code", "prose"] {
        check_prompt(case, &mut model, &golden, prompt);
    }
    check_passage(case, &mut model, &golden);
}

/// The likeliest tokens after a prompt, then the greedy continuation up to the first near tie.
fn check_prompt(case: &Case, model: &mut Model, golden: &Vectors, prompt: &str) {
    let ids = golden.ints(&format!("{prompt}.input_ids"));
    let positions = golden.ints(&format!("{prompt}.positions"));
    let top_ids = golden.ints(&format!("{prompt}.top_ids"));
    let top_log_ps = golden.floats(&format!("{prompt}.top_logprobs"));
    let greedy = golden.ints(&format!("{prompt}.greedy"));
    let gaps = golden.floats(&format!("{prompt}.greedy_gap"));
    let (vocabulary, n_top) = (model.vocabulary(), top_ids.len() / positions.len());
    let mut alone = Alone::new(model, ids.len() + greedy.len()).expect("memory");
    let mut logits = Vec::new();
    alone.feed(&ids, &positions, &mut logits).expect("a forward pass");
    let mut difference = 0.0;
    for (i, row) in logits.chunks(vocabulary).enumerate() {
        let sum = log_sum_exp(row);
        for k in i * n_top..(i + 1) * n_top {
            let log_p = f64::from(row[top_ids[k] as usize]) - sum;
            difference += (log_p - f64::from(top_log_ps[k])).abs() / top_ids.len() as f64;
        }
    }
    // The README gives no bound for twenty tokens of eight positions; far ones are small anyway.
    assert!(difference < 3.0 * case.log_p, "{prompt}: {difference} between log-probabilities");
    let mut row = logits[logits.len() - vocabulary..].to_vec();
    for (n, (&expected, gap)) in greedy.iter().zip(gaps).enumerate() {
        if gap < case.gap {
            break;
        }
        assert_eq!(argmax(&row), expected, "{prompt}: greedy token {n}, gap {gap}");
        alone.feed(&[expected], &[0], &mut row).expect("a forward pass");
    }
}

/// The log-probability of each token of a text, and whole distributions here and there.
fn check_passage(case: &Case, model: &mut Model, golden: &Vectors) {
    const CHUNK: usize = 128;
    let ids = golden.ints("passage.input_ids");
    let next = golden.floats("passage.next_logprob");
    let top1 = golden.ints("passage.top1");
    let vocabulary = model.vocabulary();
    let mut alone = Alone::new(model, ids.len()).expect("memory");
    let (mut logits, mut all, mut kls) = (Vec::new(), Vec::new(), Vec::new());
    let mut same = 0;
    for (i, tokens) in ids.chunks(CHUNK).enumerate() {
        let rows: Vec<u32> = (0..).take(tokens.len()).collect();
        alone.feed(tokens, &rows, &mut logits).expect("a forward pass");
        for (at, row) in (i * CHUNK..).zip(logits.chunks(vocabulary)) {
            let sum = log_sum_exp(row);
            same += usize::from(argmax(row) == top1[at]);
            if let Some(&id) = ids.get(at + 1) {
                all.push(f64::from(row[id as usize]) - sum);
            }
            kls.extend(kl(golden, at, row, sum));
        }
    }
    let n = next.len() as f64;
    let differences = all.iter().zip(&next).map(|(found, next)| found - f64::from(*next));
    let log_p = differences.clone().map(f64::abs).sum::<f64>() / n;
    let nll = differences.sum::<f64>().abs() / n;
    let top1 = same as f64 / ids.len() as f64;
    let kl = kls.iter().sum::<f64>() / kls.len() as f64;
    println!("{}: log p {log_p:.4}, top-1 {top1:.4}, nll {nll:.4}, KL {kl:.1e}", case.file);
    let perplexity = (-all.iter().sum::<f64>() / n).exp();
    println!("{}: perplexity {perplexity:.3}", case.file);
    assert!(
        log_p < case.log_p && top1 > case.top1 && nll < case.nll && kl < case.kl,
        "{}",
        case.file
    );
}

/// The divergence at a position of the passage, if its distribution is among the golden ones.
fn kl(golden: &Vectors, at: usize, row: &[f32], sum: f64) -> Option<f64> {
    let positions = golden.ints("passage.kl_positions");
    let i = positions.iter().position(|&position| position as usize == at)?;
    let ids = golden.ints("passage.kl_ids");
    let log_ps = golden.floats("passage.kl_logprobs");
    let n = ids.len() / positions.len();
    let terms = (i * n..(i + 1) * n).map(|k| {
        let log_p = f64::from(log_ps[k]);
        log_p.exp() * (log_p - (f64::from(row[ids[k] as usize]) - sum))
    });
    Some(terms.sum())
}

#[test]
fn smollm2_is_golden() {
    check(&SMOLLM2, false);
}

#[test]
fn gemma3_is_golden() {
    check(&GEMMA3, false);
}

#[test]
fn qwen25_coder_is_golden() {
    check(&QWEN25, false);
}

#[test]
fn smollm2_by_exact_products_is_golden_to_the_third_digit() {
    check(&SMOLLM2_EXACT, true);
}

#[test]
fn headers_say_what_is_known_of_these_models() {
    use v4_proto::Ability::{Completion, Insert, Tools};
    let cases = [
        (&SMOLLM2, "Q4_1", 134_515_008, 8192, &[Completion][..]),
        (&GEMMA3, "Q4_K_M", 268_098_176, 32_768, &[Completion]),
        (&QWEN25, "Q4_K_M", 630_167_424, 32_768, &[Completion, Tools, Insert]),
    ];
    for (case, quant, n_params, context, abilities) in cases {
        let Some(path) = path(case) else { continue };
        let files = ModelFiles { weights: vec![path], ..ModelFiles::default() };
        let info = v4_engine::inspect(&files).expect("a good file").info;
        assert!(info.supported, "{}", case.file);
        assert_eq!((info.quant.as_str(), info.n_params), (quant, n_params));
        assert_eq!((info.context_length, info.abilities.as_slice()), (context, abilities));
    }
}
