//! Leaves that training changes, and the matrices and vectors of layers, trained or frozen.

use std::{
    fmt,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use unsloth_core::{BufferId, DType, Device, Result, Tensor, Weight, ops::elementwise};

/// Identity of a [`Parameter`] within the process; ordered by creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParameterId(u64);

struct Inner {
    id: ParameterId,
    name: String,
    value: RwLock<Tensor>,
    /// Type that operators read a matrix in.
    storage: DType,
    /// The value in that type, made when it is first read behind a change.
    copy: RwLock<Option<Tensor>>,
}

/// A tensor that training changes. Clones are the same parameter.
#[derive(Clone)]
pub struct Parameter(Arc<Inner>);

impl Parameter {
    /// Makes a parameter; `name` is its path in the model, as in `model.norm.weight`.
    pub fn new(name: impl Into<String>, value: Tensor) -> Self {
        let storage = value.dtype();
        Self::stored_as(name, value, storage)
    }

    /// A parameter whose value is a master copy: where it is the matrix of an operator, that reads it rounded to `storage`.
    pub fn stored_as(name: impl Into<String>, value: Tensor, storage: DType) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = ParameterId(NEXT.fetch_add(1, Ordering::Relaxed));
        let (value, copy) = (RwLock::new(value), RwLock::new(None));
        Self(Arc::new(Inner { id, name: name.into(), value, storage, copy }))
    }

    /// Identity: equal for clones, different for all other parameters.
    pub fn id(&self) -> ParameterId {
        self.0.id
    }

    /// Path in the model.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The current value; shares the buffer, so drop it before the next [`Parameter::update`].
    pub fn value(&self) -> Tensor {
        // A panic in `update` leaves a valid tensor behind, so a poisoned lock carries no broken state.
        self.0.value.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The current value in the type that operators read it in; kept from use to use until the next [`Parameter::update`], in the
    /// memory category of the value.
    ///
    /// # Errors
    /// [`unsloth_core::Error::OutOfMemory`].
    pub fn stored(&self) -> Result<Tensor> {
        let value = self.value();
        if value.dtype() == self.0.storage {
            return Ok(value);
        }
        // Held while it is made, so that no update comes between.
        let mut copy = self.0.copy.write().unwrap_or_else(PoisonError::into_inner);
        match &*copy {
            Some(tensor) => Ok(tensor.clone()),
            None => Ok(copy.insert(elementwise::cast(&value, self.0.storage)?).clone()),
        }
    }

    /// Type that operators read a matrix in.
    pub fn storage(&self) -> DType {
        self.0.storage
    }

    /// Whether the value, or the copy that operators read, is in this buffer. A parameter that is being changed says no.
    pub fn has(&self, buffer: BufferId) -> bool {
        let value = self.0.value.try_read().is_ok_and(|value| value.buffer_id() == buffer);
        let copy =
            || self.0.copy.try_read().is_ok_and(|copy| copy.as_ref().is_some_and(|copy| copy.buffer_id() == buffer));
        value || copy()
    }

    /// Changes the value in place. `f` must not ask this parameter for its value: the lock is held.
    ///
    /// # Errors
    /// Those of `f`; [`unsloth_core::Error::Shared`] from operators that write in place while a tensor from
    /// [`Parameter::value`] is still alive.
    pub fn update<R>(&self, f: impl FnOnce(&mut Tensor) -> Result<R>) -> Result<R> {
        *self.0.copy.write().unwrap_or_else(PoisonError::into_inner) = None;
        f(&mut self.0.value.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// [`Parameter::update`] of several at once, in their order. Each may stand in the list once: its lock is held.
    ///
    /// # Errors
    /// As [`Parameter::update`].
    pub fn update_all<'a, R>(
        parameters: impl IntoIterator<Item = &'a Self>,
        f: impl FnOnce(Vec<&mut Tensor>) -> Result<R>,
    ) -> Result<R> {
        let lock = |parameter: &'a Self| {
            *parameter.0.copy.write().unwrap_or_else(PoisonError::into_inner) = None;
            parameter.0.value.write().unwrap_or_else(PoisonError::into_inner)
        };
        let mut values: Vec<_> = parameters.into_iter().map(lock).collect();
        f(values.iter_mut().map(|value| &mut **value).collect())
    }
}

impl fmt::Debug for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Parameter({}, {:?})", self.name(), self.value())
    }
}

/// The matrix of a linear layer or an embedding table, `[out_features, in_features]`.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// Trained: gets a gradient where it is registered in the [`crate::GradStore`].
    Trainable(Parameter),
    /// Not trained: no gradient, no cost.
    Frozen(Weight),
}

impl Matrix {
    /// The form that operators read; shares the buffer.
    ///
    /// # Errors
    /// [`unsloth_core::Error::Shape`] if a parameter does not have two dimensions.
    pub fn weight(&self) -> Result<Weight> {
        match self {
            Matrix::Trainable(parameter) => {
                let value = parameter.stored()?;
                value.device().clone().prepare_weight(value)
            }
            Matrix::Frozen(weight) => Ok(weight.clone()),
        }
    }

    /// The parameter, if the matrix is trained.
    pub fn parameter(&self) -> Option<&Parameter> {
        match self {
            Matrix::Trainable(parameter) => Some(parameter),
            Matrix::Frozen(_) => None,
        }
    }

    /// Whether what operators read is in this buffer.
    pub fn has(&self, buffer: BufferId) -> bool {
        match self {
            Matrix::Trainable(parameter) => parameter.has(buffer),
            Matrix::Frozen(weight) => matches!(weight, Weight::Dense(tensor) if tensor.buffer_id() == buffer),
        }
    }

    /// Storage type of the elements, or of what they dequantise to.
    pub fn dtype(&self) -> DType {
        match self {
            Matrix::Trainable(parameter) => parameter.storage(),
            Matrix::Frozen(weight) => weight.dtype(),
        }
    }

    /// Where the matrix lives.
    pub fn device(&self) -> Device {
        match self {
            Matrix::Trainable(parameter) => parameter.value().device().clone(),
            Matrix::Frozen(weight) => weight.device().clone(),
        }
    }
}

/// The weight of a norm or a bias, `[features]`.
#[derive(Clone, Debug)]
pub enum Vector {
    /// Trained: gets a gradient where it is registered in the [`crate::GradStore`].
    Trainable(Parameter),
    /// Not trained: no gradient, no cost.
    Frozen(Tensor),
}

impl Vector {
    /// The current value; shares the buffer.
    pub fn tensor(&self) -> Tensor {
        match self {
            Vector::Trainable(parameter) => parameter.value(),
            Vector::Frozen(tensor) => tensor.clone(),
        }
    }

    /// Whether the current value is in this buffer.
    pub fn has(&self, buffer: BufferId) -> bool {
        match self {
            Vector::Trainable(parameter) => parameter.has(buffer),
            Vector::Frozen(tensor) => tensor.buffer_id() == buffer,
        }
    }

    /// The parameter, if the vector is trained.
    pub fn parameter(&self) -> Option<&Parameter> {
        match self {
            Vector::Trainable(parameter) => Some(parameter),
            Vector::Frozen(_) => None,
        }
    }
}
