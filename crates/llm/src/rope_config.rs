//! Rotary embedding settings of a Hugging Face configuration, with the defaults of transformers' `modeling_rope_utils`.

use serde_json::{Map, Value};
use unsloth_core::ops::rope_table::{RopeSpec, Scaling};

use crate::{Error, Result, fields::Fields};

/// Base of the frequencies where a file gives none.
const DEFAULT_THETA: f64 = 10_000.0;

/// Fields that every type of scaling may have. `finetuned` describes how the checkpoint was made.
const COMMON: &[&str] = &["rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"];

/// Frequencies from `rope_scaling` or `rope_parameters`, and from the fields beside them.
pub(crate) fn read(config: &Fields<'_>, head_dim: usize, max_position_embeddings: usize) -> Result<RopeSpec> {
    let none = Map::new();
    let mut rope = config.nested("", &none);
    for (name, prefix) in [("rope_parameters", "rope_parameters."), ("rope_scaling", "rope_scaling.")] {
        match config.get(name) {
            None => {}
            Some(Value::Object(map)) if map.is_empty() => {}
            Some(Value::Object(map)) => rope = config.nested(prefix, map),
            Some(_) => return Err(config.refuse(name, "an object")),
        }
    }
    let theta = match rope.number("rope_theta")? {
        Some(theta) => theta,
        None => config.number("rope_theta")?.unwrap_or(DEFAULT_THETA),
    };
    rope.require_neutral(&[(
        "partial_rotary_factor",
        crate::fields::Neutral::Number(1.0),
        "1: partly rotated heads are not supported",
    )])?;
    let original = || original_length(config, &rope, max_position_embeddings);
    let (type_field, rope_type) = match rope.text("rope_type")? {
        Some(rope_type) => ("rope_type", rope_type),
        None => ("type", rope.text("type")?.unwrap_or("default")),
    };
    let (scaling, own_fields): (Scaling, &[&str]) = match rope_type {
        "default" => (Scaling::Default, &[]),
        "linear" => (Scaling::Linear { factor: rope.required_number("factor")? }, &["factor"]),
        "llama3" => (llama3(&rope, original()?)?, LLAMA3),
        "yarn" => (yarn(&rope, original()?, max_position_embeddings)?, YARN),
        _ => return Err(rope.refuse(type_field, "default, linear, llama3 or yarn")),
    };
    if let Some(name) = rope.names().find(|name| !COMMON.contains(name) && !own_fields.contains(name)) {
        return Err(rope.refuse(name, "absent: it is not a setting of this rope type"));
    }
    let spec = RopeSpec { head_dim, theta, scaling };
    match spec.frequencies() {
        Ok((frequencies, factor)) if factor.is_finite() && frequencies.iter().all(|f| f.is_finite()) => Ok(spec),
        Ok(_) => Err(rope.refuse("rope_theta", "such that all frequencies are finite")),
        Err(unsloth_core::Error::InvalidSpec { field, rule, .. }) => {
            let field = if field == "theta" { "rope_theta" } else { field };
            // The base may stand beside the object.
            let holder = if rope.get(field).is_some() { &rope } else { config };
            Err(holder.refuse(field, rule))
        }
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
