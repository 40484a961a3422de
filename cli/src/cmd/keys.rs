//! `v4 keys`.

use http::Method;
use serde_json::{Value, json};

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::{human, output};

/// List the keys that open this daemon to other machines, or make and remove them
///
/// While there is a key, every request over TCP needs one: as `Authorization: Bearer KEY`, as
/// `x-api-key`, or as a password. Where the daemon listens beyond this machine, nobody is let in
/// without one, unless `V4_KEYS=off` says so. The unix socket is yours and needs none.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Make a key and print it, the only time that it is shown
    Add {
        /// What you call it, for example after the machine that uses it
        #[arg(value_name = "NAME")]
        name: String,
        /// What it opens
        #[arg(long, value_enum)]
        scope: Scope,
    },
    /// List names and scopes
    List,
    /// Remove a key; who has it is refused from now on
    Rm {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
    },
}

/// What a key opens.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Scope {
    /// To list models and fetch them, as other v4 do by `V4_PEERS`
    Read,
    /// To have models answer too
    Use,
    /// Everything
    Admin,
}

impl Scope {
    fn word(self) -> &'static str {
        match self {
            Scope::Read => "read",
            Scope::Use => "use",
            Scope::Admin => "admin",
        }
    }
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Start);
    let order = match &args.action {
        None | Some(Action::List) => None,
        Some(Action::Add { name, scope }) => Some(json!({"add": name, "scope": scope.word()})),
        Some(Action::Rm { name }) => Some(json!({ "remove": name })),
    };
    client::runtime()?.block_on(async {
        let Some(order) = order else {
            let answer = client.call(Method::GET, "/api/keys", None).await?;
            return output::print(&table(&answer));
        };
        let answer = client.call(Method::POST, "/api/keys", Some(&order)).await?;
        match answer["key"].as_str() {
            Some(key) => output::print(&format!("{key}\n")),
            None => Ok(()),
        }
    })
}

fn table(answer: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let keys = answer["keys"].as_array().into_iter().flatten();
    let rows: Vec<_> =
        keys.map(|key| [text(&key["name"]), text(&key["scope"]), text(&key["made"])]).collect();
    human::table(["NAME", "SCOPE", "MADE"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_a_table() {
        let answer = json!({"keys": [{"name": "nas", "scope": "read", "made": "2026-11-24"}]});
        assert_eq!(table(&answer), "NAME    SCOPE    MADE\nnas     read     2026-11-24\n");
    }
}
