//! A remote name into the store, and into service where its old version is loaded.

use std::sync::Arc;

use v4_proto::{Digest, Fault};
use v4_pull::{Progress, Stage, Watch};

use crate::{
    daemon::Daemon,
    ops::models::{self, Wanted},
};

/// A pull that somebody watches. The pull is cancelled when the last one who does is gone.
pub struct Pulling {
    daemon: Arc<Daemon>,
    wanted: Wanted,
    watch: Watch,
}

/// Starts a pull, or joins the one that runs.
///
/// # Errors
/// `not_found`, `unsupported`, `overloaded`.
pub fn start(daemon: &Arc<Daemon>, wanted: Wanted) -> Result<Pulling, Fault> {
    let watch = daemon.jobs.pull(&wanted.name)?;
    Ok(Pulling { daemon: Arc::clone(daemon), wanted, watch })
}

impl Pulling {
    /// How far it is, whenever something changed; `None` after the last.
    pub async fn next(&mut self) -> Option<Progress> {
        let progress = self.watch.next().await?;
        if let Stage::Done { digest, .. } = &progress.stage {
            tokio::spawn(replace(Arc::clone(&self.daemon), self.wanted.clone(), *digest));
        }
        Some(progress)
    }
}

/// Brings a new version into service where the old one is loaded. The old one stays when that
/// fails.
async fn replace(daemon: Arc<Daemon>, wanted: Wanted, digest: Digest) {
    let is_old = |loaded: &v4_supervisor::Loaded| {
        loaded.name.matches(&wanted.name) && loaded.digest != digest
    };
    if !daemon.supervisor.ps().await.iter().any(is_old) {
        return;
    }
    let swap = async {
        let model = models::resolve(&daemon, &wanted).await?;
        let info = models::info(&daemon, &model).await?;
        daemon.supervisor.retag(&model.target(Some(info))).await
    };
    match swap.await {
        Ok(_) => tracing::info!(name = %wanted.name, "the new version is in service"),
        Err(fault) => tracing::warn!(name = %wanted.name, %fault, "the old version stays"),
    }
}
