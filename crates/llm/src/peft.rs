//! Adapters in the format of Python's PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;
use serde_json::Value;
use unsloth_autograd::Parameter;
use unsloth_core::{Category, DType, Device};
use unsloth_train::{Adapter, Linear, LoraConfig, Model};

use crate::{
    Error, Result, atomic,
    decoder::{Decoder, Targets},
    fields::{Fields, Neutral, NeutralField, decimal, read_object},
    hub,
    tensor_file::{self, Entry},
    weights::{Checkpoint, Wanted, WeightSource},
};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// PEFT wraps the model twice.
const PREFIX: &str = "base_model.model.";

/// Settings under which an adapter is more, or something else, than `scale * x A^T B^T` on linear layers. How it was
/// initialised and described does not matter.
const NEUTRAL: &[NeutralField] = &[
    ("bias", Neutral::Text("none"), "none: trained biases are not supported"),
    ("use_dora", Neutral::False, "false: DoRA is not supported"),
    ("use_qalora", Neutral::False, "false: QA-LoRA is not supported"),
    ("lora_bias", Neutral::False, "false: biases of adapters are not supported"),
    ("fan_in_fan_out", Neutral::False, "false: transposed weights are not supported"),
    ("modules_to_save", Neutral::Empty, "absent or empty: fully trained modules are not supported"),
    ("layers_to_transform", Neutral::Empty, "absent or empty: name the layers in target_modules"),
    ("rank_pattern", Neutral::Empty, "absent or empty: one rank for all layers is supported"),
    ("alpha_pattern", Neutral::Empty, "absent or empty: one alpha for all layers is supported"),
    ("exclude_modules", Neutral::Empty, "absent or empty: name the layers in target_modules"),
    ("target_parameters", Neutral::Empty, "absent or empty: adapters on bare parameters are not supported"),
    ("trainable_token_indices", Neutral::Empty, "absent or empty: trained tokens are not supported"),
    ("layer_replication", Neutral::Empty, "absent or empty: repeated layers are not supported"),
    ("alora_invocation_tokens", Neutral::Empty, "absent or empty: activated adapters are not supported"),
    ("megatron_config", Neutral::Absent, "absent: Megatron layers are not supported"),
    ("use_bdlora", Neutral::Absent, "absent: block-diagonal adapters are not supported"),
    ("arrow_config", Neutral::Absent, "absent: Arrow routing is not supported"),
    ("kasa_config", Neutral::Absent, "absent: KaSA is not supported"),
    ("velora_config", Neutral::Absent, "absent: VeLoRA is not supported"),
    ("monteclora_config", Neutral::Absent, "absent: MonteCLoRA is not supported"),
];

fn refused(path: PathBuf, field: String, value: String, rule: &'static str) -> Error {
    Error::Adapter { path, field, value, rule }
}

/// What `adapter_config.json` says.
struct AdapterConfig {
    lora: LoraConfig,
    /// `None`: a pattern, which the tensors of the file spell out.
    targets: Option<Targets>,
}

/// Loads an adapter folder onto a model without adapters and returns its configuration. Tensors become f32 parameters. If it
/// fails, the model has not been changed.
///
/// # Errors
/// [`Error::Io`], [`Error::Json`]; [`Error::Adapter`] for a setting that is missing, out of range or not supported;
/// [`Error::UnknownTarget`], [`Error::HeadTarget`]; [`Error::MissingTensor`], [`Error::UnexpectedTensor`],
/// [`Error::TensorShape`], [`Error::CorruptWeights`]; [`unsloth_train::Error::AdapterExists`].
pub fn load(folder: &Path, model: &mut Decoder) -> Result<LoraConfig> {
    let config = read_config(&folder.join(CONFIG))?;
    let path = folder.join(WEIGHTS);
    let checkpoint = Checkpoint::open_file(&path)?;
    let targets = match &config.targets {
        Some(targets) => targets.clone(),
        None => Targets::Names(layers_of(&checkpoint)?),
    };
    let selected = model.select(&targets)?;
    let device = model.device().clone();
    let mut adapters = Vec::with_capacity(selected.len());
    for (index, (linear, selected)) in (0u32..).zip(model.linears().zip(selected)) {
        if selected && linear.adapter.is_some() {
            return Err(unsloth_train::Error::AdapterExists { layer: linear.name.clone() }.into());
        }
        let read = || read_adapter(&checkpoint, &device, linear, (config.lora, index));
        adapters.push(selected.then(read).transpose()?);
    }
    if let Some(name) = checkpoint.unused().into_iter().next() {
        return Err(Error::UnexpectedTensor { path, name });
    }
    for (linear, adapter) in model.linears_mut().zip(adapters) {
        if adapter.is_some() {
            linear.adapter = adapter;
        }
    }
    Ok(config.lora)
}

