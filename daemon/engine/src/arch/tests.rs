//! What all architectures share: metadata that makes no sense, and binding that is strict.

use v4_kernels::cpu::CpuOptions;
use v4_kernels::{Bytes, Cpu, MAX_QUERY_GROUP, Quant};
use v4_proto::{Code, limits};

use super::*;
use crate::format::{Array, Tensor, Value};
use crate::inspect;
use crate::model::{Alone, Model};

fn tiny() -> File {
    llama::tiny()
}

fn key(name: &str) -> String {
    format!("{}.{name}", ALL[0].gguf)
}

fn open(file: &File) -> Result<Model, Error> {
    let cpu = Cpu::open(&CpuOptions { threads: 1, isa: None, ..CpuOptions::default() })
        .expect("a processor");
    Model::new(file, Box::new(cpu))
}

/// Why a file is refused.
fn refused(file: &File) -> Error {
    open(file).err().expect("a bad file")
}

fn logits(file: &File) -> Vec<f32> {
    let mut model = open(file).expect("a good file");
    let mut logits = Vec::new();
    let mut alone = Alone::new(&mut model, 3).expect("memory");
    alone.feed(&[1, 2, 3], &[2], &mut logits).expect("a forward pass");
    logits
}

fn vector(name: &str, values: &[f32]) -> Tensor {
    Tensor {
        name: name.to_owned(),
        quant: Quant::F32,
        shape: vec![values.len() as u64],
        bytes: Bytes::from_vec(values.iter().flat_map(|x| x.to_le_bytes()).collect()),
        scales: None,
    }
}

fn find<'a>(file: &'a mut File, name: &str) -> &'a mut Tensor {
    file.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of that name")
}

#[test]
fn every_architecture_has_names_of_its_own() {
    let gguf: Vec<_> = ALL.iter().map(|arch| arch.gguf).collect();
    let hf: Vec<_> = ALL.iter().flat_map(|arch| arch.hf).collect();
    for names in [gguf, hf.into_iter().copied().collect()] {
        let unique: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len(), "{names:?}");
    }
}

#[test]
fn an_unknown_architecture_is_named_with_those_that_are_known() {
    let mut file = tiny();
    file.meta.insert("general.architecture", Value::String("stranger".into()));
    let fault = refused(&file).fault();
    assert_eq!(fault.code, Code::Unsupported);
    assert!(fault.message.contains("stranger") && fault.message.contains(ALL[0].gguf), "{fault}");
    file.meta.insert("general.architecture", Value::String("x".repeat(1 << 20)));
    assert!(refused(&file).to_string().len() < 200);
}

#[test]
fn metadata_that_makes_no_sense_is_named() {
    let numbers = |all: &[u64]| Value::Array(Array::U64(all.to_vec()));
    let bad = [
        ("block_count", Value::U64(0)),
        ("block_count", Value::U64(limits::MODEL_LAYERS + 1)),
        ("block_count", Value::U64(u64::MAX)),
        ("block_count", Value::String("one".into())),
        ("context_length", Value::U64(0)),
        ("context_length", Value::U64(1 << 40)),
        ("embedding_length", Value::I64(-8)),
        ("embedding_length", Value::U64(limits::MODEL_WIDTH + 1)),
        ("feed_forward_length", numbers(&[16, 32])),
        ("attention.head_count", Value::U64(0)),
        ("attention.head_count_kv", Value::U64(0)),
        ("attention.head_count_kv", Value::U64(3)),
        ("attention.layer_norm_rms_epsilon", Value::F64(f64::NAN)),
        ("attention.layer_norm_rms_epsilon", Value::F64(0.0)),
        ("rope.dimension_count", Value::U64(3)),
        ("rope.dimension_count", Value::U64(6)),
        ("rope.freq_base", Value::F64(-1.0)),
        ("rope.freq_base", Value::F64(f64::INFINITY)),
        ("final_logit_softcapping", Value::F64(-30.0)),
    ];
    for (name, value) in bad {
        let mut file = tiny();
        file.meta.insert(key(name), value.clone());
        let error = refused(&file);
        assert!(matches!(error, Error::Metadata { .. }), "{name} {value:?}: {error:?}");
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(error.fault().code, Code::Corrupt);
    }
    let unsupported = [
        ("rope.scaling.type", Value::String("stranger".into())),
        ("expert_count", Value::U64(8)),
        ("attention.key_length", Value::U64(5)),
        ("attention.value_length", Value::U64(2)),
        // 49 heads share the one KV head.
        ("attention.head_count", Value::U64(MAX_QUERY_GROUP as u64 + 1)),
    ];
    for (name, value) in unsupported {
        let mut file = tiny();
        file.meta.insert(key(name), value);
        // So that no other width depends on the number of heads.
        if name == "attention.head_count" {
            file.meta.insert(key("attention.key_length"), Value::U64(4));
        }
        assert_eq!(refused(&file).fault().code, Code::Unsupported, "{name}");
        assert!(!inspect::info(&file).expect("a header").supported, "{name}");
    }
    let mut file = tiny();
    file.meta.insert(key("attention.head_count"), Value::U64(MAX_QUERY_GROUP as u64));
    file.meta.insert(key("attention.key_length"), Value::U64(4));
    assert!(inspect::info(&file).expect("a header").supported);
}

