//! Llama (Touvron et al. 2023; "The Llama 3 Herd of Models", 2024) and the many models of its
//! shape.

use v4_kernels::RopeKind;
use v4_proto::Ability;

use super::config::{DecoderConfig, Source};
use super::{Arch, decoder};
use crate::Error;

pub(super) static ARCH: Arch = Arch {
    gguf: "llama",
    hf: &["llama"],
    abilities: &[Ability::Completion],
    config,
    names: decoder::NAMES,
    import: None,
};

const DEFAULT_BASE: f64 = 10_000.0;

fn config(source: &Source<'_>) -> Result<DecoderConfig, Error> {
    source.refuse(&["attention_bias", "mlp_bias"])?;
    // GGUF's converter reorders the rows of query and key so that neighbours rotate together.
    let kind = if source.is_gguf() { RopeKind::Adjacent } else { RopeKind::Halves };
    let config = source.decoder()?;
    let rope = source.rope(kind, config.head_dim, DEFAULT_BASE)?;
    Ok(DecoderConfig { ropes: vec![rope], ..config })
}

/// A model of this shape, tiny, for tests of what all architectures share.
#[cfg(test)]
pub(super) fn tiny() -> crate::format::File {
    use v4_kernels::{Bytes, Quant};

    use crate::format::{File, Format, Meta, Tensor, Value};

    let mut meta = Meta::default();
    meta.insert("general.architecture", Value::String("llama".into()));
    for (key, n) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 8),
        ("feed_forward_length", 16),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
    ] {
        meta.insert(format!("llama.{key}"), Value::U64(n));
    }
    meta.insert("llama.attention.layer_norm_rms_epsilon", Value::F64(1e-5));
    let tensor = |(name, shape): &(&str, &[u64])| {
        let n = shape.iter().product::<u64>();
        let value = |i: u64| ((i * 37 % 19) as f32 - 9.0) / 32.0;
        Tensor {
            name: (*name).to_owned(),
            quant: Quant::F32,
            shape: shape.to_vec(),
            bytes: Bytes::from_vec((0..n).flat_map(|i| value(i).to_le_bytes()).collect()),
            scales: None,
        }
    };
    let tensors: &[(&str, &[u64])] = &[
        ("token_embd.weight", &[10, 8]),
        ("output_norm.weight", &[8]),
        ("output.weight", &[10, 8]),
        ("blk.0.attn_norm.weight", &[8]),
        ("blk.0.attn_q.weight", &[8, 8]),
        ("blk.0.attn_k.weight", &[4, 8]),
        ("blk.0.attn_v.weight", &[4, 8]),
        ("blk.0.attn_output.weight", &[8, 8]),
        ("blk.0.ffn_norm.weight", &[8]),
        ("blk.0.ffn_gate.weight", &[16, 8]),
        ("blk.0.ffn_up.weight", &[16, 8]),
        ("blk.0.ffn_down.weight", &[8, 16]),
    ];
    File { format: Format::Gguf, meta, tensors: tensors.iter().map(tensor).collect() }
}
