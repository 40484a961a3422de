//! From metadata to the numbers of a model.

use v4_kernels::{Activation, KvShape, KvType, MAX_QUERY_GROUP, Rope, RopeKind, Router};
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
const ROPE_ORIGINAL: Key = Key {
    gguf: "rope.scaling.original_context_length",
    hf: "rope_scaling.original_max_position_embeddings",
};
const ROPE_FAST: Key = Key { gguf: "rope.scaling.yarn_beta_fast", hf: "rope_scaling.beta_fast" };
const ROPE_SLOW: Key = Key { gguf: "rope.scaling.yarn_beta_slow", hf: "rope_scaling.beta_slow" };
const ROPE_ROUNDS: Key = Key { gguf: "rope.scaling.truncate", hf: "rope_scaling.truncate" };
const ROPE_MAGNITUDE: Key =
    Key { gguf: "rope.scaling.attention_factor", hf: "rope_scaling.attention_factor" };
/// How many experts there are; families of Hugging Face call it one or the other.
pub const N_EXPERTS: Key = Key { gguf: "expert_count", hf: "num_experts" };
/// See [`N_EXPERTS`].
pub const N_LOCAL_EXPERTS: Key = Key { gguf: "expert_count", hf: "num_local_experts" };
const N_USED_EXPERTS: Key = Key { gguf: "expert_used_count", hf: "num_experts_per_tok" };
/// Tokens that a layer with a window sees.
pub const WINDOW: Key = Key { gguf: "attention.sliding_window", hf: "sliding_window" };
const PATTERN: Key = Key { gguf: "attention.sliding_window_pattern", hf: "sliding_window_pattern" };
const LAYER_TYPES: Key = Key { gguf: "layer_types", hf: "layer_types" };
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
    /// Whether its feed-forward is a mixture of experts.
    pub has_experts: bool,
}

/// What is to be known of a mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// How many there are, and how a token's are chosen.
    pub router: Router,
    /// Width between an expert's gate and down.
    pub feed_forward: usize,
    /// Whether router and experts have biases.
    pub bias: bool,
}

/// Where `YaRN` begins and ends to divide angles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ramp {
    /// At the whole pairs around where the formula says, unless the file says otherwise.
    Rounded,
    /// Where the formula says, unless the file says otherwise.
    Exact,
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
    /// Whether attention's output has a bias.
    pub output_bias: bool,
    /// Whether each query head has a score that joins its softmax without a value.
    pub sinks: bool,
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
    /// Of the layers that have experts.
    pub experts: Option<ExpertsConfig>,
}

impl DecoderConfig {
    /// The shape of this model's KV cache in half precision.
    pub fn kv_shape(&self) -> KvShape {
        KvShape {
            n_layers: self.layers.len(),
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            block_tokens: BLOCK_TOKENS,
            kv_type: KvType::F16,
        }
    }

    /// Bytes of keys and values in half precision for a token over all layers.
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

