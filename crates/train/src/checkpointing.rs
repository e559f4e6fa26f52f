//! What a training pass keeps for its backward pass, and what it computes again.
//!                                                   Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198

use std::{fmt, ops::Range, str::FromStr};

use unsloth_autograd::Recompute;

use crate::{Error, Result, error::invalid};

/// What of a training pass is computed again by the backward pass. Gradients have the same bits under every policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// Everything is kept, nothing computed again.
    #[default]
    None,
    /// Segments of this many layers, 1 or more (0 counts as 1), of which only the input is kept.
    Every(usize),
    /// Segments of about the square root of the number of layers, of which only the input is kept, and all of the last one: fewest
    /// inputs for at most one extra forward pass.
    Sqrt,
    /// These layers, from 0, each a segment of its own; all others keep everything.
    Layers(Vec<usize>),
    /// Results of these operators, in all layers: little time for less memory.
    Selective(Recompute),
}

/// Consecutive layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// From 0.
    pub layers: Range<usize>,
    /// Whether they keep their input alone, which only the backward pass reads, and are computed again.
    pub again: bool,
}

impl Checkpointing {
    /// Results of norms and gated linear units.
    pub const SELECTIVE: Self = Self::Selective(Recompute { norms: true, gates: true });

    /// Consecutive segments that cover all layers.
    pub fn segments(&self, num_layers: usize) -> Vec<Segment> {
        let every = |length: usize| {
            let length = length.max(1);
            let end = move |start: usize| num_layers.min(start.saturating_add(length));
            (0..num_layers).step_by(length).map(|start| Segment { layers: start..end(start), again: true }).collect()
        };
        match self {
            Checkpointing::None | Checkpointing::Selective(_) => vec![Segment { layers: 0..num_layers, again: false }],
            Checkpointing::Every(length) => every(*length),
            Checkpointing::Sqrt => {
                let mut segments: Vec<Segment> = every((num_layers as f64).sqrt().ceil() as usize);
                // The backward pass begins with it: computed again at once, it would take nearly as much.
                if let Some(last) = segments.last_mut() {
                    last.again = false;
                }
                segments
            }
            Checkpointing::Layers(chosen) => {
                let mut segments: Vec<Segment> = Vec::new();
                for layer in 0..num_layers {
                    let again = chosen.contains(&layer);
                    match segments.last_mut() {
                        Some(last) if !again && !last.again => last.layers.end = layer + 1,
                        _ => segments.push(Segment { layers: layer..layer + 1, again }),
                    }
                }
                segments
            }
        }
    }

    /// Operators whose results no layer keeps.
    pub fn recompute(&self) -> Recompute {
        match self {
            Checkpointing::Selective(recompute) => *recompute,
            _ => Recompute::default(),
        }
    }

    /// Whether there are segments of which only the input is kept, which may wait elsewhere.
    pub fn keeps_inputs(&self) -> bool {
        !matches!(self, Checkpointing::None | Checkpointing::Selective(_))
    }

    /// # Errors
    /// [`Error::Checkpointing`] for a layer that a model of so many does not have.
    pub fn check(&self, num_layers: usize) -> Result<()> {
        match self {
            Checkpointing::Layers(layers) if layers.iter().any(|&layer| layer >= num_layers) => {
                let rule = format!("layers from 0 to {}, which the model has", num_layers.saturating_sub(1));
                Err(Error::Checkpointing { value: self.to_string(), rule })
            }
            _ => Ok(()),
        }
    }
}

/// Operators that a selective policy may name.
const OPERATORS: [(&str, Recompute); 2] =
    [("norm", Recompute { norms: true, gates: false }), ("glu", Recompute { norms: false, gates: true })];

fn operator(recompute: Recompute, name: &str) -> Option<Recompute> {
    let (_, named) = OPERATORS.into_iter().find(|(known, _)| *known == name)?;
    Some(Recompute { norms: recompute.norms | named.norms, gates: recompute.gates | named.gates })
}

/// `none`, `every:N`, `sqrt`, `layers:A,B,..`, `selective` or `selective:norm`, `selective:glu`.
impl fmt::Display for Checkpointing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Checkpointing::None => f.write_str("none"),
            Checkpointing::Every(length) => write!(f, "every:{length}"),
            Checkpointing::Sqrt => f.write_str("sqrt"),
            Checkpointing::Layers(layers) => {
                let names: Vec<String> = layers.iter().map(ToString::to_string).collect();
                write!(f, "layers:{}", names.join(","))
            }
            Checkpointing::Selective(Recompute { norms: true, gates: true }) => f.write_str("selective"),
            Checkpointing::Selective(Recompute { norms: true, gates: false }) => f.write_str("selective:norm"),
            Checkpointing::Selective(Recompute { norms: false, gates: true }) => f.write_str("selective:glu"),
            Checkpointing::Selective(Recompute { norms: false, gates: false }) => f.write_str("none"),
        }
    }
}

