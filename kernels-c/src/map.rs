//! Files in memory: weights are read where the page cache has them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::{Advice, Mmap};

/// A file, mapped read-only. Two processes that map one file share its pages.
///
/// The files are blobs of the store: immutable once committed. Should one be truncated underneath
/// us all the same, touching the lost pages is a SIGBUS, which ends this process and no other.
#[derive(Debug)]
pub struct Map {
    mmap: Mmap,
}

impl Map {
    /// Maps the file.
    ///
    /// # Errors
    /// The file cannot be opened or mapped.
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place of the right column that opens files"
    )]
    pub fn open(path: &Path) -> io::Result<Arc<Map>> {
        let file = File::open(path)?;
        // SAFETY: nobody writes to a committed blob (mode 0444, replaced by rename only), so the
        // bytes behind the slices we lend do not change.
        let mmap = unsafe { Mmap::map(&file)? };
        Ok(Arc::new(Map { mmap }))
    }

    /// Bytes of the file.
    pub fn len(&self) -> usize {
        self.mmap.len()
    }

    /// Whether the file is empty.
    pub fn is_empty(&self) -> bool {
        self.mmap.is_empty()
    }

    /// The file's bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.mmap
    }

    /// Brings a range of the file into memory, so that the first use finds it there. A range beyond
    /// the end is cut.
    ///
    /// # Errors
    /// The disk fails to give a page.
    pub fn populate(&self, range: Range<usize>) -> io::Result<()> {
        let end = range.end.min(self.len());
        let start = range.start.min(end);
        if start == end {
            return Ok(());
        }
        #[cfg(target_os = "linux")]
        match self.mmap.advise_range(Advice::PopulateRead, start, end - start) {
            // Kernels before 5.14 do not know the advice.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
            }
            done => return done,
        }
        touch(&self.mmap[start..end]);
        Ok(())
    }
}

/// Reads a byte of each page.
fn touch(bytes: &[u8]) {
    // The smallest page of any system we run on.
    const PAGE_BYTES: usize = 4096;
    let pages = bytes.iter().step_by(PAGE_BYTES);
    std::hint::black_box(pages.fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
}

/// Read-only bytes that are cheap to clone: a range of a [`Map`], or memory of our own.
#[derive(Debug, Clone)]
pub struct Bytes {
    source: Source,
    range: Range<usize>,
}

#[derive(Debug, Clone)]
enum Source {
    Map(Arc<Map>),
    Owned(Arc<Vec<u8>>),
}

impl Bytes {
    /// A range of a mapped file; `None` if the file does not have it.
    pub fn from_map(map: Arc<Map>, range: Range<usize>) -> Option<Bytes> {
        map.as_slice().get(range.clone())?;
        Some(Bytes { source: Source::Map(map), range })
    }

    /// Bytes of our own.
    pub fn from_vec(bytes: Vec<u8>) -> Bytes {
        let range = 0..bytes.len();
        Bytes { source: Source::Owned(Arc::new(bytes)), range }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        let whole = match &self.source {
            Source::Map(map) => map.as_slice(),
            Source::Owned(bytes) => bytes,
        };
        &whole[self.range.clone()]
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// A part of them; `None` if they do not have it.
    pub fn slice(&self, range: Range<usize>) -> Option<Bytes> {
        self.as_slice().get(range.clone())?;
        let range = self.range.start + range.start..self.range.start + range.end;
        Some(Bytes { source: self.source.clone(), range })
    }

    /// Brings them into memory: [`Map::populate`].
    ///
    /// # Errors
    /// The disk fails to give a page.
    pub fn populate(&self) -> io::Result<()> {
        match &self.source {
            Source::Map(map) => map.populate(self.range.clone()),
            Source::Owned(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/quant/all.h");
    const TEXT: &[u8] = include_bytes!("../quant/all.h");

    #[test]
    fn a_map_has_the_bytes_of_its_file() {
        let map = Map::open(Path::new(PATH)).unwrap();
        assert_eq!(map.as_slice(), TEXT);
        assert_eq!(map.len(), TEXT.len());
        map.populate(0..usize::MAX).unwrap();
        map.populate(5..6).unwrap();
        map.populate(map.len()..usize::MAX).unwrap();
        touch(map.as_slice());
        let missing = Map::open(Path::new("/nonexistent/v4")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn bytes_are_ranges_that_their_source_has() {
        let map = Map::open(Path::new(PATH)).unwrap();
        let n = map.len();
        assert!(Bytes::from_map(map.clone(), 0..n + 1).is_none());
        let reversed = Range { start: 4, end: 2 };
        assert!(Bytes::from_map(map.clone(), reversed.clone()).is_none());
        let owned = Bytes::from_vec(TEXT.to_vec());
        for whole in [Bytes::from_map(map, 0..n).unwrap(), owned] {
            whole.populate().unwrap();
            let part = whole.slice(3..n).and_then(|part| part.slice(4..9)).unwrap();
            assert_eq!(part.as_slice(), &TEXT[7..12]);
            assert_eq!(part.len(), 5);
            assert!(part.slice(0..6).is_none());
            assert!(part.slice(reversed.clone()).is_none());
            assert!(part.slice(5..5).unwrap().is_empty());
        }
    }
}
