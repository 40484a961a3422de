//! Settings of a real daemon: who said them, and what changes while it runs.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use rustix::process::Signal;
use serde_json::{Value, json};
use v4_tests::DEADLINE;
use v4_tests::daemon::Daemon;
use v4_tests::home::Home;
use v4_tests::process::{run, signal, until, v4};

fn write(home: &Home, text: &str) {
    fs::create_dir_all(home.path()).expect("a writable folder");
    fs::write(home.path().join("config.toml"), text).expect("a writable folder");
}

/// What `v4 config --json` says of a setting: value and source.
fn setting(home: &Home, key: &str) -> (Value, Value) {
    let said = run(&mut v4(home, &["config", "--json"]), "");
    let answer: Value = serde_json::from_str(said.success()).expect("JSON");
    let all = answer["settings"].as_array().expect("a list").clone();
    let one = all.into_iter().find(|one| one["key"] == key).expect("a setting");
    (one["value"].clone(), one["source"].clone())
}

#[test]
fn settings_say_where_they_come_from() {
    let home = Home::new();
    write(&home, "# mine\nslots = 3\npeers = 'http://v4-secret@box'\nthreads = 2\n");
    let variables = [("OLLAMA_KEEP_ALIVE", "7m"), ("OLLAMA_VULKAN", "1")];
    let daemon = Daemon::start_with(&home, &variables);
    assert_eq!(setting(&home, "slots"), (json!("3"), json!("file, line 2")));
    assert_eq!(setting(&home, "threads"), (json!("1"), json!("V4_THREADS")));
    assert_eq!(setting(&home, "keep_alive"), (json!("7m"), json!("OLLAMA_KEEP_ALIVE")));
    assert_eq!(setting(&home, "context"), (json!("8192"), json!("default")));
    assert_eq!(setting(&home, "peers"), (json!("…"), json!("file, line 3")));
    let page = run(&mut v4(&home, &["config"]), "");
    assert!(page.success().contains("OLLAMA_VULKAN=1 changes nothing here: models run on"));
    assert!(daemon.log().contains("OLLAMA_VULKAN"), "{}", daemon.log());
    drop(daemon);
    // A mistake keeps it from starting, and says where it is.
    write(&home, "slots = 3\nkeepalive = 5\n");
    let said = run(&mut v4(&home, &["serve"]), "");
    let error = said.failure(1);
    assert!(error.contains("config.toml, line 2: ") && error.contains("'keep_alive'?"), "{error}");
}

#[test]
fn what_can_change_changes_without_a_restart() {
    let home = Home::new();
    home.put_golden("tiny", "llama-q4_0.gguf");
    write(&home, "keep_alive = '1h'\n");
    let daemon = Daemon::start(&home);
    let asks = |origin: &str| {
        daemon.tcp.request_with(&format!("Origin: {origin}\r\n"), "GET", "/api/tags", b"").status
    };
    let ask = json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": 2}});
    assert_eq!(asks("https://a.example"), 403);
    daemon.generate(&ask);
    assert_eq!(daemon.loaded(), ["tiny:latest"]);

    write(&home, "keep_alive = 0\norigins = ['https://a.example']\nslots = 5\nkv_type = 'q8_0'\n");
    let said = run(&mut v4(&home, &["config", "--reload"]), "");
    assert_eq!(said.success(), "changed: keep_alive, slots, origins\nat the next start: kv_type\n");
    assert_eq!((asks("https://a.example"), asks("https://b.example")), (200, 403));
    assert_eq!(setting(&home, "slots"), (json!("5"), json!("file, line 3")));
    assert_eq!(setting(&home, "kv_type"), (json!("f16"), json!("default")));
    daemon.generate(&ask);
    until("the model to leave", || daemon.loaded().is_empty().then_some(()));

    // A mistake changes nothing.
    write(&home, "origins = []\nlog = 'loud'\n");
    let said = run(&mut v4(&home, &["config", "--reload"]), "");
    assert!(said.failure(1).contains("log in line 2 of "), "{said:?}");
    assert_eq!(asks("https://a.example"), 200);

    // By signal, and for one model alone.
    write(&home, "origins = ['https://b.example']\nlog = 'debug'\n[model.tiny]\nkeep_alive = -1\n");
    signal(daemon.pid(), Signal::HUP);
    until("the settings to be read", || (asks("https://b.example") == 200).then_some(()));
    let loaded = |answer: Value| answer["models"][0]["expires_at"].clone();
    daemon.generate(&ask);
    let for_ever = loaded(daemon.tcp.get("/api/ps").expect(200));
    assert!(for_ever.as_str().is_some_and(|at| &at[..3] > "210"), "{for_ever}");
    assert!(daemon.log().contains("DEBUG"), "the log says more now");
}

