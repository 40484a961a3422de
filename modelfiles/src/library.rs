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

/// Every name. Two tags of one model share a file.
static ENTRIES: [Entry; 4] = [
    Entry { model: "smollm2", tag: "latest", text: SMOLLM2_135M },
    Entry { model: "smollm2", tag: "135m", text: SMOLLM2_135M },
    Entry { model: "gemma3", tag: "270m", text: GEMMA3_270M },
    Entry { model: "qwen2.5-coder", tag: "0.5b", text: QWEN25_CODER_05B },
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

    #[test]
    fn every_entry_can_be_pulled_and_says_its_licence() {
        for entry in all() {
            let modelfile = entry.modelfile();
            let files = modelfile.files();
            assert_eq!(files.len(), 1, "{}", entry.name());
            for file in files {
                assert!(file.digest.is_some() && file.size.is_some(), "{}", entry.name());
                assert!(!file.sources.is_empty(), "{}", entry.name());
            }
            assert!(modelfile.licenses().next().is_some(), "{}", entry.name());
            assert_eq!(Modelfile::parse(&modelfile.to_string()).as_ref(), Ok(&modelfile));
            assert_eq!(find(entry.model, entry.tag), Some(entry));
        }
        assert_eq!(find("SmolLM2", "LATEST").map(Entry::name).as_deref(), Some("smollm2"));
        assert_eq!(find("smollm2", "70b"), None);
    }
}
