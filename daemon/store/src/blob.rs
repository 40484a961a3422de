//! [`Partial`]: a blob that grows, written in any order, hashed in order, and its way into the
//! store.
//!
//! Beside the data lies a journal: a line for each piece that was written, with a checksum of it. A
//! resume reads what is there and keeps the pieces that are true; so a torn write, a lost page or a
//! file that somebody changed costs a piece of the download, never a wrong blob: what counts in the
//! end is the digest of all bytes, and the bytes that were there are hashed again for it.

use std::{
    fmt,
    io::{BufReader, Read, SeekFrom, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{SyncSender, sync_channel},
    },
    thread,
};

use bytes::Bytes;
use v4_proto::Digest;

use crate::{
    error::StoreError,
    fs::{self, File, Fs},
    hash::{Chain, Follower, Linker, sha256},
    lease::Claim,
    limits,
    ranges::Ranges,
};

/// Mode of a blob: nobody writes it again.
pub(crate) const BLOB_MODE: u32 = 0o444;
/// Mode of a file that grows.
const PARTIAL_MODE: u32 = 0o600;
/// Ending of a journal's file name.
pub(crate) const JOURNAL_ENDING: &str = ".journal";
/// Bytes of a journal's line: twice 16 and once 8 hexadecimal digits, and what follows each.
const LINE_BYTES: usize = 43;

/// Where a partial lies and goes.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub fs: Arc<dyn Fs>,
    pub data: PathBuf,
    pub journal: PathBuf,
    pub blobs: PathBuf,
    pub chains: PathBuf,
}

impl Place {
    /// Forgets the partial.
    pub fn discard(&self) -> Result<(), StoreError> {
        // The journal goes last: alone it means nothing, while data alone would be kept for ever.
        for path in [&self.data, &self.journal] {
            self.fs.remove_file(path).map_err(StoreError::io("remove", path))?;
        }
        Ok(())
    }
}

/// Bytes that follow each other and are not in the journal yet.
struct Run {
    start: u64,
    end: u64,
    checksum: crc32fast::Hasher,
}

/// A blob that grows. Dropping it keeps what was written; a later [`crate::Store::partial`] with
/// the same key goes on from there.
pub struct Partial {
    place: Place,
    file: Box<dyn File>,
    /// Where the file's cursor is.
    cursor: u64,
    journal: Box<dyn File>,
    /// The bytes that are here.
    here: Ranges,
    follower: Follower,
    runs: Vec<Run>,
    /// Bytes in `runs`.
    n_unnoted: u64,
    /// Bytes written since the last sync began.
    n_unsynced: u64,
    /// Brings the bytes to the disk while more are written; made when there are enough.
    syncer: Option<SyncSender<()>>,
    size: Option<u64>,
    claim: Claim,
}

impl fmt::Debug for Partial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, here, size, .. } = self;
        f.debug_struct("Partial")
            .field("data", &place.data)
            .field("here", here)
            .field("size", size)
            .finish_non_exhaustive()
    }
}

impl Partial {
    /// Opens or makes the partial at `place`. `size` is how many bytes it may have at most.
    pub(crate) fn open(place: Place, size: Option<u64>, claim: Claim) -> Result<Self, StoreError> {
        let fs = &place.fs;
        let is_there = fs.meta(&place.data).map_err(StoreError::io("look at", &place.data))?;
        if is_there.is_some() {
            // A commit that was killed may have left it read-only.
            fs.set_mode(&place.data, PARTIAL_MODE)
                .map_err(StoreError::io("make writable", &place.data))?;
        }
        let mut file = fs.open(&place.data).map_err(StoreError::io("open", &place.data))?;
        let mut journal =
            fs.open(&place.journal).map_err(StoreError::io("open", &place.journal))?;
        let mut pieces = read_journal(journal.as_mut(), &place.journal)?;
        let journal_len = (pieces.len() * LINE_BYTES) as u64;
        if size.is_some_and(|size| pieces.iter().any(|piece| piece.range.end > size)) {
            pieces.clear();
        }
        let mut follower = Follower::start(fs, &place.data)?;
        let here = true_pieces(file.as_mut(), &place.data, pieces, &mut follower)?;
        if here.total() == 0 {
            cut(journal.as_mut(), &place.journal, 0)?;
        } else {
            cut(journal.as_mut(), &place.journal, journal_len)?;
        }
        cut(file.as_mut(), &place.data, here.end())?;
        let cursor = here.end();
        Ok(Self {
            place,
            file,
            cursor,
            journal,
            here,
            follower,
            runs: Vec::new(),
            n_unnoted: 0,
            n_unsynced: 0,
            syncer: None,
            size,
            claim,
        })
    }

