//! Looking after the store: what it costs, what is damaged, what nobody needs.

use std::{path::PathBuf, sync::Arc};

use tokio::sync::mpsc;
use v4_proto::{Fault, ModelName};
use v4_pull::{Stage, Wish};
use v4_store::{Damage, Entry, Usage};

use crate::{
    daemon::Daemon,
    limits,
    ops::{
        create::Say,
        models::{self, Wanted},
    },
};

/// What each name costs.
///
/// # Errors
/// What the store says.
pub async fn usage(daemon: &Daemon) -> Result<Usage, Fault> {
    daemon.blocking(v4_store::Store::usage).await
}

/// The names that no quota removes.
///
/// # Errors
/// What the store says.
pub async fn pins(daemon: &Daemon) -> Result<Vec<ModelName>, Fault> {
    daemon.blocking(v4_store::Store::pins).await
}

/// Pins a stored name, or takes its pin away.
///
/// # Errors
/// `not_found` for a name that is not here; what the store says.
pub async fn pin(daemon: &Daemon, wanted: Wanted, is_pinned: bool) -> Result<(), Fault> {
    if is_pinned {
        models::one(daemon, &wanted).await?;
    }
    daemon.blocking(move |store| store.pin(&wanted.name, is_pinned)).await.map(drop)
}

/// The names that were deleted and can come back.
///
/// # Errors
/// What the store says.
pub async fn deleted(daemon: &Daemon) -> Result<Vec<Entry>, Fault> {
    daemon.blocking(v4_store::Store::deleted).await
}

/// Removes what nobody needs. Returns the bytes that came free.
///
/// # Errors
/// What the store says.
pub async fn prune(daemon: &Daemon, partials: bool) -> Result<u64, Fault> {
    daemon.blocking(move |store| store.prune(partials)).await
}

/// Begins to read another program's store in place, or ends it.
///
/// # Errors
/// `invalid` for a folder that is no store, or that is not read; what the store says.
pub async fn change_roots(
    daemon: &Daemon,
    add: Option<PathBuf>,
    remove: Option<PathBuf>,
) -> Result<(), Fault> {
    if let Some(path) = add {
        daemon.blocking(move |store| store.add_root(&path)).await?;
    }
    if let Some(path) = remove {
        let shown = path.display().to_string();
        if !daemon.blocking(move |store| store.remove_root(&path)).await? {
            return Err(Fault::invalid(format!("{shown} is none of the stores that are read")));
        }
    }
    Ok(())
}

/// Hashes everything and tells what is damaged; with `repair` it is pulled again, of large blobs
/// only the damaged parts.
///
/// # Errors
/// `corrupt` when something is damaged and was not mended; what the store says.
pub async fn check(daemon: &Arc<Daemon>, repair: bool, say: &Say) -> Result<(), Fault> {
    let (sender, mut lines) = mpsc::channel(limits::CREATE_LINES);
    let work = daemon.blocking(move |store| {
        store.check(|digest, size| {
            // Whoever left need not hear it.
            let _ = sender.blocking_send(format!("checking {} ({size} bytes)", digest.short()));
        })
    });
    let tell = async {
        while let Some(line) = lines.recv().await {
            let _ = say.send(line).await;
        }
    };
    let (damages, ()) = tokio::join!(work, tell);
    let damages = damages?;
    for damage in &damages {
        let _ = say.send(words(damage)).await;
    }
    let mut names: Vec<_> = damages.into_iter().map(|damage| damage.name).collect();
    names.dedup();
    if names.is_empty() || !repair {
        return match names.len() {
            0 => Ok(()),
            n => Err(Fault::new(
                v4_proto::Code::Corrupt,
                format!("{n} model(s) are damaged; mend them with `v4 fsck --repair`"),
            )),
        };
    }
    for name in names {
        let _ = say.send(format!("pulling {name}")).await;
        if let Stage::Failed(fault) = daemon.jobs.pull(&name, Wish::default())?.last().await.stage {
            let words = format!("'{name}' could not be mended: {}", fault.message);
            return Err(Fault::new(fault.code, words));
        }
        let _ = say.send(format!("{name} is whole again")).await;
    }
    Ok(())
}

fn words(damage: &Damage) -> String {
    let Damage { name, blob, what } = damage;
    match blob {
        Some(digest) => format!("{name}: the blob {} {what}", digest.short()),
        None => what.clone(),
    }
}
