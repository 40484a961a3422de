//! The service without a socket: requests in, answers out, on a home with models and a runner that
//! does as its prompt says.

use std::{pin::Pin, task::Poll};

use http_body_util::{BodyExt, Full};
use hyper::body::Frame;
use serde_json::{Value, json};
use v4_proto::Ability;
use v4_store::Role;

use super::*;
use crate::{fixture::Fixture, keys::Keys};

/// An answer, read to its end.
struct Read {
    status: u16,
    content_type: String,
    text: String,
    headers: http::HeaderMap,
}

impl Read {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).expect(&self.text)
    }

    fn lines(&self) -> Vec<Value> {
        self.text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
    }
}

fn fixture() -> Fixture {
    Fixture::new(Duration::from_millis(100))
}

/// A home with `m`, which can complete and call tools, with parameters, a system text and more.
fn stocked() -> Fixture {
    let fixture = fixture();
    let roles = [
        (Role::Params, r#"{"temperature":0.3,"num_ctx":512,"stop":["<end>","\"x\""]}"#),
        (Role::System, "Be kind."),
        (
            Role::Messages,
            r#"[{"role":"user","content":"first"},{"role":"assistant","content":"yes"}]"#,
        ),
        (Role::License, "Apache"),
        (Role::Template, "{{ .Prompt }}"),
    ];
    fixture.store("m", &[Ability::Completion, Ability::Tools], &roles);
    fixture
}

async fn read(response: Response<Body>) -> Read {
    let (head, body) = response.into_parts();
    let bytes = body.collect().await.expect("a body never fails").to_bytes();
    let content_type = head.headers.get(header::CONTENT_TYPE).map(|value| value.to_str());
    Read {
        status: head.status.as_u16(),
        content_type: content_type.unwrap_or(Ok("")).expect("text").to_owned(),
        text: String::from_utf8(bytes.to_vec()).expect("UTF-8"),
        headers: head.headers,
    }
}

async fn ask(fixture: &Fixture, method: &str, path: &str, body: impl Into<Bytes>) -> Read {
    let request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
    let request = request.body(Full::new(body.into())).expect("a request");
    read(fixture.service.respond(request, true).await).await
}

async fn post(fixture: &Fixture, path: &str, body: &Value) -> Read {
    ask(fixture, "POST", path, body.to_string()).await
}

/// What a runner was asked, by way of the prompt `echo`.
async fn echoed(fixture: &Fixture, path: &str, body: &Value) -> Value {
    let answer = post(fixture, path, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let answer = answer.json();
    let text = answer["response"].as_str();
    let text = text.or(answer["message"]["content"].as_str());
    let text = text.or(answer["choices"][0]["message"]["content"].as_str());
    serde_json::from_str(text.expect("a text")).expect("the request")
}

#[tokio::test]
async fn how_urgent_a_request_is_comes_from_it_or_from_its_header() {
    let fixture = stocked();
    let turn = json!([{"role": "user", "content": "echo"}]);
    let chat = json!({"model": "m", "messages": turn, "stream": false});
    let with = |key: &str, value: Value| {
        let mut body = chat.clone();
        body[key] = value;
        body
    };
    let options = || with("options", json!({"lane": "background"}));
    for (path, body, lane) in [
        ("/api/chat", chat.clone(), "interactive"),
        ("/api/chat", options(), "background"),
        ("/v1/chat/completions", options(), "background"),
        ("/v1/chat/completions", with("service_tier", json!("flex")), "background"),
        ("/v1/chat/completions", with("service_tier", json!("auto")), "interactive"),
    ] {
        assert_eq!(echoed(&fixture, path, &body).await["lane"], lane, "{path} {body}");
    }
    // The header comes first.
    let headed = async |path: &str, lane: &str, body: &Value| {
        let request = Request::builder().method("POST").uri(path).header(header::HOST, "localhost");
        let request = request.header("x-v4-lane", lane);
        let request = request.body(Full::new(body.to_string().into())).expect("a request");
        read(fixture.service.respond(request, true).await).await
    };
    for path in ["/api/chat", "/v1/chat/completions"] {
        let answer = headed(path, "interactive", &options()).await;
        assert!(answer.text.contains(r#"\"lane\":\"interactive\""#), "{}", answer.text);
        let answer = headed(path, "background", &chat).await;
        assert!(answer.text.contains(r#"\"lane\":\"background\""#), "{}", answer.text);
        let answer = headed(path, "slow", &chat).await;
        assert_eq!(answer.status, 400);
        assert!(answer.text.contains("x-v4-lane must be interactive or background"));
    }
}

async fn until_none_is_loaded(fixture: &Fixture) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while ask(fixture, "GET", "/api/ps", "").await.json() != json!({"models": []}) {
        assert!(Instant::now() < deadline, "a model stays");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_daemon_says_that_it_is_there() {
    let fixture = fixture();
    for method in ["GET", "HEAD"] {
        let answer = ask(&fixture, method, "/", "").await;
        assert_eq!((answer.status, answer.text.as_str()), (200, "Ollama is running"));
    }
    let answer = ask(&fixture, "HEAD", "/api/version", "").await;
    assert_eq!(answer.json()["version"], "0.34.0");
    assert_eq!(answer.json()["v4"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(ask(&fixture, "GET", "/api/tags", "").await.json(), json!({"models": []}));
    assert_eq!(ask(&fixture, "GET", "/api/ps", "").await.json(), json!({"models": []}));
}

#[tokio::test]
async fn wrong_paths_and_methods_are_told_apart() {
    let fixture = fixture();
    let answer = ask(&fixture, "GET", "/api/nothing", "").await;
    assert_eq!((answer.status, answer.text.as_str()), (404, "404 page not found"));
    let answer = ask(&fixture, "GET", "/api/chat", "").await;
    assert_eq!(answer.status, 405);
    assert_eq!(answer.headers[header::ALLOW], "POST");
    let answer = ask(&fixture, "POST", "/api/tags", "").await;
    assert_eq!(answer.status, 405);
    assert_eq!(answer.headers[header::ALLOW], "GET, HEAD");
}

#[tokio::test]
async fn the_guard_stands_before_the_routes() {
    let fixture = fixture();
    let request = |host: &str, method: &str| {
        let request = Request::builder().method(method).uri("/").header(header::HOST, host);
        request.body(Full::new(Bytes::new())).expect("a request")
    };
    let response = fixture.service.respond(request("evil.example", "GET"), true).await;
    assert_eq!(response.status(), 403);
    let response = fixture.service.respond(request("evil.example", "GET"), false).await;
    assert_eq!(response.status(), 200);
    let response = fixture.service.respond(request("localhost", "OPTIONS"), true).await;
    assert_eq!(response.status(), 204);
}

#[tokio::test]
async fn stored_models_are_listed_in_both_dialects() {
    let fixture = stocked();
    let answer = ask(&fixture, "GET", "/api/tags", "").await;
    assert_eq!(answer.content_type, "application/json; charset=utf-8");
    let models = answer.json();
    let model = &models["models"][0];
    assert_eq!((&model["name"], &model["model"]), (&json!("m:latest"), &json!("m:latest")));
    assert_eq!(model["digest"].as_str().map(str::len), Some(64));
    assert_eq!(model["capabilities"], json!(["completion", "tools"]));
    let details = json!({
        "parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"],
        "parameter_size": "134.52M", "quantization_level": "Q4_1",
        "context_length": 2048, "embedding_length": 576
    });
    assert_eq!(model["details"], details);
    let answer = ask(&fixture, "GET", "/v1/models", "").await.json();
    assert_eq!(answer["object"], "list");
    assert_eq!(answer["data"][0]["id"], "m:latest");
    assert_eq!(answer["data"][0]["owned_by"], "library");
    assert!(answer["data"][0]["created"].as_i64().expect("seconds") > 1_600_000_000);
    for path in ["/v1/models/m", "/v1/models/m%3Alatest", "/v1/models/library%2fm"] {
        let one = ask(&fixture, "GET", path, "").await;
        assert_eq!(one.json(), answer["data"][0], "{path}");
    }
    assert_eq!(ask(&fixture, "GET", "/v1/models/%ff%3", "").await.status, 400);
    let answer = ask(&fixture, "GET", "/v1/models/hf.co/who/what:Q4", "").await;
    assert_eq!(answer.status, 404);
    assert_eq!(answer.json()["error"]["message"], "model 'hf.co/who/what:Q4' not found");
}

#[tokio::test]
async fn show_says_what_clients_parse() {
    let fixture = stocked();
    let answer = post(&fixture, "/api/show", &json!({"name": "m"})).await.json();
    assert_eq!(answer, post(&fixture, "/api/show", &json!({"model": "M"})).await.json());
    let line = |name: &str, value: &str| format!("{name:<30} {value}");
    let parameters = [
        line("temperature", "0.3"),
        line("num_ctx", "512"),
        line("stop", "\"<end>\""),
        line("stop", r#""\"x\"""#),
    ];
    assert_eq!(answer["parameters"], parameters.join("\n"));
    assert_eq!(answer["model_info"]["llama.context_length"], 2048);
    assert_eq!(answer["model_info"]["general.parameter_count"], 134_515_008);
    assert!(answer["model_info"].get("tokenizer.chat_template").is_none());
    assert!(answer["model_info"].get("general.name").is_none());
    assert_eq!(answer["capabilities"], json!(["completion", "tools"]));
    assert_eq!((&answer["license"], &answer["system"]), (&json!("Apache"), &json!("Be kind.")));
    assert_eq!(answer["template"], "{% for m in messages %}{% endfor %}");
    assert_eq!(answer["tensors"][0]["type"], "Q8_0");
    assert!(answer["warnings"][0].as_str().expect("a text").contains("Go's template language"));
    let text = answer["modelfile"].as_str().expect("a text");
    let modelfile = v4_modelfile::Modelfile::parse(text).expect("a Modelfile");
    assert!(modelfile.from().contains("/blobs/sha256-"), "{text}");
    assert_eq!(modelfile.system(), Some("Be kind."));
    assert_eq!((modelfile.parameters().count(), modelfile.messages().count()), (4, 2));
}

#[tokio::test]
async fn a_removed_model_is_gone() {
    let fixture = stocked();
    post(&fixture, "/api/generate", &json!({"model": "m", "keep_alive": -1})).await;
    let answer = ask(&fixture, "DELETE", "/api/delete", r#"{"model":"m"}"#).await;
    assert_eq!((answer.status, answer.text.as_str()), (200, ""));
    let answer = ask(&fixture, "DELETE", "/api/delete", r#"{"name":"m"}"#).await;
    assert_eq!(answer.status, 404);
    assert_eq!(answer.json(), json!({"error": "model 'm' not found", "code": "not_found"}));
    assert_eq!(ask(&fixture, "GET", "/api/tags", "").await.json(), json!({"models": []}));
    until_none_is_loaded(&fixture).await;
}

#[tokio::test]
async fn a_model_that_is_not_there_is_named_as_it_was_asked_for() {
    let fixture = fixture();
    for (path, body) in [
        ("/api/generate", json!({"model": "Nope", "prompt": "Hi"})),
        ("/api/chat", json!({"model": "Nope", "messages": [{"role": "user", "content": "Hi"}]})),
        ("/api/show", json!({"model": "Nope"})),
    ] {
        let answer = post(&fixture, path, &body).await;
        assert_eq!(
            (answer.status, &answer.json()["error"]),
            (404, &json!("model 'Nope' not found"))
        );
    }
    let body = json!({"model": "Nope", "messages": [{"role": "user", "content": "Hi"}]});
    let answer = post(&fixture, "/v1/chat/completions", &body).await;
    assert_eq!((answer.status, answer.content_type.as_str()), (404, "application/json"));
    assert_eq!(answer.json()["error"]["type"], "not_found_error");
}

#[tokio::test]
async fn abilities_are_asked_for_before_a_load() {
    let fixture = stocked();
    fixture.store("vectors", &[Ability::Embedding], &[]);
    let turn = json!([{"role": "user", "content": "Hi"}]);
    for (path, body, words) in [
        (
            "/api/generate",
            json!({"model": "vectors", "prompt": "x"}),
            "\"vectors\" does not support generate",
        ),
        (
            "/api/chat",
            json!({"model": "vectors", "messages": turn}),
            "\"vectors\" does not support chat",
        ),
        (
            "/api/chat",
            json!({"model": "m", "messages": turn, "think": true}),
            "\"m\" does not support thinking",
        ),
    ] {
        let answer = post(&fixture, path, &body).await;
        assert_eq!((answer.status, &answer.json()["error"]), (400, &json!(words)), "{body}");
    }
    fixture.store("plain", &[Ability::Completion], &[]);
    let body = json!({"model": "plain", "messages": turn, "tools": [{"function": {"name": "f"}}]});
    let answer = post(&fixture, "/api/chat", &body).await;
    let words = "registry.ollama.ai/library/plain:latest does not support tools";
    assert_eq!((answer.status, &answer.json()["error"]), (400, &json!(words)));
    let body = json!({"model": "m", "messages": turn, "think": false, "stream": false});
    assert_eq!(post(&fixture, "/api/chat", &body).await.status, 200);
}

#[tokio::test]
async fn bad_bodies_are_refused_in_the_words_of_the_surface() {
    let fixture = fixture();
    for path in ["/api/generate", "/api/chat", "/api/show", "/api/pull", "/v1/chat/completions"] {
        for body in ["", "{", "[]", "null", "nonsense", &"[".repeat(100_000), "{\"model\":7}"] {
            let answer = ask(&fixture, "POST", path, body.to_owned()).await;
            assert_eq!(answer.status, 400, "{path}");
            let error = &answer.json()["error"];
            assert_eq!(error.is_object(), path.starts_with("/v1/"), "{path}: {error}");
        }
    }
    let answer = ask(&fixture, "POST", "/api/chat", "").await;
    assert_eq!(answer.json()["error"], "missing request body");
}

#[tokio::test]
async fn a_body_has_its_limit() {
    let fixture = stocked();
    let body = |n_bytes: usize| {
        let start = br#"{"model":"m","prompt":"Hi","stream":false,"x":""#;
        let mut bytes = start.to_vec();
        bytes.resize(n_bytes - 2, b'a');
        bytes.extend(b"\"}");
        bytes
    };
    let answer = ask(&fixture, "POST", "/api/generate", body(limits::BODY_BYTES)).await;
    assert_eq!((answer.status, &answer.json()["response"]), (200, &json!("Hello")));
    let answer = ask(&fixture, "POST", "/api/generate", body(limits::BODY_BYTES + 1)).await;
    assert_eq!(answer.status, 413);
    assert_eq!(answer.json()["error"], "the request body has more than 32 MiB");
}

#[tokio::test]
async fn a_large_body_leaves_its_room_before_its_answer() {
    let fixture = stocked();
    let padded = |body: &Value| {
        let mut bytes = body.to_string().into_bytes();
        bytes.resize(limits::LARGE_BODY_BYTES + 1, b' ');
        bytes
    };
    for path in ["/api/chat", "/v1/chat/completions"] {
        let messages = json!([{"role": "user", "content": "for ever"}]);
        let endless = padded(&json!({"model": "m", "messages": messages, "stream": false}));
        let waiting =
            (0..limits::LARGE_BODIES).map(|_| ask(&fixture, "POST", path, endless.clone()));
        let waiting = futures_util::future::join_all(waiting);
        let other = async {
            // All have been read when one of them has led to a load.
            while fixture.daemon.supervisor.ps().await.is_empty() {
                tokio::task::yield_now().await;
            }
            ask(&fixture, "POST", "/api/show", padded(&json!({"model": "missing"}))).await
        };
        tokio::select! {
            _ = waiting => panic!("an end of what is for ever"),
            other = other => assert_eq!(other.status, 404, "{path}"),
        }
        post(&fixture, "/api/generate", &json!({"model": "m", "keep_alive": 0})).await;
        until_none_is_loaded(&fixture).await;
    }
}

#[tokio::test]
async fn a_streamed_answer_is_lines() {
    let fixture = stocked();
    let answer = post(&fixture, "/api/generate", &json!({"model": "m", "prompt": "Hi"})).await;
    assert_eq!(answer.content_type, "application/x-ndjson");
    let lines = answer.lines();
    assert_eq!(lines.len(), 3, "{}", answer.text);
    assert_eq!((&lines[0]["response"], &lines[1]["response"]), (&json!("Hel"), &json!("lo")));
    let last = &lines[2];
    assert_eq!((&last["done"], &last["done_reason"]), (&json!(true), &json!("stop")));
    assert_eq!((&last["eval_count"], &last["prompt_eval_count"]), (&json!(2), &json!(9)));
    assert!(last["total_duration"].as_u64() >= last["load_duration"].as_u64());
    let body =
        json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "Hi"}]});
    let answer = post(&fixture, "/v1/chat/completions", &body).await;
    assert_eq!(answer.content_type, "text/event-stream");
    assert!(answer.text.ends_with("data: [DONE]\n\n"), "{}", answer.text);
    let ps = ask(&fixture, "GET", "/api/ps", "").await.json();
    assert_eq!(
        (&ps["models"][0]["name"], &ps["models"][0]["size"]),
        (&json!("m:latest"), &json!(4096))
    );
    assert_eq!(ps["models"][0]["state"], "ready");
}

#[tokio::test]
async fn the_models_own_settings_lie_under_the_requests() {
    let fixture = stocked();
    let body = json!({"model": "m", "prompt": "echo", "stream": false, "options": {"num_ctx": 99}});
    let request = echoed(&fixture, "/api/generate", &body).await;
    assert_eq!((&request["context"], &request["truncate"]), (&json!(99), &json!(true)));
    assert_eq!(request["stop"], json!(["<end>", "\"x\""]));
    let temperature = request["sampling"]["temperature"].as_f64().expect("a number");
    assert!((temperature - 0.3).abs() < 1e-6);
    let roles = |request: &Value| -> Vec<String> {
        let messages = request["input"]["messages"].as_array().expect("a list");
        messages.iter().map(|m| m["content"].as_str().expect("text").to_owned()).collect()
    };
    assert_eq!(roles(&request), ["Be kind.", "first", "yes", "echo"]);
    let body = json!({"model": "m", "prompt": "echo", "stream": false, "system": "Be rude."});
    let request = echoed(&fixture, "/api/generate", &body).await;
    assert_eq!(roles(&request), ["Be rude.", "first", "yes", "echo"]);
    // OpenAI's defaults lie under the model's own.
    let turn = json!([{"role": "user", "content": "echo"}]);
    let body = json!({"model": "m", "messages": turn, "max_completion_tokens": 3});
    let request = echoed(&fixture, "/v1/chat/completions", &body).await;
    let temperature = request["sampling"]["temperature"].as_f64().expect("a number");
    assert!((temperature - 0.3).abs() < 1e-6);
    assert_eq!((&request["sampling"]["top_p"], &request["max_tokens"]), (&json!(1.0), &json!(3)));
    fixture.store("bare", &[Ability::Completion], &[]);
    let turns = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "echo"}]);
    let body = json!({"model": "bare", "messages": turns, "stream": false});
    let request = echoed(&fixture, "/api/chat", &body).await;
    assert_eq!(roles(&request), ["s", "echo"]);
    assert!((request["sampling"]["temperature"].as_f64().expect("a number") - 0.8).abs() < 1e-6);
    let body = json!({"model": "bare", "prompt": "echo", "raw": true, "stream": false});
    let request = echoed(&fixture, "/api/generate", &body).await;
    assert_eq!(request["input"], json!({"kind": "raw", "text": "echo"}));
}

#[tokio::test]
async fn failures_have_a_status_before_the_first_byte_and_a_line_after_it() {
    let fixture = stocked();
    let answer = post(&fixture, "/api/generate", &json!({"model": "m", "prompt": "fail"})).await;
    assert_eq!((answer.status, &answer.json()["error"]), (400, &json!("the runner refused")));
    let answer =
        post(&fixture, "/api/generate", &json!({"model": "m", "prompt": "fail late"})).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.lines()[1], json!({"error": "the runner refused", "code": "invalid"}));
    let body = json!({"model": "m", "prompt": "fail late", "stream": false});
    assert_eq!(post(&fixture, "/api/generate", &body).await.status, 400);
    let answer = post(&fixture, "/api/generate", &json!({"model": "m", "prompt": "die"})).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.lines()[1]["code"], "runner_died");
    let answer = post(&fixture, "/api/generate", &json!({"model": "m", "prompt": "Hi"})).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request() {
    let fixture = stocked();
    let body = json!({"model": "m", "prompt": "for ever"}).to_string();
    let request = Request::post("/api/generate").header(header::HOST, "localhost");
    let request = request.body(Full::new(Bytes::from(body))).expect("a request");
    let mut response = fixture.service.respond(request, true).await;
    let first = response.body_mut().frame().await.expect("a frame").expect("no error");
    assert!(first.is_data());
    drop(response);
    let question = json!({"model": "m", "prompt": "cancelled?", "stream": false});
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let answer = post(&fixture, "/api/generate", &question).await.json();
        if answer["response"] == "1" {
            break;
        }
        assert!(Instant::now() < deadline, "the runner never heard of it: {answer}");
    }
}

#[tokio::test]
async fn an_empty_prompt_loads_and_unloads() {
    let fixture = stocked();
    let unload = json!({"model": "m", "keep_alive": 0});
    let answer = post(&fixture, "/api/generate", &unload).await;
    assert_eq!((answer.status, &answer.json()["done_reason"]), (200, &json!("unload")));
    let answer = post(&fixture, "/api/chat", &json!({"model": "m", "keep_alive": -1})).await.json();
    assert_eq!(
        (&answer["done_reason"], &answer["message"]["content"]),
        (&json!("load"), &json!(""))
    );
    let ps = ask(&fixture, "GET", "/api/ps", "").await.json();
    assert!(ps["models"][0]["expires_at"].as_str().expect("a time") > "2300", "{ps}");
    post(&fixture, "/api/generate", &unload).await;
    until_none_is_loaded(&fixture).await;
}

#[tokio::test]
async fn tool_calls_reach_both_surfaces() {
    let fixture = stocked();
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "call"}],
        "tools": [{"type": "function", "function": {"name": "weather"}}], "stream": false});
    let answer = post(&fixture, "/api/chat", &body).await.json();
    let call = &answer["message"]["tool_calls"][0];
    assert_eq!(call["function"]["arguments"], json!({"town": "Ulm"}));
    body["messages"][0]["content"] = json!("call");
    let answer = post(&fixture, "/v1/chat/completions", &body).await.json();
    let call = &answer["choices"][0]["message"]["tool_calls"][0];
    assert_eq!(call["function"]["arguments"], r#"{"town":"Ulm"}"#);
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn a_pull_tells_each_step_once() {
    let fixture = fixture();
    fixture.put_on_shelf(&vec![7; 100_000]);
    let answer = post(&fixture, "/api/pull", &json!({"model": "shelf"})).await;
    assert_eq!(answer.content_type, "application/x-ndjson");
    let lines = answer.lines();
    let statuses: Vec<&str> = lines.iter().filter_map(|line| line["status"].as_str()).collect();
    assert_eq!(statuses[0], "pulling manifest");
    assert_eq!(
        statuses[statuses.len() - 3..],
        ["verifying sha256 digest", "writing manifest", "success"]
    );
    let file = lines.iter().rfind(|line| line.get("completed").is_some()).expect("a file's line");
    assert_eq!(file["completed"], 100_000, "{}", answer.text);
    assert_eq!(file["source"], "this machine");
    assert_eq!(file["overall"], json!({"total": 100_000, "completed": 100_000}));
    let tags = ask(&fixture, "GET", "/api/tags", "").await.json();
    assert_eq!(tags["models"][0]["name"], "shelf:latest");
    let again = post(&fixture, "/api/pull", &json!({"model": "shelf", "stream": false})).await;
    assert_eq!(again.json(), json!({"status": "success"}));
}

#[tokio::test]
async fn a_pull_that_cannot_be_says_so() {
    let fixture = fixture();
    let answer = post(&fixture, "/api/pull", &json!({"model": "unheard-of"})).await;
    assert_eq!(answer.status, 404);
    assert!(answer.json()["error"].as_str().expect("a text").contains("shelf"));
    // The shelf is empty: the file is missing.
    let answer = post(&fixture, "/api/pull", &json!({"model": "shelf"})).await;
    assert_eq!(answer.status, 200);
    let last = answer.lines().pop().expect("a line");
    assert!(last["error"].is_string(), "{}", answer.text);
    let answer = post(&fixture, "/api/pull", &json!({"model": "shelf", "stream": false})).await;
    assert!(answer.status >= 400, "{}", answer.text);
}

/// A body that sends a little and then does what it is told.
enum Odd {
    Stalls,
    Breaks,
    Panics,
}

impl HttpBody for Odd {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _context: &mut std::task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        match *self {
            Self::Stalls => Poll::Pending,
            Self::Breaks => Poll::Ready(Some(Err(std::io::ErrorKind::ConnectionReset.into()))),
            Self::Panics => panic!("as it was told"),
        }
    }
}

