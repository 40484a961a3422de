use super::*;
use crate::format::written::Rng;

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = wide(header.len()).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn parse(bytes: &[u8]) -> Result<Vec<Tensor>> {
    read(&Bytes::from_vec(bytes.to_vec()))
}

const GOOD: &str = r#"{"__metadata__":{"format":"pt"},
    "b":{"dtype":"BF16","shape":[2,2],"data_offsets":[4,12]},
    "a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;

#[test]
fn a_file_is_read() {
    let tensors = parse(&file(GOOD, &[7; 12])).expect("a good file");
    let [a, b] = tensors.as_slice() else { panic!("two tensors") };
    assert_eq!((a.name.as_str(), a.quant, a.bytes.len()), ("a", Quant::F32, 4));
    assert_eq!((b.name.as_str(), b.quant, b.shape.as_slice()), ("b", Quant::BF16, &[2, 2][..]));
}

#[test]
fn bad_files_are_refused() {
    let of = |entry: &str| file(&format!("{{\"t\":{entry}}}"), &[0; 8]);
    let truncated = [
        file(GOOD, &[0; 11]),
        of(r#"{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#),
        100u64.to_le_bytes().to_vec(),
    ];
    for bytes in truncated {
        assert!(matches!(parse(&bytes), Err(FormatError::Truncated { .. })));
    }
    let contradicting = [
        file(GOOD, &[0; 13]),
        of(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,8]}"#),
        of(r#"{"dtype":"F32","shape":[1],"data_offsets":[8,4]}"#),
        of(r#"{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}"#),
        of(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}"#),
        of(r#"{"dtype":"F32"}"#),
        file(
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
                "b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            &[0; 8],
        ),
    ];
    for bytes in contradicting {
        let error = parse(&bytes).expect_err("a bad file");
        assert!(matches!(error, FormatError::Contradiction(_)), "{error:?}");
    }
    for bytes in [&b""[..], b"abc", &file("[]", b""), &file("{", b"")] {
        assert!(matches!(parse(bytes), Err(FormatError::NotThis { .. })));
    }
    let huge = u64::MAX.to_le_bytes();
    assert!(matches!(parse(&huge), Err(FormatError::BeyondLimit { .. })));
    let unknown = of(r#"{"dtype":"F8_E5M2","shape":[8],"data_offsets":[0,8]}"#);
    assert!(parse(&unknown).expect_err("an unknown type").is_unsupported());
}

#[test]
fn hostile_bytes_never_panic() {
    let good = file(GOOD, &[7; 12]);
    let mut rng = Rng(0xbeef);
    for _ in 0..10_000 {
        let mut bytes = good.clone();
        for _ in 0..=rng.below(3) {
            let at = rng.below(bytes.len());
            bytes[at] = u8::try_from(rng.below(256)).expect("a byte");
        }
        if let Ok(tensors) = parse(&bytes) {
            assert!(tensors.iter().all(|tensor| tensor.bytes.len() <= 12));
        }
    }
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    for name in ["../x", "/etc/passwd", "a/b", "", ".", "..", "a\\b", "a\0b"] {
        assert!(!is_plain(name), "{name:?}");
    }
    assert!(is_plain("model-00001-of-00002.safetensors"));
}

#[test]
fn a_config_becomes_metadata() {
    let json = serde_json::json!({
        "model_type": "x", "n": 3, "neg": -3, "x": 0.5, "yes": true, "none": null,
        "inner": { "deep": { "n": 1 } }, "mixed": [1, "a"], "floats": [1, 0.5], "empty": [],
    });
    let meta = config(&json).expect("an object");
    assert_eq!(meta.str("model_type"), Some("x"));
    assert_eq!((meta.u64("n"), meta.u64("neg"), meta.f64("neg")), (Some(3), None, Some(-3.0)));
    assert_eq!(meta.u64("inner.deep.n"), Some(1));
    assert_eq!(meta.f64s("floats").as_deref(), Some(&[1.0, 0.5][..]));
    assert_eq!(meta.get("mixed"), Some(&Value::Array(Array::Nested)));
    assert_eq!(meta.get("none"), None);
    assert!(config(&serde_json::json!([])).is_err());
}

#[test]
fn blocks_and_scales_apart_are_one_tensor() {
    let pair = |shape: &str, scales: &str, n: usize| {
        let header = format!(
            r#"{{"w_blocks":{{"dtype":"U8","shape":{shape},"data_offsets":[0,{n}]}},
                "w_scales":{{"dtype":"U8","shape":{scales},"data_offsets":[{n},{}]}}}}"#,
            n + 2
        );
        let data: Vec<u8> = (0..u8::try_from(n + 2).expect("few")).collect();
        parse(&file(&header, &data))
    };
    let tensors = pair("[2,1,16]", "[2,1]", 32).expect("a pair");
    let [w] = tensors.as_slice() else { panic!("one tensor") };
    assert_eq!((w.name.as_str(), w.quant, w.shape.as_slice()), ("w", Quant::MXFP4, &[2, 32][..]));
    assert_eq!(w.n_bytes(), 34);
    // Weight 2k is low in byte k, weight 2k + 1 high; in a GGUF block j and j + 16 share a byte.
    let blocks = w.blocks();
    let code =
        |row: usize, at: usize| (blocks.as_slice()[row * 17 + 1 + at % 16] >> (at / 16 * 4)) & 15;
    for (row, at) in (0..2).flat_map(|row| (0..32).map(move |at| (row, at))) {
        let byte = u8::try_from(row * 16 + at / 2).expect("few");
        assert_eq!(code(row, at), (byte >> (at % 2 * 4)) & 15, "{row} {at}");
    }
    assert_eq!([blocks.as_slice()[0], blocks.as_slice()[17]], [32, 33]);
    for bad in [pair("[2,16]", "[2,1]", 32), pair("[2,1,16]", "[1,2]", 32), pair("[32]", "[2]", 32)]
    {
        assert!(matches!(bad, Err(FormatError::Contradiction(_))), "{bad:?}");
    }
    for name in ["w_blocks", "w_scales", "w"] {
        let entry = r#"{"dtype":"U8","shape":[16],"data_offsets":[0,16]}"#;
        assert!(parse(&file(&format!("{{{name:?}:{entry}}}"), &[0; 16])).is_err(), "{name}");
    }
}
