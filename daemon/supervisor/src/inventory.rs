//! How much memory models may take on this machine: what the kernel says is available, and what the
//! control groups around this process leave of it.

use std::path::{Path, PathBuf};

use v4_store::fs::{self, Fs, RealFs};

use crate::limits;

/// Bytes that models may take: a share of what is available now.
pub(crate) fn budget_bytes() -> u64 {
    let available = available_bytes(&RealFs).unwrap_or_else(|| {
        tracing::warn!("this machine does not say how much memory is available; 4 GiB are assumed");
        4 << 30
    });
    available / 100 * limits::MEMORY_SHARE_PERCENT
}

/// Physical cores that this process may use, as far as the machine numbers them: two threads of a
/// core multiply no faster than one.
pub(crate) fn cores() -> u32 {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    let text = read(&RealFs, Path::new("/proc/cpuinfo"));
    let physical = text.map_or(0, |text| physical_cores(&text));
    let cores = if physical == 0 { logical } else { physical.min(logical) };
    u32::try_from(cores).unwrap_or(u32::MAX)
}

/// Different cores in `/proc/cpuinfo`; 0 where it does not number them.
fn physical_cores(cpuinfo: &str) -> usize {
    let mut socket = "";
    let mut cores = std::collections::BTreeSet::new();
    for line in cpuinfo.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        match key.trim() {
            "physical id" => socket = value.trim(),
            "core id" => {
                cores.insert((socket, value.trim()));
            }
            _ => {}
        }
    }
    cores.len()
}

/// `MemAvailable` of the machine, or what the narrowest control group leaves, if that is less.
fn available_bytes(files: &dyn Fs) -> Option<u64> {
    let machine = read(files, Path::new("/proc/meminfo")).and_then(|text| meminfo(&text));
    let group = read(files, Path::new("/proc/self/cgroup")).and_then(|text| group(&text));
    let groups = group.into_iter().flat_map(|folder| {
        let parents: Vec<PathBuf> = folder.ancestors().map(Path::to_path_buf).collect();
        parents.into_iter().take_while(|path| path.starts_with("/sys/fs/cgroup"))
    });
    let left = groups.filter_map(|folder| {
        let file = |name: &str| read(files, &folder.join(name));
        left_bytes(&file("memory.max")?, &file("memory.current")?, &file("memory.stat")?)
    });
    machine.into_iter().chain(left).min()
}

fn read(files: &dyn Fs, path: &Path) -> Option<String> {
    let bytes = fs::read(files, path, limits::INVENTORY_FILE_BYTES).ok()?;
    String::from_utf8(bytes).ok()
}

/// The number behind a key of lines like `key 12` and `Key:   12 kB`.
fn field(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn meminfo(text: &str) -> Option<u64> {
    field(text, "MemAvailable:")?.checked_mul(1024)
}

/// The folder of the unified (version 2) control group of `/proc/self/cgroup`.
fn group(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new("/sys/fs/cgroup").join(path))
}

/// What a group with a limit leaves; file pages that nobody has used lately can be dropped.
fn left_bytes(max: &str, current: &str, stat: &str) -> Option<u64> {
    let max: u64 = max.trim().parse().ok()?;
    let current: u64 = current.trim().parse().ok()?;
    let inactive = field(stat, "inactive_file").unwrap_or(0);
    Some(max.saturating_sub(current.saturating_sub(inactive)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_one_core_count_once() {
        let line = |socket, core| {
            format!("processor\t: 0\nphysical id\t: {socket}\ncore id\t\t: {core}\n\n")
        };
        let text: String =
            [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0)].map(|(s, c)| line(s, c)).concat();
        assert_eq!(physical_cores(&text), 3);
        assert_eq!(physical_cores("processor\t: 0\nBogoMIPS\t: 48\n"), 0);
        assert!(cores() > 0);
    }

    #[test]
    fn the_kernels_files_are_understood() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:    1000 kB\nBuffers: 1 kB\n";
        assert_eq!(meminfo(text), Some(1_024_000));
        assert_eq!(meminfo("MemTotal: 5 kB\n"), None);
        assert_eq!(
            group("12:memory:/x\n0::/user.slice/a.service\n"),
            Some(PathBuf::from("/sys/fs/cgroup/user.slice/a.service"))
        );
        assert_eq!(group("0::/\n"), Some(PathBuf::from("/sys/fs/cgroup/")));
        assert_eq!(group("4:memory:/old\n"), None);
        assert_eq!(left_bytes("max\n", "5\n", ""), None);
        assert_eq!(left_bytes("1000\n", "700\n", "anon 5\ninactive_file 100\n"), Some(400));
        assert_eq!(left_bytes("1000\n", "2000\n", ""), Some(0));
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(budget_bytes() > 1 << 20);
    }
}
