//! A feed-forward that is a mixture of experts (Shazeer et al. 2017).

use v4_kernels::{Buffer, Device, Experts, Input, Router, Routing};

use super::linear::Weight;
use crate::Error;

/// The experts that a token's logits choose, each with its weight.
#[derive(Debug)]
pub(crate) struct Moe {
    /// `[experts, embedding]`.
    pub router: Weight,
    /// How they are chosen.
    pub choice: Router,
    /// All of them.
    pub experts: Experts,
}

/// Room for a mixture.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// `[rows, experts]`.
    pub logits: Buffer,
    /// Who goes where.
    pub routing: Routing,
}

impl Moe {
    /// From `x` to `out`, both `[rows, embedding]`.
    pub fn apply(
        &self,
        device: &mut dyn Device,
        (x, rows): (&Buffer, usize),
        scratch: &mut Scratch,
        out: &mut Buffer,
    ) -> Result<(), Error> {
        let Scratch { logits, routing } = scratch;
        device.linear(Input::Plain(x), rows, &mut [self.router.part(logits)])?;
        device.route(&self.choice, logits, rows, routing)?;
        device.experts(&self.experts, x, rows, routing, out)?;
        Ok(())
    }
}
