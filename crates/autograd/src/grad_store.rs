//! Gradients of parameters, kept from step to step.

use unsloth_core::{Category, DType, Result, Tensor, ops::elementwise};

use crate::{Parameter, ParameterId};

type Hook = Box<dyn FnMut(&Parameter, &mut Tensor) -> Result<()>>;

struct Entry {
    parameter: Parameter,
    gradient: Tensor,
}

/// One f32 gradient per registered parameter. [`crate::Tape::backward`] adds to them; nobody else's gradient is computed.
pub struct GradStore {
    /// In the order of ids.
    entries: Vec<Entry>,
    hooks: Vec<Hook>,
}

impl GradStore {
    /// Registers parameters and allocates their gradients, zero, as [`Category::Gradients`]. One given twice counts once.
    ///
    /// # Errors
    /// [`unsloth_core::Error::OutOfMemory`].
    pub fn new(parameters: &[Parameter]) -> Result<Self> {
        let mut parameters = parameters.to_vec();
        parameters.sort_by_key(Parameter::id);
        parameters.dedup_by_key(|parameter| parameter.id());
        let entry = |parameter: Parameter| {
            let value = parameter.value();
            let gradient = value.device().zeros(*value.shape(), DType::F32, Category::Gradients)?;
            Ok(Entry { parameter, gradient })
        };
        Ok(Self { entries: parameters.into_iter().map(entry).collect::<Result<_>>()?, hooks: Vec::new() })
    }

    /// The gradient of a registered parameter: f32, of the parameter's shape.
    pub fn get(&self, parameter: &Parameter) -> Option<&Tensor> {
        self.slot(parameter.id()).map(|slot| &self.entries[slot].gradient)
    }

    /// All gradients, in the order of [`Parameter::id`].
    pub fn tensors(&self) -> Vec<&Tensor> {
        self.entries.iter().map(|entry| &entry.gradient).collect()
    }

    /// The registered parameters, in the order of [`GradStore::tensors`].
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.entries.iter().map(|entry| &entry.parameter)
    }

    /// Sets all gradients to zero, in place.
    ///
    /// # Errors
    /// [`unsloth_core::Error::Shared`] if a gradient's buffer was cloned and is still alive.
    pub fn zero(&mut self) -> Result<()> {
        self.entries.iter_mut().try_for_each(|entry| elementwise::fill_zero(&mut entry.gradient))
    }

    /// Adds a hook, called in every backward pass once for each registered parameter that an operator on the tape used, as
    /// soon as its gradient is complete: in the reverse order of the parameters' first uses, with and without checkpointing.
    /// Several hooks are called in the order in which they were added. A hook may update the parameter.
    pub fn on_ready(&mut self, hook: impl FnMut(&Parameter, &mut Tensor) -> Result<()> + 'static) {
        self.hooks.push(Box::new(hook));
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn slot(&self, id: ParameterId) -> Option<usize> {
        self.entries.binary_search_by_key(&id, |entry| entry.parameter.id()).ok()
    }

    pub(crate) fn get_mut(&mut self, parameter: &Parameter) -> Option<&mut Tensor> {
        self.slot(parameter.id()).map(|slot| &mut self.entries[slot].gradient)
    }

    /// The gradients of two parameters that are not the same.
    pub(crate) fn pair_mut(&mut self, a: &Parameter, b: &Parameter) -> (Option<&mut Tensor>, Option<&mut Tensor>) {
        match (self.slot(a.id()), self.slot(b.id())) {
            (Some(a), Some(b)) => match self.entries.get_disjoint_mut([a, b]) {
                Ok([a, b]) => (Some(&mut a.gradient), Some(&mut b.gradient)),
                Err(_) => panic!("gradients asked for as a pair must belong to two parameters"),
            },
            (Some(a), None) => (Some(&mut self.entries[a].gradient), None),
            (None, Some(b)) => (None, Some(&mut self.entries[b].gradient)),
            (None, None) => (None, None),
        }
    }

    pub(crate) fn ready(&mut self, slot: usize) -> Result<()> {
        let Entry { parameter, gradient } = &mut self.entries[slot];
        self.hooks.iter_mut().try_for_each(|hook| hook(parameter, gradient))
    }
}

impl std::fmt::Debug for GradStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GradStore({} parameters, {} hooks)", self.entries.len(), self.hooks.len())
    }
}
