//! Tiny models end to end: requests in, text out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use v4_kernels::{Cpu, Map, cpu::CpuOptions};
use v4_proto::frame::KvDisk;
use v4_proto::{
    Code, Digest, Done, Fault, Generate, Input, Lane, Message, ModelFiles, Role, SamplingParams,
    Usage,
};

use super::*;
use crate::format::{Array, Value, safetensors};
use crate::prepare::Prepare;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/gguf")
}

/// An array of ids of a model's golden file.
fn golden(model: &str, name: &str) -> Vec<u32> {
    let map = Map::open(&folder().join(format!("{model}.golden.safetensors"))).expect("a file");
    let (entries, start) = safetensors::header(map.as_slice()).expect("a whole file");
    let (_, entry) = entries.into_iter().find(|(key, _)| key == name).expect("such an array");
    let [from, to] = entry.data_offsets.map(|at| usize::try_from(start + at).expect("fits"));
    let words = map.as_slice()[from..to].chunks_exact(4);
    words.map(|word| u32::from_le_bytes(word.try_into().expect("four bytes"))).collect()
}

/// An engine over a tiny model; `n_blocks` cuts its KV cache short.
fn open(model: &str, slots: u32, n_blocks: Option<u32>) -> (Prepare, Engine) {
    let weights = vec![folder().join(format!("{model}.gguf"))];
    let files = ModelFiles { weights, ..ModelFiles::default() };
    let cpu = Cpu::open(&CpuOptions { threads: 2, isa: None, ..CpuOptions::default() })
        .expect("a processor");
    let model = Model::open(&files, Box::new(cpu), &mut |_, _, _| {}).expect("a good model");
    let context = model.info().context_length;
    let prepare = Prepare::new(model.meta(), None, context).expect("a good tokenizer");
    let tokenizer = Arc::clone(prepare.tokenizer());
    let mut engine = Engine::new(model, tokenizer, context, slots).expect("memory");
    if let Some(n_blocks) = n_blocks {
        engine.pool = Pool::new(n_blocks);
    }
    (prepare, engine)
}

fn request(ids: Vec<u32>, max_tokens: u32) -> Generate {
    Generate {
        input: Input::Tokens { ids },
        sampling: SamplingParams::greedy(),
        max_tokens: Some(max_tokens),
        stop: Vec::new(),
        context: None,
        truncate: false,
        lane: v4_proto::Lane::default(),
    }
}

/// What came of a request.
#[derive(Debug, Default)]
struct Answer {
    text: String,
    done: Option<Done>,
    fault: Option<Fault>,
}

impl Answer {
    fn take(&mut self, event: Event) {
        assert!(self.done.is_none() && self.fault.is_none(), "nothing comes after the end");
        match event {
            Event::Delta(delta) => self.text.push_str(&delta.text),
            Event::Done(done) => self.done = Some(done),
            Event::Failed(fault) => self.fault = Some(fault),
        }
    }

    fn finish(&self) -> Finish {
        self.done.expect("it ended").finish
    }

    fn usage(&self) -> Usage {
        self.done.expect("it ended").usage
    }
}

/// Runs all requests together until nothing is left to do.
fn run(prepare: &Prepare, engine: &mut Engine, requests: &[Generate]) -> Vec<Answer> {
    let mut answers: BTreeMap<RequestId, Answer> = BTreeMap::new();
    for (id, request) in (0..).zip(requests) {
        engine.submit(id, prepare.prepare(request).expect("a good request"));
        answers.insert(id, Answer::default());
    }
    let mut n_steps = 0;
    let mut take = |id, event| answers.get_mut(&id).expect("a known request").take(event);
    while engine.step(&mut take).expect("it works") {
        n_steps += 1;
        assert!(n_steps < 10_000, "it does not end");
    }
    assert!(engine.is_idle());
    assert_eq!(engine.stats().blocks_used, 0, "blocks leak");
    answers.into_values().collect()
}

fn run_one(prepare: &Prepare, engine: &mut Engine, request: Generate) -> Answer {
    run(prepare, engine, &[request]).remove(0)
}

/// The text of a greedy continuation as the engine would give it: to the first end token.
fn text_of(prepare: &Prepare, ids: &[u32]) -> (String, Finish) {
    let tokenizer = prepare.tokenizer();
    let end = ids.iter().position(|&id| tokenizer.is_end(id));
    let text = tokenizer.decode(&ids[..end.unwrap_or(ids.len())], true);
    (text, if end.is_some() { Finish::Stop } else { Finish::Length })
}

