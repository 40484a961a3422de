//! Qwen2 and Qwen2.5 (Qwen Team 2024): llama's shape with a bias on query, key and value.

use v4_kernels::RopeKind;
use v4_proto::Ability;

use super::config::{DecoderConfig, Key, Source, WINDOW};
use super::{Arch, decoder};
use crate::Error;

pub(super) static ARCH: Arch = Arch {
    gguf: "qwen2",
    hf: &["qwen2"],
    abilities: &[Ability::Completion],
    config,
    names: decoder::NAMES,
    import: None,
};

const DEFAULT_BASE: f64 = 10_000.0;
const USE_WINDOW: Key = Key { gguf: "use_sliding_window", hf: "use_sliding_window" };
const FIRST_WINDOWED: Key = Key { gguf: "max_window_layers", hf: "max_window_layers" };

fn config(source: &Source<'_>) -> Result<DecoderConfig, Error> {
    let mut config = source.decoder()?;
    config.qkv_bias = true;
    config.ropes = vec![source.rope(RopeKind::Halves, config.head_dim, DEFAULT_BASE)?];
    if source.bool(USE_WINDOW) == Some(true) {
        let window = source.need_size(WINDOW)?;
        let first = source.size(FIRST_WINDOWED)?.unwrap_or(0);
        config.layers.iter_mut().skip(first).for_each(|layer| layer.window = Some(window));
    }
    Ok(config)
}
