//! `cargo xtask golden`: fixtures from golden folders.
//!
//! A golden folder holds a tiny checkpoint, a PEFT adapter and the numbers that transformers + PEFT compute with them. Two layouts
//! are read, told apart by which one exists:
//! - `FROM/<name>/{model/, adapter/, golden.safetensors, golden.json}`
//! - `FROM/models/<name>/`, `FROM/golden/{<name>.safetensors, <name>.json, <name>-adapter/}`

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use safetensors::{Dtype, SafeTensors, serialize_to_file, tensor::TensorView};
use serde_json::json;

/// Files of a checkpoint that a fixture keeps; the second field says whether the file must exist.
const MODEL_FILES: [(&str, bool); 7] = [
    ("config.json", true),
    ("config_v4.json", false),
    ("generation_config.json", true),
    ("model.safetensors", true),
    ("tokenizer.json", true),
    ("tokenizer_config.json", true),
    ("chat_template.jinja", false),
];
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Folder that holds the golden folders.
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// Model to convert; repeat for several.
    #[arg(long = "name", value_name = "NAME", required = true)]
    names: Vec<String>,
}

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    let fixtures = root.join("crates/llm/tests/fixtures");
    for name in &arguments.names {
        let source = Source::find(&arguments.from, name)?;
        let target = fixtures.join(name);
        let bytes = convert(&source, &target).with_context(|| format!("golden folder of {name}"))?;
        println!("{}: {bytes} bytes", target.display());
    }
    Ok(())
}

struct Source {
    model: PathBuf,
    adapter: PathBuf,
    tensors: PathBuf,
    meta: PathBuf,
}

impl Source {
    fn find(from: &Path, name: &str) -> Result<Source> {
        let folder = from.join(name);
        let one = Source {
            model: folder.join("model"),
            adapter: folder.join("adapter"),
            tensors: folder.join("golden.safetensors"),
            meta: folder.join("golden.json"),
        };
        let golden = from.join("golden");
        let two = Source {
            model: from.join("models").join(name),
            adapter: golden.join(format!("{name}-adapter")),
            tensors: golden.join(format!("{name}.safetensors")),
            meta: golden.join(format!("{name}.json")),
        };
        match [one, two].into_iter().find(|source| source.tensors.is_file()) {
            Some(source) => Ok(source),
            None => bail!("{}: no golden tensors of {name} in either layout", from.display()),
        }
    }
}

/// Writes the fixture; returns its size in bytes.
fn convert(source: &Source, target: &Path) -> Result<u64> {
    let bytes = read(&source.tensors)?;
    let golden = SafeTensors::deserialize(&bytes).with_context(|| source.tensors.display().to_string())?;
    check_adapter(&golden, &source.adapter.join("adapter_model.safetensors"))?;
    let (train, eval) = (train_lines(&golden)?, eval_lines(&golden)?);

    let (model, adapter) = (target.join("model"), target.join("adapter"));
    fs::create_dir_all(&model)?;
    fs::create_dir_all(&adapter)?;
    for (file, required) in MODEL_FILES {
        if required || source.model.join(file).is_file() {
            write(&model.join(file), &read(&source.model.join(file))?)?;
        }
    }
    for file in ADAPTER_FILES {
        write(&adapter.join(file), &read(&source.adapter.join(file))?)?;
    }
    // The starting adapter is in `adapter/`, checked above: kept once.
    let kept = golden.tensors().into_iter().filter(|(name, _)| !name.starts_with("lora."));
    serialize_to_file(kept, None, &target.join("golden.safetensors"))?;
    let meta: serde_json::Value = serde_json::from_slice(&read(&source.meta)?)?;
    write(&target.join("golden.json"), format!("{meta:#}\n").as_bytes())?;
    write(&target.join("train.jsonl"), train.as_bytes())?;
    write(&target.join("eval.jsonl"), eval.as_bytes())?;
    folder_bytes(target)
}

/// The golden numbers were made with exactly the adapter that PEFT saved.
fn check_adapter(golden: &SafeTensors<'_>, path: &Path) -> Result<()> {
    let bytes = read(path)?;
    let adapter = SafeTensors::deserialize(&bytes).with_context(|| path.display().to_string())?;
    let mut num_matrices = 0;
    for (name, tensor) in golden.tensors() {
        let Some(matrix) = name.strip_prefix("lora.") else { continue };
        let Some((module, half)) = matrix.rsplit_once('.') else { bail!("{name}: expected lora.<module>.A or .B") };
        let saved = adapter.tensor(&format!("base_model.model.{module}.lora_{half}.weight"))?;
        ensure!(
            saved.shape() == tensor.shape() && saved.data() == tensor.data(),
            "{name} differs from {}",
            path.display()
        );
        num_matrices += 1;
    }
    ensure!(num_matrices == adapter.len(), "{}: {} tensors, golden has {num_matrices}", path.display(), adapter.len());
    Ok(())
}

/// One line per sequence, in the order of the golden steps.
fn train_lines(golden: &SafeTensors<'_>) -> Result<String> {
    let ids = Integers::read(golden, "train_input_ids")?;
    let labels = Integers::read(golden, "train_labels")?;
    ensure!(
        ids.shape.len() == 3 && ids.shape == labels.shape,
        "train_input_ids and train_labels must be [steps, batch, seq]"
    );
    Ok(ids.rows().zip(labels.rows()).map(|(ids, labels)| line(ids, labels)).collect())
}

