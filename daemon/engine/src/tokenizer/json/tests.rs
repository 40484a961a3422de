use std::path::{Path, PathBuf};

use serde_json::json;
use v4_proto::ModelFiles;

use super::*;
use crate::format;
use crate::tokenizer::{Special, Tokenizer as Ready};

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path)
}

fn meta(path: &str) -> Meta {
    let files = ModelFiles { weights: vec![golden(path)], ..ModelFiles::default() };
    format::read(&files).expect("a good model").meta
}

const TEXTS: [&str; 7] = [
    "",
    "Hello, world! It's 2026.",
    "  two  spaces\n\nand lines\r\n\t",
    "naïve Ünïcode 世界 🦀 ½",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "fn main() { println!(\"{}\", 1_000); }",
];

/// The GGUF files of these models carry the tokenizers that other people's converter made of the
/// same folders.
#[test]
fn a_folder_and_its_gguf_have_the_same_tokenizer() {
    for (folder, file) in [
        ("models/qwen2", "gguf/qwen3-q4_k_m.gguf"),
        ("models/gemma3_text", "gguf/gemma3-q5_0.gguf"),
    ] {
        let (folder, file) = (meta(folder), meta(file));
        let ready = [&folder, &file].map(|meta| Ready::from_meta(meta).expect("a tokenizer"));
        let [ours, theirs] = &ready;
        assert_eq!(ours.len(), theirs.len());
        assert_eq!((ours.bos(), ours.eos()), (theirs.bos(), theirs.eos()));
        assert_eq!(ours.add_bos(), theirs.add_bos());
        for text in TEXTS {
            let ids = ours.encode(text, Special::Parse);
            assert_eq!(ids, theirs.encode(text, Special::Parse), "{text:?}");
            assert_eq!(ours.decode(&ids, false), theirs.decode(&ids, false), "{text:?}");
        }
        let template = "tokenizer.chat_template";
        assert!(folder.str(template).is_some_and(|text| text.contains("add_generation_prompt")));
    }
}

fn read(json: Json) -> Written {
    serde_json::from_value(json).expect("a tokenizer")
}

fn split(regexes: &[&str], ignore_merges: bool) -> String {
    let steps: Vec<Json> = regexes
        .iter()
        .map(|regex| json!({"type": "Split", "pattern": {"Regex": regex}}))
        .chain([json!({"type": "ByteLevel", "use_regex": false})])
        .collect();
    splitter(&read(json!({
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {"vocab": {}, "ignore_merges": ignore_merges},
    })))
}

#[test]
fn ways_to_cut_text_have_their_names_and_strangers_keep_their_expression() {
    for (expressions, whole, merged) in EXPRESSIONS {
        assert_eq!(split(expressions, true), *whole);
        assert_eq!(split(expressions, false), *merged);
    }
    assert_eq!(split(&["x+"], false), "x+");
    let of = |steps: Json| {
        let steps = json!({"type": "Sequence", "pretokenizers": steps});
        splitter(&read(json!({"pre_tokenizer": steps, "model": {"vocab": {}}})))
    };
    let words = json!({"type": "ByteLevel", "use_regex": true});
    assert_eq!(of(json!([words])), "gpt-2");
    assert_eq!(of(json!([{"type": "Digits", "individual_digits": true}, words])), "smollm");
}

#[test]
fn settings_say_which_tokens_begin_and_end() {
    let tokenizer = read(json!({
        "added_tokens": [{"id": 1, "content": "<a>", "special": true},
            {"id": 2, "content": "<b>", "special": true}],
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<a>"}}, {"Sequence": {"id": "A"}}]},
        "model": {"vocab": {"x": 0}},
    }));
    let of = |settings: Json, generation: Json| {
        let mut meta = Meta::default();
        let Vocab::Ids(ids) = &tokenizer.model.vocab else { panic!("ids") };
        ends(&mut meta, &tokenizer, ids, &settings, &generation);
        let id = |name: &str| meta.u64(&format!("tokenizer.ggml.{name}_token_id"));
        let adds = meta.bool("tokenizer.ggml.add_bos_token");
        (id("bos"), id("eos"), id("eot"), adds)
    };
    let said = json!({"bos_token": {"content": "<a>"}, "eos_token": "<b>"});
    assert_eq!(
        of(said.clone(), json!({"eos_token_id": [2, 0]})),
        (Some(1), Some(2), Some(0), Some(true))
    );
    let mut quiet = said;
    quiet["add_bos_token"] = false.into();
    assert_eq!(of(quiet, Json::Null), (Some(1), Some(2), None, Some(false)));
    assert_eq!(of(Json::Null, json!({"eos_token_id": 0})), (None, Some(0), None, Some(true)));
}

/// What no tokenizer can be made of is named, so that the model can still be described.
#[test]
fn strangers_are_named_not_refused() {
    let of = |text: &str| {
        let mut meta = Meta::default();
        translate(&mut meta, text.as_bytes(), &Json::Null, &Json::Null).map(|()| meta)
    };
    for (text, kind) in [
        (r#"{"model": {"type": "Unigram", "vocab": [["a", -1.5]]}}"#, "Unigram"),
        (r#"{"model": {"type": "WordPiece", "vocab": {"a": 0}}}"#, "WordPiece"),
        (r#"{"model": {"type": "BPE", "vocab": {"a": 0}}}"#, "BPE"),
    ] {
        let meta = of(text).expect(text);
        assert_eq!(meta.str("tokenizer.ggml.model"), Some(kind));
        let words = Ready::from_meta(&meta).expect_err("a stranger").to_string();
        assert!(words.contains(kind), "{words}");
    }
    let huge = format!(r#"{{"model": {{"vocab": {{"a": {}}}}}}}"#, limits::META_ARRAY_ITEMS);
    for text in ["", "{}", "[]", &huge] {
        of(text).expect_err(text);
    }
}
