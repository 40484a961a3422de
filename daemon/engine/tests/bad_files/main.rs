//! Files that are no good model: each is refused with one clear sentence, none brings the process
//! down.

use std::path::{Path, PathBuf};

use v4_engine::format::gguf;
use v4_engine::inspect;
use v4_engine::model::{Alone, Model};
use v4_kernels::cpu::CpuOptions;
use v4_kernels::{Bytes, Cpu, Map};
use v4_proto::{Code, Fault, ModelFiles};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/gguf").join(name)
}

/// A file of this test's own.
#[expect(clippy::disallowed_methods, reason = "tests make the files that they try")]
fn written(name: &str, bytes: &[u8]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bad_files").join(name);
    std::fs::create_dir_all(&folder).expect("a folder");
    let path = folder.join("file");
    std::fs::write(&path, bytes).expect("a file");
    path
}

fn files(path: &Path) -> ModelFiles {
    ModelFiles { weights: vec![path.to_owned()], ..ModelFiles::default() }
}

fn device() -> Box<Cpu> {
    Box::new(
        Cpu::open(&CpuOptions { threads: 1, isa: None, ..CpuOptions::default() })
            .expect("a processor"),
    )
}

/// What a client is told when the file is loaded, which must be what it is told by `inspect`.
fn fault(path: &Path) -> Fault {
    let loaded = Model::open(&files(path), device(), &mut |_, _, _| {});
    let fault = loaded.err().expect("a bad file").fault();
    assert_eq!(inspect(&files(path)).expect_err("a bad file").fault(), fault);
    assert!(fault.message.len() < 500 && !fault.message.contains('\n'), "{fault}");
    fault
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let fault = fault(Path::new("/nonexistent/model.gguf"));
    assert_eq!(fault.code, Code::Disk);
    assert!(fault.message.contains("/nonexistent/model.gguf"), "{fault}");
}

#[test]
fn empty_random_and_truncated_files_are_corrupt() {
    let whole = Map::open(&golden("llama-q4_0.gguf")).expect("a golden file");
    let whole = whole.as_slice();
    let random: Vec<u8> =
        (0..4096u32).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    for (name, bytes) in [
        ("empty", &b""[..]),
        ("short", b"GGU"),
        ("random", &random),
        ("html", b"<!DOCTYPE html><title>404</title>"),
        ("cut_in_header", &whole[..2000]),
        ("cut_in_tensors", &whole[..whole.len() / 2]),
        ("cut_at_the_end", &whole[..whole.len() - 40]),
        ("oversized", &[whole, &[0; 4096]].concat()),
    ] {
        assert_eq!(fault(&written(name, bytes)).code, Code::Corrupt, "{name}");
    }
}

#[test]
fn a_folder_without_a_model_is_refused() {
    let file = written("folder", b"{}");
    let folder = file.parent().expect("its folder");
    let fault = fault(folder);
    assert_eq!(fault.code, Code::Disk);
    assert!(fault.message.contains("config.json"), "{fault}");
}

#[test]
fn a_header_with_flipped_bits_is_refused_or_runs() {
    const ROUNDS: usize = 600;
    let whole = Map::open(&golden("gemma3-q5_0.gguf")).expect("a golden file");
    let header = gguf::Header::parse(whole.as_slice()).expect("a good header");
    let header_len = usize::try_from(header.data_start).expect("fits");
    // xorshift64 (Marsaglia 2003), the same in every run.
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut next = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % n as u64).expect("fits")
    };
    let mut ran = 0;
    for _ in 0..ROUNDS {
        let mut bytes = whole.as_slice().to_vec();
        for _ in 0..=next(3) {
            let at = next(header_len);
            bytes[at] ^= 1 << next(8);
        }
        let Ok(file) = gguf::read(&[Bytes::from_vec(bytes)]) else { continue };
        let Ok(mut model) = Model::new(&file, device()) else { continue };
        let mut alone = Alone::new(&mut model, 3).expect("memory");
        alone.feed(&[1, 2, 3], &[2], &mut Vec::new()).expect("a forward pass");
        ran += 1;
    }
    // Most of this header is vocabulary, which the layers do not read.
    assert!(ran > ROUNDS / 10, "{ran}");
}
