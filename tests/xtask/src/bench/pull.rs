//! A pull of a large file over loopback, beside what `curl` and `sha256sum` need for as many bytes.
//!
//! The file is noise behind the header of a model, made on the spot and removed after. A process of
//! its own serves it as a registry does, so that its time is nobody's. Each round fetches with
//! `curl`, hashes with `sha256sum` and with `openssl`, fetches and hashes at once through a pipe,
//! writes as many bytes to the disk, and pulls into a new home with a daemon of its own. Shares are
//! of the faster hash: some builds of `sha256sum` do not use the processor's instructions for it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::median;

/// How a pull is measured.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Bytes of the file, in MiB.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..))]
    mib: u64,
    /// Times each is measured, in turn; the medians are said.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    reps: u32,
    /// The binary that pulls; not said is the `v4` beside this one.
    #[arg(long)]
    v4: Option<PathBuf>,
    /// Where the file and the homes lie meanwhile; not said is the folder for temporary files.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What the serving process is told.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// A folder with `noise.gguf`, `manifest.json` and `config.json`.
    folder: PathBuf,
}

/// The name that is pulled: its host is filled in.
const REPOSITORY: &str = "bench/noise";
/// Bytes written at a time.
const WRITE_BYTES: usize = 1 << 20;
/// What a daemon may take to come up.
const START: Duration = Duration::from_secs(20);
/// Units of the times in `/proc/PID/stat`, a second (proc(5); 100 on every Linux that v4 runs on).
const TICKS: f64 = 100.0;

/// A folder that is removed when this is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(inside: &Path) -> Result<Self, String> {
        let path = inside.join(format!("v4-bench-pull-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} stays behind: {error}", self.0.display());
        }
    }
}

/// A child that is killed when this is dropped.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Seconds of one round, and what the daemon took.
#[derive(Debug, Default, Clone, Copy)]
struct Round {
    curl: f64,
    sha256sum: f64,
    openssl: f64,
    piped: f64,
    disk: f64,
    pull: f64,
    cpu: f64,
    peak_bytes: f64,
    idle_bytes: f64,
}

/// Measures and prints.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    let v4 = match &args.v4 {
        Some(path) => path.clone(),
        None => std::env::current_exe().map_err(|error| error.to_string())?.with_file_name("v4"),
    };
    if !v4.exists() {
        let path = v4.display();
        return Err(format!("{path} is missing: run `cargo build --release -p v4`"));
    }
    let folder = Folder::new(args.dir.as_deref().unwrap_or(&std::env::temp_dir()))?;
    let bytes = args.mib << 20;
    make_noise(&folder.join("noise.gguf"), bytes).map_err(|error| format!("the file: {error}"))?;
    write_manifest(&folder, bytes)?;
    let (_server, host) = serving(&folder)?;
    let mut rounds = Vec::new();
    // The first round warms the page cache and does not count.
    for i in 0..=args.reps {
        let round = round(&folder, &host, &v4, bytes)?;
        eprintln!("round {i}: {round:.2?}");
        if i > 0 {
            rounds.push(round);
        }
    }
    let of = |figure: fn(&Round) -> f64| median(rounds.iter().map(figure).collect());
    let all = Round {
        curl: of(|round| round.curl),
        sha256sum: of(|round| round.sha256sum),
        openssl: of(|round| round.openssl),
        piped: of(|round| round.piped),
        disk: of(|round| round.disk),
        pull: of(|round| round.pull),
        cpu: of(|round| round.cpu),
        peak_bytes: of(|round| round.peak_bytes),
        idle_bytes: of(|round| round.idle_bytes),
    };
    println!("{}", if args.json { all.json(bytes) } else { all.text(bytes) });
    Ok(())
}

