use super::*;
use crate::format::written::{Gguf, Rng};

fn parse(bytes: &[u8]) -> Result<File> {
    read(&[Bytes::from_vec(bytes.to_vec())])
}

fn good() -> Gguf {
    Gguf::new()
        .meta("general.architecture", &Value::String("x".into()))
        .meta("a.number", &Value::U64(7))
        .meta("a.negative", &Value::I64(-7))
        .meta("a.float", &Value::F64(0.5))
        .meta("a.flag", &Value::Bool(true))
        .meta("a.words", &Value::Array(Array::String(vec!["ä".into(), String::new()])))
        .meta("a.numbers", &Value::Array(Array::I64(vec![1, -2])))
        .tensor("one", Quant::F32, &[3, 2], &[0; 24])
        .tensor("two", Quant::Q8_0, &[32, 2], &[1; 68])
}

#[test]
fn a_file_is_read() {
    let file = parse(&good().bytes()).expect("a good file");
    assert_eq!(file.meta.u64("a.number"), Some(7));
    assert_eq!(file.meta.get("a.negative"), Some(&Value::I64(-7)));
    assert_eq!(file.meta.f64("a.float"), Some(0.5));
    assert_eq!(file.meta.bool("a.flag"), Some(true));
    assert_eq!(file.meta.strings("a.words"), Some(&["ä".to_owned(), String::new()][..]));
    assert_eq!(file.meta.i64s("a.numbers"), Some(vec![1, -2]));
    let [one, two] = file.tensors.as_slice() else { panic!("two tensors") };
    assert_eq!(
        (one.name.as_str(), one.quant, one.shape.as_slice()),
        ("one", Quant::F32, &[2, 3][..])
    );
    assert_eq!(two.bytes.as_slice(), [1; 68]);
}

/// Whether reading fails with an error like `expected`, and what people would read.
macro_rules! refused {
    ($bytes:expr, $expected:pat) => {{
        let error = parse(&$bytes).expect_err("a bad file");
        assert!(matches!(error, $expected), "{error:?}");
        error.to_string()
    }};
}

#[test]
fn a_file_cut_anywhere_is_truncated() {
    let bytes = good().bytes();
    // The last tensor's own bytes end before the padding of the file does.
    for len in 4..bytes.len() - 31 {
        refused!(bytes[..len], FormatError::Truncated { .. });
    }
    for len in 0..4 {
        refused!(bytes[..len], FormatError::NotThis { .. });
    }
}

#[test]
fn bytes_after_the_last_tensor_are_refused() {
    let mut bytes = good().bytes();
    bytes.extend_from_slice(&[0; 64]);
    let message = refused!(bytes, FormatError::Contradiction(_));
    assert!(message.contains("follow its last tensor"), "{message}");
}

#[test]
fn another_format_or_version_is_named() {
    let mut bytes = good().bytes();
    bytes[4] = 1;
    assert!(refused!(bytes, FormatError::Unknown { .. }).contains("version 1"));
    bytes[4..8].copy_from_slice(&[0, 0, 0, 3]);
    assert!(refused!(bytes, FormatError::Unknown { .. }).contains("big endian"));
    refused!(*b"GGML....", FormatError::NotThis { .. });
    refused!(Vec::new(), FormatError::NotThis { .. });
}

#[test]
fn claims_beyond_the_limits_are_refused_before_memory_is_taken() {
    let bytes = good().bytes();
    for (at, what) in [(8, "tensors"), (16, "metadata entries")] {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].fill(0xff);
        assert!(refused!(bytes, FormatError::BeyondLimit { .. }).contains(what));
    }
    let words = Value::Array(Array::String(vec!["x".into()]));
    let mut bytes = Gguf::new().meta("w", &words).bytes();
    // The count of items: after the head (24), the key (9), the type (4) and the items' type (4).
    bytes[41..49].copy_from_slice(&limits::META_ARRAY_ITEMS.to_le_bytes());
    refused!(bytes, FormatError::Truncated { .. });
    bytes[41..49].copy_from_slice(&(limits::META_ARRAY_ITEMS + 1).to_le_bytes());
    refused!(bytes, FormatError::BeyondLimit { .. });
    bytes[41..49].copy_from_slice(&1u64.to_le_bytes());
    bytes[49..57].copy_from_slice(&u64::MAX.to_le_bytes());
    refused!(bytes, FormatError::BeyondLimit { .. });
}

