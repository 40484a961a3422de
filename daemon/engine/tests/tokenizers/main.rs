//! Real tokenizers against golden token ids. The ids are other people's data and are read in place,
//! beside the checkout; the models lie in the folder that `V4_TEST_MODELS` names. A test that lacks
//! either says so by name.

#![expect(clippy::print_stdout, reason = "a test that cannot run says so")]

use std::path::{Path, PathBuf};

use serde_json::Value;
use v4_engine::format;
use v4_engine::tokenizer::{Special, Tokenizer};
use v4_proto::ModelFiles;

#[expect(clippy::disallowed_methods, reason = "a test's folder comes from who runs it")]
fn tokenizer(file: &str) -> Option<Tokenizer> {
    let path = std::env::var_os("V4_TEST_MODELS").map(|models| PathBuf::from(models).join(file));
    let Some(path) = path.filter(|path| path.is_file()) else {
        println!("skipped: {file} is not in $V4_TEST_MODELS; `.ci/run` pulls it");
        return None;
    };
    let files = ModelFiles { weights: vec![path], ..ModelFiles::default() };
    let file = format::read(&files).expect("a good model");
    Some(Tokenizer::from_meta(&file.meta).expect("a good tokenizer"))
}

#[expect(clippy::disallowed_methods, reason = "tests read their vectors")]
fn cases(name: &str) -> Option<Vec<Value>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/tokenizers");
    let Ok(bytes) = std::fs::read(folder.join(name)) else {
        println!("skipped: {name} is not in ../shared/golden/tokenizers");
        return None;
    };
    let golden: Value = serde_json::from_slice(&bytes).expect("JSON");
    Some(golden["cases"].as_array().expect("cases").clone())
}

fn check(file: &str, golden: &str, different: &[&str]) {
    let Some(tokenizer) = tokenizer(file) else { return };
    let Some(cases) = cases(golden) else { return };
    for case in cases {
        let text = case["text"].as_str().expect("a text");
        let expected: Vec<u32> =
            serde_json::from_value(case["ids"].clone()).expect("an array of ids");
        let got = tokenizer.encode(text, Special::Parse);
        let is_different = different.contains(&text);
        assert_eq!(got != expected, is_different, "{text:?}: {got:?}, golden {expected:?}");
        assert_eq!(tokenizer.decode(&expected, false), case["decoded"], "{text:?}");
        assert_eq!(tokenizer.decode(&expected, true), case["decoded_skip_special"], "{text:?}");
    }
}

/// One string differs on purpose. SmolLM2's own tokenizer makes every numeral a piece of its own,
/// which its file says by the pre-tokenizer's name; the golden ids come from a tokenizer that was
/// rebuilt from the file without it, and there " ½" stays together. Other numerals are no part of
/// any merge of this vocabulary, so they do not tell the two apart.
#[test]
fn smollm2() {
    check("smollm2.gguf", "smollm2-gguf.json", &["𠮷野家 𝒳𝓎𝓏 ℵ₀ ½ ²"]);
}

#[test]
fn gemma3() {
    check("gemma3-270m.gguf", "gemma3-270m-gguf.json", &[]);
}

#[test]
fn qwen25_coder() {
    check("qwen2.5-coder-0.5b.gguf", "qwen2_5-coder-gguf.json", &[]);
}
