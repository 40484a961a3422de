//! What a model's header says, without its weights: for listings, admission and clients.

use std::collections::BTreeMap;

use serde_json::{Map as JsonMap, Value as Json};
use v4_kernels::{Bytes, Quant};
use v4_proto::{
    Ability, Inspection, LayerRun, Layout, ModelFiles, ModelInfo, TensorInfo, limits::MODEL_LAYERS,
};

use crate::arch::config::{DecoderConfig, Output};
use crate::format::folder::Folder;
use crate::format::{
    self, Array, File, Format, FormatError, Meta, Tensor, Value, gguf, safetensors,
};
use crate::{Error, arch};

const FILE_TYPE: &str = "general.file_type";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
const TOKENS: &str = "tokenizer.ggml.tokens";

/// GGUF's names of `general.file_type`, by number; numbers without a name were taken back.
const FILE_TYPES: &[(u64, &str)] = &[
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (7, "Q8_0"),
    (8, "Q5_0"),
    (9, "Q5_1"),
    (10, "Q2_K"),
    (11, "Q3_K_S"),
    (12, "Q3_K_M"),
    (13, "Q3_K_L"),
    (14, "Q4_K_S"),
    (15, "Q4_K_M"),
    (16, "Q5_K_S"),
    (17, "Q5_K_M"),
    (18, "Q6_K"),
    (19, "IQ2_XXS"),
    (20, "IQ2_XS"),
    (21, "Q2_K_S"),
    (22, "IQ3_XS"),
    (23, "IQ3_XXS"),
    (24, "IQ1_S"),
    (25, "IQ4_NL"),
    (26, "IQ3_S"),
    (27, "IQ3_M"),
    (28, "IQ2_S"),
    (29, "IQ2_M"),
    (30, "IQ4_XS"),
    (31, "IQ1_M"),
    (32, "BF16"),
    (36, "TQ1_0"),
    (37, "TQ2_0"),
    (38, "MXFP4_MOE"),
    (39, "NVFP4"),
];

/// Reads the header of a model's files. A model of an architecture or a type that this build does
/// not know is described too, as far as its header goes, and is not [`ModelInfo::supported`].
///
/// # Errors
/// [`Error::Open`], and [`Error::Format`] when the files are no model at all.
pub fn inspect(files: &ModelFiles) -> Result<Inspection, Error> {
    let header = match format::read(files) {
        Ok(file) => Header::of(&file)?,
        Err(Error::Format(FormatError::Unknown { .. })) => match Folder::of(files) {
            Some(folder) => Header::of_unknown_folder(folder)?,
            None => Header::of_unknown(&format::open_all(&files.weights)?)?,
        },
        Err(error) => return Err(error),
    };
    Ok(header.inspection(files.chat_template.as_deref()))
}

/// The figures of a model whose files are read.
///
/// # Errors
/// [`Error::Metadata`] when the file names no architecture.
pub(crate) fn info(file: &File) -> Result<ModelInfo, Error> {
    Ok(Header::of(file)?.info(file.meta.str(CHAT_TEMPLATE)))
}

/// What is known of a file, its weights aside.
struct Header {
    format: Format,
    arch: String,
    meta: Meta,
    tensors: Vec<TensorInfo>,
    n_params: u64,
    weight_bytes: u64,
    layout: Layout,
    /// The type of most weights.
    main_type: String,
    /// From the configuration of an architecture that this build runs.
    runs: Option<Runs>,
}

/// What only a known architecture can say.
struct Runs {
    kv_bytes_per_token: u64,
    abilities: &'static [Ability],
}

