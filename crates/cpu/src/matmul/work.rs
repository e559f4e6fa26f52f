//! A task of a product: blocks of the dimension summed over, panels, tiles, and what becomes of a tile that is complete.

use std::ops::Range;

use unsloth_core::FloatElement;

use super::{
    Elements, Into, Isa, STAGE, Sum, TASK_COLS,
    block::{Block, Ready, tile_columns, tile_rows},
    pack::{Panels, prefetch_all},
};
use crate::simd::{self, vectorised};

/// A task at work.
pub(super) struct Work<'a> {
    pub(super) isa: Isa,
    pub(super) blocks: &'a [Block<'a>],
    /// The packed left factor.
    pub(super) left: &'a [f32],
    /// Panels of the right factor, of one stage.
    pub(super) right: &'a mut [f32],
    /// Sums that wait for the next stage, as tiles; a single tile where there is one stage.
    pub(super) sums: &'a mut [f32],
    pub(super) task_cols: Range<usize>,
}

impl Work<'_> {
    /// Packs the right factors of the blocks of a stage, one after another; gives where each starts.
    fn pack_right(&mut self, stage: &[Block<'_>], panels: Panels) -> Vec<usize> {
        let (mut starts, mut start) = (Vec::with_capacity(stage.len()), 0);
        let padded: usize = panels.of(self.task_cols.len()).map(|(_, width)| width).sum();
        for block in stage {
            block.pack_right(self.task_cols.clone(), &mut self.right[start..]);
            starts.push(start);
            start += padded * block.length;
        }
        starts
    }

    /// Computes the task's part of the rows `rows`; `row(i)` is that of row `i` of the result.
    pub(super) fn run<'b, T: FloatElement>(
        &mut self,
        sum: &Sum<'_>,
        rows: Range<usize>,
        row: impl Fn(usize) -> &'b mut [T],
    ) {
        let mut bias = [0.0; TASK_COLS];
        let bias = sum.bias.map(|elements| {
            elements.slice(self.task_cols.clone()).add_to(&mut bias[..self.task_cols.len()]);
            &bias[..self.task_cols.len()]
        });
        let num_cols = self.task_cols.len();
        let (panels, most_rows, ready) = (tile_columns(self.isa), tile_rows(self.isa), Ready::new(self.isa));
        let padded: usize = panels.of(num_cols).map(|(_, width)| width).sum();
        let stages = stages(self.blocks);
        for (i, stage) in stages.iter().enumerate() {
            let (starts, is_last) = (self.pack_right(stage, panels), i + 1 == stages.len());
            for first_row in rows.clone().step_by(most_rows) {
                for (first, width) in panels.of(num_cols) {
                    let waiting =
                        if stages.len() == 1 { 0 } else { (first_row - rows.start) * padded + first * most_rows };
                    let c = &mut self.sums[waiting..][..most_rows * width];
                    let (tile_rows, cols) =
                        (first_row..rows.end.min(first_row + most_rows), first..num_cols.min(first + width));
                    if is_last {
                        // By the time the tile is complete its place in the result has come.
                        tile_rows.clone().for_each(|i| prefetch_all(&row(i)[cols.clone()]));
                    }
                    for (j, (block, start)) in stage.iter().zip(&starts).enumerate() {
                        let right = &self.right[start + first * block.length..];
                        block.multiply(&ready, (self.left, first_row), (right, width), (c, i + j > 0));
                    }
                    if is_last {
                        let tile = Complete { sums: c, width, bias: bias.map(|bias| &bias[first..]), into: sum.into };
                        tile.store(tile_rows, cols, &row);
                    }
                }
            }
        }
        if stages.is_empty() {
            for row_index in rows {
                let sums = &mut self.sums[..num_cols];
                sums.fill(0.0);
                let tile = Complete { sums, width: num_cols, bias, into: sum.into };
                tile.store(row_index..row_index + 1, 0..num_cols, &row);
            }
        }
    }
}

/// Blocks whose panels of the right factor lie in the cache together: a tile is not put away between them.
fn stages<'a, 'b>(blocks: &'b [Block<'a>]) -> Vec<&'b [Block<'a>]> {
    let (mut stages, mut rest) = (Vec::new(), blocks);
    while !rest.is_empty() {
        let ends = rest.iter().scan(0, |end, block| {
            *end += block.length;
            Some(*end)
        });
        let (stage, others) = rest.split_at(ends.take_while(|&end| end <= STAGE).count().max(1));
        stages.push(stage);
        rest = others;
    }
    stages
}

/// A tile to which nothing will be added but the bias and the old contents of the result.
struct Complete<'a> {
    sums: &'a mut [f32],
    width: usize,
    bias: Option<&'a [f32]>,
    into: Into,
}

impl Complete<'_> {
    /// Writes the tile to the columns `cols` of the rows `rows`.
    fn store<'b, T: FloatElement>(self, rows: Range<usize>, cols: Range<usize>, row: &impl Fn(usize) -> &'b mut [T]) {
        let Self { sums, width, bias, into } = self;
        for (sums, row_index) in sums.chunks_exact_mut(width).zip(rows) {
            finish(&mut sums[..cols.len()], bias, into, &mut row(row_index)[cols.clone()]);
        }
    }
}

/// Writes complete sums to their place in the result.
pub(super) fn finish<T: FloatElement>(sums: &mut [f32], bias: Option<&[f32]>, into: Into, to: &mut [T]) {
    if let Some(bias) = bias {
        vectorised(
            #[inline(always)]
            || sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias),
        );
    }
    if into == Into::Add {
        Elements::from_slice::<T>(to).add_to(sums);
    }
    simd::narrow(sums, to);
}
