//! `cargo xtask bindings`: remakes `kernels-c/src/ffi.rs` from `kernels-c/include/v4.h`.
//!
//! The result is committed, so that only who changes `v4.h` needs bindgen's libclang.

use std::path::Path;

use bindgen::callbacks::{EnumVariantValue, ItemInfo, ParseCallbacks};
use bindgen::{Builder, EnumVariation, Formatter};

/// Where the repository is: two folders above this package.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Remake kernels-c/src/ffi.rs.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only compare: fail if the committed file is not what v4.h gives.
    #[arg(long)]
    check: bool,
}

/// Writes or compares the bindings.
///
/// # Errors
/// A sentence: libclang is missing, the header does not compile, or the committed file differs.
pub fn run(Args { check }: Args) -> Result<(), String> {
    let root = Path::new(ROOT);
    let made = generate(&root.join("kernels-c/include/v4.h"))?;
    let file = root.join("kernels-c/src/ffi.rs");
    if check {
        let committed = std::fs::read_to_string(&file).map_err(|error| error.to_string())?;
        if committed != made {
            return Err("kernels-c/src/ffi.rs is not what v4.h gives: run `cargo xtask bindings`"
                .to_owned());
        }
        println!("kernels-c/src/ffi.rs is what v4.h gives");
    } else {
        std::fs::write(&file, made).map_err(|error| error.to_string())?;
        println!("kernels-c/src/ffi.rs made");
    }
    Ok(())
}

/// The text of `ffi.rs`. It does not depend on rustfmt, so that its version does not matter.
fn generate(header: &Path) -> Result<String, String> {
    // bindgen panics when it finds no libclang; asked here, where the answer can be a sentence.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = std::panic::catch_unwind(bindgen::clang_version);
    std::panic::set_hook(hook);
    found.map_err(|_| {
        "bindgen needs libclang, and this machine has none: install it \
         (Debian: apt-get install libclang-dev) \
         or set LIBCLANG_PATH to its folder"
            .to_owned()
    })?;
    let bindings = Builder::default()
        .header(header.to_string_lossy())
        .clang_arg("-std=c11")
        .use_core()
        .allowlist_item("v4_.*")
        .allowlist_item("V4_.*")
        .default_enum_style(EnumVariation::NewType { is_bitfield: false, is_global: false })
        .generate_comments(false)
        .layout_tests(false)
        .formatter(Formatter::None)
        .parse_callbacks(Box::new(Names))
        .raw_line("// Made from include/v4.h by `cargo xtask bindings`; not to be edited.")
        .raw_line("#![allow(missing_docs, dead_code, non_camel_case_types)]")
        .raw_line("#![allow(clippy::all, clippy::pedantic)]")
        .generate()
        .map_err(|error| format!("v4.h: {error}"))?;
    // Only `Quant` itself may make one: a number that is not in the list has no meaning.
    let text = bindings.to_string();
    let private = text.replace("pub struct Quant (pub ", "pub struct Quant (pub(crate) ");
    if private == text {
        return Err(
            "bindgen writes `pub struct Quant` in another way than this task expects".to_owned()
        );
    }
    Ok(lines(&private))
}

/// Unformatted bindings are one line; this breaks it at statements, fields and braces, so that a
/// change reads as one.
fn lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut depth, mut nesting) = (0usize, 0usize);
    for line in text.lines() {
        for token in line.split(' ').filter(|token| !token.is_empty()) {
            let end_of_line = match token {
                "{" | "}" | ";" | "," => nesting == 0,
                _ => false,
            };
            nesting = (nesting + token.matches(['(', '[']).count())
                .saturating_sub(token.matches([')', ']']).count());
            depth -= usize::from(token == "}");
            if out.ends_with('\n') {
                out.extend(std::iter::repeat_n("    ", depth));
            } else if !out.is_empty() {
                out.push(' ');
            }
            depth += usize::from(token == "{");
            out.push_str(token);
            if end_of_line {
                out.push('\n');
            }
        }
        if !out.ends_with('\n') {
            out.push('\n');
        }
    }
    out
}

/// C has one name space; `V4_Q4_0` becomes `Quant::Q4_0`.
#[derive(Debug)]
struct Names;

impl ParseCallbacks for Names {
    fn item_name(&self, item: ItemInfo) -> Option<String> {
        (item.name == "v4_quant").then(|| "Quant".to_owned())
    }

    fn enum_variant_name(
        &self,
        _: Option<&str>,
        name: &str,
        _: EnumVariantValue,
    ) -> Option<String> {
        name.strip_prefix("V4_").map(str::to_owned)
    }
}
