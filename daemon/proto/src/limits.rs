//! Bounds on what crosses the socket and on what a model file may claim. Each has a unit and a
//! reason.

/// Bytes of a frame's JSON header. A `Generate` carries the whole conversation: 32 MiB is about
/// eight million tokens.
pub const FRAME_HEADER_BYTES: usize = 32 << 20;
/// Bytes of a frame's raw body (embeddings, images).
pub const FRAME_BODY_BYTES: usize = 256 << 20;

/// Characters of a model name as a user may type it: host 350, namespace 80, model 80, tag 80 and
/// separators.
pub const NAME_CHARS: usize = 600;

/// Metadata entries of a model file. The largest seen in the wild has under 100.
pub const META_ENTRIES: u64 = 4096;
/// Bytes of one metadata key, as the GGUF specification bounds it.
pub const META_KEY_BYTES: u64 = 65_535;
/// Bytes of one metadata string; the longest real ones are chat templates of some 20 KiB.
pub const META_STRING_BYTES: u64 = 16 << 20;
/// Elements of one metadata array; the largest real vocabularies have 262,144 entries, merges twice
/// that.
pub const META_ARRAY_ITEMS: u64 = 4 << 20;
/// Bytes of everything before the tensors: metadata and tensor table. The largest real vocabularies
/// need some 20 MB.
pub const META_BYTES: u64 = 256 << 20;
/// Arrays in arrays of metadata. No real file has any; two levels leave room.
pub const META_ARRAY_DEPTH: u32 = 2;
/// Alignment of tensors in bytes that a file may ask for; 32 is usual, a huge page the most that
/// makes sense.
pub const TENSOR_ALIGNMENT: u64 = 2 << 20;
/// Bytes of a tensor's name. GGUF says 64; names of Hugging Face have some 100.
pub const TENSOR_NAME_BYTES: u64 = 1024;
/// Width of a hidden state, a head or a feed-forward, and count of heads. The largest seen is
/// 53,248.
pub const MODEL_WIDTH: u64 = 1 << 20;
/// Transformer layers of a model. The largest seen has 126.
pub const MODEL_LAYERS: u64 = 1024;
/// Files that one model may be cut into. The largest seen has under 200.
pub const SHARDS: usize = 1024;
/// Bytes of a model folder's `config.json` or shard index; the largest real index has some 10 MB.
pub const MODEL_JSON_BYTES: usize = 64 << 20;
/// Tensors of a model file. DeepSeek-V4-Pro has some 100,000 when experts are kept apart.
pub const TENSORS: u64 = 1 << 18;
/// Dimensions of a tensor, as in GGUF.
pub const TENSOR_DIMS: u32 = 4;
/// Bytes of a safetensors header; the format's own limit.
pub const SAFETENSORS_HEADER_BYTES: u64 = 100_000_000;

/// Messages of one conversation.
pub const MESSAGES: usize = 16_384;
/// Stop strings of one request.
pub const STOP_STRINGS: usize = 64;
/// Bytes of one stop string.
pub const STOP_STRING_BYTES: usize = 4096;