impl Header {
    fn of(file: &File) -> Result<Self, Error> {
        let known = arch::resolve(file).ok();
        let layout = match &known {
            Some((arch, config)) => layout(file, arch, config),
            None => Layout::default(),
        };
        let runs = known.map(|(arch, config)| Runs {
            kv_bytes_per_token: config.kv_bytes_per_token() as u64,
            abilities: arch.abilities,
        });
        let tensors: Vec<TensorInfo> = file
            .tensors
            .iter()
            .map(|tensor| {
                let mut shape = tensor.shape.clone();
                if file.format == Format::Gguf {
                    shape.reverse();
                }
                TensorInfo { name: tensor.name.clone(), ty: tensor.quant.to_string(), shape }
            })
            .collect();
        let weight_bytes = file.tensors.iter().map(Tensor::n_bytes).sum();
        let header = Self::new(file.format, file.meta.clone(), tensors)?;
        Ok(Self { weight_bytes, layout, runs, ..header })
    }

    /// A file with a type that this build does not know: its tensors cannot be sized, so the bytes
    /// after the header count as theirs.
    fn of_unknown(files: &[Bytes]) -> Result<Self, Error> {
        let mut meta = None;
        let mut tensors = Vec::new();
        let mut weight_bytes = 0;
        for file in files {
            let header = gguf::Header::parse(file.as_slice())?;
            weight_bytes += (file.len() as u64).saturating_sub(header.data_start);
            for entry in header.entries {
                let ty = match Quant::from_gguf(entry.type_number) {
                    Some(quant) => quant.to_string(),
                    None => format!("type {}", entry.type_number),
                };
                tensors.push(TensorInfo { name: entry.name, ty, shape: entry.shape });
            }
            meta.get_or_insert(header.meta);
        }
        let header = Self::new(Format::Gguf, meta.unwrap_or_default(), tensors)?;
        Ok(Self { weight_bytes, ..header })
    }

    fn of_unknown_folder(folder: Folder<'_>) -> Result<Self, Error> {
        let (meta, entries) = safetensors::headers(folder)?;
        let bytes = |entry: &safetensors::Entry| {
            let [start, end] = entry.data_offsets;
            end.saturating_sub(start)
        };
        let weight_bytes =
            entries.iter().fold(0u64, |sum, (_, entry)| sum.saturating_add(bytes(entry)));
        let tensors = entries
            .into_iter()
            .map(|(name, entry)| TensorInfo { name, ty: entry.dtype, shape: entry.shape })
            .collect();
        Ok(Self { weight_bytes, ..Self::new(Format::Safetensors, meta, tensors)? })
    }

    fn new(format: Format, meta: Meta, tensors: Vec<TensorInfo>) -> Result<Self, Error> {
        let arch = arch::name(format, &meta)?.to_owned();
        let mut by_type = BTreeMap::new();
        let mut n_params = 0u64;
        for tensor in &tensors {
            let n = tensor.shape.iter().fold(1u64, |n, &dim| n.saturating_mul(dim));
            n_params = n_params.saturating_add(n);
            let sum = by_type.entry(tensor.ty.as_str()).or_insert(0u64);
            *sum = sum.saturating_add(n);
        }
        let main = by_type.into_iter().max_by_key(|&(_, n)| n);
        let main_type = main.map_or_else(String::new, |(ty, _)| ty.to_owned());
        let (weight_bytes, layout, runs) = (0, Layout::default(), None);
        Ok(Self { format, arch, meta, tensors, n_params, weight_bytes, layout, main_type, runs })
    }

    fn inspection(self, template: Option<&str>) -> Inspection {
        let own_template = self.meta.str(CHAT_TEMPLATE).map(str::to_owned);
        Inspection {
            info: self.info(template.or(own_template.as_deref())),
            metadata: json(&self.meta),
            chat_template: own_template,
            tensors: self.tensors,
        }
    }

    fn info(&self, template: Option<&str>) -> ModelInfo {
        ModelInfo {
            format: self.format.name().to_owned(),
            arch: self.arch.clone(),
            supported: self.runs.is_some(),
            quant: self.quant(),
            n_params: self.n_params,
            context_length: self.number("context_length", "max_position_embeddings"),
            embedding_length: self.number("embedding_length", "hidden_size"),
            n_layers: self.number("block_count", "num_hidden_layers"),
            weight_bytes: self.weight_bytes,
            kv_bytes_per_token: self.runs.as_ref().map_or(0, |runs| runs.kv_bytes_per_token),
            layout: self.layout.clone(),
            abilities: self.abilities(template),
        }
    }

