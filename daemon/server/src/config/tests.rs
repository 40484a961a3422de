use std::{path::Path, time::Duration};

use v4_store::fs;

use super::*;

fn load(given: &Given, set: &[(&str, &str)]) -> Result<Config, Error> {
    Config::load(given, |name| {
        set.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
    })
}

/// A home with this file of settings.
fn with_file(text: &str, set: &[(&str, &str)]) -> (tempfile::TempDir, Result<Config, Error>) {
    let home = tempfile::tempdir().expect("a folder");
    fs::replace_private(&home.path().join("config.toml"), text.as_bytes()).expect("written");
    let given = Given { home: Some(home.path().to_owned()), ..Given::default() };
    let config = load(&given, &[&[("HOME", "/u")], set].concat());
    (home, config)
}

fn source(config: &Config, key: &str) -> String {
    let at = SETTINGS.iter().position(|setting| setting.key == key).expect("a setting");
    config.origin.said[at].source.to_string()
}

#[test]
fn the_defaults_are_those_of_the_reference() {
    let config = load(&Given::default(), &[("HOME", "/u")]).expect("valid");
    assert_eq!(config.listen, Some(([127, 0, 0, 1], 11434).into()));
    assert_eq!(config.home, PathBuf::from("/u/.v4"));
    assert_eq!(config.socket, PathBuf::from("/u/.v4/v4.sock"));
    assert_eq!(config.keep_alive, KeepAlive::For(Duration::from_mins(5)));
    assert_eq!((config.slots, config.threads, config.max_queue), (2, 0, 512));
    assert_eq!((config.log_file, config.log), (None, LevelFilter::INFO));
    assert_eq!(config.log_format, LogFormat::Text);
    assert_eq!((config.registry, config.limit_rate), (None, None));
    assert_eq!((config.kv_disk, config.truncate), (Some(8 << 30), true));
    assert_eq!((config.memory, config.quota), (None, None));
    assert_eq!(config.auth_file, Some("/u/.docker/config.json".into()));
    assert_eq!(config.keys, Some("/u/.v4/keys".into()));
    assert!(config.origin.said.iter().all(|said| said.source == Source::Default));
    assert!(matches!(load(&Given::default(), &[]), Err(Error::NoHome)));
}

/// Every variable, set to something that is not its default, and the words that a file has.
const SET: &[(&str, &str)] = &[
    ("V4_LISTEN", "off"),
    ("V4_KEEP_ALIVE", "-1"),
    ("V4_CONTEXT", "2048"),
    ("V4_SLOTS", "7"),
    ("V4_THREADS", "3"),
    ("V4_KV_TYPE", "q8_0"),
    ("V4_PRECISION", "quality"),
    ("V4_KV_DISK", "off"),
    ("V4_TRUNCATE", "off"),
    ("V4_MAX_QUEUE", "9"),
    ("V4_MEMORY", "6GiB"),
    ("V4_INDEX_URL", "http://127.0.0.1:1"),
    ("V4_NPM_URL", "http://npm"),
    ("V4_REGISTRY", "http://m:5000/, https://r.example"),
    ("HF_ENDPOINT", "http://hub"),
    ("HF_TOKEN", "t"),
    ("V4_AUTH_FILE", "/a"),
    ("V4_OLLAMA_KEY", "/k"),
    ("V4_POLICY", "/p"),
    ("V4_PEERS", "http://10.0.0.2:11434, https://key@box/"),
    ("V4_LIMIT_RATE", "2M"),
    ("V4_QUOTA", "200G"),
    ("V4_QUOTA_EVICT", "on"),
    ("V4_KEYS", "off"),
    ("V4_ORIGINS", " https://a.example/, *"),
    ("V4_LOG", "debug"),
    ("V4_LOG_FORMAT", "json"),
    ("V4_OTLP", "http://otel:4318/"),
    ("V4_OTLP_HEADERS", "api-key=a%20b"),
    ("V4_LOG_FILE", "/l"),
];

