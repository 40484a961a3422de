//! The library of models that ships with v4: what a short name means.

use crate::Modelfile;

/// A name of the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The model.
    pub model: &'static str,
    /// Its tag.
    pub tag: &'static str,
    /// Its Modelfile's text.
    pub text: &'static str,
}

impl Entry {
    /// Its Modelfile.
    ///
    /// # Panics
    /// Never: a test reads every entry.
    pub fn modelfile(&self) -> Modelfile {
        Modelfile::parse(self.text).expect("a test reads every entry of the library")
    }

    /// Whether the digests of its files stand in it, so that whatever carries them is held to what
    /// was checked when the entry was written. Of a repository at a hub the hub says them.
    ///
    /// # Panics
    /// As [`Entry::modelfile`].
    pub fn is_checked(&self) -> bool {
        self.modelfile().files().iter().all(|file| file.digest.is_some())
    }

    /// The name as a person types it: the tag `latest` is left out.
    pub fn name(&self) -> String {
        match self.tag {
            "latest" => self.model.to_owned(),
            tag => format!("{}:{tag}", self.model),
        }
    }
}

const SMOLLM2_135M: &str = include_str!("../library/smollm2/135m.modelfile");
const GEMMA3_270M: &str = include_str!("../library/gemma3/270m.modelfile");
const QWEN25_CODER_05B: &str = include_str!("../library/qwen2.5-coder/0.5b.modelfile");

const SMOLLM2_360M: &str = include_str!("../library/smollm2/360m.modelfile");
const SMOLLM2_17B: &str = include_str!("../library/smollm2/1.7b.modelfile");
const QWEN25_CODER_15B: &str = include_str!("../library/qwen2.5-coder/1.5b.modelfile");
const QWEN25_CODER_7B: &str = include_str!("../library/qwen2.5-coder/7b.modelfile");
const QWEN3_06B: &str = include_str!("../library/qwen3/0.6b.modelfile");
const QWEN3_17B: &str = include_str!("../library/qwen3/1.7b.modelfile");
const QWEN3_4B: &str = include_str!("../library/qwen3/4b.modelfile");
const QWEN3_8B: &str = include_str!("../library/qwen3/8b.modelfile");
const QWEN3_14B: &str = include_str!("../library/qwen3/14b.modelfile");
const QWEN3_32B: &str = include_str!("../library/qwen3/32b.modelfile");
const QWEN3_30B_A3B: &str = include_str!("../library/qwen3/30b-a3b.modelfile");
const QWEN3_EMBEDDING_06B: &str = include_str!("../library/qwen3-embedding/0.6b.modelfile");
const GEMMA3_1B: &str = include_str!("../library/gemma3/1b.modelfile");
const GEMMA3_4B: &str = include_str!("../library/gemma3/4b.modelfile");
const GEMMA3_12B: &str = include_str!("../library/gemma3/12b.modelfile");
const GEMMA3_27B: &str = include_str!("../library/gemma3/27b.modelfile");
const GPT_OSS_20B: &str = include_str!("../library/gpt-oss/20b.modelfile");
const GPT_OSS_120B: &str = include_str!("../library/gpt-oss/120b.modelfile");
const DEEPSEEK_V4_FLASH_LATEST: &str =
    include_str!("../library/deepseek-v4-flash/latest.modelfile");
const DEEPSEEK_V4_PRO_LATEST: &str = include_str!("../library/deepseek-v4-pro/latest.modelfile");
const LLAMA31_8B: &str = include_str!("../library/llama3.1/8b.modelfile");
const LLAMA32_1B: &str = include_str!("../library/llama3.2/1b.modelfile");
const LLAMA32_3B: &str = include_str!("../library/llama3.2/3b.modelfile");
const LLAMA33_70B: &str = include_str!("../library/llama3.3/70b.modelfile");
const NOMIC_EMBED_TEXT_V15: &str = include_str!("../library/nomic-embed-text/v1.5.modelfile");
const ALL_MINILM_22M: &str = include_str!("../library/all-minilm/22m.modelfile");

