//! A weight matrix with what belongs to it.

use v4_kernels::{Buffer, Linear, Matrix};

/// `x W^T * scale + bias`.
#[derive(Debug)]
pub(crate) struct Weight {
    /// `[out width, in width]`, in the file's own blocks.
    pub matrix: Matrix,
    /// `[out width]`.
    pub bias: Option<Buffer>,
    /// Of the whole tensor, where its format has one.
    pub scale: f32,
}

impl Weight {
    /// Weights of the matrix.
    pub fn n_weights(&self) -> u64 {
        (self.matrix.rows() * self.matrix.cols()) as u64
    }

    /// As a device takes it.
    pub fn lent(&self) -> v4_kernels::Weight<'_> {
        v4_kernels::Weight { matrix: &self.matrix, bias: self.bias.as_ref(), scale: self.scale }
    }

    /// This product as a part of [`v4_kernels::Device::linear`].
    pub fn part<'a>(&'a self, out: &'a mut Buffer) -> Linear<'a> {
        Linear { weight: self.lent(), out, is_added: false }
    }

    /// The same, added to what is in `out`.
    pub fn added_to<'a>(&'a self, out: &'a mut Buffer) -> Linear<'a> {
        Linear { is_added: true, ..self.part(out) }
    }
}