#[tokio::test]
async fn a_body_that_stalls_breaks_or_panics_costs_only_itself() {
    let fixture = fixture();
    for (odd, status) in [(Odd::Stalls, 408), (Odd::Breaks, 400), (Odd::Panics, 500)] {
        let request = Request::post("/api/chat").body(odd).expect("a request");
        let answer = read(fixture.service.respond(request, true).await).await;
        assert_eq!(answer.status, status, "{}", answer.text);
    }
    assert_eq!(ask(&fixture, "GET", "/", "").await.status, 200);
}

#[tokio::test]
async fn blobs_are_taken_once_and_only_whole() {
    let fixture = fixture();
    let bytes = b"some weights";
    let digest = v4_store::sha256(bytes);
    let path = format!("/api/blobs/{digest}");
    assert_eq!(ask(&fixture, "HEAD", &path, "").await.status, 404);
    let wrong = ask(&fixture, "POST", &path, "other weights").await;
    assert_eq!(wrong.status, 400);
    assert!(wrong.text.contains("digest mismatch, expected"), "{}", wrong.text);
    assert_eq!(ask(&fixture, "POST", &path, &bytes[..]).await.status, 201);
    assert_eq!(ask(&fixture, "POST", &path, &bytes[..]).await.status, 200);
    assert_eq!(ask(&fixture, "HEAD", &path, "").await.status, 200);
    let dashed = path.replace(':', "-");
    assert_eq!(ask(&fixture, "HEAD", &dashed, "").await.status, 200);
    assert_eq!(ask(&fixture, "HEAD", "/api/blobs/sha256:12", "").await.status, 400);
    assert_eq!(ask(&fixture, "GET", &path, "").await.status, 405);
}

