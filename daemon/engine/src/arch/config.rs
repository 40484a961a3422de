//! From metadata to the numbers of a model.

use v4_kernels::{Activation, KvShape, KvType, MAX_QUERY_GROUP, Rope, RopeKind};
use v4_proto::limits;

use crate::Error;
use crate::format::{File, Format, Value};
use crate::kv::blocks::BLOCK_TOKENS;
use crate::weights;

/// A metadata entry under its two names.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// In GGUF, after the architecture's prefix.
    pub gguf: &'static str,
    /// In `config.json`.
    pub hf: &'static str,
}

const N_LAYERS: Key = Key { gguf: "block_count", hf: "num_hidden_layers" };
const CONTEXT: Key = Key { gguf: "context_length", hf: "max_position_embeddings" };
const EMBEDDING: Key = Key { gguf: "embedding_length", hf: "hidden_size" };
const FEED_FORWARD: Key = Key { gguf: "feed_forward_length", hf: "intermediate_size" };
const N_HEADS: Key = Key { gguf: "attention.head_count", hf: "num_attention_heads" };
const N_KV_HEADS: Key = Key { gguf: "attention.head_count_kv", hf: "num_key_value_heads" };
const HEAD_DIM: Key = Key { gguf: "attention.key_length", hf: "head_dim" };
const VALUE_DIM: Key = Key { gguf: "attention.value_length", hf: "head_dim" };
const NORM_EPS: Key = Key { gguf: "attention.layer_norm_rms_epsilon", hf: "rms_norm_eps" };
const ROTARY_DIM: Key = Key { gguf: "rope.dimension_count", hf: "rotary_dim" };
const ROPE_BASE: Key = Key { gguf: "rope.freq_base", hf: "rope_theta" };
const ROPE_SCALING: Key = Key { gguf: "rope.scaling.type", hf: "rope_scaling.rope_type" };
const ROPE_FACTOR: Key = Key { gguf: "rope.scaling.factor", hf: "rope_scaling.factor" };
const N_EXPERTS: Key = Key { gguf: "expert_count", hf: "num_local_experts" };
const TIED_OUTPUT: Key = Key { gguf: "tie_word_embeddings", hf: "tie_word_embeddings" };
const SCORE_CAP: Key = Key { gguf: "attn_logit_softcapping", hf: "attn_logit_softcapping" };
const LOGIT_CAP: Key = Key { gguf: "final_logit_softcapping", hf: "final_logit_softcapping" };

/// A tensor of GGUF that divides each angle of the rotary embedding.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Where the output matrix is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// A tensor of its own.
    Own,
    /// The embedding, whatever else the file has.
    Tied,
    /// A tensor of its own if there is one, else the embedding.
    OwnOrTied,
}

/// What may differ from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Tokens that a token sees, itself included; `None` is all.
    pub window: Option<usize>,
    /// Which of [`DecoderConfig::ropes`].
    pub rope: usize,
}

/// The numbers of a model that the shared decoder runs.
#[derive(Debug, Clone)]
pub struct DecoderConfig {
    /// Tokens of context it was trained for.
    pub context: usize,
    /// Width of the hidden state.
    pub embedding: usize,
    /// Width between gate and down.
    pub feed_forward: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Heads of keys and values.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square of a norm.
    pub norm_eps: f32,
    /// Added to every norm's weight: 1 where the file stores the difference from 1.
    pub norm_offset: f32,
    /// Of the gated feed-forward.
    pub activation: Activation,
    /// Multiplies the embedding.
    pub embedding_scale: f32,
    /// Multiplies query times key.
    pub attention_scale: f32,
    /// Caps scores before the softmax.
    pub score_cap: Option<f32>,
    /// Caps logits.
    pub logit_cap: Option<f32>,
    /// Whether query, key and value have a bias.
    pub qkv_bias: bool,
    /// Whether each head of query and key is normed before it rotates.
    pub qk_norm: bool,
    /// Whether attention and feed-forward are normed again before they are added.
    pub post_norms: bool,
    /// Where the output matrix is.
    pub output: Output,
    /// The rotary embeddings that layers choose from.
    pub ropes: Vec<Rope>,
    /// An entry a layer.
    pub layers: Vec<LayerConfig>,
}

impl DecoderConfig {
    /// The shape of this model's KV cache.
    pub fn kv_shape(&self) -> KvShape {
        KvShape {
            n_layers: self.layers.len(),
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            block_tokens: BLOCK_TOKENS,
            kv_type: KvType::F16,
        }
    }

    /// Bytes of keys and values for a token over all layers.
    pub fn kv_bytes_per_token(&self) -> usize {
        KvShape { block_tokens: 1, ..self.kv_shape() }.block_bytes()
    }
}

/// A file, seen by an architecture.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The file.
    pub file: &'a File,
    /// What GGUF puts before each of the architecture's keys.
    pub prefix: &'a str,
}

