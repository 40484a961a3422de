//! Binding: every field finds its tensor with the shape it needs, and every tensor finds a field.

use std::collections::{HashMap, HashSet};

use v4_kernels::{Buffer, Device, ExpertWeights, Matrix, Quant, quant};

use crate::Error;
use crate::arch::config::ROPE_FACTORS;
use crate::arch::decoder::Name;
use crate::format::{Format, Meta, Tensor};
use crate::layers::linear::Weight;

/// Tensors that are read elsewhere or that no computation needs, by the end of their name.
const IGNORED: &[&str] = &[
    // Read with the metadata.
    ROPE_FACTORS,
    // Written by old versions of transformers, computed here.
    ".rotary_emb.inv_freq",
    // The scale of a tensor's input, for products of FP4 by FP4; activations are int8 here.
    ".input_scale",
];

/// The scales of an FP8 weight's tiles, and how large those are where the metadata does not say
/// (DeepSeek-AI 2024, section 3.3).
const TILE_SCALES: &str = ".weight_scale_inv";
const TILE: [usize; 2] = [128, 128];
const TILE_KEY: &str = "quantization_config.weight_block_size";

/// Where a name has the number of an expert.
const EXPERT: &str = "[]";

/// The float types, whose rows may stand for a plain vector.
const FLOATS: [Quant; 3] = [Quant::F32, Quant::F16, Quant::BF16];

/// Hands tensors to fields and remembers which.
pub(crate) struct Binder<'a> {
    format: Format,
    /// Rows and columns of a tile that has a scale.
    tile: [usize; 2],
    tensors: HashMap<&'a str, &'a Tensor>,
    bound: HashSet<&'a str>,
    device: &'a mut dyn Device,
}

impl<'a> Binder<'a> {
    /// For the tensors of a file, whose vectors are put on `device`.
    pub fn new(
        format: Format,
        meta: &Meta,
        tensors: &'a [Tensor],
        device: &'a mut dyn Device,
    ) -> Self {
        let tile = match meta.i64s(TILE_KEY).as_deref() {
            Some(&[height, width]) => [height, width].map(|n| usize::try_from(n).unwrap_or(0)),
            _ => TILE,
        };
        let tensors = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        Self { format, tile, tensors, bound: HashSet::new(), device }
    }