#[tokio::test]
async fn a_copy_is_the_same_model_under_another_name() {
    let fixture = stocked();
    let body = json!({"source": "m", "destination": "me/mine:v2"});
    assert_eq!(post(&fixture, "/api/copy", &body).await.status, 200);
    let listed = ask(&fixture, "GET", "/api/tags", "").await.json();
    let digests: Vec<&Value> =
        listed["models"].as_array().expect("a list").iter().map(|one| &one["digest"]).collect();
    assert_eq!((digests.len(), digests[0]), (2, digests[1]));
    for (body, status, words) in [
        (json!({"source": "x", "destination": "y"}), 404, "model \"x\" not found"),
        (json!({"source": "a b", "destination": "y"}), 400, "source \"a b\" is invalid"),
        (json!({"source": "m"}), 400, "destination \"\" is invalid"),
    ] {
        let answer = post(&fixture, "/api/copy", &body).await;
        assert_eq!(answer.status, status, "{}", answer.text);
        assert_eq!(answer.json()["error"], words);
    }
}

#[tokio::test]
async fn a_model_is_made_of_another_one() {
    let fixture = stocked();
    let body = json!({"model": "mine", "from": "m", "system": "Be brief.",
        "parameters": {"temperature": 1, "top_k": 7}, "license": ["One", "Two"],
        "requires": "0.1.0"});
    let answer = post(&fixture, "/api/create", &body).await;
    let lines = answer.lines();
    assert_eq!(lines.last().expect("a line"), &json!({"status": "success"}), "{}", answer.text);
    let statuses: Vec<&str> = lines.iter().filter_map(|line| line["status"].as_str()).collect();
    assert!(statuses.iter().any(|line| line.starts_with("creating new layer sha256:")));
    assert_eq!(statuses[statuses.len() - 2], "writing manifest");
    let shown = post(&fixture, "/api/show", &json!({"model": "mine"})).await.json();
    assert_eq!((&shown["system"], &shown["license"]), (&json!("Be brief."), &json!("One\nTwo")));
    let parameters = shown["parameters"].as_str().expect("text");
    for (name, value) in [("temperature", "1"), ("top_k", "7"), ("num_ctx", "512")] {
        assert!(parameters.contains(&format!("{name:<30} {value}")), "{parameters}");
    }
    assert_eq!(shown["messages"].as_array().expect("a list").len(), 2, "inherited");
}

