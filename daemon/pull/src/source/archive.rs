//! Archives that files come in: brought here whole, with resume and checked, then one member is
//! read out of them. A member's name is only compared, never a path on this machine.

use std::{
    io::{self, BufReader, Read},
    sync::Arc,
};

use flate2::read::MultiGzDecoder;
use v4_proto::Digest;
use v4_store::{Staged, StoreError, fs::File};

use super::{Place, Share, Target, http, pump, read_all};
use crate::{
    error::PullError,
    limits,
    write::{Scale, Sink, Turn, Writer, blocking},
};

/// An archive to be fetched.
pub(super) struct Wanted {
    /// The key under which it is staged.
    pub key: String,
    /// Where it lies.
    pub target: Target,
    /// Its bytes, where they are known.
    pub size: Option<u64>,
    /// Its digest, where that is known.
    pub digest: Option<Digest>,
}

/// An archive that is here, whole. The turn is the last field, so the next one gets it when the
/// file is closed.
pub(super) struct Archive {
    staged: Staged,
    turn: Turn,
}

impl Archive {
    /// Opens it to read.
    pub fn open(&self) -> Result<Box<dyn File>, PullError> {
        Ok(self.staged.open()?)
    }

    /// What is done with it behind an outcome: it stays, under its key, until the file is
    /// committed. One that is whole and not what is needed goes, since no next try can use it.
    pub async fn done(
        self,
        key: String,
        outcome: Result<u64, PullError>,
        staged: &mut Vec<String>,
    ) -> Result<u64, PullError> {
        match &outcome {
            Ok(_) => staged.push(key),
            Err(error) if error.is_ours() => {}
            Err(_) => {
                let Self { staged, turn } = self;
                blocking(move || staged.discard().map(|()| drop(turn))).await?;
            }
        }
        outcome
    }
}

/// Brings an archive here whole, going on from what is here.
pub(super) async fn stage(
    place: Place<'_>,
    wanted: &Wanted,
    share: Share,
    sink: &Sink<'_>,
) -> Result<Archive, PullError> {
    let Wanted { key, target, size, digest } = wanted;
    let turn = place.turns.take(key).await;
    let writer = Writer::open(place.store, key, *size, &turn).await?;
    if digest.is_none() {
        // Nothing could tell whether what is here belongs to what comes.
        writer.restart().await?;
    }
    let was_resumed = writer.total() > 0;
    let mut outcome = Ok(*size);
    if size.is_none_or(|size| writer.offset() < size) {
        let total = sink.meter.total().or(*size).unwrap_or(0);
        let len = total / share.n_parts.max(1);
        let scale = Scale { start: len * share.part, len, of: size.unwrap_or(u64::MAX) };
        let to = Sink::new(&writer, 0, sink.meter.scaled(scale));
        outcome = http::read(&target.link(place.net), *size, &to).await.map(Some);
        if matches!(outcome, Err(PullError::Changed { .. })) {
            writer.restart().await?;
        }
    }
    let partial = writer.finish().await;
    match (outcome, partial) {
        // That the writer ended is known here, why it did there.
        (Err(PullError::Writer) | Ok(_), Err(error)) | (Err(error), _) => {
            Err(error.at(&target.shown(), was_resumed))
        }
        (Ok(size), Ok(mut partial)) => {
            let digest = *digest;
            let archive = blocking(move || {
                let digest = digest.map_or_else(|| partial.digest(), Ok)?;
                let size = size.unwrap_or_else(|| partial.offset());
                Ok(Archive { staged: partial.stage(&digest, size)?, turn })
            });
            archive.await.map_err(|error| error.at(&target.shown(), was_resumed))
        }
    }
}

/// Reads the first member of a tar file, packed with gzip or not, whose name is the right one.
pub(super) async fn unpack_tar(
    place: Place<'_>,
    file: Box<dyn File>,
    sink: &Sink<'_>,
    is_it: impl Fn(&str) -> bool + Send + 'static,
    wrong: impl Fn(String) -> PullError + Send + 'static,
) -> Result<u64, PullError> {
    let store = Arc::clone(place.store);
    pump(sink, move |take| {
        let damaged = |error: &dyn std::fmt::Display| wrong(format!("a damaged archive: {error}"));
        let reader = plain(file).map_err(|error| damaged(&error))?;
        let found = find(reader, is_it).map_err(|error| damaged(&error))?;
        let Some(mut member) = found else {
            return Err(wrong("an archive without the file that is wanted".to_owned()));
        };
        // What an archive unpacks to may be anything.
        let (needed, free) = (member.limit(), store.free_bytes()?);
        if needed > free {
            return Err(StoreError::Space { needed, free }.into());
        }
        let n = read_all(&mut member, take).map_err(|error| damaged(&error))?;
        if n < needed { Err(damaged(&"it ends early")) } else { Ok(n) }
    })
    .await
}

/// The bytes of a tar file, whatever packs them.
fn plain(file: Box<dyn File>) -> io::Result<Box<dyn Read + Send>> {
    let mut file = BufReader::with_capacity(limits::CHUNK_BYTES, file);
    match io::BufRead::fill_buf(&mut file)? {
        [0x1f, 0x8b, ..] => Ok(Box::new(MultiGzDecoder::new(file))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            Err(io::Error::other("it is packed with zstd, which this version cannot unpack"))
        }
        _ => Ok(Box::new(file)),
    }
}

/// Bytes of a block of a tar file.
const BLOCK: usize = 512;