#[test]
fn greedy_text_is_golden() {
    let (prepare, mut engine) = open("llama-f16", 1, None);
    for prompt in ["short", "medium", "long"] {
        let ids = golden("llama-f16", &format!("{prompt}.input_ids"));
        let greedy = golden("llama-f16", &format!("{prompt}.greedy"));
        let (text, finish) = text_of(&prepare, &greedy);
        let n_greedy = as_u32(greedy.len());
        let answer = run_one(&prepare, &mut engine, request(ids.clone(), n_greedy));
        assert_eq!((answer.text.as_str(), answer.finish()), (text.as_str(), finish), "{prompt}");
        assert_eq!(answer.usage().prompt_tokens as usize, ids.len());
        assert_eq!(answer.usage().sent_tokens as usize, ids.len());
        if finish == Finish::Length {
            assert_eq!(answer.usage().completion_tokens, n_greedy);
        }
        assert!(answer.usage().prompt_ns > 0 && answer.usage().completion_ns > 0);
    }
}

/// Requests of several lengths, greedy and drawn.
fn mixed(model: &str) -> Vec<Generate> {
    let mut requests = Vec::new();
    for (n, prompt) in ["short", "medium", "long", "medium"].into_iter().enumerate() {
        let mut request = request(golden(model, &format!("{prompt}.input_ids")), 20 + as_u32(n));
        if n == 3 {
            request.sampling = SamplingParams { seed: Some(4), ..SamplingParams::default() };
        }
        requests.push(request);
    }
    requests
}

#[test]
fn sequences_that_run_together_say_what_they_say_alone() {
    for model in ["llama-f16", "gemma3-q5_0"] {
        let (prepare, mut engine) = open(model, 4, None);
        let requests = mixed(model);
        let together = run(&prepare, &mut engine, &requests);
        for (request, answer) in requests.into_iter().zip(together) {
            let (prepare, mut engine) = open(model, 1, None);
            let alone = run_one(&prepare, &mut engine, request);
            assert_eq!((alone.text.as_str(), alone.finish()), (&*answer.text, answer.finish()));
        }
    }
}

#[test]
fn sequences_that_lose_their_blocks_say_the_same() {
    let (prepare, mut engine) = open("llama-f16", 4, None);
    let mut requests = mixed("llama-f16");
    for request in &mut requests {
        request.max_tokens = Some(100);
    }
    let enough = run(&prepare, &mut engine, &requests);
    // The longest prompt has 300 tokens: it alone takes 7 blocks of the 8.
    let (prepare, mut engine) = open("llama-f16", 4, Some(8));
    let scarce = run(&prepare, &mut engine, &requests);
    for (enough, scarce) in enough.iter().zip(&scarce) {
        assert_eq!((&enough.text, enough.finish()), (&scarce.text, scarce.finish()));
        assert_eq!(enough.usage().completion_tokens, scarce.usage().completion_tokens);
    }
}

#[test]
fn a_known_beginning_is_not_read_again() {
    let (prepare, mut engine) = open("llama-f16", 2, None);
    let mut ids = golden("llama-f16", "long.input_ids");
    let first = run_one(&prepare, &mut engine, request(ids.clone(), 20));
    let again = run_one(&prepare, &mut engine, request(ids.clone(), 20));
    assert_eq!((first.usage().cached_tokens, again.usage().cached_tokens), (0, 256));
    assert_eq!(again.usage().prompt_tokens, 300);
    assert_eq!(first.text, again.text);
    // Another token in the third block: two are known.
    ids[150] = (ids[150] + 1) % 500;
    let other = run_one(&prepare, &mut engine, request(ids, 20));
    assert_eq!(other.usage().cached_tokens, 128);
}

