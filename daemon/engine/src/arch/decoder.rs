//! The decoder that architectures share: blocks of attention and a gated feed-forward or a mixture
//! of them, each normed before and added to the hidden state.

use v4_kernels::{
    Activations, Attention as Constants, Buffer, Device, ExpertWeights, Experts, Input, KvCache,
    Matrix, RmsNorm, Routing,
};

use super::config::{DecoderConfig, ExpertsConfig, Output};
use crate::Error;
use crate::layers::attention::{self, Attention, Place};
use crate::layers::linear::Weight;
use crate::layers::mlp::Mlp;
use crate::layers::moe::{self, Moe};
use crate::weights::Binder;

/// What a field's tensor is called in either format, without `.weight`; `{}` is the layer, `[]` the
/// expert where each has a tensor.
#[derive(Debug, Clone, Copy)]
pub struct Name {
    /// In GGUF.
    pub gguf: &'static str,
    /// In safetensors files of Hugging Face.
    pub hf: &'static str,
}

const fn name(gguf: &'static str, hf: &'static str) -> Name {
    Name { gguf, hf }
}

/// What the decoder's tensors are called.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// `[vocabulary, embedding]`.
    pub embedding: Name,
    /// Of the last hidden state.
    pub output_norm: Name,
    /// `[vocabulary, embedding]`.
    pub output: Name,
    /// Before attention.
    pub attention_norm: Name,
    /// Of attention.
    pub query: Name,
    /// Of attention.
    pub key: Name,
    /// Of attention.
    pub value: Name,
    /// Of attention.
    pub attention_output: Name,
    /// Of each head of the query.
    pub query_norm: Name,
    /// Of each head of the key.
    pub key_norm: Name,
    /// Of each query head: `[heads]`.
    pub sinks: Name,
    /// After attention.
    pub post_attention_norm: Name,
    /// Before the feed-forward.
    pub mlp_norm: Name,
    /// Of the feed-forward.
    pub gate: Name,
    /// Of the feed-forward.
    pub up: Name,
    /// Of the feed-forward.
    pub down: Name,
    /// Chooses experts.
    pub router: Name,
    /// Of experts.
    pub expert_gate: Name,
    /// Of experts.
    pub expert_up: Name,
    /// Of experts.
    pub expert_down: Name,
    /// After the feed-forward.
    pub post_mlp_norm: Name,
}

/// The usual names. An architecture with other norms names them itself.
pub const NAMES: Names = Names {
    embedding: name("token_embd", "model.embed_tokens"),
    output_norm: name("output_norm", "model.norm"),
    output: name("output", "lm_head"),
    attention_norm: name("blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    query: name("blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
    key: name("blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
    value: name("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    attention_output: name("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
    query_norm: name("blk.{}.attn_q_norm", "model.layers.{}.self_attn.q_norm"),
    key_norm: name("blk.{}.attn_k_norm", "model.layers.{}.self_attn.k_norm"),
    sinks: name("blk.{}.attn_sinks", "model.layers.{}.self_attn.sinks"),
    post_attention_norm: name("blk.{}.post_attention_norm", ""),
    mlp_norm: name("blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm"),
    gate: name("blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj"),
    up: name("blk.{}.ffn_up", "model.layers.{}.mlp.up_proj"),
    down: name("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
    router: name("blk.{}.ffn_gate_inp", "model.layers.{}.mlp.gate"),
    expert_gate: name("blk.{}.ffn_gate_exps", "model.layers.{}.mlp.experts.[].gate_proj"),
    expert_up: name("blk.{}.ffn_up_exps", "model.layers.{}.mlp.experts.[].up_proj"),
    expert_down: name("blk.{}.ffn_down_exps", "model.layers.{}.mlp.experts.[].down_proj"),
    post_mlp_norm: name("blk.{}.post_ffw_norm", "model.layers.{}.post_feedforward_layernorm"),
};

/// Rows of logits that are made at a time: as wide as the vocabulary, they are the largest of all
/// activations.
const LOGIT_ROWS: usize = 16;

/// One block: attention, then the feed-forward.
#[derive(Debug)]
struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    post_attention_norm: Option<RmsNorm>,
    mlp_norm: RmsNorm,
    mlp: FeedForward,
    post_mlp_norm: Option<RmsNorm>,
}

/// What follows attention.
#[derive(Debug)]
enum FeedForward {
    Dense(Mlp),
    Sparse(Moe),
}

/// A model's weights, bound to their places.
#[derive(Debug)]
pub(crate) struct Decoder {
    config: DecoderConfig,
    embedding: Matrix,
    blocks: Vec<Block>,
    output_norm: RmsNorm,
    output: Weight,
}

/// Room for the rows of a pass.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// The hidden state: `[rows, embedding]`.
    hidden: Buffer,
    /// What is normed, and what is added: `[rows, embedding]`.
    normed: Buffer,
    added: Buffer,
    attention: attention::Scratch,
    /// Between gate, up and down: `[rows, feed forward]`.
    gated: Activations,
    /// Bytes of it at most.
    gated_bytes: usize,
    moe: moe::Scratch,
    /// `[logit rows, vocabulary]`.
    logits: Buffer,
}

impl Scratch {
    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        let Self { hidden, normed, added, attention, moe, logits, .. } = self;
        let attention::Scratch { query, key, value, mixed } = attention;
        let all = [hidden, normed, added, query, key, value, mixed, &moe.logits, logits];
        let floats: usize = all.iter().map(|buffer| buffer.len()).sum();
        floats * size_of::<f32>() + self.gated_bytes
    }
}

/// What one token costs, by the tensors it goes through. Attention comes on top.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Weights it is multiplied by in the blocks: of experts, those that it goes to.
    pub block_weights: u64,
    /// Weights of the output matrix, when its logits are wanted.
    pub output_weights: u64,
    /// Bytes of both.
    pub weight_bytes: u64,
    /// Bytes of all weights, of every expert too.
    pub total_bytes: u64,
}