fn read_config(path: &Path) -> Result<AdapterConfig> {
    let map = read_object(path)?;
    let fields = Fields::new(path, &map, refused);
    if fields.text("peft_type")? != Some("LORA") {
        return Err(fields.refuse("peft_type", "LORA"));
    }
    if fields.text("task_type")?.is_some_and(|task| task != "CAUSAL_LM") {
        return Err(fields.refuse("task_type", "CAUSAL_LM"));
    }
    fields.require_neutral(NEUTRAL)?;
    match fields.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => {}
        Some(Value::String(method)) if ["gaussian", "eva", "orthogonal"].contains(&method.as_str()) => {}
        Some(_) => return Err(fields.refuse("init_lora_weights", "one that leaves the base weights as they are")),
    }
    let rank = fields.required_size("r")?;
    let alpha = fields.required_number("lora_alpha")? as f32;
    if !alpha.is_finite() {
        return Err(fields.refuse("lora_alpha", "a number that 32 bits can hold"));
    }
    let dropout = fields.number("lora_dropout")?.unwrap_or(0.0) as f32;
    if !(0.0..1.0).contains(&dropout) {
        return Err(fields.refuse("lora_dropout", "0 or more and below 1"));
    }
    let lora = LoraConfig { rank, alpha, dropout, rslora: fields.flag("use_rslora", false)? };
    let targets = match fields.get("target_modules") {
        Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Some(Targets::AllLinear),
        Some(Value::String(_)) => None,
        Some(Value::Array(list)) => {
            let names = list.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
            let names = names.filter(|names| !names.is_empty());
            Some(Targets::Names(names.ok_or_else(|| fields.refuse("target_modules", "a list of names"))?))
        }
        _ => return Err(fields.refuse("target_modules", "a list of names or a string")),
    };
    Ok(AdapterConfig { lora, targets })
}

/// Module paths that the tensors of a file belong to.
fn layers_of(checkpoint: &Checkpoint) -> Result<Vec<String>> {
    let layer = |name: &str| {
        let path = name.strip_prefix(PREFIX)?;
        path.strip_suffix(".lora_A.weight").or_else(|| path.strip_suffix(".lora_B.weight")).map(str::to_owned)
    };
    let unexpected = |name: &str| Error::UnexpectedTensor { path: checkpoint.path().to_owned(), name: name.to_owned() };
    let layers: BTreeSet<String> =
        checkpoint.names().map(|name| layer(name).ok_or_else(|| unexpected(name))).collect::<Result<_>>()?;
    Ok(layers.into_iter().collect())
}

fn read_adapter(
    checkpoint: &Checkpoint,
    device: &Device,
    linear: &Linear,
    (config, index): (LoraConfig, u32),
) -> Result<Adapter> {
    let parameter = |part: &str, shape: [usize; 2]| {
        let name = format!("{}.lora_{part}.weight", linear.name);
        let stored = format!("{PREFIX}{name}");
        let wanted = Wanted { name: &stored, shape: shape.into(), dtype: DType::F32, category: Category::Adapters };
        Ok::<_, Error>(Parameter::new(name, checkpoint.tensor_copy(device, &wanted)?))
    };
    Ok(Adapter {
        lora_a: parameter("A", [config.rank, linear.in_features()])?,
        lora_b: parameter("B", [linear.out_features(), config.rank])?,
        config,
        index,
    })
}

/// Fields of `adapter_config.json` that every version of PEFT since 0.9 knows, in the order in which it writes them.
#[derive(Serialize)]
struct SavedConfig {
    alpha_pattern: BTreeMap<String, f64>,
    auto_mapping: Option<()>,
    base_model_name_or_path: Option<String>,
    bias: &'static str,
    fan_in_fan_out: bool,
    inference_mode: bool,
    init_lora_weights: bool,
    layers_pattern: Option<()>,
    layers_to_transform: Option<()>,
    lora_alpha: Value,
    lora_dropout: f64,
    modules_to_save: Option<()>,
    peft_type: &'static str,
    r: usize,
    rank_pattern: BTreeMap<String, usize>,
    revision: Option<()>,
    target_modules: Vec<String>,
    task_type: &'static str,
    use_dora: bool,
    use_rslora: bool,
}

