//! What is to be done, decided without doing it.

use v4_proto::Digest;
use v4_store::{Record, sha256};

use crate::recipe::{Location, Recipe, RecipeFile};

/// What a file needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// It is in the store.
    Have {
        /// Which blob.
        digest: Digest,
        /// Its bytes.
        size: u64,
    },
    /// It is to be fetched, or gone on with where a partial is.
    Fetch,
}

/// What each file needs, given the sizes of the blobs that are here. A blob of another size than
/// the recipe's is damaged and fetched again.
pub(crate) fn steps(
    files: &[RecipeFile],
    mut blob_size: impl FnMut(&Digest) -> Option<u64>,
) -> Vec<Step> {
    let step = |file: &RecipeFile| {
        let Some(digest) = file.digest else { return Step::Fetch };
        match blob_size(&digest) {
            Some(size) if file.size.is_none_or(|wanted| wanted == size) => {
                Step::Have { digest, size }
            }
            _ => Step::Fetch,
        }
    };
    files.iter().map(step).collect()
}

/// The order to try sources in: as given, but those that were found unreachable last.
pub(crate) fn order(
    sources: &[Location],
    is_unreachable: impl Fn(&Location) -> bool,
) -> Vec<&Location> {
    let (last, mut first): (Vec<_>, Vec<_>) =
        sources.iter().partition(|location| is_unreachable(location));
    first.extend(last);
    first
}

/// Whether the name already points to just what the recipe says.
pub(crate) fn is_current(recipe: &Recipe, record: &Record) -> bool {
    if let Some(manifest) = &recipe.manifest {
        return record.digest == sha256(manifest);
    }
    let files = recipe.files.iter().map(|file| (file.media_type.as_str(), file.digest));
    let texts =
        recipe.texts.iter().map(|(_, ty, text)| (ty.as_str(), Some(sha256(text.as_bytes()))));
    let layers = &record.manifest.layers;
    files
        .chain(texts)
        .eq(layers.iter().map(|layer| (layer.media_type.as_str(), Some(layer.digest))))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use v4_store::{Layer, Manifest, Role};

    use super::*;

    fn file(digest: Option<Digest>, size: Option<u64>) -> RecipeFile {
        let media_type = Role::Model.media_type();
        RecipeFile { role: Role::Model, media_type, digest, size, sources: Vec::new() }
    }

    #[test]
    fn what_is_here_and_whole_is_not_fetched() {
        let [a, b, c] = [b"a", b"b", b"c"].map(|bytes| sha256(bytes));
        let files = [
            file(Some(a), Some(10)),
            file(Some(a), None),
            file(Some(b), Some(10)),
            file(Some(c), Some(10)),
            file(None, Some(10)),
        ];
        let here = |digest: &Digest| {
            [(a, 10), (b, 9)].iter().find(|blob| blob.0 == *digest).map(|blob| blob.1)
        };
        let have = Step::Have { digest: a, size: 10 };
        assert_eq!(steps(&files, here), [have, have, Step::Fetch, Step::Fetch, Step::Fetch]);
    }

    #[test]
    fn unreachable_sources_come_last_in_their_own_order() {
        let sources: Vec<Location> =
            ["file:/a", "file:/b", "file:/c", "file:/d"].map(|text| text.parse().unwrap()).into();
        let bad =
            |location: &Location| matches!(location.to_string().as_str(), "file:/a" | "file:/c");
        let order: Vec<String> = order(&sources, bad).iter().map(ToString::to_string).collect();
        assert_eq!(order, ["file:/b", "file:/d", "file:/a", "file:/c"]);
    }

    #[test]
    fn a_name_is_current_when_all_layers_are_the_recipes() {
        let (weights, text) = (sha256(b"weights"), "a licence");
        let license = Role::License.media_type();
        let recipe = Recipe {
            name: "m".parse().unwrap(),
            files: vec![file(Some(weights), Some(7))],
            texts: vec![(Role::License, license.clone(), text.to_owned())],
            manifest: None,
            origin: crate::recipe::Origin::default(),
        };
        let record = |layers| Record {
            name: recipe.name.clone(),
            digest: sha256(b"manifest"),
            manifest: Manifest::new(Layer::new("config", sha256(b"{}"), 2), layers),
            modified: SystemTime::UNIX_EPOCH,
        };
        let model = Layer::new(Role::Model.media_type(), weights, 7);
        let words = Layer::new(license, sha256(text.as_bytes()), 9);
        assert!(is_current(&recipe, &record(vec![model.clone(), words.clone()])));
        assert!(!is_current(&recipe, &record(vec![words.clone(), model.clone()])));
        assert!(!is_current(&recipe, &record(vec![model.clone()])));
        let other = Layer::new(Role::Model.media_type(), sha256(b"other"), 7);
        assert!(!is_current(&recipe, &record(vec![other, words])));
    }
}
