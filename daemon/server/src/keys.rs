//! Keys: who may do what over TCP. The unix socket is its owner's and needs none.
//!
//! The file has a line a key: its name, its scope, the SHA-256 of the key, and the day it was made.
//! The key itself is told once, when it is made, and kept nowhere: with its 192 random bits its
//! digest leaks nothing.

use std::{
    fmt::{self, Write as _},
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{HeaderMap, header};
use jiff::Timestamp;
use serde::Serialize;
use v4_proto::{Code, Digest, Fault};
use v4_store::fs::{self, Fs as _, RealFs};

use crate::{error::Error, limits};

/// What a request must be allowed to do. Every route says it; each scope has those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Nothing: everybody may.
    Open,
    /// To see which models are here and to fetch them.
    Read,
    /// To have models answer.
    Use,
    /// To change what is here.
    Admin,
    /// To decide who may call. Never without a key over TCP, also where nothing else wants one.
    Owner,
}

/// What clients call a scope that a key can have.
const WORDS: [(&str, Scope); 3] =
    [("read", Scope::Read), ("use", Scope::Use), ("admin", Scope::Admin)];

impl FromStr for Scope {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self, Fault> {
        let found = WORDS.iter().find(|(word, _)| *word == text);
        found
            .map(|(_, scope)| *scope)
            .ok_or_else(|| Fault::invalid(format!("{text:?} is no scope; say read, use or admin")))
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = WORDS.iter().find(|(_, scope)| scope == self);
        f.write_str(found.map_or("admin", |(word, _)| word))
    }
}

/// What is known of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// What its owner calls it.
    pub name: String,
    /// What it opens.
    pub scope: Scope,
    /// When it was made, as the file says it.
    pub made: String,
    /// The digest of its text.
    digest: Digest,
}

impl Key {
    /// Whether `digest` is that of this key, in a time that says nothing of where they differ.
    fn is(&self, digest: &Digest) -> bool {
        let pairs = self.digest.as_bytes().iter().zip(digest.as_bytes());
        let differs = pairs.fold(0, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
        differs == 0
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (name, scope, digest) = (words.next()?, words.next()?, words.next()?);
        let made = words.next().unwrap_or_default().to_owned();
        if !is_name(name) || words.next().is_some() {
            return None;
        }
        let (scope, digest) = (scope.parse().ok()?, digest.parse().ok()?);
        Some(Self { name: name.to_owned(), scope, made, digest })
    }
}

fn is_name(text: &str) -> bool {
    let is_fit = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && text.len() <= limits::KEY_NAME_CHARS && text.chars().all(is_fit)
}

/// The keys of a daemon.
#[derive(Debug)]
pub struct Keys {
    /// Their file; `None` wants no keys at all.
    path: Option<PathBuf>,
    /// Whether TCP is for keys alone also while there is none: who listens to the network must
    /// have said whom it is open to.
    is_closed: bool,
    state: Mutex<State>,
    /// Held while the file is changed, so that two changes at a time are both there in the end.
    change: Mutex<()>,
}

#[derive(Debug)]
struct State {
    keys: Arc<[Key]>,
    stamp: Stamp,
    looked: Instant,
}

/// What shows that a file changed: its length, and when it last did.
type Stamp = Option<(u64, SystemTime)>;

impl Keys {
    /// No keys are wanted.
    pub fn off() -> Self {
        let state = State { keys: Arc::new([]), stamp: None, looked: Instant::now() };
        Self { path: None, is_closed: false, state: Mutex::new(state), change: Mutex::default() }
    }

