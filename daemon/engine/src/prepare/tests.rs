use std::cell::RefCell;

use super::*;
use crate::format::{Array, Value as MetaValue};

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\
    {% for c in m.tool_calls %}!{{ c.type }} {{ c.function.arguments | tojson }}{% endfor %};\
    {% endfor %}{% if tools %}[{{ tools | length }}]{% endif %}\
    {% if add_generation_prompt %}<a>{% if enable_thinking is defined %}{{ enable_thinking }}\
    {{ reasoning_effort }}{% endif %}{% endif %}";

/// A model whose tokens are the printable bytes of ASCII, one each, and `<s>`.
fn prepare(template: Option<&str>, context: u32) -> Prepare {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    tokens.extend(["Ġ", "Ċ", "<s>"].map(String::from));
    let mut kinds = vec![1; tokens.len()];
    *kinds.last_mut().expect("not empty") = 3;
    let bos = tokens.len() as u64 - 1;
    let mut meta = Meta::default();
    let mut set = |key: &str, value| meta.insert(format!("tokenizer.{key}"), value);
    set("ggml.model", MetaValue::String("gpt2".into()));
    set("ggml.tokens", MetaValue::Array(Array::String(tokens)));
    set("ggml.token_type", MetaValue::Array(Array::I64(kinds)));
    set("ggml.merges", MetaValue::Array(Array::String(Vec::new())));
    set("ggml.bos_token_id", MetaValue::U64(bos));
    set("ggml.add_bos_token", MetaValue::Bool(true));
    if template.is_some() {
        set("chat_template", MetaValue::String("overridden".into()));
    }
    Prepare::new(&meta, template, context).expect("a good model")
}

fn chat(messages: &[(Role, &str)]) -> Generate {
    let messages = messages.iter().map(|(role, text)| Message::new(*role, *text)).collect();
    request(Input::Chat { messages, tools: Vec::new(), think: None })
}

fn request(input: Input) -> Generate {
    Generate {
        input,
        sampling: SamplingParams::greedy(),
        max_tokens: None,
        stop: Vec::new(),
        context: None,
        truncate: false,
        lane: v4_proto::Lane::default(),
    }
}

fn prompt(prepare: &Prepare, request: &Generate) -> String {
    let sequence = prepare.prepare(request).expect("a good request");
    prepare.tokenizer().decode(&sequence.prompt, false)
}

use Role::{Assistant, System, User};

/// A model, a conversation, and its prompt.
type Case<'a> = (&'a Prepare, &'a [(Role, &'a str)], &'a str);

#[test]
fn conversations_become_prompts() {
    let with = prepare(Some(TEMPLATE), 1000);
    let without = prepare(None, 1000);
    let table: [Case<'_>; 7] = [
        (&with, &[(User, "hi")], "<s><u>hi;<a>"),
        // The template's own mark is the text of BOS here: it is not written twice.
        (&with, &[(System, "S"), (User, "hi")], "<s>S;<u>hi;<a>"),
        // The model's own words are continued.
        (&with, &[(User, "hi"), (Assistant, "I am ")], "<s><u>hi;<a>I am"),
        (&with, &[(User, "hi"), (Assistant, " ")], "<s><u>hi;<a> ;<a>"),
        (&without, &[(User, "Once upon")], "<s>Once upon"),
        (
            &without,
            &[(System, "Be nice."), (User, "hi"), (Assistant, "yes?"), (User, "go")],
            "<s>Be nice.\n\nUser: hi\n\nAssistant: yes?\n\nUser: go\n\nAssistant:",
        ),
        (&without, &[(User, "<s>hi")], "<s>hi"),
    ];
    for (prepare, messages, expected) in table {
        assert_eq!(prompt(prepare, &chat(messages)), expected);
    }
    let sequence = without.prepare(&chat(&[(User, "a"), (User, "b")])).expect("good");
    assert_eq!(sequence.stop, ["\n\nUser:"]);
}

#[test]
fn tools_and_thinking_reach_the_template() {
    let prepare = prepare(Some(TEMPLATE), 1000);
    let call = |arguments: Value| json!({ "function": { "name": "f", "arguments": arguments } });
    for arguments in [json!({ "b": 1, "a": 2 }), json!("{\"b\": 1, \"a\": 2}")] {
        let mut message = Message::new(Assistant, "");
        message.tool_calls = vec![call(arguments)];
        let messages = vec![Message::new(User, "hi"), message];
        let tools = vec![json!({ "type": "function" })];
        let input = Input::Chat { messages, tools, think: Some(Think::High) };
        let expected = "<s><u>hi;<a>!function {\"b\": 1, \"a\": 2};[1]<a>Truehigh";
        assert_eq!(prompt(&prepare, &request(input)), expected);
    }
    let messages = vec![Message::new(User, "hi")];
    let input = Input::Chat { messages, tools: Vec::new(), think: Some(Think::Off) };
    assert_eq!(prompt(&prepare, &request(input)), "<s><u>hi;<a>False");
}

