//! The key that a user of Ollama has: who pushes to its registry signs the request for a token with
//! it. The file is an OpenSSH private key, Ed25519, without a passphrase.

use std::{path::Path, time::SystemTime};

use base64::{Engine as _, prelude::BASE64_STANDARD, prelude::BASE64_URL_SAFE_NO_PAD};
use reqwest::{Url, header::HeaderValue};
use ring::{
    rand::{SecureRandom as _, SystemRandom},
    signature::Ed25519KeyPair,
};
use v4_store::{
    fs::{self, RealFs},
    sha256,
};

use crate::limits;

/// What an OpenSSH key begins with.
const MAGIC: &[u8] = b"openssh-key-v1\0";
/// The kind of key.
const KIND: &[u8] = b"ssh-ed25519";

/// A key, opened.
pub(crate) struct OllamaKey {
    pair: Ed25519KeyPair,
    /// The public key as SSH writes it.
    public: Vec<u8>,
}

impl OllamaKey {
    /// Reads a file; `None` where there is none, or it is no such key.
    pub fn open(path: &Path) -> Option<Self> {
        let bytes = fs::read(&RealFs, path, limits::KEY_BYTES).ok()?;
        let key = Self::parse(std::str::from_utf8(&bytes).ok()?);
        if key.is_none() {
            let path = path.display();
            tracing::warn!(%path, "no Ed25519 key of OpenSSH without a passphrase");
        }
        key
    }

    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once("-----BEGIN OPENSSH PRIVATE KEY-----")?;
        let (body, _) = rest.split_once("-----END OPENSSH PRIVATE KEY-----")?;
        let body: String = body.split_whitespace().collect();
        let bytes = BASE64_STANDARD.decode(body).ok()?;
        let mut rest = bytes.strip_prefix(MAGIC)?;
        let (cipher, derivation, _) = (string(&mut rest)?, string(&mut rest)?, string(&mut rest)?);
        if cipher != b"none" || derivation != b"none" || number(&mut rest)? != 1 {
            return None;
        }
        let public = string(&mut rest)?;
        let mut private = string(&mut rest)?;
        if number(&mut private)? != number(&mut private)? || string(&mut private)? != KIND {
            return None;
        }
        let point = string(&mut private)?;
        let seed = string(&mut private)?.get(..32)?;
        let pair = Ed25519KeyPair::from_seed_and_public_key(seed, point).ok()?;
        Some(Self { pair, public: public.to_vec() })
    }

    /// Adds to a token server's URL what makes it one of a kind, and signs it. Gives the value of
    /// the `Authorization` field.
    pub fn sign(&self, url: &mut Url) -> Option<HeaderValue> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let mut nonce = [0; 16];
        SystemRandom::new().fill(&mut nonce).ok()?;
        url.query_pairs_mut()
            .append_pair("ts", &since.as_secs().to_string())
            .append_pair("nonce", &BASE64_URL_SAFE_NO_PAD.encode(nonce));
        let nothing = BASE64_STANDARD.encode(sha256(b"").hex());
        let signature = self.pair.sign(format!("GET,{url},{nothing}").as_bytes());
        let [public, signature] =
            [&self.public[..], signature.as_ref()].map(|bytes| BASE64_STANDARD.encode(bytes));
        let mut value = HeaderValue::try_from(format!("{public}:{signature}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

/// The next number of SSH's wire format.
fn number(rest: &mut &[u8]) -> Option<u32> {
    let (number, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(u32::from_be_bytes(*number))
}

/// The next string of SSH's wire format.
fn string<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::try_from(number(rest)?).ok()?;
    let (string, after) = rest.split_at_checked(len)?;
    *rest = after;
    Some(string)
}

#[cfg(test)]
mod tests {
    use ring::signature::{ED25519, KeyPair as _, UnparsedPublicKey};

    use super::*;

    /// A key file as OpenSSH writes it (PROTOCOL.key), and the public key in SSH's wire format.
    fn openssh(seed: &[u8; 32]) -> (String, Vec<u8>) {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).expect("any seed will do");
        let point = pair.public_key().as_ref();
        let string = |bytes: &[u8]| {
            let len = u32::try_from(bytes.len()).expect("short").to_be_bytes();
            [&len[..], bytes].concat()
        };
        let public = [string(KIND), string(point)].concat();
        let secret = string(&[&seed[..], point].concat());
        let check = [7, 7, 7, 7, 7, 7, 7, 7];
        let comment = string(b"made for a test");
        let private = [&check[..], &public, &secret, &comment, &[1, 2, 3]].concat();
        let none = [string(b"none"), string(b"none"), string(b"")].concat();
        let bytes = [MAGIC, &none, &[0, 0, 0, 1], &string(&public), &string(&private)].concat();
        let text = BASE64_STANDARD.encode(bytes);
        let begin = "-----BEGIN OPENSSH PRIVATE KEY-----";
        let end = "-----END OPENSSH PRIVATE KEY-----";
        let (first, second) = text.split_at(70);
        (format!("{begin}\n{first}\n{second}\n{end}\n"), public)
    }

    #[test]
    fn a_key_of_openssh_is_read_and_signs() {
        let (text, public) = openssh(&[9; 32]);
        let key = OllamaKey::parse(&text).expect("a key");
        let mut url = Url::parse("https://host/token?scope=x").expect("a URL");
        let value = key.sign(&mut url).expect("signed");
        let (said, signature) = value.to_str().expect("text").split_once(':').expect("two parts");
        assert_eq!(said, BASE64_STANDARD.encode(&public));
        assert!(url.as_str().contains("&ts=") && url.as_str().contains("&nonce="), "{url}");
        // The sha256 of nothing, as hex, as base64.
        let nothing = "ZTNiMGM0NDI5OGZjMWMxNDlhZmJmNGM4OTk2ZmI5MjQyN2FlNDFlNDY0OWI5MzRjYTQ5NTk5\
                       MWI3ODUyYjg1NQ==";
        let text = format!("GET,{url},{nothing}");
        let signature = BASE64_STANDARD.decode(signature).expect("base64");
        let point = &public[public.len() - 32..];
        UnparsedPublicKey::new(&ED25519, point).verify(text.as_bytes(), &signature).expect("right");
    }

    #[test]
    fn a_key_of_the_real_tool_is_read() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let file = folder.path().join("id_ed25519");
        let mut tool = std::process::Command::new("ssh-keygen");
        let made = tool.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&file).status();
        if !made.is_ok_and(|status| status.success()) {
            // Where there is no OpenSSH, the file of the other test stands for it.
            return;
        }
        let key = OllamaKey::open(&file).expect("a key");
        let public = fs::read(&RealFs, &file.with_extension("pub"), 4096).expect("its public half");
        let public = String::from_utf8(public).expect("text");
        assert_eq!(public.split(' ').nth(1), Some(&*BASE64_STANDARD.encode(&key.public)));
    }

    #[test]
    fn what_is_no_such_key_is_none() {
        let (text, _) = openssh(&[9; 32]);
        assert!(OllamaKey::parse("").is_none());
        assert!(
            OllamaKey::parse(&text.replace("b3BlbnNzaC1rZXktdjE", "b3BlbnNzaC1rZXktdjI")).is_none()
        );
        for cut in [40, 80, 120, 200, 300] {
            let cut = format!("{}\n-----END OPENSSH PRIVATE KEY-----\n", &text[..cut]);
            assert!(OllamaKey::parse(&cut).is_none(), "{cut}");
        }
    }
}