#[test]
fn contradictions_are_refused() {
    let file = Gguf::new;
    let twice = file().meta("k", &Value::U64(1)).meta("k", &Value::U64(1));
    assert!(refused!(twice.bytes(), FormatError::Contradiction(_)).contains("twice"));
    let f32s = |file: Gguf, name: &str| file.tensor(name, Quant::F32, &[8], &[0; 32]);
    let twice = f32s(f32s(file(), "t"), "t");
    assert!(refused!(twice.bytes(), FormatError::Contradiction(_)).contains("twice"));
    let overlap = f32s(f32s(file(), "a"), "b").at(1, 0);
    assert!(refused!(overlap.bytes(), FormatError::Contradiction(_)).contains("overlap"));
    let odd = f32s(file(), "a").at(0, 4);
    assert!(refused!(odd.bytes(), FormatError::Contradiction(_)).contains("alignment"));
    let outside = f32s(file(), "a").at(0, 1 << 40);
    refused!(outside.bytes(), FormatError::Truncated { .. });
    let wrapped = f32s(file(), "a").at(0, u64::MAX - 31);
    refused!(wrapped.bytes(), FormatError::Truncated { .. });
    let ragged = file().tensor("a", Quant::Q8_0, &[33], &[0; 34]);
    assert!(refused!(ragged.bytes(), FormatError::Contradiction(_)).contains("multiple"));
    let huge = file().tensor("a", Quant::F32, &[1 << 40, 1 << 40], &[0; 32]);
    assert!(refused!(huge.bytes(), FormatError::Contradiction(_)).contains("size"));
    for shape in [&[][..], &[0], &[4, 0]] {
        let empty = file().tensor("a", Quant::F32, shape, &[0; 32]);
        refused!(empty.bytes(), FormatError::Contradiction(_));
    }
    let deep = file().tensor("a", Quant::F32, &[1, 1, 1, 1, 1], &[0; 32]);
    refused!(deep.bytes(), FormatError::BeyondLimit { .. });
    for alignment in [Value::U64(0), Value::U64(3), Value::String("32".into())] {
        let bytes = f32s(file().meta("general.alignment", &alignment), "a").bytes();
        refused!(bytes, FormatError::Contradiction(_));
    }
    let bytes = f32s(file().meta("general.alignment", &Value::U64(1 << 40)), "a").bytes();
    refused!(bytes, FormatError::BeyondLimit { .. });
}

#[test]
fn unknown_types_are_named() {
    let bytes = Gguf::new().raw_tensor("t", 999, &[8], &[0; 32]).bytes();
    let error = parse(&bytes).expect_err("an unknown type");
    assert!(error.is_unsupported() && error.to_string().contains("type 999"), "{error}");
    let header = Header::parse(&bytes).expect("the header alone is whole");
    assert_eq!(header.entries[0].type_number, 999);
}

#[test]
fn arrays_of_arrays_are_skipped_and_deep_ones_refused() {
    let nested = |depth: usize| {
        let mut bytes = kind::ARRAY.to_le_bytes().to_vec();
        for _ in 0..depth {
            bytes.extend(kind::ARRAY.to_le_bytes());
            bytes.extend(1u64.to_le_bytes());
        }
        bytes.extend(kind::U8.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.push(9);
        Gguf::new().raw_meta("deep", &bytes).meta("after", &Value::U64(5)).bytes()
    };
    let file = parse(&nested(2)).expect("two levels");
    assert_eq!(file.meta.get("deep"), Some(&Value::Array(Array::Nested)));
    assert_eq!(file.meta.u64("after"), Some(5));
    refused!(nested(3), FormatError::BeyondLimit { .. });
    refused!(nested(3000), FormatError::BeyondLimit { .. });
}

#[test]
fn shards_are_joined_in_order_and_strangers_refused() {
    let shard = |index: u64, count: u64, name: &str| {
        let file = Gguf::new()
            .meta("split.no", &Value::U64(index))
            .meta("split.count", &Value::U64(count))
            .tensor(name, Quant::F32, &[8], &[0; 32]);
        Bytes::from_vec(file.bytes())
    };
    let file = read(&[shard(0, 2, "a"), shard(1, 2, "b")]).expect("two shards");
    let names: Vec<_> = file.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    for wrong in [
        &[shard(0, 2, "a")][..],
        &[shard(1, 2, "b"), shard(0, 2, "a")],
        &[shard(0, 2, "a"), shard(1, 2, "a")],
        &[shard(0, 2, "a"), shard(1, 3, "b")],
        &[],
    ] {
        assert!(matches!(read(wrong), Err(FormatError::Shards(_))));
    }
}

#[test]
fn hostile_bytes_never_panic_and_never_allocate_beyond_their_size() {
    const ROUNDS: u32 = 20_000;
    let good = good().bytes();
    let mut rng = Rng(0x5eed);
    let mut n_read = 0;
    for _ in 0..ROUNDS {
        let mut bytes = good.clone();
        for _ in 0..=rng.below(4) {
            match rng.below(4) {
                0 => bytes.truncate(rng.below(bytes.len() + 1)),
                1 => {
                    let at = rng.below(bytes.len().max(1));
                    let word = [0, 1, 0x7fff_ffff, u32::MAX, 1 << 31][rng.below(5)];
                    let end = bytes.len().min(at + 4);
                    let n = end - at.min(end);
                    bytes[end - n..end].copy_from_slice(&word.to_le_bytes()[..n]);
                }
                _ => {
                    let at = rng.below(bytes.len().max(1));
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << rng.below(8);
                    }
                }
            }
        }
        let Ok(file) = parse(&bytes) else { continue };
        n_read += 1;
        // What was read is within the bytes it was read from.
        let n_tensor_bytes: usize = file.tensors.iter().map(|tensor| tensor.bytes.len()).sum();
        assert!(n_tensor_bytes <= bytes.len());
    }
    // Some changes (a float's bits, a letter of a name) leave a good file: the rounds went deep.
    assert!(n_read > ROUNDS / 100, "{n_read}");
}
