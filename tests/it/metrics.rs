//! `/metrics`: figures that a daemon makes by working.

#![expect(clippy::float_cmp, reason = "counts are whole numbers, which floats say exactly")]

use std::collections::BTreeMap;

use rustix::process::Signal;
use serde_json::json;
use v4_tests::daemon::Daemon;
use v4_tests::home::Home;
use v4_tests::process::{self, until};

const TINY: &str = "llama-q4_0.gguf";

/// Every line of the page as name with labels, and value.
fn figures(daemon: &Daemon) -> BTreeMap<String, f64> {
    let reply = daemon.tcp.get("/metrics");
    assert_eq!(reply.status, 200);
    assert_eq!(reply.field("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let text = reply.text();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let split = |line: &str| {
        let (name, value) = line.rsplit_once(' ').expect("a name and a value");
        (name.to_owned(), value.parse().expect("a number"))
    };
    lines.map(split).collect()
}

/// The figure of a model, by the metric's name and further labels.
#[track_caller]
fn of(figures: &BTreeMap<String, f64>, name: &str, model: &str, more: &str) -> f64 {
    let line = format!("{name}{{model_name=\"{model}\"{more}}}");
    *figures.get(&line).unwrap_or_else(|| panic!("no {line} in {figures:#?}"))
}

#[test]
fn what_a_daemon_does_is_counted() {
    let home = Home::new();
    home.put_golden("one", TINY);
    home.put_golden("two", "gemma3-q5_0.gguf");
    // One model at a time fits.
    let daemon = Daemon::start_with(&home, &[("V4_MEMORY", "140M")]);
    let before = figures(&daemon);
    assert_eq!(before["v4_memory_used_bytes"], 0.0);
    assert!(!before.keys().any(|line| line.contains("model_name")), "{before:#?}");

    let ask = |name: &str| {
        let options = json!({"num_predict": 5, "temperature": 0});
        json!({"model": name, "prompt": "hi", "raw": true, "options": options})
    };
    let (mut prompt, mut generated) = (0.0, 0.0);
    for name in ["one", "one", "two"] {
        let answer = daemon.generate(&ask(name));
        if name == "one" {
            prompt += answer["prompt_eval_count"].as_f64().expect("a count");
            generated += answer["eval_count"].as_f64().expect("a count");
        }
    }
    assert_eq!(daemon.tcp.get("/nowhere").status, 404);
    let after = figures(&daemon);
    let one = |name: &str, more: &str| of(&after, name, "one:latest", more);
    assert_eq!(one("vllm:prompt_tokens_total", ""), prompt);
    assert_eq!(one("vllm:generation_tokens_total", ""), generated);
    assert!(generated > 0.0, "{after:#?}");
    assert_eq!(one("v4_model_loads_total", ""), 1.0);
    assert_eq!(one("v4_model_load_seconds_count", ""), 1.0);
    assert_eq!(one("v4_model_unloads_total", ",reason=\"room\""), 1.0);
    assert_eq!(one("v4_model_unloads_total", ",reason=\"idle\""), 0.0);
    assert_eq!(one("v4_runner_deaths_total", ""), 0.0);
    assert_eq!(one("vllm:num_requests_running", ""), 0.0);
    assert_eq!(one("v4_model_loaded_bytes", ""), 0.0);
    assert!(of(&after, "v4_model_loaded_bytes", "two:latest", "") > 0.0);
    assert_eq!(one("vllm:time_to_first_token_seconds_count", ""), 2.0);
    assert_eq!(one("vllm:time_to_first_token_seconds_bucket", ",le=\"+Inf\""), 2.0);
    assert!(one("vllm:time_to_first_token_seconds_sum", "") > 0.0);
    let ends = ["stop", "length", "abort"]
        .map(|end| one("vllm:request_success_total", &format!(",finished_reason=\"{end}\"")));
    assert_eq!((ends[0] + ends[1], ends[2]), (2.0, 0.0));
    let asked = |route: &str, status: u16, method: &str| {
        let labels = format!("method=\"{method}\",route=\"{route}\",status=\"{status}\"");
        after[&format!("v4_http_requests_total{{{labels}}}")]
    };
    assert_eq!(asked("/api/generate", 200, "POST"), 3.0);
    assert_eq!(asked("other", 404, "GET"), 1.0);
    assert!(after["v4_memory_used_bytes"] > 0.0 && after["v4_memory_budget_bytes"] > 1e8);
    assert!(after["v4_store_bytes{kind=\"models\"}"] > 0.0);
}

#[test]
fn a_running_answer_and_a_dead_runner_are_counted() {
    let home = Home::new();
    let weights = home.put_endless("tiny");
    let limits = [("V4_SLOTS", "1"), v4_tests::home::ENDLESS];
    let daemon = Daemon::start_with(&home, &limits);
    let ask = json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": -1}});
    let mut stream = daemon.tcp.stream("/api/generate", &ask);
    assert!(stream.json().is_some(), "it runs");
    let body = ask.to_string();
    let waiting = daemon.tcp.open_only("POST", "/api/generate", body.as_bytes());
    let figure = |name: &str| of(&figures(&daemon), name, "tiny:latest", "");
    until("a request that waits", || (figure("vllm:num_requests_waiting") == 1.0).then_some(()));
    assert_eq!(figure("vllm:num_requests_running"), 1.0);
    // The heartbeat brings what the runner alone knows.
    until("blocks in use", || (figure("v4_kv_blocks_used") > 0.0).then_some(()));
    assert!(figure("v4_kv_blocks") >= figure("v4_kv_blocks_used"));
    assert!(figure("vllm:kv_cache_usage_perc") > 0.0);
    assert!(figure("v4_engine_steps_total") > 0.0);
    assert!(figure("vllm:inter_token_latency_seconds_count") > 0.0);
    drop(waiting);
    until("an empty queue", || (figure("vllm:num_requests_waiting") == 0.0).then_some(()));
    process::signal(daemon.runner(&weights), Signal::KILL);
    until("a death", || (figure("v4_runner_deaths_total") == 1.0).then_some(()));
    until("a failed answer", || (figure("v4_answers_failed_total") == 1.0).then_some(()));
    assert_eq!(figure("v4_kv_blocks"), 0.0);
}
