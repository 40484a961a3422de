//! The layers of a transformer, said in device operations.

pub(crate) mod attention;
pub(crate) mod linear;
pub(crate) mod mlp;
pub(crate) mod moe;