#[tokio::test]
async fn what_cannot_be_made_is_refused_before_the_first_line() {
    let fixture = stocked();
    let missing = json!({"x.gguf": v4_store::sha256(b"y").to_string()});
    for (body, status, words) in [
        (json!({"model": "n"}), 400, "neither 'from' or 'files' was specified"),
        (json!({"from": "m"}), 400, "model is required"),
        (json!({"model": "n", "from": "x"}), 404, "get it with `v4 pull x`"),
        (json!({"model": "n", "from": "m", "quantize": "q4_0"}), 400, "quantize is not supported"),
        (json!({"model": "n", "files": {"../x": "sha256:1"}}), 400, "names inside a folder"),
        (json!({"model": "n", "from": "m", "parameters": {"top_k": "x"}}), 400, "option \\\"top_k"),
        (json!({"model": "n", "files": missing}), 404, "upload it first"),
    ] {
        let answer = post(&fixture, "/api/create", &body).await;
        assert_eq!(answer.status, status, "{}", answer.text);
        assert!(answer.text.contains(words), "{}", answer.text);
    }
}

#[tokio::test]
async fn pulls_are_listed_and_their_rate_is_set() {
    let fixture = fixture();
    assert_eq!(
        ask(&fixture, "GET", "/api/pulls", "").await.json(),
        json!({"pulls": [], "limit_rate": null})
    );
    assert_eq!(post(&fixture, "/api/pulls", &json!({"limit_rate": "1M"})).await.status, 200);
    let listed = ask(&fixture, "GET", "/api/pulls", "").await.json();
    assert_eq!(listed["limit_rate"], 1 << 20);
    let answer = post(&fixture, "/api/pulls", &json!({"model": "m", "action": "pause"})).await;
    assert_eq!(answer.status, 404);
    assert_eq!(answer.json()["error"], "no pull of 'm:latest' is running");
    let answer = post(&fixture, "/api/push", &json!({"model": "nothing"})).await;
    assert_eq!(answer.status, 404);
}

