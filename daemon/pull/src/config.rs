//! The config blob of a manifest: what listings show of a model, under Ollama's field names.

use serde_json::{Value, json};
use v4_proto::ModelInfo;

/// The config blob of a model; `info` is `None` where the header could not be read.
///
/// # Panics
/// Never: it is made of JSON values.
pub fn encode(info: Option<&ModelInfo>) -> Vec<u8> {
    let mut config = json!({
        "architecture": "amd64",
        "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [] },
    });
    if let (Some(info), Some(fields)) = (info, config.as_object_mut()) {
        let facts = [
            ("model_format", json!(info.format)),
            ("model_family", json!(info.arch)),
            ("model_families", json!([info.arch])),
            ("model_type", Value::String(parameters(info.n_params))),
            ("file_type", json!(info.quant)),
            ("context_length", json!(info.context_length)),
            ("embedding_length", json!(info.embedding_length)),
            ("capabilities", json!(info.abilities)),
        ];
        fields.extend(facts.map(|(name, value)| (name.to_owned(), value)));
    }
    serde_json::to_vec(&config).expect("made of JSON values just now")
}

/// A count of weights as people write it: `134.52M`, `8.0B`.
fn parameters(n: u64) -> String {
    match n {
        1_000_000_000.. => format!("{:.1}B", n as f64 / 1e9),
        1_000_000.. => format!("{:.2}M", n as f64 / 1e6),
        1_000.. => format!("{:.0}K", n as f64 / 1e3),
        _ => n.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_weights_read_well() {
        for (n, text) in [
            (999, "999"),
            (15_000, "15K"),
            (134_515_008, "134.52M"),
            (8_030_261_312, "8.0B"),
            (1_600_000_000_000, "1600.0B"),
        ] {
            assert_eq!(parameters(n), text);
        }
    }
}