fn assert_is_set(config: &Config) {
    assert_eq!((config.listen, config.keep_alive), (None, KeepAlive::Forever));
    assert_eq!((config.context, config.slots, config.threads), (2048, 7, 3));
    assert_eq!((config.kv_type, config.precision), (KvType::Q8_0, Precision::Quality));
    assert_eq!((config.kv_disk, config.truncate, config.max_queue), (None, false, 9));
    assert_eq!(config.memory, Some(6 << 30));
    let urls = [&config.index_url, &config.npm_url, &config.hf_endpoint, &config.hf_token];
    let urls = urls.map(|text| text.as_deref().expect("set"));
    assert_eq!(urls, ["http://127.0.0.1:1", "http://npm", "http://hub", "t"]);
    let registries = ["http://m:5000", "https://r.example"].map(str::to_owned);
    assert_eq!(config.registry.as_deref(), Some(&registries[..]));
    let paths = [&config.auth_file, &config.ollama_key, &config.policy, &config.log_file];
    let paths = paths.map(|path| path.as_deref().expect("set"));
    assert_eq!(paths, ["/a", "/k", "/p", "/l"].map(Path::new));
    assert_eq!(config.peers, ["http://10.0.0.2:11434", "https://key@box"]);
    assert_eq!(config.limit_rate, NonZeroU64::new(2 << 20));
    assert_eq!((config.quota, config.quota_evict), (Some(200 << 30), true));
    assert_eq!((&config.keys, config.log), (&None, LevelFilter::DEBUG));
    assert_eq!(config.log_format, LogFormat::Json);
    assert_eq!(config.otlp.as_deref(), Some("http://otel:4318"));
    assert_eq!(config.otlp_headers, [("api-key".to_owned(), "a b".to_owned())]);
    assert_eq!(config.origins, ["https://a.example", "*"]);
}

#[test]
fn every_variable_is_honoured_and_switches_come_first() {
    let all: Vec<&str> = SET.iter().map(|(name, _)| *name).collect();
    let known: Vec<&str> = SETTINGS.iter().map(|setting| setting.variable).collect();
    assert_eq!(all, known, "the test sets every variable, in the order of the list");
    let config = load(&Given::default(), &[SET, &[("V4_HOME", "/h")]].concat()).expect("valid");
    assert_is_set(&config);
    for (setting, said) in SETTINGS.iter().zip(&config.origin.said) {
        assert_eq!(said.source, Source::Variable(setting.variable));
    }
    let given = Given {
        home: Some("/g".into()),
        listen: Some("0.0.0.0:80".to_owned()),
        background: true,
        ..Given::default()
    };
    let config = load(&given, &[("V4_HOME", "/h"), ("V4_LISTEN", "1")]).expect("valid");
    assert_eq!(config.home, PathBuf::from("/g"));
    assert_eq!(config.listen, Some(([0, 0, 0, 0], 80).into()));
    assert_eq!(config.log_file, Some("/g/v4.log".into()));
    assert_eq!(source(&config, "listen"), "--listen");
}

#[test]
fn a_file_says_what_variables_say_in_the_same_words() {
    let lines: Vec<String> = SETTINGS
        .iter()
        .zip(SET)
        .map(|(setting, (_, words))| match setting.key {
            "context" | "slots" | "threads" | "max_queue" => format!("{} = {words}", setting.key),
            "quota_evict" => "quota_evict = true".to_owned(),
            "truncate" => "truncate = false".to_owned(),
            "origins" => "origins = [\"https://a.example/\", \"*\"]".to_owned(),
            key => format!("{key} = '{words}'"),
        })
        .collect();
    let (_home, config) = with_file(&lines.join("\n"), &[]);
    let config = config.expect("valid");
    assert_is_set(&config);
    assert_eq!(source(&config, "listen"), "file, line 1");
    assert_eq!(source(&config, "log_file"), format!("file, line {}", lines.len()));
}

