//! The log: one line an event, one line a request. Prompts, answers and headers are never in it.

use std::sync::{Mutex, OnceLock};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    Registry,
    filter::Targets,
    fmt::{self, writer::BoxMakeWriter},
    layer::SubscriberExt,
    reload,
    util::SubscriberInitExt,
};

use crate::{
    config::{Config, LogFormat},
    error::Error,
};

/// Starts the log as the settings say. A second start in one process has no effect.
///
/// # Errors
/// [`Error::Log`] when the file cannot be opened.
pub fn start(config: &Config) -> Result<(), Error> {
    let (filter, handle) = reload::Layer::new(filter(config.log));
    let writer = match &config.log_file {
        None => BoxMakeWriter::new(std::io::stderr),
        Some(path) => {
            let failed = |source| Error::Log { path: path.clone(), source };
            if let Some(folder) = path.parent() {
                v4_store::fs::bind_dir(folder).map_err(failed)?;
            }
            BoxMakeWriter::new(Mutex::new(v4_store::fs::open_append(path).map_err(failed)?))
        }
    };
    let registry = tracing_subscriber::registry().with(filter);
    let layer = fmt::layer().with_ansi(false).with_target(false).with_writer(writer);
    let started = match config.log_format {
        LogFormat::Text => registry.with(layer).try_init(),
        LogFormat::Json => {
            registry.with(layer.json().flatten_event(true).with_span_list(false)).try_init()
        }
    };
    if started.is_err() || FILTER.set(handle).is_err() {
        tracing::debug!("the log is running already");
    }
    Ok(())
}

/// What is let through, once the log runs.
static FILTER: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// What is not ours speaks only when something is wrong.
fn filter(level: LevelFilter) -> Targets {
    Targets::new().with_default(level.min(LevelFilter::WARN)).with_target("v4", level)
}

/// Logs from now on what is at least this urgent.
pub fn set_level(level: LevelFilter) {
    if let Some(Err(error)) = FILTER.get().map(|handle| handle.reload(filter(level))) {
        tracing::warn!(%error, "the level of the log stays as it is");
    }
}
