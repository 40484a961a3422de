//! A local file, copied into the store.

use v4_store::fs::{Fs as _, RealFs};

use super::{pump, read_all};
use crate::{error::PullError, write::Sink};

/// Reads a file into the sink.
pub(crate) async fn read(path: &str, sink: &Sink<'_>) -> Result<u64, PullError> {
    let path = path.to_owned();
    pump(sink, move |take| {
        let failed = |source| PullError::File { path: path.clone(), source };
        let mut file = RealFs.open_read(path.as_ref()).map_err(failed)?;
        read_all(&mut file, take).map_err(failed)
    })
    .await
}
