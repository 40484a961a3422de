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
}
