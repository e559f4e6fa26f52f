//! From a source of weights to the matrices and vectors of a model.

use std::cell::RefCell;

use unsloth_autograd::{Matrix, Parameter, Vector};
use unsloth_core::{Category, DType, Device, Shape, Tensor, ops::elementwise};
use unsloth_train::{Linear, Precision};

use crate::{
    Result,
    decoder::LoadOptions,
    weights::{Wanted, WeightSource},
};

/// A weight that is a parameter.
pub(crate) struct TrainedWeight {
    /// Named as in the checkpoint.
    pub(crate) parameter: Parameter,
    /// Type that its source has it in.
    pub(crate) stored: DType,
}

/// Takes the weights of a model from where they come from, each once.
pub(crate) struct Loader<'a> {
    source: &'a dyn WeightSource,
    device: &'a Device,
    options: LoadOptions,
    trained: RefCell<Vec<TrainedWeight>>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(source: &'a dyn WeightSource, device: &'a Device, options: LoadOptions) -> Self {
        Self { source, device, options, trained: RefCell::default() }
    }

    /// The weights taken so far that are to be trained, in the order in which they were taken.
    pub(crate) fn into_trained(self) -> Vec<TrainedWeight> {
        self.trained.into_inner()
    }

    pub(crate) fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix> {
        if self.options.trainable {
            let Precision { storage, master, .. } = self.options.precision;
            return Ok(Matrix::Trainable(self.parameter(name, shape.into(), (master, storage))?));
        }
        let wanted = Wanted { name, shape: shape.into(), dtype: self.frozen_dtype(name)?, category: Category::Weights };
        let tensor = self.source.tensor(self.device, &wanted)?;
        Ok(Matrix::Frozen(self.device.prepare_weight(tensor)?))
    }

    pub(crate) fn vector(&self, name: &str, length: usize) -> Result<Vector> {
        if self.options.trainable {
            return Ok(Vector::Trainable(self.parameter(name, [length].into(), (DType::F32, DType::F32))?));
        }
        let wanted =
            Wanted { name, shape: [length].into(), dtype: self.frozen_dtype(name)?, category: Category::Weights };
        Ok(Vector::Frozen(self.source.tensor(self.device, &wanted)?))
    }

    pub(crate) fn linear(&self, path: &str, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let weight = self.matrix(&format!("{path}.weight"), shape)?;
        let bias = bias.then(|| self.vector(&format!("{path}.bias"), shape[0])).transpose()?;
        Ok(Linear::new(path, weight, bias))
    }

    /// A copy in the type `master` that operators read in the type `storage`.
    fn parameter(&self, name: &str, shape: Shape, (master, storage): (DType, DType)) -> Result<Parameter> {
        let stored = self.source.stored_dtype(name)?;
        let wanted = Wanted { name, shape, dtype: master, category: Category::Weights };
        let parameter = Parameter::stored_as(name, self.source.tensor_copy(self.device, &wanted)?, storage);
        self.trained.borrow_mut().push(TrainedWeight { parameter: parameter.clone(), stored });
        Ok(parameter)
    }

    /// Under f32 activations weights stay as they are stored: sums are f32 either way, so widening them would change no
    /// product and cost a second copy.
    fn frozen_dtype(&self, name: &str) -> Result<DType> {
        let stored = self.source.stored_dtype(name)?;
        let Precision { storage, compute, .. } = self.options.precision;
        let keep = compute == DType::F32 && self.device.supports(stored);
        Ok(if keep { stored } else { storage })
    }
}

/// A parameter that begins as what `start` makes of an f32 copy of this matrix.
pub(crate) fn trained_matrix(
    name: &str,
    matrix: &Matrix,
    start: impl FnOnce(Tensor) -> Result<Tensor>,
) -> Result<Parameter> {
    Ok(Parameter::new(name, start(f32_copy(&matrix.weight()?.to_dense()?)?)?))
}

/// The same of a vector.
pub(crate) fn trained_vector(
    name: &str,
    vector: &Vector,
    start: impl FnOnce(Tensor) -> Result<Tensor>,
) -> Result<Parameter> {
    Ok(Parameter::new(name, start(f32_copy(&vector.tensor())?)?))
}

/// A cast to the same type would share the buffer, which may be read-only.
fn f32_copy(tensor: &Tensor) -> Result<Tensor> {
    let copy =
        if tensor.dtype() == DType::F32 { elementwise::copy(tensor)? } else { elementwise::cast(tensor, DType::F32)? };
    copy.retag(Category::Weights);
    Ok(copy)
}