    /// The keys in a file, which need not be there. `is_closed` wants one over TCP in any case.
    ///
    /// # Errors
    /// [`Error::Keys`] when it cannot be read or has a line that is no key.
    pub fn open(path: Option<&Path>, is_closed: bool) -> Result<Self, Error> {
        let Some(path) = path else { return Ok(Self::off()) };
        let (keys, stamp) =
            read(path).map_err(|what| Error::Keys { path: path.to_owned(), what })?;
        let state = State { keys, stamp, looked: Instant::now() };
        Ok(Self {
            path: Some(path.to_owned()),
            is_closed,
            state: Mutex::new(state),
            change: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All keys, after a look at whether the file changed, which blocks.
    pub fn list(&self) -> Arc<[Key]> {
        self.look_again();
        Arc::clone(&self.state().keys)
    }

    /// Whether nobody may call over TCP, since a key is wanted and there is none.
    pub fn shuts_out(&self) -> bool {
        self.is_closed && self.state().keys.is_empty()
    }

    /// Whether it is time to look at the file again.
    fn is_due(&self) -> bool {
        let mut state = self.state();
        let is_due = self.path.is_some() && state.looked.elapsed() >= limits::KEYS_LOOK;
        if is_due {
            state.looked = Instant::now();
        }
        is_due
    }

    /// Reads the file again if it changed. One that cannot be read, or has a line that is no key,
    /// changes nothing.
    fn look_again(&self) {
        let Some(path) = &self.path else { return };
        if stamp(path).is_ok_and(|stamp| stamp == self.state().stamp) {
            return;
        }
        match read(path) {
            Ok((keys, stamp)) => {
                tracing::info!(n_keys = keys.len(), "the keys were read again");
                let mut state = self.state();
                (state.keys, state.stamp) = (keys, stamp);
            }
            Err(what) => tracing::error!(path = %path.display(), what, "the keys stay as they are"),
        }
    }

    /// Makes a key and gives its text, which is told to nobody else. Blocks.
    ///
    /// # Errors
    /// `invalid` for a name that is none or taken, or when no keys are wanted; `disk`.
    pub fn add(&self, name: &str, scope: Scope) -> Result<String, Fault> {
        if !is_name(name) {
            return Err(Fault::invalid(format!(
                "{:?} is no name for a key; use up to {} letters, digits, -, _ and .",
                name.chars().take(limits::ECHO_CHARS).collect::<String>(),
                limits::KEY_NAME_CHARS
            )));
        }
        let mut bytes = [0; KEY_BYTES];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| Fault::internal(format!("the system has no random bytes: {error}")))?;
        let mut text = KEY_START.to_owned();
        for byte in bytes {
            write!(text, "{byte:02x}").expect("a text grows");
        }
        let made = Timestamp::now().strftime("%F").to_string();
        let digest = v4_store::sha256(text.as_bytes());
        let key = Key { name: name.to_owned(), scope, made, digest };
        self.change(|keys| {
            if keys.iter().any(|known| known.name == name) {
                return Err(Fault::invalid(format!(
                    "there is a key '{name}' already; take another name, or remove it first with \
                     `v4 keys rm {name}`"
                )));
            }
            if keys.len() >= limits::KEYS {
                let most = limits::KEYS;
                return Err(Fault::invalid(format!(
                    "there are {most} keys, which is the most; remove some"
                )));
            }
            keys.push(key);
            Ok(())
        })?;
        Ok(text)
    }

    /// Removes a key. Blocks.
    ///
    /// # Errors
    /// `not_found`; `invalid` when no keys are wanted; `disk`.
    pub fn remove(&self, name: &str) -> Result<(), Fault> {
        let shown: String = name.chars().take(limits::ECHO_CHARS).collect();
        self.change(|keys| {
            let at = keys.iter().position(|key| key.name == name);
            let at =
                at.ok_or_else(|| Fault::new(Code::NotFound, format!("there is no key '{shown}'")))?;
            keys.remove(at);
            Ok(())
        })
    }

    /// Changes the file, then what is known.
    fn change(&self, work: impl FnOnce(&mut Vec<Key>) -> Result<(), Fault>) -> Result<(), Fault> {
        let Some(path) = &self.path else {
            return Err(Fault::invalid(
                "this v4 wants no keys: start it without V4_KEYS=off to have some",
            ));
        };
        let disk = |what: String| {
            let path = path.display();
            Fault::new(Code::Disk, format!("cannot change the keys in {path}: {what}"))
        };
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut keys = read(path).map_err(disk)?.0.to_vec();
        work(&mut keys)?;
        fs::replace_private(path, written(&keys).as_bytes())
            .map_err(|error| disk(error.to_string()))?;
        let stamp = stamp(path).map_err(|error| disk(error.to_string()))?;
        let mut state = self.state();
        (state.keys, state.stamp) = (keys.into(), stamp);
        Ok(())
    }

    /// Whether a request may do what `scope` stands for. Gives the name of its key.
    ///
    /// # Errors
    /// `unauthorized` without a key that is known where one is wanted; `forbidden` with one whose
    /// scope is less.
    pub async fn judge(
        self: &Arc<Self>,
        headers: &HeaderMap,
        is_tcp: bool,
        scope: Scope,
    ) -> Result<Option<String>, Fault> {
        if !is_tcp || scope == Scope::Open {
            return Ok(None);
        }
        if self.is_due() {
            let keys = Arc::clone(self);
            // A look that panicked changed nothing.
            drop(tokio::task::spawn_blocking(move || keys.look_again()).await);
        }
        let keys = Arc::clone(&self.state().keys);
        let shown = shown(headers);
        let digest = shown.as_deref().map(|text| v4_store::sha256(text.as_bytes()));
        let found = digest.and_then(|digest| {
            // All are looked at, whichever it is.
            keys.iter().fold(None, |found, key| if key.is(&digest) { Some(key) } else { found })
        });
        match found {
            Some(key) if key.scope >= scope.min(Scope::Admin) => Ok(Some(key.name.clone())),
            Some(key) => Err(Fault::new(
                Code::Forbidden,
                format!(
                    "the key '{}' has the scope {}, but this needs {scope}; make another with `v4 \
                     keys add NAME --scope {scope}`",
                    key.name, key.scope
                ),
            )),
            None if !self.wants_one(&keys, scope) => Ok(None),
            None => Err(Fault::new(Code::Unauthorized, self.why(&keys, shown.is_some(), scope))),
        }
    }

    fn wants_one(&self, keys: &[Key], scope: Scope) -> bool {
        self.is_closed || !keys.is_empty() || scope == Scope::Owner
    }

    /// What is said to a request that has no key, or one that nobody knows.
    fn why(&self, keys: &[Key], has_one: bool, scope: Scope) -> String {
        let word = scope.min(Scope::Admin);
        if keys.is_empty() && self.is_closed {
            return "this v4 listens beyond its own machine and has no keys yet, so it answers \
                    nobody there: run `v4 keys add NAME --scope use` on that machine, or start it \
                    with V4_KEYS=off to let everybody in"
                .to_owned();
        }
        if has_one {
            return "this key is not known here; `v4 keys list` on the machine of this v4 shows \
                    which are"
                .to_owned();
        }
        format!(
            "this v4 wants a key with the scope {word}: send `Authorization: Bearer KEY`; `v4 keys \
             add NAME --scope {word}` on its machine makes one"
        )
    }
}

/// Random bytes of a key: nobody guesses 192 bits.
const KEY_BYTES: usize = 24;
/// What keys begin with, so that scanners for leaked secrets know them.
const KEY_START: &str = "v4-";

/// The key that a request shows: as a bearer's, as Anthropic's clients do, or as the password of
/// any user, which is how registries' clients do.
fn shown(headers: &HeaderMap) -> Option<String> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(key) = text("x-api-key") {
        return Some(key.trim().to_owned());
    }
    let (scheme, rest) = text(header::AUTHORIZATION.as_str())?.trim().split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().to_owned());
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let pair = String::from_utf8(BASE64_STANDARD.decode(rest.trim()).ok()?).ok()?;
    pair.split_once(':').map(|(_, password)| password.to_owned())
}

fn stamp(path: &Path) -> std::io::Result<Stamp> {
    Ok(RealFs.meta(path)?.map(|meta| (meta.len, meta.changed)))
}

/// The keys of a file; none where it is not there.
fn read(path: &Path) -> Result<(Arc<[Key]>, Stamp), String> {
    let stamp = stamp(path).map_err(|error| error.to_string())?;
    if stamp.is_none() {
        return Ok((Arc::new([]), None));
    }
    let bytes = fs::read(&RealFs, path, limits::KEYS_BYTES).map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&bytes);
    let mut keys = Vec::new();
    for (at, line) in text.lines().map(str::trim).enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let key = Key::parse(line);
        keys.push(key.ok_or_else(|| {
            format!("line {} is not NAME SCOPE sha256:DIGEST with read, use or admin", at + 1)
        })?);
    }
    if keys.len() > limits::KEYS {
        return Err(format!("more than {} keys", limits::KEYS));
    }
    Ok((keys.into(), stamp))
}

