//! Whole models in the form of Hugging Face folders.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Map, Value};
use unsloth_core::{Category, DType, Shape, Tensor};
use unsloth_train::Model;

use crate::{
    Error, Result,
    adapter::SavedModule,
    atomic,
    config::{DecoderConfig, dtype_name},
    decoder::Decoder,
    fields::read_object,
    loader::TrainedWeight,
    tensor_file::{self, Entry},
    weights::{Checkpoint, Wanted, WeightSource},
};

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// Writes the weights of a model that is trained whole to `model.safetensors` of a folder, which is made if need be, and beside
/// it `config.json` and `generation_config.json`. Each file is replaced whole or not at all.
///
/// Weights have the names and, rounded to nearest even, the types of the checkpoint that they were loaded from; random ones
/// are f32. A head that is the embedding table is written once, as the table. `config.json` is that of the folder that the
/// model was made from, but names the type of the weights if it named another one; `generation_config.json` holds the special
/// tokens of `config.json` where that folder has none.
///
/// # Errors
/// [`Error::NothingTrained`] for a model with frozen weights or without a folder; [`Error::Io`], [`Error::Json`];
/// [`unsloth_core::Error::Launch`] if the device failed.
pub fn save(folder: &Path, model: &Decoder) -> Result<()> {
    let (Some(source), false) = (model.folder(), model.trained().is_empty()) else {
        return Err(Error::NothingTrained { path: folder.to_owned() });
    };
    let entry =
        |weight: &TrainedWeight| Entry::of(weight.parameter.name().to_owned(), weight.parameter.value(), weight.stored);
    let entries: Vec<Entry> = model.trained().iter().map(entry).collect();
    let config = config(source, &entries)?;
    let generation_config = generation_config(source)?;
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    tensor_file::write(&folder.join("model.safetensors"), entries)?;
    atomic::write(&folder.join(CONFIG), &config)?;
    atomic::write(&folder.join(GENERATION_CONFIG), &generation_config)
}

/// Writes a model with its adapters merged into the weights, and what is trained beside them in the place of what it was, to a
/// folder that transformers loads, which is made if need be. Each file is replaced whole or not at all.
///
/// Every tensor of the checkpoint that the model was loaded from is written in the type it is stored in, rounded to nearest even;
/// `config.json` says so where a head that was tied to the embedding table no longer is.
///
/// # Errors
/// [`Error::NoAdapter`] for a model without adapters or without a folder; [`Error::Io`], [`Error::Json`]; [`Error::TensorDType`] for a
/// tensor of the checkpoint that is no float; [`unsloth_core::Error::OutOfMemory`], [`unsloth_core::Error::Launch`].
pub fn save_merged(folder: &Path, model: &Decoder) -> Result<()> {
    let (Some(source), Some(_)) = (model.folder(), model.adapters()) else {
        return Err(Error::NoAdapter { path: folder.to_owned() });
    };
    let checkpoint = Checkpoint::open(source)?;
    let mut changed = changed(model)?;
    let mut entries = Vec::new();
    for name in checkpoint.names() {
        let dtype = checkpoint.stored_dtype(name)?;
        let tensor = match changed.remove(name) {
            Some(tensor) => tensor,
            None => {
                let shape = Shape::try_from(checkpoint.stored_shape(name)?)?;
                checkpoint.tensor(model.device(), &Wanted { name, shape, dtype, category: Category::Weights })?
            }
        };
        entries.push(Entry::of(name.to_owned(), tensor, dtype));
    }
    let dtype = entries.first().map_or(DType::F32, |entry| entry.dtype);
    let is_untied = !changed.is_empty();
    entries.extend(changed.into_iter().map(|(name, tensor)| Entry::of(name, tensor, dtype)));
    let mut config = config(source, &entries)?;
    if is_untied {
        let path = source.join(CONFIG);
        let mut map: Map<String, Value> = serde_json::from_slice(&config).map_err(Error::json(&path))?;
        map.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
        config = to_json(&path, &map)?;
    }
    let generation_config = generation_config(source)?;
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    tensor_file::write(&folder.join("model.safetensors"), entries)?;
    atomic::write(&folder.join(CONFIG), &config)?;
    atomic::write(&folder.join(GENERATION_CONFIG), &generation_config)
}

/// Everything that the adapters change, by its name in the checkpoint; a head that is tied there no longer is where one of the
/// two is trained.
fn changed(model: &Decoder) -> Result<BTreeMap<String, Tensor>> {
    let mut changed = BTreeMap::new();
    for linear in model.linears() {
        changed.extend(linear.merged()?.map(|tensor| (format!("{}.weight", linear.name), tensor)));
    }
    changed.extend(model.beside().iter().map(|parameter| (parameter.name().to_owned(), parameter.value())));
    let [embedding, head] = SavedModule::ALL.map(SavedModule::parameter);
    if model.config().tie_word_embeddings && changed.contains_key(embedding) && !changed.contains_key(head) {
        changed.insert(head.to_owned(), model.head().weight()?.to_dense()?);
    }
    Ok(changed)
}

/// `config.json` of the source, naming the type that all of the tensors are stored in.
fn config(source: &Path, entries: &[Entry]) -> Result<Vec<u8>> {
    let path = source.join(CONFIG);
    let mut dtypes = entries.iter().map(|entry| entry.dtype);
    let dtype = dtypes.next().filter(|&first| dtypes.all(|dtype| dtype == first));
    let name = match dtype {
        Some(dtype) if dtype != DecoderConfig::stored_dtype(source)? => dtype_name(dtype),
        _ => return fs::read(&path).map_err(Error::io("read", &path)),
    };
    let mut map = read_object(&path)?;
    // transformers 4 writes the one name, transformers 5 the other; both read both.
    let is_old = map.remove("torch_dtype").is_some() && !map.contains_key("dtype");
    map.insert(if is_old { "torch_dtype" } else { "dtype" }.to_owned(), name.into());
    to_json(&path, &map)
}

fn generation_config(source: &Path) -> Result<Vec<u8>> {
    let path = source.join(GENERATION_CONFIG);
    match fs::read(&path) {
        Ok(bytes) => return Ok(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("read", &path)(error)),
    }
    let mut config = read_object(&source.join(CONFIG))?;
    let mut map = Map::from_iter([("_from_model_config".to_owned(), Value::Bool(true))]);
    for name in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        map.extend(config.remove(name).filter(|id| !id.is_null()).map(|id| (name.to_owned(), id)));
    }
    to_json(&path, &map)
}

fn to_json(path: &Path, map: &Map<String, Value>) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(map).map_err(Error::json(path))?;
    json.push(b'\n');
    Ok(json)
}
