//! Qwen3 with experts ("Qwen3 Technical Report", 2025): its dense form with a mixture of experts in
//! most layers.

use v4_kernels::RopeKind;
use v4_proto::Ability;

use super::config::{DecoderConfig, Key, N_EXPERTS, Source};
use super::{Arch, decoder};
use crate::Error;

pub(super) static ARCH: Arch = Arch {
    gguf: "qwen3moe",
    hf: &["qwen3_moe"],
    abilities: &[Ability::Completion],
    config,
    names: decoder::NAMES,
    import: None,
};

const DEFAULT_BASE: f64 = 1_000_000.0;
const FEED_FORWARD: Key = Key { gguf: "expert_feed_forward_length", hf: "moe_intermediate_size" };
const NORMALISED: Key = Key { gguf: "expert_weights_norm", hf: "norm_topk_prob" };
const DENSE_LAYERS: Key = Key { gguf: "mlp_only_layers", hf: "mlp_only_layers" };
const STEP: Key = Key { gguf: "decoder_sparse_step", hf: "decoder_sparse_step" };

fn config(source: &Source<'_>) -> Result<DecoderConfig, Error> {
    source.refuse(&["attention_bias", "use_sliding_window"])?;
    let mut config = source.expert_decoder(N_EXPERTS, FEED_FORWARD)?;
    config.qk_norm = true;
    config.ropes = vec![source.rope(RopeKind::Halves, config.head_dim, DEFAULT_BASE)?];
    if let Some(experts) = &mut config.experts {
        // Files that do not say so are normalised when they are GGUF, and not when they are not.
        let is_normalised = source.bool(NORMALISED).unwrap_or(source.is_gguf());
        experts.router.is_normalised = is_normalised;
    }
    let dense = source.file.meta.i64s(&source.key(DENSE_LAYERS)).unwrap_or_default();
    let step = source.size(STEP)?.unwrap_or(1).max(1);
    for (number, layer) in (1usize..).zip(&mut config.layers) {
        let is_dense = dense.iter().any(|&dense| usize::try_from(dense) == Ok(number - 1));
        layer.has_experts = number.is_multiple_of(step) && !is_dense;
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use v4_kernels::cpu::CpuOptions;
    use v4_kernels::{Bytes, Cpu, Quant};

    use super::*;
    use crate::arch::decoder::Cost;
    use crate::format::{Array, File, Format, Meta, Tensor, Value};
    use crate::model::{Alone, Model};

    fn tensor(name: &str, shape: &[u64]) -> Tensor {
        let n = shape.iter().product::<u64>();
        let value = |i: u64| ((i * 37 % 19) as f32 - 9.0) / 32.0;
        let bytes = (0..n).flat_map(|i| value(i).to_le_bytes()).collect();
        let (name, shape) = (name.to_owned(), shape.to_vec());
        Tensor { name, quant: Quant::F32, shape, bytes: Bytes::from_vec(bytes), scales: None }
    }

    /// One layer of four experts, two of which a token goes to.
    fn tiny() -> File {
        let mut meta = Meta::default();
        meta.insert("general.architecture", Value::String("qwen3moe".into()));
        for (key, n) in [
            ("block_count", 1),
            ("context_length", 64),
            ("embedding_length", 8),
            ("feed_forward_length", 64),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("expert_count", 4),
            ("expert_used_count", 2),
            ("expert_feed_forward_length", 6),
        ] {
            meta.insert(format!("qwen3moe.{key}"), Value::U64(n));
        }
        meta.insert("qwen3moe.attention.layer_norm_rms_epsilon", Value::F64(1e-5));
        let tensors: &[(&str, &[u64])] = &[
            ("token_embd.weight", &[10, 8]),
            ("output_norm.weight", &[8]),
            ("blk.0.attn_norm.weight", &[8]),
            ("blk.0.attn_q.weight", &[8, 8]),
            ("blk.0.attn_k.weight", &[4, 8]),
            ("blk.0.attn_v.weight", &[4, 8]),
            ("blk.0.attn_output.weight", &[8, 8]),
            ("blk.0.attn_q_norm.weight", &[4]),
            ("blk.0.attn_k_norm.weight", &[4]),
            ("blk.0.ffn_norm.weight", &[8]),
            ("blk.0.ffn_gate_inp.weight", &[4, 8]),
            ("blk.0.ffn_gate_exps.weight", &[4, 6, 8]),
            ("blk.0.ffn_up_exps.weight", &[4, 6, 8]),
            ("blk.0.ffn_down_exps.weight", &[4, 8, 6]),
        ];
        let tensors = tensors.iter().map(|(name, shape)| tensor(name, shape)).collect();
        File { format: Format::Gguf, meta, tensors }
    }

    fn open(file: &File) -> Result<Model, Error> {
        let cpu = Cpu::open(&CpuOptions { threads: 2, isa: None, ..CpuOptions::default() })
            .expect("a processor");
        Model::new(file, Box::new(cpu))
    }

    fn logits(file: &File) -> Vec<f32> {
        let mut model = open(file).expect("a good file");
        let mut logits = Vec::new();
        let mut alone = Alone::new(&mut model, 3).expect("memory");
        alone.feed(&[1, 2, 3], &[0, 2], &mut logits).expect("a forward pass");
        logits
    }

    #[test]
    fn a_token_costs_the_experts_it_goes_to() {
        let attention = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8;
        let block_weights = attention + 4 * 8 + 2 * 3 * (6 * 8);
        let expected = Cost {
            block_weights,
            output_weights: 10 * 8,
            weight_bytes: 4 * (block_weights + 10 * 8),
            total_bytes: 4 * (block_weights + 10 * 8 + 2 * 3 * (6 * 8)),
        };
        assert_eq!(open(&tiny()).expect("a good file").cost(), expected);
    }

    #[test]
    fn the_scale_of_an_expert_multiplies_its_product() {
        let mut scaled = tiny();
        let scales: Vec<u8> = [2f32, 1.0, 2.0, 1.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let scale = tensor("blk.0.ffn_down_exps.scale", &[4]);
        scaled.tensors.push(Tensor { bytes: Bytes::from_vec(scales), ..scale });
        let mut doubled = tiny();
        let down = doubled.tensors.last_mut().expect("down");
        let (floats, _) = down.bytes.as_slice().as_chunks::<4>();
        let factor = |at: usize| if (at / (8 * 6)).is_multiple_of(2) { 2.0 } else { 1.0 };
        let value =
            |(at, x): (usize, &[u8; 4])| (f32::from_le_bytes(*x) * factor(at)).to_le_bytes();
        down.bytes = Bytes::from_vec(floats.iter().enumerate().flat_map(value).collect());
        assert_eq!(logits(&scaled), logits(&doubled));
        assert_ne!(logits(&scaled), logits(&tiny()));
    }

    #[test]
    fn every_tensor_is_needed_with_its_shape() {
        for i in 0..tiny().tensors.len() {
            let mut file = tiny();
            let name = file.tensors.remove(i).name;
            let error = open(&file).err().expect("a bad file");
            assert!(matches!(error, Error::MissingTensor { name: n } if n == name), "{name}");
            let mut file = tiny();
            file.tensors[i].shape.push(1);
            let error = open(&file).err().expect("a bad file");
            assert!(matches!(error, Error::TensorShape { name: n, .. } if n == name), "{name}");
        }
    }

    fn of(format: Format, entries: &[(&str, Value)]) -> Result<DecoderConfig, Error> {
        let mut meta = tiny().meta;
        let hf = [
            ("max_position_embeddings", 64),
            ("hidden_size", 8),
            ("intermediate_size", 64),
            ("num_attention_heads", 2),
            ("num_hidden_layers", 4),
            ("num_experts", 4),
            ("num_experts_per_tok", 2),
            ("moe_intermediate_size", 6),
        ];
        for (key, n) in hf {
            meta.insert(key, Value::U64(n));
        }
        meta.insert("rms_norm_eps", Value::F64(1e-6));
        for (key, value) in entries {
            meta.insert(*key, value.clone());
        }
        config(&Source { file: &File { format, meta, tensors: Vec::new() }, prefix: "qwen3moe" })
    }

    #[test]
    fn layers_are_dense_where_the_file_says_so() {
        let has = |entries: &[(&str, Value)]| -> Vec<bool> {
            let config = of(Format::Safetensors, entries).expect("a good config");
            config.layers.iter().map(|layer| layer.has_experts).collect()
        };
        let dense = |layers: &[u64]| ("mlp_only_layers", Value::Array(Array::U64(layers.to_vec())));
        let step = || ("decoder_sparse_step", Value::U64(2));
        assert_eq!(has(&[]), [true; 4]);
        assert_eq!(has(&[dense(&[0, 9])]), [false, true, true, true]);
        assert_eq!(has(&[step()]), [false, true, false, true]);
        assert_eq!(has(&[step(), dense(&[3])]), [false, true, false, false]);
    }

    #[test]
    fn weights_are_normalised_as_the_format_does_unless_it_says_otherwise() {
        let is_normalised = |format, entries: &[(&str, Value)]| {
            let config = of(format, entries).expect("a good config");
            config.experts.expect("experts").router.is_normalised
        };
        assert!(is_normalised(Format::Gguf, &[]));
        assert!(!is_normalised(Format::Safetensors, &[]));
        assert!(is_normalised(Format::Safetensors, &[("norm_topk_prob", Value::Bool(true))]));
        let no = ("qwen3moe.expert_weights_norm", Value::Bool(false));
        assert!(!is_normalised(Format::Gguf, &[no]));
        let too_many = ("num_experts_per_tok", Value::U64(5));
        let error = of(Format::Safetensors, &[too_many]).expect_err("five of four");
        assert!(matches!(error, Error::Metadata { .. }), "{error:?}");
    }
}