#[test]
fn a_shared_block_counts_once() {
    let (prepare, mut engine) = open("llama-f16", 2, None);
    let ids = golden("llama-f16", "long.input_ids");
    run_one(&prepare, &mut engine, request(ids.clone(), 5));
    for id in [1, 2] {
        let sequence = prepare.prepare(&request(ids.clone(), 5)).expect("a good request");
        engine.submit(id, sequence);
    }
    engine.step(&mut |_, _| {}).expect("it works");
    // Both hold the four blocks that are known, and one of their own.
    let loads: Vec<_> = engine.loads().iter().map(|load| (load.blocks, load.shared)).collect();
    assert_eq!(loads, [(5, 0), (5, 4)]);
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_embedding_is_refused() {
    for n_more in [0, 1] {
        let (prepare, Engine { model, .. }) = open("llama-f16", 1, None);
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let mut meta = model.meta().clone();
        let mut texts = meta.strings(&key("tokens")).expect("tokens").to_vec();
        let mut kinds = meta.i64s(&key("token_type")).expect("kinds").clone();
        assert_eq!(texts.len(), model.vocabulary());
        texts.extend(vec!["beyond".to_owned(); n_more]);
        kinds.extend(vec![3; n_more]);
        meta.insert(key("bos_token_id"), Value::U64(texts.len() as u64 - 1));
        meta.insert(key("tokens"), Value::Array(Array::String(texts)));
        meta.insert(key("token_type"), Value::Array(Array::I64(kinds)));
        let longer = Prepare::new(&meta, None, prepare.context()).expect("a good tokenizer");
        let tokenizer = Arc::clone(longer.tokenizer());
        let engine = Engine::new(model, tokenizer, prepare.context(), 1);
        assert_eq!(engine.is_ok(), n_more == 0);
        if let Err(error) = engine {
            assert_eq!(error.fault().code, Code::Corrupt);
            assert!(error.to_string().contains("tokenizer.ggml.tokens"), "{error}");
        }
    }
}

#[test]
fn a_cancelled_sequence_ends_with_the_next_step() {
    let (prepare, mut engine) = open("llama-f16", 1, None);
    let ids = golden("llama-f16", "short.input_ids");
    for id in [1, 2, 3] {
        let sequence = prepare.prepare(&request(ids.clone(), 1000)).expect("a good request");
        engine.submit(id, sequence);
    }
    let mut events = Vec::new();
    for _ in 0..3 {
        assert!(engine.step(&mut |id, event| events.push((id, event))).expect("it works"));
    }
    assert!(events.iter().all(|(id, _)| *id == 1), "there is one place");
    assert_eq!((engine.stats().running, engine.stats().waiting), (1, 2));
    assert!(engine.stats().blocks_used > 0);
    // One that runs, one that waits, one that is not known.
    for id in [1, 2, 99] {
        engine.cancel(id);
    }
    events.clear();
    engine.step(&mut |id, event| events.push((id, event))).expect("it works");
    let finish = |wanted| {
        events.iter().find_map(|(id, event)| match event {
            Event::Done(done) if *id == wanted => Some(done.finish),
            _ => None,
        })
    };
    assert_eq!((finish(1), finish(2)), (Some(Finish::Cancelled), Some(Finish::Cancelled)));
    assert_eq!((engine.stats().running, engine.stats().waiting), (1, 0), "the third has begun");
    engine.cancel(3);
    assert!(!engine.step(&mut |_, _| {}).expect("it works"));
    assert_eq!(engine.stats().blocks_used, 0);
}

#[test]
fn stop_strings_and_limits_end_an_answer() {
    let (prepare, mut engine) = open("llama-f16", 1, None);
    let ids = golden("llama-f16", "medium.input_ids");
    let whole = run_one(&prepare, &mut engine, request(ids.clone(), 20));
    let chars: Vec<char> = whole.text.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 3].iter().collect();
    let at = whole.text.find(&stop).expect("it is a part");

    let stopping = Generate { stop: vec![stop], ..request(ids.clone(), 20) };
    let stopped = run_one(&prepare, &mut engine, stopping);
    assert_eq!((stopped.text.as_str(), stopped.finish()), (&whole.text[..at], Finish::Stop));

    let short = run_one(&prepare, &mut engine, request(ids.clone(), 5));
    assert!(whole.text.starts_with(short.text.trim_end_matches('\u{fffd}')));
    assert_eq!((short.usage().completion_tokens, short.finish()), (5, Finish::Length));

    let none = run_one(&prepare, &mut engine, request(ids.clone(), 0));
    assert_eq!((none.text.as_str(), none.usage().completion_tokens), ("", 0));

    let n = as_u32(ids.len());
    let edge = Generate { context: Some(n + 4), ..request(ids.clone(), 20) };
    let edge = run_one(&prepare, &mut engine, edge);
    assert_eq!((edge.usage().completion_tokens, edge.finish()), (4, Finish::Length));

    let full = Generate { context: Some(n), ..request(ids, 20) };
    let fault = prepare.prepare(&full).expect_err("no room for an answer");
    assert_eq!(fault.code, Code::ContextOverflow);
    assert!(fault.message.contains(&format!("{n} tokens and the context {n}")), "{fault}");
}

#[test]
fn a_sequence_may_fill_the_whole_context() {
    let (prepare, mut engine) = open("llama-f16", 1, None);
    let context = prepare.context();
    let ids = vec![7; context as usize - 3];
    let answer = run_one(&prepare, &mut engine, request(ids, 100));
    assert!(answer.usage().completion_tokens <= 3);
    if answer.finish() == Finish::Length {
        assert_eq!(answer.usage().completion_tokens, 3);
    }
}

#[test]
fn a_chat_is_answered() {
    let (prepare, mut engine) = open("llama-f16", 1, None);
    let chat = Generate {
        input: Input::Chat {
            messages: vec![Message::new(Role::User, "Hello")],
            tools: Vec::new(),
            think: None,
        },
        ..request(Vec::new(), 8)
    };
    let answer = run_one(&prepare, &mut engine, chat);
    assert!(answer.fault.is_none());
    assert!(answer.usage().prompt_tokens > 1);
}

