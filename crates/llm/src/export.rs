//! Whole models in the form of Hugging Face folders.

use std::{fs, path::Path};

use serde_json::{Map, Value};

use crate::{
    Error, Result, atomic,
    config::{DecoderConfig, dtype_name},
    decoder::Decoder,
    fields::read_object,
    loader::TrainedWeight,
    tensor_file::{self, Entry},
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
    let entry = |weight: &TrainedWeight| Entry {
        name: weight.parameter.name().to_owned(),
        tensor: weight.parameter.value(),
        dtype: weight.stored,
    };
    let entries: Vec<Entry> = model.trained().iter().map(entry).collect();
    let config = config(source, &entries)?;
    let generation_config = generation_config(source)?;
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    tensor_file::write(&folder.join("model.safetensors"), entries)?;
    atomic::write(&folder.join(CONFIG), &config)?;
    atomic::write(&folder.join(GENERATION_CONFIG), &generation_config)
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