    /// Refuses a file that says yes to one of `features`, named as in `config.json`: options that
    /// no published model of the architecture uses.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn refuse(&self, features: &[&'static str]) -> Result<(), Error> {
        match features.iter().find(|hf| self.bool(Key { gguf: hf, hf }) == Some(true)) {
            Some(feature) => Err(Error::unsupported(format!("{feature} in this architecture"))),
            None => Ok(()),
        }
    }

    /// What the dense decoders have in common; the architecture sets the rest.
    ///
    /// # Errors
    /// [`Error::Metadata`] and [`Error::Unsupported`].
    pub fn decoder(&self) -> Result<DecoderConfig, Error> {
        for key in [N_EXPERTS, N_LOCAL_EXPERTS] {
            if self.size(key)?.is_some_and(|n| n > 0) {
                return Err(Error::unsupported(format!("experts ({})", self.key(key))));
            }
        }
        self.any_decoder()
    }

    /// What decoders with experts in all layers have in common; the architecture sets the rest.
    /// `n_experts` and `feed_forward` are how many experts there are and their width.
    ///
    /// # Errors
    /// [`Error::Metadata`] and [`Error::Unsupported`].
    pub fn expert_decoder(
        &self,
        n_experts: Key,
        feed_forward: Key,
    ) -> Result<DecoderConfig, Error> {
        let mut config = self.any_decoder()?;
        let (n, n_used) = (self.need_size(n_experts)?, self.need_size(N_USED_EXPERTS)?);
        if n_used > n {
            let problem = format!("is {n_used}, of {n} experts");
            return Err(Error::metadata(self.key(N_USED_EXPERTS), problem));
        }
        config.experts = Some(ExpertsConfig {
            router: Router { n_experts: n, n_used, is_normalised: true },
            feed_forward: self.need_size(feed_forward)?,
            bias: false,
        });
        config.layers.iter_mut().for_each(|layer| layer.has_experts = true);
        Ok(config)
    }

    fn any_decoder(&self) -> Result<DecoderConfig, Error> {
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
            output_bias: false,
            sinks: false,
            qk_norm: false,
            post_norms: false,
            output: self.output(),
            ropes: Vec::new(),
            layers: vec![LayerConfig { window: None, rope: 0, has_experts: false }; n_layers],
            experts: None,
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

    /// Which layers see every token before: as the file says, else every `pattern`-th.
    ///
    /// # Errors
    /// [`Error::Metadata`].
    pub fn sees_all(&self, n_layers: usize, pattern: usize) -> Result<Vec<bool>, Error> {
        let meta = &self.file.meta;
        let wrong = |key, n: usize| {
            Error::metadata(self.key(key), format!("has {n} items for {n_layers} layers"))
        };
        if let Some(types) = meta.strings(&self.key(LAYER_TYPES)) {
            if types.len() != n_layers {
                return Err(wrong(LAYER_TYPES, types.len()));
            }
            return Ok(types.iter().map(|name| name == "full_attention").collect());
        }
        if let Some(windowed) = meta.bools(&self.key(PATTERN)) {
            if windowed.len() != n_layers {
                return Err(wrong(PATTERN, windowed.len()));
            }
            return Ok(windowed.iter().map(|windowed| !windowed).collect());
        }
        let pattern = self.size(PATTERN)?.unwrap_or(pattern).max(1);
        Ok((1..=n_layers).map(|n| n.is_multiple_of(pattern)).collect())
    }

    /// The rotary embedding that the usual entries describe. The file's own base comes before
    /// `default_base`.
    ///
    /// # Errors
    /// [`Error::Metadata`] and [`Error::Unsupported`].
    pub fn rope(&self, kind: RopeKind, head_dim: usize, default_base: f64) -> Result<Rope, Error> {
        self.ramped_rope((kind, Ramp::Rounded), head_dim, default_base)
    }

    /// [`Source::rope`] with another way to begin and end.
    ///
    /// # Errors
    /// [`Error::Metadata`] and [`Error::Unsupported`].
    pub fn ramped_rope(
        &self,
        (kind, ramp): (RopeKind, Ramp),
        head_dim: usize,
        default_base: f64,
    ) -> Result<Rope, Error> {
        let base = self.positive(ROPE_BASE)?.unwrap_or(default_base);
        let width = self.size(ROTARY_DIM)?.unwrap_or(head_dim);
        if width == 0 || width > head_dim || width % 2 != 0 {
            let problem = format!("is {width} for heads of {head_dim}");
            return Err(Error::metadata(self.key(ROTARY_DIM), problem));
        }
        let mut angles = angles(base, width);
        let magnitude = self.scale(&mut angles, base, ramp)?;
        self.divide(&mut angles)?;
        Ok(Rope { kind, inv_freq: angles.into_iter().map(single).collect(), magnitude })
    }

    /// Applies the scaling of long contexts; gives the rotation's magnitude.
    fn scale(&self, angles: &mut [f64], base: f64, ramp: Ramp) -> Result<f32, Error> {
        // Older config.json files say `type` where newer ones say `rope_type`.
        const OLD: Key = Key { gguf: ROPE_SCALING.gguf, hf: "rope_scaling.type" };
        let factor = self.positive(ROPE_FACTOR)?.unwrap_or(1.0);
        match self.str(ROPE_SCALING).or_else(|| self.str(OLD)) {
            None | Some("none" | "default") => Ok(1.0),
            Some("linear") => {
                for angle in angles {
                    *angle /= factor;
                }
                Ok(1.0)
            }
            Some("llama3") if !self.is_gguf() => {
                self.scale_by_wavelength(angles, factor)?;
                Ok(1.0)
            }
            Some("yarn") => self.scale_by_turns(angles, base, factor, ramp),
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

    /// Divides by `factor` the pairs that turn a few times in the original context, keeps those
    /// that turn often and blends those between; gives the magnitude that goes with it (Peng et al.
    /// 2023, `YaRN`).
    fn scale_by_turns(
        &self,
        angles: &mut [f64],
        base: f64,
        factor: f64,
        ramp: Ramp,
    ) -> Result<f32, Error> {
        /// So that a ramp has a width.
        const NARROWEST: f64 = 1e-3;
        let original =
            self.positive(ROPE_ORIGINAL)?.ok_or_else(|| Error::missing(self.key(ROPE_ORIGINAL)))?;
        let (fast, slow) = (self.positive(ROPE_FAST)?, self.positive(ROPE_SLOW)?);
        let width = 2.0 * angles.len() as f64;
        // The pair that turns so many times.
        let pair = |turns: f64| {
            width * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * base.ln())
        };
        let (mut from, mut to) = (pair(fast.unwrap_or(32.0)), pair(slow.unwrap_or(1.0)));
        if self.bool(ROPE_ROUNDS).unwrap_or(ramp == Ramp::Rounded) {
            (from, to) = (from.floor(), to.ceil());
        }
        let (from, to) = (from.max(0.0), to.min(width - 1.0));
        for (i, angle) in angles.iter_mut().enumerate() {
            let divided = ((i as f64 - from) / (to - from).max(NARROWEST)).clamp(0.0, 1.0);
            *angle = divided * *angle / factor + (1.0 - divided) * *angle;
        }
        let magnitude = self.positive(ROPE_MAGNITUDE)?.unwrap_or(1.0 + 0.1 * factor.max(1.0).ln());
        Ok(single(magnitude))
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
