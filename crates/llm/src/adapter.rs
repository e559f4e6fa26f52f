//! What of a model an adapter trains, as PEFT's `LoraConfig` says it.

use std::{fmt, str::FromStr};

use regex::Regex;
use unsloth_train::{Linear, LoraConfig};

use crate::{Error, Result, decoder::Targets};

/// Low-rank adapters of some linear layers, and what is trained beside them.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Rank, scale and the rest, where no pattern says otherwise.
    pub lora: LoraConfig,
    /// Layers that have adapters.
    pub targets: Targets,
    /// Of those, the ones in these decoder layers, counted from 0. `None`: all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Other ranks of layers whose module path a pattern matches: of several, the first counts.
    pub rank_pattern: Vec<(Pattern, usize)>,
    /// Other scale numerators, likewise.
    pub alpha_pattern: Vec<(Pattern, f32)>,
    /// What is trained whole.
    pub modules_to_save: Vec<SavedModule>,
    /// Biases that are trained.
    pub bias: BiasTraining,
}

impl AdapterConfig {
    /// Adapters of one kind on these layers, and nothing trained beside them.
    pub fn new(lora: LoraConfig, targets: Targets) -> Self {
        Self {
            lora,
            targets,
            layers_to_transform: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            bias: BiasTraining::None,
        }
    }

    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// As [`LoraConfig::validate`] for every rank and alpha that occurs.
    pub fn validate(&self) -> Result<()> {
        self.lora.validate()?;
        self.rank_pattern.iter().try_for_each(|&(_, rank)| LoraConfig { rank, ..self.lora }.validate())?;
        self.alpha_pattern.iter().try_for_each(|&(_, alpha)| LoraConfig { alpha, ..self.lora }.validate())?;
        Ok(())
    }

    /// The adapter of the layer with this module path.
    pub fn of_layer(&self, path: &str) -> LoraConfig {
        fn first<T: Copy>(patterns: &[(Pattern, T)], path: &str) -> Option<T> {
            patterns.iter().find(|(pattern, _)| pattern.matches(path)).map(|&(_, value)| value)
        }
        LoraConfig {
            rank: first(&self.rank_pattern, path).unwrap_or(self.lora.rank),
            alpha: first(&self.alpha_pattern, path).unwrap_or(self.lora.alpha),
            ..self.lora
        }
    }

    /// Whether the decoder layer that this module path lies in is among [`AdapterConfig::layers_to_transform`].
    pub(crate) fn is_transformed(&self, path: &str) -> bool {
        let index = path.split('.').find_map(|part| part.parse::<usize>().ok());
        self.layers_to_transform.as_ref().is_none_or(|layers| index.is_some_and(|index| layers.contains(&index)))
    }

    /// Whether the bias of a layer is trained.
    pub(crate) fn trains_bias(&self, linear: &Linear, is_adapted: bool) -> bool {
        let is_wanted = match self.bias {
            BiasTraining::None => false,
            BiasTraining::All => true,
            BiasTraining::LoraOnly => is_adapted,
        };
        is_wanted && linear.bias.is_some()
    }
}

/// A regular expression that means a module path: all of it, or its last parts from a dot on.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    whole: Regex,
}

