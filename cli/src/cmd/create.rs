//! `v4 create`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use v4_modelfile::{Directive, Modelfile};
use v4_proto::{Digest, ModelName};

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::files::{self, Kind};
use crate::output;
use crate::place::Place;
use crate::pulling;

/// Make a model of a Modelfile: another model, a GGUF file or a folder of safetensors, with your
/// texts and parameters
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The name to make
    model: String,
    /// The Modelfile
    #[arg(short, long, default_value = "Modelfile", value_name = "PATH")]
    file: PathBuf,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let name: ModelName = args.model.parse()?;
    let text = files::text(&args.file)?;
    let shown = args.file.display();
    let modelfile = Modelfile::parse(&text)
        .map_err(|error| Failure::Wrong(format!("{shown} {error}")))?;
    let folder = args.file.parent().unwrap_or(Path::new("."));
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    client::runtime()?.block_on(async {
        let mut body = described(&modelfile);
        body.insert("model".to_owned(), name.to_string().into());
        for file in modelfile.files() {
            match (file.kind, source(file.from, folder)?) {
                ("FROM", Source::Name(from)) => set(&mut body, "from", from.into())?,
                ("FROM", Source::File(path)) => add(&client, &mut body, "files", &path).await?,
                ("FROM", Source::Folder(paths)) => {
                    for path in paths {
                        add(&client, &mut body, "files", &path).await?;
                    }
                }
                ("ADAPTER", Source::File(path)) => {
                    add(&client, &mut body, "adapters", &path).await?;
                }
                (kind, _) => {
                    return Err(Failure::Wrong(format!(
                        "{kind} {}: this version makes models of FROM and of ADAPTER files only",
                        file.from
                    )));
                }
            }
        }
        pulling::follow(&client, "/api/create", &Value::Object(body)).await
    })
}

/// What a FROM or ADAPTER line means.
#[derive(Debug, PartialEq)]
enum Source {
    /// A model.
    Name(String),
    /// A file of this machine.
    File(PathBuf),
    /// The files of a folder that make a model.
    Folder(Vec<PathBuf>),
}

/// A file where there is one, or where it is written as a path; else a model's name.
fn source(text: &str, folder: &Path) -> Result<Source, Failure> {
    let path = folder.join(text);
    match files::kind(&path) {
        Some(Kind::File) => return Ok(Source::File(path)),
        Some(Kind::Folder) => {
            let files = model_files(&path, &files::list(&path)?);
            // A folder beside a Modelfile may have the name of a model by chance.
            if !files.is_empty() {
                return Ok(Source::Folder(files));
            }
            if text.parse::<ModelName>().is_err() {
                return Err(Failure::Wrong(format!(
                    "{} has neither safetensors nor GGUF files",
                    path.display()
                )));
            }
        }
        None => {}
    }
    let is_path = text.starts_with(['/', '.', '~']) || text.rsplit('.').next() == Some("gguf");
    match text.parse::<ModelName>() {
        Ok(name) if !is_path => Ok(Source::Name(name.to_string())),
        _ => Err(Failure::Wrong(format!("there is no file {}", path.display()))),
    }
}

/// The files of a folder that make a model: safetensors with the JSON and the template beside
/// them, else GGUF. Which of them are needed is the daemon's to say.
fn model_files(folder: &Path, names: &[String]) -> Vec<PathBuf> {
    let has_ending = |name: &str, endings: &[&str]| {
        name.rsplit_once('.').is_some_and(|(_, ending)| endings.contains(&ending))
    };
    let is_folder = names.iter().any(|name| has_ending(name, &["safetensors"]));
    let endings: &[&str] = if is_folder { &["safetensors", "json", "jinja"] } else { &["gguf"] };
    let wanted = names.iter().filter(|name| has_ending(name, endings) && !name.contains("mmproj"));
    // Weights first: of several sets those that begin as the index of the weights does.
    let is_usual = |name: &str| has_ending(name, &["safetensors"]) && name.starts_with("model");
    let has_usual = names.iter().any(|name| is_usual(name));
    let is_other = |name: &str| has_ending(name, &["safetensors"]) && !is_usual(name);
    wanted.filter(|name| !(has_usual && is_other(name))).map(|name| folder.join(name)).collect()
}

