//! Packed documents on a device.

use unsloth_core::{Category, Device, Sequences, Tensor, ops::cross_entropy::IGNORE_INDEX};

use crate::{Draw, Error, Result};

/// One document on the host.
#[derive(Clone, Copy, Debug)]
pub struct Document<'a> {
    /// Token ids.
    pub ids: &'a [i32],
    /// Target of each position, shifted already: what should follow `ids[..= i]`, or
    /// [`IGNORE_INDEX`](unsloth_core::ops::cross_entropy::IGNORE_INDEX).
    pub targets: &'a [i32],
}

/// Documents packed one after another, none of which sees another.
#[derive(Clone, Debug)]
pub struct Batch {
    /// i32 `[tokens]`
    pub ids: Tensor,
    /// i32 `[tokens]`, shifted already.
    pub targets: Tensor,
    /// i32 `[tokens]`, from 0 in each document.
    pub positions: Tensor,
    /// Where documents begin and end.
    pub sequences: Sequences,
    /// Tokens that have a target.
    pub num_targets: usize,
    /// Where it stands in a run, which the trainer says. Without, as in an evaluation, nothing random is done to it.
    pub draw: Option<Draw>,
}

impl Batch {
    /// Packs documents. Ids and targets are checked against the vocabulary by the operators that use them.
    ///
    /// # Errors
    /// [`Error::TargetLength`] for a document with another number of targets than ids; [`Error::EmptyBatch`];
    /// [`unsloth_core::Error::OutOfMemory`].
    pub fn new(device: &Device, documents: &[Document<'_>]) -> Result<Self> {
        for (index, document) in documents.iter().enumerate() {
            let (num_ids, num_targets) = (document.ids.len(), document.targets.len());
            if num_ids != num_targets {
                return Err(Error::TargetLength { document: index, num_ids, num_targets });
            }
        }
        let lengths: Vec<usize> = documents.iter().map(|document| document.ids.len()).collect();
        let sequences = Sequences::from_lengths(device, &lengths)?;
        let tokens = sequences.num_tokens();
        if tokens == 0 {
            return Err(Error::EmptyBatch { num_documents: documents.len() });
        }
        let ids: Vec<i32> = documents.iter().flat_map(|document| document.ids).copied().collect();
        let targets: Vec<i32> = documents.iter().flat_map(|document| document.targets).copied().collect();
        let num_targets = targets.iter().filter(|&&target| target != IGNORE_INDEX).count();
        Ok(Self {
            ids: device.from_slice(&ids, [tokens], Category::Activations)?,
            targets: device.from_slice(&targets, [tokens], Category::Activations)?,
            positions: device.from_slice(&sequences.positions(), [tokens], Category::Activations)?,
            sequences,
            num_targets,
            draw: None,
        })
    }

    /// Tokens over all documents.
    pub fn num_tokens(&self) -> usize {
        self.sequences.num_tokens()
    }
}
