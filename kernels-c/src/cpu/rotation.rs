//! Rotary embeddings.

use super::memory::Spread;
use super::{Cpu, SHARE_FLOATS};
use crate::device::{Buffer, Rope};

/// Tables of angles kept: a model has one or two ropes, and all its layers turn the same positions.
const TABLES: usize = 4;

/// Sines and cosines for some positions.
#[derive(Debug)]
struct Table {
    inv_freq: Vec<f32>,
    magnitude: f32,
    positions: Vec<u32>,
    /// `[positions][inv_freq]`
    cos: Vec<f32>,
    /// `[positions][inv_freq]`
    sin: Vec<f32>,
}

/// The last tables, latest first.
#[derive(Debug, Default)]
pub(super) struct Angles(Vec<Table>);

impl Angles {
    fn table(&mut self, rope: &Rope, positions: &[u32]) -> &Table {
        let same = |table: &Table| {
            table.positions == positions
                && table.magnitude.to_bits() == rope.magnitude.to_bits()
                && table.inv_freq == rope.inv_freq
        };
        if let Some(index) = self.0.iter().position(same) {
            self.0[..=index].rotate_right(1);
        } else {
            self.0.truncate(TABLES - 1);
            self.0.insert(0, Table::new(rope, positions));
        }
        &self.0[0]
    }
}

impl Table {
    fn new(rope: &Rope, positions: &[u32]) -> Self {
        let angle = |position: &u32| {
            let position = *position as f32;
            rope.inv_freq.iter().map(move |inv_freq| (position * inv_freq).sin_cos())
        };
        let (mut sin, mut cos): (Vec<f32>, Vec<f32>) = positions.iter().flat_map(angle).unzip();
        sin.iter_mut().chain(&mut cos).for_each(|value| *value *= rope.magnitude);
        Self {
            inv_freq: rope.inv_freq.clone(),
            magnitude: rope.magnitude,
            positions: positions.to_vec(),
            cos,
            sin,
        }
    }
}

impl Cpu {
    /// See [`crate::Device::rope`].
    pub(super) fn rotate(
        &mut self,
        rope: &Rope,
        x: &mut Buffer,
        (n_heads, head_dim): (usize, usize),
        positions: &[u32],
    ) {
        let Buffer::Host(x) = x;
        let width = n_heads * head_dim;
        let x = Spread::new(&mut x.floats_mut()[..positions.len() * width]);
        let table = self.angles.table(rope, positions);
        let (isa, n_pairs) = (&self.isa, rope.inv_freq.len());
        let step = (SHARE_FLOATS / width).max(1);
        self.pool.run(positions.len().div_ceil(step), &|share, _| {
            for row in share * step..positions.len().min((share + 1) * step) {
                // SAFETY: shares are disjoint.
                let x = unsafe { x.part(row * width..(row + 1) * width) };
                let angles = row * n_pairs..(row + 1) * n_pairs;
                let angles = (&table.cos[angles.clone()], &table.sin[angles]);
                isa.rope(rope.kind, x, head_dim, angles);
            }
        });
    }
}