    /// Bytes from the start that are here without a gap.
    pub fn offset(&self) -> u64 {
        self.here.reach(0)
    }

    /// All the bytes that are here.
    pub fn here(&self) -> &Ranges {
        &self.here
    }

    /// The digest of the bytes up to the first gap.
    ///
    /// # Errors
    /// [`StoreError::Io`] when what was written cannot be read.
    pub fn digest(&mut self) -> Result<Digest, StoreError> {
        Ok(self.hashed()?.digest())
    }

    /// Waits until all bytes up to the first gap are hashed.
    fn hashed(&mut self) -> Result<Linker, StoreError> {
        self.follower.finish(self.here.reach(0))
    }

    /// Writes bytes behind the first ones without a gap.
    ///
    /// # Errors
    /// As for [`Partial::write_at`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.write_at(self.offset(), Bytes::copy_from_slice(bytes))
    }

    /// Writes bytes at their place; those that are here already are passed over. Every few MB the
    /// journal notes what was written, and it is on its way to the disk.
    ///
    /// # Errors
    /// [`StoreError::Length`] beyond the expected size (nothing is written);
    /// [`StoreError::DiskFull`] or [`StoreError::Io`], after which the partial is to be dropped: it
    /// can be resumed.
    pub fn write_at(&mut self, at: u64, mut bytes: Bytes) -> Result<(), StoreError> {
        let end = at.saturating_add(bytes.len() as u64);
        if let Some(expected) = self.size.filter(|size| end > *size) {
            return Err(StoreError::Length { expected, actual: end });
        }
        let mut gone = at;
        for gap in self.here.gaps(at..end) {
            let _ = bytes.split_to(index(gap.start - gone));
            let new = bytes.split_to(index(gap.end - gap.start));
            gone = gap.end;
            self.write_new(gap, new)?;
        }
        Ok(())
    }

    /// Writes bytes none of which is here.
    fn write_new(&mut self, range: Range<u64>, bytes: Bytes) -> Result<(), StoreError> {
        let path = &self.place.data;
        if self.cursor != range.start {
            self.file
                .seek(SeekFrom::Start(range.start))
                .map_err(StoreError::io("seek in", path))?;
        }
        // Unknown until it is written whole.
        self.cursor = u64::MAX;
        self.file.write_all(&bytes).map_err(StoreError::io("write", path))?;
        self.cursor = range.end;
        let at = self.runs.iter().position(|run| run.end == range.start).unwrap_or_else(|| {
            let (start, end) = (range.start, range.start);
            self.runs.push(Run { start, end, checksum: crc32fast::Hasher::new() });
            self.runs.len() - 1
        });
        let run = &mut self.runs[at];
        run.checksum.update(&bytes);
        run.end = range.end;
        self.n_unnoted += range.end - range.start;
        self.n_unsynced += range.end - range.start;
        self.here.add(range.clone());
        if self.follower.fed() == range.start {
            self.follower.offer(bytes)?;
        } else {
            self.follower.reach(self.here.reach(0))?;
        }
        if self.n_unnoted >= limits::NOTE_BYTES {
            self.note()?;
        }
        if self.n_unsynced >= limits::CHECKPOINT_BYTES {
            self.sync_behind()?;
        }
        Ok(())
    }

    /// Notes in the journal what was written since. A line needs no sync: without it, or with a
    /// torn one, a resume fetches that piece again, and one whose bytes never reached the disk is
    /// not true.
    fn note(&mut self) -> Result<(), StoreError> {
        let piece =
            |run: Run| Piece { range: run.start..run.end, checksum: run.checksum.finalize() };
        let lines: String = self.runs.drain(..).map(|run| piece(run).to_string()).collect();
        self.n_unnoted = 0;
        let journal = &self.place.journal;
        self.journal.write_all(lines.as_bytes()).map_err(StoreError::io("write", journal))
    }

    /// Has the bytes so far brought to the disk while more are written. A machine that loses its
    /// power then loses what came in the last moments; a process that is killed loses less, since
    /// the system keeps what was written.
    fn sync_behind(&mut self) -> Result<(), StoreError> {
        let path = &self.place.data;
        let sender = if let Some(sender) = &self.syncer {
            sender
        } else {
            let mut file = self.place.fs.open(path).map_err(StoreError::io("open", path))?;
            let (sender, receiver) = sync_channel::<()>(1);
            // What cannot be brought to the disk is noticed by the sync before the commit.
            let work = move || while receiver.recv().is_ok_and(|()| file.sync().is_ok()) {};
            thread::Builder::new()
                .name("v4-sync".to_owned())
                .spawn(work)
                .map_err(StoreError::io("start a thread to sync", path))?;
            self.syncer.insert(sender)
        };
        if sender.try_send(()).is_ok() {
            self.n_unsynced = 0;
        }
        Ok(())
    }

    /// Brings all bytes to the disk and notes them in the journal.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] or [`StoreError::Io`].
    pub fn sync(&mut self) -> Result<(), StoreError> {
        if !self.runs.is_empty() {
            self.note()?;
        }
        self.file.sync().map_err(StoreError::io("sync", &self.place.data))?;
        self.n_unsynced = 0;
        Ok(())
    }

    /// Throws all bytes away and starts at 0 again.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn restart(&mut self) -> Result<(), StoreError> {
        cut(self.journal.as_mut(), &self.place.journal, 0)?;
        cut(self.file.as_mut(), &self.place.data, 0)?;
        self.follower = Follower::start(&self.place.fs, &self.place.data)?;
        (self.here, self.cursor, self.n_unnoted) = (Ranges::default(), 0, 0);
        self.runs.clear();
        Ok(())
    }

    /// Forgets some of the bytes, so that they are missing again; the others stay.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] or [`StoreError::Io`], after which it is to be dropped.
    pub fn forget(&mut self, ranges: &[Range<u64>]) -> Result<(), StoreError> {
        let Place { fs, data, journal, .. } = &self.place;
        let mut here = self.here.clone();
        for range in ranges {
            here.remove(range.clone());
        }
        // A piece of the journal may hold both, so what stays is read and noted anew.
        let mut file = fs.open_read(data).map_err(StoreError::io("open", data))?;
        let mut lines = String::new();
        for range in here.iter() {
            let mut start = range.start;
            while start < range.end {
                let end = range.end.min(start + limits::NOTE_BYTES);
                lines +=
                    &Piece::of(start, &read_range(file.as_mut(), data, start..end)?).to_string();
                start = end;
            }
        }
        // Cut short here, the partial has less, and nothing that is wrong.
        cut(self.journal.as_mut(), journal, 0)?;
        self.journal.write_all(lines.as_bytes()).map_err(StoreError::io("write", journal))?;
        self.follower = Follower::start(fs, data)?;
        self.runs.clear();
        (self.here, self.n_unnoted) = (here, 0);
        self.follower.reach(self.here.reach(0))
    }

    /// The parts that are not what a chain says, as ranges. The chain may come from anybody: what
    /// is said to be wrong may be right where the chain is a lie.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn wrong_parts(
        &mut self,
        chain: &Chain,
        digest: &Digest,
        size: u64,
    ) -> Result<Vec<Range<u64>>, StoreError> {
        let Place { fs, data, .. } = &self.place;
        let mut file = fs.open_read(data).map_err(StoreError::io("open", data))?;
        let mut wrong = Vec::new();
        for (i, start) in (0..size).step_by(index(limits::CHUNK_LINK_BYTES)).enumerate() {
            let range = start..size.min(start + limits::CHUNK_LINK_BYTES);
            let is_here = self.here.reach(range.start) >= range.end;
            let is_right = is_here && {
                let chunk = read_range(file.as_mut(), data, range.clone())?;
                chain.checks(i, &chunk, size, digest)
            };
            if !is_right {
                wrong.push(range);
            }
        }
        Ok(wrong)
    }

    /// Removes the partial.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn discard(self) -> Result<(), StoreError> {
        self.place.discard()
    }

    /// Makes it a blob: only when length and digest are as they must be. Otherwise the partial is
    /// removed.
    ///
    /// # Errors
    /// [`StoreError::Length`] or [`StoreError::Digest`] with both digests;
    /// [`StoreError::DiskFull`] or [`StoreError::Io`], after which it can be resumed.
    pub fn commit(mut self, digest: &Digest, size: u64) -> Result<(), StoreError> {
        let chain = self.check(digest, size)?;
        let Place { fs, data, journal, blobs, chains } = &self.place;
        fs.set_mode(data, BLOB_MODE).map_err(StoreError::io("make read-only", data))?;
        let blob = blobs.join(blob_name(digest));
        fs.rename(data, &blob).map_err(StoreError::io("rename", data))?;
        fs.sync_dir(blobs).map_err(StoreError::io("sync", blobs))?;
        // The blob is whole and in place; a journal alone is swept at the next start, and without
        // its chain a damaged blob is fetched whole.
        if !chain.is_empty() {
            let _ = put_file(
                fs.as_ref(),
                journal,
                &chains.join(blob_name(digest)),
                &chain.encode(),
                0o600,
            );
        }
        let _ = fs.remove_file(journal);
        Ok(())
    }

    /// Keeps it as a checked file outside the blobs, to be read and then discarded. Length and
    /// digest are checked as for a blob.
    ///
    /// # Errors
    /// As for [`Partial::commit`].
    pub fn stage(mut self, digest: &Digest, size: u64) -> Result<Staged, StoreError> {
        self.check(digest, size)?;
        Ok(Staged { place: self.place, _claim: self.claim })
    }

    /// Syncs and checks; removes the partial when it is not what it must be.
    fn check(&mut self, digest: &Digest, size: u64) -> Result<Chain, StoreError> {
        let linker = self.hashed()?;
        let (offset, actual) = (self.here.reach(0), linker.digest());
        let wrong = if offset != size || self.here.end() != size {
            StoreError::Length { expected: size, actual: self.here.total() }
        } else if actual != *digest {
            StoreError::Digest { expected: *digest, actual }
        } else {
            return self.sync().map(|()| linker.chain());
        };
        self.place.discard()?;
        Err(wrong)
    }
}

