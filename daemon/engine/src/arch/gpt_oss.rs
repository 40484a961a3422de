//! gpt-oss ("gpt-oss-120b & gpt-oss-20b Model Card", OpenAI 2025, and its published code): experts
//! in every layer, biases on all products, sinks in attention, a window in every other layer.

use v4_kernels::{Activation, Bytes, RopeKind};
use v4_proto::Ability;

use super::config::{DecoderConfig, Key, N_LOCAL_EXPERTS, Ramp, Source, WINDOW, single};
use super::decoder::{Name, Names};
use super::{Arch, decoder};
use crate::Error;
use crate::format::{File, Format, Tensor};

pub(super) static ARCH: Arch = Arch {
    gguf: "gpt-oss",
    hf: &["gpt_oss"],
    abilities: &[Ability::Completion],
    config,
    names: Names {
        mlp_norm: Name {
            gguf: "blk.{}.post_attention_norm",
            hf: "model.layers.{}.post_attention_layernorm",
        },
        router: Name { gguf: "blk.{}.ffn_gate_inp", hf: "model.layers.{}.mlp.router" },
        expert_gate: Name {
            gguf: "blk.{}.ffn_gate_exps",
            hf: "model.layers.{}.mlp.experts.gate_proj",
        },
        expert_up: Name { gguf: "blk.{}.ffn_up_exps", hf: "model.layers.{}.mlp.experts.up_proj" },
        expert_down: Name {
            gguf: "blk.{}.ffn_down_exps",
            hf: "model.layers.{}.mlp.experts.down_proj",
        },
        ..decoder::NAMES
    },
    import: Some(import),
};

const DEFAULT_BASE: f64 = 150_000.0;
const ALPHA: f32 = 1.702;
const DEFAULT_LIMIT: f64 = 7.0;
/// Every other layer has a window, the first among them.
const DEFAULT_PATTERN: usize = 2;
const LIMIT: Key = Key { gguf: "swiglu_limit", hf: "swiglu_limit" };
const FEED_FORWARD: Key = Key { gguf: "expert_feed_forward_length", hf: "intermediate_size" };

fn config(source: &Source<'_>) -> Result<DecoderConfig, Error> {
    let mut config = source.expert_decoder(N_LOCAL_EXPERTS, FEED_FORWARD)?;
    config.qkv_bias = true;
    config.output_bias = true;
    config.sinks = true;
    let limit = single(source.positive(LIMIT)?.unwrap_or(DEFAULT_LIMIT));
    config.activation = Activation::ClampedSwish { alpha: ALPHA, limit };
    if let Some(experts) = &mut config.experts {
        experts.bias = true;
    }
    // The published code does not round the ends of YaRN's ramp, and config.json says so; GGUF has
    // no entry for it, and its own runtime rounds. The weights were trained without.
    let kind = (RopeKind::Halves, Ramp::Exact);
    config.ropes = vec![source.ramped_rope(kind, config.head_dim, DEFAULT_BASE)?];
    let window = source.need_size(WINDOW)?;
    let sees_all = source.sees_all(config.layers.len(), DEFAULT_PATTERN)?;
    for (layer, sees_all) in config.layers.iter_mut().zip(sees_all) {
        layer.window = (!sees_all).then_some(window);
    }
    Ok(config)
}

/// Ends of names in Hugging Face's files and what they become.
const RENAMED: [(&str, &str); 3] = [
    (".self_attn.sinks", ".self_attn.sinks.weight"),
    (".experts.down_proj", ".experts.down_proj.weight"),
    (".experts.down_proj_bias", ".experts.down_proj.bias"),
];
/// The same of tensors whose rows are gate and up by turns.
const BY_TURNS: [(&str, [&str; 2]); 2] = [
    (".experts.gate_up_proj", [".experts.gate_proj.weight", ".experts.up_proj.weight"]),
    (".experts.gate_up_proj_bias", [".experts.gate_proj.bias", ".experts.up_proj.bias"]),
];

fn import(file: &File) -> Result<Vec<Tensor>, Error> {
    if file.format == Format::Gguf {
        return Ok(file.tensors.clone());
    }
    let mut tensors = Vec::with_capacity(file.tensors.len());
    for tensor in &file.tensors {
        let by_turns = BY_TURNS.iter().find_map(|(end, to)| {
            let stem = tensor.name.strip_suffix(end)?;
            Some(to.map(|to| format!("{stem}{to}")))
        });
        let renamed = RENAMED.iter().find_map(|(end, to)| {
            let stem = tensor.name.strip_suffix(end)?;
            Some(format!("{stem}{to}"))
        });
        match (by_turns, renamed) {
            (Some(names), _) => tensors.extend(split(tensor, names)?),
            (None, Some(name)) => tensors.push(Tensor { name, ..tensor.clone() }),
            (None, None) => tensors.push(tensor.clone()),
        }
    }
    Ok(tensors)
}

