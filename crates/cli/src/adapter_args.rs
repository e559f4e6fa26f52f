//! Options about adapters that `train` and `plan` share.

use clap::Args;
use unsloth_rs::{
    llm::{
        adapter::{BiasTraining, SavedModule},
        decoder::Targets,
    },
    recipe::{OneOrMany, TrainOptions},
    train::LoraInit,
};

/// The adapters, and what is trained beside them.
#[derive(Args)]
pub(crate) struct AdapterArgs {
    /// Inner dimension of the adapters [default: that of --adapter, else 16]
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// The adapters' update is multiplied by alpha / rank [default: that of --adapter, else 16]
    #[arg(long, value_name = "F")]
    alpha: Option<f64>,
    /// Share of the adapters' input that is set to zero in training [default: that of --adapter, else 0]
    #[arg(long, value_name = "F")]
    dropout: Option<f64>,
    /// Multiply the adapters' update by alpha / sqrt(rank) instead [default: as in --adapter]
    #[arg(long)]
    rslora: bool,
    /// Train the lengths of the rows of adapted weights apart from their directions (DoRA) [default: as in --adapter]
    #[arg(long)]
    dora: bool,
    /// What adapters are before training: kaiming (A random, B zero), gaussian (likewise), pissa or pissa_niter_N (the largest
    /// singular values of the weight, found exactly or by N iterations) [default: as in --adapter, else kaiming]
    #[arg(long, value_name = "KIND")]
    lora_init: Option<LoraInit>,
    /// all-linear, or names of the layers to adapt, such as q_proj,v_proj [default: those of --adapter, else all-linear]
    #[arg(long, value_name = "NAME,NAME,..")]
    targets: Option<Targets>,
    /// Adapt the targets in these decoder layers alone, counted from 0 [default: as in --adapter, else all]
    #[arg(long, value_name = "N,N,..", value_delimiter = ',')]
    layers_to_transform: Option<Vec<usize>>,
    /// Another rank for the layers that a regular expression means, such as 'layers.(0|1).*=8'; may be given several times, the
    /// first that matches counts
    #[arg(long, value_name = "PATTERN=N")]
    rank_pattern: Option<Vec<String>>,
    /// Another alpha for the layers that a regular expression means; likewise
    #[arg(long, value_name = "PATTERN=F")]
    alpha_pattern: Option<Vec<String>>,
    /// Train the embedding table (embed_tokens), the head (lm_head) or both whole, each as a copy of its own
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    modules_to_save: Option<Vec<SavedModule>>,
    /// Train biases: none, all, or lora_only (those of adapted layers) [default: as in --adapter, else none]
    #[arg(long, value_name = "KIND")]
    bias: Option<BiasTraining>,
}

impl AdapterArgs {
    /// Options with these alone.
    pub(crate) fn options(self) -> TrainOptions {
        let strings = |modules: Vec<SavedModule>| modules.iter().map(ToString::to_string).collect();
        TrainOptions {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            rslora: self.rslora.then_some(true),
            dora: self.dora.then_some(true),
            lora_init: self.lora_init.map(|init| init.to_string()),
            targets: self.targets.map(|targets| OneOrMany::One(targets.to_string())),
            layers_to_transform: self.layers_to_transform.map(OneOrMany::Many),
            rank_pattern: self.rank_pattern.map(OneOrMany::Many),
            alpha_pattern: self.alpha_pattern.map(OneOrMany::Many),
            modules_to_save: self.modules_to_save.map(|modules| OneOrMany::Many(strings(modules))),
            bias: self.bias.map(|bias| bias.to_string()),
            ..TrainOptions::default()
        }
    }
}
