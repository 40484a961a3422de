//! Signatures of models in registries, in the format of cosign, and the policy that asks for them.
//!
//! A policy is a text file. A line says for which names it is, what is wanted, and the files of the
//! public keys, PEM, beside the policy or by their whole path:
//!
//! ```text
//! # names                mode     keys
//! ghcr.io/me/*           require  me.pem team.pem
//! registry.ollama.ai/*   warn     ollama.pem
//! *                      off
//! ```
//!
//! The first line that fits a name counts; `*` is any text; where none fits, nothing is asked. A
//! signature is looked for in the same repository, under the tag `sha256-<digest>.sig`: layers
//! whose bytes name the digest of the manifest and whose annotation signs these bytes with ECDSA
//! over P-256 and SHA-256.

use std::path::{Path, PathBuf};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use serde_json::Value;
use v4_proto::{Digest, ModelName};
use v4_store::{
    Layer,
    fs::{self, RealFs},
};

use crate::{error::PullError, limits};

/// The media type of what is signed.
const PAYLOAD_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// Where a layer says its signature.
const ANNOTATION: &str = "dev.cosignproject.cosign/signature";
/// What a P-256 key in DER begins with (RFC 5480); the point follows.
const SPKI: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// What is wanted of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Nothing.
    Off,
    /// A word in the log where no signature is right.
    Warn,
    /// A right signature, or the name is not pulled.
    Require,
}

/// A line of a policy.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    names: String,
    pub mode: Mode,
    /// The files of the keys.
    keys: Vec<PathBuf>,
}

/// A public key: the point, and where it was found.
pub(crate) struct Key {
    point: Vec<u8>,
    file: PathBuf,
}

/// A policy file that cannot be used. Then nothing is pulled that it might be about.
fn unusable(path: &Path, what: impl Into<String>) -> PullError {
    PullError::Policy { path: path.display().to_string(), what: what.into() }
}

/// The rule of a policy file for a name; `None` where none fits or there is no file.
///
/// # Errors
/// [`PullError::Policy`].
pub(crate) fn rule(policy: Option<&Path>, name: &ModelName) -> Result<Option<Rule>, PullError> {
    let Some(path) = policy else { return Ok(None) };
    let bytes = fs::read(&RealFs, path, limits::POLICY_BYTES)
        .map_err(|error| unusable(path, format!("cannot be read: {error}")))?;
    let text = String::from_utf8(bytes).map_err(|_| unusable(path, "is not UTF-8"))?;
    let name = format!("{}/{}/{}", name.host(), name.namespace(), name.model());
    let mut found = None;
    // All lines are read, so that a mistake in one never lets a name through.
    for (i, line) in text.lines().enumerate() {
        let wrong = |what: &str| unusable(path, format!("line {}: {what}", i + 1));
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let Some(names) = words.next() else { continue };
        let mode = match words.next() {
            Some("off") => Mode::Off,
            Some("warn") => Mode::Warn,
            Some("require") => Mode::Require,
            _ => return Err(wrong("behind the names must stand off, warn or require")),
        };
        let folder = path.parent().unwrap_or(path);
        let keys: Vec<PathBuf> = words.map(|word| folder.join(word)).collect();
        if keys.is_empty() && mode != Mode::Off {
            return Err(wrong("behind the mode must stand the files of public keys"));
        }
        if found.is_none() && matches(names, &name) {
            found = Some(Rule { names: names.to_owned(), mode, keys });
        }
    }
    Ok(found)
}

/// Whether a text fits a pattern in which `*` stands for any text.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern.eq_ignore_ascii_case(text);
    };
    let Some(after) = text.get(..start.len()).filter(|head| head.eq_ignore_ascii_case(start))
    else {
        return false;
    };
    let after = &text[after.len()..];
    after
        .char_indices()
        .map(|(at, _)| at)
        .chain([after.len()])
        .any(|at| matches(rest, &after[at..]))
}

impl Rule {
    /// The public keys of the rule.
    ///
    /// # Errors
    /// [`PullError::Policy`] for a file that is none.
    pub fn keys(&self) -> Result<Vec<Key>, PullError> {
        self.keys.iter().map(|file| key(file)).collect()
    }
}

fn key(file: &Path) -> Result<Key, PullError> {
    let bytes = fs::read(&RealFs, file, limits::POLICY_BYTES)
        .map_err(|error| unusable(file, format!("cannot be read: {error}")))?;
    let text = String::from_utf8(bytes).unwrap_or_default();
    let body = text
        .split_once("-----BEGIN PUBLIC KEY-----")
        .and_then(|(_, rest)| rest.split_once("-----END PUBLIC KEY-----"));
    let base64: String =
        body.map(|(body, _)| body.split_whitespace().collect()).unwrap_or_default();
    let der = BASE64_STANDARD.decode(base64).unwrap_or_default();
    let point = der.strip_prefix(&SPKI).filter(|point| point.len() == 65);
    let point =
        point.ok_or_else(|| unusable(file, "is no public key of ECDSA over P-256 in PEM"))?;
    Ok(Key { point: point.to_vec(), file: file.to_path_buf() })
}

/// The tag under which the signatures of a manifest lie.
pub(crate) fn tag(manifest: &Digest) -> String {
    format!("sha256-{}.sig", manifest.hex())
}

/// The layers of a signature manifest that may be signatures, with what they sign with.
pub(crate) fn candidates(layers: &[Layer]) -> impl Iterator<Item = (&Layer, Vec<u8>)> {
    let signature = |layer: &Layer| {
        let text = layer.extra.get("annotations")?.get(ANNOTATION)?.as_str()?;
        BASE64_STANDARD.decode(text).ok()
    };
    let is_payload = |layer: &&Layer| {
        layer.media_type == PAYLOAD_TYPE && layer.size <= limits::PAYLOAD_BYTES as u64
    };
    let layers = layers.iter().filter(is_payload).take(limits::SIGNATURES);
    layers.filter_map(move |layer| Some((layer, signature(layer)?)))
}

/// Which key signed a payload about this manifest, or why none counts.
pub(crate) fn check(
    payload: &[u8],
    signature: &[u8],
    manifest: &Digest,
    keys: &[Key],
) -> Result<PathBuf, String> {
    let signed = keys.iter().find(|key| {
        let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &key.point);
        public.verify(payload, signature).is_ok()
    });
    let key = signed.ok_or("a signature that none of the keys made")?;
    let said: Value = serde_json::from_slice(payload).unwrap_or_default();
    let critical = &said["critical"];
    if critical["type"] != "cosign container image signature" {
        return Err("a signature of something else than a manifest".to_owned());
    }
    if critical["image"]["docker-manifest-digest"] != manifest.to_string() {
        return Err("a signature of another manifest".to_owned());
    }
    Ok(key.file.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_a_person_reads_them() {
        for (pattern, text, fits) in [
            ("*", "ghcr.io/me/x", true),
            ("ghcr.io/me/*", "ghcr.io/me/x", true),
            ("GHCR.io/me/*", "ghcr.io/Me/x", true),
            ("ghcr.io/me/*", "ghcr.io/mean/x", false),
            ("ghcr.io/*/x", "ghcr.io/me/x", true),
            ("*/x", "ghcr.io/me/x", true),
            ("*/x", "ghcr.io/me/xy", false),
            ("ghcr.io/me/x", "ghcr.io/me/x", true),
            ("ghcr.io/me/x", "ghcr.io/me/x/y", false),
            ("g*o/*e/*", "ghcr.io/me/", true),
        ] {
            assert_eq!(matches(pattern, text), fits, "{pattern} {text}");
        }
    }
}
