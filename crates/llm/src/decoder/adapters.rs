//! Adapters of a decoder, and what is trained whole beside them.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use unsloth_autograd::{Matrix, Parameter, Vector};
use unsloth_core::{DType, Tensor, ops::elementwise};
use unsloth_train::{Linear, LoraConfig, LoraInit};

use super::{Decoder, Targets};
use crate::{
    Error, Result,
    adapter::{AdapterConfig, BiasTraining, SavedModule},
    layer::Layer,
    loader::{trained_matrix, trained_vector},
};

/// What adapters change of a model; cheap to keep, since what they do not change is shared.
pub(super) struct Parts {
    layers: Arc<Vec<Layer>>,
    embedding: Matrix,
    head: Matrix,
}

/// Adapters taken off a model, with what is trained beside them.
pub struct AdapterSet {
    parts: Parts,
    config: AdapterConfig,
    beside: Vec<Parameter>,
    /// The model that they belong to.
    model: u64,
}

impl AdapterSet {
    /// What they were made by.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }
}

/// A number of its own for each model of the process.
pub(super) fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Decoder {
    /// Takes the adapters off, with all that is trained beside them; the model is as it was before it got them. Put back by
    /// [`Decoder::put_adapters`], so that one model can have many and use one at a time.
    pub fn take_adapters(&mut self) -> Option<AdapterSet> {
        let (base, config) = (self.base.take()?, self.adapters.take()?);
        let (parts, beside) = (self.exchange(base), std::mem::take(&mut self.beside));
        Some(AdapterSet { parts, config, beside, model: self.id })
    }

    /// Puts adapters back that were taken off this model.
    ///
    /// # Errors
    /// [`unsloth_train::Error::AdapterExists`] on a model that has some; [`Error::InvalidOption`] for those of another model.
    pub fn put_adapters(&mut self, adapters: AdapterSet) -> Result<()> {
        self.require_none()?;
        if adapters.model != self.id {
            let (value, rule) = ("of another model".to_owned(), "taken off this model".to_owned());
            return Err(Error::InvalidOption { field: "adapters", value, rule });
        }
        self.base = Some(self.exchange(adapters.parts));
        (self.adapters, self.beside) = (Some(adapters.config), adapters.beside);
        Ok(())
    }

    fn exchange(&mut self, parts: Parts) -> Parts {
        Parts {
            layers: std::mem::replace(&mut self.layers, parts.layers),
            embedding: std::mem::replace(&mut self.embedding, parts.embedding),
            head: std::mem::replace(&mut self.head, parts.head),
        }
    }

    fn require_none(&self) -> Result<()> {
        match self.linears().find(|linear| linear.adapter.is_some()) {
            Some(linear) => Err(unsloth_train::Error::AdapterExists { layer: linear.name.clone() }.into()),
            None => Ok(()),
        }
    }

    /// Adds adapters that change nothing yet, and makes what is trained beside them trainable, as f32 copies. The initial `A` of
    /// a layer depends on `seed` and the layer alone, not on which others are targeted. If it fails, nothing has been changed.
    ///
    /// # Errors
    /// [`Error::UnknownTarget`], [`Error::HeadTarget`]; [`Error::InvalidOption`] for a layer that the model does not have, a
    /// pattern that means no adapted layer, or adapters on a model whose weights are trained beside what is to be;
    /// [`unsloth_train::Error::AdapterExists`] on a model that has adapters; otherwise as [`AdapterConfig::validate`] and
    /// [`Linear::add_adapter`].
    pub fn add_adapters(&mut self, config: &AdapterConfig, seed: u64) -> Result<()> {
        config.validate()?;
        let selected = self.select(config)?;
        self.check_patterns(config, &selected)?;
        let make = |linear: &mut Linear, lora: LoraConfig, index| Ok(linear.add_adapter(&lora, seed, index)?);
        self.adapt(config, &selected, (make, |_: &str, _, present| Ok(present)), || Ok(()))
    }

    /// Gives the selected layers what `make` makes of them, and trains what is trained beside them, from what `start` makes of
    /// its name, whether it belongs to an adapted layer, and an f32 copy of its present value. If that or `is_good` at the end
    /// fails, nothing has been changed.
    pub(crate) fn adapt(
        &mut self,
        config: &AdapterConfig,
        selected: &[bool],
        (make, start): (
            impl Fn(&mut Linear, LoraConfig, u32) -> Result<()>,
            impl Fn(&str, bool, Tensor) -> Result<Tensor>,
        ),
        is_good: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.require_none()?;
        let trains_whole = !config.modules_to_save.is_empty() || config.bias != BiasTraining::None;
        if trains_whole && !self.trained.is_empty() {
            let (value, rule) = ("weights that are trained already".to_owned(), "used on a frozen model".to_owned());
            return Err(Error::InvalidOption { field: "modules_to_save, bias", value, rule });
        }
        let mut beside = Vec::new();
        // On clones, so that what only some layers refuse leaves the model as it was.
        let mut layers = self.layers.as_ref().clone();
        let linears = layers.iter_mut().flat_map(Layer::linears_mut).zip(selected);
        for (index, (linear, &is_adapted)) in (0u32..).zip(linears) {
            if is_adapted {
                let lora = config.of_layer(&linear.name);
                self.widen_for(linear, &lora)?;
                make(linear, lora, index)?;
            }
            if config.trains_bias(linear, is_adapted)
                && let Some(bias) = linear.bias.take()
            {
                let name = format!("{}.bias", linear.name);
                let parameter = trained_vector(&name, &bias, |value| start(&name, is_adapted, value))?;
                beside.push(parameter.clone());
                linear.bias = Some(Vector::Trainable(parameter));
            }
        }
        let (mut embedding, mut head) = (self.embedding.clone(), self.head.clone());
        for &module in &config.modules_to_save {
            let matrix = match module {
                SavedModule::Embedding => &mut embedding,
                SavedModule::Head => &mut head,
            };
            let name = module.parameter();
            let parameter = trained_matrix(name, matrix, |value| start(name, false, value))?;
            beside.push(parameter.clone());
            *matrix = Matrix::Trainable(parameter);
        }
        is_good()?;
        self.base = Some(self.exchange(Parts { layers: Arc::new(layers), embedding, head }));
        (self.adapters, self.beside) = (Some(config.clone()), beside);
        Ok(())
    }

    /// Under f32 activations a weight that was stored in 16 bits loses none of what is left when its principal part is taken out;
    /// under others it is rounded to their type, as everything is.
    fn widen_for(&self, linear: &mut Linear, lora: &LoraConfig) -> Result<()> {
        if let (LoraInit::Pissa { .. }, DType::F32, Matrix::Frozen(weight)) = (lora.init, self.dtype, &linear.weight)
            && weight.dtype() != DType::F32
        {
            let wide = elementwise::cast(&weight.to_dense()?, DType::F32)?;
            linear.weight = Matrix::Frozen(self.device.prepare_weight(wide)?);
        }
        Ok(())
    }

    /// What the adapters were made by, if there are any.
    pub fn adapters(&self) -> Option<&AdapterConfig> {
        self.adapters.as_ref()
    }

    /// What is trained whole beside the adapters.
    pub(crate) fn beside(&self) -> &[Parameter] {
        &self.beside
    }

    /// Changes the share of the adapters' input that is zero in training.
    ///
    /// # Errors
    /// [`unsloth_train::Error::InvalidConfig`] for a share outside `[0, 1)`; nothing has been changed then.
    pub fn set_dropout(&mut self, dropout: f32) -> Result<()> {
        LoraConfig { dropout, ..LoraConfig::new(1, 1.0) }.validate()?;
        for adapter in self.linears_mut().filter_map(|linear| linear.adapter.as_mut()) {
            adapter.config.dropout = dropout;
        }
        if let Some(config) = &mut self.adapters {
            config.lora.dropout = dropout;
        }
        Ok(())
    }

    /// For each of [`Decoder::linears`], whether it is to have an adapter.
    pub(crate) fn select(&self, config: &AdapterConfig) -> Result<Vec<bool>> {
        let num_layers = self.layers.len();
        if let Some(index) = config.layers_to_transform.iter().flatten().find(|&&index| index >= num_layers) {
            let rule = format!("layers from 0 to {}", num_layers - 1);
            return Err(Error::InvalidOption { field: "layers_to_transform", value: index.to_string(), rule });
        }
        let mut selected = self.named(&config.targets)?;
        for (selected, linear) in selected.iter_mut().zip(self.linears()) {
            *selected &= config.is_transformed(&linear.name);
        }
        Ok(selected)
    }

    /// For each of [`Decoder::linears`], whether it is among the targets.
    fn named(&self, targets: &Targets) -> Result<Vec<bool>> {
        let paths: Vec<&str> = self.linears().map(|linear| linear.name.as_str()).collect();
        let Targets::Names(names) = targets else {
            return Ok(vec![true; paths.len()]);
        };
        if let Some(name) = names.iter().find(|name| !paths.iter().any(|path| matches(path, name))) {
            if matches("lm_head", name) {
                return Err(Error::HeadTarget { name: name.clone() });
            }
            let mut available: Vec<&str> = paths.iter().filter_map(|path| path.rsplit('.').next()).collect();
            available.sort_unstable();
            available.dedup();
            return Err(Error::UnknownTarget { name: name.clone(), available: available.join(", ") });
        }
        Ok(paths.iter().map(|path| names.iter().any(|name| matches(path, name))).collect())
    }

    /// A pattern that means no layer is a typing error; PEFT passes over it.
    fn check_patterns(&self, config: &AdapterConfig, selected: &[bool]) -> Result<()> {
        let ranks = config.rank_pattern.iter().map(|(pattern, _)| ("rank_pattern", pattern));
        let alphas = config.alpha_pattern.iter().map(|(pattern, _)| ("alpha_pattern", pattern));
        for (field, pattern) in ranks.chain(alphas) {
            let mut adapted = self.linears().zip(selected).filter(|(_, selected)| **selected);
            if !adapted.any(|(linear, _)| pattern.matches(&linear.name)) {
                let (value, rule) =
                    (format!("`{}`", pattern.as_str()), "a pattern of a layer with an adapter".to_owned());
                return Err(Error::InvalidOption { field, value, rule });
            }
        }
        Ok(())
    }
}

/// Whether a target name means a module path: all of it, or its last parts.
fn matches(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}