#[test]
fn sizes_said_for_each_layer_count_when_they_are_equal() {
    let mut file = tiny();
    let expected = logits(&file);
    file.meta.insert(key("attention.head_count_kv"), Value::Array(Array::I64(vec![1, 1])));
    assert_eq!(logits(&file), expected);
}

#[test]
fn every_tensor_is_needed_and_named_when_it_is_missing() {
    let n = tiny().tensors.len();
    for i in 0..n {
        let mut file = tiny();
        let name = file.tensors.remove(i).name;
        if name == "output.weight" {
            // Tied then: the embedding stands in.
            assert!(open(&file).is_ok());
            continue;
        }
        match refused(&file) {
            Error::MissingTensor { name: missing } => assert_eq!(missing, name),
            error => panic!("{name}: {error:?}"),
        }
    }
}

#[test]
fn every_shape_is_checked() {
    for i in 0..tiny().tensors.len() {
        let mut file = tiny();
        file.tensors[i].shape.push(1);
        let name = file.tensors[i].name.clone();
        match refused(&file) {
            Error::TensorShape { name: wrong, .. } => assert_eq!(wrong, name),
            error => panic!("{name}: {error:?}"),
        }
    }
    let mut file = tiny();
    // As many weights, in a type whose blocks a norm is never stored in.
    let norm = find(&mut file, "output_norm.weight");
    (norm.quant, norm.bytes) = (Quant::Q8_0, Bytes::from_vec(vec![0; 34]));
    assert!(matches!(refused(&file), Error::TensorShape { .. }));
}

#[test]
fn a_tensor_without_a_place_is_refused_unless_it_is_known_to_have_none() {
    let mut file = tiny();
    file.tensors.push(vector("blk.0.attn_q.bias", &[0.0; 8]));
    let error = refused(&file);
    assert!(matches!(error, Error::UnboundTensor { .. }), "{error:?}");
    assert!(error.to_string().contains("blk.0.attn_q.bias"));
    let mut file = tiny();
    file.tensors.push(vector("blk.0.attn_q.input_scale", &[1.0]));
    assert!(open(&file).is_ok());
}

#[test]
fn the_scale_of_a_tensor_multiplies_its_product() {
    let mut file = tiny();
    let plain = logits(&file);
    file.tensors.push(vector("output.scale", &[2.0]));
    let doubled: Vec<f32> = plain.iter().map(|x| 2.0 * x).collect();
    assert_eq!(logits(&file), doubled);
}

#[test]
fn factors_of_the_rotary_embedding_divide_its_angles() {
    let angles = |file: &File| resolve(file).expect("a good file").1.ropes[0].inv_freq.clone();
    let mut file = tiny();
    let plain = angles(&file);
    file.tensors.push(vector(config::ROPE_FACTORS, &[1.0, 8.0]));
    assert_eq!(angles(&file), [plain[0], plain[1] / 8.0]);
    file.meta.insert(key("rope.scaling.type"), Value::String("linear".into()));
    file.meta.insert(key("rope.scaling.factor"), Value::F64(2.0));
    assert_eq!(angles(&file), [plain[0] / 2.0, plain[1] / 16.0]);
    file.tensors.pop();
    for factors in [&[1.0][..], &[1.0, 1.0, 1.0], &[1.0, 0.0], &[f32::NAN, 1.0]] {
        file.tensors.push(vector(config::ROPE_FACTORS, factors));
        assert!(resolve(&file).is_err(), "{factors:?}");
        file.tensors.pop();
    }
}

#[test]
fn hostile_metadata_never_panics() {
    let values = [
        Value::U64(0),
        Value::U64(1),
        Value::U64(u64::MAX),
        Value::I64(i64::MIN),
        Value::F64(f64::NAN),
        Value::F64(1e300),
        Value::F64(5e-324),
        Value::Bool(true),
        Value::String(String::new()),
        Value::Array(Array::Nested),
        Value::Array(Array::U64(Vec::new())),
        Value::Array(Array::Bool(vec![false; 3])),
    ];
    for arch in ALL {
        let mut meta = Meta::default();
        meta.insert("general.architecture", Value::String(arch.gguf.into()));
        for (name, value) in tiny().meta.iter() {
            if let Some(rest) = name.strip_prefix(ALL[0].gguf) {
                meta.insert(format!("{}{rest}", arch.gguf), value.clone());
            }
        }
        for name in [
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "attention.key_length",
            "rope.freq_base",
            "rope.freq_base_swa",
            "rope.dimension_count",
            "expert_count",
            "expert_used_count",
            "expert_feed_forward_length",
            "rope.scaling.original_context_length",
            "rope.scaling.yarn_beta_fast",
        ] {
            meta.insert(format!("{}.{name}", arch.gguf), Value::U64(4));
        }
        let names: Vec<String> = meta.iter().map(|(name, _)| name.to_owned()).collect();
        for (name, value) in names.iter().flat_map(|name| values.iter().map(move |v| (name, v))) {
            let mut meta = meta.clone();
            meta.insert(name.clone(), value.clone());
            let file = File { format: Format::Gguf, meta, tensors: tiny().tensors };
            // Any answer will do: what counts is that there is one, and soon.
            let _ = open(&file);
        }
    }
}