#[test]
fn rules_of_models_count_while_they_are_loaded() {
    let home = Home::new();
    home.put_golden("tiny", "llama-q4_0.gguf");
    let daemon = Daemon::start(&home);
    let ask = json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": 2}});
    daemon.generate(&ask);
    let context = || daemon.tcp.get("/api/ps").expect(200)["models"][0]["context_length"].clone();
    let trained = context();
    let reload = || run(&mut v4(&home, &["config", "--reload"]), "").success().to_owned();
    write(&home, "[model.tiny]\ncontext = 96\npin = true\n");
    assert_eq!(reload(), "changed: model\n");
    until("the model to be loaded again", || (context() == 96).then_some(()));
    assert_ne!(trained, 96);
    let why = run(&mut v4(&home, &["why", "tiny"]), "");
    assert!(why.success().contains("96 tokens of context"), "{why:?}");
    daemon.generate(&ask);
    // Less memory than it takes: it is pinned, then it is not.
    write(&home, "memory = '1M'\n[model.tiny]\ncontext = 96\npin = true\n");
    assert_eq!(reload(), "changed: memory\n");
    assert_eq!(daemon.loaded(), ["tiny:latest"]);
    write(&home, "memory = '1M'\n");
    assert_eq!(reload(), "changed: model\n");
    until("the model to leave", || daemon.loaded().is_empty().then_some(()));
    let refused = daemon.tcp.post("/api/generate", &ask).error(500);
    assert!(refused.contains("v4 may use 1 MiB"), "{refused}");
    write(&home, "memory = '4G'\nmax_queue = 0\n");
    assert_eq!(reload(), "changed: max_queue, memory\n");
    assert_eq!(daemon.generate(&ask)["done"], true);
}

#[test]
fn a_model_is_there_from_the_start() {
    let home = Home::new();
    home.put_golden("tiny", "llama-q4_0.gguf");
    write(&home, "[model.tiny]\npreload = true\n[model.gone]\npreload = true\n");
    let daemon = Daemon::start(&home);
    until("the model to load", || (daemon.loaded() == ["tiny:latest"]).then_some(()));
    until("the other to be named", || {
        daemon.log().contains("not loaded at the start").then_some(())
    });
}

#[test]
fn a_log_of_json_says_which_request_its_lines_belong_to() {
    let home = Home::new();
    let manifest = home.manifest("bad");
    fs::create_dir_all(manifest.parent().expect("a folder")).expect("a writable home");
    fs::write(manifest, "no manifest").expect("a writable home");
    let daemon = Daemon::start_with(&home, &[("V4_LOG_FORMAT", "json")]);
    daemon.tcp.get("/api/version").expect(200);
    let answer = daemon.tcp.post("/api/show", &json!({"model": "bad"}));
    assert_ne!(answer.status, 200);
    let id = answer.field("x-request-id").and_then(|text| text.parse::<u64>().ok());
    let id = id.expect("a number");
    let lines = until("the request's line", || {
        let log = daemon.log();
        // The last line may be half written.
        let whole = log.rsplit_once('\n').map(|(whole, _)| whole.to_owned()).unwrap_or_default();
        let lines: Vec<Value> =
            whole.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        lines.iter().any(|line| line["id"] == id).then_some(lines)
    });
    let own = lines.iter().find(|line| line["id"] == id).expect("just found");
    assert_eq!((&own["status"], &own["level"]), (&json!(answer.status), &json!("INFO")));
    assert!(own["message"] == "POST \"/api/show\"" && own["ms"].is_number(), "{own}");
    let within = lines.iter().find(|line| line["level"] == "WARN" && line["span"]["id"] == id);
    assert!(within.is_some_and(|line| line["message"] == "the store failed"), "{lines:?}");
}

