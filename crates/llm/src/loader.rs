//! From a source of weights to the matrices and vectors of a model.

use unsloth_autograd::{Matrix, Vector};
use unsloth_core::{Category, DType, Device};
use unsloth_train::Linear;

use crate::{
    Result,
    weights::{Wanted, WeightSource},
};

/// Takes the weights of a model from where they come from.
pub(crate) struct Loader<'a> {
    pub(crate) source: &'a dyn WeightSource,
    pub(crate) device: &'a Device,
    /// Storage type of activations.
    pub(crate) dtype: DType,
}

impl Loader<'_> {
    pub(crate) fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix> {
        let dtype = self.weight_dtype(name)?;
        let wanted = Wanted { name, shape: shape.into(), dtype, category: Category::Weights };
        let tensor = self.source.tensor(self.device, &wanted)?;
        Ok(Matrix::Frozen(self.device.prepare_weight(tensor)?))
    }

    pub(crate) fn vector(&self, name: &str, length: usize) -> Result<Vector> {
        let dtype = self.weight_dtype(name)?;
        let wanted = Wanted { name, shape: [length].into(), dtype, category: Category::Weights };
        Ok(Vector::Frozen(self.source.tensor(self.device, &wanted)?))
    }

    pub(crate) fn linear(&self, path: &str, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let weight = self.matrix(&format!("{path}.weight"), shape)?;
        let bias = bias.then(|| self.vector(&format!("{path}.bias"), shape[0])).transpose()?;
        Ok(Linear::new(path, weight, bias))
    }

    /// Under f32 activations weights stay as they are stored: sums are f32 either way, so widening them would change no
    /// product and cost a second copy. Otherwise they get the type of the activations.
    fn weight_dtype(&self, name: &str) -> Result<DType> {
        let stored = self.source.stored_dtype(name)?;
        let keep = self.dtype == DType::F32 && self.device.supports(stored);
        Ok(if keep { stored } else { self.dtype })
    }
}
