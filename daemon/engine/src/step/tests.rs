//! Tiny models end to end: requests in, text out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use v4_kernels::{Cpu, Map, cpu::CpuOptions};
use v4_proto::{Code, Fault, Generate, Input, Message, ModelFiles, Role, SamplingParams};

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
    let cpu = Cpu::open(&CpuOptions { threads: 2, isa: None }).expect("a processor");
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