/// A collector on a free port: its URL, and what it is sent: the head of the request, and spans.
fn collector() -> (String, Receiver<(String, Vec<Value>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let (sender, receiver) = sync_channel(16);
    thread::spawn(move || {
        for wire in listener.incoming().map_while(Result::ok) {
            let mut wire = BufReader::new(wire);
            let (mut line, mut length, mut head) = (String::new(), 0, String::new());
            while wire.read_line(&mut line).is_ok_and(|n| n > 2) {
                head.push_str(&line);
                if let Some(text) = line.to_lowercase().strip_prefix("content-length:") {
                    length = text.trim().parse().expect("a length");
                }
                line.clear();
            }
            let mut body = vec![0; length];
            wire.read_exact(&mut body).expect("a body");
            let body: Value = serde_json::from_slice(&body).expect("JSON");
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
            wire.get_mut().write_all(answer).expect("it listens");
            let spans = body["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().cloned();
            if sender.send((head, spans.expect("spans"))).is_err() {
                return;
            }
        }
    });
    (url, receiver)
}

#[test]
fn answers_are_traced_and_a_collector_that_is_not_there_costs_nothing_else() {
    let home = Home::new();
    home.put_golden("tiny", "llama-q4_0.gguf");
    let (url, sent) = collector();
    let daemon = Daemon::start_with(&home, &[("V4_OTLP", &url)]);
    let ask = json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": 3}});
    let answer = daemon.generate(&ask);
    let (_, spans) = sent.recv_timeout(DEADLINE).expect("spans");
    let names: Vec<&str> = spans.iter().filter_map(|span| span["name"].as_str()).collect();
    assert_eq!(names, ["text_completion tiny:latest", "load", "prefill", "decode"]);
    let fact = |key: &str| {
        let all = spans[0]["attributes"].as_array().expect("attributes");
        all.iter().find(|one| one["key"] == key).expect(key)["value"].clone()
    };
    assert_eq!(fact("gen_ai.request.model"), json!({"stringValue": "tiny:latest"}));
    let tokens = answer["eval_count"].to_string();
    assert_eq!(fact("gen_ai.usage.output_tokens"), json!({ "intValue": tokens }));
    let time = |span: &Value, key: &str| -> u64 {
        span[key].as_str().and_then(|text| text.parse().ok()).expect("nanoseconds")
    };
    let (start, end) = ("startTimeUnixNano", "endTimeUnixNano");
    for span in &spans[1..] {
        assert_eq!(span["parentSpanId"], spans[0]["spanId"]);
        assert_eq!(span["traceId"], spans[0]["traceId"]);
        assert!(time(span, start) >= time(&spans[0], start), "{spans:?}");
        assert!(time(span, end) <= time(&spans[0], end) && time(span, start) <= time(span, end));
    }
    assert_eq!(spans[0].get("parentSpanId"), None);
    drop(daemon);
    // Nobody listens there: answers come all the same, and what is lost is counted.
    let daemon = Daemon::start_with(&home, &[("V4_OTLP", "http://127.0.0.1:1")]);
    assert_eq!(daemon.generate(&ask)["done"], true);
    until("the loss to be counted", || {
        let page = daemon.tcp.get("/metrics").text();
        page.contains("\nv4_otlp_spans_dropped_total 4\n").then_some(())
    });
    assert!(daemon.log().contains("the collector takes no spans"), "{}", daemon.log());
}

#[test]
fn spans_belong_to_the_trace_of_who_asks_and_go_with_the_collectors_key() {
    let home = Home::new();
    home.put_golden("tiny", "llama-q4_0.gguf");
    let (url, sent) = collector();
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &*format!("{url}/otlp")),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%20secret"),
    ];
    let daemon = Daemon::start_with(&home, &variables);
    assert_eq!(setting(&home, "otlp_headers").0, json!("…"));
    let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let body = json!({"model": "tiny", "prompt": "hi", "stream": false, "max_tokens": 2});
    let ask = |flags: &str| {
        let lines = format!("traceparent: 00-{trace}-{span}-{flags}\r\ntracestate: a=1\r\n");
        let body = body.to_string();
        daemon.tcp.request_with(&lines, "POST", "/v1/completions", body.as_bytes()).expect(200)
    };
    // One that its own system does not keep is not told; the next one is.
    ask("00");
    let answer = ask("01");
    assert_eq!(answer["object"], "text_completion");
    let (head, spans) = sent.recv_timeout(DEADLINE).expect("spans");
    assert!(head.starts_with("POST /otlp/v1/traces ") && head.contains("api-key: a secret"));
    assert_eq!((&spans[0]["traceId"], &spans[0]["parentSpanId"]), (&json!(trace), &json!(span)));
    assert_eq!(spans[0]["traceState"], "a=1");
    for child in &spans[1..] {
        assert_eq!(
            (&child["traceId"], &child["parentSpanId"]),
            (&json!(trace), &spans[0]["spanId"])
        );
    }
    let n_roots = spans.iter().filter(|span| span["kind"] == 2).count();
    assert_eq!(n_roots, 1, "{spans:?}");
}

#[test]
fn a_collector_of_https_is_spoken_to_in_tls() {
    let home = Home::new();
    home.put_golden("tiny", "llama-q4_0.gguf");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("https://{}", listener.local_addr().expect("bound"));
    let daemon = Daemon::start_with(&home, &[("V4_OTLP", &url), ("V4_OTLP_HEADERS", "k=secret")]);
    daemon.generate(&json!({"model": "tiny", "prompt": "hi", "options": {"num_predict": 1}}));
    if daemon.log().contains("no certificates") {
        println!("skipped: this machine has no certificates");
        return;
    }
    let (mut wire, _) = listener.accept().expect("it comes");
    let mut first = [0; 3];
    wire.read_exact(&mut first).expect("a greeting");
    assert_eq!(first[..2], [22, 3], "a handshake of TLS");
    drop(wire);
    until("the loss to be counted", || {
        let page = daemon.tcp.get("/metrics").text();
        (!page.contains("\nv4_otlp_spans_dropped_total 0\n")).then_some(())
    });
}
