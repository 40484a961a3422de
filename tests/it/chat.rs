//! Answers, in both surfaces, streamed and whole.

use std::thread;

use serde_json::{Value, json};
use v4_tests::daemon::Daemon;
use v4_tests::home::{ENDLESS, Home};
use v4_tests::http::Reply;
use v4_tests::process::until;

const TINY: &str = "llama-q4_0.gguf";

/// A greedy request for `n` tokens.
fn options(n: i64) -> Value {
    json!({"num_predict": n, "temperature": 0, "seed": 1})
}

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// The text of all lines, and the last line.
fn joined(reply: &Reply, pointer: &str) -> (String, Value) {
    assert_eq!(reply.status, 200, "{}", reply.text());
    let lines = reply.lines();
    let text = lines.iter().filter_map(|line| line.pointer(pointer)?.as_str()).collect();
    (text, lines.last().expect("a last line").clone())
}

#[test]
fn generate_says_the_same_streamed_and_whole() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let mut body = json!({"model": "tiny", "prompt": "hello", "options": options(12)});
    let streamed = daemon.tcp.post("/api/generate", &body);
    assert_eq!(streamed.field("content-type"), Some("application/x-ndjson"));
    let (text, last) = joined(&streamed, "/response");
    assert!(!text.is_empty());
    assert_eq!((&last["done"], &last["done_reason"]), (&json!(true), &json!("length")));
    assert_eq!(last["eval_count"], 12);
    for figure in ["total_duration", "load_duration", "prompt_eval_count", "eval_duration"] {
        assert!(last[figure].as_u64().is_some_and(|n| n > 0), "{figure}: {last}");
    }
    body["stream"] = false.into();
    for address in [&daemon.tcp, &daemon.unix] {
        let whole = address.post("/api/generate", &body).expect(200);
        assert_eq!(whole["response"], text);
        assert_eq!((&whole["model"], &whole["done"]), (&json!("tiny"), &json!(true)));
    }
}

#[test]
fn chat_says_the_same_streamed_and_whole_and_like_openai() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let mut body = json!({"model": "tiny", "messages": user("hello"), "options": options(12)});
    let (text, last) = joined(&daemon.tcp.post("/api/chat", &body), "/message/content");
    assert_eq!((&last["done_reason"], &last["eval_count"]), (&json!("length"), &json!(12)));
    body["stream"] = false.into();
    let whole = daemon.tcp.post("/api/chat", &body).expect(200);
    assert_eq!(whole["message"], json!({"role": "assistant", "content": text}));

    let mut body = json!({"model": "tiny", "messages": user("hello"), "max_tokens": 12,
                          "temperature": 0, "seed": 1});
    let whole = daemon.tcp.post("/v1/chat/completions", &body).expect(200);
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["content"], text);
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    assert_eq!(whole["usage"]["prompt_tokens"], last["prompt_eval_count"]);

    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let streamed = daemon.tcp.post("/v1/chat/completions", &body);
    assert_eq!(streamed.field("content-type"), Some("text/event-stream"));
    let events = streamed.text();
    let mut events: Vec<&str> =
        events.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(events.pop(), Some("[DONE]"));
    let chunks: Vec<Value> =
        events.iter().map(|event| serde_json::from_str(event).expect(event)).collect();
    let said: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(said, text);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(chunks.iter().any(|chunk| chunk["choices"][0]["finish_reason"] == "length"));
    assert_eq!(chunks.last().expect("chunks")["usage"]["completion_tokens"], 12);
}

#[test]
fn models_are_listed_in_both_surfaces() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    home.put_golden("me/other:v1", "gemma3-q5_0.gguf");
    let daemon = Daemon::start(&home);
    let tags = daemon.tcp.get("/api/tags").expect(200);
    let names = |list: &Value, key: &str| {
        let list = list.as_array().expect("a list");
        let mut names: Vec<String> =
            list.iter().map(|entry| entry[key].as_str().expect("a name").to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&tags["models"], "name"), ["me/other:v1", "tiny:latest"]);
    let models = daemon.tcp.get("/v1/models").expect(200);
    assert_eq!(names(&models["data"], "id"), ["me/other:v1", "tiny:latest"]);
    let show = daemon.tcp.post("/api/show", &json!({"model": "tiny"})).expect(200);
    assert_eq!(show["details"]["family"], "llama");
    assert_eq!(show["capabilities"], json!(["completion"]));
}

#[test]
fn answers_run_side_by_side_and_stay_their_own() {
    let home = Home::new();
    home.put_golden("one", TINY);
    home.put_golden("two", "gemma3-q5_0.gguf");
    let daemon = Daemon::start(&home);
    let ask = |name: &str, prompt: &str| {
        let body = json!({"model": name, "prompt": prompt, "options": options(24)});
        daemon.generate(&body)["response"].as_str().expect("text").to_owned()
    };
    let questions = [("one", "the sea"), ("two", "the sea"), ("one", "a hill"), ("two", "a hill")];
    let alone = questions.map(|(name, prompt)| ask(name, prompt));
    assert_ne!(alone[0], alone[2], "the prompt matters");
    thread::scope(|scope| {
        let together = questions.map(|(name, prompt)| scope.spawn(move || ask(name, prompt)));
        for (answer, alone) in together.into_iter().zip(&alone) {
            assert_eq!(&answer.join().expect("no panic"), alone);
        }
    });
    assert_eq!(daemon.loaded().len(), 2);
}

