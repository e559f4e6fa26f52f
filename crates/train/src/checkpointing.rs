//! Which layers keep their activations for the backward pass.        Chen et al. 2016, arXiv:1604.06174

use std::{fmt, ops::Range, str::FromStr};

use crate::{Error, error::invalid};

/// How layers are grouped into segments whose inputs are kept and whose inside is recomputed by the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// Everything is kept, nothing recomputed.
    #[default]
    None,
    /// Segments of this many layers, 1 or more (0 counts as 1).
    Every(usize),
    /// Segments of about the square root of the number of layers: least memory for one extra forward pass.
    Sqrt,
}

impl Checkpointing {
    /// Consecutive ranges that cover all layers. With [`Checkpointing::None`] it is one range, to be computed as it is;
    /// otherwise each range is to be one checkpointed function.
    pub fn segments(self, num_layers: usize) -> Vec<Range<usize>> {
        let length = match self {
            Checkpointing::None => num_layers,
            Checkpointing::Every(length) => length,
            Checkpointing::Sqrt => (num_layers as f64).sqrt().ceil() as usize,
        };
        let length = length.max(1);
        (0..num_layers).step_by(length).map(|start| start..num_layers.min(start.saturating_add(length))).collect()
    }

    /// Whether segments are recomputed.
    pub fn is_active(self) -> bool {
        self != Checkpointing::None
    }
}

/// `none`, `every:N` or `sqrt`.
impl fmt::Display for Checkpointing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Checkpointing::None => f.write_str("none"),
            Checkpointing::Every(length) => write!(f, "every:{length}"),
            Checkpointing::Sqrt => f.write_str("sqrt"),
        }
    }
}

impl FromStr for Checkpointing {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidConfig`] for anything but `none`, `every:N` with N at least 1, or `sqrt`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let every = |count: &str| count.parse().ok().filter(|&length: &usize| length > 0).map(Checkpointing::Every);
        match text {
            "none" => Ok(Checkpointing::None),
            "sqrt" => Ok(Checkpointing::Sqrt),
            _ => match text.strip_prefix("every:").and_then(every) {
                Some(policy) => Ok(policy),
                None => invalid("checkpointing", text, "none, every:N with N at least 1, or sqrt"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Checkpointing;

    #[test]
    fn segments_cover_all_layers_once() {
        for policy in [Checkpointing::None, Checkpointing::Every(1), Checkpointing::Every(3), Checkpointing::Sqrt] {
            for num_layers in 0..40 {
                let layers: Vec<usize> = policy.segments(num_layers).into_iter().flatten().collect();
                assert_eq!(layers, (0..num_layers).collect::<Vec<_>>(), "{policy}");
            }
        }
    }

    #[test]
    fn segment_lengths() {
        let lengths = |policy: Checkpointing, num_layers| -> Vec<usize> {
            policy.segments(num_layers).iter().map(ExactSizeIterator::len).collect()
        };
        assert_eq!(lengths(Checkpointing::None, 5), [5]);
        assert_eq!(lengths(Checkpointing::Every(2), 5), [2, 2, 1]);
        assert_eq!(lengths(Checkpointing::Every(usize::MAX), 3), [3]);
        assert_eq!(lengths(Checkpointing::Sqrt, 9), [3, 3, 3]);
        assert_eq!(lengths(Checkpointing::Sqrt, 10), [4, 4, 2]);
    }

    #[test]
    fn text_form_round_trips() {
        for policy in [Checkpointing::None, Checkpointing::Every(7), Checkpointing::Sqrt] {
            assert_eq!(policy.to_string().parse::<Checkpointing>().unwrap(), policy);
        }
    }

    #[test]
    fn rejects_unknown_policies() {
        for text in ["", "every", "every:", "every:0", "every:-1", "every:x", "Sqrt", "auto"] {
            let message = text.parse::<Checkpointing>().unwrap_err().to_string();
            assert!(message.starts_with(&format!("checkpointing = {text}, must be none")), "{message}");
        }
    }
}
