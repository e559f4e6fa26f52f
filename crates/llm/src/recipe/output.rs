//! The folder that a run writes.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::config::invalid;
use crate::{Error, Result, atomic};

/// What a tokenizer may consist of, across the families and versions of transformers.
const TOKENIZER_FILES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
];

/// A folder known to be writable. If the run ends before it has written anything, a folder made for it is removed again.
pub(super) struct OutputFolder {
    path: PathBuf,
    is_new: bool,
}

impl OutputFolder {
    /// # Errors
    /// [`Error::Io`] if the folder cannot be made or written to.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let is_new = !path.exists();
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let folder = Self { path: path.to_owned(), is_new };
        // Permission bits do not tell: only writing does.
        tempfile::tempfile_in(path).map_err(Error::io("write to", path))?;
        Ok(folder)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// # Errors
    /// [`Error::InvalidOption`] if this is the folder of the model, whose files would be replaced.
    pub(super) fn check_apart(&self, model: &Path) -> Result<()> {
        match (self.path.canonicalize(), model.canonicalize()) {
            (Ok(path), Ok(model)) if path == model => {
                invalid("output", format!("`{}`", self.path.display()), "another folder than that of the model")
            }
            // A folder that cannot be found is refused by whoever reads it.
            _ => Ok(()),
        }
    }

    /// Copies the files that make up a tokenizer, those that exist.
    pub(super) fn copy_tokenizer(&self, model: &Path) -> Result<()> {
        for name in TOKENIZER_FILES {
            let (from, to) = (model.join(name), self.path.join(name));
            if from.is_file() {
                let folder = to.parent().unwrap_or(&self.path);
                fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
                atomic::write(&to, &fs::read(&from).map_err(Error::io("read", &from))?)?;
            }
        }
        Ok(())
    }
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        if self.is_new {
            // Fails, as it should, if anything was written.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Lines of JSON, each complete on disk before the next step begins.
pub(super) struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Starts an empty file.
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        Ok(Self { path, file })
    }

    pub(super) fn push(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record).map_err(Error::json(&self.path))?;
        line.push(b'\n');
        // One unbuffered write: a reader, or a crash, never sees half a line.
        self.file.write_all(&line).map_err(Error::io("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unused_new_folder_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        drop(OutputFolder::open(&path).unwrap());
        assert!(!path.exists());
        let used = OutputFolder::open(&path).unwrap();
        JsonLines::create(path.join("m.jsonl")).unwrap().push(&[1, 2]).unwrap();
        drop(used);
        assert_eq!(fs::read_to_string(path.join("m.jsonl")).unwrap(), "[1,2]\n");
        // An existing folder stays, whether used or not.
        drop(OutputFolder::open(parent.path()).unwrap());
        assert!(parent.path().exists());
    }

    #[test]
    fn every_template_is_copied() {
        let (model, parent) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let files = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"];
        fs::create_dir(model.path().join("additional_chat_templates")).unwrap();
        for name in files {
            fs::write(model.path().join(name), name).unwrap();
        }
        let output = OutputFolder::open(&parent.path().join("out")).unwrap();
        output.copy_tokenizer(model.path()).unwrap();
        for name in files {
            assert_eq!(fs::read_to_string(output.path().join(name)).unwrap(), name);
        }
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_an_error() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("out");
        fs::write(&path, "x").unwrap();
        let error = OutputFolder::open(&path).err().unwrap().to_string();
        assert!(error.contains("cannot create") && error.contains("out`"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "x");
    }
}
