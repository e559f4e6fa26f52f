//! Which layers of a model see a sliding window alone.

use serde_json::Value;
use unsloth_core::ops::attention::Window;

use crate::{
    Result,
    family::{Family, Windows},
    fields::Fields,
};

/// What each of the layers sees.
///
/// `layer_types` says it where it is there; otherwise the older fields that the family has.
pub(crate) fn read(fields: &Fields<'_>, family: &Family, num_layers: usize) -> Result<Vec<Window>> {
    let width = match fields.size("sliding_window")? {
        // `null` means that there is none.
        None if fields.is_null("sliding_window") => None,
        None => family.sliding_window,
        width => width,
    };
    let (width, mut sliding) = match family.windows {
        Windows::Never => (None, vec![false; num_layers]),
        Windows::Uniform => (width, vec![width.is_some(); num_layers]),
        Windows::Upper(default) => {
            let width = if fields.flag("use_sliding_window", false)? { width } else { None };
            let first = fields.count("max_window_layers")?.unwrap_or(default);
            (width, (0..num_layers).map(|layer| width.is_some() && layer >= first).collect())
        }
        Windows::AllButEvery(default) => {
            let every = fields.size("sliding_window_pattern")?.unwrap_or(default);
            (width, (1..=num_layers).map(|layer| !layer.is_multiple_of(every)).collect())
        }
    };
    if let Some(types) = fields.get("layer_types") {
        let given = layer_types(types).filter(|given| given.len() == num_layers);
        let given = given.ok_or_else(|| {
            fields.refuse("layer_types", "a list of full_attention and sliding_attention, one for each layer")
        })?;
        match family.windows {
            Windows::Never if given != sliding => {
                return Err(fields.refuse("layer_types", "full_attention alone: this family has no sliding windows"));
            }
            Windows::Uniform if given != sliding => {
                let rule = "sliding_attention alone if there is a sliding_window, else full_attention alone";
                return Err(fields.refuse("layer_types", rule));
            }
            _ => sliding = given,
        }
    }
    let window = |sliding| match (sliding, width) {
        (false, _) => Ok(Window::Full),
        // A token counts among those that it sees.
        (true, Some(width)) => Ok(Window::Sliding { left: width - 1 }),
        (true, None) => Err(fields.refuse("sliding_window", "a number of tokens: some layers see a window alone")),
    };
    sliding.into_iter().map(window).collect()
}

/// For each layer whether it has a window.
fn layer_types(types: &Value) -> Option<Vec<bool>> {
    let sliding = |kind: &Value| match kind.as_str()? {
        "full_attention" => Some(false),
        "sliding_attention" => Some(true),
        _ => None,
    };
    types.as_array()?.iter().map(sliding).collect()
}