/// A request for a part.
async fn part(fixture: &Fixture, path: &str, range: &str) -> Read {
    let request = Request::builder().uri(path).header(header::HOST, "localhost");
    let request = request.header(header::RANGE, range).body(Full::new(Bytes::new()));
    read(fixture.service.respond(request.expect("a request"), true).await).await
}

#[tokio::test]
async fn the_daemon_is_a_registry_that_is_only_read() {
    let fixture = stocked();
    let version = ask(&fixture, "GET", "/v2/", "").await;
    assert_eq!((version.status, version.text.as_str()), (200, "{}"));
    assert_eq!(version.headers["docker-distribution-api-version"], "registry/2.0");
    let manifest = ask(&fixture, "GET", "/v2/library/m/manifests/latest", "").await;
    assert_eq!(manifest.status, 200);
    let digest = v4_store::sha256(manifest.text.as_bytes());
    assert_eq!(manifest.headers["docker-content-digest"], digest.to_string());
    assert_eq!(manifest.content_type, manifest.json()["mediaType"]);
    for missing in ["library/other/manifests/latest", "a/b/c", "x/tags/list"] {
        let missing = ask(&fixture, "GET", &format!("/v2/{missing}"), "").await;
        assert_eq!(missing.status, 404, "{}", missing.text);
        assert!(missing.json()["errors"].is_array());
    }
    let layer = &manifest.json()["layers"][2];
    let path = format!("/v2/any/thing/blobs/{}", layer["digest"].as_str().expect("a digest"));
    let whole = ask(&fixture, "GET", &path, "").await;
    assert_eq!((whole.status, whole.text.as_str()), (200, "Be kind."));
    assert_eq!(whole.headers[header::CONTENT_LENGTH], "8");
    let some = part(&fixture, &path, "bytes=3-6").await;
    assert_eq!((some.status, some.text.as_str()), (206, "kind"));
    assert_eq!(some.headers[header::CONTENT_RANGE], "bytes 3-6/8");
    let none = part(&fixture, &path, "bytes=8-").await;
    assert_eq!(
        (none.status, &none.headers[header::CONTENT_RANGE]),
        (416, &"bytes */8".parse().unwrap())
    );
    let gone = format!("/v2/any/thing/blobs/{}", v4_store::sha256(b"not here"));
    assert_eq!(ask(&fixture, "GET", &gone, "").await.status, 404);
    // What is damaged is not sent.
    let damaged: v4_proto::Digest = layer["digest"].as_str().unwrap().parse().unwrap();
    let file = fixture.daemon.store.blob_path(&damaged);
    let fs: &dyn v4_store::fs::Fs = &v4_store::fs::RealFs;
    fs.set_mode(&file, 0o600).unwrap();
    std::io::Write::write_all(&mut fs.open(&file).unwrap(), b"Be cruel").unwrap();
    assert_eq!(ask(&fixture, "GET", &path, "").await.status, 500);
}