    fn key(&self, gguf: &str, hf: &str) -> String {
        match self.format {
            Format::Gguf => format!("{}.{gguf}", self.arch),
            Format::Safetensors => hf.to_owned(),
        }
    }

    /// A figure of the metadata, 0 where there is none.
    fn number(&self, gguf: &str, hf: &str) -> u32 {
        let number = self.meta.u64(&self.key(gguf, hf));
        number.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
    }

    fn quant(&self) -> String {
        let said = self.meta.u64(FILE_TYPE);
        FILE_TYPES
            .iter()
            .find(|(number, _)| Some(*number) == said)
            .map_or_else(|| self.main_type.clone(), |(_, name)| (*name).to_owned())
    }

    fn abilities(&self, template: Option<&str>) -> Vec<Ability> {
        let pools = self.meta.get(&self.key("pooling_type", "pooling_type")).is_some();
        let mut abilities = match &self.runs {
            Some(runs) if !pools => runs.abilities.to_vec(),
            _ if pools => vec![Ability::Embedding],
            _ => vec![Ability::Completion],
        };
        let template = template.unwrap_or_default();
        if template.contains("tools") {
            abilities.push(Ability::Tools);
        }
        if fills_in(&self.meta) {
            abilities.push(Ability::Insert);
        }
        if template.contains("<think>") || template.contains("enable_thinking") {
            abilities.push(Ability::Thinking);
        }
        abilities
    }
}

/// Where the bytes of a file's tensors belong. The names of layers and experts are the formats'
/// own, the same for every architecture.
fn layout(file: &File, arch: &arch::Arch, config: &DecoderConfig) -> Layout {
    let names = |name: &arch::decoder::Name| match file.format {
        Format::Gguf => name.gguf,
        Format::Safetensors => name.hf,
    };
    let is_of = |tensor: &Tensor, field: &str| {
        tensor.name.strip_prefix(field).is_some_and(|rest| rest.starts_with('.'))
    };
    let (embedding, output) = (names(&arch.names.embedding), names(&arch.names.output));
    let mut layout = Layout::default();
    // Dense and of experts.
    let mut layers: Vec<[u64; 2]> = vec![[0, 0]; config.layers.len()];
    let mut has_output = false;
    for tensor in &file.tensors {
        let bytes = tensor.n_bytes();
        match layer(&tensor.name) {
            Some(at) => {
                if layers.len() <= at {
                    layers.resize(at + 1, [0, 0]);
                }
                let sum = &mut layers[at][usize::from(is_of_experts(&tensor.name))];
                *sum = sum.saturating_add(bytes);
            }
            None if is_of(tensor, embedding) => {
                layout.embedding = layout.embedding.saturating_add(bytes);
            }
            None => {
                has_output |= is_of(tensor, output);
                layout.output = layout.output.saturating_add(bytes);
            }
        }
    }
    layout.is_tied = match config.output {
        Output::Own => false,
        Output::Tied => true,
        Output::OwnOrTied => !has_output,
    };
    let kv = config.kv_bytes_per_token() as u64 / config.layers.len().max(1) as u64;
    for (at, [dense, experts]) in layers.into_iter().enumerate() {
        let kv_bytes_per_token = if at < config.layers.len() { kv } else { 0 };
        layout.push(LayerRun { n: 1, dense, experts, kv_bytes_per_token });
    }
    layout
}

/// The layer that a tensor's name says: `blk.7.…`, `model.layers.7.…`.
fn layer(name: &str) -> Option<usize> {
    let mut words = name.split('.');
    words.find(|word| matches!(*word, "blk" | "layers"))?;
    let number: u64 = words.next()?.parse().ok()?;
    usize::try_from(number).ok().filter(|_| number < MODEL_LAYERS)
}