impl Cost {
    /// Adds a matrix of a block that every token is multiplied by.
    fn add(&mut self, matrix: &Matrix) {
        self.block_weights += (matrix.rows() * matrix.cols()) as u64;
        self.weight_bytes += n_bytes(matrix);
        self.total_bytes += n_bytes(matrix);
    }
}

fn n_bytes(matrix: &Matrix) -> u64 {
    matrix.bytes().len() as u64
}

/// Rows of a pass: all of it that the layers need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// A token a row, each of the vocabulary.
    pub tokens: &'a [u32],
    /// Where they belong.
    pub place: Place<'a>,
    /// Which rows' logits are wanted.
    pub wanted: &'a [u32],
}

impl Decoder {
    /// Binds the tensors of a file.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], and what the device fails at.
    pub fn bind(
        config: DecoderConfig,
        names: &Names,
        binder: &mut Binder<'_>,
    ) -> Result<Self, Error> {
        let vocabulary = binder.rows(&names.embedding, 0)?;
        let table = binder.weight(&names.embedding, 0, [vocabulary, config.embedding])?;
        let own = match config.output {
            Output::Own => true,
            Output::Tied => false,
            Output::OwnOrTied => binder.has(&names.output, 0),
        };
        let output = if own {
            binder.weight(&names.output, 0, [vocabulary, config.embedding])?
        } else {
            binder.ignore(&names.output, 0);
            Weight { matrix: table.matrix.clone(), bias: None, scale: table.scale }
        };
        let blocks = (0..config.layers.len())
            .map(|layer| Block::bind(&config, names, binder, layer))
            .collect::<Result<_, _>>()?;
        let mut norms = Norms { config: &config, binder };
        let output_norm = norms.bind(&names.output_norm, 0, config.embedding)?;
        // A scale of the table belongs to the embedding too.
        let config =
            DecoderConfig { embedding_scale: config.embedding_scale * table.scale, ..config };
        Ok(Self { config, embedding: table.matrix, blocks, output_norm, output })
    }

    /// The numbers of the model.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Tokens it knows.
    pub fn vocabulary(&self) -> usize {
        self.embedding.rows()
    }

