//! The architectures: one list, a file each.
//!
//! What others must know of an architecture is a field of its [`Arch`]; its name is in its own file
//! and nowhere else.

pub mod config;
pub mod decoder;
mod gemma3;
mod gpt_oss;
mod llama;
mod qwen2;
mod qwen3;
mod qwen3moe;

use std::borrow::Cow;

use v4_proto::Ability;

use crate::Error;
use crate::format::{File, Format, Meta, Tensor};
use config::{DecoderConfig, Source};
use decoder::Names;

/// Every architecture of this build.
pub static ALL: &[&Arch] =
    &[&llama::ARCH, &qwen2::ARCH, &qwen3::ARCH, &qwen3moe::ARCH, &gemma3::ARCH, &gpt_oss::ARCH];

/// Tensors of a file to tensors of other names.
pub type Import = fn(&File) -> Result<Vec<Tensor>, Error>;

/// The description of an architecture.
#[derive(Debug)]
pub struct Arch {
    /// Its name in GGUF's `general.architecture`, which is also the prefix of its metadata.
    pub gguf: &'static str,
    /// Its names as the `model_type` of a Hugging Face `config.json`.
    pub hf: &'static [&'static str],
    /// What it can do by itself; a chat template may add to it.
    pub abilities: &'static [Ability],
    /// How metadata becomes a configuration of the shared decoder.
    pub config: fn(&Source<'_>) -> Result<DecoderConfig, Error>,
    /// What its tensors are called.
    pub names: Names,
    /// How the tensors of a file become those that `names` names, where they are not from the
    /// start.
    pub import: Option<Import>,
}

impl Arch {
    /// The tensors of a file as [`Arch::names`] names them.
    ///
    /// # Errors
    /// [`Error::TensorShape`].
    pub fn tensors<'a>(&self, file: &'a File) -> Result<Cow<'a, [Tensor]>, Error> {
        match self.import {
            Some(import) => Ok(Cow::Owned(import(file)?)),
            None => Ok(Cow::Borrowed(&file.tensors)),
        }
    }
}

/// The metadata entry that names the architecture.
fn key(format: Format) -> &'static str {
    match format {
        Format::Gguf => "general.architecture",
        Format::Safetensors => "model_type",
    }
}

/// The architecture as a file names it.
///
/// # Errors
/// [`Error::Metadata`] when it does not.
pub fn name(format: Format, meta: &Meta) -> Result<&str, Error> {
    /// The longest real one has some 20.
    const NAME_BYTES: usize = 100;
    let name = meta.str(key(format)).ok_or_else(|| Error::missing(key(format)))?;
    if name.len() > NAME_BYTES {
        return Err(Error::metadata(key(format), format!("has {} bytes", name.len())));
    }
    Ok(name)
}

/// The architecture of that name in that format, if this build knows it.
pub fn find(format: Format, name: &str) -> Option<&'static Arch> {
    ALL.iter().copied().find(|arch| match format {
        Format::Gguf => arch.gguf == name,
        Format::Safetensors => arch.hf.contains(&name),
    })
}

/// The architecture of a file and its configuration.
///
/// # Errors
/// [`Error::UnknownArch`], or what the metadata lacks.
pub fn resolve(file: &File) -> Result<(&'static Arch, DecoderConfig), Error> {
    let name = name(file.format, &file.meta)?;
    let arch = find(file.format, name).ok_or_else(|| Error::UnknownArch {
        arch: name.to_owned(),
        supported: ALL.iter().map(|arch| arch.gguf).collect::<Vec<_>>().join(", "),
    })?;
    let config = (arch.config)(&Source { file, prefix: arch.gguf })?;
    Ok((arch, config))
}

#[cfg(test)]
mod tests;