/// A whole, checked file that is not a blob: an archive on its way to its members.
#[derive(Debug)]
pub struct Staged {
    place: Place,
    _claim: Claim,
}

impl Staged {
    /// Opens it to read.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(&self) -> Result<Box<dyn File>, StoreError> {
        let path = &self.place.data;
        self.place.fs.open_read(path).map_err(StoreError::io("open", path))
    }

    /// Removes it. Dropping it instead leaves it for a later [`crate::Store::partial`] or
    /// [`crate::Store::discard`].
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn discard(self) -> Result<(), StoreError> {
        self.place.discard()
    }
}

/// The file name of a blob.
pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("sha256-{}", digest.hex())
}

/// Cuts a file and puts its cursor at the end.
fn cut(file: &mut dyn File, path: &Path, len: u64) -> Result<(), StoreError> {
    file.set_len(len).map_err(StoreError::io("cut", path))?;
    file.seek(SeekFrom::Start(len)).map_err(StoreError::io("seek in", path))?;
    Ok(())
}

/// A length of memory.
fn index(n: u64) -> usize {
    usize::try_from(n).expect("at most the length of a slice")
}

/// A line of a journal.
pub(crate) struct Piece {
    pub range: Range<u64>,
    checksum: u32,
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:016x} {:016x} {:08x}", self.range.start, self.range.end, self.checksum)
    }
}

