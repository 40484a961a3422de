//! `cargo xtask ci`: every check of the repository but the tests themselves, which `.ci/run` runs
//! first. A check that cannot run here says so aloud.

use std::env;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use v4_modelfile::library;

use crate::{ROOT, golden, kernels};

/// Resident bytes that an idle daemon may have.
const IDLE_BYTES: u64 = 15_000_000;
/// What `v4 --version` may take; the best of a few, for the machine may be busy.
const VERSION_TIME: Duration = Duration::from_millis(20);

/// What a daemon may take until it accepts connections.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// The real models of the numerical tests: name in the library, file name that they look for.
const MODELS: [(&str, &str, &str); 3] = [
    ("smollm2", "latest", "smollm2.gguf"),
    ("gemma3", "270m", "gemma3-270m.gguf"),
    ("qwen2.5-coder", "0.5b", "qwen2.5-coder-0.5b.gguf"),
];

#[derive(clap::Args)]
pub struct Args {}

/// How a check ended, unless it failed.
pub enum Outcome {
    /// All is as it should be.
    Passed,
    /// It could not run, and why.
    Skipped(String),
}

type Check = fn() -> Result<Outcome, String>;

/// Runs every check, also after one has failed.
///
/// # Errors
/// The names of the checks that failed.
pub fn run(_args: Args) -> Result<(), String> {
    let checks: [(&str, Check); 10] = [
        ("formatting", formatting),
        ("lints", lints),
        ("house rules", house_rules),
        ("bindings", bindings),
        ("reference pages", reference),
        ("licences and duplicates", licences),
        ("sanitizers over the C", kernels::sanitizers),
        ("kernels of aarch64", kernels::emulated_arm),
        ("idle daemon and start", idle),
        ("real models", real_models),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        println!("-- {name}");
        let start = Instant::now();
        let said = match check() {
            Ok(Outcome::Passed) => "passed".to_owned(),
            Ok(Outcome::Skipped(why)) => format!("skipped: {why}"),
            Err(why) => {
                failed.push(name);
                format!("FAILED: {why}")
            }
        };
        println!("-- {name}: {said} ({:.0?})", start.elapsed());
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", "))) }
}

fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(ROOT);
    command
}

/// Runs a command whose output is for the person.
pub fn must(command: &mut Command) -> Result<(), String> {
    let status = command.status().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}")) }
}

fn cargo(args: &[&str]) -> Result<Outcome, String> {
    must(&mut command(env!("CARGO"), args)).map(|()| Outcome::Passed)
}

fn formatting() -> Result<Outcome, String> {
    cargo(&["fmt", "--all", "--check"])
}

fn lints() -> Result<Outcome, String> {
    cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])
}

fn house_rules() -> Result<Outcome, String> {
    cargo(&["test", "--package", "v4-tests", "--test", "it", "tidy::"])
}

fn reference() -> Result<Outcome, String> {
    golden::check().map(|()| Outcome::Passed)
}

/// The bindings are compared by a process of its own: where libclang is has to be said in its
/// environment.
fn bindings() -> Result<Outcome, String> {
    let compare = |libclang: Option<&Path>| {
        let own = env::current_exe().map_err(|error| error.to_string())?;
        let mut command = Command::new(own);
        command.args(["bindings", "--check"]).current_dir(ROOT);
        if let Some(folder) = libclang {
            command.env("LIBCLANG_PATH", folder);
        }
        must(&mut command)
    };
    if has_libclang() {
        return compare(None).map(|()| Outcome::Passed);
    }
    match fetch_libclang() {
        Ok(folder) => compare(Some(&folder)).map(|()| Outcome::Passed),
        Err(why) => Ok(Outcome::Skipped(format!("no libclang, and none to be had: {why}"))),
    }
}

fn has_libclang() -> bool {
    if env::var_os("LIBCLANG_PATH").is_some() {
        return true;
    }
    let listed = Command::new("ldconfig").arg("-p").output();
    let has_library =
        listed.is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains("libclang"));
    has_library || command("llvm-config", &["--version"]).output().is_ok_and(|o| o.status.success())
}

/// Fetches libclang from the package index into `target`; gives its folder.
fn fetch_libclang() -> Result<PathBuf, String> {
    let folder = Path::new(ROOT).join("target/libclang");
    let library = folder.join("clang/native");
    if !library.join("libclang.so").exists() {
        let target = folder.to_string_lossy().into_owned();
        let args =
            ["-m", "pip", "install", "--quiet", "--no-deps", "--target", &target, "libclang"];
        must(&mut command("python3", &args))?;
    }
    Ok(library)
}

