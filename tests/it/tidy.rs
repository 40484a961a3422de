//! The house rules that no lint knows. Each finder is a function over text, seen red on a small
//! example, and then run over the tree.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use v4_proto::Code;

use crate::text::{Keep, strip};

/// Our crates: what each may use of ours, and in tests. `layout.md`, section 3.
const OURS: &[(&str, &[&str], &[&str])] = &[
    ("v4-proto", &[], &[]),
    ("v4-modelfile", &[], &[]),
    ("v4-kernels", &[], &[]),
    ("v4-store", &["v4-proto"], &[]),
    ("v4-pull", &["v4-proto", "v4-store"], &[]),
    ("v4-supervisor", &["v4-proto", "v4-store"], &[]),
    ("v4-server", &["v4-proto", "v4-modelfile", "v4-store", "v4-pull", "v4-supervisor"], &[]),
    ("v4-engine", &["v4-proto", "v4-kernels"], &[]),
    ("v4-runner", &["v4-proto", "v4-engine"], &[]),
    ("v4-daemon", &["v4-server", "v4-runner"], &[]),
    ("v4", &["v4-proto", "v4-modelfile", "v4-daemon"], &[]),
    ("v4-tests", &["v4-proto"], &[]),
    ("xtask", &["v4-proto", "v4-engine", "v4-kernels", "v4-modelfile", "v4-tests"], &[]),
];

/// Crates of others that only these of ours may use: the columns and the laws they stand for.
const OTHERS: &[(&str, &[&str])] = &[
    ("tokio", &["v4-pull", "v4-supervisor", "v4-server", "v4"]),
    ("hyper", &["v4-server", "v4"]),
    ("hyper-util", &["v4-server", "v4"]),
    ("reqwest", &["v4-pull"]),
    ("rustls", &["v4-pull"]),
    ("sled", &["v4-store"]),
    ("minijinja", &["v4-engine"]),
    ("memmap2", &["v4-kernels"]),
    ("libloading", &["v4-kernels"]),
    ("cc", &["v4-kernels"]),
    ("bindgen", &["xtask"]),
    ("clap", &["v4", "xtask"]),
];

/// The only crate that may be unsafe.
const UNSAFE_CRATE: &str = "v4-kernels";
/// Made by bindgen, checked by `cargo xtask bindings --check`.
const GENERATED: &str = "kernels-c/src/ffi.rs";
/// Characters of a line, and lines of a function.
const WIDTH: usize = 100;
const FUNCTION_LINES: usize = 70;

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the tests lie in the repository").to_owned()
}

