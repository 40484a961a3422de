//! `v4 pulls`.

use http::Method;
use serde_json::{Value, json};
use v4_proto::ModelName;

use crate::client::{self, Client, IfAbsent};
use crate::cmd::World;
use crate::error::Failure;
use crate::place::Place;
use crate::{human, output};

/// List the pulls that run, or pause, resume, cancel and slow them down
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One of them
    model: Option<String>,
    /// Stop it and keep what it has, until it is resumed
    #[arg(long, group = "action", requires = "model")]
    pause: bool,
    /// Let it go on
    #[arg(long, group = "action", requires = "model")]
    resume: bool,
    /// End it; another pull goes on where it was
    #[arg(long, group = "action", requires = "model")]
    cancel: bool,
    /// Bytes a second at most, for example 2M, or none; without a model, of all pulls together
    #[arg(long, group = "action", value_name = "RATE")]
    limit_rate: Option<String>,
}

impl Args {
    /// What is to be done, if it is more than a look.
    fn order(&self) -> Option<Value> {
        let flags = [(self.pause, "pause"), (self.resume, "resume"), (self.cancel, "cancel")];
        if let Some((_, action)) = flags.into_iter().find(|(is_set, _)| *is_set) {
            return Some(json!({ "action": action }));
        }
        self.limit_rate.as_ref().map(|rate| json!({ "limit_rate": rate }))
    }
}

pub fn run(args: &Args, world: &World) -> Result<(), Failure> {
    let name = args.model.as_ref().map(|model| model.parse::<ModelName>()).transpose()?;
    let client = Client::new(Place::find(world.variable)?, IfAbsent::Fail);
    client::runtime()?.block_on(async {
        if let Some(mut order) = args.order() {
            if let Some(name) = &name {
                order["model"] = name.to_string().into();
            }
            return client.call(Method::POST, "/api/pulls", Some(&order)).await.map(drop);
        }
        let answer = match client.call(Method::GET, "/api/pulls", None).await {
            // Without a daemon nothing is pulled.
            Err(Failure::NotRunning) => Value::Null,
            answer => answer?,
        };
        output::print(&table(&answer, name.as_ref()))
    })
}

fn table(answer: &Value, only: Option<&ModelName>) -> String {
    let is_asked = |pull: &&Value| {
        let name = pull["name"].as_str().and_then(|name| name.parse::<ModelName>().ok());
        only.is_none_or(|only| name.is_some_and(|name| name.matches(only)))
    };
    let pulls = answer["pulls"].as_array().into_iter().flatten().filter(is_asked);
    let rows: Vec<_> = pulls
        .map(|pull| {
            let text = |key: &str| pull[key].as_str().unwrap_or_default().to_owned();
            let number = |key: &str| pull[key].as_u64().unwrap_or(0);
            let (done, total) = (number("completed"), number("total"));
            let percent = done.saturating_mul(100).checked_div(total).unwrap_or(0);
            let limit = pull["limit_rate"].as_u64().or(answer["limit_rate"].as_u64());
            [
                text("name"),
                format!("{percent}% of {}", human::size(total)),
                limit.map_or("-".to_owned(), |rate| format!("{}/s", human::size(rate))),
                text("status"),
            ]
        })
        .collect();
    human::table(["NAME", "DONE", "LIMIT", "STATUS"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pulls_are_a_table() {
        let answer = json!({"pulls": [
            {"name": "a:latest", "status": "pulling", "completed": 430, "total": 1000, "limit_rate": null},
            {"name": "b:latest", "status": "paused", "completed": 0, "total": 0, "limit_rate": 2_000_000},
        ], "limit_rate": null});
        let header = "NAME        DONE           LIMIT     STATUS\n";
        let first = "a:latest    43% of 1 KB    -         pulling\n";
        let second = "b:latest    0% of 0 B      2 MB/s    paused\n";
        assert_eq!(table(&answer, None), [header, first, second].concat());
        let only: ModelName = "B".parse().expect("a name");
        assert!(!table(&answer, Some(&only)).contains("a:latest"));
    }
}
