//! `config.json` of a Hugging Face folder.