#[test]
fn who_comes_first_is_switch_variable_file_ollama_default() {
    let ollama = [("OLLAMA_KEEP_ALIVE", "1h"), ("OLLAMA_NUM_PARALLEL", "5")];
    let (home, config) = with_file("# mine\nkeep_alive = 60\n", &ollama);
    let config = config.expect("valid");
    assert_eq!(config.keep_alive, KeepAlive::For(Duration::from_mins(1)));
    assert_eq!(source(&config, "keep_alive"), "file, line 2");
    assert_eq!((config.slots, source(&config, "slots").as_str()), (5, "OLLAMA_NUM_PARALLEL"));
    assert_eq!(source(&config, "threads"), "default");
    let given = Given { home: Some(home.path().to_owned()), ..Given::default() };
    let config = load(&given, &[&ollama[..], &[("V4_KEEP_ALIVE", "2m")]].concat());
    assert_eq!(source(&config.expect("valid"), "keep_alive"), "V4_KEEP_ALIVE");
    // No file, or another one.
    let config = load(&given, &[("V4_CONFIG", "off")]).expect("valid");
    assert_eq!(source(&config, "keep_alive"), "default");
    let other = home.path().join("other.toml");
    fs::replace_private(&other, b"slots = 9").expect("written");
    let config = load(&given, &[("V4_CONFIG", other.to_str().expect("text"))]).expect("valid");
    assert_eq!((config.slots, source(&config, "keep_alive").as_str()), (9, "default"));
}

#[test]
fn ollamas_variables_are_understood_or_named_with_a_reason() {
    let set = [
        ("HOME", "/u"),
        ("OLLAMA_HOST", "http://0.0.0.0"),
        ("OLLAMA_CONTEXT_LENGTH", "4096"),
        ("OLLAMA_MAX_QUEUE", "3"),
        ("OLLAMA_KV_CACHE_TYPE", "q4_0"),
        ("OLLAMA_ORIGINS", "https://a.example"),
        ("OLLAMA_DEBUG", "2"),
        ("OLLAMA_MODELS", "/m"),
        ("OLLAMA_MAX_LOADED_MODELS", "2"),
    ];
    let config = load(&Given::default(), &set).expect("nothing of another program stops v4");
    assert_eq!(config.listen, Some(([0, 0, 0, 0], 80).into()));
    assert_eq!((config.context, config.max_queue, config.log), (4096, 3, LevelFilter::TRACE));
    assert_eq!(config.origins, ["https://a.example"]);
    assert_eq!(config.kv_type, KvType::F16);
    let ignored: Vec<&str> = config.origin.ignored.iter().map(|one| one.variable).collect();
    assert_eq!(ignored, ["OLLAMA_MODELS", "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_KV_CACHE_TYPE"]);
    assert!(config.origin.ignored[2].why.ends_with("it must be f16, bf16 or q8_0"));
    for (name, set) in [("0.0.0.0", "0.0.0.0"), ("box:1", "box:1"), ("http://1.2.3.4:5", "")] {
        let expected = if set.is_empty() { name } else { set };
        assert_eq!(theirs::host(name), expected);
    }
}

#[test]
fn a_file_that_says_what_is_no_setting_is_refused_with_its_line() {
    for (text, line, words) in [
        ("\nkeep_alife = 5", 2, "no setting 'keep_alife'; did you mean 'keep_alive'?"),
        ("quota = ", 1, "config.toml, line 1"),
        ("slots = 1\nslots = 2", 2, "duplicate key"),
        ("slots = 2024-01-01", 1, "slots must be a text, a number"),
        ("[model.\"a b c\"]", 1, "no model's name"),
        ("[model.m]\npreload = 1", 2, "preload of the model 'm:latest' must be true or false"),
        ("[model.m]\nkeep_alive = \"soon\"", 2, "must be seconds or a duration"),
        ("[model.m]\npinn = true\n", 2, "there is no setting 'pinn'"),
        ("[model.m]\nslots = 0", 2, "slots of the model 'm:latest' must be a number above 0"),
        ("[model.m]\npriority = 200", 2, "must be a number from -128 to 127"),
        ("[model.m]\n[model.M]", 2, "two tables for the model"),
        ("model = 5", 1, "write a model as a table"),
    ] {
        let (_home, config) = with_file(text, &[]);
        let said = config.expect_err(text).to_string();
        assert!(said.contains(words) && said.contains(&format!("line {line}")), "{text}: {said}");
    }
    let (_home, config) = with_file("slots = 2\nkv_type = 'f32'", &[]);
    let said = config.expect_err("refused").to_string();
    assert!(said.starts_with("kv_type in line 2 of /") && said.contains("must be f16"), "{said}");
    let (_home, config) = with_file("policy = 'here.txt'", &[]);
    assert!(config.expect_err("refused").to_string().contains("begins with /, ~/"));
    let long = format!("# {}", "x".repeat(crate::limits::CONFIG_BYTES));
    assert!(with_file(&long, &[]).1.is_err(), "too long");
    assert!(with_file(&long[..crate::limits::CONFIG_BYTES], &[]).1.is_ok(), "as long as may be");
}