impl Pattern {
    /// Whether it means this module path.
    pub fn matches(&self, path: &str) -> bool {
        self.whole.is_match(path)
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Pattern {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidOption`] for what is no regular expression, or one that looks around or back.
    fn from_str(text: &str) -> Result<Self> {
        match Regex::new(&format!(r"^(?:.*\.)?(?:{text})$")) {
            Ok(whole) => Ok(Self { text: text.to_owned(), whole }),
            Err(error) => {
                let reason = error.to_string();
                let reason = reason.lines().next_back().unwrap_or_default().trim_start_matches("error: ").to_owned();
                let rule = format!("a regular expression without look-around ({reason})");
                Err(Error::InvalidOption { field: "pattern", value: format!("`{text}`"), rule })
            }
        }
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// A part of a model that is trained whole beside an adapter, from a copy of its own: a head that was tied to the embedding
/// table no longer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SavedModule {
    /// The embedding table.
    Embedding,
    /// The head.
    Head,
}

impl SavedModule {
    /// Both.
    pub const ALL: [SavedModule; 2] = [SavedModule::Embedding, SavedModule::Head];

    /// Name of its parameter in a checkpoint.
    pub fn parameter(self) -> &'static str {
        match self {
            SavedModule::Embedding => "model.embed_tokens.weight",
            SavedModule::Head => "lm_head.weight",
        }
    }
}

/// `embed_tokens` or `lm_head`.
impl fmt::Display for SavedModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SavedModule::Embedding => "embed_tokens",
            SavedModule::Head => "lm_head",
        })
    }
}

impl FromStr for SavedModule {
    type Err = Error;

    /// The last parts of a module path, as PEFT takes it.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for another module.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "embed_tokens" | "model.embed_tokens" => Ok(SavedModule::Embedding),
            "lm_head" => Ok(SavedModule::Head),
            _ => {
                let rule = "embed_tokens or lm_head".to_owned();
                Err(Error::InvalidOption { field: "modules_to_save", value: format!("`{text}`"), rule })
            }
        }
    }
}

/// Which biases of the model are trained beside an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BiasTraining {
    /// None of them.
    #[default]
    None,
    /// Those of all linear layers that have one.
    All,
    /// Those of the layers that have adapters.
    LoraOnly,
}

/// `none`, `all` or `lora_only`.
impl fmt::Display for BiasTraining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BiasTraining::None => "none",
            BiasTraining::All => "all",
            BiasTraining::LoraOnly => "lora_only",
        })
    }
}

impl FromStr for BiasTraining {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidOption`] for another name.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "none" => Ok(BiasTraining::None),
            "all" => Ok(BiasTraining::All),
            "lora_only" => Ok(BiasTraining::LoraOnly),
            _ => {
                let rule = "none, all or lora_only".to_owned();
                Err(Error::InvalidOption { field: "bias", value: text.to_owned(), rule })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap()
    }

    /// `re.match(rf"(.*\.)?({key})$", path)` of PEFT.
    #[test]
    fn patterns_mean_the_end_of_a_path() {
        let path = "model.layers.11.self_attn.q_proj";
        for text in ["q_proj", "self_attn.q_proj", "layers.11.self_attn.q_proj", ".*q_proj", "k_proj|q_proj", path] {
            assert!(pattern(text).matches(path), "{text}");
        }
        for text in ["proj", "q_pro", "layers.1.self_attn.q_proj", "q_proj.", "x|y", "model"] {
            assert!(!pattern(text).matches(path), "{text}");
        }
        let message = "(?!x)q_proj".parse::<Pattern>().unwrap_err().to_string();
        assert!(message.starts_with("pattern = `(?!x)q_proj`, must be a regular expression"), "{message}");
    }

    #[test]
    fn the_first_pattern_counts() {
        let mut config = AdapterConfig::new(LoraConfig::new(8, 16.0), Targets::AllLinear);
        config.rank_pattern = vec![(pattern("layers.0.*"), 2), (pattern("q_proj"), 4)];
        config.alpha_pattern = vec![(pattern("q_proj"), 3.0)];
        let of = |path: &str| {
            let LoraConfig { rank, alpha, .. } = config.of_layer(path);
            (rank, alpha)
        };
        assert_eq!(of("model.layers.0.self_attn.q_proj"), (2, 3.0));
        assert_eq!(of("model.layers.1.self_attn.q_proj"), (4, 3.0));
        assert_eq!(of("model.layers.1.self_attn.k_proj"), (8, 16.0));
    }

    #[test]
    fn names_round_trip() {
        for bias in [BiasTraining::None, BiasTraining::All, BiasTraining::LoraOnly] {
            assert_eq!(bias.to_string().parse::<BiasTraining>().unwrap(), bias);
        }
        for module in SavedModule::ALL {
            assert_eq!(module.to_string().parse::<SavedModule>().unwrap(), module);
        }
        assert!("norm".parse::<SavedModule>().unwrap_err().to_string().starts_with("modules_to_save = `norm`"));
        assert!("some".parse::<BiasTraining>().unwrap_err().to_string().starts_with("bias = some"));
    }
}
