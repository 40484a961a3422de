//! Gemma 3, text ("Gemma 3 Technical Report", 2025): most layers see a window and rotate with a
//! base of their own, every sixth sees all.

use v4_kernels::{Activation, Rope, RopeKind};
use v4_proto::Ability;

use super::config::{DecoderConfig, Key, LayerConfig, Source, WINDOW, angles, single};
use super::decoder::{Name, Names};
use super::{Arch, decoder};
use crate::Error;

pub(super) static ARCH: Arch = Arch {
    gguf: "gemma3",
    hf: &["gemma3_text"],
    abilities: &[Ability::Completion],
    config,
    names: Names {
        post_attention_norm: Name {
            gguf: "blk.{}.post_attention_norm",
            hf: "model.layers.{}.post_attention_layernorm",
        },
        mlp_norm: Name { gguf: "blk.{}.ffn_norm", hf: "model.layers.{}.pre_feedforward_layernorm" },
        ..decoder::NAMES
    },
    import: None,
};

const DEFAULT_BASE: f64 = 1_000_000.0;
const DEFAULT_LOCAL_BASE: f64 = 10_000.0;
const DEFAULT_PATTERN: usize = 6;
/// The one size whose queries are scaled by the hidden state's share of a head, not by the head.
const LAYERS_OF_27B: usize = 62;

const LOCAL_BASE: Key = Key { gguf: "rope.freq_base_swa", hf: "rope_local_base_freq" };
const QUERY_SCALAR: Key = Key { gguf: "query_pre_attn_scalar", hf: "query_pre_attn_scalar" };

const GLOBAL: usize = 0;
const LOCAL: usize = 1;

fn config(source: &Source<'_>) -> Result<DecoderConfig, Error> {
    let mut config = source.decoder()?;
    config.activation = Activation::GeluTanh;
    config.embedding_scale = single((config.embedding as f64).sqrt());
    config.qk_norm = true;
    config.post_norms = true;
    // GGUF's converter has added the 1 already.
    config.norm_offset = if source.is_gguf() { 0.0 } else { 1.0 };
    config.attention_scale = attention_scale(source, &config)?;
    let local_base = source.positive(LOCAL_BASE)?.unwrap_or(DEFAULT_LOCAL_BASE);
    let local = angles(local_base, config.head_dim).into_iter().map(single).collect();
    config.ropes = vec![
        source.rope(RopeKind::Halves, config.head_dim, DEFAULT_BASE)?,
        Rope { kind: RopeKind::Halves, inv_freq: local, magnitude: 1.0 },
    ];
    let window = source.need_size(WINDOW)?;
    let sees_all = source.sees_all(config.layers.len(), DEFAULT_PATTERN)?;
    for (layer, sees_all) in config.layers.iter_mut().zip(sees_all) {
        let (window, rope) = if sees_all { (None, GLOBAL) } else { (Some(window), LOCAL) };
        *layer = LayerConfig { window, rope, ..*layer };
    }
    Ok(config)
}

fn attention_scale(source: &Source<'_>, config: &DecoderConfig) -> Result<f32, Error> {
    let scalar = match source.positive(QUERY_SCALAR)? {
        Some(scalar) => scalar,
        None if config.layers.len() == LAYERS_OF_27B => {
            config.embedding as f64 / config.n_heads as f64
        }
        None => config.head_dim as f64,
    };
    Ok(single(scalar.sqrt().recip()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Array, File, Format, Meta, Value};

    fn windows(format: Format, entries: &[(&str, Value)]) -> Result<Vec<bool>, Error> {
        let mut meta = Meta::default();
        for (key, value) in entries {
            meta.insert(*key, value.clone());
        }
        let file = File { format, meta, tensors: Vec::new() };
        Source { file: &file, prefix: "gemma3" }.sees_all(7, DEFAULT_PATTERN)
    }

    #[test]
    fn every_sixth_layer_sees_all_unless_the_file_says_which() {
        let sixth = [false, false, false, false, false, true, false];
        let third = [false, false, true, false, false, true, false];
        assert_eq!(windows(Format::Gguf, &[]).expect("the default"), sixth);
        let key = "gemma3.attention.sliding_window_pattern";
        let of = |value| windows(Format::Gguf, &[(key, value)]);
        assert_eq!(of(Value::U64(3)).expect("a number"), third);
        let windowed = third.map(|sees_all| !sees_all).to_vec();
        assert_eq!(of(Value::Array(Array::Bool(windowed))).expect("one a layer"), third);
        assert!(of(Value::Array(Array::Bool(vec![true]))).is_err());
        let names = third.map(|all| if all { "full_attention" } else { "sliding_attention" });
        let types = Value::Array(Array::String(names.map(str::to_owned).to_vec()));
        let found = windows(Format::Safetensors, &[("layer_types", types)]);
        assert_eq!(found.expect("names"), third);
    }
}