/// A folder for blocks that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("v4-step-{}-{name}", std::process::id())))
    }

    fn options(&self, model: u8) -> KvDisk {
        let models = vec![Digest::from_bytes([model; 32])];
        KvDisk { root: self.0.clone(), models, quota_bytes: 1 << 30 }
    }

    /// The files of all models.
    #[expect(clippy::disallowed_methods, reason = "a test looks at what was written")]
    fn files(&self) -> Vec<PathBuf> {
        let list = |path: &Path| -> Vec<PathBuf> {
            let entries = std::fs::read_dir(path).into_iter().flatten();
            entries.map(|entry| entry.expect("an entry").path()).collect()
        };
        let mut files: Vec<PathBuf> =
            list(&self.0).iter().flat_map(|folder| list(folder)).collect();
        files.sort();
        files
    }
}

impl Drop for Folder {
    #[expect(clippy::disallowed_methods, reason = "a test clears up")]
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// An engine that keeps blocks in `folder` for a model of that number.
fn open_on(folder: &Folder, name: &str, model: u8, n_blocks: Option<u32>) -> (Prepare, Engine) {
    let (prepare, mut engine) = open(name, 2, n_blocks);
    engine.keep_on_disk(&folder.options(model), "fast").expect("a folder");
    (prepare, engine)
}

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn another_process_goes_on_where_the_last_one_was() {
    for model in ["llama-f16", "gemma3-q5_0"] {
        let folder = Folder::new(model);
        let ids = golden(model, "long.input_ids");
        let (prepare, mut engine) = open_on(&folder, model, 1, None);
        let first = run_one(&prepare, &mut engine, request(ids.clone(), 30));
        while engine.rest() {}
        engine.flush(PATIENCE);
        assert_eq!((engine.stats().blocks_saved, folder.files().len()), (5, 5));
        drop(engine);

        let (prepare, mut engine) = open_on(&folder, model, 1, None);
        let again = run_one(&prepare, &mut engine, request(ids.clone(), 30));
        assert_eq!((first.usage().cached_tokens, again.usage().cached_tokens), (0, 256));
        assert_eq!((&first.text, first.finish()), (&again.text, again.finish()));
        // What came from disk is not written again, and is in the cache from now on.
        engine.flush(PATIENCE);
        assert_eq!((engine.stats().blocks_saved, engine.stats().blocks_restored), (1, 4));
        let third = run_one(&prepare, &mut engine, request(ids.clone(), 30));
        assert_eq!((third.usage().cached_tokens, engine.stats().blocks_restored), (256, 4));

        // Of another model nothing is taken, whatever lies there.
        let (prepare, mut engine) = open_on(&folder, model, 2, None);
        let other = run_one(&prepare, &mut engine, request(ids, 30));
        assert_eq!((other.usage().cached_tokens, &other.text), (0, &first.text));
    }
}

#[test]
fn two_that_begin_alike_both_go_on_from_disk() {
    let folder = Folder::new("alike");
    let ids = golden("llama-f16", "long.input_ids");
    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, None);
    let first = run_one(&prepare, &mut engine, request(ids.clone(), 20));
    engine.flush(PATIENCE);
    drop(engine);
    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, None);
    let both = run(&prepare, &mut engine, &[request(ids.clone(), 20), request(ids, 20)]);
    for answer in both {
        // Whichever comes second may take what the first has computed by then, too.
        assert!(answer.usage().cached_tokens >= 256, "{:?}", answer.usage());
        assert_eq!(answer.text, first.text);
    }
    assert_eq!(engine.stats().blocks_restored, 4, "each block once");
}

#[test]
fn two_layouts_of_one_model_do_not_meet() {
    let folder = Folder::new("layouts");
    let (_, engine) = open_on(&folder, "llama-f16", 1, None);
    let root = engine.root;
    let (_, Engine { model, tokenizer, .. }) = open("llama-f16", 1, None);
    let model = model.with_kv_type(v4_kernels::KvType::Bf16).expect("any head");
    let mut other = Engine::new(model, tokenizer, 64, 1).expect("memory");
    other.keep_on_disk(&folder.options(1), "fast").expect("a folder");
    assert_ne!(other.root, root);
    // Nor do two models whose first files are the same.
    let (_, mut third) = open("llama-f16", 1, None);
    let mut options = folder.options(1);
    options.models.push(Digest::from_bytes([2; 32]));
    third.keep_on_disk(&options, "fast").expect("a folder");
    assert_ne!(third.root, root);
    // Nor do two ways to compute it.
    third.keep_on_disk(&folder.options(1), "fast").expect("a folder");
    assert_eq!(third.root, root);
    third.keep_on_disk(&folder.options(1), "quality").expect("a folder");
    assert_ne!(third.root, root);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test damages what was written")]
fn a_damaged_block_is_refused_and_computed_again() {
    let folder = Folder::new("damaged");
    let ids = golden("llama-f16", "long.input_ids");
    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, None);
    let first = run_one(&prepare, &mut engine, request(ids.clone(), 20));
    engine.flush(PATIENCE);
    drop(engine);
    // The third block of the prompt.
    let name = |path: &&PathBuf| path.to_string_lossy().ends_with("-2");
    let path = folder.files().iter().find(name).expect("the third block").clone();
    let mut bytes = std::fs::read(&path).expect("a file");
    let last = bytes.len() - 1;
    bytes[last] ^= 4;
    std::fs::write(&path, bytes).expect("written");

    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, None);
    let again = run_one(&prepare, &mut engine, request(ids, 20));
    assert_eq!((again.usage().cached_tokens, &again.text), (128, &first.text));
    assert!(!path.exists() || engine.stats().blocks_saved > 0);
    engine.flush(PATIENCE);
    assert!(path.exists(), "it is written anew");
}