    /// What one token costs.
    pub fn cost(&self) -> Cost {
        let mut cost = Cost::default();
        for Block { attention, mlp, .. } in &self.blocks {
            let Attention { query, key, value, output, .. } = attention;
            for weight in [query, key, value, output] {
                cost.add(&weight.matrix);
            }
            match mlp {
                FeedForward::Dense(Mlp { gate, up, down, .. }) => {
                    for weight in [gate, up, down] {
                        cost.add(&weight.matrix);
                    }
                }
                FeedForward::Sparse(Moe { router, choice, experts }) => {
                    cost.add(&router.matrix);
                    for part in [&experts.gate, &experts.up, &experts.down] {
                        part.matrices.iter().take(choice.n_used).for_each(|one| cost.add(one));
                        let others = part.matrices.iter().skip(choice.n_used);
                        cost.total_bytes += others.map(n_bytes).sum::<u64>();
                    }
                }
            }
        }
        cost.output_weights = self.output.n_weights();
        cost.weight_bytes += n_bytes(&self.output.matrix);
        cost.total_bytes += n_bytes(&self.output.matrix);
        cost
    }

    /// Room for passes of up to `rows` rows.
    ///
    /// # Errors
    /// What the device fails at.
    pub fn scratch(&self, device: &dyn Device, rows: usize) -> Result<Scratch, Error> {
        let DecoderConfig { embedding, n_heads, n_kv_heads, head_dim, .. } = self.config;
        let layers = &self.config.layers;
        let has_dense = layers.iter().any(|layer| !layer.has_experts);
        let feed_forward = if has_dense { self.config.feed_forward } else { 0 };
        let n_experts = self.config.experts.map_or(0, |experts| experts.router.n_experts);
        let buffer = |width: usize| device.buffer(rows * width);
        Ok(Scratch {
            hidden: buffer(embedding)?,
            normed: buffer(embedding)?,
            added: buffer(embedding)?,
            attention: attention::Scratch {
                query: buffer(n_heads * head_dim)?,
                key: buffer(n_kv_heads * head_dim)?,
                value: buffer(n_kv_heads * head_dim)?,
                mixed: buffer(n_heads * head_dim)?,
            },
            gated: Activations::default(),
            gated_bytes: rows * feed_forward * size_of::<f32>(),
            moe: moe::Scratch { logits: buffer(n_experts)?, routing: Routing::default() },
            logits: device.buffer(LOGIT_ROWS * self.vocabulary())?,
        })
    }

    /// Runs rows through all blocks and adds the logits of [`Rows::wanted`] to `logits`.
    ///
    /// # Errors
    /// What the device fails at.
    pub fn forward(
        &self,
        device: &mut dyn Device,
        kv: &mut KvCache,
        (rows, scratch): (Rows<'_>, &mut Scratch),
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let n_blocks = self.blocks.len();
        device.embed(
            &self.embedding,
            rows.tokens,
            self.config.embedding_scale,
            &mut scratch.hidden,
        )?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let rope = &self.config.ropes[self.config.layers[layer].rope];
            let n = rows.tokens.len();
            let attention = &mut scratch.attention;
            let input = Input::Normed(&scratch.hidden, &block.attention_norm);
            block.attention.project(device, input, (rope, rows.place), attention)?;
            block.attention.mix(device, (kv, layer), rows.place, attention)?;
            // Past the last block's cache only the rows whose logits are wanted have a use.
            let is_last = layer + 1 == n_blocks;
            let n = if is_last { self.keep(device, rows, scratch)? } else { n };
            if n > 0 {
                block.finish(device, n, scratch)?;
            }
        }
        self.head(device, rows.wanted.len(), scratch, logits)
    }

    /// Moves the rows of [`Rows::wanted`] to the front; how many they are.
    fn keep(
        &self,
        device: &mut dyn Device,
        rows: Rows<'_>,
        scratch: &mut Scratch,
    ) -> Result<usize, Error> {
        let kept = rows.wanted;
        if !kept.is_empty() && kept.len() < rows.tokens.len() {
            let mixed_width = self.config.n_heads * self.config.head_dim;
            let Scratch { hidden, normed, attention, .. } = scratch;
            device.gather(hidden, self.config.embedding, kept, normed)?;
            std::mem::swap(hidden, normed);
            // The query has done its work: its room takes the rows of the result.
            device.gather(&attention.mixed, mixed_width, kept, &mut attention.query)?;
            std::mem::swap(&mut attention.mixed, &mut attention.query);
        }
        Ok(kept.len())
    }

