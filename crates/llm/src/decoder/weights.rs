//! The weights of a decoder by their names.

use unsloth_train::Named;

use super::Decoder;
use crate::adapter::SavedModule;

impl Decoder {
    /// Every weight that operators read, under its name in checkpoints; those of adapters under PEFT's.
    pub fn named_weights(&self) -> Vec<(String, Named)> {
        let table = (SavedModule::Embedding.parameter().to_owned(), Named::Matrix(self.embedding.clone()));
        let head = (SavedModule::Head.parameter().to_owned(), Named::Matrix(self.head.clone()));
        let norm = ("model.norm.weight".to_owned(), Named::Vector(self.norm.clone()));
        // A tied head is the table, which stands first.
        let mut weights = vec![table, head, norm];
        for linear in self.linears() {
            weights.push((format!("{}.weight", linear.name), Named::Matrix(linear.weight.clone())));
            weights
                .extend(linear.bias.iter().map(|bias| (format!("{}.bias", linear.name), Named::Vector(bias.clone()))));
            let adapter = linear.adapter.iter().flat_map(|adapter| adapter.parameters());
            weights.extend(adapter.map(|parameter| (parameter.name().to_owned(), Named::Parameter(parameter))));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let name = |norm: &str| format!("model.layers.{index}.{norm}.weight");
            weights.extend(layer.norms().map(|(norm, weight)| (name(norm), Named::Vector(weight.clone()))));
        }
        weights
    }
}
