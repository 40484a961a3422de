//! The log: one line an event, one line a request. Prompts, answers and headers are never in it.

use std::sync::Mutex;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

use crate::{config::Config, error::Error};

/// Starts the log as the settings say. A second start in one process has no effect.
///
/// # Errors
/// [`Error::Log`] when the file cannot be opened.
pub fn start(config: &Config) -> Result<(), Error> {
    // What is not ours speaks only when something is wrong.
    let filter = Targets::new()
        .with_default(config.log_level.min(LevelFilter::WARN))
        .with_target("v4", config.log_level);
    let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_target(false);
    let registry = tracing_subscriber::registry().with(filter);
    let started = match &config.log_file {
        None => registry.with(layer.with_writer(std::io::stderr)).try_init(),
        Some(path) => {
            let failed = |source| Error::Log { path: path.clone(), source };
            if let Some(folder) = path.parent() {
                v4_store::fs::bind_dir(folder).map_err(failed)?;
            }
            let file = v4_store::fs::open_append(path).map_err(failed)?;
            registry.with(layer.with_writer(Mutex::new(file))).try_init()
        }
    };
    if started.is_err() {
        tracing::debug!("the log is running already");
    }
    Ok(())
}