#[test]
fn blocks_that_had_to_go_come_back_from_disk() {
    let folder = Folder::new("evicted");
    // Room for one of the two conversations only.
    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, Some(7));
    let one = golden("llama-f16", "long.input_ids");
    let two: Vec<u32> = one.iter().rev().copied().collect();
    let alone = open("llama-f16", 1, None);
    let mut expected = Vec::new();
    let (prepare_alone, mut engine_alone) = alone;
    for ids in [&one, &two] {
        expected.push(run_one(&prepare_alone, &mut engine_alone, request(ids.clone(), 20)).text);
    }
    for round in 0..3 {
        for (ids, expected) in [&one, &two].into_iter().zip(&expected) {
            let answer = run_one(&prepare, &mut engine, request(ids.clone(), 20));
            let cached = if round == 0 { 0 } else { 256 };
            assert_eq!((answer.usage().cached_tokens, &answer.text), (cached, expected));
            engine.flush(PATIENCE);
        }
    }
    assert!(engine.stats().blocks_restored >= 8);
}

#[test]
fn a_cancel_is_not_held_up_by_the_disk() {
    let folder = Folder::new("cancel");
    let ids = golden("llama-f16", "long.input_ids");
    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, None);
    run_one(&prepare, &mut engine, request(ids.clone(), 20));
    engine.flush(PATIENCE);
    drop(engine);
    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, None);
    engine.submit(1, prepare.prepare(&request(ids.clone(), 20)).expect("a good request"));
    assert!(engine.step(&mut |_, _| {}).expect("it works"), "it waits for its blocks");
    engine.cancel(1);
    let mut ended = false;
    engine.step(&mut |_, event| ended |= matches!(event, Event::Done(_))).expect("it works");
    assert!(ended && engine.is_idle());
    // What still comes for it is nobody's, and harms nobody.
    let again = run_one(&prepare, &mut engine, request(ids, 20));
    assert!(again.done.is_some() && again.fault.is_none());
}

/// Tiny models, one of each architecture, below the golden files.
const ARCHS: [&str; 6] = [
    "gguf/llama-q4_0.gguf",
    "gguf/gemma3-q5_0.gguf",
    "gguf/gpt_oss-mxfp4.gguf",
    "gguf/qwen3-q4_k_m.gguf",
    "models/qwen2",
    "models/qwen3_moe",
];

fn open_arch(path: &str, slots: u32) -> (Prepare, Engine) {
    let weights = vec![folder().join("..").join(path)];
    let files = ModelFiles { weights, ..ModelFiles::default() };
    let cpu =
        Cpu::open(&CpuOptions { threads: 1, isa: None, is_exact: false }).expect("a processor");
    let model = Model::open(&files, Box::new(cpu), &mut |_, _, _| {}).expect("a good model");
    let context = model.info().context_length.min(512);
    // Models of Hugging Face's layout have their tokenizer beside them, which is not read yet.
    let has_own = model.meta().str("tokenizer.ggml.model").is_some();
    let meta = if has_own {
        model.meta().clone()
    } else {
        open("llama-q4_0", 1, None).1.model.meta().clone()
    };
    let prepare = Prepare::new(&meta, None, context).expect("a good tokenizer");
    let tokenizer = Arc::clone(prepare.tokenizer());
    let engine = Engine::new(model, tokenizer, context, slots).expect("memory");
    (prepare, engine)
}

/// Eight requests of every kind: greedy and drawn, short and of several blocks, with penalties,
/// with a bound, some of which begin alike. `n_tokens` is the vocabulary.
fn every_kind(n_tokens: usize) -> Vec<Generate> {
    let ids = |n: usize, step: usize| -> Vec<u32> {
        (0..n).map(|at| as_u32((at * step + at / 7) % (n_tokens - 1) + 1)).collect()
    };
    let drawn = |seed| SamplingParams { seed: Some(seed), ..SamplingParams::default() };
    let with = |sampling, request| Generate { sampling, ..request };
    let hot = SamplingParams { temperature: 1.5, top_k: 0, top_p: 0.95, ..drawn(3) };
    let penalised = SamplingParams {
        repeat_penalty: 1.3,
        frequency_penalty: 0.4,
        presence_penalty: 0.2,
        ..SamplingParams::greedy()
    };
    vec![
        request(ids(9, 3), 40),
        request(ids(140, 5), 40),
        request([ids(140, 5), ids(60, 11)].concat(), 33),
        with(drawn(1), request(ids(70, 5), 40)),
        with(drawn(2), request(ids(9, 3), 40)),
        with(hot, request(ids(30, 1), 40)),
        with(penalised.clone(), request(ids(140, 5), 40)),
        with(
            SamplingParams { temperature: 0.7, seed: Some(9), ..penalised },
            request(ids(64, 2), 7),
        ),
    ]
}