/// The even and the odd rows of `[experts, rows, cols]`, or items of `[experts, rows]`.
fn split(tensor: &Tensor, names: [String; 2]) -> Result<[Tensor; 2], Error> {
    let blocks = tensor.blocks();
    let [experts, rows, ..] = tensor.shape[..] else { return Err(odd(tensor)) };
    let n_rows = experts.checked_mul(rows).and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
    if rows % 2 != 0 || n_rows == 0 || !blocks.len().is_multiple_of(n_rows) || blocks.is_empty() {
        return Err(odd(tensor));
    }
    let mut shape = tensor.shape.clone();
    shape[1] = rows / 2;
    let row_bytes = blocks.len() / n_rows;
    let mut turn = 0;
    Ok(names.map(|name| {
        let every_second = blocks.as_slice().chunks_exact(row_bytes).skip(turn).step_by(2);
        turn += 1;
        let bytes = Bytes::from_vec(every_second.flatten().copied().collect());
        Tensor { name, quant: tensor.quant, shape: shape.clone(), bytes, scales: None }
    }))
}

fn odd(tensor: &Tensor) -> Error {
    Error::TensorShape {
        name: tensor.name.clone(),
        found: format!("{:?} of {}", tensor.shape, tensor.quant),
        expected: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use v4_kernels::Quant;

    use super::*;
    use crate::format::{Meta, Value};

    #[test]
    fn rows_by_turns_are_gate_and_up() {
        let tensor = |name: &str, shape: &[u64]| Tensor {
            name: format!("model.layers.0.mlp{name}"),
            quant: Quant::F16,
            shape: shape.to_vec(),
            bytes: Bytes::from_vec((0..8 * shape.get(2).map_or(2, |_| 4)).collect()),
            scales: None,
        };
        let file = |tensors| File { format: Format::Safetensors, meta: Meta::default(), tensors };
        let weight = tensor(".experts.gate_up_proj", &[2, 4, 2]);
        let bias = tensor(".experts.gate_up_proj_bias", &[2, 4]);
        let found = import(&file(vec![weight, bias])).expect("good tensors");
        let names: Vec<_> = found.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "model.layers.0.mlp.experts.gate_proj.weight",
                "model.layers.0.mlp.experts.up_proj.weight",
                "model.layers.0.mlp.experts.gate_proj.bias",
                "model.layers.0.mlp.experts.up_proj.bias",
            ]
        );
        assert_eq!(found[1].shape, [2, 2, 2]);
        assert_eq!(found[1].bytes.as_slice()[..8], [4, 5, 6, 7, 12, 13, 14, 15]);
        assert_eq!(found[2].shape, [2, 2]);
        assert_eq!(found[2].bytes.as_slice(), [0, 1, 4, 5, 8, 9, 12, 13]);
        let odd = tensor(".experts.gate_up_proj", &[2, 3, 2]);
        assert!(matches!(import(&file(vec![odd])), Err(Error::TensorShape { .. })));
        let flat = tensor(".experts.gate_up_proj", &[8]);
        assert!(matches!(import(&file(vec![flat])), Err(Error::TensorShape { .. })));
    }

    #[test]
    fn the_ramp_of_a_rotation_is_exact_unless_the_file_says_otherwise() {
        let mut meta = Meta::default();
        for (key, value) in [("factor", 8.0), ("original_max_position_embeddings", 64.0)] {
            meta.insert(format!("rope_scaling.{key}"), Value::F64(value));
        }
        meta.insert("rope_scaling.rope_type", Value::String("yarn".into()));
        let of = |meta: &Meta, ramp| {
            let meta = meta.clone();
            let file = File { format: Format::Safetensors, meta, tensors: Vec::new() };
            let source = Source { file: &file, prefix: "" };
            source.ramped_rope((RopeKind::Halves, ramp), 64, DEFAULT_BASE).expect("a rope")
        };
        let (exact, rounded) = (of(&meta, Ramp::Exact), of(&meta, Ramp::Rounded));
        assert_ne!(exact.inv_freq, rounded.inv_freq);
        assert!((exact.magnitude - 1.207_944).abs() < 1e-6, "{}", exact.magnitude);
        // A ramp that rounds is no steeper, and ends where it did.
        assert_eq!(exact.inv_freq[0].to_bits(), 1f32.to_bits());
        assert_eq!(exact.inv_freq[31].to_bits(), rounded.inv_freq[31].to_bits());
        meta.insert("rope_scaling.truncate", Value::Bool(true));
        assert_eq!(of(&meta, Ramp::Exact).inv_freq, rounded.inv_freq);
        meta.insert("rope_scaling.truncate", Value::Bool(false));
        assert_eq!(of(&meta, Ramp::Rounded).inv_freq, exact.inv_freq);
    }
}