fn licences() -> Result<Outcome, String> {
    let is_there = command(env!("CARGO"), &["deny", "--version"]).output();
    if !is_there.is_ok_and(|output| output.status.success()) {
        return Ok(Outcome::Skipped("cargo-deny is not installed".to_owned()));
    }
    cargo(&["deny", "--workspace", "check", "licenses", "bans", "sources"])
}

/// The release binary, built here.
fn release() -> Result<PathBuf, String> {
    cargo(&["build", "--release", "--package", "v4"])?;
    Ok(Path::new(ROOT).join("target/release/v4"))
}

/// A daemon of our own that ends with us.
struct Daemon(Child);

impl Daemon {
    /// Starts one and waits until its socket accepts connections.
    fn start(v4: &Path, home: &Path) -> Result<Self, String> {
        let socket = home.join("v4.sock");
        let child = Command::new(v4)
            .args(["serve", "--listen", "off", "--background", "--home"])
            .arg(home)
            .env("V4_SOCKET", &socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut daemon = Self(child);
        let end = Instant::now() + START_DEADLINE;
        while UnixStream::connect(&socket).is_err() {
            let ended = daemon.0.try_wait().map_err(|error| error.to_string())?;
            if ended.is_some() || Instant::now() > end {
                return Err("the daemon did not start".to_owned());
            }
            thread::park_timeout(Duration::from_millis(10));
        }
        Ok(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Killed at any time it leaves a usable home; that is tested elsewhere.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An idle daemon is small, and the command line is quick.
fn idle() -> Result<Outcome, String> {
    let v4 = release()?;
    let home = Path::new(ROOT).join("target/idle-home");
    let daemon = Daemon::start(&v4, &home)?;
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.0.id()));
    let Ok(status) = status else {
        return Ok(Outcome::Skipped("no procfs".to_owned()));
    };
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = resident.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let bytes = kib.ok_or("no VmRSS")? * 1024;
    drop(daemon);
    let version = || {
        let start = Instant::now();
        let ran = Command::new(&v4).arg("--version").output().is_ok();
        if ran { start.elapsed() } else { Duration::MAX }
    };
    let best = (0..5).map(|_| version()).min().expect("five of them");
    println!("idle daemon: {:.1} MB resident; v4 --version: {best:.1?}", bytes as f64 / 1e6);
    if bytes > IDLE_BYTES {
        return Err(format!("an idle daemon has {bytes} bytes resident, more than {IDLE_BYTES}"));
    }
    if best > VERSION_TIME {
        return Err(format!("v4 --version takes {best:?}, more than {VERSION_TIME:?}"));
    }
    Ok(Outcome::Passed)
}

/// Pulls the real models through v4 itself, once, into the cache, and runs the tests that want
/// them.
fn real_models() -> Result<Outcome, String> {
    let v4 = release()?;
    let user = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/v4-tests"));
    let cache = env::var_os("V4_TEST_CACHE").map(PathBuf::from).or(user).ok_or("no HOME")?;
    let home = cache.join("home");
    fs::create_dir_all(&home).map_err(|error| error.to_string())?;
    let folder = cache.join("models");
    fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    let daemon = Daemon::start(&v4, &home)?;
    for (model, tag, file) in MODELS {
        let mut pull = Command::new(&v4);
        pull.args(["pull", &format!("{model}:{tag}")]).env("V4_SOCKET", home.join("v4.sock"));
        if let Err(why) = must(&mut pull) {
            return Ok(Outcome::Skipped(format!("{model}:{tag} cannot be pulled: {why}")));
        }
        link(&home, model, tag, &folder.join(file))?;
    }
    drop(daemon);
    let mut tests = command(env!("CARGO"), &["test", "--package", "v4-engine", "--test", "real"]);
    must(tests.args(["--", "--nocapture"]).env("V4_TEST_MODELS", &folder))?;
    let args = ["test", "--package", "v4-tests", "--test", "it", "real::", "--", "--nocapture"];
    must(command(env!("CARGO"), &args).env("V4_TEST_CACHE", &cache))?;
    Ok(Outcome::Passed)
}

/// Gives the weights of a library model a file name of their own.
fn link(home: &Path, model: &str, tag: &str, to: &Path) -> Result<(), String> {
    let entry = library::find(model, tag).ok_or_else(|| format!("no {model}:{tag}"))?;
    let modelfile = entry.modelfile();
    let digest = modelfile.files().first().and_then(|file| file.digest.map(str::to_owned));
    let digest = digest.ok_or_else(|| format!("{model}:{tag} has no digest"))?;
    let blob = home.join("blobs").join(digest.replace(':', "-"));
    if to.exists() {
        return Ok(());
    }
    std::os::unix::fs::symlink(&blob, to).map_err(|error| error.to_string())
}