impl FromStr for Checkpointing {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidConfig`] for anything else than [`Checkpointing`]'s text form.
    fn from_str(text: &str) -> Result<Self, Error> {
        let (kind, rest) = text.split_once(':').map_or((text, None), |(kind, rest)| (kind, Some(rest)));
        let parsed = match (kind, rest) {
            ("none", None) => Some(Checkpointing::None),
            ("sqrt", None) => Some(Checkpointing::Sqrt),
            ("selective", None) => Some(Checkpointing::SELECTIVE),
            ("every", Some(count)) => count.parse().ok().filter(|&length: &usize| length > 0).map(Checkpointing::Every),
            ("layers", Some(list)) => {
                let layers: Result<Vec<usize>, _> = list.split(',').map(|layer| layer.trim().parse()).collect();
                layers.ok().map(|mut layers| {
                    layers.sort_unstable();
                    layers.dedup();
                    Checkpointing::Layers(layers)
                })
            }
            ("selective", Some(list)) => {
                list.split(',').try_fold(Recompute::default(), operator).map(Checkpointing::Selective)
            }
            _ => None,
        };
        let rule = "none, every:N with N at least 1, sqrt, layers:A,B,.., selective or selective:norm,glu";
        parsed.map_or_else(|| invalid("checkpointing", text, rule), Ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policies() -> Vec<Checkpointing> {
        let texts = ["none", "every:1", "every:7", "sqrt", "layers:0", "layers:2,3,39", "selective"];
        let selective = ["selective:norm", "selective:glu"];
        texts.into_iter().chain(selective).map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn segments_cover_all_layers_once() {
        for policy in policies() {
            for num_layers in 0..40 {
                let layers: Vec<usize> =
                    policy.segments(num_layers).into_iter().flat_map(|segment| segment.layers).collect();
                assert_eq!(layers, (0..num_layers).collect::<Vec<_>>(), "{policy}");
            }
        }
    }

    #[test]
    fn segment_lengths() {
        let segments = |text: &str, num_layers| -> Vec<(usize, bool)> {
            let policy: Checkpointing = text.parse().unwrap();
            policy.segments(num_layers).iter().map(|segment| (segment.layers.len(), segment.again)).collect()
        };
        assert_eq!(segments("none", 5), [(5, false)]);
        assert_eq!(segments("selective", 5), [(5, false)]);
        assert_eq!(segments("every:2", 5), [(2, true), (2, true), (1, true)]);
        assert_eq!(segments(&format!("every:{}", usize::MAX), 3), [(3, true)]);
        assert_eq!(segments("sqrt", 9), [(3, true), (3, true), (3, false)]);
        assert_eq!(segments("sqrt", 10), [(4, true), (4, true), (2, false)]);
        assert_eq!(segments("sqrt", 1), [(1, false)]);
        assert_eq!(segments("layers:4,2,3,2", 8), [(2, false), (1, true), (1, true), (1, true), (3, false)]);
        assert_eq!(segments("layers:0", 1), [(1, true)]);
    }

    #[test]
    fn text_form_round_trips() {
        for policy in policies() {
            assert_eq!(policy.to_string().parse::<Checkpointing>().unwrap(), policy);
        }
        assert_eq!("selective:glu,norm".parse::<Checkpointing>().unwrap(), Checkpointing::SELECTIVE);
        assert_eq!("layers: 3,1 ,3".parse::<Checkpointing>().unwrap().to_string(), "layers:1,3");
    }

    #[test]
    fn a_layer_that_is_not_there_is_refused() {
        let policy: Checkpointing = "layers:0,4".parse().unwrap();
        policy.check(5).unwrap();
        let message = policy.check(4).unwrap_err().to_string();
        assert_eq!(message, "checkpointing = layers:0,4, must be layers from 0 to 3, which the model has");
    }

    #[test]
    fn rejects_unknown_policies() {
        let texts = [
            "",
            "every",
            "every:",
            "every:0",
            "every:-1",
            "every:x",
            "Sqrt",
            "sqrt:2",
            "none:",
            "layers",
            "layers:",
            "layers:1,,2",
            "layers:-1",
            "selective:",
            "selective:attention",
            "auto",
        ];
        for text in texts {
            let message = text.parse::<Checkpointing>().unwrap_err().to_string();
            assert!(message.starts_with(&format!("checkpointing = {text}, must be none")), "{message}");
        }
    }
}