impl Source<'_> {
    /// Whether names are those of GGUF.
    pub fn is_gguf(&self) -> bool {
        self.file.format == Format::Gguf
    }

    /// The full name of an entry in this file.
    pub fn key(&self, key: Key) -> String {
        match self.file.format {
            Format::Gguf => format!("{}.{}", self.prefix, key.gguf),
            Format::Safetensors => key.hf.to_owned(),
        }
    }

    /// An entry.
    pub fn get(&self, key: Key) -> Option<&Value> {
        self.file.meta.get(&self.key(key))
    }

    /// A text.
    pub fn str(&self, key: Key) -> Option<&str> {
        self.file.meta.str(&self.key(key))
    }

    /// A truth value.
    pub fn bool(&self, key: Key) -> Option<bool> {
        self.file.meta.bool(&self.key(key))
    }

    /// A count or a width. An array of one value for each layer counts where all are equal.
    ///
    /// # Errors
    /// [`Error::Metadata`] beyond [`limits::MODEL_WIDTH`] or where the entry is no such number.
    pub fn size(&self, key: Key) -> Result<Option<usize>, Error> {
        let name = self.key(key);
        let meta = &self.file.meta;
        let Some(value) = meta.get(&name) else { return Ok(None) };
        let number = meta.u64(&name).or_else(|| {
            let all = meta.i64s(&name)?;
            let first = *all.first()?;
            all.iter().all(|&n| n == first).then(|| u64::try_from(first).ok())?
        });
        match number.filter(|&n| n <= limits::MODEL_WIDTH).map(usize::try_from) {
            Some(Ok(n)) => Ok(Some(n)),
            _ => Err(Error::metadata(name, format!("is {}, not a usable size", brief(value)))),
        }
    }

    /// A count or a width that must be there and is not 0.
    ///
    /// # Errors
    /// [`Error::Metadata`].
    pub fn need_size(&self, key: Key) -> Result<usize, Error> {
        match self.size(key)? {
            Some(0) => Err(Error::metadata(self.key(key), "is 0")),
            Some(n) => Ok(n),
            None => Err(Error::missing(self.key(key))),
        }
    }

    /// A finite number above 0.
    ///
    /// # Errors
    /// [`Error::Metadata`] where the entry is another.
    pub fn positive(&self, key: Key) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let name = self.key(key);
        match self.file.meta.f64(&name).filter(|x| x.is_finite() && *x > 0.0) {
            Some(x) => Ok(Some(x)),
            None => Err(Error::metadata(name, format!("is {}, not above 0", brief(value)))),
        }
    }

    /// What the dense decoders have in common; the architecture sets the rest.
    ///
    /// # Errors
    /// [`Error::Metadata`] and [`Error::Unsupported`].
    pub fn decoder(&self) -> Result<DecoderConfig, Error> {
        if self.size(N_EXPERTS)?.is_some_and(|n| n > 0) {
            return Err(Error::unsupported(format!("experts ({})", self.key(N_EXPERTS))));
        }
        let embedding = self.need_size(EMBEDDING)?;
        let n_heads = self.need_size(N_HEADS)?;
        let head_dim = match self.size(HEAD_DIM)? {
            Some(n) => n,
            None => embedding / n_heads,
        };
        let n_kv_heads = self.size(N_KV_HEADS)?.unwrap_or(n_heads);
        if n_kv_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
            let problem = format!("is {n_kv_heads}, no divisor of the {n_heads} heads");
            return Err(Error::metadata(self.key(N_KV_HEADS), problem));
        }
        let group = n_heads / n_kv_heads;
        if group > MAX_QUERY_GROUP {
            let what = format!("{group} query heads a KV head (at most {MAX_QUERY_GROUP})");
            return Err(Error::unsupported(what));
        }
        if head_dim == 0
            || head_dim % 2 != 0
            || self.size(VALUE_DIM)?.is_some_and(|n| n != head_dim)
        {
            return Err(Error::unsupported(format!(
                "heads of {head_dim} values with other values or an odd number"
            )));
        }
        let n_layers = self.need_size(N_LAYERS)?;
        if n_layers as u64 > limits::MODEL_LAYERS {
            return Err(Error::metadata(self.key(N_LAYERS), format!("is {n_layers}")));
        }
        let norm_eps =
            self.positive(NORM_EPS)?.ok_or_else(|| Error::missing(self.key(NORM_EPS)))?;
        Ok(DecoderConfig {
            context: self.need_context()?,
            embedding,
            feed_forward: self.need_size(FEED_FORWARD)?,
            n_heads,
            n_kv_heads,
            head_dim,
            norm_eps: single(norm_eps),
            norm_offset: 0.0,
            activation: Activation::Silu,
            embedding_scale: 1.0,
            attention_scale: single((head_dim as f64).sqrt().recip()),
            score_cap: self.positive(SCORE_CAP)?.map(single),
            logit_cap: self.positive(LOGIT_CAP)?.map(single),
            qkv_bias: false,
            qk_norm: false,
            post_norms: false,
            output: self.output(),
            ropes: Vec::new(),
            layers: vec![LayerConfig { window: None, rope: 0 }; n_layers],
        })
    }

    /// Tokens of context. Unlike other sizes it has no bound but 32 bits: nothing is sized by it
    /// before it is cut to what was asked for.
    fn need_context(&self) -> Result<usize, Error> {
        let name = self.key(CONTEXT);
        let context = self.file.meta.u64(&name).ok_or_else(|| Error::missing(name.as_str()))?;
        match u32::try_from(context) {
            Ok(context) if context > 0 => Ok(context as usize),
            _ => Err(Error::metadata(name, format!("is {context}"))),
        }
    }

    fn output(&self) -> Output {
        match self.bool(TIED_OUTPUT) {
            Some(true) => Output::Tied,
            Some(false) => Output::Own,
            None => Output::OwnOrTied,
        }
    }

    /// The rotary embedding that the usual entries describe. The file's own base comes before
    /// `default_base`.
    ///
    /// # Errors
    /// [`Error::Metadata`] and [`Error::Unsupported`].
    pub fn rope(&self, kind: RopeKind, head_dim: usize, default_base: f64) -> Result<Rope, Error> {
        let base = self.positive(ROPE_BASE)?.unwrap_or(default_base);
        let width = self.size(ROTARY_DIM)?.unwrap_or(head_dim);
        if width == 0 || width > head_dim || width % 2 != 0 {
            let problem = format!("is {width} for heads of {head_dim}");
            return Err(Error::metadata(self.key(ROTARY_DIM), problem));
        }
        let mut angles = angles(base, width);
        self.scale(&mut angles)?;
        self.divide(&mut angles)?;
        Ok(Rope { kind, inv_freq: angles.into_iter().map(single).collect(), magnitude: 1.0 })
    }

    /// Applies the scaling of long contexts.
    fn scale(&self, angles: &mut [f64]) -> Result<(), Error> {
        // Older config.json files say `type` where newer ones say `rope_type`.
        const OLD: Key = Key { gguf: ROPE_SCALING.gguf, hf: "rope_scaling.type" };
        let factor = self.positive(ROPE_FACTOR)?.unwrap_or(1.0);
        match self.str(ROPE_SCALING).or_else(|| self.str(OLD)) {
            None | Some("none" | "default") => Ok(()),
            Some("linear") => {
                for angle in angles {
                    *angle /= factor;
                }
                Ok(())
            }
            Some("llama3") if !self.is_gguf() => self.scale_by_wavelength(angles, factor),
            Some(other) => Err(Error::unsupported(format!("rope scaling of type {other:?}"))),
        }
    }

    /// Divides low frequencies by `factor`, keeps high ones and blends those between ("The Llama 3
    /// Herd of Models", 2024, and its published code).
    fn scale_by_wavelength(&self, angles: &mut [f64], factor: f64) -> Result<(), Error> {
        let need = |hf: &'static str| {
            let key = Key { gguf: "", hf };
            self.positive(key)?.ok_or_else(|| Error::missing(hf))
        };
        let low = need("rope_scaling.low_freq_factor")?;
        let high = need("rope_scaling.high_freq_factor")?;
        let original = need("rope_scaling.original_max_position_embeddings")?;
        if high <= low {
            let problem = format!("is {high}, not above low_freq_factor {low}");
            return Err(Error::metadata("rope_scaling.high_freq_factor", problem));
        }
        for angle in angles {
            let wavelength = std::f64::consts::TAU / *angle;
            let keep = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            *angle = (1.0 - keep) * *angle / factor + keep * *angle;
        }
        Ok(())
    }

    /// Divides by the factors that GGUF stores as a tensor.
    fn divide(&self, angles: &mut [f64]) -> Result<(), Error> {
        let tensors = &self.file.tensors;
        let Some(tensor) = tensors.iter().find(|tensor| tensor.name == ROPE_FACTORS) else {
            return Ok(());
        };
        let factors = weights::floats(tensor, angles.len())?;
        for (angle, factor) in angles.iter_mut().zip(factors) {
            if !factor.is_finite() || factor <= 0.0 {
                return Err(Error::metadata(ROPE_FACTORS, format!("divides by {factor}")));
            }
            *angle /= f64::from(factor);
        }
        Ok(())
    }
}

/// The angles a position of a rotary embedding `width` wide, as published: `base^(-2i / width)`.
pub fn angles(base: f64, width: usize) -> Vec<f64> {
    (0..width).step_by(2).map(|i| base.powf(-(i as f64) / width as f64)).collect()
}

/// The nearest float32.
#[expect(clippy::cast_possible_truncation, reason = "the nearest float32 is what is asked for")]
pub fn single(x: f64) -> f32 {
    x as f32
}

/// A value for a person: long ones cut.
fn brief(value: &Value) -> String {
    const CHARS: usize = 60;
    let mut text = format!("{value:?}");
    if let Some((at, _)) = text.char_indices().nth(CHARS) {
        text.truncate(at);
        text.push('…');
    }
    text
}
