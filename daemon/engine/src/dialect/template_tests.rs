//! Real templates against prompts that transformers rendered. The templates belong to their models'
//! makers and lie beside the checkout, not in it.

use super::*;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value as Json};

/// 2026-01-15T12:00:00, the moment of the golden prompts.
const NOW: Duration = Duration::from_hours(491_244);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/chat")
}

fn json(path: &Path) -> Json {
    serde_json::from_slice(&read(path)).expect("golden files are JSON")
}

#[expect(clippy::disallowed_methods, reason = "tests read their vectors")]
fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("a golden file")
}

const TEMPLATES: &[&str] = &[
    "deepseek-ai-deepseek-v3_1",
    "deepseek-ai-deepseek-v3_2",
    "deepseek-ai-deepseek-v4",
    "deepseek-ai-deepseek-v4-flash-0731",
    "gguf-qwen2_5-coder",
    "gguf-smollm2",
    "glm-4_6",
    "huggingfacetb-smollm3-3b",
    "ibm-granite-granite-4_0",
    "microsoft-phi-3_5-mini-instruct",
    "minimax-m2",
    "mistral-small-3_2-24b-instruct-2506",
    "mistralai-mistral-nemo-instruct-2407",
    "openai-gpt-oss-120b",
    "qwen-qwen2_5-7b-instruct",
    "qwen-qwen3-0_6b",
    "qwen3-coder",
];

/// The keys of the golden conversations in the order in which they were rendered: the file has them
/// sorted.
const KEYS: &[&str] = &[
    "role",
    "content",
    "reasoning_content",
    "id",
    "tool_calls",
    "tool_call_id",
    "type",
    "function",
    "name",
    "description",
    "parameters",
    "arguments",
    "properties",
    "required",
    "location",
    "unit",
    "days",
    "query",
    "top",
    "tags",
    "enum",
    "default",
    "items",
];

fn in_order(value: &mut Json) {
    match value {
        Json::Object(map) => {
            let mut entries: Vec<_> = std::mem::take(map).into_iter().collect();
            entries.sort_by_key(|(key, _)| KEYS.iter().position(|k| k == key));
            for (_, value) in &mut entries {
                in_order(value);
            }
            map.extend(entries);
        }
        Json::Array(items) => items.iter_mut().for_each(in_order),
        _ => (),
    }
}

fn render(
    template: &Template,
    specials: &Map<String, Json>,
    conversation: &Json,
    add: bool,
) -> Result<String, Fault> {
    let mut extra = specials.clone();
    if let Some(kwargs) = conversation["kwargs"].as_object() {
        extra.extend(kwargs.clone());
    }
    template.render(&Variables {
        messages: conversation["messages"].as_array().expect("messages"),
        tools: conversation["tools"].as_array().map(Vec::as_slice),
        documents: None,
        add_generation_prompt: add,
        extra: &extra,
    })
}

#[test]
fn prompts_equal_those_of_the_makers_tools() {
    let golden = folder();
    if !golden.is_dir() {
        println!("skipped: the chat templates of {} are not here", golden.display());
        return;
    }
    let mut conversations = json(&golden.join("conversations.json"));
    in_order(&mut conversations);
    let (mut equal, mut different) = (0, Vec::new());
    for name in TEMPLATES {
        let expected = json(&golden.join(format!("{name}.json")));
        let text = String::from_utf8(read(&golden.join(format!("templates/{name}.jinja"))));
        let template = Template::with_clock(&text.expect("UTF-8"), || NOW);
        let template = template.unwrap_or_else(|fault| panic!("{name}: {fault}"));
        let specials = expected["specials"].as_object().expect("specials");
        for (case, prompts) in expected["prompts"].as_object().expect("prompts") {
            for (add, key) in [(true, "gen"), (false, "nogen")] {
                let got = render(&template, specials, &conversations[case], add);
                let want = prompts[key]["prompt"].as_str();
                if got.as_deref().ok() == want {
                    equal += 1;
                } else {
                    different.push((*name, case.clone(), key, got));
                }
            }
        }
    }
    assert_eq!(different, []);
    assert_eq!(equal, TEMPLATES.len() * 17 * 2, "17 conversations, with and without a next turn");
}

fn one(text: &str) -> Result<String, Fault> {
    let messages = [serde_json::json!({ "role": "user", "content": "hi" })];
    let extra = Map::new();
    Template::new(text)?.render(&Variables {
        messages: &messages,
        tools: None,
        documents: None,
        add_generation_prompt: true,
        extra: &extra,
    })
}

#[test]
fn templates_are_strangers_programs() {
    let long = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}";
    let deep = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    for text in [long, deep, "{{ messages[0].content.nope() }}", "{% include 'x' %}", "{{ 1 / 0 }}"]
    {
        assert_eq!(one(text).expect_err(text).code, Code::Unsupported, "{text}");
    }
    for text in ["{% if %}", "{{", "{% endfor %}"] {
        assert_eq!(one(text).expect_err(text).code, Code::Unsupported, "{text}");
    }
    let raised = one("{% if true %}{{ raise_exception('roles must alternate') }}{% endif %}");
    let raised = raised.expect_err("it raised");
    assert_eq!(raised.code, Code::Invalid);
    assert!(raised.message.ends_with("says: roles must alternate"), "{raised}");
}

#[test]
fn constructs_of_python_mean_what_they_mean_there() {
    let table = [
        ("{{ {'b': 1, 'a': [1.0, 'ü<']} | tojson }}", r#"{"b": 1, "a": [1.0, "ü<"]}"#),
        ("{{ ['ü'] | tojson(ensure_ascii=true) }}", r#"["\u00fc"]"#),
        (
            "{{ {'b': 1, 'a': {}} | tojson(indent=2, sort_keys=true) }}",
            "{\n  \"a\": {},\n  \"b\": 1\n}",
        ),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ none is iterable }}{{ 'a' is iterable }}{{ [] is iterable }}", "FalseTrueTrue"),
        ("{{ ' a '.strip() }}|{{ 'a,b'.split(',')[1] }}|{{ 'ab'.startswith('a') }}", "a|b|True"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("a {%- generation -%} b {%- endgeneration %} c", "ab c"),
        ("{% if tools is none %}none{% endif %}", "none"),
        ("{% for m in messages %}\n  {{ m.content }}\n{% endfor %}", "  hi\n"),
    ];
    for (text, expected) in table {
        assert_eq!(one(text).as_deref(), Ok(expected), "{text}");
    }
}
