//! A name into committed blobs: what to fetch, from where, and how it survives bad networks.
//!
//! **Owns** recipes and their places ([`Recipe`], [`Location`]), the sources (a file each in
//! `source/`), retry, stall and resume, and the jobs that many may watch ([`Jobs`]).
//!
//! **Never** knows a process, a route or a model file's inside: a header is read by the
//! [`Inspector`] it was given. Never trusts a source: a file counts when its digest does.
//!
//! **Start reading at** [`Jobs::pull`], then `fetch`.

#![forbid(unsafe_code)]

pub mod config;
mod error;
mod fetch;
mod jobs;
mod limits;
mod pace;
mod plan;
mod post;
mod progress;
mod push;
mod recipe;
mod signature;
mod source;
mod team;
mod write;

pub use error::PullError;
pub use jobs::{
    Catalog, Change, Inspecting, Inspector, Jobs, Order, PullConfig, Running, Upstream, Watch, Wish,
};
pub use post::Poster;
pub use progress::{FileProgress, Progress, Stage};
pub use recipe::{Location, Origin, Part, PeerBlob, Recipe, RecipeFile, RegistryBlob};