    /// Adds the logits of the first `n` rows of the hidden state to `logits`.
    fn head(
        &self,
        device: &mut dyn Device,
        n: usize,
        scratch: &mut Scratch,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        if n == 0 {
            return Ok(());
        }
        let Scratch { hidden, normed, added, logits: out, .. } = scratch;
        device.rms_norm(&self.output_norm, hidden, n, normed)?;
        let rows = as_rows(n);
        for part in rows.chunks(LOGIT_ROWS) {
            device.gather(normed, self.config.embedding, part, added)?;
            device.linear(Input::Plain(added), part.len(), &mut [self.output.part(out)])?;
            let len = part.len() * self.vocabulary();
            if let Some(cap) = self.config.logit_cap {
                device.soft_cap(out, cap, len)?;
            }
            let at = logits.len();
            logits.resize(at + len, 0.0);
            device.read(out, 0, &mut logits[at..])?;
        }
        Ok(())
    }
}

/// The numbers of the first `n` rows.
fn as_rows(n: usize) -> Vec<u32> {
    (0..u32::try_from(n).expect("rows of a pass are counted in 32 bits")).collect()
}

/// Binds norms.
struct Norms<'a, 'b> {
    config: &'a DecoderConfig,
    binder: &'a mut Binder<'b>,
}

impl Norms<'_, '_> {
    fn bind(&mut self, name: &Name, layer: usize, width: usize) -> Result<RmsNorm, Error> {
        let weight = self.binder.vector(name, layer, width, self.config.norm_offset)?;
        Ok(RmsNorm { weight, eps: self.config.norm_eps })
    }

    fn bind_if(
        &mut self,
        wanted: bool,
        name: &Name,
        layer: usize,
        width: usize,
    ) -> Result<Option<RmsNorm>, Error> {
        wanted.then(|| self.bind(name, layer, width)).transpose()
    }
}

impl Block {
    fn bind(
        config: &DecoderConfig,
        names: &Names,
        binder: &mut Binder<'_>,
        layer: usize,
    ) -> Result<Self, Error> {
        let DecoderConfig { embedding, feed_forward, .. } = *config;
        let mlp = match config.experts.filter(|_| config.layers[layer].has_experts) {
            Some(experts) => {
                FeedForward::Sparse(Self::bind_moe(config, experts, names, (binder, layer))?)
            }
            None => FeedForward::Dense(Mlp {
                gate: binder.weight(&names.gate, layer, [feed_forward, embedding])?,
                up: binder.weight(&names.up, layer, [feed_forward, embedding])?,
                down: binder.weight(&names.down, layer, [embedding, feed_forward])?,
                activation: config.activation,
            }),
        };
        let attention = Self::bind_attention(config, names, binder, layer)?;
        let mut norms = Norms { config, binder };
        let post = config.post_norms;
        Ok(Self {
            attention_norm: norms.bind(&names.attention_norm, layer, embedding)?,
            attention,
            post_attention_norm: norms.bind_if(
                post,
                &names.post_attention_norm,
                layer,
                embedding,
            )?,
            mlp_norm: norms.bind(&names.mlp_norm, layer, embedding)?,
            mlp,
            post_mlp_norm: norms.bind_if(post, &names.post_mlp_norm, layer, embedding)?,
        })
    }

