//! Listings as OpenAI's clients read them.

use serde::Serialize;
use v4_store::Entry;

use crate::{
    api::{bytes, clock},
    ops::models::Listed,
};

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize)]
struct Model {
    id: String,
    object: &'static str,
    created: i64,
    owned_by: String,
}

impl From<Entry> for Model {
    fn from(entry: Entry) -> Self {
        Self {
            id: entry.name.to_string(),
            object: "model",
            created: clock::timestamp(entry.modified).as_second(),
            owned_by: entry.name.namespace().to_owned(),
        }
    }
}

/// `/v1/models`.
pub fn models(models: Vec<Listed>) -> Vec<u8> {
    let data = models.into_iter().map(|listed| listed.entry.into()).collect();
    bytes(&List { object: "list", data })
}

/// `/v1/models/{id}`.
pub fn model(listed: Listed) -> Vec<u8> {
    bytes(&Model::from(listed.entry))
}