/// The repository's files with one of these extensions, as (path from the root, text).
fn files(extensions: &[&str]) -> Vec<(String, String)> {
    let root = root();
    let mut folders = vec![root.clone()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the repository") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let is_ours = !["target", ".git", "golden"].contains(&name);
            if path.is_dir() && is_ours {
                folders.push(path);
            } else if path.extension().is_some_and(|e| extensions.iter().any(|x| *x == e)) {
                let text = fs::read_to_string(&path).expect("a text file");
                let short = path.strip_prefix(&root).expect("below the root");
                found.push((short.to_string_lossy().into_owned(), text));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no {extensions:?} below {}", root.display());
    found
}

/// Whether a path has this extension.
fn has(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}

/// Fails with every breach on a line of its own.
#[track_caller]
fn none(breaches: &[String]) {
    assert!(breaches.is_empty(), "{} breach(es):\n{}", breaches.len(), breaches.join("\n"));
}

fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    metadata["packages"].as_array().expect("packages").clone()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// Each crate's name and the root file of its library or binary.
fn crate_roots() -> Vec<(String, PathBuf)> {
    let is_root = |target: &Value| {
        let kinds = target["kind"].as_array().expect("kinds");
        kinds.iter().any(|kind| kind == "lib" || kind == "bin")
    };
    let mut roots = Vec::new();
    for package in packages() {
        for target in package["targets"].as_array().expect("targets") {
            if is_root(target) {
                roots.push((text(&package, "name").to_owned(), text(target, "src_path").into()));
            }
        }
    }
    roots
}

#[test]
fn crates_use_only_what_the_table_allows() {
    let mut breaches = Vec::new();
    let packages = packages();
    let known: BTreeSet<&str> = OURS.iter().map(|(name, ..)| *name).collect();
    let found: BTreeSet<&str> = packages.iter().map(|package| text(package, "name")).collect();
    assert_eq!(known, found, "the table and the workspace name different crates");
    for package in &packages {
        let name = text(package, "name");
        let (_, allowed, in_tests) =
            OURS.iter().find(|(ours, ..)| *ours == name).expect("compared above");
        for edge in package["dependencies"].as_array().expect("dependencies") {
            let (to, is_dev) = (text(edge, "name"), edge["kind"] == "dev");
            let is_allowed = allowed.contains(&to) || (is_dev && in_tests.contains(&to));
            if known.contains(to) && !is_allowed {
                breaches.push(format!("{name} may not use {to}"));
            }
            let owners = OTHERS.iter().find(|(other, _)| *other == to).map(|(_, owners)| *owners);
            if !is_dev && owners.is_some_and(|owners| !owners.contains(&name)) {
                breaches.push(format!("{name} may not use {to}: it belongs to {owners:?}"));
            }
        }
    }
    none(&breaches);
}

#[test]
fn the_cli_names_the_daemon_in_two_files_only() {
    let breaches: Vec<String> = files(&["rs"])
        .into_iter()
        .filter(|(path, _)| path.starts_with("cli/src/"))
        .filter(|(path, _)| !["cli/src/cmd/serve.rs", "cli/src/cmd/runner.rs"].contains(&&**path))
        .filter(|(_, text)| strip(text, Keep::Code).contains("v4_daemon"))
        .map(|(path, _)| format!("{path} names v4_daemon"))
        .collect();
    none(&breaches);
}

/// Lines with the keyword `unsafe` and no reason: a `SAFETY:` or `# Safety` in the comment that
/// stands above the statement, or on the line itself.
fn unsafe_without_reason(text: &str) -> Vec<usize> {
    let code = strip(text, Keep::Code);
    let lines: Vec<&str> = text.lines().collect();
    let has_reason = |line: &str| line.contains("SAFETY:") || line.contains("# Safety");
    let mut found = Vec::new();
    for (at, line) in code.lines().enumerate() {
        if !words(line).any(|word| word == "unsafe") || has_reason(lines[at]) {
            continue;
        }
        // Up through the statement's own lines and the comment above them.
        let above = lines[..at].iter().rev().take(16).take_while(|line| {
            let line = line.trim();
            line.starts_with("//") || line.starts_with("#[") || !ends_statement(line)
        });
        if !above.into_iter().any(|line| has_reason(line)) {
            found.push(at + 1);
        }
    }
    found
}

fn ends_statement(line: &str) -> bool {
    line.is_empty() || line.ends_with(';') || line.ends_with('{') || line.ends_with('}')
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

#[test]
fn unsafe_has_one_place_and_a_reason_each() {
    let good =
        "// SAFETY: n is the length.\nlet x = unsafe { f(n) };\nlet s = \"unsafe\"; // unsafe";
    assert_eq!(unsafe_without_reason(good), Vec::<usize>::new());
    assert_eq!(unsafe_without_reason("let a = 1;\nlet x = unsafe { f() };"), [2]);

    let mut breaches = Vec::new();
    for (path, text) in files(&["rs"]) {
        if path == GENERATED {
            continue;
        }
        if path.starts_with("kernels-c/src/") {
            for line in unsafe_without_reason(&text) {
                breaches.push(format!("{path}:{line}: unsafe without a SAFETY line"));
            }
        } else if words(&strip(&text, Keep::Code)).any(|word| word == "unsafe") {
            breaches.push(format!("{path}: unsafe outside of kernels-c/src"));
        }
    }
    none(&breaches);
}

#[test]
fn every_crate_introduces_itself_and_forbids_unsafe() {
    let mut breaches = Vec::new();
    for (name, root) in crate_roots() {
        let text = fs::read_to_string(&root).expect("a crate's root");
        let intro: String = text.lines().take_while(|line| line.starts_with("//!")).collect();
        for heading in ["**Owns**", "**Never**", "**Start reading at**"] {
            if !intro.contains(heading) {
                breaches.push(format!("{}: the first comment has no {heading}", root.display()));
            }
        }
        if name != UNSAFE_CRATE && !text.contains("#![forbid(unsafe_code)]") {
            breaches.push(format!("{}: no #![forbid(unsafe_code)]", root.display()));
        }
    }
    none(&breaches);
}

#[test]
fn every_crate_is_in_the_architecture() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let is_named = |name: &str| {
        page.split(|c: char| !c.is_alphanumeric() && c != '-').any(|word| word == name)
    };
    let breaches: Vec<String> = OURS
        .iter()
        .filter(|(name, ..)| !is_named(name))
        .map(|(name, ..)| format!("ARCHITECTURE.md does not name {name}"))
        .collect();
    none(&breaches);
}

#[test]
fn every_error_code_is_in_the_reference() {
    let page = fs::read_to_string(root().join("docs/reference.md"))
        .expect("docs/reference.md; make it with `cargo xtask golden`");
    let mut breaches = Vec::new();
    for code in Code::ALL {
        let name = serde_json::to_value(code).expect("a code is a word");
        if !page.contains(&format!("`{}`", name.as_str().expect("a word"))) {
            breaches.push(format!("docs/reference.md does not explain {name}"));
        }
    }
    none(&breaches);
}

/// The metrics that a source introduces: texts that begin as their names do.
fn metrics(source: &str) -> BTreeSet<&str> {
    let words = product(source).split('"').skip(1).step_by(2);
    let is_name = |word: &&str| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        (word.starts_with("v4_") || word.starts_with("vllm:")) && word.chars().all(is_plain)
    };
    words.filter(is_name).collect()
}

#[test]
fn every_metric_is_in_the_reference() {
    let example =
        "const A: F = gauge(\"v4_a\", \"What v4_b is.\");\nh(\"vllm:c\");\n#[cfg(test)]\"v4_d\"";
    assert_eq!(metrics(example), BTreeSet::from(["v4_a", "vllm:c"]));
    let source = "daemon/server/src/api/prometheus.rs";
    let source = fs::read_to_string(root().join(source)).expect("the list of metrics");
    let page = fs::read_to_string(root().join("docs/reference.md")).expect("docs/reference.md");
    let found = metrics(&source);
    assert!(found.contains("v4_model_loads_total"), "the metrics were found: {found:?}");
    let breaches: Vec<String> = found
        .into_iter()
        .filter(|name| !page.contains(&format!("`{name}`")))
        .map(|name| format!("docs/reference.md does not explain {name}"))
        .collect();
    none(&breaches);
}

/// Everything of a source before its tests, which stand at its end.
fn product(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or_default()
}

#[test]
fn an_architecture_is_named_in_its_own_file_only() {
    let sources = files(&["rs", "c", "h"]);
    let arch = "daemon/engine/src/arch/";
    // A tokenizer and a dialect have a file a family too, with names that the formats prescribe;
    // the library lists models, some of which are called like their architecture.
    let own = [
        arch,
        "daemon/engine/src/tokenizer/",
        "daemon/engine/src/dialect/",
        "modelfiles/src/library.rs",
    ];
    let (_, list) =
        sources.iter().find(|(path, _)| *path == format!("{arch}mod.rs")).expect("it is");
    let names: BTreeSet<&str> = sources
        .iter()
        .filter_map(|(path, _)| path.strip_prefix(arch)?.strip_suffix(".rs"))
        .filter(|name| list.contains(&format!("&{name}::ARCH")))
        .collect();
    assert!(names.contains("llama"), "the architectures were found: {names:?}");
    let mut breaches = Vec::new();
    let reached = reached(&rust_files());
    let root = root().canonicalize().expect("the repository");
    for (path, text) in &sources {
        let is_test = reached.get(&root.join(path)).copied().unwrap_or(false);
        if is_test || path.starts_with("tests/") || own.iter().any(|own| path.starts_with(own)) {
            continue;
        }
        for (at, line) in strip(product(text), Keep::CodeAndStrings).lines().enumerate() {
            let line = line.to_lowercase();
            if let Some(name) = words(&line).find(|word| names.contains(word)) {
                breaches.push(format!("{path}:{}: names the architecture {name}", at + 1));
            }
        }
    }
    none(&breaches);
}

/// The functions of C text that are longer than [`FUNCTION_LINES`]: line and length of each.
fn long_functions(text: &str) -> Vec<(usize, usize)> {
    let code = strip(text, Keep::Code);
    let mut found = Vec::new();
    let (mut depth, mut start, mut is_function, mut last) = (0_usize, 0, false, ' ');
    for (at, line) in code.lines().enumerate() {
        for c in line.chars().filter(|c| !c.is_whitespace()) {
            match c {
                '{' => {
                    if depth == 0 {
                        (start, is_function) = (at, last == ')');
                    }
                    depth += 1;
                }
                '}' if depth == 1 => {
                    depth = 0;
                    if is_function && at - start + 1 > FUNCTION_LINES {
                        found.push((start + 1, at - start + 1));
                    }
                }
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            last = c;
        }
    }
    found
}

/// What C text of a kernel may not say: allocation, input and output, threads, exits, mutable
/// state.
fn forbidden_in_kernels(text: &str) -> Vec<(usize, String)> {
    const CALLS: &[&str] = &[
        "malloc",
        "calloc",
        "realloc",
        "free",
        "alloca",
        "posix_memalign",
        "aligned_alloc",
        "printf",
        "fprintf",
        "puts",
        "fopen",
        "read",
        "write",
        "pthread_create",
        "thrd_create",
        "exit",
        "abort",
        "setjmp",
        "longjmp",
        "signal",
        "errno",
    ];
    const HEADERS: &[&str] =
        &["stdio.h", "stdlib.h", "pthread.h", "threads.h", "unistd.h", "errno.h"];
    let mut found = Vec::new();
    for (at, line) in strip(text, Keep::Code).lines().enumerate() {
        let line = line.trim();
        for word in words(line) {
            if CALLS.contains(&word) {
                found.push((at + 1, word.to_owned()));
            }
        }
        if line.starts_with("#include") && HEADERS.iter().any(|header| line.contains(header)) {
            found.push((at + 1, line.to_owned()));
        }
        let is_state = words(line).next() == Some("static")
            && !line.contains('(')
            && !words(line).any(|word| word == "const");
        if is_state || words(line).any(|word| ["_Thread_local", "thread_local"].contains(&word)) {
            found.push((at + 1, "mutable state".to_owned()));
        }
    }
    found
}

#[test]
fn c_is_leaf_code_in_short_functions() {
    let body = "    x += 1;\n".repeat(FUNCTION_LINES);
    assert_eq!(long_functions(&format!("int f(void)\n{{\n{body}}}\n")), [(2, FUNCTION_LINES + 2)]);
    assert_eq!(long_functions("void f(void) { /* } */ g(\"}\"); }\n"), []);
    let bad = "#include <stdlib.h>\nstatic int count;\nstatic const int ok[2] = {1, 2};\n\
               static int f(int n) { return malloc(n) != 0; } // malloc\n";
    let lines: Vec<usize> = forbidden_in_kernels(bad).into_iter().map(|(line, _)| line).collect();
    assert_eq!(lines, [1, 2, 4]);

    let mut breaches = Vec::new();
    for (path, text) in files(&["c", "h"]) {
        for (line, length) in long_functions(&text) {
            breaches.push(format!("{path}:{line}: a function of {length} lines"));
        }
        // A double of somebody's library is no kernel.
        if path.starts_with("kernels-c/tests/") {
            continue;
        }
        for (line, what) in forbidden_in_kernels(&text) {
            breaches.push(format!("{path}:{line}: {what}"));
        }
    }
    none(&breaches);
}

#[test]
fn lines_are_narrow_and_nothing_is_left_over() {
    // Spelled in halves, so that this file does not break its own rule.
    let leftovers =
        [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK")];
    let switched_off = [
        concat!("#[ig", "nore"),
        concat!("allow(clippy::too_many", "_lines"),
        concat!("allow(clippy::unwrap", "_used"),
        concat!("allow(dead", "_code"),
    ];
    let mut breaches = Vec::new();
    for (path, text) in files(&["rs", "c", "h", "md", "toml", "modelfile"]) {
        let is_c = has(&path, "c") || has(&path, "h");
        let is_rust = has(&path, "rs") && path != GENERATED;
        for (at, line) in text.lines().enumerate() {
            let at = at + 1;
            let is_counted = is_c || (is_rust && line.trim_start().starts_with("//"));
            if is_counted && line.chars().count() > WIDTH {
                breaches.push(format!("{path}:{at}: wider than {WIDTH}"));
            }
            if words(line).any(|word| leftovers.contains(&word)) {
                breaches.push(format!("{path}:{at}: left over: {}", line.trim()));
            }
            // What several test binaries share is not used whole by each.
            let is_shared = path.contains("/tests/");
            if !is_shared && switched_off.iter().any(|switch| line.contains(switch)) {
                breaches.push(format!("{path}:{at}: a rule is switched off: {}", line.trim()));
            }
            if line.ends_with([' ', '\t']) && !has(&path, "md") && path != GENERATED {
                breaches.push(format!("{path}:{at}: blanks at the end"));
            }
        }
    }
    none(&breaches);
}

/// A module that a file declares: where it may lie, and whether it is for tests only.
struct Module {
    places: Vec<PathBuf>,
    is_test: bool,
}

/// The modules that the `mod x;` lines of a Rust file at `path` name.
fn modules(path: &Path, text: &str) -> Vec<Module> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let beside = path.parent().expect("a file has a folder");
    let is_list = ["lib", "main", "mod"].contains(&stem) || beside.ends_with("tests");
    let folder = if is_list { beside.to_owned() } else { beside.join(stem) };
    let code = strip(text, Keep::CodeAndStrings);
    let mut found = Vec::new();
    // The attributes above the line.
    let (mut is_test, mut given) = (false, None);
    for line in code.lines().map(str::trim) {
        if let Some(at) = line.strip_prefix("#[path = \"") {
            given = at.split('"').next().map(|at| beside.join(at));
        }
        is_test |= line.starts_with("#[cfg(test)]");
        if line.is_empty() || line.starts_with("#[") {
            continue;
        }
        let name = ["mod ", "pub mod ", "pub(crate) mod ", "pub(super) mod "]
            .iter()
            .find_map(|start| line.strip_prefix(start)?.strip_suffix(';'));
        if let Some(name) = name {
            let places = match given.take() {
                Some(place) => vec![place],
                None => vec![folder.join(format!("{name}.rs")), folder.join(name).join("mod.rs")],
            };
            found.push(Module { places, is_test });
        }
        (is_test, given) = (false, None);
    }
    // The list of commands is a macro that declares each as a module.
    if path.ends_with("cli/src/cmd/mod.rs") {
        let list = code.split("commands! {").nth(1).unwrap_or_default();
        let place = |word| vec![folder.join(format!("{word}.rs"))];
        found.extend(words(list).map(|word| Module { places: place(word), is_test: false }));
    }
    found
}

/// Every Rust file that a target reaches through its modules, and whether only for tests.
fn reached(sources: &BTreeMap<PathBuf, String>) -> BTreeMap<PathBuf, bool> {
    let mut open: Vec<(PathBuf, bool)> = Vec::new();
    for package in packages() {
        for target in package["targets"].as_array().expect("targets") {
            let kinds = target["kind"].as_array().expect("kinds");
            let is_test = kinds.iter().any(|kind| kind == "test" || kind == "example");
            open.push((text(target, "src_path").into(), is_test));
        }
    }
    let mut reached = BTreeMap::new();
    while let Some((path, is_test)) = open.pop() {
        let Ok(path) = path.canonicalize() else { continue };
        let Some(text) = sources.get(&path) else { continue };
        if reached.get(&path).is_none_or(|known| *known && !is_test) {
            for module in modules(&path, text) {
                let is_test = is_test || module.is_test;
                open.extend(module.places.into_iter().map(|place| (place, is_test)));
            }
            reached.insert(path, is_test);
        }
    }
    reached
}

fn rust_files() -> BTreeMap<PathBuf, String> {
    let root = root().canonicalize().expect("the repository");
    files(&["rs"]).into_iter().map(|(path, text)| (root.join(path), text)).collect()
}

#[test]
fn every_rust_file_is_a_module() {
    let sources = rust_files();
    let reached = reached(&sources);
    let breaches: Vec<String> = sources
        .keys()
        .filter(|path| !reached.contains_key(*path))
        .map(|path| format!("{}: no module names it", path.display()))
        .collect();
    none(&breaches);
}

#[test]
fn every_c_file_is_named_somewhere() {
    let all: Vec<(String, String)> = files(&["c", "h", "cu", "rs"])
        .into_iter()
        .filter(|(p, _)| p.starts_with("kernels-c/"))
        .collect();
    let mut breaches = Vec::new();
    for (path, _) in all.iter().filter(|(path, _)| !has(path, "rs")) {
        let name = Path::new(path).file_name().and_then(|name| name.to_str()).expect("a name");
        let stem = name.split('.').next().unwrap_or(name);
        let is_included = |text: &str| text.contains(name) || words(text).any(|word| word == stem);
        if !all.iter().any(|(other, text)| other != path && is_included(text)) {
            breaches.push(format!("{path}: nothing names it"));
        }
    }
    none(&breaches);
}
