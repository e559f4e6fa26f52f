//! Tensors into a safetensors file.

use std::{borrow::Cow, cell::RefCell, collections::HashMap, io, path::Path};

use safetensors::SafeTensorError;
use unsloth_core::{DType, Shape, Tensor, ops::elementwise};

use crate::{Error, Result, atomic};

/// A tensor on its way into a file.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) shape: Shape,
    /// Type to store it in: its own, or another float type, rounded to nearest even.
    pub(crate) dtype: DType,
    /// Asked for the tensor when its turn comes.
    pub(crate) tensor: Box<dyn Fn() -> unsloth_core::Result<Tensor>>,
}

impl Entry {
    /// A tensor that is there already.
    pub(crate) fn of(name: String, tensor: Tensor, dtype: DType) -> Self {
        Self { name, shape: *tensor.shape(), dtype, tensor: Box::new(move || Ok(tensor.clone())) }
    }
}

/// Writes a file that is replaced whole or not at all. Each tensor is copied to the host when its turn comes.
///
/// # Errors
/// [`Error::Io`]; [`unsloth_core::Error::Launch`] if the device failed.
pub(crate) fn write(path: &Path, entries: Vec<Entry>) -> Result<()> {
    let failure = RefCell::new(None);
    let view = |mut entry: Entry| (std::mem::take(&mut entry.name), View { entry, failure: &failure });
    let views = entries.into_iter().map(view);
    // transformers refuses a file that does not say which framework's conventions it follows.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let written = atomic::replace(path, |partial| {
        safetensors::serialize_to_file(views, Some(metadata), partial).map_err(|error| match error {
            SafeTensorError::IoError(error) => error,
            other => io::Error::other(other),
        })?;
        // A file with a gap must not take the old one's place.
        if failure.borrow().is_some() { Err(io::Error::other("a tensor could not be read")) } else { Ok(()) }
    });
    match failure.into_inner() {
        Some(error) => Err(Error::Core(error)),
        None => written,
    }
}

/// A tensor that is read when it is written.
struct View<'a> {
    entry: Entry,
    /// The first failure to read one; the interface has no place for it.
    failure: &'a RefCell<Option<unsloth_core::Error>>,
}

impl safetensors::View for View<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        match self.entry.dtype {
            DType::F16 => safetensors::Dtype::F16,
            DType::BF16 => safetensors::Dtype::BF16,
            DType::I32 => safetensors::Dtype::I32,
            _ => safetensors::Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.entry.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let Entry { dtype, tensor, .. } = &self.entry;
        let in_type = |tensor: Tensor| match tensor.dtype() == *dtype {
            true => tensor.to_bytes(),
            false => elementwise::cast(&tensor, *dtype)?.to_bytes(),
        };
        tensor().and_then(in_type).map_or_else(
            |error| {
                self.failure.borrow_mut().get_or_insert(error);
                vec![0; self.data_len()].into()
            },
            Cow::from,
        )
    }

    fn data_len(&self) -> usize {
        self.entry.shape.num_elements() * self.entry.dtype.size_bytes()
    }
}
