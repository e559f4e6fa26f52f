//! Fixtures for the tests of this crate; see `fixtures/README.md`.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value};
use tempfile::TempDir;
use unsloth_autograd::{GradStore, Parameter, Tape};
use unsloth_core::{
    DType, Device, Place,
    ops::cross_entropy::{IGNORE_INDEX, LossSpec},
};
use unsloth_llm::decoder::{Decoder, LoadOptions};
use unsloth_train::{Batch, Checkpointing, Document, LoraConfig, Model};

/// Calls `check` under every checkpointing policy and with what is kept in every place, and leaves the decoder as it was.
pub(crate) fn under_every_policy(decoder: &mut Decoder, mut check: impl FnMut(&Decoder, &str)) {
    let device = decoder.device().clone();
    let policies = [
        "every:1",
        "every:2",
        "every:3",
        "sqrt",
        "layers:0",
        "layers:1",
        "selective",
        "selective:norm",
        "selective:glu",
    ];
    let places = [None, Some(Place::Host), Some(Place::Disk { folder: std::env::temp_dir() })];
    for policy in policies {
        decoder.set_checkpointing(policy.parse().unwrap()).unwrap();
        for place in &places {
            let store = place.as_ref().map(|place| device.store(place).unwrap());
            decoder.set_offload(store.clone());
            check(decoder, &format!("{policy} {place:?}"));
            if let Some(store) = store {
                let (usage, moves) = (store.usage(), ["every:1", "layers:0"].contains(&policy));
                assert!(!moves || usage.put.num > 0, "{policy} {place:?}");
                assert_eq!((usage.live_bytes, usage.put.bytes), (0, usage.taken.bytes));
            }
        }
    }
    decoder.set_checkpointing(Checkpointing::None).unwrap();
    decoder.set_offload(None);
}

pub(crate) const F32: LoadOptions = LoadOptions::frozen(DType::F32);

pub(crate) fn fixture(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(model)
}

pub(crate) fn load(device: &Device, model: &str) -> Decoder {
    Decoder::load(&fixture(model).join("model"), device, F32).unwrap()
}

/// Numbers of transformers and PEFT.
pub(crate) struct Golden {
    tensors: Vec<u8>,
    meta: Value,
}

impl Golden {
    pub(crate) fn open(model: &str) -> Self {
        let read = |file: &str| fs::read(fixture(model).join(file)).unwrap();
        let meta = serde_json::from_slice(&read("golden.json")).unwrap();
        Self { tensors: read("golden.safetensors"), meta }
    }

    /// Rank and alpha of the adapter beside the numbers.
    pub(crate) fn adapter(&self) -> LoraConfig {
        let rank = self.meta["r"].as_u64().unwrap() as usize;
        LoraConfig::new(rank, self.meta["alpha"].as_f64().unwrap() as f32)
    }

    pub(crate) fn f32(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let view = tensors.tensor(name).unwrap();
        assert_eq!(view.dtype(), Dtype::F32, "{name}");
        view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    pub(crate) fn i32(&self, name: &str) -> Vec<i32> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let view = tensors.tensor(name).unwrap();
        assert_eq!(view.dtype(), Dtype::I64, "{name}");
        let number = |bytes: &[u8]| i32::try_from(i64::from_le_bytes(bytes.try_into().unwrap())).unwrap();
        view.data().chunks_exact(8).map(number).collect()
    }

    /// Names of the tensors that begin so, without that beginning, sorted.
    pub(crate) fn names(&self, prefix: &str) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let mut names: Vec<String> =
            tensors.names().into_iter().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect();
        names.sort_unstable();
        names
    }

    /// Rows of ids and of labels, `seq_len` each, without what is padded.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let (ids, labels, mask) = (self.i32("input_ids"), self.i32("labels"), self.i32("attention_mask"));
        let row = |start: usize| {
            let length = mask[start..start + SEQ_LEN].iter().filter(|&&m| m == 1).count();
            Row::new(&ids[start..start + length], &labels[start..start + length])
        };
        (0..ids.len()).step_by(SEQ_LEN).map(row).collect()
    }

    /// The rows of one step of the training run.
    pub(crate) fn train_rows(&self, step: usize) -> Vec<Row> {
        let (ids, labels) = (self.i32("train_input_ids"), self.i32("train_labels"));
        let row = |start: usize| Row::new(&ids[start..start + SEQ_LEN], &labels[start..start + SEQ_LEN]);
        (step * BATCH..(step + 1) * BATCH).map(|index| row(index * SEQ_LEN)).collect()
    }
}