#[test]
fn a_prompt_that_does_not_fit_is_refused_with_both_numbers() {
    let prepare = prepare(Some(TEMPLATE), 20);
    for (n, fits) in [(19, true), (20, false), (21, false)] {
        // BOS is one of them.
        let raw = request(Input::Raw { text: "x".repeat(n - 1) });
        match prepare.prepare(&raw) {
            Ok(sequence) => assert!(fits && sequence.prompt.len() == n),
            Err(fault) => {
                assert!(!fits && fault.code == Code::ContextOverflow, "{fault}");
                let numbers = format!("{n} tokens and the context 20");
                assert!(fault.message.contains(&numbers), "{fault}");
            }
        }
    }
    let less = Generate { context: Some(10), ..request(Input::Raw { text: "x".repeat(10) }) };
    assert_eq!(prepare.prepare(&less).expect_err("too long").code, Code::ContextOverflow);
    let more = Generate { context: Some(99), ..request(Input::Raw { text: "x".repeat(30) }) };
    assert_eq!(prepare.prepare(&more).expect_err("a cap only").code, Code::ContextOverflow);
    // Known to be hopeless before it is taken apart.
    let huge = request(Input::Raw { text: "x".repeat(1 << 20) });
    let fault = prepare.prepare(&huge).expect_err("too long");
    assert!(fault.message.contains("at least"), "{fault}");
}

#[test]
fn old_turns_are_dropped_until_the_rest_fits() {
    let prepare = prepare(Some(TEMPLATE), 40);
    let long = [
        (System, "S"),
        (User, "one one one"),
        (Assistant, "1"),
        (User, "two"),
        (Assistant, "2"),
        (User, "three"),
    ];
    let refused = prepare.prepare(&chat(&long)).expect_err("it does not fit");
    assert_eq!(refused.code, Code::ContextOverflow);
    let cut = Generate { truncate: true, ..chat(&long) };
    assert_eq!(prompt(&prepare, &cut), "<s>S;<u>two;<a>2;<u>three;<a>");
    let sequence = prepare.prepare(&cut).expect("it fits now");
    assert_eq!((sequence.sent_tokens, sequence.prompt.len()), (47, 27));
    let tight = Generate { context: Some(25), ..cut.clone() };
    assert_eq!(prompt(&prepare, &tight), "<s>S;<u>three;<a>");
    let hopeless = Generate { context: Some(10), ..cut };
    let fault = prepare.prepare(&hopeless).expect_err("the last message alone is too long");
    assert_eq!(fault.code, Code::ContextOverflow);
    assert!(fault.message.contains("of 10 tokens") && fault.message.contains("47"), "{fault}");
}

#[test]
fn cuts_that_are_too_long_by_their_bytes_are_not_encoded() {
    let prepare = prepare(Some(TEMPLATE), 40);
    let messages = vec![Message::new(User, "0123456789"); 1000];
    let chat = Chat { messages: messages.into(), tools: &[], think: None };
    let encoded = RefCell::new(Vec::new());
    let encode = |text: &str| {
        encoded.borrow_mut().push(text.len());
        prepare.encode(text)
    };
    let fitted = prepare.fit(&chat, 40, true, &encode).expect("the newest turns fit");
    assert!((20..40).contains(&fitted.ids.len()) && fitted.sent > 10_000);
    // The longest token has three bytes, and the whole is counted once.
    let encoded = encoded.into_inner();
    assert!(encoded[0] > 10_000 && encoded[1..].iter().all(|&n| n < 40 * 3), "{encoded:?}");
}

#[test]
fn bad_requests_are_refused() {
    let good = prepare(Some(TEMPLATE), 100);
    let raw = || request(Input::Raw { text: "x".into() });
    let many = Generate { stop: vec!["x".into(); limits::STOP_STRINGS + 1], ..raw() };
    let long = Generate { stop: vec!["x".repeat(limits::STOP_STRING_BYTES + 1)], ..raw() };
    let table = [
        many,
        long,
        chat(&[]),
        request(Input::Tokens { ids: vec![] }),
        request(Input::Tokens { ids: vec![3, 4000] }),
    ];
    for request in table {
        assert_eq!(good.prepare(&request).expect_err("bad").code, Code::Invalid, "{request:?}");
    }
    // A template that is no Jinja fails conversations, and nothing else.
    let broken = prepare(Some("{% if %}"), 100);
    let fault = broken.prepare(&chat(&[(User, "hi")])).expect_err("no template");
    assert_eq!(fault.code, Code::Unsupported);
    assert!(broken.prepare(&raw()).is_ok());
}

#[test]
fn seeds_differ_where_none_is_given() {
    let prepare = prepare(None, 100);
    let seed = || prepare.prepare(&chat(&[(User, "hi")])).expect("good").seed;
    assert_ne!(seed(), seed());
}
