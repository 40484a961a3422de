//! What pulls are given: the library that ships with v4 as their catalog, and the supervisor's
//! short-lived runners to read headers with.

use v4_modelfile::library;
use v4_proto::{Fault, ModelFiles, ModelName};
use v4_pull::{Catalog, Inspecting, Inspector, Location, Origin, Recipe, RecipeFile};
use v4_store::Role;
use v4_supervisor::Supervisor;

/// The library as a catalog.
#[derive(Debug, Clone, Copy)]
pub struct Library;

impl Catalog for Library {
    fn find(&self, name: &ModelName) -> Option<Recipe> {
        if !name.is_library() {
            return None;
        }
        let entry = library::find(name.model(), name.tag())?;
        match recipe(name, entry) {
            Ok(recipe) => Some(recipe),
            Err(fault) => {
                tracing::error!(%name, %fault, "an entry of the library is broken");
                None
            }
        }
    }

    fn names(&self) -> Vec<String> {
        library::all().iter().map(library::Entry::name).collect()
    }
}

/// What an entry of the library says, as a pull reads it.
fn recipe(name: &ModelName, entry: &library::Entry) -> Result<Recipe, Fault> {
    let modelfile = entry.modelfile();
    let mut files = Vec::new();
    for file in modelfile.files() {
        let role = match file.kind {
            "FROM" => Role::Model,
            "ADAPTER" => Role::Adapter,
            _ => Role::Other,
        };
        let digest = file.digest.map(str::parse).transpose();
        let place =
            |parts: &&[String]| parts.join(" ").parse::<Location>().map_err(|error| error.fault());
        files.push(RecipeFile {
            role,
            media_type: role.media_type(),
            digest: digest
                .map_err(|error: v4_proto::name::NameError| Fault::internal(error.to_string()))?,
            size: file.size,
            sources: file.sources.iter().map(place).collect::<Result<_, _>>()?,
        });
    }
    let mut texts = Vec::new();
    let mut add = |role: Role, text: String| texts.push((role, role.media_type(), text));
    if let Some(text) = modelfile.template() {
        add(Role::Template, text.to_owned());
    }
    if let Some(text) = modelfile.system() {
        add(Role::System, text.to_owned());
    }
    if let Some(json) = modelfile.params_json() {
        add(Role::Params, json);
    }
    if let Some(json) = modelfile.messages_json() {
        add(Role::Messages, json);
    }
    for text in modelfile.licenses() {
        add(Role::License, text.to_owned());
    }
    let origin = Origin { from: format!("library:{}", entry.name()), ..Origin::default() };
    Ok(Recipe { name: name.clone(), files, texts, manifest: None, origin })
}

/// The supervisor's runners as readers of headers.
pub struct Headers(pub Supervisor);

impl Inspector for Headers {
    fn inspect(&self, files: ModelFiles) -> Inspecting<'_> {
        Box::pin(self.0.inspect(files))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_of_the_library_is_a_recipe() {
        for entry in library::all() {
            let name: ModelName = entry.name().parse().expect("a name");
            let recipe = Library.find(&name).expect("a recipe");
            assert_eq!(recipe.name, name);
            assert!(recipe.files.iter().any(|file| file.role == Role::Model), "{name}");
            for file in &recipe.files {
                assert!(file.digest.is_some() && file.size.is_some(), "{name}");
                assert!(!file.sources.is_empty(), "{name}");
            }
            assert!(recipe.texts.iter().any(|text| text.0 == Role::License), "{name}");
        }
        assert_eq!(Library.names().len(), library::all().len());
        let elsewhere: ModelName = "example.org/library/smollm2".parse().expect("a name");
        assert!(Library.find(&elsewhere).is_none());
        assert!(Library.find(&"somebody/smollm2".parse().expect("a name")).is_none());
    }
}
