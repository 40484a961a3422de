//! The standard output, whose reader may leave at any time.

use std::io::{self, IsTerminal as _, Write as _};

use crate::error::Failure;

/// Writes `text` to the standard output at once.
///
/// # Errors
/// [`Failure::ReaderLeft`] or [`Failure::Output`].
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::output)
}

/// Writes a line for the person, not for a pipe, to the standard error. That it cannot be written
/// changes nothing.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Whether a person reads the standard output.
pub fn is_seen() -> bool {
    io::stdout().is_terminal()
}
