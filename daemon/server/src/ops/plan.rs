//! What would happen to a model, and what has.

use std::time::SystemTime;

use v4_proto::{Code, Fault, ModelName};
use v4_supervisor::policy::{Decision, Plan};

use crate::{
    daemon::Daemon,
    ops::models::{self, Wanted},
};

/// What would happen if a model was asked for now.
///
/// # Errors
/// `not_found`, and what is wrong with its files.
pub async fn plan(daemon: &Daemon, wanted: &Wanted) -> Result<Plan, Fault> {
    let model = models::resolve(daemon, wanted).await?;
    let info = models::info(daemon, &model).await?;
    daemon.supervisor.plan(&model.target(Some(info))).await
}

/// What was decided for a model, the oldest first.
#[derive(Debug)]
pub struct Why {
    /// Its name.
    pub name: ModelName,
    /// When, and what.
    pub decisions: Vec<(SystemTime, Decision)>,
}

/// What was decided for a model, be it here still or not.
///
/// # Errors
/// What the store says; not that it is not there.
pub async fn why(daemon: &Daemon, wanted: &Wanted) -> Result<Why, Fault> {
    let name = match models::resolve(daemon, wanted).await {
        Ok(model) => model.record.name,
        Err(fault) if fault.code == Code::NotFound => wanted.name.clone(),
        Err(fault) => return Err(fault),
    };
    let decisions = daemon.supervisor.why(&name).await?;
    Ok(Why { name, decisions })
}