    /// A name in this format.
    fn own<'n>(&self, name: &'n Name) -> &'n str {
        match self.format {
            Format::Gguf => name.gguf,
            Format::Safetensors => name.hf,
        }
    }

    fn full_name(&self, name: &Name, layer: usize, suffix: &str) -> String {
        format!("{}{suffix}", self.own(name).replace("{}", &layer.to_string()))
    }

    fn find(&mut self, name: &Name, layer: usize, suffix: &str) -> Option<&'a Tensor> {
        self.take(&self.full_name(name, layer, suffix))
    }

    fn take(&mut self, name: &str) -> Option<&'a Tensor> {
        let found = *self.tensors.get(name)?;
        self.bound.insert(found.name.as_str());
        Some(found)
    }

    fn need(&mut self, name: &Name, layer: usize, suffix: &str) -> Result<&'a Tensor, Error> {
        self.find(name, layer, suffix)
            .ok_or_else(|| Error::MissingTensor { name: self.full_name(name, layer, suffix) })
    }

    /// The rows of a field's weight: what metadata does not always say.
    pub fn rows(&mut self, name: &Name, layer: usize) -> Result<usize, Error> {
        let tensor = self.need(name, layer, ".weight")?;
        let rows = tensor.shape.first().copied().unwrap_or_default();
        usize::try_from(rows).map_err(|_| shape_error(tensor, &[]))
    }

    /// Whether a field's weight is there.
    pub fn has(&self, name: &Name, layer: usize) -> bool {
        self.tensors.contains_key(self.full_name(name, layer, ".weight").as_str())
    }

    /// Counts a field's weight as bound though nothing uses it.
    pub fn ignore(&mut self, name: &Name, layer: usize) {
        self.find(name, layer, ".weight");
    }

    /// A matrix `[rows, cols]`, with the scale of its tensor where the format has one.
    pub fn weight(
        &mut self,
        name: &Name,
        layer: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<Weight, Error> {
        let tensor = self.need(name, layer, ".weight")?;
        let matrix = matrix(tensor, rows, cols)?;
        let matrix = self.tiled(matrix, &self.full_name(name, layer, TILE_SCALES))?;
        let scale = match self.find(name, layer, ".scale") {
            Some(scale) => floats(scale, 1)?.first().copied().unwrap_or(1.0),
            None => 1.0,
        };
        Ok(Weight { matrix, bias: None, scale })
    }

    /// A matrix with the scales of its tiles, where there is a tensor of that name.
    fn tiled(&mut self, matrix: Matrix, name: &str) -> Result<Matrix, Error> {
        let Some(tensor) = self.take(name) else { return Ok(matrix) };
        let [height, width] = self.tile.map(|n| n.max(1));
        let n_tiles = [matrix.rows().div_ceil(height), matrix.cols().div_ceil(width)];
        let shape = n_tiles.map(|n| n as u64);
        let scales = floats_of(tensor, &shape)?;
        matrix.with_tiles([height, width], scales).ok_or_else(|| shape_error(tensor, &shape))
    }

    /// [`Binder::weight`] with a bias of `rows` values.
    pub fn biased_weight(
        &mut self,
        name: &Name,
        layer: usize,
        shape: [usize; 2],
    ) -> Result<Weight, Error> {
        let weight = self.weight(name, layer, shape)?;
        let bias = floats(self.need(name, layer, ".bias")?, shape[0])?;
        Ok(Weight { bias: Some(self.upload(&bias)?), ..weight })
    }

    /// A matrix `[rows, cols]` for each of `n` experts: one tensor `[n, rows, cols]`, or a tensor
    /// each where the name has a place for the expert's number.
    pub fn experts(
        &mut self,
        name: &Name,
        layer: usize,
        [n, rows, cols]: [usize; 3],
    ) -> Result<ExpertWeights, Error> {
        if self.own(name).contains(EXPERT) {
            return self.experts_apart(name, layer, [n, rows, cols]);
        }
        let tensor = self.need(name, layer, ".weight")?;
        let expected = [n as u64, rows as u64, cols as u64];
        let blocks = tensor.blocks();
        let matrix = |id: usize| {
            let n_bytes = blocks.len() / n;
            let bytes = blocks.slice(id * n_bytes..(id + 1) * n_bytes)?;
            Matrix::new(tensor.quant, rows, cols, bytes)
        };
        let matrices: Option<Vec<_>> = (0..n).map(matrix).collect();
        let matrices = matrices
            .filter(|_| tensor.shape == expected)
            .ok_or_else(|| shape_error(tensor, &expected))?;
        let scales = match self.find(name, layer, ".scale") {
            Some(scales) => floats(scales, n)?,
            None => vec![1.0; n],
        };
        Ok(ExpertWeights { matrices, bias: None, scales })
    }

    fn experts_apart(
        &mut self,
        name: &Name,
        layer: usize,
        [n, rows, cols]: [usize; 3],
    ) -> Result<ExpertWeights, Error> {
        let (mut matrices, mut scales) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for id in 0..n {
            let number = id.to_string();
            let of = |suffix: &str| self.full_name(name, layer, suffix).replace(EXPERT, &number);
            let (weight, scale, tiles) = (of(".weight"), of(".scale"), of(TILE_SCALES));
            let Some(tensor) = self.take(&weight) else {
                return Err(Error::MissingTensor { name: weight });
            };
            matrices.push(self.tiled(matrix(tensor, rows, cols)?, &tiles)?);
            scales.push(match self.take(&scale) {
                Some(scale) => floats(scale, 1)?.first().copied().unwrap_or(1.0),
                None => 1.0,
            });
        }
        if matrices.windows(2).any(|two| two[0].quant() != two[1].quant()) {
            let name = self.full_name(name, layer, ".weight");
            return Err(Error::unsupported(format!("experts of different types ({name})")));
        }
        Ok(ExpertWeights { matrices, bias: None, scales })
    }

    /// [`Binder::experts`] of one tensor, with a bias `[n, rows]`.
    pub fn biased_experts(
        &mut self,
        name: &Name,
        layer: usize,
        shape: [usize; 3],
    ) -> Result<ExpertWeights, Error> {
        let weights = self.experts(name, layer, shape)?;
        let tensor = self.need(name, layer, ".bias")?;
        let bias = floats_of(tensor, &[shape[0] as u64, shape[1] as u64])?;
        Ok(ExpertWeights { bias: Some(self.upload(&bias)?), ..weights })
    }

    /// A vector of `len` floats, with `offset` added to each.
    pub fn vector(
        &mut self,
        name: &Name,
        layer: usize,
        len: usize,
        offset: f32,
    ) -> Result<Buffer, Error> {
        let mut values = floats(self.need(name, layer, ".weight")?, len)?;
        for value in &mut values {
            *value += offset;
        }
        self.upload(&values)
    }

    fn upload(&mut self, values: &[f32]) -> Result<Buffer, Error> {
        let mut buffer = self.device.buffer(values.len())?;
        self.device.write(values, &mut buffer, 0)?;
        Ok(buffer)
    }

    /// Fails where a tensor was bound to nothing.
    pub fn finish(self) -> Result<(), Error> {
        let is_free = |name: &&&str| {
            !self.bound.contains(**name) && !IGNORED.iter().any(|end| name.ends_with(end))
        };
        match self.tensors.keys().filter(is_free).min() {
            Some(name) => Err(Error::UnboundTensor { name: (*name).to_owned() }),
            None => Ok(()),
        }
    }
}

/// The matrix of a tensor `[rows, cols]`.
fn matrix(tensor: &Tensor, rows: usize, cols: usize) -> Result<Matrix, Error> {
    let expected = [rows as u64, cols as u64];
    if tensor.shape != expected {
        return Err(shape_error(tensor, &expected));
    }
    Matrix::new(tensor.quant, rows, cols, tensor.blocks())
        .ok_or_else(|| shape_error(tensor, &expected))
}

