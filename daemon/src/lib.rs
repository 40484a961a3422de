//! The two columns of v4, each behind one function.
//!
//! **Owns** the choice of column: the control plane ([`serve`]) or one model's process
//! ([`runner`]). Nothing else names both, and the types here are those of their signatures.
//!
//! **Never** does anything itself.
//!
//! **Start reading at** `v4_server` for the left column, `v4_runner` for the right.

#![forbid(unsafe_code)]

pub use v4_runner::Error as RunnerError;
pub use v4_server::{Config, Error as ServeError, Given};

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// What keeps it from starting: the home, the sockets, or the store.
pub fn serve(config: Config) -> Result<(), ServeError> {
    v4_server::serve(config)
}

/// Runs one model's process for the daemon whose socket is standard input.
///
/// # Errors
/// What ended it other than in order; the daemon has been told.
pub fn runner() -> Result<(), RunnerError> {
    v4_runner::run()
}