/// The tokens of each sequence as far as a step began with them.
type Seen = std::rc::Rc<std::cell::RefCell<Vec<Vec<u32>>>>;

/// Guesses nothing and notes all tokens.
fn watching(seen: &Seen) -> draft::Told {
    let seen = std::rc::Rc::clone(seen);
    Box::new(move |tokens, _| {
        let mut seen = seen.borrow_mut();
        seen.retain(|known| !tokens.starts_with(known));
        seen.push(tokens.to_vec());
        Vec::new()
    })
}

/// Guesses what was seen, every fifth token wrongly.
fn knowing(seen: &Seen) -> draft::Told {
    let seen = std::rc::Rc::clone(seen);
    Box::new(move |tokens, most| {
        let seen = seen.borrow();
        let Some(known) = seen.iter().find(|known| known.starts_with(tokens)) else {
            return vec![1; most];
        };
        let at = tokens.len();
        let spoil = |at: usize, token: u32| if at.is_multiple_of(5) { token ^ 1 } else { token };
        let rest = known[at..].iter().take(most);
        rest.enumerate().map(|(n, &token)| spoil(at + n, token)).collect()
    })
}

/// What a request came to, alone and without guesses or a cache.
fn alone(arch: &str, requests: &[Generate]) -> (Vec<Answer>, Vec<Seen>) {
    let one = |request: &Generate| {
        let seen = Seen::default();
        let (prepare, mut engine) = open_arch(arch, 1);
        engine.drafting.told = Some(watching(&seen));
        let answer = run_one(&prepare, &mut engine, request.clone());
        assert_eq!((engine.stats().drafted, answer.usage().cached_tokens), (0, 0));
        (answer, seen)
    };
    requests.iter().map(one).unzip()
}

#[track_caller]
fn assert_same(found: &[Answer], expected: &[Answer], what: &str) {
    for (n, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.text, expected.text, "{what}, request {n}");
        assert_eq!(found.finish(), expected.finish(), "{what}, request {n}");
        let written = |answer: &Answer| answer.usage().completion_tokens;
        assert_eq!(written(found), written(expected), "{what}, request {n}");
    }
}

#[test]
fn the_text_is_the_same_however_it_is_computed() {
    for arch in ARCHS {
        let mut requests = every_kind(open_arch(arch, 1).0.tokenizer().len());
        let (first, _) = alone(arch, &requests);
        // The second answer ends at a text of its own from now on.
        let chars: Vec<char> = first[1].text.chars().collect();
        let stop: String = chars[chars.len() / 2..].iter().take(2).collect();
        requests[1].stop = vec![stop];
        let (expected, seen) = alone(arch, &requests);
        assert_ne!(first[1].text, expected[1].text, "{arch}: the stop string does something");
        let all = Seen::default();
        for seen in &seen {
            all.borrow_mut().extend(seen.borrow().iter().cloned());
        }

        // Alone, with guesses.
        let mut wrong = 0;
        for (n, request) in requests.iter().enumerate() {
            let (prepare, mut engine) = open_arch(arch, 1);
            engine.drafting.told = Some(knowing(&seen[n]));
            let answer = run_one(&prepare, &mut engine, request.clone());
            assert_same(&[answer], &expected[n..=n], &format!("{arch} {n} with guesses"));
            let Stats { drafted, accepted, steps, .. } = engine.stats();
            wrong += drafted - accepted;
            if expected[n].usage().completion_tokens > 10 {
                assert!(accepted > 2, "{arch} {n}: {accepted} of {drafted}");
                assert!(steps < u64::from(expected[n].usage().completion_tokens), "{steps}");
            }
        }
        assert!(wrong > 5, "{arch}: {wrong}");
        // In a batch of eight, of four so that guesses have room, and of two; each engine twice, so
        // that the second time the prefix cache knows every beginning; with guesses and without.
        for slots in [8, 4, 2] {
            for guesses in [None, Some(())] {
                let (prepare, mut engine) = open_arch(arch, slots);
                engine.drafting.told = guesses.map(|()| knowing(&all));
                for round in 0..2 {
                    let what = format!("{arch}, {slots} at a time, {guesses:?}, round {round}");
                    let answers = run(&prepare, &mut engine, &requests);
                    assert_same(&answers, &expected, &what);
                    let cached = answers[1].usage().cached_tokens;
                    assert!(round == 0 || cached == 128, "{what}: {cached}");
                }
                assert!(engine.stats().accepted > 0 || guesses.is_none());
            }
        }
    }
}

