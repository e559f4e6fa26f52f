//! `adapter_config.json`.

use std::{
    collections::BTreeSet,
    fmt,
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
};
use serde_json::Value;
use unsloth_train::{Linear, LoraConfig, LoraInit};

use crate::{
    Error, Result,
    adapter::{AdapterConfig, BiasTraining, Pattern, SavedModule},
    decoder::{Decoder, Targets},
    fields::{Fields, Neutral, NeutralField, decimal, read_object},
    hub,
};

/// Settings under which an adapter is more, or something else, than `scale * x A^T B^T` on linear layers. How it
/// is described does not matter.
const NEUTRAL: &[NeutralField] = &[
    ("use_qalora", Neutral::False, "false: QA-LoRA is not supported"),
    ("lora_bias", Neutral::False, "false: biases of adapters are not supported"),
    ("fan_in_fan_out", Neutral::False, "false: transposed weights are not supported"),
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
pub(super) struct Read {
    pub(super) adapters: AdapterConfig,
    /// Whether the targets are a pattern, which the tensors of the file spell out.
    pub(super) spells_layers: bool,
}

pub(super) fn read(path: &Path) -> Result<Read> {
    let map = read_object(path)?;
    let fields = Fields::new(path, &map, refused);
    if fields.text("peft_type")? != Some("LORA") {
        return Err(fields.refuse("peft_type", "LORA"));
    }
    if fields.text("task_type")?.is_some_and(|task| task != "CAUSAL_LM") {
        return Err(fields.refuse("task_type", "CAUSAL_LM"));
    }
    fields.require_neutral(NEUTRAL)?;
    let rank = fields.required_size("r")?;
    let alpha = fields.required_number("lora_alpha")? as f32;
    if !alpha.is_finite() {
        return Err(fields.refuse("lora_alpha", "a number that 32 bits can hold"));
    }
    let dropout = fields.number("lora_dropout")?.unwrap_or(0.0) as f32;
    if !(0.0..1.0).contains(&dropout) {
        return Err(fields.refuse("lora_dropout", "0 or more and below 1"));
    }
    let (rslora, dora) = (fields.flag("use_rslora", false)?, fields.flag("use_dora", false)?);
    let lora = LoraConfig { rank, alpha, dropout, rslora, dora, init: initialisation(&fields)? };
    let targets = match fields.get("target_modules") {
        Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Some(Targets::AllLinear),
        Some(Value::String(_)) => None,
        Some(Value::Array(_)) => Some(Targets::Names(names(&fields, "target_modules", "a list of names")?)),
        _ => return Err(fields.refuse("target_modules", "a list of names or a string")),
    };
    let mut adapters = AdapterConfig::new(lora, targets.clone().unwrap_or(Targets::AllLinear));
    adapters.layers_to_transform = layers(&fields)?;
    adapters.modules_to_save = modules(&fields)?;
    adapters.bias = match fields.text("bias")? {
        None => BiasTraining::None,
        Some(text) => text.parse().map_err(|_| fields.refuse("bias", "none, all or lora_only"))?,
    };
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    let Patterns { rank_pattern, alpha_pattern } = serde_json::from_slice(&text).map_err(Error::json(path))?;
    adapters.rank_pattern = patterns(&fields, "rank_pattern", rank_pattern)?;
    adapters.alpha_pattern = patterns(&fields, "alpha_pattern", alpha_pattern)?;
    if adapters.alpha_pattern.iter().any(|(_, alpha)| !alpha.is_finite()) {
        return Err(fields.refuse("alpha_pattern", "numbers that 32 bits can hold"));
    }
    if adapters.validate().is_err() {
        return Err(fields.refuse("rank_pattern", "ranks of 1 or more, and with pissa every alpha above 0"));
    }
    Ok(Read { adapters, spells_layers: targets.is_none() })
}

/// How it was initialised only matters where that changed the weights of the model.
fn initialisation(fields: &Fields<'_>) -> Result<LoraInit> {
    let text = match fields.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => return Ok(LoraInit::Kaiming),
        Some(value) => value.as_str().unwrap_or_default(),
    };
    match text.parse() {
        Ok(init) if text != "kaiming" => Ok(init),
        _ if ["eva", "orthogonal"].contains(&text) => Ok(LoraInit::Kaiming),
        _ => Err(fields.refuse(
            "init_lora_weights",
            "true, false, gaussian, eva, orthogonal, pissa or pissa_niter_N: others change the base weights",
        )),
    }
}

fn names(fields: &Fields<'_>, name: &str, rule: &'static str) -> Result<Vec<String>> {
    let list = fields.get(name).and_then(Value::as_array);
    let names =
        list.and_then(|list| list.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>());
    names.filter(|names| !names.is_empty()).ok_or_else(|| fields.refuse(name, rule))
}

/// One layer or a list of them; an empty list means all. Names of layers other than `layers` mean none here.
fn layers(fields: &Fields<'_>) -> Result<Option<Vec<usize>>> {
    let is_layers = |value: &Value| match value {
        Value::String(text) => text.is_empty() || text == "layers",
        Value::Array(list) => list.is_empty() || list.iter().any(|text| text == "layers"),
        _ => false,
    };
    if fields.get("layers_pattern").is_some_and(|value| !is_layers(value)) {
        return Err(fields.refuse("layers_pattern", "absent or layers"));
    }
    let index = |value: &Value| value.as_u64().and_then(|index| usize::try_from(index).ok());
    let layers = match fields.get("layers_to_transform") {
        None => return Ok(None),
        Some(Value::Array(list)) => list.iter().map(index).collect::<Option<Vec<_>>>(),
        Some(value) => index(value).map(|index| vec![index]),
    };
    let layers = layers.ok_or_else(|| fields.refuse("layers_to_transform", "a layer or a list of layers, from 0"))?;
    Ok(Some(layers).filter(|layers| !layers.is_empty()))
}