    fn bind_moe(
        config: &DecoderConfig,
        experts: ExpertsConfig,
        names: &Names,
        (binder, layer): (&mut Binder<'_>, usize),
    ) -> Result<Moe, Error> {
        let ExpertsConfig { router, feed_forward, bias } = experts;
        let (n, embedding) = (router.n_experts, config.embedding);
        let mut bind = |name: &Name, rows, cols| -> Result<ExpertWeights, Error> {
            if bias {
                binder.biased_experts(name, layer, [n, rows, cols])
            } else {
                binder.experts(name, layer, [n, rows, cols])
            }
        };
        let experts = Experts {
            gate: bind(&names.expert_gate, feed_forward, embedding)?,
            up: bind(&names.expert_up, feed_forward, embedding)?,
            down: bind(&names.expert_down, embedding, feed_forward)?,
            activation: config.activation,
        };
        let logits = if bias {
            binder.biased_weight(&names.router, layer, [n, embedding])?
        } else {
            binder.weight(&names.router, layer, [n, embedding])?
        };
        Ok(Moe { router: logits, choice: router, experts })
    }

    fn bind_attention(
        config: &DecoderConfig,
        names: &Names,
        binder: &mut Binder<'_>,
        layer: usize,
    ) -> Result<Attention, Error> {
        let DecoderConfig { embedding, head_dim, n_heads, n_kv_heads, qk_norm, .. } = *config;
        let mut bind = |has_bias: bool, name: &Name, shape: [usize; 2]| {
            if has_bias {
                binder.biased_weight(name, layer, shape)
            } else {
                binder.weight(name, layer, shape)
            }
        };
        let mut input = |name: &Name, n_heads: usize| {
            bind(config.qkv_bias, name, [n_heads * head_dim, embedding])
        };
        let query = input(&names.query, n_heads)?;
        let key = input(&names.key, n_kv_heads)?;
        let value = input(&names.value, n_kv_heads)?;
        let shape = [embedding, n_heads * head_dim];
        let output = bind(config.output_bias, &names.attention_output, shape)?;
        let sinks = config.sinks.then(|| binder.vector(&names.sinks, layer, n_heads, 0.0));
        let mut norms = Norms { config, binder };
        Ok(Attention {
            query,
            key,
            value,
            output,
            query_norm: norms.bind_if(qk_norm, &names.query_norm, layer, head_dim)?,
            key_norm: norms.bind_if(qk_norm, &names.key_norm, layer, head_dim)?,
            head_dim,
            sinks: sinks.transpose()?,
            constants: Constants {
                n_heads,
                scale: config.attention_scale,
                window: config.layers[layer].window,
                soft_cap: config.score_cap,
                sinks: None,
            },
        })
    }

    /// From what attention mixed to the next hidden state, for the first `n` rows.
    fn finish(
        &self,
        device: &mut dyn Device,
        n: usize,
        scratch: &mut Scratch,
    ) -> Result<(), Error> {
        let Scratch { hidden, normed, added, attention, gated, moe, .. } = scratch;
        let mixed = (Input::Plain(&attention.mixed), n);
        let post_norm = self.post_attention_norm.as_ref();
        add_product(device, mixed, (&self.attention.output, post_norm), (hidden, added))?;
        let post_norm = self.post_mlp_norm.as_ref();
        match &self.mlp {
            FeedForward::Dense(dense) => {
                let input = (Input::Normed(hidden, &self.mlp_norm), n);
                dense.gate_up(device, input, gated)?;
                let input = (Input::Ready(gated), n);
                add_product(device, input, (&dense.down, post_norm), (hidden, added))
            }
            FeedForward::Sparse(sparse) => {
                device.rms_norm(&self.mlp_norm, hidden, n, normed)?;
                sparse.apply(device, (normed, n), moe, added)?;
                let len = n * self.attention.output.matrix.rows();
                add_normed(device, (added, n), post_norm, (hidden, len))
            }
        }
    }
}

/// `hidden += norm(x W^T)`, where there is a norm by way of `added`.
fn add_product(
    device: &mut dyn Device,
    (input, n): (Input<'_>, usize),
    (weight, norm): (&Weight, Option<&RmsNorm>),
    (hidden, added): (&mut Buffer, &mut Buffer),
) -> Result<(), Error> {
    if norm.is_none() {
        return Ok(device.linear(input, n, &mut [weight.added_to(hidden)])?);
    }
    device.linear(input, n, &mut [weight.part(added)])?;
    add_normed(device, (added, n), norm, (hidden, n * weight.matrix.rows()))
}

/// `hidden += norm(added)`, for `n` rows, together `len` values.
fn add_normed(
    device: &mut dyn Device,
    (added, n): (&mut Buffer, usize),
    norm: Option<&RmsNorm>,
    (hidden, len): (&mut Buffer, usize),
) -> Result<(), Error> {
    if let Some(norm) = norm {
        device.rms_norm_inplace(norm, added, n)?;
    }
    Ok(device.add(hidden, added, len)?)
}