#[test]
fn models_have_tables_of_their_own() {
    let text = "policy = '~/p'\nauth_file = '$V4_HOME/a'\n[model.\"qwen3:8b\"]\n\
                keep_alive = '1h'\npreload = true\n[model.m]\n";
    let (home, config) = with_file(text, &[]);
    let config = config.expect("valid");
    assert_eq!(config.policy, Some("/u/p".into()));
    assert_eq!(config.auth_file, Some(home.path().join("a")));
    let model = |name: &str| config.model(&name.parse().expect("a name")).cloned();
    let found = model("Qwen3:8b").expect("listed");
    assert_eq!(found.keep_alive, Some(KeepAlive::For(Duration::from_hours(1))));
    assert!(found.preload && !model("m").expect("listed").preload);
    assert_eq!(model("qwen3"), None);
}

#[test]
fn what_is_read_again_changes_what_may_and_says_what_waits() {
    let (home, config) = with_file("keep_alive = 60\nslots = 3\nquota = '5G'", &[]);
    let config = config.expect("valid");
    let file = home.path().join("config.toml");
    let write = |text: &str| fs::replace_private(&file, text.as_bytes()).expect("written");
    write("slots = 4\nthreads = 7\nkeep_alive = 90\n[model.m]\nkeep_alive = 0\n");
    let again = config.again().expect("valid");
    assert_eq!(again.changed, ["keep_alive", "slots", "quota", "model"]);
    assert_eq!(again.at_start, ["threads"]);
    let config = again.config;
    assert_eq!(config.keep_alive, KeepAlive::For(Duration::from_secs(90)));
    assert_eq!((config.slots, config.threads, config.quota), (4, 0, None));
    assert_eq!(config.models.len(), 1);
    assert_eq!(source(&config, "keep_alive"), "file, line 3");
    write("slots = 3\n[model.m]\npin = true\n");
    let again = config.again().expect("valid");
    assert_eq!(again.changed, ["keep_alive", "slots", "model"]);
    assert!(again.at_start.is_empty());
    write("slots = \n");
    assert!(config.again().expect_err("refused").to_string().contains("line 1"));
}

#[test]
fn relative_paths_are_those_of_the_current_folder() {
    let set = [("V4_HOME", "h"), ("V4_SOCKET", "s"), ("V4_LOG_FILE", "l")];
    let config = load(&Given::default(), &set).expect("valid");
    let here = std::env::current_dir().expect("a current folder");
    assert_eq!((config.home, config.socket), (here.join("h"), here.join("s")));
    assert_eq!(config.log_file, Some(here.join("l")));
}

#[test]
fn addresses_may_be_short() {
    let world = World { home: "/h".into(), user: None, is_file: false };
    for (text, address) in [
        ("8080", "127.0.0.1:8080"),
        (":8080", "127.0.0.1:8080"),
        ("0.0.0.0", "0.0.0.0:11434"),
        ("localhost:0", "127.0.0.1:0"),
        ("http://127.0.0.1:1/", "127.0.0.1:1"),
        ("[::1]:5", "[::1]:5"),
        ("::1", "[::1]:11434"),
    ] {
        let expected = Some(address.parse().expect("an address"));
        assert_eq!(listen(Some(text), &world).expect(text), expected);
    }
}

