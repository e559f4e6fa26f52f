//! Parquet files, as pyarrow writes them, against the same examples in JSONL (`fixtures/parquet/reference.py`).

use std::path::{Path, PathBuf};

use unsloth_llm::{
    Result,
    dataset::{Dataset, ReadOptions},
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn read(path: &Path) -> Result<Dataset> {
    let model = fixtures().join("tiny-llama/model");
    Dataset::read(&[path.to_owned()], ReadOptions { model: &model, vocab_size: 1024, max_seq_len: 64, train_on: None })
}

#[cfg(feature = "parquet")]
mod built {
    use unsloth_llm::Error;

    use super::*;

    #[test]
    fn rows_are_what_lines_are() {
        for name in ["chats", "tokens", "texts"] {
            let file = |extension| fixtures().join("parquet").join(name).with_extension(extension);
            let (rows, lines) = (read(&file("parquet")).unwrap(), read(&file("jsonl")).unwrap());
            assert!(rows.report().num_targets > 0, "{name}");
            assert_eq!(rows, lines, "{name}");
        }
    }

    #[test]
    fn a_damaged_file_is_an_error_that_names_it() {
        let whole = std::fs::read(fixtures().join("parquet/chats.parquet")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chats.parquet");
        for length in (4..whole.len()).step_by(97) {
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = read(&path).unwrap_err();
            assert!(matches!(error, Error::Parquet { .. }), "{length}: {error:?}");
            assert!(error.to_string().contains("chats.parquet`: not a readable Parquet file"), "{error}");
        }
    }

    #[test]
    fn rows_of_no_known_form_are_named() {
        let folder = tempfile::tempdir().unwrap();
        // The name does not matter: what a file begins with tells what it is.
        let path = folder.path().join("tokens.jsonl");
        std::fs::copy(fixtures().join("parquet/tokens.parquet"), &path).unwrap();
        let model = folder.path();
        let options = ReadOptions { model, vocab_size: 6, max_seq_len: 64, train_on: None };
        let error = Dataset::read(&[path], options).unwrap_err().to_string();
        assert!(error.contains("line 2: `input_ids` holds 6 at index 1"), "{error}");
    }
}

#[cfg(not(feature = "parquet"))]
#[test]
fn a_build_without_it_says_how_to_get_it() {
    let error = read(&fixtures().join("parquet/chats.parquet")).unwrap_err().to_string();
    assert!(error.contains("chats.parquet` is a Parquet file: build with feature `parquet`"), "{error}");
}
