//! `v4 lock`.

use std::path::{Path, PathBuf};

use http::Method;
use serde_json::{Map, Value, json};
use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::{World, list};
use crate::error::Failure;
use crate::place::Place;
use crate::{files, output};

/// The file of a project, unless another one is named.
pub const FILE: &str = "v4.lock";

/// Write down exactly which models a project uses, for `v4 pull --locked`
///
/// The file has the digest, the template and the parameters of each model. Keep it with the
/// project. Without models, those that the file has already are written anew.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The models
    models: Vec<String>,
    /// The lock file
    #[arg(short, long, default_value = FILE, value_name = "PATH")]
    file: PathBuf,
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let mut names: Vec<ModelName> =
        args.models.iter().map(|model| model.parse()).collect::<Result<_, _>>()?;
    let mut locked = match files::kind(&args.file) {
        Some(_) => read(&args.file)?,
        None => Map::new(),
    };
    if names.is_empty() {
        names = locked.keys().map(|name| name.parse()).collect::<Result<_, _>>()?;
    }
    if names.is_empty() {
        return Err(Failure::Wrong("say which models the project uses: v4 lock MODEL…".to_owned()));
    }
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    client::runtime()?.block_on(async {
        let listing = client.call(Method::GET, "/api/tags", None).await?;
        for name in &names {
            let found = list::models(&listing, "").find(|model| {
                let listed = model["name"].as_str().and_then(|text| text.parse::<ModelName>().ok());
                listed.is_some_and(|listed| listed.matches(name))
            });
            let digest = found.and_then(|model| model["digest"].as_str()).ok_or_else(|| {
                Failure::Wrong(format!("'{name}' is not here; get it with `v4 pull {name}`"))
            })?;
            let body = json!({ "model": name.to_string() });
            let shown = client.call(Method::POST, "/api/show", Some(&body)).await?;
            let entry = json!({
                "digest": format!("sha256:{digest}"),
                "template": shown["template"],
                "parameters": sampling(shown["parameters"].as_str().unwrap_or_default()),
            });
            locked.insert(name.to_string(), entry);
        }
        let text = serde_json::to_string_pretty(&json!({ "models": locked }));
        files::write(&args.file, &(text.expect("JSON values") + "\n"))?;
        output::print(&format!("{} holds {} model(s)\n", args.file.display(), locked.len()))
    })
}

/// The parameters as `show` lists them, a name and its value a line, as an object: a name that
/// comes again has a list.
fn sampling(lines: &str) -> Value {
    let mut parameters = Map::new();
    for (name, text) in lines.lines().filter_map(|line| line.split_once(' ')) {
        let text = text.trim();
        let value = serde_json::from_str(text).unwrap_or_else(|_| Value::from(text));
        match parameters.get_mut(name) {
            None => drop(parameters.insert(name.to_owned(), value)),
            Some(Value::Array(values)) => values.push(value),
            Some(first) => *first = json!([first.take(), value]),
        }
    }
    Value::Object(parameters)
}

/// The models of a lock file.
///
/// # Errors
/// [`Failure::File`], or that it is no lock file.
pub fn read(path: &Path) -> Result<Map<String, Value>, Failure> {
    let text = files::text(path)?;
    let parsed = serde_json::from_str::<Value>(&text).ok();
    let models = parsed.and_then(|file| file["models"].as_object().cloned());
    models.ok_or_else(|| Failure::Wrong(format!("{} is no lock file", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_is_written_by_its_names() {
        let lines = "temperature                    0.5\nstop                           \"<a>\"\n\
                     stop                           \"b c\"\nodd                            x y";
        let expected = json!({"temperature": 0.5, "stop": ["<a>", "b c"], "odd": "x y"});
        assert_eq!(sampling(lines), expected);
        assert_eq!(sampling(""), json!({}));
    }
}