impl Round {
    /// Seconds that the tools take one after the other, at once at best, and at once as measured.
    fn bounds(&self) -> [(&'static str, f64); 3] {
        let hash = self.sha256sum.min(self.openssl);
        [
            ("one after the other", self.curl + hash),
            ("at once, if neither slowed the other", self.curl.max(hash)),
            ("at once, as measured through a pipe", self.piped),
        ]
    }

    fn json(&self, bytes: u64) -> String {
        let gib = bytes as f64 / f64::from(1 << 30);
        let [serial, ideal, piped] = self.bounds().map(|(_, bound)| bound / self.pull);
        json!({
            "bytes": bytes, "pull_seconds": self.pull, "curl_seconds": self.curl,
            "sha256sum_seconds": self.sha256sum, "openssl_seconds": self.openssl,
            "piped_seconds": self.piped, "disk_seconds": self.disk, "share_of_serial": serial, "share_of_ideal": ideal,
            "share_of_piped": piped, "cpu_seconds_per_gib": self.cpu / gib,
            "peak_resident_bytes": self.peak_bytes, "idle_resident_bytes": self.idle_bytes,
        })
        .to_string()
    }

    fn text(&self, bytes: u64) -> String {
        use std::fmt::Write as _;

        let line = |text: &mut String, name: &str, seconds: f64| {
            let rate = bytes as f64 / 1e6 / seconds;
            writeln!(text, "{name:<42} {seconds:7.2} s {rate:7.0} MB/s")
                .expect("a string takes it");
        };
        let mut text = String::new();
        line(&mut text, "curl -o /dev/null", self.curl);
        line(&mut text, "sha256sum", self.sha256sum);
        line(&mut text, "openssl dgst -sha256", self.openssl);
        line(&mut text, "writing and syncing as many bytes", self.disk);
        line(&mut text, "v4 pull", self.pull);
        for (name, bound) in self.bounds() {
            let share = 100.0 * bound / self.pull;
            writeln!(text, "{share:5.0} % of both {name} ({bound:.2} s)").expect("a string");
        }
        let gib = bytes as f64 / f64::from(1 << 30);
        text + &format!(
            "daemon: {:.2} CPU seconds a GiB; resident {:.1} MB at most, {:.1} MB after",
            self.cpu / gib,
            self.peak_bytes / 1e6,
            self.idle_bytes / 1e6
        )
    }
}

/// One round of everything.
fn round(folder: &Folder, host: &str, v4: &Path, bytes: u64) -> Result<Round, String> {
    let (url, file) = (format!("http://{host}/file"), folder.join("noise.gguf"));
    let timed = |command: &mut Command| {
        let begin = Instant::now();
        crate::ci::must(command.stdout(Stdio::null()))?;
        Ok::<f64, String>(begin.elapsed().as_secs_f64())
    };
    let curl = timed(Command::new("curl").args(["-s", "-o", "/dev/null", &url]))?;
    let sha256sum = timed(Command::new("sha256sum").arg(&file))?;
    let openssl = timed(Command::new("openssl").args(["dgst", "-sha256"]).arg(&file))?;
    let tool = if openssl < sha256sum { "openssl dgst -sha256" } else { "sha256sum" };
    let pipe = format!("curl -s {url} | {tool}");
    let piped = timed(Command::new("sh").args(["-c", &pipe]))?;
    let disk = disk(&folder.join("copy"), bytes).map_err(|error| format!("the disk: {error}"))?;
    let home = folder.join("home");
    let round = pull(v4, &home, host)?;
    fs::remove_dir_all(&home).map_err(|error| format!("the home: {error}"))?;
    Ok(Round { curl, sha256sum, openssl, piped, disk, ..round })
}

/// Seconds to write so many bytes and have them on the disk.
fn disk(path: &Path, bytes: u64) -> std::io::Result<f64> {
    let (mut file, piece) = (File::create(path)?, vec![0x5a; WRITE_BYTES]);
    let begin = Instant::now();
    for _ in 0..bytes / WRITE_BYTES as u64 {
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    let seconds = begin.elapsed().as_secs_f64();
    drop(file);
    fs::remove_file(path)?;
    Ok(seconds)
}

/// A model of one tensor that is noise: no two MiB are alike, and nothing packs it.
fn make_noise(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut head = b"GGUF".to_vec();
    head.extend(3_u32.to_le_bytes());
    head.extend([1_u64, 1].map(u64::to_le_bytes).concat());
    let text = |head: &mut Vec<u8>, text: &str| {
        head.extend((text.len() as u64).to_le_bytes());
        head.extend(text.as_bytes());
    };
    text(&mut head, "general.architecture");
    head.extend(8_u32.to_le_bytes());
    text(&mut head, "noise");
    text(&mut head, "noise");
    head.extend(1_u32.to_le_bytes());
    let tail = 2 * size_of::<u64>() + size_of::<u32>();
    let data = (head.len() + tail).next_multiple_of(32);
    head.extend(((bytes - data as u64) / 4).to_le_bytes());
    head.extend(0_u32.to_le_bytes());
    head.extend(0_u64.to_le_bytes());
    head.resize(data, 0);
    let mut file = File::create(path)?;
    file.write_all(&head)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut left = usize::try_from(bytes - data as u64).map_err(std::io::Error::other)?;
    let mut piece = Vec::with_capacity(WRITE_BYTES);
    while left > 0 {
        piece.clear();
        while piece.len() < left.min(WRITE_BYTES) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            piece.extend(state.to_le_bytes());
        }
        piece.truncate(left);
        file.write_all(&piece)?;
        left -= piece.len();
    }
    file.sync_all()
}

/// The digest of a file, by `sha256sum`.
fn digest(path: &Path) -> Result<String, String> {
    let out = Command::new("sha256sum").arg(path).output();
    let out = out.map_err(|error| format!("sha256sum: {error}"))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let hex = text.split_whitespace().next().filter(|hex| hex.len() == 64);
    hex.map(|hex| format!("sha256:{hex}")).ok_or_else(|| "sha256sum said no digest".to_owned())
}

/// Writes what the registry says of the file.
fn write_manifest(folder: &Folder, bytes: u64) -> Result<(), String> {
    let write = |name: &str, text: &str| {
        fs::write(folder.join(name), text).map_err(|error| format!("{name}: {error}"))
    };
    write("config.json", "{}")?;
    let config = digest(&folder.join("config.json"))?;
    let noise = digest(&folder.join("noise.gguf"))?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": config, "size": 2,
        },
        "layers": [
            {"mediaType": "application/vnd.ollama.image.model", "digest": noise, "size": bytes},
        ],
    });
    write("manifest.json", &manifest.to_string())
}

