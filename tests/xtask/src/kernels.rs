//! The checks of `cargo xtask ci` that run the kernels' own tests on another machine than this one:
//! one that sees every wrong access, and one with another processor.

use std::path::Path;
use std::process::Command;

use crate::ROOT;
use crate::ci::{Outcome, must};

/// What the sanitizers are told. Leaks are looked for elsewhere: here they would be Rust's tests'.
const SANITIZED: &str =
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all";
/// rustc links by the C compiler, which must then add the sanitizers' libraries itself, first.
const LINKED: &str = "-C default-linker-libraries=yes -C link-arg=-fsanitize=address,undefined";

const ARM: &str = "aarch64-unknown-linux-gnu";
const ARM_GCC: &str = "aarch64-linux-gnu-gcc";
/// Where Debian has the libraries of that compiler.
const ARM_ROOT: &str = "/usr/aarch64-linux-gnu";

/// `cargo test` of the kernels' library, compiled for `target` by a compiler that `CFLAGS` go to.
fn tests(target: &str, folder: &str) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command
        .args(["test", "--quiet", "--package", "v4-kernels", "--lib", "--target", target])
        .arg("--target-dir")
        .arg(Path::new(ROOT).join("target").join(folder))
        .env_remove("RUSTFLAGS")
        .current_dir(ROOT);
    command
}

/// A variable that cargo reads for one target.
fn cargo_key(target: &str, key: &str) -> String {
    format!("CARGO_TARGET_{}_{key}", target.to_uppercase().replace('-', "_"))
}

/// Whether a program answers.
fn runs(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// What `rustc` says with these arguments, a line.
fn rustc(args: &[&str]) -> Result<String, String> {
    let output = Command::new("rustc").args(args).output().map_err(|error| error.to_string())?;
    String::from_utf8(output.stdout).map_err(|error| error.to_string())
}

/// The C of the kernels with every access and every conversion watched: no test may read or write a
/// byte beyond an allocation, shift too far or overflow.
pub fn sanitizers() -> Result<Outcome, String> {
    let has = |library: &str| {
        let args = [format!("-print-file-name={library}")];
        let output = Command::new("gcc").args(args).output();
        // What gcc does not find it names as it was asked.
        output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains('/'))
    };
    if !has("libasan.so") || !has("libubsan.so") {
        return Ok(Outcome::Skipped("gcc has no libasan and libubsan here".to_owned()));
    }
    let about = rustc(&["-vV"])?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: ")).ok_or("no host")?;
    let mut command = tests(host, "sanitized");
    command
        .env(format!("CC_{}", host.replace('-', "_")), "gcc")
        .env(format!("CFLAGS_{}", host.replace('-', "_")), SANITIZED)
        .env(cargo_key(host, "RUSTFLAGS"), LINKED)
        .env("ASAN_OPTIONS", "detect_leaks=0");
    must(&mut command).map(|()| Outcome::Passed)
}

/// The kernels of `AArch64`, run by an emulator where the processor is another.
pub fn emulated_arm() -> Result<Outcome, String> {
    if !runs(ARM_GCC) {
        return Ok(Outcome::Skipped(format!("{ARM_GCC} is not installed")));
    }
    let Some(emulator) = ["qemu-aarch64-static", "qemu-aarch64"].into_iter().find(|e| runs(e))
    else {
        return Ok(Outcome::Skipped("qemu-aarch64 is not installed".to_owned()));
    };
    let sysroot = rustc(&["--print", "sysroot"])?;
    if !Path::new(sysroot.trim()).join("lib/rustlib").join(ARM).exists() {
        return Ok(Outcome::Skipped(format!("rustc has no {ARM}; `rustup target add` gives it")));
    }
    let mut command = tests(ARM, "emulated");
    command
        .env(format!("CC_{}", ARM.replace('-', "_")), ARM_GCC)
        .env(cargo_key(ARM, "LINKER"), ARM_GCC)
        .env(cargo_key(ARM, "RUNNER"), format!("{emulator} -cpu max -L {ARM_ROOT}"));
    must(&mut command).map(|()| Outcome::Passed)
}