#[test]
fn a_client_that_hangs_up_frees_its_place() {
    let home = Home::new();
    home.put_endless("tiny");
    let limits = [("V4_SLOTS", "1"), ("V4_MAX_QUEUE", "1"), ENDLESS];
    let daemon = Daemon::start_with(&home, &limits);
    let long = json!({"model": "tiny", "prompt": "hi", "options": options(-1)});
    for _ in 0..8 {
        let mut stream = daemon.tcp.stream("/api/generate", &long);
        assert!(stream.json().is_some_and(|line| line["done"] == false));
    }
    let short = json!({"model": "tiny", "prompt": "hi", "options": options(1), "stream": false});
    until("a free place", || {
        (daemon.tcp.post("/api/generate", &short).status == 200).then_some(())
    });
}

#[test]
fn a_prompt_beyond_the_context_is_refused_and_an_answer_ends_at_its_edge() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let text = "word ".repeat(5000);
    let mut raw = json!({"model": "tiny", "prompt": text, "raw": true, "stream": false});
    let refused = daemon.tcp.post("/api/generate", &raw);
    assert!(refused.error(400).contains("context"), "{}", refused.text());
    let chat = json!({"model": "tiny", "messages": user(&text), "truncate": false});
    assert!(daemon.tcp.post("/api/chat", &chat).error(400).contains("context"));
    let openai = json!({"model": "tiny", "messages": user(&text)});
    assert!(daemon.tcp.post("/v1/chat/completions", &openai).error(400).contains("context"));

    raw["prompt"] = "hi".into();
    raw["options"] = json!({"num_ctx": 64, "num_predict": -1, "temperature": 0});
    let edge = daemon.generate(&raw);
    let tokens = |key: &str| edge[key].as_u64().expect("a count");
    assert!(tokens("prompt_eval_count") + tokens("eval_count") <= 64, "{edge}");
    assert!(["length", "stop"].contains(&edge["done_reason"].as_str().unwrap_or("")), "{edge}");
}

#[test]
fn stop_strings_end_an_answer_and_are_not_part_of_it() {
    let home = Home::new();
    home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let mut body = json!({"model": "tiny", "prompt": "hello", "options": options(24)});
    let whole = daemon.generate(&body)["response"].as_str().expect("text").to_owned();
    let cut: String = whole.chars().skip(6).take(3).collect();
    let at = whole.find(&cut).expect("taken from it");
    body["options"]["stop"] = json!([cut]);
    let stopped = daemon.generate(&body);
    assert_eq!(stopped["response"], whole[..at]);
    assert_eq!(stopped["done_reason"], "stop");
}

/// A conversation of several turns, and its request with a cap on the context.
fn long_chat(num_ctx: u32) -> Value {
    let turn =
        |role: &str, n: u32| json!({"role": role, "content": format!("turn {n} ").repeat(8)});
    let mut turns: Vec<Value> =
        (0..8).flat_map(|n| [turn("user", n), turn("assistant", n)]).collect();
    turns.push(json!({"role": "user", "content": "and now?"}));
    json!({"model": "tiny", "messages": turns, "stream": false,
           "options": {"num_predict": 2, "num_ctx": num_ctx}})
}

#[test]
fn a_cap_on_the_context_is_one_requests_own_and_never_silent() {
    let home = Home::new();
    let weights = home.put_golden("tiny", TINY);
    let daemon = Daemon::start(&home);
    let ask = |num_ctx| daemon.tcp.post("/api/chat", &long_chat(num_ctx)).expect(200);
    let whole = ask(100_000);
    let runner = daemon.runner(&weights);
    let figures = |answer: &Value| {
        let count = |name: &str| answer[name].as_u64().unwrap_or(0);
        (count("prompt_eval_count"), count("prompt_dropped_count"))
    };
    let (sent, none) = figures(&whole);
    assert!(sent > 150 && none == 0, "{whole}");
    let (kept, dropped) = figures(&ask(128));
    assert!(kept < 128 && dropped > 0, "{kept} {dropped}");
    assert_eq!(kept + dropped, sent, "what was sent is kept or told");
    assert_eq!(figures(&ask(100_000)), (sent, 0));
    // No cap has the model loaded again.
    assert_eq!(daemon.runner(&weights), runner);
    assert!(daemon.stop().success());

    let daemon = Daemon::start_with(&home, &[("V4_TRUNCATE", "off")]);
    let refused = daemon.tcp.post("/api/chat", &long_chat(128));
    let message = refused.error(400);
    assert!(message.contains(&sent.to_string()) && message.contains("128"), "{message}");
    daemon.tcp.post("/api/chat", &long_chat(100_000)).expect(200);
}

#[test]
fn who_waits_is_answered_before_who_does_not() {
    let home = Home::new();
    home.put_endless("tiny");
    let daemon = Daemon::start_with(&home, &[ENDLESS, ("V4_SLOTS", "1")]);
    let mut options = options(-1);
    options["lane"] = json!("background");
    let body = json!({"model": "tiny", "prompt": "hello", "options": options});
    let mut patient = daemon.tcp.stream("/api/generate", &body);
    assert!(patient.json().is_some_and(|line| line["done"] == false), "it runs");
    // The only place is taken, by somebody who can wait; without lanes this would take minutes.
    let urgent = json!({"model": "tiny", "prompt": "hello", "options": {"num_predict": 8}});
    assert_eq!(daemon.generate(&urgent)["eval_count"], 8);
    assert!(patient.json().is_some_and(|line| line["done"] == false), "and goes on");
}