impl Piece {
    /// The piece of these bytes.
    pub fn of(start: u64, bytes: &[u8]) -> Self {
        let range = start..start + bytes.len() as u64;
        Self { range, checksum: crc32fast::hash(bytes) }
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
        let mut words = line.split(' ');
        let mut number = || u64::from_str_radix(words.next()?, 16).ok();
        let (start, end, checksum) = (number()?, number()?, number()?);
        let is_right = start < end && end - start <= limits::PIECE_BYTES;
        is_right.then_some(Self { range: start..end, checksum: u32::try_from(checksum).ok()? })
    }
}

/// The lines of a journal, up to the first that is not one.
fn read_journal(journal: &mut dyn File, path: &Path) -> Result<Vec<Piece>, StoreError> {
    let mut lines = BufReader::new(journal.take(limits::JOURNAL_BYTES));
    let mut pieces = Vec::new();
    loop {
        let mut line = Vec::with_capacity(LINE_BYTES);
        let read = lines.by_ref().take(LINE_BYTES as u64).read_to_end(&mut line);
        let n = read.map_err(StoreError::io("read", path))?;
        match Piece::parse(&line).filter(|_| n == LINE_BYTES) {
            Some(piece) => pieces.push(piece),
            None => return Ok(pieces),
        }
    }
}

