//! A model on a device: rows of tokens in, logits out.

use v4_kernels::{Device, KvCache, KvShape, KvType, Span};
use v4_proto::frame::Stage;
use v4_proto::{ModelFiles, ModelInfo};

use crate::arch::config::DecoderConfig;
use crate::arch::decoder::{Cost, Decoder, Rows, Scratch};
use crate::format::{self, File, Meta, Tensor};
use crate::layers::attention::Place;
use crate::weights::Binder;
use crate::{Error, arch, inspect};

/// Rows of one pass through the layers: enough that weights are read once for many rows, few enough
/// that activations stay in the cache. Longer batches take several passes.
pub const PASS_ROWS: usize = 512;

/// Bytes of weights that are brought into memory between two reports of progress.
const POPULATE_BYTES: usize = 32 << 20;

/// Rows of one or several sequences to run. Row `i` of a span holds the position `i` after the
/// span's first.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// A token a row, below [`Model::vocabulary`].
    pub tokens: &'a [u32],
    /// Its position in its sequence.
    pub positions: &'a [u32],
    /// The slot of the KV cache that takes its key and value: block * block tokens + offset.
    pub slots: &'a [u32],
    /// Which rows are whose. Spans cover all rows in order.
    pub spans: &'a [Span<'a>],
    /// The rows whose logits are wanted, ascending.
    pub logit_rows: &'a [u32],
}

/// A model, ready to run.
pub struct Model {
    device: Box<dyn Device>,
    decoder: Decoder,
    scratch: Scratch,
    meta: Meta,
    info: ModelInfo,
    kv_type: KvType,
}

impl Model {
    /// Reads a model's files and binds them to `device`. Weights stay in the files, which are
    /// mapped; `progress` hears how many bytes of them are in memory, of how many.
    ///
    /// # Errors
    /// [`Error`], naming what is wrong with the files.
    pub fn open(
        files: &ModelFiles,
        device: Box<dyn Device>,
        progress: &mut dyn FnMut(Stage, u64, u64),
    ) -> Result<Self, Error> {
        progress(Stage::Header, 0, 1);
        let file = format::read(files)?;
        let model = Self::new(&file, device)?;
        progress(Stage::Header, 1, 1);
        populate(&file, progress)?;
        Ok(model)
    }

    /// A model of tensors that are in memory or mapped.
    ///
    /// # Errors
    /// [`Error`], naming what is wrong with the file.
    pub fn new(file: &File, mut device: Box<dyn Device>) -> Result<Self, Error> {
        let (arch, config) = arch::resolve(file)?;
        let tensors = arch.tensors(file)?;
        let mut binder = Binder::new(file.format, &file.meta, &tensors, &mut *device);
        let decoder = Decoder::bind(config, &arch.names, &mut binder)?;
        binder.finish()?;
        let scratch = decoder.scratch(&*device, PASS_ROWS)?;
        let info = inspect::info(file)?;
        let kv_type = KvType::default();
        Ok(Self { device, decoder, scratch, meta: file.meta.clone(), info, kv_type })
    }

    /// The same with keys and values kept as `kv_type`, not in half precision.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when its heads are not whole groups of the type.
    pub fn with_kv_type(self, kv_type: KvType) -> Result<Self, Error> {
        let head_dim = self.config().head_dim;
        if head_dim.is_multiple_of(kv_type.group()) {
            return Ok(Self { kv_type, ..self });
        }
        let kind = kv_type.name();
        Err(Error::unsupported(format!("{kind} keys and values of heads {head_dim} wide")))
    }

    /// The numbers of the model.
    pub fn config(&self) -> &DecoderConfig {
        self.decoder.config()
    }

    /// The figures that others need.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The files' metadata.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Tokens the model knows: the width of a row of logits.
    pub fn vocabulary(&self) -> usize {
        self.decoder.vocabulary()
    }

    /// What a token costs.
    pub fn cost(&self) -> Cost {
        self.decoder.cost()
    }

    /// The shape of its KV cache.
    pub fn kv_shape(&self) -> KvShape {
        KvShape { kv_type: self.kv_type, ..self.config().kv_shape() }
    }

