//! A model's files to an engine that answers.

use std::sync::Arc;

use v4_kernels::{Cpu, KvType, cpu::CpuOptions};
use v4_proto::frame::{self, LoadOptions, Precision, Stage};
use v4_proto::{ModelFiles, ModelInfo};

use crate::Error;
use crate::kv::blocks::{BLOCK_TOKENS, blocks_for};
use crate::model::Model;
use crate::prepare::Prepare;
use crate::step::Engine;

/// A loaded model.
pub struct Loaded {
    /// Turns requests into sequences; may be used from any thread.
    pub prepare: Arc<Prepare>,
    /// Works on them.
    pub engine: Engine,
    /// The model's figures.
    pub info: ModelInfo,
    /// Tokens of context a sequence gets.
    pub context: u32,
    /// Bytes that weights, the KV cache when it is full, and scratch take.
    pub memory_bytes: u64,
    /// Why blocks of the KV cache are not kept on disk as was asked; all else works.
    pub disk_error: Option<Error>,
}

/// Loads a model; `progress` hears how far it is: stage, bytes done, bytes in all.
///
/// # Errors
/// [`Error`], saying what is wrong with the files or the wish.
pub fn load(
    files: &ModelFiles,
    options: &LoadOptions,
    progress: &mut dyn FnMut(Stage, u64, u64),
) -> Result<Loaded, Error> {
    if let Some(on_gpus) = &options.on_gpus {
        let uuids: Vec<&str> = on_gpus.shares.iter().map(|share| share.uuid.as_str()).collect();
        return Err(Error::unsupported(format!("computing on {}", uuids.join(", "))));
    }
    let threads = options.threads as usize;
    let precision = options.precision;
    let is_exact = precision == Precision::Quality;
    let cpu = Cpu::open(&CpuOptions { threads, isa: options.isa.clone(), is_exact })?;
    let model = Model::open(files, Box::new(cpu), progress)?;
    let model = model.with_kv_type(kv_type(options.kv_type))?;
    let info = model.info().clone();
    let context = options.context.min(info.context_length).max(1);
    let prepare = Arc::new(Prepare::new(model.meta(), files.chat_template.as_deref(), context)?);
    let memory_bytes = info
        .weight_bytes
        .saturating_add(model.scratch_bytes())
        .saturating_add(kv_bytes(options.slots, context, model.kv_bytes_per_token()));
    let mut engine = Engine::new(model, Arc::clone(prepare.tokenizer()), context, options.slots)?;
    let disk = options.kv_disk.as_ref();
    let disk_error = disk.and_then(|options| engine.keep_on_disk(options, precision.name()).err());
    Ok(Loaded { prepare, engine, info, context, memory_bytes, disk_error })
}

fn kv_type(wanted: frame::KvType) -> KvType {
    match wanted {
        frame::KvType::F16 => KvType::F16,
        frame::KvType::Bf16 => KvType::Bf16,
        frame::KvType::Q8_0 => KvType::Q8_0,
    }
}

/// Bytes of the KV cache of `slots` sequences of `context` tokens. Counts come from others: where
/// they make no sense, the most there can be.
fn kv_bytes(slots: u32, context: u32, bytes_per_token: u64) -> u64 {
    let tokens = (blocks_for(context as usize) as u64).saturating_mul(BLOCK_TOKENS as u64);
    u64::from(slots.max(1)).saturating_mul(tokens).saturating_mul(bytes_per_token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_columns_count_the_same_bytes() {
        for wanted in frame::KvType::ALL {
            let kind = kv_type(wanted);
            assert_eq!(kind.name(), wanted.name());
            let half = KvType::F16.bytes(1 << 20) as u64;
            assert_eq!(kind.bytes(1 << 20) as u64, wanted.bytes(half));
        }
    }

    #[test]
    fn the_kv_cache_is_counted_in_whole_blocks_and_never_overflows() {
        let table = [
            ((1, 1, 10), 640),
            ((2, 65, 10), 2560),
            ((0, 64, 10), 640),
            ((u32::MAX, u32::MAX, 1 << 20), u64::MAX),
            ((u32::MAX, u32::MAX, u64::MAX), u64::MAX),
        ];
        for ((slots, context, bytes_per_token), expected) in table {
            assert_eq!(kv_bytes(slots, context, bytes_per_token), expected, "{slots} {context}");
        }
    }
}