/// One line per sequence, without the positions that `attention_mask` hides.
fn eval_lines(golden: &SafeTensors<'_>) -> Result<String> {
    let ids = Integers::read(golden, "input_ids")?;
    let labels = Integers::read(golden, "labels")?;
    let mask = Integers::read(golden, "attention_mask")?;
    ensure!(
        ids.shape == labels.shape && ids.shape == mask.shape,
        "input_ids, labels and attention_mask differ in shape"
    );
    let mut text = String::new();
    for ((ids, labels), mask) in ids.rows().zip(labels.rows()).zip(mask.rows()) {
        let len = mask.iter().take_while(|&&m| m == 1).count();
        ensure!(mask[len..].iter().all(|&m| m == 0), "attention_mask: only padding on the right is understood");
        text.push_str(&line(&ids[..len], &labels[..len]));
    }
    Ok(text)
}

fn line(ids: &[i64], labels: &[i64]) -> String {
    format!("{}\n", json!({ "input_ids": ids, "labels": labels }))
}

/// An i64 tensor on the host.
struct Integers {
    shape: Vec<usize>,
    values: Vec<i64>,
}

impl Integers {
    fn read(golden: &SafeTensors<'_>, name: &str) -> Result<Integers> {
        let tensor: TensorView<'_> = golden.tensor(name)?;
        ensure!(tensor.dtype() == Dtype::I64, "{name}: {:?}, expected i64", tensor.dtype());
        let values = tensor.data().as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect();
        Ok(Integers { shape: tensor.shape().to_vec(), values })
    }

    fn rows(&self) -> impl Iterator<Item = &[i64]> {
        let width = self.shape.last().copied().unwrap_or(1).max(1);
        self.values.chunks_exact(width)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += if meta.is_dir() { folder_bytes(&entry.path())? } else { meta.len() };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn i64_bytes(values: &[i64]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    /// Two sequences of three tokens, the second padded by one; an adapter of one module.
    fn plant(folder: &Path, lora_b: f32) {
        let (ids, labels, mask) = ([1, 2, 3, 4, 5, 0], [-100, 2, 3, -100, 5, -100], [1, 1, 1, 1, 1, 0]);
        let tensors: Vec<(&str, Vec<usize>, Vec<u8>)> = vec![
            ("input_ids", vec![2, 3], i64_bytes(&ids)),
            ("labels", vec![2, 3], i64_bytes(&labels)),
            ("attention_mask", vec![2, 3], i64_bytes(&mask)),
            ("train_input_ids", vec![2, 1, 3], i64_bytes(&ids)),
            ("train_labels", vec![2, 1, 3], i64_bytes(&labels)),
        ];
        let view =
            |shape: &[usize], dtype, bytes: &'static [u8]| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        let leak = |bytes: Vec<u8>| -> &'static [u8] { bytes.leak() };
        let mut golden: Vec<(String, TensorView<'_>)> =
            tensors.into_iter().map(|(n, s, b)| (n.to_owned(), view(&s, Dtype::I64, leak(b)))).collect();
        golden.push(("lora.m.A".into(), view(&[1, 1], Dtype::F32, leak(1.0f32.to_le_bytes().to_vec()))));
        golden.push(("lora.m.B".into(), view(&[1, 1], Dtype::F32, leak(lora_b.to_le_bytes().to_vec()))));
        let adapter = ["A", "B"].map(|half| {
            let bytes = leak((if half == "A" { 1.0f32 } else { 2.0 }).to_le_bytes().to_vec());
            (format!("base_model.model.m.lora_{half}.weight"), view(&[1, 1], Dtype::F32, bytes))
        });
        for sub in ["model", "adapter"] {
            fs::create_dir_all(folder.join(sub)).unwrap();
        }
        serialize_to_file(golden, None, &folder.join("golden.safetensors")).unwrap();
        serialize_to_file(adapter, None, &folder.join("adapter/adapter_model.safetensors")).unwrap();
        fs::write(folder.join("golden.json"), "{}").unwrap();
        fs::write(folder.join("adapter/adapter_config.json"), "{}").unwrap();
        for (file, _) in MODEL_FILES.iter().filter(|(_, required)| *required) {
            fs::write(folder.join("model").join(file), file).unwrap();
        }
    }

    #[test]
    fn converts_a_golden_folder() {
        let folder = tempfile::tempdir().unwrap();
        plant(&folder.path().join("tiny"), 2.0);
        let target = folder.path().join("fixture");
        convert(&Source::find(folder.path(), "tiny").unwrap(), &target).unwrap();
        let text = |file: &str| fs::read_to_string(target.join(file)).unwrap();
        let first = "{\"input_ids\":[1,2,3],\"labels\":[-100,2,3]}\n";
        assert_eq!(text("train.jsonl"), format!("{first}{{\"input_ids\":[4,5,0],\"labels\":[-100,5,-100]}}\n"));
        assert_eq!(text("eval.jsonl"), format!("{first}{{\"input_ids\":[4,5],\"labels\":[-100,5]}}\n"));
        assert_eq!(text("model/tokenizer.json"), "tokenizer.json");
        let golden = fs::read(target.join("golden.safetensors")).unwrap();
        assert!(SafeTensors::deserialize(&golden).unwrap().names().iter().all(|name| !name.starts_with("lora.")));
    }

    #[test]
    fn refuses_an_adapter_that_the_numbers_were_not_made_with() {
        let folder = tempfile::tempdir().unwrap();
        plant(&folder.path().join("tiny"), 3.0);
        let source = Source::find(folder.path(), "tiny").unwrap();
        let error = convert(&source, &folder.path().join("fixture")).unwrap_err();
        assert!(error.to_string().starts_with("lora.m.B differs from"), "{error}");
    }
}