    /// Bytes of keys and values for a token over all layers.
    pub fn kv_bytes_per_token(&self) -> u64 {
        KvShape { block_tokens: 1, ..self.kv_shape() }.block_bytes() as u64
    }

    /// Bytes that activations take while it runs.
    pub fn scratch_bytes(&self) -> u64 {
        self.scratch.bytes() as u64
    }

    /// The device it is on.
    pub fn device_mut(&mut self) -> &mut dyn Device {
        &mut *self.device
    }

    /// Runs a batch: stores its keys and values in `kv` and makes `logits` those of
    /// [`Batch::logit_rows`], `[rows, vocabulary]`.
    ///
    /// # Errors
    /// What the device fails at.
    ///
    /// # Panics
    /// When the parts of the batch do not fit together or a token is beyond the vocabulary: our own
    /// mistake.
    pub fn forward(
        &mut self,
        kv: &mut KvCache,
        batch: &Batch<'_>,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        batch.check(self.vocabulary());
        logits.clear();
        let mut pass = Pass::default();
        while pass.next(batch) {
            let range = pass.first..pass.end;
            let rows = Rows {
                tokens: &batch.tokens[range.clone()],
                place: Place {
                    positions: &batch.positions[range.clone()],
                    slots: &batch.slots[range],
                    spans: &pass.spans,
                },
                wanted: &pass.logit_rows,
            };
            self.decoder.forward(&mut *self.device, kv, (rows, &mut self.scratch), logits)?;
        }
        Ok(())
    }
}

/// One sequence that has a model to itself: what measurements and comparisons need, without the
/// engine's loop.
pub struct Alone<'a> {
    model: &'a mut Model,
    kv: KvCache,
    blocks: Vec<u32>,
    kv_len: usize,
}

impl<'a> Alone<'a> {
    /// With room for `context` tokens.
    ///
    /// # Errors
    /// What the device fails at.
    ///
    /// # Panics
    /// Beyond 32 bits of blocks.
    pub fn new(model: &'a mut Model, context: usize) -> Result<Self, Error> {
        let shape = model.kv_shape();
        let n_blocks = context.div_ceil(shape.block_tokens);
        let kv = model.device_mut().kv_cache(shape, n_blocks)?;
        let blocks = (0..u32::try_from(n_blocks).expect("blocks are counted in 32 bits")).collect();
        Ok(Self { model, kv, blocks, kv_len: 0 })
    }

    /// Runs the next tokens of the sequence in one batch, and makes `logits` those of `logit_rows`,
    /// counted from the first of `tokens`.
    ///
    /// # Errors
    /// What the device fails at.
    ///
    /// # Panics
    /// Beyond the context, or when a token is beyond the vocabulary.
    pub fn feed(
        &mut self,
        tokens: &[u32],
        logit_rows: &[u32],
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let first = self.kv_len;
        self.kv_len += tokens.len();
        let position = |n| u32::try_from(n).expect("positions are counted in 32 bits");
        let positions: Vec<u32> = (first..self.kv_len).map(position).collect();
        let span =
            Span { first_row: 0, n_rows: tokens.len(), kv_len: self.kv_len, blocks: &self.blocks };
        // The blocks are in order, so a position is its own slot.
        let batch =
            Batch { tokens, positions: &positions, slots: &positions, spans: &[span], logit_rows };
        self.model.forward(&mut self.kv, &batch, logits)
    }

    /// Forgets all but the first `kv_len` tokens.
    pub fn rewind(&mut self, kv_len: usize) {
        self.kv_len = self.kv_len.min(kv_len);
    }
}

impl Batch<'_> {
    fn check(&self, vocabulary: usize) {
        let n = self.tokens.len();
        assert!(self.positions.len() == n && self.slots.len() == n, "a position and a slot a row");
        assert!(
            self.tokens.iter().all(|&id| (id as usize) < vocabulary),
            "a token beyond the vocabulary"
        );
        assert!(self.logit_rows.is_sorted_by(|a, b| a < b), "logit rows ascend");
        assert!(
            self.logit_rows.last().is_none_or(|&row| (row as usize) < n),
            "a logit row of the batch"
        );
        let end = self.spans.iter().fold(0, |end, span| {
            assert!(span.first_row == end && span.kv_len >= span.n_rows, "spans follow each other");
            end + span.n_rows
        });
        assert_eq!(end, n, "spans cover all rows");
    }
}

