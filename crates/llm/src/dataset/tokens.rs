//! Examples that are tokens already.

use serde::{Deserialize, Deserializer, de::Error as _};
use unsloth_core::ops::cross_entropy::IGNORE_INDEX;

use super::{Labelled, example::Place};
use crate::Result;

/// One line of a file.
#[derive(Deserialize)]
struct Example {
    #[serde(deserialize_with = "input_ids")]
    input_ids: Vec<i64>,
    #[serde(default, deserialize_with = "labels")]
    labels: Option<Vec<i64>>,
}

// serde_json says where an element is wrong but not in which field.
fn input_ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<i64>, D::Error> {
    Vec::deserialize(deserializer).map_err(|error| D::Error::custom(format_args!("`input_ids`: {error}")))
}

fn labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<i64>>, D::Error> {
    Option::deserialize(deserializer).map_err(|error| D::Error::custom(format_args!("`labels`: {error}")))
}

/// Ids and labels as they stand in a line.
pub(super) fn read(place: &Place<'_>, text: &[u8], vocab_size: usize) -> Result<Labelled> {
    let Example { input_ids, labels } = place.parse(text)?;
    let in_vocabulary = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < vocab_size);
    let num_ids = input_ids.len();
    if num_ids == 0 {
        return Err(place.error("input_ids", "is empty".into()));
    }
    if let Some((index, id)) = input_ids.iter().enumerate().find(|(_, id)| !in_vocabulary(id)) {
        let message =
            format!("holds {id} at index {index}, must be 0 or more and below the vocabulary size {vocab_size}");
        return Err(place.error("input_ids", message));
    }
    // In i32 range: checked against the vocabulary, which is.
    let ids: Vec<i32> = input_ids.iter().map(|&id| id as i32).collect();
    let Some(labels) = labels else { return Ok(Labelled { labels: ids.clone(), ids }) };
    if labels.len() != num_ids {
        return Err(place.error("labels", format!("has {} entries, `input_ids` has {num_ids}", labels.len())));
    }
    let allowed = |label: &i64| *label == i64::from(IGNORE_INDEX) || in_vocabulary(label);
    if let Some((index, label)) = labels.iter().enumerate().find(|(_, label)| !allowed(label)) {
        let message = format!(
            "holds {label} at index {index}, must be {IGNORE_INDEX}, or 0 or more and below the vocabulary size {vocab_size}"
        );
        return Err(place.error("labels", message));
    }
    Ok(Labelled { ids, labels: labels.iter().map(|&label| label as i32).collect() })
}
