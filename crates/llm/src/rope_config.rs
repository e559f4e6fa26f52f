//! Rotary embedding settings of a Hugging Face configuration, with the defaults of transformers' `modeling_rope_utils`.

use serde_json::Map;
use unsloth_core::ops::rope_table::{RopeSpec, Scaling};

use crate::{
    Error, Result,
    family::RopeBases,
    fields::{Fields, Neutral},
};

/// Fields that every type of scaling may have. `finetuned` describes how the checkpoint was made.
const COMMON: &[&str] = &["rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"];

/// Frequencies of layers that see everything and of those that see a window.
pub(crate) struct Ropes {
    pub(crate) full: RopeSpec,
    pub(crate) sliding: RopeSpec,
}

/// What the frequencies depend on besides their own settings.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    pub(crate) head_dim: usize,
    pub(crate) max_position_embeddings: usize,
}

/// A field beside the object that holds the base of the frequencies where the object does not, and the base where neither does.
type Base = (&'static str, f64);

/// Frequencies from `rope_scaling` or `rope_parameters`, and from the fields beside them.
pub(crate) fn read(config: &Fields<'_>, bases: &RopeBases, extent: Extent) -> Result<Ropes> {
    let none = Map::new();
    let absent = config.nested("", &none);
    let (parameters, scaling) =
        (config.object("rope_parameters", "rope_parameters.")?, config.object("rope_scaling", "rope_scaling.")?);
    match *bases {
        RopeBases::One(theta) => {
            let rope = scaling.or(parameters).unwrap_or(absent);
            let full = read_one(config, &rope, ("rope_theta", theta), extent)?;
            Ok(Ropes { full, sliding: full })
        }
        RopeBases::ByWindow { full, sliding } => {
            let (full_fields, sliding_fields) = match parameters {
                None => (scaling, None),
                Some(_) if scaling.is_some() => {
                    return Err(config.refuse("rope_scaling", "absent where there are rope_parameters"));
                }
                Some(parameters) => by_window(&parameters)?,
            };
            let read = |fields: Option<Fields<'_>>, base| read_one(config, &fields.unwrap_or(absent), base, extent);
            Ok(Ropes {
                full: read(full_fields, ("rope_theta", full))?,
                sliding: read(sliding_fields, ("rope_local_base_freq", sliding))?,
            })
        }
    }
}

/// The two objects in `rope_parameters` of a model whose layers differ.
fn by_window<'a>(parameters: &Fields<'a>) -> Result<(Option<Fields<'a>>, Option<Fields<'a>>)> {
    const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];
    if let Some(name) = parameters.names().find(|name| !KINDS.contains(name)) {
        return Err(parameters.refuse(name, "in full_attention or sliding_attention: this family has two rotary bases"));
    }
    Ok((
        parameters.object(KINDS[0], "rope_parameters.full_attention.")?,
        parameters.object(KINDS[1], "rope_parameters.sliding_attention.")?,
    ))
}

fn read_one(config: &Fields<'_>, rope: &Fields<'_>, base: Base, extent: Extent) -> Result<RopeSpec> {
    let (base_field, default) = base;
    let theta = match rope.number("rope_theta")? {
        Some(theta) => theta,
        None => config.number(base_field)?.unwrap_or(default),
    };
    rope.require_neutral(&[(
        "partial_rotary_factor",
        Neutral::Number(1.0),
        "1: partly rotated heads are not supported",
    )])?;
    let original = || original_length(config, rope, extent.max_position_embeddings);
    let (type_field, rope_type) = match rope.text("rope_type")? {
        Some(rope_type) => ("rope_type", rope_type),
        None => ("type", rope.text("type")?.unwrap_or("default")),
    };
    let (scaling, own_fields): (Scaling, &[&str]) = match rope_type {
        "default" => (Scaling::Default, &[]),
        "linear" => (Scaling::Linear { factor: rope.required_number("factor")? }, &["factor"]),
        "llama3" => (llama3(rope, original()?)?, LLAMA3),
        "yarn" => (yarn(rope, original()?, extent.max_position_embeddings)?, YARN),
        _ => return Err(rope.refuse(type_field, "default, linear, llama3 or yarn")),
    };
    if let Some(name) = rope.names().find(|name| !COMMON.contains(name) && !own_fields.contains(name)) {
        return Err(rope.refuse(name, "absent: it is not a setting of this rope type"));
    }
    let spec = RopeSpec { head_dim: extent.head_dim, theta, scaling };
    // The base may stand beside the object.
    let refuse_theta = |rule| match rope.get("rope_theta") {
        Some(_) => rope.refuse("rope_theta", rule),
        None => config.refuse(base_field, rule),
    };
    match spec.frequencies() {
        Ok((frequencies, factor)) if factor.is_finite() && frequencies.iter().all(|f| f.is_finite()) => Ok(spec),
        Ok(_) => Err(refuse_theta("such that all frequencies are finite")),
        Err(unsloth_core::Error::InvalidSpec { field: "theta", rule, .. }) => Err(refuse_theta(rule)),
        Err(unsloth_core::Error::InvalidSpec { field, rule, .. }) => Err(rope.refuse(field, rule)),
        Err(error) => Err(Error::Core(error)),
    }
}
/// Length of pre-training: the field beside the object wins over the one in it, as in transformers.
fn original_length(config: &Fields<'_>, rope: &Fields<'_>, max_position_embeddings: usize) -> Result<usize> {
    const FIELD: &str = "original_max_position_embeddings";
    match config.size(FIELD)? {
        Some(length) => Ok(length),
        None => Ok(rope.size(FIELD)?.unwrap_or(max_position_embeddings)),
    }
}

const LLAMA3: &[&str] = &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"];

fn llama3(rope: &Fields<'_>, original_max_position_embeddings: usize) -> Result<Scaling> {
    Ok(Scaling::Llama3 {
        factor: rope.required_number("factor")?,
        low_freq_factor: rope.required_number("low_freq_factor")?,
        high_freq_factor: rope.required_number("high_freq_factor")?,
        original_max_position_embeddings,
    })
}

const YARN: &[&str] = &[
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
];

fn yarn(rope: &Fields<'_>, original_max_position_embeddings: usize, max_position_embeddings: usize) -> Result<Scaling> {
    let implied = max_position_embeddings as f64 / original_max_position_embeddings as f64;
    let factor = rope.number("factor")?.unwrap_or(implied);
    let magnitude = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    // Zero counts as absent, as in transformers.
    let nonzero = |name: &str| Ok::<_, Error>(rope.number(name)?.filter(|&value| value != 0.0));
    let attention_factor = match (rope.number("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
        (Some(given), _, _) => given,
        (None, Some(mscale), Some(all_dim)) => magnitude(mscale) / magnitude(all_dim),
        (None, _, _) => magnitude(1.0),
    };
    if !(attention_factor > 0.0 && attention_factor.is_finite()) {
        return Err(rope.refuse("attention_factor", "positive and finite"));
    }
    Ok(Scaling::Yarn {
        factor,
        beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
        beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
        original_max_position_embeddings,
        attention_factor,
        truncate: rope.flag("truncate", true)?,
    })
}