/// Whether a tensor is a part of one or all experts among which a router chooses.
fn is_of_experts(name: &str) -> bool {
    name.split('.').any(|word| word == "experts" || word.ends_with("_exps"))
}

/// Whether the vocabulary has tokens that mark a gap to fill: named by metadata, or by the words
/// that models without that metadata use.
fn fills_in(meta: &Meta) -> bool {
    const IDS: [&str; 2] = ["tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"];
    const WORDS: [&str; 3] = ["<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>"];
    IDS.iter().any(|key| meta.get(key).is_some())
        || meta
            .strings(TOKENS)
            .is_some_and(|tokens| tokens.iter().any(|token| WORDS.contains(&token.as_str())))
}

/// Metadata as JSON. Long arrays (vocabularies) are `null`.
fn json(meta: &Meta) -> JsonMap<String, Json> {
    meta.iter().map(|(key, value)| (key.to_owned(), json_value(value))).collect()
}

fn json_value(value: &Value) -> Json {
    fn items<T>(items: &[T], json: impl Fn(&T) -> Json) -> Json {
        if items.len() > Inspection::ARRAY_ITEMS {
            return Json::Null;
        }
        items.iter().map(json).collect()
    }
    match value {
        Value::U64(n) => (*n).into(),
        Value::I64(n) => (*n).into(),
        Value::F64(x) => shortest(*x),
        Value::Bool(yes) => (*yes).into(),
        Value::String(text) => text.as_str().into(),
        Value::Array(Array::U64(all)) => items(all, |&n| n.into()),
        Value::Array(Array::I64(all)) => items(all, |&n| n.into()),
        Value::Array(Array::F64(all)) => items(all, |&x| shortest(x)),
        Value::Array(Array::Bool(all)) => items(all, |&yes| yes.into()),
        Value::Array(Array::String(all)) => items(all, |text| text.as_str().into()),
        Value::Array(Array::Nested) => Json::Null,
    }
}

