//! Cargo builds the binary for a package's own tests only. This one makes it build `v4`, which the
//! tests of the whole then find beside themselves.

use std::process::Command;

#[test]
fn the_binary_is_there_and_says_its_version() {
    let output = Command::new(env!("CARGO_BIN_EXE_v4")).arg("--version").output().expect("runs");
    assert!(output.status.success());
    assert_eq!(output.stdout, concat!("v4 ", env!("CARGO_PKG_VERSION"), "\n").as_bytes());
}
