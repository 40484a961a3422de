//! `cargo xtask logits`: the engine's logits for given tokens, to hold it against any reference.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use v4_engine::format::safetensors;
use v4_engine::model::Alone;
use v4_kernels::Map;

use crate::device::DeviceArgs;

/// Write the float32 logits [tokens, vocabulary] of token ids.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model: a GGUF file, or a folder with config.json and safetensors.
    file: PathBuf,
    /// Safetensors with `input_ids`, I64 or I32, of one sequence.
    ids: PathBuf,
    /// Where to write `logits` as safetensors.
    out: PathBuf,
    /// Tokens of a batch; the cache carries the sequence from one to the next.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    chunk: u32,
    /// Token by token, as in an answer: the same as --chunk 1.
    #[arg(long, conflicts_with = "chunk")]
    steps: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs the ids and writes their logits.
///
/// # Errors
/// A sentence: a file cannot be read or written, or an id is beyond the vocabulary.
pub fn run(args: Args) -> Result<(), String> {
    let Args { file, ids, out: path, chunk, steps, device } = args;
    let ids = read_ids(&ids)?;
    let mut model = device.open(&file)?;
    let vocabulary = model.vocabulary();
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
        return Err(format!("id {id} is beyond the vocabulary of {vocabulary}"));
    }
    let about = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut out = BufWriter::new(File::create(&path).map_err(about)?);
    out.write_all(&header(ids.len(), vocabulary)).map_err(about)?;
    let mut alone = Alone::new(&mut model, ids.len()).map_err(|error| error.to_string())?;
    let chunk = if steps { 1 } else { chunk as usize };
    let mut logits = Vec::new();
    for tokens in ids.chunks(chunk) {
        let rows: Vec<u32> = (0..).take(tokens.len()).collect();
        alone.feed(tokens, &rows, &mut logits).map_err(|error| error.to_string())?;
        for logit in &logits {
            out.write_all(&logit.to_le_bytes()).map_err(about)?;
        }
    }
    out.flush().map_err(about)
}

/// The start of a safetensors file with one array.
fn header(n_tokens: usize, vocabulary: usize) -> Vec<u8> {
    let n_bytes = n_tokens * vocabulary * size_of::<f32>();
    let json = serde_json::json!({
        "logits": { "dtype": "F32", "shape": [n_tokens, vocabulary], "data_offsets": [0, n_bytes] }
    });
    let mut text = json.to_string();
    // The format wants the arrays on a boundary of 8 bytes.
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn read_ids(path: &Path) -> Result<Vec<u32>, String> {
    let about = |problem: String| format!("{}: {problem}", path.display());
    let map = Map::open(path).map_err(|error| about(error.to_string()))?;
    let (entries, start) =
        safetensors::header(map.as_slice()).map_err(|error| about(error.to_string()))?;
    let entry = entries.into_iter().find(|(name, _)| name == "input_ids");
    let (_, entry) = entry.ok_or_else(|| about("there is no `input_ids`".to_owned()))?;
    let [from, to] = entry.data_offsets.map(|at| usize::try_from(start.saturating_add(at)));
    let bytes = from.ok().zip(to.ok()).and_then(|(from, to)| map.as_slice().get(from..to));
    let bytes = bytes.ok_or_else(|| about("it is truncated".to_owned()))?;
    let ids: Option<Vec<u32>> = match entry.dtype.as_str() {
        "I32" => bytes
            .chunks_exact(4)
            .map(|word| u32::try_from(i32::from_le_bytes(word.try_into().ok()?)).ok())
            .collect(),
        "I64" => bytes
            .chunks_exact(8)
            .map(|word| u32::try_from(i64::from_le_bytes(word.try_into().ok()?)).ok())
            .collect(),
        other => return Err(about(format!("`input_ids` is {other}, neither I64 nor I32"))),
    };
    ids.ok_or_else(|| about("an id is negative or beyond 32 bits".to_owned()))
}
