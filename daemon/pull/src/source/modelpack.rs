//! Weights that a registry has inside an archive, as OCI ModelPack allows: the blob is staged whole
//! and checked, then the one GGUF file in it is read out.

use super::{
    Place, Share, Target,
    archive::{self, Wanted},
};
use crate::{
    error::PullError,
    recipe::{Part, RegistryBlob},
    write::Sink,
};

/// What the media types of weights begin with; the form follows.
const WEIGHTS: &str = "application/vnd.cncf.model.weight.v1.";

/// Whether a layer is an archive of weights.
pub(super) fn is_archive(media_type: &str) -> bool {
    media_type.strip_prefix(WEIGHTS).is_some_and(|form| form.starts_with("tar"))
}

/// Reads the weights into the sink. The key of the archive they came from is added to `staged`.
pub(super) async fn read(
    place: Place<'_>,
    blob: &RegistryBlob,
    size: u64,
    share: Share,
    sink: &Sink<'_>,
    staged: &mut Vec<String>,
) -> Result<u64, PullError> {
    let target = Target::of(place.net, &Part::Registry(blob.clone()));
    let target = target.ok_or_else(|| PullError::location(""))?;
    let key = format!("archive-{}", blob.digest.hex());
    let wanted = Wanted { key, target, size: Some(size), digest: Some(blob.digest) };
    let archive = archive::stage(place, &wanted, share, sink).await?;
    let url = wanted.target.shown();
    let is_weights = |name: &str| name.to_ascii_lowercase().ends_with(".gguf");
    let wrong = move |what: String| PullError::Answer { url: url.clone(), what };
    let outcome = archive::unpack_tar(place, archive.open()?, sink, is_weights, wrong).await;
    archive.done(wanted.key, outcome, staged).await
}