#[tokio::test]
async fn chains_are_told_of_what_is_here() {
    let fixture = fixture();
    let bytes = vec![7; 9 << 20];
    let digest = v4_store::sha256(&bytes);
    let path = format!("/api/chains/{digest}");
    assert_eq!(ask(&fixture, "GET", &path, "").await.status, 404);
    assert_eq!(ask(&fixture, "GET", "/api/chains/x", "").await.status, 400);
    assert_eq!(ask(&fixture, "POST", &format!("/api/blobs/{digest}"), bytes).await.status, 201);
    let request = Request::builder().uri(&path).body(Full::new(Bytes::new())).unwrap();
    let chain = fixture.service.respond(request, true).await;
    let chain = chain.into_body().collect().await.expect("a body never fails").to_bytes();
    assert_eq!(chain.len(), 32, "one whole part of 8 MiB");
}

#[tokio::test]
async fn every_route_wants_a_key_of_its_scope_and_refuses_in_its_own_words() {
    let open = |home: &std::path::Path| Keys::open(Some(&home.join("keys")), true).expect("none");
    let fixture = Fixture::with_keys(Duration::from_millis(100), open);
    let scopes = [Scope::Read, Scope::Use, Scope::Admin];
    let texts =
        scopes.map(|scope| fixture.daemon.keys.add(&scope.to_string(), scope).expect("a key"));
    for route in &ROUTES {
        let path = route.path.replace("{*path}", "x").replace("{*model}", "m");
        let path = path.replace("{digest}", "sha256:x");
        let ask = async |key: Option<&str>, is_tcp| {
            let request = Request::builder().method(&route.method).uri(&path);
            let request = match key {
                Some(key) => request.header("x-api-key", key),
                None => request.header(header::HOST, "localhost"),
            };
            let request = request.body(Full::new(Bytes::new())).expect("a request");
            read(fixture.service.respond(request, is_tcp).await).await
        };
        let is_open = route.scope == Scope::Open;
        let answer = ask(None, true).await;
        assert_eq!(answer.status != 401, is_open, "{} {}", route.method, path);
        if !is_open {
            let challenge = answer.headers[header::WWW_AUTHENTICATE].to_str().expect("text");
            let body = answer.json();
            let (scheme, message) = match route.surface {
                Surface::Ollama => ("Bearer", &body["error"]),
                Surface::OpenAi => ("Bearer", &body["error"]["message"]),
                Surface::Oci => ("Basic", &body["errors"][0]["message"]),
            };
            assert!(challenge.starts_with(scheme), "{path}: {challenge}");
            assert!(message.as_str().expect("a message").contains("wants a key"), "{body}");
        }
        for (scope, text) in scopes.iter().zip(&texts) {
            let is_refused = ask(Some(text), true).await.status == 403;
            let reaches = *scope >= route.scope.min(Scope::Admin);
            assert_eq!(is_refused, !reaches, "{scope} at {} {}", route.method, path);
        }
        assert!(![401, 403].contains(&ask(None, false).await.status), "the socket is open: {path}");
    }
}

