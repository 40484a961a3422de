//! `v4 runner`: one model's process. The daemon starts it; its standard input is the socket.

use crate::cmd::World;
use crate::error::Failure;

/// One model's process; started by the daemon, of no use by hand
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: &Args, _world: &World) -> Result<(), Failure> {
    v4_daemon::runner().map_err(|error| Failure::Daemon(error.to_string()))
}
