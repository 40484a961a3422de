//! [`ModelName`] and [`Digest`]: parsed once at the edge, cannot be wrong after.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::limits;

/// The host that a name without one belongs to. Part of the on-disk tree that v4 shares with
/// Ollama.
pub const DEFAULT_HOST: &str = "registry.ollama.ai";
/// The namespace that a name without one belongs to.
pub const DEFAULT_NAMESPACE: &str = "library";
/// The tag that a name without one means.
pub const DEFAULT_TAG: &str = "latest";

/// Why a text is not a model name or a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text is empty.
    #[error("a model name is missing; write it as model[:tag], for example smollm2")]
    Empty,
    /// The text is longer than any name can be.
    #[error("the model name has {0} characters; at most {max} are allowed", max = limits::NAME_CHARS)]
    TooLong(usize),
    /// One part breaks the grammar.
    #[error(
        "the model name's {part} {text:?} is not valid; a name is [host/][namespace/]model[:tag], of letters, digits, \
         '-', '_' and '.', each part starting with a letter, a digit or '_'"
    )]
    Part {
        /// Which part: host, namespace, model or tag.
        part: &'static str,
        /// The offending text, cut to 80 characters.
        text: String,
    },
    /// Not `sha256:` and 64 hexadecimal digits.
    #[error("not a digest; write it as sha256: and 64 hexadecimal digits")]
    Digest,
}

/// A model's full name: `host/namespace/model:tag`.
///
/// The grammar is Ollama's (its manifests tree holds a file for each name), so no part can be
/// empty, start with a dot or hold a path separator: [`ModelName::path`] always stays inside its
/// root.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelName {
    host: String,
    namespace: String,
    model: String,
    tag: String,
}

impl ModelName {
    /// The registry's host, with a port where one was given.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The namespace, `library` by default.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The model's own name.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The tag, `latest` by default.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// The four parts as path segments below `manifests/`.
    pub fn path(&self) -> [&str; 4] {
        [&self.host, &self.namespace, &self.model, &self.tag]
    }

    /// The name from the four path segments of a manifest file.
    ///
    /// # Errors
    /// [`NameError::Part`] when a segment breaks the grammar.
    pub fn from_path(parts: [&str; 4]) -> Result<Self, NameError> {
        let [host, namespace, model, tag] = parts;
        check("host", host, 350, ".-_:")?;
        check("namespace", namespace, 80, "-_")?;
        check("model", model, 80, ".-_")?;
        check("tag", tag, 80, ".-_")?;
        Ok(Self {
            host: host.to_owned(),
            namespace: namespace.to_owned(),
            model: model.to_owned(),
            tag: tag.to_owned(),
        })
    }

    /// Whether this is a name of the shipped library: default host and namespace.
    pub fn is_library(&self) -> bool {
        self.host == DEFAULT_HOST && self.namespace == DEFAULT_NAMESPACE
    }

    /// Equality as look-ups mean it: letter case does not count.
    pub fn matches(&self, other: &Self) -> bool {
        self.path().iter().zip(other.path()).all(|(a, b)| a.eq_ignore_ascii_case(b))
    }
}

impl fmt::Display for ModelName {
    /// The shortest form: default host and namespace hidden, the tag always shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host != DEFAULT_HOST {
            write!(f, "{}/{}/", self.host, self.namespace)?;
        } else if self.namespace != DEFAULT_NAMESPACE {
            write!(f, "{}/", self.namespace)?;
        }
        write!(f, "{}:{}", self.model, self.tag)
    }
}

impl FromStr for ModelName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let n_chars = text.chars().count();
        if n_chars > limits::NAME_CHARS {
            return Err(NameError::TooLong(n_chars));
        }
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        let (path, tag) = match text.rsplit_once(':') {
            // A colon before a slash belongs to a port.
            Some((path, tag)) if !tag.contains('/') => (path, tag),
            _ => (text, DEFAULT_TAG),
        };
        let mut parts = path.rsplitn(3, '/');
        let model = parts.next().unwrap_or_default();
        let namespace = parts.next().unwrap_or(DEFAULT_NAMESPACE);
        let host = parts.next().unwrap_or(DEFAULT_HOST);
        Self::from_path([host, namespace, model, tag])
    }
}

impl Serialize for ModelName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ModelName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A name as it may be pulled: also `hf:USER/REPOSITORY[@REVISION][:FILE-OR-QUANT]`, which is the
/// name `hf.co/USER/REPOSITORY:FILE-OR-QUANT` of one revision, and with `https://` in front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The name.
    pub name: ModelName,
    /// The branch, tag or commit, where one is said.
    pub revision: Option<String>,
}

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let Some(rest) = text.strip_prefix("hf:") else {
            let plain = text.strip_prefix("https://").unwrap_or(text);
            return Ok(Self { name: plain.parse()?, revision: None });
        };
        let (repository, pick) = rest.split_once(':').unwrap_or((rest, DEFAULT_TAG));
        let (repository, revision) = match repository.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (repository, None),
        };
        let is_revision = |text: &str| {
            let is_valid = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
            !text.is_empty() && text.chars().all(is_valid) && !text.contains("..")
        };
        if let Some(text) = revision.filter(|text| !is_revision(text)) {
            return Err(NameError::Part {
                part: "revision",
                text: text.chars().take(80).collect(),
            });
        }
        let name = format!("hf.co/{repository}:{pick}").parse()?;
        Ok(Self { name, revision: revision.map(str::to_owned) })
    }
}

