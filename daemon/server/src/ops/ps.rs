//! What is loaded.

use v4_supervisor::Loaded;

use crate::daemon::Daemon;

/// All loaded models, the latest expiry first; those that stay for ever come before the rest.
pub async fn list(daemon: &Daemon) -> Vec<Loaded> {
    let mut loaded = daemon.supervisor.ps().await;
    loaded.sort_by(|a, b| match (a.expires, b.expires) {
        (Some(a), Some(b)) => b.cmp(&a),
        (a, b) => a.is_some().cmp(&b.is_some()),
    });
    loaded
}
