//! Models by their names on the Hugging Face Hub, such as `org/model`.
//!
//! Files are taken through the cache that Python's `huggingface_hub` uses (`HF_HOME`, or `~/.cache/huggingface`), with the token that
//! `hf auth login` left there; `HF_ENDPOINT` names a mirror. What is complete in the cache is used as it is, without asking the
//! Hub. Without the feature `hub` such a name is an error that says so.

use std::path::{Path, PathBuf};

use crate::Result;

/// How much of a model is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// Configuration, tokenizer and weights.
    All,
    /// Configuration and tokenizer.
    WithoutWeights,
}

/// The folder of a model that is given as a folder or by its name on the Hub. A path that exists is never taken for a name, and a
/// path that does not and cannot be a name is left for whoever reads it to refuse.
///
/// # Errors
/// [`crate::Error::HubFeature`] for a name, without the feature `hub`; with it, [`crate::Error::Hub`] if files cannot be fetched.
pub fn folder(model: &Path, parts: Parts) -> Result<PathBuf> {
    match name(model) {
        Some(name) if !model.exists() => fetch(name, parts),
        _ => Ok(model.to_owned()),
    }
}

/// The path as a name of the Hub, if it has the form of one: two plain parts.
fn name(model: &Path) -> Option<&str> {
    let text = model.to_str()?;
    let (owner, model) = text.split_once('/')?;
    let plain = |part: &str| {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(is_allowed)
    };
    (plain(owner) && plain(model)).then_some(text)
}

/// What to call a model of this folder: its name on the Hub if the folder lies in the cache, else the path.
pub(crate) fn shown(folder: &Path) -> String {
    let in_cache = || {
        let snapshots = folder.parent().filter(|parent| parent.ends_with("snapshots"))?;
        let repository = snapshots.parent()?.file_name()?.to_str()?;
        // A name of the Hub has no double hyphen.
        repository.strip_prefix("models--").map(|name| name.replace("--", "/"))
    };
    in_cache().unwrap_or_else(|| folder.display().to_string())
}

#[cfg(not(feature = "hub"))]
fn fetch(name: &str, _: Parts) -> Result<PathBuf> {
    Err(crate::Error::HubFeature { name: name.to_owned() })
}

#[cfg(feature = "hub")]
use download::fetch;

#[cfg(feature = "hub")]
mod download {
    use std::{
        collections::BTreeSet,
        io,
        path::{Path, PathBuf},
    };

    use hf_hub::{
        Cache, CacheRepo, Repo, RepoType,
        api::sync::{ApiBuilder, ApiRepo},
    };

    use super::Parts;
    use crate::{
        Error, Result,
        tokenizer::{TOKENIZER_FILES, Tokenizer},
        weights::{Checkpoint, INDEX, SINGLE, shards},
    };

    const CONFIG: &str = "config.json";
    const GENERATION_CONFIG: &str = "generation_config.json";
    /// How often a broken connection is taken up again.
    const NUM_RETRIES: usize = 3;

    pub(super) fn fetch(name: &str, parts: Parts) -> Result<PathBuf> {
        let failed = |source| Error::Hub { name: name.to_owned(), source };
        let cache = cache().map_err(|error| failed(error.into()))?;
        let main = cache.model(name.to_owned());
        if let Some(folder) = complete(&main, parts) {
            return Ok(folder);
        }
        let mut builder = ApiBuilder::from_cache(cache).with_retries(NUM_RETRIES);
        if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
            builder = builder.with_endpoint(endpoint);
        }
        let api = builder.build().map_err(|error| failed(error.into()))?;
        let info = api.model(name.to_owned()).info().map_err(|error| failed(error.into()))?;
        // All files of one commit, though the branch may move meanwhile.
        let commit = api.repo(Repo::with_revision(name.to_owned(), RepoType::Model, info.sha.clone()));
        let there: BTreeSet<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let get = |file: &str| commit.get(file).map_err(|error| failed(error.into()));
        let config = get(CONFIG)?;
        let folder = config.parent().unwrap_or(&config).to_owned();
        for file in [GENERATION_CONFIG].into_iter().chain(TOKENIZER_FILES).filter(|file| there.contains(file)) {
            get(file)?;
        }
        if parts == Parts::All {
            weights(&commit, &there, name)?;
        }
        // Names the snapshot as that of the branch, now that it is complete.
        main.create_ref(&info.sha).map_err(|error| failed(error.into()))?;
        Ok(folder)
    }

    fn weights(commit: &ApiRepo, there: &BTreeSet<&str>, name: &str) -> Result<()> {
        let failed = |error: hf_hub::api::sync::ApiError| Error::Hub { name: name.to_owned(), source: error.into() };
        if there.contains(SINGLE) {
            commit.get(SINGLE).map_err(failed)?;
        } else if there.contains(INDEX) {
            for shard in shards(&commit.get(INDEX).map_err(failed)?)? {
                commit.get(&shard).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn cache() -> io::Result<Cache> {
        let home = match std::env::var_os("HF_HOME") {
            Some(home) => Some(PathBuf::from(home)),
            None => std::env::home_dir().map(|home| home.join(".cache/huggingface")),
        };
        let missing = || io::Error::new(io::ErrorKind::NotFound, "there is neither HF_HOME nor a home directory");
        Ok(Cache::new(home.ok_or_else(missing)?.join("hub")))
    }

    /// The snapshot of the branch, if what is needed of it is there.
    fn complete(main: &CacheRepo, parts: Parts) -> Option<PathBuf> {
        let folder = main.get(CONFIG)?.parent().map(Path::to_owned)?;
        let is_complete = Tokenizer::exists(&folder) && (parts != Parts::All || Checkpoint::open(&folder).is_ok());
        is_complete.then_some(folder)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{name, shown};

    #[test]
    fn names_have_two_plain_parts() {
        for (path, expected) in [
            ("Qwen/Qwen2.5-0.5B_x", true),
            ("model", false),
            ("./org/model", false),
            ("../model", false),
            ("/org/model", false),
            ("org/model/", false),
            ("a/b/c", false),
            ("my models/x", false),
            ("org/.hidden", false),
        ] {
            assert_eq!(name(Path::new(path)).is_some(), expected, "{path}");
        }
    }

    #[test]
    fn a_folder_of_the_cache_is_called_by_its_name() {
        let folder = Path::new("/home/me/.cache/huggingface/hub/models--org--tiny-llama/snapshots/0123abc");
        assert_eq!(shown(folder), "org/tiny-llama");
        for other in ["models/tiny", "/x/models--org--tiny/0123", "snapshots/0123"] {
            assert_eq!(shown(Path::new(other)), other);
        }
    }
}
