//! Running the binary and reading what it wrote.
#![allow(dead_code, reason = "each test file is a crate of its own and uses some of this")]

pub(crate) mod running;
pub(crate) mod shapes;

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use safetensors::{Dtype, SafeTensors};
pub(crate) use serde_json::Value;

/// The checkpoints that come with the tree.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/tests/fixtures").join(name)
}

pub(crate) struct Outcome {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn unsloth<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Outcome {
    let outcome = Outcome::of(Command::new(env!("CARGO_BIN_EXE_unsloth")).args(args).output().unwrap());
    assert!(outcome.status >= 0, "a signal has ended the binary: {}", outcome.stderr);
    outcome
}

impl Outcome {
    /// What a process that has ended leaves; the status is -1 if a signal ended it.
    pub(crate) fn of(output: std::process::Output) -> Self {
        Self {
            status: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    pub(crate) fn succeeded(self) -> Self {
        assert_eq!(self.status, 0, "{}", self.stderr);
        self
    }

    /// Asserts a failure with one line that holds all of these.
    #[track_caller]
    pub(crate) fn failed_with(self, parts: &[&str]) -> Self {
        assert_eq!(self.status, 1, "{}", self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let lines: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        let [line] = lines[..] else { panic!("not one error line: {}", self.stderr) };
        assert!(self.stderr.ends_with(&format!("{line}\n")), "{}", self.stderr);
        for part in parts {
            assert!(line.contains(part), "`{part}` is not in: {line}");
        }
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap()
    }
}

/// A command line as it is typed, with paths put in for `{}`.
pub(crate) fn line(text: &str, paths: &[&Path]) -> Vec<String> {
    let mut paths = paths.iter();
    let put = |word: &str| match word {
        "{}" => paths.next().unwrap().to_str().unwrap().to_owned(),
        _ => word.to_owned(),
    };
    text.split_whitespace().map(put).collect()
}

/// A float tensor of a safetensors file, or an integer one as floats.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Values {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<f64>,
}

pub(crate) fn read_tensors(path: &Path) -> BTreeMap<String, Values> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |view: safetensors::tensor::TensorView<'_>| {
        let data = match view.dtype() {
            Dtype::F32 => {
                view.data().chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
            }
            Dtype::I64 => {
                view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect()
            }
            other => panic!("no fixture holds {other:?}"),
        };
        Values { dtype: view.dtype(), shape: view.shape().to_vec(), data }
    };
    file.iter().map(|(name, view)| (name.to_owned(), values(view))).collect()
}

/// Largest difference over the largest value.
pub(crate) fn relative_error(actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let worst = actual.iter().zip(expected).map(|(a, e)| (a - e).abs()).fold(0.0, f64::max);
    assert!(actual.iter().chain(expected).all(|value| value.is_finite()));
    worst / expected.iter().map(|e| e.abs()).fold(f64::MIN_POSITIVE, f64::max)
}

pub(crate) fn read_metrics(output: &Path) -> Vec<Value> {
    let text = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// One number of each step.
pub(crate) fn column(metrics: &[Value], name: &str) -> Vec<f64> {
    metrics.iter().map(|record| record[name].as_f64().unwrap()).collect()
}

pub(crate) fn adapter_bytes(output: &Path) -> Vec<u8> {
    fs::read(output.join("adapter_model.safetensors")).unwrap()
}

/// A copy of a fixture's model folder, to be spoiled.
pub(crate) fn copy_model(name: &str, to: &Path) -> PathBuf {
    let target = to.join("model");
    fs::create_dir(&target).unwrap();
    for entry in fs::read_dir(fixture(name).join("model")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
    }
    target
}

/// Changes one field of `config.json`, nested ones with dots.
pub(crate) fn set_config(model: &Path, field: &str, value: Value) {
    let path = model.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let place = field.split('.').fold(&mut config, |at, name| &mut at[name]);
    *place = value;
    fs::write(&path, config.to_string()).unwrap();
}

/// Rewrites a file of f32 tensors as bf16, without the lower half of each element.
pub(crate) fn store_as_bf16(path: &Path) {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let halves: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(name, view)| {
            let upper = view.data().chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect();
            (name.to_owned(), view.shape().to_vec(), upper)
        })
        .collect();
    let views = halves.iter().map(|(name, shape, data)| {
        (name, safetensors::tensor::TensorView::new(Dtype::BF16, shape.clone(), data).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Names of the files of a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}