/// Sets a field that may be said once.
fn set(body: &mut Map<String, Value>, key: &str, value: Value) -> Result<(), Failure> {
    match body.insert(key.to_owned(), value) {
        None => Ok(()),
        Some(_) => Err(Failure::Wrong("a model begins with one other model only".to_owned())),
    }
}

/// Sends a file to the daemon, unless it has it, and names it.
async fn add(
    client: &Client,
    body: &mut Map<String, Value>,
    key: &str,
    path: &Path,
) -> Result<(), Failure> {
    output::note(&format!("hashing {}", path.display()));
    let digest: Digest = files::digest(path)?;
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("model.gguf");
    client.upload(&format!("/api/blobs/{digest}"), path).await?;
    let files = body.entry(key).or_insert_with(|| json!({}));
    files[name] = digest.to_string().into();
    Ok(())
}

/// All of a Modelfile but its files.
fn described(modelfile: &Modelfile) -> Map<String, Value> {
    let mut body = Map::new();
    let mut say = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            body.insert(key.to_owned(), value);
        }
    };
    let json_of = |text: Option<String>| text.and_then(|text| serde_json::from_str(&text).ok());
    say("template", modelfile.template().map(Into::into));
    say("system", modelfile.system().map(Into::into));
    say("parameters", json_of(modelfile.params_json()));
    say("messages", json_of(modelfile.messages_json()));
    say("requires", modelfile.requires().map(Into::into));
    let licenses: Vec<&str> = modelfile.licenses().collect();
    say("license", (!licenses.is_empty()).then(|| json!(licenses)));
    for directive in &modelfile.directives {
        match directive {
            Directive::Renderer(text) => say("renderer", Some(text.as_str().into())),
            Directive::Parser(text) => say("parser", Some(text.as_str().into())),
            _ => {}
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modelfile_is_described_field_by_field() {
        let text = "FROM smollm2\nPARAMETER temperature 0.5\nPARAMETER stop a\nSYSTEM be brief\n\
                    MESSAGE user hi\nLICENSE one\nLICENSE two\nPARSER qwen3\nREQUIRES 0.1.0\n";
        let modelfile = Modelfile::parse(text).expect("valid");
        let expected = json!({
            "system": "be brief",
            "parameters": {"temperature": 0.5, "stop": ["a"]},
            "messages": [{"role": "user", "content": "hi"}],
            "requires": "0.1.0",
            "license": ["one", "two"],
            "parser": "qwen3",
        });
        assert_eq!(Value::Object(described(&modelfile)), expected);
    }

    #[test]
    fn a_folder_is_its_model_files() {
        let of = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            let files = model_files(Path::new("/f"), &names);
            files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>()
        };
        let folder = ["config.json", "model.safetensors", "golden.safetensors", "README.md"];
        assert_eq!(of(&folder), ["/f/config.json", "/f/model.safetensors"]);
        assert_eq!(of(&["adapter.safetensors", "x.gguf"]), ["/f/adapter.safetensors"]);
        assert_eq!(of(&["x.gguf", "mmproj.gguf", "a.json"]), ["/f/x.gguf"]);
        assert_eq!(of(&["a.json"]), Vec::<String>::new());
    }

    #[test]
    fn a_from_line_is_a_file_or_a_name() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let name = |text: &str| Source::Name(text.to_owned());
        assert_eq!(source("smollm2", folder).expect("a name"), name("smollm2:latest"));
        let file = Source::File(folder.join("Cargo.toml"));
        assert_eq!(source("Cargo.toml", folder).expect("a file"), file);
        for text in ["./nothing", "/nothing", "nothing.gguf", "no name"] {
            let words = source(text, folder).expect_err(text).to_string();
            assert!(words.contains("there is no file"), "{words}");
        }
    }
}