/// The values of a vector of `len` floats. A scalar is a vector of one.
pub(crate) fn floats(tensor: &Tensor, len: usize) -> Result<Vec<f32>, Error> {
    let is_scalar = len == 1 && tensor.shape.is_empty();
    let shape = [len as u64];
    floats_of(tensor, if is_scalar { &[] } else { &shape })
}

/// The values of a tensor of floats of this shape.
#[expect(clippy::cast_possible_truncation, reason = "the tensor's bytes are in memory")]
fn floats_of(tensor: &Tensor, shape: &[u64]) -> Result<Vec<f32>, Error> {
    if tensor.shape != shape || !FLOATS.contains(&tensor.quant) {
        return Err(shape_error(tensor, shape));
    }
    let mut values = vec![0.0; shape.iter().product::<u64>() as usize];
    quant::dequantize(tensor.quant, tensor.bytes.as_slice(), &mut values);
    Ok(values)
}

fn shape_error(tensor: &Tensor, expected: &[u64]) -> Error {
    Error::TensorShape {
        name: tensor.name.clone(),
        found: format!("{:?} of {}", tensor.shape, tensor.quant),
        expected: expected.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use v4_kernels::cpu::CpuOptions;
    use v4_kernels::{Bytes, Cpu};

    use super::*;
    use crate::format::{Array, Value};

    const NAME: Name = Name { gguf: "w", hf: "layers.{}.w" };

    fn tensor(name: &str, quant: Quant, shape: &[u64], bytes: Vec<u8>) -> Tensor {
        let bytes = Bytes::from_vec(bytes);
        Tensor { name: name.to_owned(), quant, shape: shape.to_vec(), bytes, scales: None }
    }

    /// An FP8 weight of ones `[rows, cols]`, and scales that count its tiles from 1.
    fn fp8([rows, cols]: [u64; 2], tiles: [u64; 2]) -> Vec<Tensor> {
        const ONE: u8 = 0x38;
        let n = usize::try_from(rows * cols).expect("small");
        // Upper halves of floats.
        let scales = (1..=tiles[0] * tiles[1]).map(|n| n as f32);
        let scales = scales.flat_map(|x| [x.to_le_bytes()[2], x.to_le_bytes()[3]]).collect();
        vec![
            tensor("layers.3.w.weight", Quant::F8_E4M3, &[rows, cols], vec![ONE; n]),
            tensor("layers.3.w.weight_scale_inv", Quant::BF16, &tiles, scales),
        ]
    }

    /// The first row and the last.
    fn ends(meta: &Meta, tensors: &[Tensor], shape: [usize; 2]) -> Result<[Vec<f32>; 2], Error> {
        let options = CpuOptions { threads: 1, ..CpuOptions::default() };
        let mut cpu = Cpu::open(&options).expect("a processor");
        let mut binder = Binder::new(Format::Safetensors, meta, tensors, &mut cpu);
        let weight = binder.weight(&NAME, 3, shape)?;
        binder.finish()?;
        let [rows, cols] = shape;
        let mut out = cpu.buffer(2 * cols)?;
        let last = u32::try_from(rows - 1).expect("small");
        cpu.embed(&weight.matrix, &[0, last], 1.0, &mut out)?;
        let mut values = vec![0.0; 2 * cols];
        cpu.read(&out, 0, &mut values)?;
        let second = values.split_off(cols);
        Ok([values, second])
    }

    #[test]
    fn an_fp8_weight_has_the_scales_of_its_tiles() {
        let meta = Meta::default();
        let [first, last] = ends(&meta, &fp8([130, 160], [2, 2]), [130, 160]).expect("bound");
        assert_eq!((first[0], first[127], first[128], first[159]), (1.0, 1.0, 2.0, 2.0));
        assert_eq!((last[0], last[127], last[128], last[159]), (3.0, 3.0, 4.0, 4.0));

        let mut meta = Meta::default();
        meta.insert(TILE_KEY, Value::Array(Array::U64(vec![65, 160])));
        let [first, last] = ends(&meta, &fp8([130, 160], [2, 1]), [130, 160]).expect("bound");
        assert_eq!((first[159], last[0]), (1.0, 2.0));
    }

    #[test]
    fn scales_that_do_not_fit_are_refused_by_name() {
        let meta = Meta::default();
        let refused = |tensors: &[Tensor]| {
            ends(&meta, tensors, [130, 160]).expect_err("does not fit").to_string()
        };
        assert!(refused(&fp8([130, 160], [1, 2])).contains("w.weight_scale_inv"));
        let mut blocks = fp8([130, 160], [2, 2]);
        blocks[0].quant = Quant::Q8_0;
        blocks[0].bytes = Bytes::from_vec(vec![0; 130 * 5 * 34]);
        assert!(refused(&blocks).contains("w.weight_scale_inv"));
        let scales_alone = &fp8([130, 160], [2, 2])[1..];
        assert!(refused(scales_alone).contains("layers.3.w.weight"));
    }
}
