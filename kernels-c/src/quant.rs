//! The weight formats, as `quant/all.h` lists them.

use std::ffi::CStr;
use std::fmt;

use crate::ffi;
pub use crate::ffi::Quant;

impl Quant {
    /// Every format of the list, by rising number.
    pub fn all() -> impl Iterator<Item = Quant> {
        (0..ffi::V4_N_QUANTS).filter_map(Quant::of_number)
    }

    /// The format with this type number in a GGUF file.
    pub fn from_gguf(number: u32) -> Option<Quant> {
        Quant::of_number(number).filter(|_| number < ffi::V4_OWN_QUANTS)
    }

    /// The format with this number in the list.
    fn of_number(number: u32) -> Option<Quant> {
        // SAFETY: any number may be asked for.
        let known = unsafe { !ffi::v4_quant_describe(number).is_null() };
        known.then_some(Quant(number))
    }

    /// The format with this name: `Q4_K`.
    pub fn from_name(name: &str) -> Option<Quant> {
        Quant::all().find(|quant| quant.name() == name)
    }

    /// Its line of `quant/all.h`.
    pub(crate) fn info(self) -> &'static ffi::v4_quant_info {
        // SAFETY: a `Quant` is only made of a number that the list has, and the list is static.
        unsafe { ffi::v4_quant_describe(self.0).as_ref() }.expect("a Quant is of the list")
    }

    /// Its number in the list: its type number in a GGUF file, where that has it.
    pub fn number(self) -> u32 {
        self.0
    }

    /// Its name: `Q4_K`.
    #[expect(clippy::missing_panics_doc, reason = "the names of the list are ASCII")]
    pub fn name(self) -> &'static str {
        // SAFETY: the names of the list are literals, ended by zero.
        let name = unsafe { CStr::from_ptr(self.info().name) };
        name.to_str().expect("the names of the list are ASCII")
    }

    /// Weights of a block.
    pub fn block_len(self) -> usize {
        self.info().block_len as usize
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.info().block_bytes as usize
    }

    /// Weights that share a scale once unpacked, 16 or 32; 0 for plain floats.
    pub fn group(self) -> usize {
        self.info().group as usize
    }

    /// Whether it is a block format; else it is a plain float.
    pub fn is_blocks(self) -> bool {
        self.group() != 0
    }

    /// Bytes of a row of `cols` weights; `None` if they are no whole number of blocks.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        let whole = cols.is_multiple_of(self.block_len());
        whole.then_some(cols / self.block_len())?.checked_mul(self.block_bytes())
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Weights as floats, exactly as the format defines them.
///
/// # Panics
/// If `blocks` are not exactly `out.len()` weights.
pub fn dequantize(quant: Quant, blocks: &[u8], out: &mut [f32]) {
    assert_eq!(quant.row_bytes(out.len()), Some(blocks.len()), "{quant}: {} weights", out.len());
    // SAFETY: the blocks hold out.len() weights of this format, as asserted.
    unsafe { ffi::v4_dequantize(quant.0, blocks.as_ptr().cast(), out.len(), out.as_mut_ptr()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Map;
    use std::path::Path;

    /// Reference values of the formats; tests/golden/README.md says where they come from.
    const GOLDEN: &str =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/dequant/gguf_types.safetensors");

    /// Just enough of safetensors for a file of our own: a length, a header of JSON, the data.
    struct Tensors(std::sync::Arc<Map>);

    impl Tensors {
        fn header(&self) -> (&str, &[u8]) {
            let (length, rest) = self.0.as_slice().split_at(8);
            let length = u64::from_le_bytes(length.try_into().unwrap());
            let (header, data) = rest.split_at(usize::try_from(length).unwrap());
            (std::str::from_utf8(header).unwrap(), data)
        }

        fn get(&self, name: &str) -> Option<&[u8]> {
            let (header, data) = self.header();
            let (_, entry) = header.split_once(&format!("\"{name}\":"))?;
            let (_, offsets) = entry.split_once("\"data_offsets\":[").unwrap();
            let (offsets, _) = offsets.split_once(']').unwrap();
            let (start, end) = offsets.split_once(',').unwrap();
            Some(&data[start.trim().parse().unwrap()..end.trim().parse().unwrap()])
        }
    }

    fn golden() -> Tensors {
        Tensors(Map::open(Path::new(GOLDEN)).expect("tests/golden is part of the repository"))
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect()
    }

    fn decoded(quant: Quant, blocks: &[u8]) -> Vec<f32> {
        let mut out = vec![0.0; blocks.len() / quant.block_bytes() * quant.block_len()];
        dequantize(quant, blocks, &mut out);
        out
    }

    #[test]
    fn the_list_answers_by_number_and_by_name() {
        assert_eq!(Quant::all().count(), 27);
        for quant in Quant::all() {
            let is_own = quant == Quant::F8_E4M3;
            assert_eq!(Quant::from_gguf(quant.number()), (!is_own).then_some(quant));
            assert_eq!(Quant::from_name(quant.name()), Some(quant));
        }
        assert_eq!(Quant::Q4_K.to_string(), "Q4_K");
        assert_eq!(Quant::from_gguf(9), None); // Q8_1 is made at run time, never stored
        assert_eq!(Quant::from_gguf(u32::MAX), None);
        assert_eq!(Quant::from_name("q4_k"), None);
        assert_eq!(Quant::Q6_K.row_bytes(512), Some(420));
        assert_eq!(Quant::Q6_K.row_bytes(500), None);
        assert_eq!(Quant::BF16.row_bytes(3), Some(6));
        assert_eq!(Quant::F32.row_bytes(usize::MAX), None);
    }

    #[test]
    fn the_bindings_are_of_the_compiled_c() {
        // SAFETY: it takes nothing and returns a number.
        assert_eq!(unsafe { ffi::v4_abi_version() }, ffi::V4_ABI_VERSION);
    }

    #[test]
    fn every_format_decodes_to_the_reference_values() {
        let golden = golden();
        let known = golden.header().0.matches(".raw\":").count();
        let mut seen = 0;
        // Those without a reference have tests of their own, below.
        let others = [Quant::F32, Quant::F8_E4M3];
        for quant in Quant::all().filter(|quant| !others.contains(quant)) {
            let raw = golden.get(&format!("{quant}.raw")).expect("every format has a reference");
            let wanted = floats(golden.get(&format!("{quant}.f32")).unwrap());
            // Copied, so that a sanitizer sees a read beyond the blocks.
            let got = decoded(quant, &Box::<[u8]>::from(raw));
            assert_eq!(got.len(), wanted.len(), "{quant}");
            for (i, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
                let same = got.to_bits() == wanted.to_bits() || got.is_nan() && wanted.is_nan();
                assert!(same, "{quant} weight {i}: {got:e}, the reference is {wanted:e}");
            }
            seen += 1;
        }
        assert_eq!(seen, known, "the reference has formats that the list lacks");
    }

    #[test]
    fn f32_is_as_it_lies() {
        assert_eq!(decoded(Quant::F32, &(-1.5f32).to_le_bytes()), [-1.5]);
    }

    /// The values of E2M1 by code, from its definition (OCP Microscaling Formats, 5.3.3).
    fn e2m1(code: u8) -> f64 {
        let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
        if code & 8 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, clippy::float_cmp, reason = "the values are exact")]
    fn mxfp4_is_right_for_every_scale_and_code() {
        for e in 0..=255u8 {
            let mut block = [0; 17];
            block[0] = e;
            for j in 0..16 {
                block[1 + usize::from(j)] = j | (15 - j) << 4;
            }
            let scale = (f64::from(e) - 127.0).exp2();
            for (i, got) in decoded(Quant::MXFP4, &block).into_iter().enumerate() {
                let code = u8::try_from(if i < 16 { i } else { 31 - i }).unwrap();
                assert_eq!(got, (e2m1(code) * scale) as f32, "scale {e}, code {code}");
            }
        }
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, clippy::float_cmp, reason = "the values are exact")]
    fn e4m3_is_right_for_every_code_on_every_isa() {
        let codes: Vec<u8> = (0..=255).collect();
        for (name, isa) in isas() {
            let mut got = [0.0; 256];
            let dequant_row = isa.dequant_row[Quant::F8_E4M3.number() as usize].unwrap();
            // SAFETY: there are 256 codes, and room for as many values.
            unsafe { dequant_row(codes.as_ptr().cast(), 256, got.as_mut_ptr()) };
            for (code, got) in codes.iter().zip(got) {
                let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
                let size = match exponent {
                    0 => mantissa / 512.0,
                    _ => (1.0 + mantissa / 8.0) * f64::from(exponent - 7).exp2(),
                };
                let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
                let is_nan = code & 0x7f == 0x7f;
                assert_eq!(got.is_nan(), is_nan, "{name} {code:#x}");
                assert!(is_nan || got == (sign * size) as f32, "{name} {code:#x}: {got}");
            }
        }
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, clippy::float_cmp, reason = "the values are exact")]
    fn nvfp4_is_right_for_every_scale_and_code() {
        for d in 0..=255u8 {
            let mut block = [0; 36];
            block[..4].fill(d);
            for group in 0..4 {
                for j in 0..8u8 {
                    block[4 + 8 * group + usize::from(j)] = j | (j + 8) << 4;
                }
            }
            let (exponent, mantissa) = (i32::from(d >> 3 & 15), f64::from(d & 7));
            let scale = match d {
                0x7f => 0.0,
                _ if exponent == 0 => mantissa / 512.0,
                _ => (1.0 + mantissa / 8.0) * f64::from(exponent - 7).exp2(),
            };
            for (i, got) in decoded(Quant::NVFP4, &block).into_iter().enumerate() {
                let code = u8::try_from(i % 16).unwrap();
                assert_eq!(got, (e2m1(code) * scale) as f32, "scale {d}, code {code}");
            }
        }
    }

    /// Bytes without a pattern, the same in each run.
    fn noise(n: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        };
        (0..n).map(|_| next()).collect()
    }

    /// The entries of cpu/all.h that this processor runs.
    fn isas() -> Vec<(String, ffi::v4_isa)> {
        let mut found = Vec::new();
        for i in 0.. {
            // SAFETY: any index may be asked for; names are literals.
            let name = unsafe { ffi::v4_isa_name(i) };
            if name.is_null() {
                return found;
            }
            let mut isa = std::mem::MaybeUninit::uninit();
            // SAFETY: `isa` has room for one, and is written when the answer is OK.
            if unsafe { ffi::v4_isa_open(i, isa.as_mut_ptr()) } == ffi::v4_status::OK {
                // SAFETY: see above.
                let (name, isa) = unsafe { (CStr::from_ptr(name), isa.assume_init()) };
                found.push((name.to_string_lossy().into_owned(), isa));
            }
        }
        found
    }

    #[test]
    fn every_slot_is_filled() {
        let n_floats = Quant::all().filter(|quant| !quant.is_blocks()).count();
        let n_unused = ffi::V4_N_QUANTS as usize - Quant::all().count();
        for (name, isa) in isas() {
            // What may be missing: numbers that no format has, and panels of plain floats.
            let missing = format!("{isa:?}").matches("None").count();
            assert_eq!(missing, 3 * n_unused + n_floats, "{name}: {isa:?}");
            for quant in Quant::all() {
                let i = quant.number() as usize;
                assert!(isa.dequant_row[i].is_some() && isa.gemv[i].is_some(), "{name} {quant}");
                assert_eq!(isa.panel[i].is_some(), quant.is_blocks(), "{name} {quant}");
            }
        }
    }

    /// `n` tokens of `n` values: token t is 127 at column t and 0 elsewhere. Quantised, that is
    /// exact, so a product with it is 127 times a column of the weights.
    struct Unit {
        x: Vec<f32>,
        q: Vec<i8>,
        d: Vec<f32>,
        sum: Vec<i16>,
        n: usize,
    }

    impl Unit {
        fn new(isa: &ffi::v4_isa, n: usize) -> Unit {
            let mut unit = Unit {
                x: vec![0.0; n * n],
                q: vec![1; n * n],
                d: vec![-1.0; n * n / 32],
                sum: vec![1; n * n / 16],
                n,
            };
            (0..n).for_each(|t| unit.x[t * n + t] = 127.0);
            let quantize = isa.quantize.unwrap();
            let (q, d, sum) = (unit.q.as_mut_ptr(), unit.d.as_mut_ptr(), unit.sum.as_mut_ptr());
            // SAFETY: each has what n tokens of n columns need, and n is a multiple of 32.
            unsafe { quantize(unit.x.as_ptr(), n * n, q, d, sum) };
            unit
        }

        fn act(&self, first: usize, n_tokens: usize) -> ffi::v4_act {
            let n = self.n;
            ffi::v4_act {
                x: self.x[first * n..].as_ptr(),
                q: self.q[first * n..].as_ptr(),
                d: self.d[first * n / 32..].as_ptr(),
                sum: self.sum[first * n / 16..].as_ptr(),
                n_tokens,
                cols: n,
            }
        }

        /// Products with `rows` rows of blocks, eight tokens at a time: `[n, rows]`.
        fn gemv(&self, isa: &ffi::v4_isa, quant: Quant, w: &[u8], rows: usize) -> Vec<f32> {
            let mut out = vec![f32::NAN; self.n * rows];
            let gemv = isa.gemv[quant.number() as usize].unwrap();
            for first in (0..self.n).step_by(8) {
                let (act, to) = (self.act(first, 8), out[first * rows..].as_mut_ptr());
                // SAFETY: w has `rows` rows of n weights; `to` has room for eight tokens.
                unsafe { gemv(w.as_ptr().cast(), w.len() / rows, rows, &raw const act, to, rows) };
            }
            out
        }

        /// The same by panels.
        fn gemm(&self, isa: &ffi::v4_isa, quant: Quant, w: &[u8], rows: usize) -> Vec<f32> {
            let row_bytes = w.len() / rows;
            let number = quant.number();
            let mut out = vec![f32::NAN; self.n * rows];
            let unpack = isa.panel[number as usize].unwrap();
            let gemm = isa.gemm_i8.unwrap();
            // SAFETY: the shape of a panel is all it takes.
            let size = unsafe { isa.panel_bytes.unwrap()(number, self.n) };
            let mut room = vec![0u8; size + ffi::V4_ALIGN as usize];
            let start = room.as_ptr().align_offset(ffi::V4_ALIGN as usize);
            let panel = room[start..].as_mut_ptr();
            for first in (0..rows).step_by(ffi::V4_PANEL_ROWS as usize) {
                let n_rows = (rows - first).min(ffi::V4_PANEL_ROWS as usize);
                let (from, act) = (w[first * row_bytes..].as_ptr(), self.act(0, self.n));
                // SAFETY: `from` has n_rows rows, the panel its size and alignment, `out` n tokens.
                unsafe {
                    unpack(from.cast(), row_bytes, n_rows, self.n, panel.cast());
                    let to = out[first..].as_mut_ptr();
                    gemm(number, panel.cast(), n_rows, &raw const act, to, rows);
                }
            }
            out
        }
    }

    /// Blocks of noise that hold no infinity or NaN, in an allocation that ends with them.
    fn finite_blocks(quant: Quant, n: usize) -> Box<[u8]> {
        let finite = |seed| {
            let block = noise(quant.block_bytes(), seed);
            let weights = decoded(quant, &block);
            weights.iter().all(|x| x.abs() < 1e30).then_some(block)
        };
        (1..).filter_map(finite).take(n).flatten().collect()
    }

    #[test]
    fn every_isa_decodes_to_the_same_bits() {
        const COLS: usize = 768;
        for (name, isa) in isas() {
            for quant in Quant::all() {
                let w = finite_blocks(quant, COLS / quant.block_len());
                let mut got = vec![f32::NAN; COLS];
                let dequant_row = isa.dequant_row[quant.number() as usize].unwrap();
                // SAFETY: w is a row of COLS weights, and got has room for them.
                unsafe { dequant_row(w.as_ptr().cast(), COLS, got.as_mut_ptr()) };
                let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&got), bits(&decoded(quant, &w)), "{name} {quant}");
            }
        }
    }

    /// To half precision and back by an entry's own functions.
    fn halves(isa: &ffi::v4_isa, x: &[f32]) -> (Vec<u16>, Vec<f32>) {
        let (mut half, mut back) = (vec![0; x.len()], vec![0.0; x.len()]);
        // SAFETY: all three have x.len() values.
        unsafe {
            isa.f16_from_f32.unwrap()(x.as_ptr(), x.len(), half.as_mut_ptr());
            isa.f32_from_f16.unwrap()(half.as_ptr(), x.len(), back.as_mut_ptr());
        }
        (half, back)
    }

    #[test]
    fn halves_round_to_nearest_even() {
        let exact: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = exact.iter().flat_map(|half| half.to_le_bytes()).collect();
        let values = decoded(Quant::F16, &bytes);
        for (name, isa) in isas() {
            let (half, back) = halves(&isa, &values);
            for (i, x) in values.iter().enumerate() {
                if x.is_nan() {
                    assert!(back[i].is_nan(), "{name} {:#x}", exact[i]);
                } else {
                    assert_eq!(half[i], exact[i], "{name}");
                    assert_eq!(back[i].to_bits(), x.to_bits(), "{name} {:#x}", exact[i]);
                }
            }
            // Halfway between two neighbours, and a little to either side; beyond 65504 is
            // infinity.
            for low in 0..0x7c00u16 {
                let next = if low == 0x7bff { 65536.0 } else { values[usize::from(low) + 1] };
                let middle = f32::midpoint(values[usize::from(low)], next);
                let (got, _) =
                    halves(&isa, &[middle.next_down(), middle, middle.next_up(), -middle]);
                let even = low + (low & 1);
                assert_eq!(got, [low, even, low + 1, even | 0x8000], "{name} {middle:e}");
            }
            let (got, _) = halves(&isa, &[f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, -0.0]);
            assert_eq!(got, [0x7c00, 0x7c00, 0, 0x8000], "{name}");
        }
    }

    #[test]
    fn products_see_every_weight_as_it_decodes() {
        const COLS: usize = 256;
        // A whole panel, part of another.
        const ROWS: usize = ffi::V4_PANEL_ROWS as usize + 3;
        for (name, isa) in isas() {
            let unit = Unit::new(&isa, COLS);
            for quant in Quant::all().filter(|quant| quant.is_blocks()) {
                let w = finite_blocks(quant, ROWS * COLS / quant.block_len());
                let wanted = decoded(quant, &w);
                let largest: Vec<f32> = wanted
                    .chunks(COLS)
                    .map(|row| row.iter().fold(0.0, |most, x| x.abs().max(most)))
                    .collect();
                let products = [unit.gemv(&isa, quant, &w, ROWS), unit.gemm(&isa, quant, &w, ROWS)];
                for (product, slot) in products.iter().zip(["gemv", "gemm_i8"]) {
                    for (i, got) in product.iter().enumerate() {
                        let (t, r) = (i / ROWS, i % ROWS);
                        let wanted = 127.0 * wanted[r * COLS + t];
                        // Scale x 127 q and minimum x 127 round where scale x q did not.
                        let error = (got - wanted).abs();
                        let allowed = 4.0 * f32::EPSILON * 127.0 * largest[r];
                        assert!(
                            error <= allowed,
                            "{name} {slot} {quant} row {r} column {t}: {got:e}, not {wanted:e}"
                        );
                    }
                }
            }
        }
    }
}
