//! Zeros of dropout, drawn again where they are needed rather than kept.

use std::ops::Range;

use unsloth_core::{
    Result, Tensor,
    ops::lora_linear::{Dropout, RowDropout},
};

use crate::{
    access::{dispatch_float, read},
    backend::{CpuBackend, Workspace},
    simd::{self, vectorised},
};

/// Blocks of four random numbers that are drawn side by side.
const BLOCKS: usize = 16;
/// Their numbers, which are those of as many channels.
const CHANNELS: usize = 4 * BLOCKS;

/// Which elements of the rows of an operator are kept.
#[derive(Clone, Copy)]
pub(crate) struct Mask<'a> {
    dropout: Dropout,
    sequences: &'a [i32],
    positions: &'a [i32],
    /// A random word whose upper 24 bits are below this drops its element.
    threshold: u32,
}

impl<'a> Mask<'a> {
    pub(crate) fn new(rows: &RowDropout<'a>) -> Self {
        let RowDropout { dropout, sequences, positions } = *rows;
        // A uniform number is those 24 bits over 2^24: comparing them as integers compares the same real numbers.
        let threshold = (f64::from(dropout.probability) * 16_777_216.0).ceil() as u32;
        Self { dropout, sequences: read(sequences), positions: read(positions), threshold }
    }

    /// Factor of what is kept.
    pub(crate) fn kept_scale(&self) -> f32 {
        (1.0 / (1.0 - f64::from(self.dropout.probability))) as f32
    }

    /// Zeros what is dropped of these rows, of which `values` holds the `width` channels from `first` on, row after row.
    pub(crate) fn zero(
        &self,
        backend: &CpuBackend,
        rows: Range<usize>,
        (first, width): (usize, usize),
        values: &mut [f32],
    ) {
        let zero = |(values, row): (&mut [f32], usize)| {
            vectorised(
                #[inline(always)]
                || self.zero_row(row, first, values),
            );
        };
        backend.for_each_part(values.chunks_mut(width.max(1)).zip(rows), zero);
    }

    #[inline(always)]
    fn zero_row(&self, row: usize, first: usize, values: &mut [f32]) {
        let counter = [self.dropout.step, self.sequences[row] as u32, self.positions[row] as u32];
        let (mut channel, mut rest) = (first - first % CHANNELS, values);
        while !rest.is_empty() {
            let words = self.dropout.stream.blocks::<BLOCKS>(counter, (channel / 4) as u32);
            let mut keep = [0.0f32; CHANNELS];
            for block in 0..BLOCKS {
                for word in 0..4 {
                    keep[4 * block + word] = if words[word][block] >> 8 >= self.threshold { 1.0 } else { 0.0 };
                }
            }
            let skipped = first.saturating_sub(channel);
            let (now, later) = rest.split_at_mut(rest.len().min(CHANNELS - skipped));
            now.iter_mut().zip(&keep[skipped..]).for_each(|(value, keep)| *value *= keep);
            (channel, rest) = (channel + CHANNELS, later);
        }
    }
}

impl CpuBackend {
    /// Rows of a float `[_, width]`, widened, with zeros for what is dropped; what is kept is not scaled.
    pub(crate) fn dropped(&self, x: &Tensor, rows: Range<usize>, mask: &Mask<'_>) -> Result<Workspace> {
        let width = x.shape()[1];
        let mut values = self.workspace(rows.len() * width)?;
        dispatch_float!(x.dtype(), T => {
            let x = read::<T>(x)[rows.start * width..rows.end * width].chunks(width.max(1));
            self.for_each_part(values.chunks_mut(width.max(1)).zip(x), |(to, from)| simd::widen(from, to));
        });
        mask.zero(self, rows, (0, width), &mut values);
        Ok(values)
    }
}
