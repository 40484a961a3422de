//! Where a daemon lives: its home and its socket. Client and server ask here, so they always agree.
//!
//! Pure functions: the caller hands in how a variable is looked up, and makes the path absolute, as
//! it alone may know the current folder.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The variable that moves the home.
pub const HOME_VARIABLE: &str = "V4_HOME";
/// The variable that moves the socket.
pub const SOCKET_VARIABLE: &str = "V4_SOCKET";
/// The variable that moves the log.
pub const LOG_VARIABLE: &str = "V4_LOG_FILE";
/// The file name of the socket, in the runtime directory or in the home.
pub const SOCKET_FILE: &str = "v4.sock";
/// The file name of the log of a daemon that was started in the background, in the home.
pub const LOG_FILE: &str = "v4.log";
/// The file name of the settings, in the home.
pub const CONFIG_FILE: &str = "config.toml";
/// The file name of the keys that open a daemon to others, in the home.
pub const KEYS_FILE: &str = "keys";
/// The file name of the history of `v4 run`, in the home.
pub const HISTORY_FILE: &str = "history";

/// The daemon's home: `given`, else `$V4_HOME`, else `~/.v4`. `None` when the user has no home
/// directory to put it in.
pub fn home(given: Option<&Path>, variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    given
        .map(Path::to_owned)
        .or_else(|| non_empty(&variable, HOME_VARIABLE))
        .or_else(|| default_home(&variable))
}

/// The socket of the daemon at `home`: `$V4_SOCKET`, else `$XDG_RUNTIME_DIR/v4.sock` for the
/// default home where there is such a directory, else `v4.sock` in the home.
pub fn socket(home: &Path, variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    if let Some(path) = non_empty(&variable, SOCKET_VARIABLE) {
        return path;
    }
    let is_default = default_home(&variable).is_some_and(|default| default == home);
    match non_empty(&variable, "XDG_RUNTIME_DIR") {
        Some(runtime) if is_default => runtime.join(SOCKET_FILE),
        _ => home.join(SOCKET_FILE),
    }
}

/// The log file that `$V4_LOG_FILE` names. `None` when it names none: then a daemon that was
/// started in the background has [`LOG_FILE`] in its home.
pub fn log(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    non_empty(&variable, LOG_VARIABLE)
}

fn default_home(variable: &impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    non_empty(variable, "HOME").map(|user| user.join(".v4"))
}

/// A variable that is set to nothing counts as not set.
fn non_empty(variable: &impl Fn(&str) -> Option<OsString>, name: &str) -> Option<PathBuf> {
    variable(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup<'a>(set: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<OsString> + 'a {
        |name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
    }

    #[test]
    fn the_home_is_what_was_said_nearest() {
        let all = [("V4_HOME", "/v"), ("HOME", "/u")];
        assert_eq!(home(Some(Path::new("/g")), lookup(&all)), Some("/g".into()));
        assert_eq!(home(None, lookup(&all)), Some("/v".into()));
        assert_eq!(home(None, lookup(&[("V4_HOME", ""), ("HOME", "/u")])), Some("/u/.v4".into()));
        assert_eq!(home(None, lookup(&[])), None);
    }

    #[test]
    fn the_runtime_directory_is_for_the_default_home_only() {
        let env = [("XDG_RUNTIME_DIR", "/run/u"), ("HOME", "/u")];
        assert_eq!(socket(Path::new("/u/.v4"), lookup(&env)), Path::new("/run/u/v4.sock"));
        assert_eq!(socket(Path::new("/other"), lookup(&env)), Path::new("/other/v4.sock"));
        assert_eq!(socket(Path::new("/u/.v4"), lookup(&env[1..])), Path::new("/u/.v4/v4.sock"));
        let moved = [("V4_SOCKET", "/s"), ("XDG_RUNTIME_DIR", "/run/u"), ("HOME", "/u")];
        assert_eq!(socket(Path::new("/u/.v4"), lookup(&moved)), Path::new("/s"));
    }
}