/// Starts the serving process; gives its host and port.
fn serving(folder: &Folder) -> Result<(Process, String), String> {
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    let child = Command::new(this)
        .args(["bench", "serve-folder"])
        .arg(&folder.0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|error| error.to_string())?;
    let out = child.stdout.take().ok_or("no pipe")?;
    let process = Process(child);
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line).map_err(|error| error.to_string())?;
    let host = line.trim().to_owned();
    if host.is_empty() { Err("the server did not start".to_owned()) } else { Ok((process, host)) }
}

/// Serves the folder until standard input ends.
///
/// # Errors
/// No port is free.
pub fn serve(args: ServeArgs) -> Result<(), String> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
    println!("{}", listener.local_addr().map_err(|error| error.to_string())?);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let folder = args.folder.clone();
            // A client that leaves ends its connection.
            std::thread::spawn(move || answer(&stream, &folder).ok());
        }
    });
    let ended = std::io::stdin().read_to_end(&mut Vec::new());
    ended.map(drop).map_err(|error| error.to_string())
}

/// Answers the requests of a connection, with ranges. The kernel copies from file to socket.
fn answer(mut stream: &TcpStream, folder: &Path) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    loop {
        let Some(request) = lines.next().transpose()? else { return Ok(()) };
        let mut range = None;
        for line in lines.by_ref() {
            let line = line?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(text) = line.strip_prefix("range: bytes=") {
                range = text.split_once('-').map(|(a, b)| (a.parse().ok(), b.parse().ok()));
            }
        }
        let path = request.split(' ').nth(1).unwrap_or_default();
        let name = match path {
            path if path.contains("/manifests/") => "manifest.json",
            // `{}`, which everybody has as a config.
            path if path.contains("44136fa355b3678a") => "config.json",
            _ => "noise.gguf",
        };
        let mut file = File::open(folder.join(name))?;
        let size = file.metadata()?.len();
        let (start, last) = match range {
            Some((Some(start), last)) => (start, last.unwrap_or(size - 1).min(size - 1)),
            _ => (0, size - 1),
        };
        let len = last + 1 - start;
        let head = match range {
            None => "200 OK".to_owned(),
            Some(_) => format!("206 Partial\r\nContent-Range: bytes {start}-{last}/{size}"),
        };
        write!(stream, "HTTP/1.1 {head}\r\nContent-Length: {len}\r\n\r\n")?;
        file.seek(SeekFrom::Start(start))?;
        std::io::copy(&mut file.take(len), &mut stream)?;
    }
}