fn modules(fields: &Fields<'_>) -> Result<Vec<SavedModule>> {
    const RULE: &str = "a list of embed_tokens and lm_head: other modules are not trained whole";
    let is_empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    if fields.get("modules_to_save").is_none_or(is_empty) {
        return Ok(Vec::new());
    }
    let modules: Result<BTreeSet<SavedModule>> =
        names(fields, "modules_to_save", RULE)?.iter().map(|name| name.parse()).collect();
    modules.map(|modules| modules.into_iter().collect()).map_err(|_| fields.refuse("modules_to_save", RULE))
}

fn patterns<T>(fields: &Fields<'_>, name: &str, read: Option<Ordered<T>>) -> Result<Vec<(Pattern, T)>> {
    let pattern = |(text, value): (String, T)| match text.parse() {
        Ok(pattern) => Ok((pattern, value)),
        Err(_) => Err(fields.refuse(name, "an object of regular expressions without look-around")),
    };
    read.map_or_else(Vec::new, |Ordered(pairs)| pairs).into_iter().map(pattern).collect()
}

/// Fields in which the first of several matches counts.
#[derive(Deserialize)]
struct Patterns {
    rank_pattern: Option<Ordered<usize>>,
    alpha_pattern: Option<Ordered<f32>>,
}

/// The pairs of a JSON object in their order.
struct Ordered<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Ordered<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Pairs<T> {
            type Value = Ordered<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of patterns and numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered<T>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Ordered(pairs))
            }
        }
        deserializer.deserialize_map(Pairs(PhantomData))
    }
}

impl<T: Serialize> Serialize for Ordered<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// Fields of `adapter_config.json` that every version of PEFT since 0.9 knows, in the order in which it writes them.
#[derive(Serialize)]
struct SavedConfig {
    alpha_pattern: Ordered<Value>,
    auto_mapping: Option<()>,
    base_model_name_or_path: Option<String>,
    bias: String,
    fan_in_fan_out: bool,
    inference_mode: bool,
    init_lora_weights: Value,
    layers_pattern: Option<()>,
    layers_to_transform: Option<Vec<usize>>,
    lora_alpha: Value,
    lora_dropout: f64,
    modules_to_save: Option<Vec<String>>,
    peft_type: &'static str,
    r: usize,
    rank_pattern: Ordered<usize>,
    revision: Option<()>,
    target_modules: Vec<String>,
    task_type: &'static str,
    use_dora: bool,
    use_rslora: bool,
}

/// The file that says what the adapters of a model are.
///
/// # Errors
/// [`Error::Json`].
pub(super) fn to_json(path: &Path, model: &Decoder, config: &AdapterConfig) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(&saved(model, config)).map_err(Error::json(path))?;
    json.push(b'\n');
    Ok(json)
}

fn saved(model: &Decoder, config: &AdapterConfig) -> SavedConfig {
    let LoraConfig { rank, alpha, dropout, rslora, dora, init } = config.lora;
    let alphas = config.alpha_pattern.iter().map(|(pattern, alpha)| (pattern.as_str().to_owned(), number(*alpha)));
    let ranks = config.rank_pattern.iter().map(|(pattern, rank)| (pattern.as_str().to_owned(), *rank));
    let modules: Vec<String> = config.modules_to_save.iter().map(ToString::to_string).collect();
    SavedConfig {
        alpha_pattern: Ordered(alphas.collect()),
        auto_mapping: None,
        base_model_name_or_path: model.folder().map(hub::shown),
        bias: config.bias.to_string(),
        fan_in_fan_out: false,
        inference_mode: true,
        init_lora_weights: match init {
            LoraInit::Kaiming => Value::Bool(true),
            LoraInit::Gaussian | LoraInit::Pissa { .. } => Value::String(init.to_string()),
        },
        layers_pattern: None,
        layers_to_transform: config.layers_to_transform.clone(),
        lora_alpha: number(alpha),
        lora_dropout: decimal(dropout),
        modules_to_save: Some(modules).filter(|modules| !modules.is_empty()),
        peft_type: "LORA",
        r: rank,
        rank_pattern: Ordered(ranks.collect()),
        revision: None,
        target_modules: target_modules(model, config),
        task_type: "CAUSAL_LM",
        use_dora: dora,
        use_rslora: rslora,
    }
}

/// PEFT annotates alpha as an integer; only one that is not is written as a float.
fn number(value: f32) -> Value {
    let value = decimal(value);
    if value.fract() == 0.0 && value.abs() < i64::MAX as f64 { Value::from(value as i64) } else { Value::from(value) }
}

/// Sorted names that, among the layers to transform, mean exactly the adapted ones: the last part of a path where all layers of
/// that name are adapted, else whole paths.
fn target_modules(model: &Decoder, config: &AdapterConfig) -> Vec<String> {
    let last = |linear: &Linear| linear.name.rsplit('.').next().unwrap_or(&linear.name).to_owned();
    let plain = model.linears().filter(|linear| linear.adapter.is_none() && config.is_transformed(&linear.name));
    let plain: BTreeSet<String> = plain.map(last).collect();
    let adapted = model.linears().filter(|linear| linear.adapter.is_some());
    let name = |linear: &Linear| Some(last(linear)).filter(|name| !plain.contains(name)).unwrap_or(linear.name.clone());
    adapted.map(name).collect::<BTreeSet<_>>().into_iter().collect()
}
