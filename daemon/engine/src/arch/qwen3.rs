//! Qwen3, dense ("Qwen3 Technical Report", 2025): llama's shape with a norm on each head of query
//! and key.

use v4_kernels::RopeKind;
use v4_proto::Ability;

use super::config::{DecoderConfig, Source};
use super::{Arch, decoder};
use crate::Error;

pub(super) static ARCH: Arch = Arch {
    gguf: "qwen3",
    hf: &["qwen3"],
    abilities: &[Ability::Completion],
    config,
    names: decoder::NAMES,
    import: None,
};

const DEFAULT_BASE: f64 = 1_000_000.0;

fn config(source: &Source<'_>) -> Result<DecoderConfig, Error> {
    source.refuse(&["attention_bias", "use_sliding_window"])?;
    let mut config = source.decoder()?;
    config.qk_norm = true;
    config.ropes = vec![source.rope(RopeKind::Halves, config.head_dim, DEFAULT_BASE)?];
    Ok(config)
}