pub(crate) const SEQ_LEN: usize = 48;
pub(crate) const BATCH: usize = 2;

pub(crate) struct Row {
    pub(crate) ids: Vec<i32>,
    pub(crate) targets: Vec<i32>,
}

impl Row {
    /// Shifts labels to targets.
    fn new(ids: &[i32], labels: &[i32]) -> Self {
        let targets = labels[1..].iter().copied().chain([IGNORE_INDEX]).collect();
        Self { ids: ids.to_vec(), targets }
    }
}

pub(crate) fn batch(device: &Device, rows: &[Row]) -> Batch {
    let documents: Vec<Document<'_>> =
        rows.iter().map(|row| Document { ids: &row.ids, targets: &row.targets }).collect();
    Batch::new(device, &documents).unwrap()
}

/// A copy of some folder of a fixture, to be damaged.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn copy(model: &str, part: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(fixture(model).join(part)).unwrap() {
            let from = entry.unwrap().path();
            fs::copy(&from, folder.path().join(from.file_name().unwrap())).unwrap();
        }
        Self(folder)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn set(&self, file: &str, field: &str, value: Value) {
        self.edit(file, |map| {
            map.insert(field.to_owned(), value);
        });
    }

    pub(crate) fn edit(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let path = self.file(file);
        let mut map: Map<String, Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut map);
        fs::write(&path, serde_json::to_vec(&map).unwrap()).unwrap();
    }

    /// Rewrites a safetensors file.
    pub(crate) fn edit_tensors(&self, file: &str, edit: impl FnOnce(&mut HashMap<String, Stored>)) {
        let path = self.file(file);
        let mut tensors = stored(&path);
        edit(&mut tensors);
        write_tensors(&path, &tensors);
    }
}

#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) fn stored(path: &Path) -> HashMap<String, Stored> {
    let bytes = fs::read(path).unwrap();
    let owned = |(name, view): (String, TensorView<'_>)| {
        (name, Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    };
    SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(owned).collect()
}

pub(crate) fn write_tensors(path: &Path, tensors: &HashMap<String, Stored>) {
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, stored)| (name, TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes).unwrap()))
        .collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Largest difference; NaN counts as infinite.
pub(crate) fn max_difference(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let difference = |(a, b): (&f32, &f32)| if a.is_nan() || b.is_nan() { f32::INFINITY } else { (a - b).abs() };
    actual.iter().zip(expected).map(difference).fold(0.0, f32::max)
}

/// `max|actual - expected| / max|expected|`
pub(crate) fn relative_difference(actual: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    assert!(largest > 0.0, "nothing to compare with");
    max_difference(actual, expected) / largest
}

/// The loss of a batch and the gradient of each parameter by name.
pub(crate) fn gradients(decoder: &Decoder, batch: &Batch) -> (f32, BTreeMap<String, Vec<f32>>) {
    let parameters = decoder.parameters();
    let mut store = GradStore::new(&parameters).unwrap();
    let tape = Tape::new();
    let loss = decoder.loss(&tape, batch, LossSpec::mean(batch.num_targets)).unwrap();
    let value = loss.tensor().to_vec::<f32>().unwrap()[0];
    tape.backward(&loss, &mut store).unwrap();
    let gradient = |parameter: &Parameter| store.get(parameter).unwrap().to_vec().unwrap();
    (value, parameters.iter().map(|parameter| (parameter.name().to_owned(), gradient(parameter))).collect())
}
