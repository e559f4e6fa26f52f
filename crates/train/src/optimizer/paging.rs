//! What an optimiser keeps, outside of the device's memory between steps.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use unsloth_core::{Category, DType, Error, Result, Shape, StoredTensor, Tensor, TensorStore};

use super::{Part, Slot};

/// Where what an optimiser keeps waits between steps.
#[derive(Clone)]
pub struct Paging {
    /// The place outside of the device's memory.
    pub store: Arc<dyn TensorStore>,
    /// Most bytes that a step brings to the device at a time, unless one parameter's alone are more. Besides, what was put last may not have
    /// left it.
    pub group_bytes: usize,
}

impl Paging {
    /// 64 MiB at a time: much against what a copy costs to begin, little against a device's memory.
    pub fn new(store: Arc<dyn TensorStore>) -> Self {
        Self { store, group_bytes: 64 << 20 }
    }

    /// Waits until nothing of it is on the device any more.
    pub(super) fn settle(&self) -> Result<()> {
        self.store.settle()
    }
}

/// A part that waits in a store.
pub(crate) struct Parked {
    pub(super) name: &'static str,
    shape: Shape,
    dtype: DType,
    store: Arc<dyn TensorStore>,
    /// `None` once it has been taken for good, or was lost when it could not be.
    stored: RefCell<Option<Box<dyn StoredTensor>>>,
}

impl Parked {
    fn new(part: &Part, store: &Arc<dyn TensorStore>) -> Result<Self> {
        let (shape, dtype) = (*part.tensor.shape(), part.tensor.dtype());
        let stored = RefCell::new(Some(store.put(&part.tensor)?));
        Ok(Self { name: part.name, shape, dtype, store: store.clone(), stored })
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    fn bytes(&self) -> usize {
        self.shape.num_elements() * self.dtype.size_bytes()
    }

    fn take(&self) -> Result<Tensor> {
        let missing = || Error::InvalidSpec {
            op: "optimizer",
            field: "state",
            value: self.name.to_owned(),
            rule: "in its store: a later step has taken it, or an earlier failure",
        };
        let tensor = self.stored.borrow_mut().take().ok_or_else(missing)?.take()?;
        tensor.retag(Category::Optimiser);
        Ok(tensor)
    }

    /// A copy on the device.
    pub(crate) fn read(&self) -> Result<Tensor> {
        let tensor = self.take()?;
        *self.stored.borrow_mut() = Some(self.store.put(&tensor)?);
        self.store.settle()?;
        Ok(tensor)
    }
}

impl Slot {
    /// Moves the parts out of the device's memory. They stay where they are if one cannot be put.
    pub(super) fn park(&mut self, store: &Arc<dyn TensorStore>) -> Result<()> {
        let park = |part: &Part| Ok(Rc::new(Parked::new(part, store)?));
        let parked = self.parts.iter().map(park).collect::<Result<Vec<_>>>()?;
        self.parked.extend(parked);
        self.parts.clear();
        Ok(())
    }

    /// Brings them back. If one does not come, every later call fails too.
    pub(super) fn bring(&mut self) -> Result<()> {
        let bring = |parked: &Rc<Parked>| Ok(Part { name: parked.name, tensor: parked.take()? });
        let parts = self.parked.iter().map(bring).collect::<Result<Vec<_>>>()?;
        self.parts.extend(parts);
        self.parked.clear();
        Ok(())
    }

    fn parked_bytes(&self) -> usize {
        self.parked.iter().map(|parked| parked.bytes()).sum()
    }
}

/// The slots whose parts are on the device together.
pub(super) fn groups(mut slots: &mut [Slot], group_bytes: usize) -> Vec<&mut [Slot]> {
    let mut groups = Vec::new();
    for count in runs(slots.iter().map(Slot::parked_bytes), group_bytes) {
        let (group, others) = std::mem::take(&mut slots).split_at_mut(count);
        groups.push(group);
        slots = others;
    }
    groups
}

/// Lengths of runs of items of these sizes, whose sum stays within a limit unless a single one is beyond it.
fn runs(sizes: impl IntoIterator<Item = usize>, limit: usize) -> Vec<usize> {
    let (mut runs, mut total) = (Vec::new(), 0usize);
    for size in sizes {
        match runs.last_mut() {
            Some(count) if total + size <= limit => (*count, total) = (*count + 1, total + size),
            _ => {
                runs.push(1);
                total = size;
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn groups_stay_within_the_limit() {
        assert_eq!(runs([3, 4, 3, 1, 12, 1, 9, 2], 10), [3, 1, 1, 2, 1]);
        assert_eq!(runs([0, 0, 0], 10), [3]);
        assert_eq!(runs([], 10), [0; 0]);
    }
}
