//! A forward pass to read: float32, one token at a time, no device, no blocks, no speed. The
//! engine's configurations and the formats' decodes are held against the golden vectors through it,
//! exactly.

use std::collections::HashMap;

use v4_engine::arch::config::{DecoderConfig, LayerConfig, Output};
use v4_engine::arch::decoder::{Name, Names};
use v4_engine::arch::resolve;
use v4_engine::format::{File, Format};
use v4_kernels::{Activation, Rope, RopeKind, quant};

pub struct Reference {
    config: DecoderConfig,
    names: Names,
    format: Format,
    tensors: HashMap<String, Vec<f32>>,
    /// A layer, then all its keys and values so far, a token after another.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    n_tokens: usize,
}

impl Reference {
    pub fn new(file: &File) -> Self {
        let (arch, config) = resolve(file).expect("a known architecture");
        let tensors = arch.tensors(file).expect("good tensors");
        let decode = |tensor: &v4_engine::format::Tensor| {
            let n: u64 = tensor.shape.iter().product();
            let mut values = vec![0.0; usize::try_from(n).expect("fits")];
            quant::dequantize(tensor.quant, tensor.blocks().as_slice(), &mut values);
            (tensor.name.clone(), values)
        };
        let n_layers = config.layers.len();
        Self {
            config,
            names: arch.names,
            format: file.format,
            tensors: tensors.iter().map(decode).collect(),
            keys: vec![Vec::new(); n_layers],
            values: vec![Vec::new(); n_layers],
            n_tokens: 0,
        }
    }

    pub fn forget(&mut self) {
        self.keys.iter_mut().chain(&mut self.values).for_each(Vec::clear);
        self.n_tokens = 0;
    }

    /// The logits after one more token.
    pub fn step(&mut self, token: u32) -> Vec<f32> {
        let width = self.config.embedding;
        let table = self.tensor(self.names.embedding, 0, ".weight").expect("an embedding");
        let row = &table[token as usize * width..][..width];
        let mut hidden: Vec<f32> = row.iter().map(|x| x * self.config.embedding_scale).collect();
        for layer in 0..self.config.layers.len() {
            let names = self.names;
            let normed = self.norm(names.attention_norm, layer, &hidden);
            let mut added = self.attention(layer, &normed);
            if self.config.post_norms {
                added = self.norm(names.post_attention_norm, layer, &added);
            }
            add(&mut hidden, &added);
            let normed = self.norm(names.mlp_norm, layer, &hidden);
            let mut added = self.mlp(layer, &normed);
            if self.config.post_norms {
                added = self.norm(names.post_mlp_norm, layer, &added);
            }
            add(&mut hidden, &added);
        }
        self.n_tokens += 1;
        self.logits(&hidden)
    }

    fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        let normed = self.norm(self.names.output_norm, 0, hidden);
        let own = self.tensor(self.names.output, 0, ".weight").is_some();
        let is_own = own && self.config.output != Output::Tied;
        let name = if is_own { self.names.output } else { self.names.embedding };
        let mut logits = self.product(name, 0, &normed);
        if let Some(cap) = self.config.logit_cap {
            for x in &mut logits {
                *x = cap * (*x / cap).tanh();
            }
        }
        logits
    }

    fn attention(&mut self, layer: usize, x: &[f32]) -> Vec<f32> {
        let Self { names, n_tokens: position, .. } = *self;
        let LayerConfig { window, rope, .. } = self.config.layers[layer];
        let head_dim = self.config.head_dim;
        let mut query = self.product(names.query, layer, x);
        let mut key = self.product(names.key, layer, x);
        if self.config.qk_norm {
            query = self.norm(names.query_norm, layer, &query);
            key = self.norm(names.key_norm, layer, &key);
        }
        let rope = &self.config.ropes[rope];
        for head in query.chunks_mut(head_dim).chain(key.chunks_mut(head_dim)) {
            rotate(rope, head, position);
        }
        let value = self.product(names.value, layer, x);
        self.keys[layer].extend(key);
        self.values[layer].extend(value);
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let group = self.config.n_heads / self.config.n_kv_heads;
        let mut mixed = vec![0.0; query.len()];
        for (head, (query, mixed)) in
            query.chunks(head_dim).zip(mixed.chunks_mut(head_dim)).enumerate()
        {
            let sinks = self.config.sinks.then(|| self.tensor(names.sinks, layer, ".weight"));
            let sink = sinks.map(|sinks| sinks.expect("sinks")[head]);
            self.attend((layer, head / group, first), (query, sink), mixed);
        }
        self.product(names.attention_output, layer, &mixed)
    }

    fn attend(
        &self,
        (layer, kv_head, first): (usize, usize, usize),
        (query, sink): (&[f32], Option<f32>),
        mixed: &mut [f32],
    ) {
        let head_dim = self.config.head_dim;
        let row = self.config.n_kv_heads * head_dim;
        let at = |token: usize| token * row + kv_head * head_dim;
        let tokens = first..=self.n_tokens;
        let score = |token: usize| {
            let score = dot(query, &self.keys[layer][at(token)..][..head_dim])
                * self.config.attention_scale;
            self.config.score_cap.map_or(score, |cap| cap * (score / cap).tanh())
        };
        let mut weights: Vec<f32> = tokens.clone().map(score).collect();
        let max = weights.iter().copied().fold(f32::MIN, f32::max);
        for weight in &mut weights {
            *weight = (*weight - max).exp();
        }
        let sum = weights.iter().sum::<f32>() + sink.map_or(0.0, |sink| (sink - max).exp());
        for (token, weight) in tokens.zip(weights) {
            let value = &self.values[layer][at(token)..][..head_dim];
            mixed.iter_mut().zip(value).for_each(|(m, v)| *m += weight / sum * v);
        }
    }

    fn mlp(&self, layer: usize, x: &[f32]) -> Vec<f32> {
        let names = self.names;
        if !self.config.layers[layer].has_experts {
            let gate = self.product(names.gate, layer, x);
            let gated = self.gated(gate, &self.product(names.up, layer, x));
            return self.product(names.down, layer, &gated);
        }
        let choice = self.config.experts.expect("numbers of the experts").router;
        let logits = self.product(names.router, layer, x);
        let mut chosen: Vec<usize> = (0..logits.len()).collect();
        chosen.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        chosen.truncate(choice.n_used);
        let all: f32 = logits.iter().map(|x| x.exp()).sum();
        let ours: f32 = chosen.iter().map(|&id| logits[id].exp()).sum();
        let mut sum = vec![0.0; x.len()];
        for id in chosen {
            let weight = logits[id].exp() / if choice.is_normalised { ours } else { all };
            let gate = self.expert(names.expert_gate, (layer, id), x);
            let gated = self.gated(gate, &self.expert(names.expert_up, (layer, id), x));
            let part = self.expert(names.expert_down, (layer, id), &gated);
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += weight * part);
        }
        sum
    }

    fn gated(&self, mut gate: Vec<f32>, up: &[f32]) -> Vec<f32> {
        for (gate, up) in gate.iter_mut().zip(up) {
            let x = *gate;
            *gate = match self.config.activation {
                Activation::Silu => x / (1.0 + (-x).exp()) * up,
                Activation::GeluTanh => {
                    let root = (2.0 / std::f32::consts::PI).sqrt();
                    0.5 * x * (1.0 + (root * (x + 0.044_715 * x * x * x)).tanh()) * up
                }
                Activation::ClampedSwish { alpha, limit } => {
                    let x = x.min(limit);
                    x / (1.0 + (-alpha * x).exp()) * (up.clamp(-limit, limit) + 1.0)
                }
            };
        }
        gate
    }

    /// Expert `id`'s product: of its part of one tensor, or of a tensor of its own.
    fn expert(&self, name: Name, (layer, id): (usize, usize), x: &[f32]) -> Vec<f32> {
        let n = self.config.experts.expect("numbers of the experts").router.n_experts;
        let part = |suffix: &str| {
            if let Some(all) = self.tensor(name, layer, suffix) {
                return Some(&all[all.len() / n * id..all.len() / n * (id + 1)]);
            }
            let name = format!("{}{suffix}", name.hf.replace("{}", &layer.to_string()));
            self.tensors.get(&name.replace("[]", &id.to_string())).map(Vec::as_slice)
        };
        let rows = part(".weight").expect("a matrix").chunks(x.len());
        let mut out: Vec<f32> = rows.map(|row| dot(row, x)).collect();
        if let Some(bias) = part(".bias") {
            add(&mut out, bias);
        }
        out
    }

    fn tensor(&self, name: Name, layer: usize, suffix: &str) -> Option<&Vec<f32>> {
        let name = match self.format {
            Format::Gguf => name.gguf,
            Format::Safetensors => name.hf,
        };
        self.tensors.get(&format!("{}{suffix}", name.replace("{}", &layer.to_string())))
    }

    fn product(&self, name: Name, layer: usize, x: &[f32]) -> Vec<f32> {
        let weight = self.tensor(name, layer, ".weight").expect("a matrix");
        let mut out: Vec<f32> = weight.chunks(x.len()).map(|row| dot(row, x)).collect();
        if let Some(scale) = self.tensor(name, layer, ".scale") {
            for x in &mut out {
                *x *= scale[0];
            }
        }
        if let Some(bias) = self.tensor(name, layer, ".bias") {
            add(&mut out, bias);
        }
        out
    }

    /// Of each row as wide as the weight.
    fn norm(&self, name: Name, layer: usize, x: &[f32]) -> Vec<f32> {
        let weight = self.tensor(name, layer, ".weight").expect("a norm");
        let mut out = x.to_vec();
        for row in out.chunks_mut(weight.len()) {
            let mean = dot(row, row) / row.len() as f32;
            let scale = 1.0 / (mean + self.config.norm_eps).sqrt();
            let weights = weight.iter().map(|w| w + self.config.norm_offset);
            row.iter_mut().zip(weights).for_each(|(x, w)| *x = *x * scale * w);
        }
        out
    }
}

fn rotate(rope: &Rope, head: &mut [f32], position: usize) {
    let n = rope.inv_freq.len();
    for (i, &inv_freq) in rope.inv_freq.iter().enumerate() {
        let (a, b) = match rope.kind {
            RopeKind::Adjacent => (2 * i, 2 * i + 1),
            RopeKind::Halves => (i, i + n),
        };
        let (sin, cos) = (position as f32 * inv_freq).sin_cos();
        let (sin, cos) = (sin * rope.magnitude, cos * rope.magnitude);
        (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // Eight sums, so that the order of additions costs no precision and little time.
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}
