//! Compiles the C: a file an instruction set with its own flags, as listed in `cpu/all.h`.

/// An entry of `cpu/all.h`.
struct Isa<'a> {
    name: &'a str,
    arch: &'a str,
    flags: &'a str,
}

/// `V4_ISA(name, arch, usable, "flags")`, each from the start of a line up to the next one.
fn isas(list: &str) -> Vec<Isa<'_>> {
    let entries = list.split("\nV4_ISA(").skip(1).map(str::trim_end);
    entries
        .map(|entry| {
            let wrong =
                || panic!("cpu/all.h: not `V4_ISA(name, arch, usable, \"flags\")`: {entry}");
            let (name, rest) = entry.split_once(',').unwrap_or_else(wrong);
            let (arch, rest) = rest.split_once(',').unwrap_or_else(wrong);
            let flags = rest.strip_suffix("\")").and_then(|rest| rest.rsplit_once('"'));
            Isa { name: name.trim(), arch: arch.trim(), flags: flags.unwrap_or_else(wrong).1 }
        })
        .collect()
}

/// What all files share: C11, optimised also in debug builds, and no contraction of `a * b + c`, so
/// that what is exact in the reference stays exact under every compiler.
fn compile(name: &str, flags: &str) {
    cc::Build::new()
        .file(format!("cpu/{name}.c"))
        .std("c11")
        .opt_level(3)
        .flag("-ffp-contract=off")
        .flag("-fno-math-errno")
        .flags(flags.split_whitespace())
        .extra_warnings(true)
        .compile(&format!("v4_{name}"));
}

#[expect(clippy::disallowed_methods, reason = "cargo speaks to a build script by its environment")]
fn main() {
    for folder in ["include", "quant", "cpu"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    let target = std::env::var("CARGO_CFG_TARGET_ARCH").expect("cargo names the target");
    compile("dispatch", "");
    compile("probe", "");
    for isa in isas(include_str!("cpu/all.h")) {
        if isa.arch == "ANY" || isa.arch.eq_ignore_ascii_case(&target) {
            compile(isa.name, isa.flags);
        }
    }
}