#[tokio::test]
async fn keys_are_made_listed_and_removed() {
    let open = |home: &std::path::Path| Keys::open(Some(&home.join("keys")), false).expect("none");
    let fixture = Fixture::with_keys(Duration::from_millis(100), open);
    let owner = async |method: &str, body: Value| {
        let request = Request::builder().method(method).uri("/api/keys");
        let request = request.body(Full::new(body.to_string().into())).expect("a request");
        read(fixture.service.respond(request, false).await).await
    };
    let answer = post(&fixture, "/api/keys", &json!({"add": "a", "scope": "use"})).await;
    assert_eq!(answer.status, 401, "nobody locks the owner out over TCP");
    assert_eq!(ask(&fixture, "GET", "/api/tags", "").await.status, 200);
    let key = owner("POST", json!({"add": "a", "scope": "use"})).await.json();
    let key = key["key"].as_str().expect("a key").to_owned();
    let listed = owner("GET", Value::Null).await.json();
    assert_eq!(
        (&listed["keys"][0]["name"], &listed["keys"][0]["scope"]),
        (&json!("a"), &json!("use"))
    );
    assert!(!listed.to_string().contains(&key[3..]));
    assert_eq!(ask(&fixture, "GET", "/api/tags", "").await.status, 401);
    for (body, status) in [
        (json!({"add": "a", "scope": "use"}), 400),
        (json!({"add": "b", "scope": "all"}), 400),
        (json!({"add": "b"}), 400),
        (json!({"remove": "b"}), 404),
        (json!({"remove": "a"}), 200),
    ] {
        assert_eq!(owner("POST", body.clone()).await.status, status, "{body}");
    }
    assert_eq!(ask(&fixture, "GET", "/api/tags", "").await.status, 200);
}