#[test]
fn text_that_repeats_is_guessed_by_itself() {
    // A penalty that is none makes even a tiny random model go round in circles.
    let sampling = SamplingParams { repeat_penalty: 0.2, ..SamplingParams::greedy() };
    let request = Generate { sampling, ..every_kind(500).swap_remove(1) };
    let (prepare, mut engine) = open_arch(ARCHS[0], 1);
    engine.drafting.told = Some(Box::new(|_, _| Vec::new()));
    let expected = run_one(&prepare, &mut engine, request.clone());
    let before = engine.stats();
    (engine.drafting.told, engine.drafting.is_free) = (None, true);
    let answer = run_one(&prepare, &mut engine, request);
    assert_eq!((&answer.text, answer.finish()), (&expected.text, expected.finish()));
    let after = engine.stats();
    let (drafted, accepted) = (after.drafted - before.drafted, after.accepted - before.accepted);
    let written = u64::from(answer.usage().completion_tokens);
    assert!(drafted > 10 && accepted > 5, "{accepted} of {drafted} in {written}");
    assert!(after.steps - before.steps <= written + 3 - accepted, "each saves a step");
}

/// Runs until `is_over`; the ids in the order of their first word, and of their end.
fn watch(engine: &mut Engine, answers: &mut BTreeMap<RequestId, Answer>) -> Vec<RequestId> {
    let mut ended = Vec::new();
    let mut n_steps = 0;
    loop {
        let mut take = |id, event: Event| {
            if matches!(event, Event::Done(_)) {
                ended.push(id);
            }
            answers.entry(id).or_default().take(event);
        };
        if !engine.step(&mut take).expect("it works") {
            return ended;
        }
        n_steps += 1;
        assert!(n_steps < 10_000, "it does not end");
    }
}

#[test]
fn who_waits_goes_before_who_does_not() {
    let (prepare, mut engine) = open("llama-f16", 1, None);
    let ids = |name: &str| golden("llama-f16", &format!("{name}.input_ids"));
    let background = Generate { lane: Lane::Background, ..request(ids("long"), 20) };
    let urgent = request(ids("medium"), 20);
    let mut alone = Vec::new();
    for request in [&background, &urgent] {
        let (prepare, mut engine) = open("llama-f16", 1, None);
        alone.push(run_one(&prepare, &mut engine, request.clone()).text);
    }
    // It has begun to write when somebody comes who waits, and another in the background.
    let mut answers = BTreeMap::new();
    let submit = |engine: &mut Engine, id, request: &Generate| {
        engine.submit(id, prepare.prepare(request).expect("a good request"));
    };
    submit(&mut engine, 1, &background);
    for _ in 0..5 {
        let mut take = |id, event| answers.entry(id).or_insert_with(Answer::default).take(event);
        engine.step(&mut take).expect("it works");
    }
    submit(&mut engine, 2, &background);
    submit(&mut engine, 3, &urgent);
    assert_eq!(watch(&mut engine, &mut answers), [3, 1, 2]);
    let texts: Vec<&String> = answers.values().map(|answer| &answer.text).collect();
    assert_eq!(texts, [&alone[0], &alone[0], &alone[1]], "nobody's text suffers");

    // When its turn has come it is like any other.
    let mut answers = BTreeMap::new();
    submit(&mut engine, 1, &background);
    submit(&mut engine, 2, &urgent);
    let first = engine.waiting[0].turn;
    for active in &mut engine.waiting {
        active.turn = if active.id == 1 { first } else { Instant::now() };
    }
    engine.waiting.make_contiguous().sort_by_key(|active| active.turn);
    assert_eq!(watch(&mut engine, &mut answers), [1, 2]);
}

#[test]
fn a_prompt_that_is_read_is_cancelled_with_the_next_step() {
    let (prepare, mut engine) = open("llama-f16", 2, None);
    let ids = golden("llama-f16", "long.input_ids");
    let short = golden("llama-f16", "short.input_ids");
    // One writes, so the other is read in chunks.
    engine.submit(1, prepare.prepare(&request(short, 500)).expect("a good request"));
    engine.step(&mut |_, _| {}).expect("it works");
    engine.submit(2, prepare.prepare(&request(ids, 20)).expect("a good request"));
    engine.pace = schedule::Pace::default();
    engine.step(&mut |_, _| {}).expect("it works");
    let read = engine.running[1].cached;
    assert!(read > 0 && read < 300, "{read}");
    engine.cancel(2);
    let mut ended = Vec::new();
    let mut take = |id, event| {
        if let Event::Done(done) = event {
            ended.push((id, done.finish));
        }
    };
    engine.step(&mut take).expect("it works");
    assert_eq!((ended.as_slice(), engine.running.len()), (&[(2, Finish::Cancelled)][..], 1));
}