/// The bytes of a range; fewer where the file ends before.
fn read_range(file: &mut dyn File, path: &Path, range: Range<u64>) -> Result<Vec<u8>, StoreError> {
    file.seek(SeekFrom::Start(range.start)).map_err(StoreError::io("seek in", path))?;
    let mut bytes = Vec::with_capacity(index(range.end - range.start));
    let mut part = file.take(range.end - range.start);
    part.read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
    Ok(bytes)
}

/// Makes a partial of a blob of which these pieces are true.
pub(crate) fn begin(place: &Place, blob: &Path, pieces: &[Piece]) -> Result<(), StoreError> {
    let Place { fs, data, journal, .. } = place;
    let lines: String = pieces.iter().map(ToString::to_string).collect();
    let mut file = fs.open(journal).map_err(StoreError::io("open", journal))?;
    cut(file.as_mut(), journal, 0)?;
    file.write_all(lines.as_bytes()).map_err(StoreError::io("write", journal))?;
    file.sync().map_err(StoreError::io("sync", journal))?;
    // The journal first: alone it means nothing, while data without it would be fetched again.
    fs.set_mode(blob, PARTIAL_MODE).map_err(StoreError::io("make writable", blob))?;
    fs.rename(blob, data).map_err(StoreError::io("rename", blob))?;
    let folder = data.parent().unwrap_or(data);
    fs.sync_dir(folder).map_err(StoreError::io("sync", folder))
}

/// Bytes that the journal of a partial names, without a look at the data.
pub(crate) fn noted_bytes(place: &Place) -> Result<u64, StoreError> {
    let Place { fs, journal, .. } = place;
    if fs.meta(journal).map_err(StoreError::io("look at", journal))?.is_none() {
        return Ok(0);
    }
    let mut file = fs.open_read(journal).map_err(StoreError::io("open", journal))?;
    let mut here = Ranges::default();
    for piece in read_journal(file.as_mut(), journal)? {
        here.add(piece.range);
    }
    Ok(here.total())
}

/// Reads the pieces and finds those that are true of the data. The first ones without a gap are
/// given to the follower on the way, so that they are read once.
fn true_pieces(
    file: &mut dyn File,
    path: &Path,
    mut pieces: Vec<Piece>,
    follower: &mut Follower,
) -> Result<Ranges, StoreError> {
    pieces.sort_by_key(|piece| (piece.range.start, piece.range.end));
    let mut here = Ranges::default();
    let mut cursor = 0;
    for Piece { range, checksum } in pieces {
        if here.reach(range.start) >= range.end {
            continue;
        }
        if cursor != range.start {
            file.seek(SeekFrom::Start(range.start)).map_err(StoreError::io("seek in", path))?;
        }
        let mut bytes = Vec::with_capacity(index(range.end - range.start));
        let mut piece = file.take(range.end - range.start);
        piece.read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
        cursor = range.start + bytes.len() as u64;
        if cursor != range.end || crc32fast::hash(&bytes) != checksum {
            continue;
        }
        if follower.fed() == range.start {
            follower.offer(bytes.into())?;
        }
        here.add(range);
    }
    Ok(here)
}

/// Writes a whole small file so that a crash leaves either the old one or the new one.
pub(crate) fn put_file(
    fs: &dyn Fs,
    staging: &Path,
    to: &Path,
    bytes: &[u8],
    mode: u32,
) -> Result<(), StoreError> {
    let mut file = fs.open(staging).map_err(StoreError::io("open", staging))?;
    cut(file.as_mut(), staging, 0)?;
    file.write_all(bytes).map_err(StoreError::io("write", staging))?;
    file.sync().map_err(StoreError::io("sync", staging))?;
    drop(file);
    fs.set_mode(staging, mode).map_err(StoreError::io("set the mode of", staging))?;
    fs.rename(staging, to).map_err(StoreError::io("rename", staging))?;
    let folder = to.parent().unwrap_or(to);
    fs.sync_dir(folder).map_err(StoreError::io("sync", folder))
}

/// Reads a blob and checks it.
pub(crate) fn read_checked(
    fs: &dyn Fs,
    path: &Path,
    digest: &Digest,
    max_bytes: usize,
) -> Result<Vec<u8>, StoreError> {
    let bytes = fs::read(fs, path, max_bytes).map_err(StoreError::io("read", path))?;
    let actual = sha256(&bytes);
    if actual == *digest {
        Ok(bytes)
    } else {
        Err(StoreError::Digest { expected: *digest, actual })
    }
}