/// Every name. Two tags of one model share a file.
static ENTRIES: [Entry; 40] = [
    Entry { model: "smollm2", tag: "latest", text: SMOLLM2_135M },
    Entry { model: "smollm2", tag: "135m", text: SMOLLM2_135M },
    Entry { model: "gemma3", tag: "270m", text: GEMMA3_270M },
    Entry { model: "qwen2.5-coder", tag: "0.5b", text: QWEN25_CODER_05B },
    Entry { model: "smollm2", tag: "360m", text: SMOLLM2_360M },
    Entry { model: "smollm2", tag: "1.7b", text: SMOLLM2_17B },
    Entry { model: "qwen2.5-coder", tag: "1.5b", text: QWEN25_CODER_15B },
    Entry { model: "qwen2.5-coder", tag: "7b", text: QWEN25_CODER_7B },
    Entry { model: "qwen2.5-coder", tag: "latest", text: QWEN25_CODER_7B },
    Entry { model: "qwen3", tag: "0.6b", text: QWEN3_06B },
    Entry { model: "qwen3", tag: "1.7b", text: QWEN3_17B },
    Entry { model: "qwen3", tag: "4b", text: QWEN3_4B },
    Entry { model: "qwen3", tag: "8b", text: QWEN3_8B },
    Entry { model: "qwen3", tag: "latest", text: QWEN3_8B },
    Entry { model: "qwen3", tag: "14b", text: QWEN3_14B },
    Entry { model: "qwen3", tag: "32b", text: QWEN3_32B },
    Entry { model: "qwen3", tag: "30b-a3b", text: QWEN3_30B_A3B },
    Entry { model: "qwen3-embedding", tag: "0.6b", text: QWEN3_EMBEDDING_06B },
    Entry { model: "qwen3-embedding", tag: "latest", text: QWEN3_EMBEDDING_06B },
    Entry { model: "gemma3", tag: "1b", text: GEMMA3_1B },
    Entry { model: "gemma3", tag: "4b", text: GEMMA3_4B },
    Entry { model: "gemma3", tag: "latest", text: GEMMA3_4B },
    Entry { model: "gemma3", tag: "12b", text: GEMMA3_12B },
    Entry { model: "gemma3", tag: "27b", text: GEMMA3_27B },
    Entry { model: "gpt-oss", tag: "20b", text: GPT_OSS_20B },
    Entry { model: "gpt-oss", tag: "latest", text: GPT_OSS_20B },
    Entry { model: "gpt-oss", tag: "120b", text: GPT_OSS_120B },
    Entry { model: "deepseek-v4-flash", tag: "latest", text: DEEPSEEK_V4_FLASH_LATEST },
    Entry { model: "deepseek-v4-pro", tag: "latest", text: DEEPSEEK_V4_PRO_LATEST },
    Entry { model: "llama3.1", tag: "8b", text: LLAMA31_8B },
    Entry { model: "llama3.1", tag: "latest", text: LLAMA31_8B },
    Entry { model: "llama3.2", tag: "1b", text: LLAMA32_1B },
    Entry { model: "llama3.2", tag: "3b", text: LLAMA32_3B },
    Entry { model: "llama3.2", tag: "latest", text: LLAMA32_3B },
    Entry { model: "llama3.3", tag: "70b", text: LLAMA33_70B },
    Entry { model: "llama3.3", tag: "latest", text: LLAMA33_70B },
    Entry { model: "nomic-embed-text", tag: "v1.5", text: NOMIC_EMBED_TEXT_V15 },
    Entry { model: "nomic-embed-text", tag: "latest", text: NOMIC_EMBED_TEXT_V15 },
    Entry { model: "all-minilm", tag: "latest", text: ALL_MINILM_22M },
    Entry { model: "all-minilm", tag: "22m", text: ALL_MINILM_22M },
];

/// The entry of a model and tag. Letter case does not count.
pub fn find(model: &str, tag: &str) -> Option<&'static Entry> {
    let matches = |entry: &&Entry| {
        entry.model.eq_ignore_ascii_case(model) && entry.tag.eq_ignore_ascii_case(tag)
    };
    ENTRIES.iter().find(matches)
}

/// Every entry.
pub fn all() -> &'static [Entry] {
    &ENTRIES
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its files with digest, size and source; or a repository, and that its digest could not be
    /// checked. And a licence in any case.
    #[test]
    fn every_entry_says_its_licence_and_whether_its_digest_was_checked() {
        for entry in all() {
            let (name, modelfile) = (entry.name(), entry.modelfile());
            let files = modelfile.files();
            assert!(!files.is_empty(), "{name}");
            for file in &files {
                assert_eq!(file.digest.is_some(), entry.is_checked(), "{name}");
                assert_eq!(file.size.is_some(), entry.is_checked(), "{name}");
                assert_eq!(file.sources.is_empty(), !entry.is_checked(), "{name}");
            }
            let says_so = entry.text.contains("# Its digest could not be checked here");
            assert_eq!(says_so, !entry.is_checked(), "{name}");
            if !entry.is_checked() {
                assert_eq!(files.len(), 1, "{name}");
                assert!(files[0].from.starts_with("hf:"), "{name}: {}", files[0].from);
            }
            let licence = modelfile.licenses().next().expect("a licence");
            assert!(licence.contains("https://"), "{name} says where its licence stands");
            assert_eq!(Modelfile::parse(&modelfile.to_string()).as_ref(), Ok(&modelfile));
            assert_eq!(find(entry.model, entry.tag), Some(entry));
        }
        assert_eq!(find("SmolLM2", "LATEST").map(Entry::name).as_deref(), Some("smollm2"));
        assert_eq!(find("smollm2", "70b"), None);
    }

    #[test]
    fn no_two_entries_have_one_name_and_every_file_is_one() {
        let names: Vec<String> = all().iter().map(Entry::name).collect();
        for (i, name) in names.iter().enumerate() {
            assert!(!names[..i].contains(name), "{name} stands twice");
        }
        for wanted in [
            "smollm2",
            "qwen2.5-coder:0.5b",
            "qwen3:0.6b",
            "qwen3:8b",
            "qwen3:30b-a3b",
            "gemma3:270m",
            "gemma3",
            "gpt-oss:20b",
            "gpt-oss:120b",
            "deepseek-v4-flash",
            "deepseek-v4-pro",
            "llama3.1",
            "llama3.2:1b",
            "llama3.3",
            "all-minilm",
        ] {
            assert!(names.iter().any(|name| name == wanted), "{wanted}");
        }
    }
}