/// A float in its fewest digits: one that was stored in 32 bits reads as it was written.
fn shortest(x: f64) -> Json {
    let single = arch::config::single(x);
    if f64::from(single).to_bits() == x.to_bits() {
        return single.to_string().parse::<f64>().unwrap_or(x).into();
    }
    x.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::written::Gguf;

    /// A file of an architecture, with a tensor of 64 weights in 68 bytes and one of 8 in 32.
    fn file(arch: &str) -> Gguf {
        let text = |text: &str| Value::String(text.to_owned());
        Gguf::new()
            .meta("general.architecture", &text(arch))
            .meta(&format!("{arch}.context_length"), &Value::U64(4096))
            .meta(&format!("{arch}.embedding_length"), &Value::U64(32))
            .meta(&format!("{arch}.block_count"), &Value::U64(5))
            .meta(&format!("{arch}.rope.freq_base"), &Value::F64(f64::from(1e-5f32)))
            .tensor("a", Quant::Q8_0, &[32, 2], &[0; 68])
            .tensor("b", Quant::F32, &[8], &[0; 32])
    }

    fn inspect(file: &Gguf) -> Inspection {
        let bytes = Bytes::from_vec(file.bytes());
        let header = match gguf::read(std::slice::from_ref(&bytes)) {
            Ok(file) => Header::of(&file),
            Err(_) => Header::of_unknown(&[bytes]),
        };
        header.expect("a header").inspection(None)
    }

    #[test]
    fn a_stranger_is_described_and_not_supported() {
        let found = inspect(&file("stranger"));
        let info = &found.info;
        assert_eq!((info.arch.as_str(), info.supported), ("stranger", false));
        assert_eq!((info.context_length, info.embedding_length, info.n_layers), (4096, 32, 5));
        assert_eq!((info.n_params, info.weight_bytes), (72, 100));
        assert_eq!((info.quant.as_str(), info.format.as_str()), ("Q8_0", "gguf"));
        assert_eq!(info.abilities, [Ability::Completion]);
        assert_eq!(found.metadata["stranger.rope.freq_base"].as_f64(), Some(1e-5));
        let a = &found.tensors[0];
        assert_eq!((a.ty.as_str(), a.shape.as_slice()), ("Q8_0", &[32, 2][..]));
    }

    #[test]
    fn a_type_that_this_build_does_not_know_is_named_by_number() {
        let found = inspect(&file(arch::ALL[0].gguf).raw_tensor("c", 999, &[16], &[0; 32]));
        assert!(!found.info.supported);
        assert_eq!(found.tensors[2].ty, "type 999");
        // All that follows the header: the padding after each tensor is in it.
        assert_eq!((found.info.n_params, found.info.weight_bytes), (88, 96 + 32 + 32));
    }

    #[test]
    fn names_say_whose_a_tensor_is() {
        let table = [
            ("blk.7.ffn_down_exps.weight", Some(7), true),
            ("blk.7.ffn_gate_exps.bias", Some(7), true),
            ("blk.12.ffn_gate_inp.weight", Some(12), false),
            ("blk.0.ffn_up_shexp.weight", Some(0), false),
            ("model.layers.3.mlp.experts.17.up_proj.weight", Some(3), true),
            ("model.layers.3.mlp.experts.down_proj_blocks", Some(3), true),
            ("model.language_model.layers.3.mlp.shared_experts.up_proj.weight", Some(3), false),
            ("token_embd.weight", None, false),
            ("blk.1024.x", None, false),
            ("blk.x.7", None, false),
            ("layers", None, false),
        ];
        for (name, of, experts) in table {
            assert_eq!((layer(name), is_of_experts(name)), (of, experts), "{name}");
        }
        // Every name that this build binds follows that.
        for arch in arch::ALL {
            let names = &arch.names;
            for name in [names.expert_gate, names.expert_up, names.expert_down] {
                for text in [name.gguf, name.hf].map(|name| name.replace("{}", "5")) {
                    let is_none = text.is_empty();
                    assert!(is_none || (layer(&text) == Some(5) && is_of_experts(&text)), "{text}");
                }
            }
            for name in [names.router, names.down, names.query] {
                for text in [name.gguf, name.hf].map(|name| name.replace("{}", "5")) {
                    assert!(!is_of_experts(&text), "{text}");
                }
            }
        }
    }

    #[test]
    fn abilities_are_read_from_template_and_vocabulary() {
        let template = "{% if tools %}x{% endif %}<think>";
        let words = ["a", "<|fim_prefix|>"].map(str::to_owned).to_vec();
        let file = file("stranger")
            .meta(CHAT_TEMPLATE, &Value::String(template.into()))
            .meta(TOKENS, &Value::Array(Array::String(words)))
            .meta("general.file_type", &Value::U64(15));
        let found = inspect(&file);
        let all = [Ability::Completion, Ability::Tools, Ability::Insert, Ability::Thinking];
        assert_eq!(found.info.abilities, all);
        assert_eq!(found.info.quant, "Q4_K_M");
        assert_eq!(found.chat_template.as_deref(), Some(template));
        let pooled = self::file("stranger").meta("stranger.pooling_type", &Value::U64(1));
        assert_eq!(inspect(&pooled).info.abilities, [Ability::Embedding]);
    }

    #[test]
    fn long_arrays_are_left_out() {
        let numbers = |n: u64| Value::Array(Array::U64((0..n).collect()));
        let found = inspect(&file("s").meta("five", &numbers(5)).meta("six", &numbers(6)));
        assert_eq!(found.metadata["five"], serde_json::json!([0, 1, 2, 3, 4]));
        assert_eq!(found.metadata["six"], Json::Null);
    }

    #[test]
    fn a_file_without_an_architecture_is_no_model() {
        let file = gguf::read(&[Bytes::from_vec(Gguf::new().bytes())]).expect("an empty file");
        assert!(matches!(Header::of(&file), Err(Error::Metadata { .. })));
    }
}
