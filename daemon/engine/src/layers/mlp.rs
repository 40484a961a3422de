//! The gated feed-forward (Shazeer 2020).

use v4_kernels::{Activation, Buffer, Device};

use super::linear::Weight;
use crate::Error;

/// `down(activation(gate(x)) * up(x))`.
#[derive(Debug)]
pub(crate) struct Mlp {
    /// `[feed forward, embedding]`.
    pub gate: Weight,
    /// `[feed forward, embedding]`.
    pub up: Weight,
    /// `[embedding, feed forward]`.
    pub down: Weight,
    /// Of the gate.
    pub activation: Activation,
}

/// Room for a feed-forward: `[rows, feed forward]` each.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// The gate, then the product.
    pub gate: Buffer,
    /// The other factor.
    pub up: Buffer,
}

impl Mlp {
    /// From `x` to `out`, both `[rows, embedding]`.
    pub fn apply(
        &self,
        device: &mut dyn Device,
        (x, rows): (&Buffer, usize),
        scratch: &mut Scratch,
        out: &mut Buffer,
    ) -> Result<(), Error> {
        let width = self.gate.matrix.rows();
        let mut parts = [self.gate.part(&mut scratch.gate), self.up.part(&mut scratch.up)];
        device.linear(x, rows, &mut parts)?;
        device.gated(self.activation, &mut scratch.gate, &scratch.up, rows * width)?;
        device.linear(&scratch.gate, rows, &mut [self.down.part(out)])?;
        Ok(())
    }
}