/// One pull by a new daemon into a new home.
fn pull(v4: &Path, home: &Path, host: &str) -> Result<Round, String> {
    let log = home.with_file_name("log");
    let child = Command::new(v4)
        .arg("serve")
        .env_clear()
        .env("HOME", home.with_file_name("user"))
        .env("V4_HOME", home)
        .env("V4_LISTEN", "off")
        .env("V4_SOCKET", home.with_file_name("socket"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log).map_err(|error| error.to_string())?)
        .spawn();
    let daemon = Process(child.map_err(|error| error.to_string())?);
    let end = Instant::now() + START;
    let socket = home.with_file_name("socket");
    while UnixStream::connect(&socket).is_err() {
        if Instant::now() > end {
            return Err(format!("v4 serve does not start; see {}", log.display()));
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let pid = daemon.0.id();
    let body = json!({"model": format!("{host}/{REPOSITORY}"), "stream": false}).to_string();
    let cpu = cpu_seconds(pid)?;
    let begin = Instant::now();
    let said = post(&socket, &body).map_err(|error| format!("the daemon: {error}"))?;
    let seconds = begin.elapsed().as_secs_f64();
    if !said.contains("success") {
        return Err(format!("the pull failed: {said}"));
    }
    Ok(Round {
        pull: seconds,
        cpu: cpu_seconds(pid)? - cpu,
        peak_bytes: status(pid, "VmHWM")?,
        idle_bytes: status(pid, "VmRSS")?,
        ..Round::default()
    })
}

/// Asks for a pull and waits for its end.
fn post(socket: &Path, body: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    let length = body.len();
    write!(
        stream,
        "POST /api/pull HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// CPU seconds of a process so far, ended threads included: fields 14 and 15 of its `stat`.
fn cpu_seconds(pid: u32) -> Result<f64, String> {
    let text =
        fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|error| error.to_string())?;
    // The name, in brackets, may have blanks; field 3 is the first after it.
    let after = text.rsplit(')').next().unwrap_or_default();
    let fields: Vec<f64> =
        after.split_whitespace().skip(11).take(2).filter_map(|n| n.parse().ok()).collect();
    match fields[..] {
        [user, system] => Ok((user + system) / TICKS),
        _ => Err("/proc/PID/stat has no times".to_owned()),
    }
}

/// Bytes of an entry of a process' `status`.
fn status(pid: u32, name: &str) -> Result<f64, String> {
    let bytes = v4_tests::process::memory(pid, name).map(|bytes| bytes as f64);
    bytes.ok_or_else(|| format!("the daemon has ended, or its status has no {name}"))
}
