//! What the random numbers of training depend on: where an element stands in the run, never how a step is split.

use std::{ops::Range, sync::Arc};

use unsloth_core::{Category, Result, Tensor};

use crate::Batch;

/// Where a batch stands in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Of the run.
    pub seed: u64,
    /// Optimiser step, from 0.
    pub step: u32,
    /// Sequences of the step that stand before this batch.
    pub first_sequence: u32,
}

/// A [`Draw`] with the sequence and position of each row of its batch; cheap to clone.
#[derive(Clone, Debug)]
pub struct DrawRows {
    pub(crate) seed: u64,
    pub(crate) step: u32,
    /// i32 `[tokens]`, counted through the whole step.
    pub(crate) sequences: Tensor,
    /// i32 `[tokens]`, from 0 in each sequence.
    pub(crate) positions: Tensor,
    /// Both, on the host.
    host: Arc<(Vec<i32>, Vec<i32>)>,
}

impl DrawRows {
    /// The rows of a batch; `None` for one that does not stand in a run.
    ///
    /// # Errors
    /// [`unsloth_core::Error::OutOfMemory`].
    pub fn new(batch: &Batch) -> Result<Option<Self>> {
        let Some(Draw { seed, step, first_sequence }) = batch.draw else { return Ok(None) };
        let lengths = batch.sequences.offsets().windows(2).map(|pair| pair[1] - pair[0]);
        let rows =
            (first_sequence..).zip(lengths).flat_map(|(sequence, length)| std::iter::repeat_n(sequence as i32, length));
        let rows: Vec<i32> = rows.collect();
        let sequences = batch.ids.device().from_slice(&rows, [rows.len()], Category::Activations)?;
        let host = Arc::new((rows, batch.sequences.positions()));
        Ok(Some(Self { seed, step, sequences, positions: batch.positions.clone(), host }))
    }

    /// Some of the rows.
    ///
    /// # Errors
    /// [`unsloth_core::Error::OutOfMemory`].
    pub fn rows(&self, range: Range<usize>) -> Result<Self> {
        let (sequences, positions) = &*self.host;
        let (sequences, positions) = (sequences[range.clone()].to_vec(), positions[range].to_vec());
        let device = self.sequences.device();
        let put = |values: &[i32]| device.from_slice(values, [values.len()], Category::Activations);
        let (on_device, host) = ((put(&sequences)?, put(&positions)?), Arc::new((sequences, positions)));
        Ok(Self { sequences: on_device.0, positions: on_device.1, host, ..*self })
    }
}