/// Reads a tar file up to the data of the first plain file whose name is the right one.
fn find<R: Read>(mut reader: R, is_it: impl Fn(&str) -> bool) -> io::Result<Option<io::Take<R>>> {
    let (mut long_name, mut long_size) = (None, None);
    for _ in 0..limits::MEMBERS {
        let mut block = [0; BLOCK];
        reader.read_exact(&mut block)?;
        if block == [0; BLOCK] {
            return Ok(None);
        }
        let header = Header::parse(&block).ok_or_else(|| io::Error::other("it is no tar file"))?;
        let size = long_size.take().unwrap_or(header.size);
        match header.kind {
            // A name that is too long for the header (GNU), or what says it (POSIX).
            b'L' | b'x' => {
                let data = text(&mut reader, size)?;
                if header.kind == b'L' {
                    long_name = Some(data.trim_end_matches('\0').to_owned());
                } else {
                    long_name = extended(&data, "path").or(long_name);
                    long_size = extended(&data, "size").and_then(|size| size.parse().ok());
                }
                continue;
            }
            b'0' | 0 => {
                if is_it(&long_name.take().unwrap_or(header.name)) {
                    return Ok(Some(reader.take(size)));
                }
            }
            _ => long_name = None,
        }
        let skipped = size.checked_next_multiple_of(BLOCK as u64);
        let skipped = skipped.ok_or_else(|| io::Error::other("a member is too long"))?;
        let n = io::copy(&mut reader.by_ref().take(skipped), &mut io::sink())?;
        if n < skipped {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Err(io::Error::other("it has too many members"))
}

/// A short text that follows a header.
fn text(reader: &mut impl Read, size: u64) -> io::Result<String> {
    if size > limits::MEMBER_NAME_BYTES {
        return Err(io::Error::other("a name is too long"));
    }
    let mut bytes = Vec::new();
    let padded = size.next_multiple_of(BLOCK as u64);
    reader.take(padded).read_to_end(&mut bytes)?;
    bytes.truncate(usize::try_from(size).unwrap_or(usize::MAX));
    String::from_utf8(bytes).map_err(io::Error::other)
}

/// A field of an extended header: lines of `LENGTH KEY=VALUE`.
fn extended(data: &str, key: &str) -> Option<String> {
    let mut lines = data.lines().filter_map(|line| line.split_once(' ')?.1.split_once('='));
    lines.find(|(found, _)| *found == key).map(|(_, value)| value.to_owned())
}

/// What a header says of a member.
struct Header {
    name: String,
    size: u64,
    kind: u8,
}

impl Header {
    fn parse(block: &[u8; BLOCK]) -> Option<Self> {
        let word = |range: std::ops::Range<usize>| {
            let bytes = block[range].split(|byte| *byte == 0).next().unwrap_or_default();
            std::str::from_utf8(bytes).ok()
        };
        let octal = |text: &str| u64::from_str_radix(text.trim(), 8).ok();
        let sum = (0..).zip(block).map(|(i, byte)| {
            // The sum counts its own place as blanks.
            u64::from(if (148..156).contains(&i) { b' ' } else { *byte })
        });
        if octal(word(148..156)?)? != sum.sum::<u64>() {
            return None;
        }
        let size = if block[124] & 0x80 == 0 {
            octal(word(124..136)?)?
        } else {
            // A number beyond eight gigabytes (GNU).
            u64::from_be_bytes(block[128..136].try_into().ok()?)
        };
        let is_posix = &block[257..263] == b"ustar\0";
        let prefix = if is_posix { word(345..500)? } else { "" };
        let name = word(0..100)?;
        let name = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
        Some(Self { name, size, kind: block[156] })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::process::Command;

    use super::*;

    fn found(bytes: &[u8], name: &str) -> io::Result<Option<Vec<u8>>> {
        let wanted = name.to_owned();
        let Some(mut member) = find(bytes, |found| found == wanted)? else { return Ok(None) };
        let mut data = Vec::new();
        member.read_to_end(&mut data)?;
        Ok(Some(data))
    }

    #[test]
    fn what_the_real_tar_writes_is_read_in_each_of_its_formats() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let long = format!("{}/{}.gguf", "d".repeat(90), "n".repeat(120));
        let script = format!(
            "mkdir -p {0} && printf small > a.gguf && head -c 1000 /dev/zero > {1} && ln -s a.gguf l",
            "d".repeat(90),
            long
        );
        let sh = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]).current_dir(folder.path());
            command.output().expect("a shell")
        };
        assert!(sh(&script).status.success());
        for format in ["gnu", "posix", "ustar"] {
            let made = sh(&format!("tar -c --format={format} l a.gguf {}", "d".repeat(90)));
            if !made.status.success() && format == "ustar" {
                // The name is too long for it.
                continue;
            }
            assert!(made.status.success(), "{format}");
            assert_eq!(found(&made.stdout, "a.gguf").unwrap().unwrap(), b"small", "{format}");
            assert_eq!(found(&made.stdout, &long).unwrap().unwrap(), [0; 1000], "{format}");
            assert_eq!(found(&made.stdout, "l").unwrap(), None, "a link is no file");
            assert!(found(&made.stdout[..700], &long).is_err(), "{format}");
        }
    }

    #[test]
    fn what_is_no_tar_file_is_an_error() {
        assert!(found(&[7; 4096], "x").is_err());
        assert!(found(b"short", "x").is_err());
        assert_eq!(found(&[0; 1024], "x").unwrap(), None);
    }
}
