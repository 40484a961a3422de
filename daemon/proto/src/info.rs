//! What is known of a model without loading it. A short-lived runner reads it from the file's
//! header.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Something a model can do, as clients ask for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ability {
    /// Continue text.
    Completion,
    /// Call tools.
    Tools,
    /// Fill in the middle.
    Insert,
    /// Vectors for texts.
    Embedding,
    /// Think before it answers.
    Thinking,
}

/// Layers that are alike, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRun {
    /// How many.
    pub n: u32,
    /// Bytes of each one's weights, its experts' aside.
    pub dense: u64,
    /// Bytes of the weights of all experts of each.
    pub experts: u64,
    /// Bytes of keys and values in half precision that each keeps of a token.
    pub kv_bytes_per_token: u64,
}

/// Bytes of a model by what may lie on a device of its own, from the tensor table. All zero where a
/// header does not say which tensor is whose: such a model lies in one place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Bytes of the embedding, which goes with the first layer.
    pub embedding: u64,
    /// Bytes of all that follows the last layer, and of what belongs to none.
    pub output: u64,
    /// Whether the last step multiplies by the embedding too.
    pub is_tied: bool,
    /// The layers, from the first to the last.
    pub layers: Vec<LayerRun>,
}

impl Layout {
    /// Adds a layer after the last one.
    pub fn push(&mut self, layer: LayerRun) {
        match self.layers.last_mut() {
            Some(last) if LayerRun { n: layer.n, ..*last } == layer => last.n += layer.n,
            _ => self.layers.push(layer),
        }
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        let run =
            |run: &LayerRun| run.dense.saturating_add(run.experts).saturating_mul(u64::from(run.n));
        let layers = self.layers.iter().map(run).fold(0, u64::saturating_add);
        layers.saturating_add(self.embedding).saturating_add(self.output)
    }
}

/// The figures of a model that admission, listings and clients need. Sizes come from the tensor
/// table, never from per-model formulas.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// `gguf` or `safetensors`.
    pub format: String,
    /// The architecture as the file names it (`general.architecture`).
    pub arch: String,
    /// Whether this build's engine can run it. `false` is a model that is kept but refused at load.
    pub supported: bool,
    /// The quant as people name it, for example `Q4_K_M`.
    pub quant: String,
    /// Weights, counted.
    pub n_params: u64,
    /// Tokens of context the model was trained for.
    pub context_length: u32,
    /// Width of the hidden state.
    pub embedding_length: u32,
    /// Transformer layers.
    pub n_layers: u32,
    /// Bytes of all tensors.
    pub weight_bytes: u64,
    /// Bytes of keys and values in half precision for each token of context.
    pub kv_bytes_per_token: u64,
    /// Where these bytes belong.
    pub layout: Layout,
    /// What it can do.
    pub abilities: Vec<Ability>,
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its type as the format names it, for example `Q4_K`.
    #[serde(rename = "type")]
    pub ty: String,
    /// Its dimensions as the format orders them.
    pub shape: Vec<u64>,
}

/// All that a header says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// The figures.
    pub info: ModelInfo,
    /// The file's metadata. Arrays of more than [`Inspection::ARRAY_ITEMS`] items are `null`.
    pub metadata: Map<String, Value>,
    /// The chat template in the file, if any (Jinja text).
    pub chat_template: Option<String>,
    /// The tensor table.
    pub tensors: Vec<TensorInfo>,
}

impl Inspection {
    /// Longer metadata arrays (vocabularies) are left out of [`Inspection::metadata`].
    pub const ARRAY_ITEMS: usize = 5;
    /// What an inspection says: one that was kept under another number is made anew.
    pub const VERSION: u32 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_are_alike_are_said_once() {
        let run = |n, experts| LayerRun { n, dense: 10, experts, kv_bytes_per_token: 4 };
        let mut layout = Layout { embedding: 5, output: 7, ..Layout::default() };
        for experts in [0, 100, 100, 90, 100] {
            layout.push(run(1, experts));
        }
        assert_eq!(layout.layers, [run(1, 0), run(2, 100), run(1, 90), run(1, 100)]);
        assert_eq!(layout.weight_bytes(), 5 + 7 + 5 * 10 + 390);
    }
}
