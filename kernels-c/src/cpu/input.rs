//! The input of products: as it is or normed, and quantised where the weights are blocks.

use super::isa::{ACT_GROUP, Acts, Isa, SUM_GROUP};
use super::memory::Spread;
use crate::device::{Buffer, Input, Matrix, RmsNorm};
use crate::pool::Pool;

/// Activations made ready by one thread: beneath, waking another costs more.
const ALONE: usize = 16 << 10;

/// Rows of whole numbers, as `quantize` of v4.h makes them.
#[derive(Debug, Default)]
pub(super) struct Quantized {
    pub(super) q: Vec<i8>,
    pub(super) d: Vec<f32>,
    pub(super) sum: Vec<i16>,
}

impl Quantized {
    /// Room for `n` values, or for none.
    pub(super) fn resize(&mut self, n: usize, is_wanted: bool) {
        let n = if is_wanted { n } else { 0 };
        assert!(n.is_multiple_of(ACT_GROUP), "whole groups");
        self.q.resize(n, 0);
        self.d.resize(n / ACT_GROUP, 0.0);
        self.sum.resize(n / SUM_GROUP, 0);
    }

    /// For shares that write to parts of it.
    pub(super) fn spread(&mut self) -> QuantizedSpread<'_> {
        QuantizedSpread {
            q: Spread::new(&mut self.q),
            d: Spread::new(&mut self.d),
            sum: Spread::new(&mut self.sum),
        }
    }
}

/// A [`Quantized`] that the shares of a job fill.
pub(super) struct QuantizedSpread<'a> {
    q: Spread<'a, i8>,
    d: Spread<'a, f32>,
    sum: Spread<'a, i16>,
}

impl QuantizedSpread<'_> {
    /// Quantises `x`, whole groups, to where value `from` is.
    ///
    /// # Safety
    /// Nothing else refers to these values.
    pub(super) unsafe fn quantize(&self, isa: &Isa, x: &[f32], from: usize) {
        let range = |group: usize| from / group..(from + x.len()) / group;
        // SAFETY: as the caller promises; both ends are whole groups.
        let (q, d, sum) = unsafe {
            (self.q.part(range(1)), self.d.part(range(ACT_GROUP)), self.sum.part(range(SUM_GROUP)))
        };
        isa.quantize(x, q, d, sum);
    }
}

/// Rows in one of both forms.
#[derive(Debug, Default)]
pub struct HostActivations {
    cols: usize,
    pub(super) x: Vec<f32>,
    pub(super) quantized: Quantized,
}

impl HostActivations {
    /// Room for `rows` rows of `cols` values in the form that products with `reader` read.
    pub(super) fn resize(&mut self, isa: &Isa, [rows, cols]: [usize; 2], reader: &Matrix) {
        let is_whole = isa.takes_whole(reader.quant());
        self.cols = cols;
        self.quantized.resize(rows * cols, is_whole);
        self.x.resize(if is_whole { 0 } else { rows * cols }, 0.0);
    }

    pub(super) fn acts(&self) -> Acts<'_> {
        let Quantized { q, d, sum } = &self.quantized;
        Acts { cols: self.cols, x: &self.x, q, d, sum }
    }
}

/// The forms that the weights of some products read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Forms {
    pub(super) floats: bool,
    pub(super) whole: bool,
}

impl Forms {
    pub(super) fn of<'a>(isa: &Isa, matrices: impl IntoIterator<Item = &'a Matrix>) -> Self {
        let mut forms = Self { floats: false, whole: false };
        for matrix in matrices {
            let is_whole = isa.takes_whole(matrix.quant());
            forms.whole |= is_whole;
            forms.floats |= !is_whole;
        }
        forms
    }
}

/// What is made of inputs, kept between calls for its memory.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    normed: Vec<f32>,
    quantized: Quantized,
}

impl Inputs {
    /// `rows` rows of `cols` values in the forms wanted, in one job at most.
    pub(super) fn prepare<'a>(
        &'a mut self,
        (isa, pool): (&Isa, &mut Pool),
        input: Input<'a>,
        [rows, cols]: [usize; 2],
        forms: Forms,
    ) -> Acts<'a> {
        let (x, norm) = match input {
            Input::Ready(activations) => {
                let acts = activations.0.acts();
                assert_eq!((acts.rows(), acts.cols), (rows, cols), "rows made for this product");
                return acts;
            }
            Input::Plain(Buffer::Host(x)) => (&x.floats()[..rows * cols], None),
            Input::Normed(Buffer::Host(x), norm) => (&x.floats()[..rows * cols], Some(norm)),
        };
        self.quantized.resize(x.len(), forms.whole);
        self.normed.resize(if norm.is_some() && forms.floats { x.len() } else { 0 }, 0.0);
        if norm.is_some() || forms.whole {
            self.fill((isa, pool), x, (norm, cols), forms);
        }
        let Quantized { q, d, sum } = &self.quantized;
        Acts { cols, x: if norm.is_some() { &self.normed } else { x }, q, d, sum }
    }

    fn fill(
        &mut self,
        (isa, pool): (&Isa, &mut Pool),
        x: &[f32],
        (norm, cols): (Option<&RmsNorm>, usize),
        forms: Forms,
    ) {
        let (normed, quantized) = (Spread::new(&mut self.normed), self.quantized.spread());
        let step = if x.len() <= ALONE { x.len() } else { (ALONE / 2 / cols).max(1) * cols };
        pool.run(x.len().div_ceil(step.max(1)), &|share, scratch| {
            let last = x.len().min((share + 1) * step);
            for from in (share * step..last).step_by(cols) {
                let row = from..from + cols;
                let mut x = &x[row.clone()];
                if let Some(RmsNorm { weight: Buffer::Host(weight), eps }) = norm {
                    let out = if forms.floats {
                        // SAFETY: shares are disjoint.
                        unsafe { normed.part(row) }
                    } else {
                        scratch.floats(cols)
                    };
                    isa.rms_norm(x, weight.floats(), *eps, out);
                    x = out;
                }
                if forms.whole {
                    // SAFETY: shares are disjoint.
                    unsafe { quantized.quantize(isa, x, from) };
                }
            }
        });
    }
}