#[tokio::test]
async fn a_plan_says_what_would_happen_and_why_says_what_did() {
    let fixture = stocked();
    let named = json!({"model": "m"});
    let plan = post(&fixture, "/api/plan", &named).await.json();
    assert_eq!((&plan["model"], &plan["outcome"]), (&json!("m:latest"), &json!("load")));
    let bytes = &plan["bytes"];
    let sum = ["weights", "kv", "scratch"].iter().filter_map(|part| bytes[part].as_u64()).sum();
    assert_eq!(bytes["total"].as_u64(), Some(sum));
    assert_eq!((&plan["is_measured"], &plan["loaded"]), (&json!(false), &json!([])));
    let why = post(&fixture, "/api/why", &named).await.json();
    assert_eq!(why, json!({"model": "m:latest", "decisions": []}));
    // A plan is only a plan.
    assert!(fixture.daemon.supervisor.ps().await.is_empty());

    post(&fixture, "/api/generate", &named).await;
    let plan = post(&fixture, "/api/plan", &named).await.json();
    assert_eq!((&plan["outcome"], &plan["is_measured"]), (&json!("serve"), &json!(true)));
    assert_eq!(plan["loaded"][0]["model"], "m:latest");
    let why = post(&fixture, "/api/why", &named).await.json();
    let what = |n: usize| why["decisions"][n]["what"].as_str().unwrap_or_default().to_owned();
    assert_eq!([what(0), what(1), what(2)], ["load", "ready", ""]);
    assert!(why["decisions"][0]["at"].as_str().is_some_and(|at| at.ends_with('Z')), "{why}");
    // Of a model that is gone there may be something to say; of a plan for it there is not.
    let gone = json!({"model": "gone"});
    assert_eq!(post(&fixture, "/api/plan", &gone).await.status, 404);
    assert_eq!(post(&fixture, "/api/why", &gone).await.json()["decisions"], json!([]));
}
