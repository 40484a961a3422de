//! A remote name into the store, and into service where its old version is loaded.

use std::{num::NonZeroU64, sync::Arc};

use v4_proto::{Digest, Fault};
use v4_pull::{Change, Progress, Stage, Watch, Wish};

use crate::{
    daemon::Daemon,
    ops::models::{self, Wanted},
    replace::relay,
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
pub fn start(daemon: &Arc<Daemon>, wanted: Wanted, wish: Wish) -> Result<Pulling, Fault> {
    let watch = daemon.jobs.pull(&wanted.name, wish)?;
    Ok(Pulling { daemon: Arc::clone(daemon), wanted, watch })
}

/// What pulls are told.
#[derive(Debug, Clone, PartialEq)]
pub enum Order {
    /// One of them.
    One(Wanted, Change),
    /// All of them together: bytes a second.
    Rate(Option<NonZeroU64>),
}

/// Tells pulls what to do.
///
/// # Errors
/// `not_found` when no pull of the name runs.
pub fn steer(daemon: &Daemon, order: Order) -> Result<(), Fault> {
    match order {
        Order::One(wanted, change) => daemon.jobs.change(&wanted.name, change),
        Order::Rate(rate) => {
            daemon.jobs.set_rate(rate);
            Ok(())
        }
    }
}

/// Starts to send a model to its registry. The push is cancelled when this is dropped.
///
/// # Errors
/// `not_found`; what the store says.
pub async fn push(daemon: &Daemon, wanted: Wanted, is_plain: bool) -> Result<Watch, Fault> {
    models::one(daemon, &wanted).await?;
    Ok(daemon.jobs.push(&wanted.name, is_plain))
}

impl Pulling {
    /// The words of the daemon that goes on with it.
    ///
    /// # Errors
    /// `upstream` when that does not answer.
    pub async fn elsewhere(&self) -> Result<relay::Lines, Fault> {
        relay::pull(&self.daemon, &self.wanted.name).await
    }

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
pub async fn replace(daemon: Arc<Daemon>, wanted: Wanted, digest: Digest) {
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