/// The file of keys.
fn written(keys: &[Key]) -> String {
    let line = |key: &Key| format!("{} {} {} {}\n", key.name, key.scope, key.digest, key.made);
    let lines: Vec<String> = keys.iter().map(line).collect();
    format!(
        "# Keys of v4: name, scope (read, use, admin), SHA-256 of the key, day it was made.\n\
         # `v4 keys` changes this; what is changed here by hand counts at once, too.\n{}",
        lines.concat()
    )
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::try_from(value).expect("a value"));
        headers
    }

    fn home() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("keys");
        (folder, path)
    }

    fn open(path: &Path, is_closed: bool) -> Arc<Keys> {
        Arc::new(Keys::open(Some(path), is_closed).expect("readable"))
    }

    async fn code(keys: &Arc<Keys>, headers: &HeaderMap, scope: Scope) -> Option<Code> {
        keys.judge(headers, true, scope).await.err().map(|fault| fault.code)
    }

    #[tokio::test]
    async fn a_key_opens_its_scope_and_those_below_in_each_of_the_three_ways() {
        let (_folder, path) = home();
        let keys = open(&path, false);
        let key = keys.add("laptop", Scope::Use).expect("made");
        let basic = BASE64_STANDARD.encode(format!("anybody:{key}"));
        for headers in [
            headers("authorization", &format!("Bearer {key}")),
            headers("x-api-key", &key),
            headers("authorization", &format!("basic {basic}")),
        ] {
            for (scope, expected) in [
                (Scope::Open, None),
                (Scope::Read, None),
                (Scope::Use, None),
                (Scope::Admin, Some(Code::Forbidden)),
                (Scope::Owner, Some(Code::Forbidden)),
            ] {
                assert_eq!(code(&keys, &headers, scope).await, expected, "{scope:?}");
            }
            let name = keys.judge(&headers, true, Scope::Read).await.expect("open");
            assert_eq!(name.as_deref(), Some("laptop"));
        }
        let near = format!("Bearer {}0", &key[..key.len() - 1]);
        let near = if near.ends_with(&key) { format!("{near}1") } else { near };
        for wrong in ["Bearer", "Bearer x", "Digest x", "Basic !", &near, ""] {
            let headers = headers("authorization", wrong);
            let found = code(&keys, &headers, Scope::Read).await;
            assert_eq!(found, Some(Code::Unauthorized), "{wrong:?}");
            assert_eq!(code(&keys, &headers, Scope::Open).await, None);
        }
        let admin = keys.add("desk", Scope::Admin).expect("made");
        let headers = headers("x-api-key", &admin);
        assert_eq!(code(&keys, &headers, Scope::Owner).await, None, "admin may make keys");
    }

    #[tokio::test]
    async fn who_needs_a_key_depends_on_where_it_listens_and_whether_there_is_one() {
        let (_folder, path) = home();
        let none = HeaderMap::new();
        let (near, far, off) = (open(&path, false), open(&path, true), Arc::new(Keys::off()));
        assert_eq!(code(&near, &none, Scope::Admin).await, None);
        assert_eq!(code(&near, &none, Scope::Owner).await, Some(Code::Unauthorized));
        assert_eq!(code(&far, &none, Scope::Read).await, Some(Code::Unauthorized));
        assert_eq!(code(&far, &none, Scope::Open).await, None);
        assert_eq!(code(&off, &none, Scope::Admin).await, None);
        assert!((far.shuts_out(), near.shuts_out()) == (true, false));
        let said = far.judge(&none, true, Scope::Use).await.expect_err("refused").message;
        assert!(said.contains("V4_KEYS=off"), "{said}");
        assert!(far.judge(&none, false, Scope::Owner).await.is_ok(), "the socket is the owner's");
        near.add("a", Scope::Read).expect("made");
        assert_eq!(code(&near, &none, Scope::Read).await, Some(Code::Unauthorized));
        assert!(off.add("a", Scope::Read).is_err());
    }

    #[test]
    fn the_file_keeps_no_key_and_is_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let (_folder, path) = home();
        let keys = open(&path, false);
        let text = keys.add("a-1", Scope::Read).expect("made");
        let other = keys.add("b", Scope::Admin).expect("made");
        assert!(text.starts_with("v4-") && text.len() == 51 && text != other, "{text}");
        let bytes = fs::read(&RealFs, &path, 1 << 20).expect("a file");
        let file = String::from_utf8(bytes).expect("text");
        assert!(!file.contains(&text[3..]) && file.contains("a-1 read sha256:"), "{file}");
        let mode = path.metadata().expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(keys.add("b", Scope::Read).expect_err("taken").code, Code::Invalid);
        assert_eq!(keys.remove("c").expect_err("unknown").code, Code::NotFound);
        keys.remove("b").expect("there");
        let again = open(&path, false);
        let names: Vec<String> = again.list().iter().map(|key| key.name.clone()).collect();
        assert_eq!(names, ["a-1"]);
    }

    #[test]
    fn what_others_write_counts_unless_it_is_no_file_of_keys() {
        let (_folder, path) = home();
        let keys = open(&path, false);
        keys.add("a", Scope::Read).expect("made");
        let digest = v4_store::sha256(b"secret");
        let line = format!("# mine\n\nb use {digest}\n");
        fs::replace_private(&path, line.as_bytes()).expect("written");
        assert_eq!(keys.list()[0].name, "b");
        fs::replace_private(&path, format!("{line}c nothing {digest}\n").as_bytes()).expect("it");
        assert_eq!(keys.list().len(), 1, "the old ones stay");
        let error = Keys::open(Some(&path), false).expect_err("refused").to_string();
        assert!(error.contains("line 4 is not"), "{error}");
        fs::replace_private(&path, b"").expect("written");
        assert_eq!(keys.list().len(), 0);
    }

    #[test]
    fn names_and_numbers_have_their_limits() {
        let (_folder, path) = home();
        let keys = open(&path, false);
        let longest = "n".repeat(limits::KEY_NAME_CHARS);
        keys.add(&longest, Scope::Read).expect("as long as it may be");
        for bad in ["", "a b", "ä", "a/b", &format!("{longest}n")] {
            assert_eq!(keys.add(bad, Scope::Read).expect_err(bad).code, Code::Invalid);
        }
        let digest = v4_store::sha256(b"x");
        let lines: Vec<String> =
            (0..limits::KEYS).map(|i| format!("k{i} read {digest}\n")).collect();
        let lines = lines.concat();
        fs::replace_private(&path, lines.as_bytes()).expect("written");
        assert_eq!(keys.list().len(), limits::KEYS);
        assert!(keys.add("more", Scope::Read).expect_err("full").message.contains("1024"));
    }
}
