//! Adapters in the format of Python's PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`.

mod config;

use std::{collections::BTreeSet, fs, path::Path};

use unsloth_autograd::Parameter;
use unsloth_core::{Category, DType, Device, Shape, Tensor};
use unsloth_train::{Adapter, Linear, LoraConfig, LoraInit, Model};

use crate::{
    Error, Result,
    adapter::AdapterConfig,
    atomic,
    decoder::{Decoder, Targets},
    tensor_file::{self, Entry},
    weights::{Checkpoint, Wanted, WeightSource},
};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// PEFT wraps the model twice.
const PREFIX: &str = "base_model.model.";

/// Loads an adapter folder onto a model without adapters and returns its configuration. Tensors become f32 parameters. An
/// adapter that began as the principal part of the weights takes that part out of them, as it was when it was trained. If
/// loading fails, the model has not been changed.
///
/// # Errors
/// [`Error::Io`], [`Error::Json`]; [`Error::Adapter`] for a setting that is missing, out of range or not supported;
/// [`Error::UnknownTarget`], [`Error::HeadTarget`]; [`Error::MissingTensor`], [`Error::UnexpectedTensor`],
/// [`Error::TensorShape`], [`Error::CorruptWeights`]; [`unsloth_train::Error::AdapterExists`].
pub fn load(folder: &Path, model: &mut Decoder) -> Result<AdapterConfig> {
    let path = folder.join(WEIGHTS);
    let mut config = config::read(&folder.join(CONFIG))?;
    let checkpoint = Checkpoint::open_file(&path)?;
    if config.spells_layers {
        config.adapters.targets = Targets::Names(layers_of(&checkpoint));
    }
    let config = config.adapters;
    let selected = model.select(&config)?;
    let device = model.device().clone();
    let make = |linear: &mut Linear, lora: LoraConfig, index: u32| {
        let adapter = read_adapter(&checkpoint, &device, linear, (lora, index))?;
        if let LoraInit::Pissa { .. } = lora.init {
            linear.remove_principal(&lora)?;
        }
        linear.adapter = Some(adapter);
        Ok(())
    };
    let start = |name: &str, is_adapted: bool, value: Tensor| {
        let stored = stored_name(name, is_adapted);
        let shape = *value.shape();
        let wanted = Wanted { name: &stored, shape, dtype: DType::F32, category: Category::Weights };
        checkpoint.tensor_copy(&device, &wanted)
    };
    let is_complete = || match checkpoint.unused().into_iter().next() {
        Some(name) => Err(Error::UnexpectedTensor { path: path.clone(), name }),
        None => Ok(()),
    };
    model.adapt(&config, &selected, (make, start), is_complete)?;
    Ok(config)
}

/// The name of a bias or a weight that is trained whole. PEFT wraps layers that have an adapter once more.
fn stored_name(name: &str, is_adapted: bool) -> String {
    match name.strip_suffix(".bias") {
        Some(layer) if is_adapted => format!("{PREFIX}{layer}.base_layer.bias"),
        _ => format!("{PREFIX}{name}"),
    }
}

/// Module paths that the tensors of a file belong to.
fn layers_of(checkpoint: &Checkpoint) -> Vec<String> {
    let layer = |name: &str| {
        let path = name.strip_prefix(PREFIX)?;
        path.strip_suffix(".lora_A.weight").or_else(|| path.strip_suffix(".lora_B.weight")).map(str::to_owned)
    };
    // What belongs to no layer is found later: it may be trained whole.
    let layers: BTreeSet<String> = checkpoint.names().filter_map(layer).collect();
    layers.into_iter().collect()
}

fn read_adapter(
    checkpoint: &Checkpoint,
    device: &Device,
    linear: &Linear,
    (config, index): (LoraConfig, u32),
) -> Result<Adapter> {
    let parameter = |part: &str, shape: Shape| {
        let name = format!("{}.{part}", linear.name);
        let stored = format!("{PREFIX}{name}");
        let wanted = Wanted { name: &stored, shape, dtype: DType::F32, category: Category::Adapters };
        Ok::<_, Error>(Parameter::new(name, checkpoint.tensor_copy(device, &wanted)?))
    };
    Ok(Adapter {
        lora_a: parameter("lora_A.weight", [config.rank, linear.in_features()].into())?,
        lora_b: parameter("lora_B.weight", [linear.out_features(), config.rank].into())?,
        magnitude: match config.dora {
            true => Some(parameter("lora_magnitude_vector", [linear.out_features()].into())?),
            false => None,
        },
        config,
        index,
    })
}

/// Writes the adapters of a model, and what is trained beside them, in f32, to a folder that is made if need be. Each file is
/// replaced whole or not at all.
///
/// # Errors
/// [`Error::NoAdapter`]; [`Error::MixedAdapters`] for a layer whose adapter is not as [`Decoder::adapters`] says;
/// [`Error::Io`]; [`unsloth_core::Error::Launch`] if the device failed.
pub fn save(folder: &Path, model: &Decoder) -> Result<()> {
    let config = model.adapters().ok_or_else(|| Error::NoAdapter { path: folder.to_owned() })?;
    let mut entries = Vec::new();
    let mut add = |name: String, parameter: &Parameter| {
        entries.push(Entry::of(name, parameter.value(), DType::F32));
    };
    for linear in model.linears() {
        let Some(adapter) = &linear.adapter else { continue };
        require_same(linear, &config.of_layer(&linear.name), &adapter.config)?;
        for parameter in adapter.parameters() {
            add(format!("{PREFIX}{}", parameter.name()), &parameter);
        }
    }
    let adapted: BTreeSet<&str> =
        model.linears().filter(|linear| linear.adapter.is_some()).map(|linear| linear.name.as_str()).collect();
    for parameter in model.beside() {
        let layer = parameter.name().rsplit_once('.').map_or("", |(layer, _)| layer);
        add(stored_name(parameter.name(), adapted.contains(layer)), parameter);
    }
    let json = config::to_json(&folder.join(CONFIG), model, config)?;
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    tensor_file::write(&folder.join(WEIGHTS), entries)?;
    atomic::write(&folder.join(CONFIG), &json)
}

/// Fails if the adapter of a layer is not the one that the configuration gives it.
fn require_same(linear: &Linear, expected: &LoraConfig, actual: &LoraConfig) -> Result<()> {
    let fields = [
        ("rank", expected.rank as f32, actual.rank as f32),
        ("alpha", expected.alpha, actual.alpha),
        ("scale", expected.scale(), actual.scale()),
        ("dropout", expected.dropout, actual.dropout),
    ];
    match fields.into_iter().find(|(_, expected, actual)| expected != actual) {
        Some((field, expected, actual)) => {
            Err(Error::MixedAdapters { name: linear.name.clone(), field, expected, actual })
        }
        None => Ok(()),
    }
}
