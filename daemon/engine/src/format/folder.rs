//! [`Folder`]: the files of a model of Hugging Face by their names, wherever they lie.

use std::io;
use std::path::{Path, PathBuf};

use v4_kernels::Bytes;
use v4_proto::ModelFiles;

use crate::Error;

/// The files of a model that is a folder.
#[derive(Debug, Clone, Copy)]
pub enum Folder<'a> {
    /// They lie in a folder, under their names.
    At(&'a Path),
    /// They lie anywhere, and what each is called is said.
    Named(&'a ModelFiles),
}

impl<'a> Folder<'a> {
    /// The folder that `files` are, if they are one and no GGUF.
    pub fn of(files: &'a ModelFiles) -> Option<Self> {
        match files.weights.as_slice() {
            _ if !files.names.is_empty() => Some(Folder::Named(files)),
            [folder] if folder.is_dir() => Some(Folder::At(folder)),
            _ => None,
        }
    }

    /// Where a file lies; `None` where there is none of that name.
    fn path(self, name: &str) -> Option<PathBuf> {
        match self {
            Folder::At(folder) => Some(folder.join(name)).filter(|path| path.is_file()),
            Folder::Named(ModelFiles { weights, names, .. }) => {
                let at = names.iter().position(|known| known == name)?;
                weights.get(at).cloned()
            }
        }
    }

    /// Maps a file; `None` where there is none of that name.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn find(self, name: &str) -> Result<Option<Bytes>, Error> {
        self.path(name).map(|path| super::open(&path)).transpose()
    }

    /// Maps a file.
    ///
    /// # Errors
    /// [`Error::Open`], also where there is none of that name.
    pub fn open(self, name: &str) -> Result<Bytes, Error> {
        self.find(name)?.ok_or_else(|| {
            let path = match self {
                Folder::At(folder) => folder.join(name),
                Folder::Named(_) => name.into(),
            };
            Error::Open { path, source: io::ErrorKind::NotFound.into() }
        })
    }
}
