//! Root mean square norm (Zhang and Sennrich 2019).

use v4_kernels::{Buffer, Device};

use crate::Error;

/// `x / sqrt(mean(x^2) + eps) * weight` for each row as wide as the weight.
#[derive(Debug)]
pub(crate) struct Norm {
    /// `[width]`.
    pub weight: Buffer,
    /// Added to the mean square.
    pub eps: f32,
}

impl Norm {
    /// From `x` to `out`, both `[rows, width]`.
    pub fn apply(
        &self,
        device: &mut dyn Device,
        x: &Buffer,
        rows: usize,
        out: &mut Buffer,
    ) -> Result<(), Error> {
        Ok(device.rms_norm(x, rows, &self.weight, self.eps, out)?)
    }

    /// In place.
    pub fn apply_inplace(
        &self,
        device: &mut dyn Device,
        x: &mut Buffer,
        rows: usize,
    ) -> Result<(), Error> {
        Ok(device.rms_norm_inplace(x, rows, &self.weight, self.eps)?)
    }
}