/// The part of a batch that goes through the layers together.
#[derive(Default)]
struct Pass<'a> {
    first: usize,
    end: usize,
    spans: Vec<Span<'a>>,
    logit_rows: Vec<u32>,
    logits_done: usize,
}

impl<'a> Pass<'a> {
    /// Goes on to the next part; false when there is none.
    fn next(&mut self, batch: &Batch<'a>) -> bool {
        self.first = self.end;
        let wanted = &batch.logit_rows[self.logits_done..];
        self.end = batch.tokens.len().min(self.first + PASS_ROWS);
        let n_logits = wanted.partition_point(|&row| (row as usize) < self.end);
        self.logits_done += n_logits;
        self.logit_rows.clear();
        let local =
            |row: &u32| *row - u32::try_from(self.first).expect("rows are counted in 32 bits");
        self.logit_rows.extend(wanted[..n_logits].iter().map(local));
        self.spans.clear();
        self.spans.extend(batch.spans.iter().filter_map(|span| cut(span, self.first, self.end)));
        self.end > self.first
    }
}

/// The part of a span within rows `first..end`, its rows counted from `first`.
fn cut<'a>(span: &Span<'a>, first: usize, end: usize) -> Option<Span<'a>> {
    let its_end = span.first_row + span.n_rows;
    let from = span.first_row.max(first);
    let to = its_end.min(end);
    (from < to).then(|| Span {
        first_row: from - first,
        n_rows: to - from,
        kv_len: span.kv_len - (its_end - to),
        blocks: span.blocks,
    })
}

/// Brings all weights into memory, so that the first answer does not wait for the disk.
fn populate(file: &File, progress: &mut dyn FnMut(Stage, u64, u64)) -> Result<(), Error> {
    // Those that were put together are in memory of our own already.
    let tensors = || file.tensors.iter().filter(|tensor| tensor.scales.is_none());
    let total: u64 = tensors().map(Tensor::n_bytes).sum();
    let mut done = 0;
    progress(Stage::Weights, done, total);
    for Tensor { bytes, .. } in tensors() {
        for start in (0..bytes.len()).step_by(POPULATE_BYTES) {
            let end = bytes.len().min(start + POPULATE_BYTES);
            let part = bytes.slice(start..end).expect("the range is cut to the tensor");
            part.populate().map_err(|source| Error::Read { source })?;
            done += part.len() as u64;
            progress(Stage::Weights, done, total);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_cut_where_a_pass_is_full() {
        let n = PASS_ROWS + 88;
        let rows: Vec<u32> = (0..600).collect();
        let blocks = [0; 10];
        let spans = [
            Span { first_row: 0, n_rows: 500, kv_len: 500, blocks: &blocks },
            Span { first_row: 500, n_rows: 100, kv_len: 130, blocks: &blocks },
        ];
        let batch = Batch {
            tokens: &rows,
            positions: &rows,
            slots: &rows,
            spans: &spans,
            logit_rows: &[499, 599],
        };
        batch.check(n);
        let mut pass = Pass::default();
        assert!(pass.next(&batch));
        assert_eq!((pass.first, pass.end, pass.logit_rows.as_slice()), (0, 512, &[499][..]));
        let lens = |pass: &Pass<'_>| -> Vec<_> {
            pass.spans.iter().map(|s| (s.first_row, s.n_rows, s.kv_len)).collect()
        };
        assert_eq!(lens(&pass), [(0, 500, 500), (500, 12, 42)]);
        assert!(pass.next(&batch));
        assert_eq!((pass.first, pass.end, pass.logit_rows.as_slice()), (512, 600, &[87][..]));
        assert_eq!(lens(&pass), [(0, 88, 130)]);
        assert!(!pass.next(&batch));
    }
}