/// One part of a name: 1 to `max` characters, the first a letter, digit or `_`, the rest also of
/// `extra`.
fn check(part: &'static str, text: &str, max: usize, extra: &str) -> Result<(), NameError> {
    let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let is_valid = |c: char| c.is_ascii_alphanumeric() || c == '_' || extra.contains(c);
    if starts_well && text.len() <= max && text.chars().all(is_valid) {
        Ok(())
    } else {
        Err(NameError::Part { part, text: text.chars().take(80).collect() })
    }
}

/// A SHA-256 digest: the identity of a blob.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest whose bytes are `bytes`.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// 64 lower-case hexadecimal digits.
    pub fn hex(&self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("writing to a String cannot fail");
            hex
        })
    }

    /// The first 12 hexadecimal digits, as people see a digest.
    pub fn short(&self) -> String {
        let mut hex = self.hex();
        hex.truncate(12);
        hex
    }

    /// The digest of 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`NameError::Digest`] for anything else.
    pub fn from_hex(hex: &str) -> Result<Self, NameError> {
        let mut bytes = [0; 32];
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(NameError::Digest);
        }
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| NameError::Digest)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| NameError::Digest)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.short())
    }
}

impl FromStr for Digest {
    type Err = NameError;

    /// Takes `sha256:<hex>` (manifests, the API) and `sha256-<hex>` (file names).
    fn from_str(text: &str) -> Result<Self, NameError> {
        let hex = text.strip_prefix("sha256:").or_else(|| text.strip_prefix("sha256-"));
        Self::from_hex(hex.ok_or(NameError::Digest)?)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_get_the_defaults() {
        let table = [
            ("smollm2", "registry.ollama.ai/library/smollm2/latest", "smollm2:latest"),
            ("gemma3:270m", "registry.ollama.ai/library/gemma3/270m", "gemma3:270m"),
            ("me/mine", "registry.ollama.ai/me/mine/latest", "me/mine:latest"),
            (
                "localhost:5000/me/mine",
                "localhost:5000/me/mine/latest",
                "localhost:5000/me/mine:latest",
            ),
            ("hf.co/a/b-GGUF:Q4_K_M", "hf.co/a/b-GGUF/Q4_K_M", "hf.co/a/b-GGUF:Q4_K_M"),
        ];
        for (text, path, shown) in table {
            let name: ModelName = text.parse().expect(text);
            assert_eq!(name.path().join("/"), path, "{text}");
            assert_eq!(name.to_string(), shown, "{text}");
            assert_eq!(name.to_string().parse::<ModelName>().as_ref(), Ok(&name), "{text}");
        }
    }

    #[test]
    fn a_repository_of_hugging_face_is_a_name_too() {
        for (text, name, revision) in [
            ("hf:me/x-GGUF", "hf.co/me/x-GGUF:latest", None),
            ("hf:me/x-GGUF:Q4_K_M", "hf.co/me/x-GGUF:Q4_K_M", None),
            ("hf:me/x@v1.0:x.gguf", "hf.co/me/x:x.gguf", Some("v1.0")),
            ("hf:me/x@refs/pr/1", "hf.co/me/x:latest", Some("refs/pr/1")),
            ("https://ghcr.io/a/b:c", "ghcr.io/a/b:c", None),
            ("smollm2", "smollm2:latest", None),
        ] {
            let found: Reference = text.parse().expect(text);
            assert_eq!(
                (found.name.to_string().as_str(), found.revision.as_deref()),
                (name, revision)
            );
        }
        for text in ["hf:", "hf:x@", "hf:a/b@../c", "hf:a/b@x y", "hf:../b", "hf:a/b:c/d"] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn names_that_could_leave_the_tree_are_refused() {
        let long = "a".repeat(10_000);
        let bad = [
            "",
            "..",
            "../x",
            "a/../b",
            "a b",
            "a/b/c/d/e",
            ".hidden",
            "-x",
            "a:",
            ":a",
            "a//b",
            "a\\b",
            "a\0",
            "ä",
            "/etc/passwd",
            "a:../b",
            "a/.",
            "x:..",
            long.as_str(),
        ];
        for text in bad {
            assert!(text.parse::<ModelName>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn digests_read_both_spellings() {
        let hex = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
        let digest: Digest = format!("sha256:{hex}").parse().expect("a digest");
        assert_eq!(format!("sha256-{hex}").parse(), Ok(digest));
        assert_eq!(digest.hex(), hex);
        assert_eq!(digest.short(), "b179c9523d0e");
        for bad in
            ["", "sha256:", hex, "sha256:zz", &format!("sha256:{hex}0"), &format!("md5:{hex}")]
        {
            assert_eq!(bad.parse::<Digest>(), Err(NameError::Digest), "{bad}");
        }
    }
}
