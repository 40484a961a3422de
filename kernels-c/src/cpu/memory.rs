//! The memory of [`super::Cpu`]: buffers of floats, the cache of keys and values, and the views by
//! which the shares of a job write to parts of one buffer.

use std::marker::PhantomData;
use std::ops::Range;

use memmap2::MmapMut;

use crate::device::{DeviceError, KvShape, Result};
use crate::ffi;

/// Anonymous memory, zero and not resident until it is touched.
fn zeros(bytes: usize, what: &'static str) -> Result<MmapMut> {
    let out_of_memory = |_| DeviceError::OutOfMemory { what, needed: bytes };
    MmapMut::map_anon(bytes.max(1)).map_err(out_of_memory)
}

/// Floats on a page boundary.
#[derive(Debug)]
pub struct HostBuffer {
    memory: MmapMut,
    len: usize,
}

impl HostBuffer {
    pub(super) fn new(len: usize) -> Result<Self> {
        let bytes = len.saturating_mul(size_of::<f32>());
        Ok(Self { memory: zeros(bytes, "activations")?, len })
    }

    /// Floats it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn floats(&self) -> &[f32] {
        // SAFETY: the mapping is `4 * len` bytes, page-aligned, zeroed when made, and every pattern
        // of bits is a float.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.len) }
    }

    pub(super) fn floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `floats`, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), self.len) }
    }
}

/// Tokens of a slab: see `enum v4_kv` in v4.h.
pub(super) const SLAB: usize = ffi::V4_SLAB as usize;

/// Keys and values as they are stored: slabs of [`SLAB`] tokens, `[layer][block][kv head][slab]`.
#[derive(Debug)]
pub struct HostKv {
    keys: MmapMut,
    values: MmapMut,
}

impl HostKv {
    pub(super) fn new(shape: &KvShape, n_blocks: usize) -> Result<Self> {
        let KvShape { head_dim, block_tokens, kv_type, .. } = *shape;
        assert!(block_tokens.is_multiple_of(SLAB), "blocks of whole slabs");
        assert!(block_tokens <= ffi::V4_KV_TOKENS as usize, "blocks that are summed at once");
        if !head_dim.is_multiple_of(kv_type.group()) {
            let reason = format!(
                "heads are {head_dim} wide, which is not a multiple of {}; use f16",
                kv_type.group()
            );
            let name = format!("{} for keys and values", kv_type.name());
            return Err(DeviceError::Unavailable { name, reason });
        }
        let bytes = shape.block_bytes().saturating_mul(n_blocks) / 2;
        let map = || zeros(bytes, "the cache of keys and values");
        Ok(Self { keys: map()?, values: map()? })
    }

    pub(super) fn keys(&self) -> &[u8] {
        &self.keys
    }

    pub(super) fn values(&self) -> &[u8] {
        &self.values
    }

    pub(super) fn both_mut(&mut self) -> (&mut [u8], &mut [u8]) {
        (&mut self.keys, &mut self.values)
    }
}

/// A slice that the shares of a job write to, each to its own part.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spread<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Spread` is a mutable slice; who takes parts of it promises that no two overlap.
unsafe impl<T: Send> Sync for Spread<'_, T> {}
// SAFETY: see above.
unsafe impl<T: Send> Send for Spread<'_, T> {}

impl<'a, T> Spread<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// While the part lives, no other part that shares an element with it does.
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: in bounds; the caller promises that nothing else refers to these elements.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Columns `columns` of rows `rows`, the slice being a matrix of rows of `width`.
    ///
    /// # Safety
    /// While the tile lives, nothing that shares an element with it does.
    pub(super) unsafe fn tile(
        &self,
        rows: Range<usize>,
        width: usize,
        columns: Range<usize>,
    ) -> Tile<'a> {
        assert!(size_of::<T>() == size_of::<f32>() && rows.end * width <= self.len);
        assert!(rows.start < rows.end, "{rows:?}");
        assert!(columns.start < columns.end && columns.end <= width, "{columns:?} of {width}");
        // SAFETY: in bounds, by the assertions.
        let start = unsafe { self.start.add(rows.start * width + columns.start) };
        Tile {
            start: start.cast(),
            rows: rows.len(),
            columns: columns.len(),
            stride: width,
            borrow: PhantomData,
        }
    }
}

/// Some columns of a matrix of floats.
#[derive(Debug)]
pub(super) struct Tile<'a> {
    pub(super) start: *mut f32,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Floats from a row to the next.
    pub(super) stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

impl Tile<'_> {
    /// Columns `columns` of rows `rows` of this tile.
    pub(super) fn part(&mut self, rows: Range<usize>, columns: Range<usize>) -> Tile<'_> {
        assert!(rows.start < rows.end && rows.end <= self.rows, "{rows:?}");
        assert!(columns.start < columns.end && columns.end <= self.columns, "{columns:?}");
        // SAFETY: inside this tile.
        let start = unsafe { self.start.add(rows.start * self.stride + columns.start) };
        Tile { start, rows: rows.len(), columns: columns.len(), ..*self }
    }

    /// One row.
    pub(super) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: inside this tile, which is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.columns) }
    }
}
