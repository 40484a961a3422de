//! What pulls are given: the library that ships with v4 as their catalog, and the supervisor's
//! short-lived runners to read headers with.

use v4_modelfile::{Modelfile, library};
use v4_proto::{Fault, ModelFiles, ModelName, name::Reference};
use v4_pull::{Catalog, Inspecting, Inspector, Location, Origin, Recipe, RecipeFile, Upstream};
use v4_store::{Role, manifest::folder_file};
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
        if upstream(entry).is_some() {
            return None;
        }
        match recipe(name, entry) {
            Ok(recipe) => Some(recipe),
            Err(fault) => {
                tracing::error!(%name, %fault, "an entry of the library is broken");
                None
            }
        }
    }

    fn upstream(&self, name: &ModelName) -> Option<Upstream> {
        let entry = name.is_library().then(|| library::find(name.model(), name.tag()))??;
        upstream(entry)
    }

    fn names(&self) -> Vec<String> {
        // The models: with all their tags a message would be a page.
        let mut models: Vec<String> = Vec::new();
        for entry in library::all() {
            if !models.iter().any(|model| model == entry.model) {
                models.push(entry.model.to_owned());
            }
        }
        models
    }
}

/// The repository that an entry means, if it has no files of its own.
fn upstream(entry: &library::Entry) -> Option<Upstream> {
    let modelfile = entry.modelfile();
    let files = modelfile.files();
    let file = files.first().filter(|file| file.sources.is_empty())?;
    let Reference { name, revision } = file.from.parse().ok()?;
    Some(Upstream { name, revision, texts: texts(&modelfile) })
}

/// What an entry of the library says, as a pull reads it.
fn recipe(name: &ModelName, entry: &library::Entry) -> Result<Recipe, Fault> {
    let modelfile = entry.modelfile();
    let mut files = Vec::new();
    for file in modelfile.files() {
        let (role, media_type) = match (file.kind, folder_file(file.from)) {
            ("FROM", Some((role, media_type))) => (role, media_type.to_owned()),
            ("FROM", None) => (Role::Model, Role::Model.media_type()),
            ("ADAPTER", _) => (Role::Adapter, Role::Adapter.media_type()),
            _ => (Role::Other, Role::Other.media_type()),
        };
        let digest = file.digest.map(str::parse).transpose();
        let place =
            |parts: &&[String]| parts.join(" ").parse::<Location>().map_err(|error| error.fault());
        files.push(RecipeFile {
            role,
            media_type,
            digest: digest
                .map_err(|error: v4_proto::name::NameError| Fault::internal(error.to_string()))?,
            size: file.size,
            sources: file.sources.iter().map(place).collect::<Result<_, _>>()?,
        });
    }
    let texts = texts(&modelfile);
    let origin = Origin { from: format!("library:{}", entry.name()), ..Origin::default() };
    Ok(Recipe { name: name.clone(), files, texts, manifest: None, origin })
}

/// The texts of an entry, in the order of a manifest.
fn texts(modelfile: &Modelfile) -> Vec<(Role, String, String)> {
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
    texts
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
    fn every_entry_of_the_library_is_a_recipe_or_a_repository() {
        for entry in library::all() {
            let name: ModelName = entry.name().parse().expect("a name");
            if !entry.is_checked() {
                let upstream = Library.upstream(&name).expect("a repository");
                assert_eq!((upstream.name.host(), Library.find(&name)), ("hf.co", None), "{name}");
                assert!(upstream.texts.iter().any(|text| text.0 == Role::License), "{name}");
                continue;
            }
            assert_eq!(Library.upstream(&name), None, "{name}");
            let recipe = Library.find(&name).expect("a recipe");
            assert_eq!(recipe.name, name);
            assert!(recipe.files.iter().any(|file| file.role == Role::Model), "{name}");
            for file in &recipe.files {
                assert!(file.digest.is_some() && file.size.is_some(), "{name}");
                assert!(!file.sources.is_empty(), "{name}");
            }
            assert!(recipe.texts.iter().any(|text| text.0 == Role::License), "{name}");
        }
        let names = Library.names();
        assert!(names.iter().any(|name| name == "qwen3") && names.len() < library::all().len());
        let elsewhere: ModelName = "example.org/library/smollm2".parse().expect("a name");
        assert!(Library.find(&elsewhere).is_none());
        assert!(Library.find(&"somebody/smollm2".parse().expect("a name")).is_none());
    }
}