#[test]
fn prompts_that_begin_alike_are_read_once() {
    let long = golden("llama-f16", "long.input_ids");
    let with = |n: usize, more: &[u32]| [&long[..n], more].concat();
    let drawn = |seed| Generate {
        sampling: SamplingParams { seed: Some(seed), ..SamplingParams::default() },
        ..request(long.clone(), 20)
    };
    // Three answers to one prompt, one that begins like it, and one that leaves it in a block.
    let requests = [
        drawn(1),
        drawn(2),
        drawn(3),
        request(with(230, &[9; 40]), 20),
        request(with(70, &[8; 60]), 20),
    ];
    let expected: Vec<Answer> = requests
        .iter()
        .map(|request| {
            let (prepare, mut engine) = open("llama-f16", 1, None);
            run_one(&prepare, &mut engine, request.clone())
        })
        .collect();
    for slots in [5, 2] {
        let (prepare, mut engine) = open("llama-f16", slots, None);
        let answers = run(&prepare, &mut engine, &requests);
        assert_same(&answers, &expected, "together");
        let cached: Vec<u32> = answers.iter().map(|answer| answer.usage().cached_tokens).collect();
        assert_eq!(cached[0], 0);
        if slots == 5 {
            // All of the prompt but its last token, also of a block that is not full.
            assert_eq!(cached[1..3], [299, 299]);
            assert_eq!(cached[3..], [230, 64], "so far as they are alike");
        }
        assert!(cached[1..].iter().all(|&cached| cached >= 64), "{cached:?}");
    }
}

#[test]
fn what_a_running_sequence_has_read_outlives_it() {
    let folder = Folder::new("running");
    let ids = golden("llama-f16", "long.input_ids");
    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, None);
    engine.submit(1, prepare.prepare(&request(ids.clone(), 200)).expect("a good request"));
    for _ in 0..20 {
        assert!(engine.step(&mut |_, _| {}).expect("it works"), "it runs");
    }
    // Killed in the middle of the answer.
    assert_eq!(engine.stats().blocks_saved, 4);
    engine.flush(PATIENCE);
    drop(engine);
    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, None);
    let again = run_one(&prepare, &mut engine, request(ids, 5));
    assert_eq!(again.usage().cached_tokens, 256);
}

#[test]
fn nobody_who_waits_follows_the_background() {
    let (prepare, mut engine) = open("llama-f16", 3, None);
    let ids = golden("llama-f16", "long.input_ids");
    let background = Generate { lane: Lane::Background, ..request(ids.clone(), 5) };
    for (id, request) in [(1, &background), (2, &request(ids, 5)), (3, &background)] {
        engine.submit(id, prepare.prepare(request).expect("a good request"));
    }
    // The urgent one is first; then each of the others waits for what it reads.
    engine.step(&mut |_, _| {}).expect("it works");
    assert_eq!(engine.running.iter().map(|active| active.id).collect::<Vec<_>>(), [2]);
    let (prepare, mut engine) = open("llama-f16", 3, None);
    let submit = |engine: &mut Engine, id, request: &Generate| {
        engine.submit(id, prepare.prepare(request).expect("a good request"));
    };
    submit(&mut engine, 1, &background);
    engine.step(&mut |_, _| {}).expect("it works");
    assert!(engine.running[0].load(Instant::now()).pending > 1, "it reads yet");
    submit(&mut engine, 2, &Generate { lane: Lane::Interactive, ..background.clone() });
    submit(&mut engine, 3, &background);
    engine.admit();
    assert_eq!(engine.running.iter().map(|active| active.id).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(engine.waiting.len(), 1);
}

#[test]
fn a_disk_that_says_nothing_is_not_waited_for() {
    let folder = Folder::new("stalled");
    let ids = golden("llama-f16", "long.input_ids");
    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, None);
    let first = run_one(&prepare, &mut engine, request(ids.clone(), 20));
    engine.flush(PATIENCE);
    drop(engine);
    let (prepare, mut engine) = open_on(&folder, "llama-f16", 1, None);
    engine.submit(1, prepare.prepare(&request(ids, 20)).expect("a good request"));
    assert!(engine.is_coming(0), "it was asked");
    let Lookup::Coming { since, .. } = &mut engine.waiting[0].lookup else { panic!("it comes") };
    *since = since.checked_sub(limits::FETCH_STALL * 2).expect("the clock began earlier");
    engine.admit();
    assert_eq!((engine.waiting.len(), engine.running.len()), (0, 1), "it is computed");
    let mut answers = BTreeMap::new();
    assert_eq!(watch(&mut engine, &mut answers), [1]);
    assert_eq!(answers[&1].text, first.text);
}