#[test]
fn a_value_that_cannot_be_meant_names_its_setting() {
    for (name, value) in [
        ("V4_LISTEN", "nowhere"),
        ("V4_LISTEN", "127.0.0.1:99999"),
        ("V4_KEEP_ALIVE", "soon"),
        ("V4_CONTEXT", "-1"),
        ("V4_MEMORY", "lots"),
        ("V4_QUOTA", "some"),
        ("V4_QUOTA_EVICT", "maybe"),
        ("V4_MEMORY", "99999999999G"),
        ("V4_KV_TYPE", "f32"),
        ("V4_PRECISION", "exact"),
        ("V4_KV_DISK", "no"),
        ("V4_TRUNCATE", "never"),
        ("V4_REGISTRY", "registry.ollama.ai"),
        ("V4_PEERS", "10.0.0.2:11434"),
        ("V4_PEERS", "http://10.0.0.2:11434/path"),
        ("V4_LIMIT_RATE", "fast"),
        ("V4_LOG", "loud"),
        ("V4_LOG_FORMAT", "xml"),
        ("V4_OTLP", "otel:4318"),
        ("V4_OTLP", "http://otel:port"),
        ("V4_OTLP", "http://a,http://b"),
        ("HF_TOKEN", "two words"),
        ("HF_ENDPOINT", "hub.example"),
        ("V4_NPM_URL", "http://a,http://b"),
        ("V4_ORIGINS", "https://a b"),
    ] {
        let error = load(&Given::default(), &[("HOME", "/u"), (name, value)]);
        let text = error.expect_err("refused").to_string();
        assert!(text.starts_with(&format!("{name} is \"{value}\", but must be ")), "{text}");
    }
    for (name, value) in
        [("V4_PEERS", "v4-x@box"), ("V4_OTLP_HEADERS", "v4-x"), ("V4_OTLP_HEADERS", "a b=v4-x")]
    {
        let secret = load(&Given::default(), &[("HOME", "/u"), (name, value)]);
        assert!(!secret.expect_err("refused").to_string().contains("v4-x"));
    }
    let set = [
        ("HOME", "/u"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://otel.example/otlp/"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "API-Key=a%2Cb, x=1"),
    ];
    let config = load(&Given::default(), &set).expect("valid");
    assert_eq!(config.otlp.as_deref(), Some("https://otel.example/otlp"));
    let fields = [("api-key", "a,b"), ("x", "1")].map(|(a, b)| (a.to_owned(), b.to_owned()));
    assert_eq!(config.otlp_headers, fields);
}

#[test]
fn a_models_table_is_what_the_supervisor_is_told() {
    let text = "[model.\"qwen3:8b\"]\npin = true\nslots = 4\ncontext = 1024\nmax_queue = 7\n\
                priority = -1\ngroup = \"code\"\nexcludes = [\"a\", \"b*\"]\nkeep_alive = 60\n\
                device = \"gpu1\"\ngpus = 2";
    let (_home, config) = with_file(text, &[]);
    let table = config.expect("a good file").model_rules();
    let rules = table.of("qwen3:8b");
    assert_eq!((rules.pinned, rules.slots, rules.context), (true, Some(4), Some(1024)));
    assert_eq!((rules.max_queue, rules.priority), (Some(7), -1));
    assert_eq!(
        (rules.group.as_deref(), rules.excludes.join(" ")),
        (Some("code"), "a b*".to_owned())
    );
    assert_eq!(rules.keep_alive, Some(KeepAlive::For(Duration::from_mins(1))));
    assert_eq!((rules.device.as_deref(), rules.gpus), (Some("gpu1"), Some(2)));
    for (device, is_known) in
        [("host", true), ("GPU-8f6d", true), ("gpu", false), ("gpu1x", false), ("cuda", false)]
    {
        let (_home, config) = with_file(&format!("[model.a]\ndevice = \"{device}\""), &[]);
        assert_eq!(config.is_ok(), is_known, "{device}");
    }
}
