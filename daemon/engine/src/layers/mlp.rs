//! The gated feed-forward (Shazeer 2020).

use v4_kernels::{Activation, Activations, Device, GateUp, Input};

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

impl Mlp {
    /// All but the last product, which reads `out`.
    pub fn gate_up(
        &self,
        device: &mut dyn Device,
        (input, rows): (Input<'_>, usize),
        out: &mut Activations,
    ) -> Result<(), Error> {
        let weights = GateUp {
            gate: self.gate.lent(),
            up: self.up.lent(),
            activation: self.activation,
            reader: &self.down.matrix,
        };
        Ok(device.gate_up(input, rows, &weights, out)?)
    }
}