/// Writes the adapters of a model, in f32, to a folder that is made if need be. Each file is replaced whole or not at all.
///
/// # Errors
/// [`Error::NoAdapter`]; [`Error::MixedAdapters`] for adapters of different configurations; [`Error::Io`];
/// [`unsloth_core::Error::Launch`] if the device failed.
pub fn save(folder: &Path, model: &Decoder) -> Result<()> {
    let lora = common_config(folder, model)?;
    let mut entries = Vec::new();
    for linear in model.linears() {
        let Some(Adapter { lora_a, lora_b, .. }) = &linear.adapter else { continue };
        for (part, parameter) in [("A", lora_a), ("B", lora_b)] {
            let name = format!("{PREFIX}{}.lora_{part}.weight", linear.name);
            entries.push(Entry { name, tensor: parameter.value(), dtype: DType::F32 });
        }
    }
    let config = saved_config(model, lora);
    let config_path = folder.join(CONFIG);
    let mut json = serde_json::to_vec_pretty(&config).map_err(Error::json(&config_path))?;
    json.push(b'\n');
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    tensor_file::write(&folder.join(WEIGHTS), entries)?;
    atomic::write(&config_path, &json)
}

/// The configuration that all adapters share.
fn common_config(folder: &Path, model: &Decoder) -> Result<LoraConfig> {
    let mut common = None;
    for linear in model.linears() {
        let Some(Adapter { config, .. }) = &linear.adapter else { continue };
        let first: LoraConfig = *common.get_or_insert(*config);
        let fields = [
            ("rank", first.rank as f32, config.rank as f32),
            ("alpha", first.alpha, config.alpha),
            ("scale", first.scale(), config.scale()),
            ("dropout", first.dropout, config.dropout),
        ];
        if let Some(&(field, expected, actual)) = fields.iter().find(|(_, expected, actual)| expected != actual) {
            return Err(Error::MixedAdapters { name: linear.name.clone(), field, expected, actual });
        }
    }
    common.ok_or_else(|| Error::NoAdapter { path: folder.to_owned() })
}

fn saved_config(model: &Decoder, lora: LoraConfig) -> SavedConfig {
    let LoraConfig { rank, dropout, rslora, .. } = lora;
    let (alpha, dropout) = (decimal(lora.alpha), decimal(dropout));
    // PEFT annotates alpha as an integer; only one that is not is written as a float.
    let whole = alpha.fract() == 0.0 && alpha.abs() < i64::MAX as f64;
    SavedConfig {
        alpha_pattern: BTreeMap::new(),
        auto_mapping: None,
        base_model_name_or_path: model.folder().map(hub::shown),
        bias: "none",
        fan_in_fan_out: false,
        inference_mode: true,
        init_lora_weights: true,
        layers_pattern: None,
        layers_to_transform: None,
        lora_alpha: if whole { Value::from(alpha as i64) } else { Value::from(alpha) },
        lora_dropout: dropout,
        modules_to_save: None,
        peft_type: "LORA",
        r: rank,
        rank_pattern: BTreeMap::new(),
        revision: None,
        target_modules: target_modules(model),
        task_type: "CAUSAL_LM",
        use_dora: false,
        use_rslora: rslora,
    }
}

/// Sorted names that mean exactly the adapted layers: the last part of a path where all layers of that name are adapted, else
/// whole paths.
fn target_modules(model: &Decoder) -> Vec<String> {
    let last = |linear: &Linear| linear.name.rsplit('.').next().unwrap_or(&linear.name).to_owned();
    let plain: BTreeSet<String> = model.linears().filter(|linear| linear.adapter.is_none()).map(last).collect();
    let adapted = model.linears().filter(|linear| linear.adapter.is_some());
    let name = |linear: &Linear| Some(last(linear)).filter(|name| !plain.contains(name)).unwrap_or(linear.name.clone());
    adapted.map(name).collect::<BTreeSet<_>>().into_iter().collect()
}
