//! Matrix products: strided factors of any float type, f32 sums, any float result.
//!
//! The left factor is packed once, by all threads. Then the result is cut into tasks, each of some columns and mostly of all rows: a
//! task walks the dimension summed over in blocks, packs its columns of a block of the right factor into half a second-level
//! cache, and runs a [`kernel`] over pairs of panels. Factors are read where they lie; what is widened or transposed exists only
//! as panels. A sum's terms are added in the same order wherever its tile lies, so neither the cut nor the number of threads
//! shows in the bits.
//!
//! Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication", doi:10.1145/1356052.1356053.

mod block;
mod few_rows;
mod isa;
mod kernel;
mod mat;
mod pack;
#[cfg(target_arch = "x86_64")]
mod parts;
#[cfg(target_arch = "x86_64")]
mod transpose;
mod work;

use std::ops::Range;

use unsloth_core::{DType, FloatElement, Result};

use self::{
    block::{Block, task_cols, tile_rows},
    work::Work,
};
pub use isa::Isa;
pub(crate) use mat::{Elements, Into, Mat, MatMut, Sum, Term};
pub(crate) use pack::prefetch_all;
#[cfg(target_arch = "x86_64")]
pub(crate) use parts::{Parts, Side};

use crate::{CpuBackend, parallel::Disjoint};

/// Elements of a panel along the dimension summed over, at most: the sums of most layers are complete after one block, or two.
const DEPTH: usize = 1024;
/// The same over blocks that are multiplied one after another while a tile is at hand: the term of an adapter fits beside a block.
const STAGE: usize = DEPTH + 128;
/// Columns of a panel, on any path, divide it.
const COL_UNIT: usize = 64;
/// Columns of a task, at most, on any path: a multiple of those of each.
const TASK_COLS: usize = 256;
/// Elements of the left factor that are packed at once where the dimension summed over may be cut: 14 MiB as panels, at most.
const LEFT_CUT: usize = 9 << 18;
/// The same where only rows may be: 48 MiB, or [`MIN_ROWS`] rows where those are more.
const LEFT: usize = 8 << 20;
/// Rows of a tile, on any path, divide it.
const ROW_UNIT: usize = 96;
/// Fewest rows that are packed at once, a multiple of [`ROW_UNIT`]: below it packing the right factor once more for the others would
/// cost as much as multiplying.
const MIN_ROWS: usize = 192;
/// The same where the dimension summed over may be cut instead, which costs another pass over the result.
const MIN_ROWS_CUT: usize = 768;
/// Elements of the left factor that are packed as one task.
const PACKED: usize = 64 << 10;
/// A product of so few columns, and [`TALL`] times more rows, is computed as its transpose.
const NARROW: usize = COL_UNIT;
const TALL: usize = 4;
/// f32 of a line of the cache.
const LINE: usize = 16;
/// Products below this number of multiplications are not worth waking a thread for.
const SMALL: usize = 64 * 64 * 64;
/// A rectangle of the result.
struct Task {
    rows: Range<usize>,
    cols: Range<usize>,
}

/// Parts of `total` as even as multiples of `unit` allow, each at most `most`, which `unit` divides.
fn even(total: usize, most: usize, unit: usize) -> usize {
    total.div_ceil(total.div_ceil(most).max(1)).next_multiple_of(unit)
}

/// How a result is cut: by columns, as wide as the cache allows, and what is left over when each thread has as many of these as the
/// others, by rows as well. Cutting rows packs the columns once more.
fn tasks((m, n, k): (usize, usize, usize), (tile_rows, task_cols): (usize, usize), num_threads: usize) -> Vec<Task> {
    let num_threads = num_threads.min(m * n * k / SMALL).max(1);
    let even_share = n / task_cols / num_threads * num_threads;
    let left_over = n.div_ceil(task_cols) - even_share;
    // The fewest parts that make their number a multiple of that of the threads.
    let parts = (1..=num_threads).find(|parts| (left_over * parts).is_multiple_of(num_threads)).unwrap_or(1);
    let rows = m.div_ceil(parts).next_multiple_of(tile_rows);
    let cols = (0..n).step_by(task_cols).map(|start| start..n.min(start + task_cols));
    let cut = |cols: Range<usize>| {
        let rows = if cols.start < even_share * task_cols { m } else { rows };
        (0..m).step_by(rows).map(move |start| Task { rows: start..m.min(start + rows), cols: cols.clone() })
    };
    cols.flat_map(cut).collect()
}

/// How the left factor is cut to be packed: rows and elements of the dimension summed over. The latter is cut where the sums can
/// wait in the result, which is then f32.
fn passes((m, k): (usize, usize), waits: bool) -> (usize, usize) {
    let (most, min_rows) = if waits { (LEFT_CUT, MIN_ROWS_CUT) } else { (LEFT, MIN_ROWS) };
    if m * k <= most {
        return (m, k);
    }
    let rows = m.min(even(m, (most / k / ROW_UNIT * ROW_UNIT).max(min_rows), ROW_UNIT));
    let depth = if waits { even(k, (most / rows / DEPTH).max(1) * DEPTH, DEPTH) } else { k };
    (rows, k.min(depth))
}

/// Parts of sums, each of one term and of at most `depth` elements of the dimension summed over.
fn cut<'a>(terms: &[Term<'a>], depth: usize) -> Vec<Vec<Term<'a>>> {
    let parts = |term: &Term<'a>| {
        let (term, k) = (*term, term.left.cols);
        let ranges = (0..k).step_by(depth).map(move |start| start..k.min(start + depth));
        ranges
            .map(move |range| vec![Term { left: term.left.cols(range.clone()), right: term.right.cols(range), ..term }])
    };
    terms.iter().flat_map(parts).collect()
}

/// f32 elements of scratch: the packed left factor, and for each thread a block of the right one and sums. It does not depend on
/// the path or on how the result is cut.
fn scratch_parts((m, n, k): (usize, usize, usize)) -> (usize, [usize; 2]) {
    // Of tiles of AMX: three halves of an element, each of at most two terms filled up to whole tiles. Vectors take less: six rows
    // are packed as eight.
    let length = (k.next_multiple_of(32) + 32) * 3 / 2;
    let cols = n.next_multiple_of(COL_UNIT).min(TASK_COLS);
    let rows = m.next_multiple_of(32).max(m.next_multiple_of(6));
    (m.next_multiple_of(16) * length, [cols * length.min(STAGE), rows * cols])
}

impl CpuBackend {
    /// `result = sum` or `result += sum`, on all threads.
    ///
    /// # Errors
    /// [`unsloth_core::Error::OutOfMemory`] for the panels.
    pub(crate) fn product<T: FloatElement>(&self, sum: Sum<'_>, result: MatMut<'_, T>) -> Result<()> {
        let (m, n) = (result.rows, result.cols);
        for Term { left, right, .. } in sum.terms {
            assert!(left.rows == m && right.rows == n && left.cols == right.cols, "factors fit the result");
        }
        assert!(sum.bias.is_none_or(|bias| bias.len() == n), "a bias fits the columns");
        if m == 0 || n == 0 {
            return Ok(());
        }
        if few_rows::applies(sum.terms, m) {
            return self.product_of_few_rows(sum, result);
        }
        if n <= NARROW && n * TALL <= m {
            return self.product_by_columns(sum, result);
        }
        let (num_threads, len) = self.scratch(&sum, (m, n), T::DTYPE == DType::F32);
        let mut scratch = self.workspace(len)?;
        self.passes(sum, result, num_threads, &mut scratch);
        Ok(())
    }

    /// [`Self::product`] of few columns, as its transpose: then the long factor is the right one, whose panels are used as soon
    /// as they are packed.
    fn product_by_columns<T: FloatElement>(&self, sum: Sum<'_>, result: MatMut<'_, T>) -> Result<()> {
        let MatMut { data, rows: m, cols: n, row_stride } = result;
        let mut terms = sum.terms.to_vec();
        terms.iter_mut().for_each(|term| std::mem::swap(&mut term.left, &mut term.right));
        let by_columns = Sum::new(&terms, Into::Overwrite);
        let (num_threads, len) = self.scratch(&by_columns, (n, m), true);
        let transpose_len = (m * n).next_multiple_of(16);
        let mut scratch = self.workspace(transpose_len + len)?;
        let (transpose, scratch) = scratch.split_at_mut(transpose_len);
        let target = MatMut::new(&mut *transpose, n, m, m);
        self.passes(by_columns, target, num_threads, scratch);
        let mut bias = [0.0; NARROW];
        let bias = sum.bias.map(|elements| {
            elements.add_to(&mut bias[..n]);
            &bias[..n]
        });
        // A cache line of each column at a time.
        for (i, rows) in data.chunks_mut(LINE * row_stride).take(m.div_ceil(LINE)).enumerate() {
            let first = i * LINE;
            let mut sums = [0.0; LINE * NARROW];
            for (j, column) in transpose[..m * n].chunks_exact(m).enumerate() {
                let rows = sums[..LINE * n].iter_mut().skip(j).step_by(n);
                rows.zip(&column[first..]).for_each(|(sum, value)| *sum = *value);
            }
            for (sums, to) in sums.chunks_exact_mut(n).zip(rows.chunks_mut(row_stride)).take(m - first) {
                work::finish(sums, bias, sum.into, &mut to[..n]);
            }
        }
        Ok(())
    }

    /// Threads and f32 elements of scratch for [`Self::passes`] of a product `[m, n]`.
    fn scratch(&self, sum: &Sum<'_>, (m, n): (usize, usize), waits: bool) -> (usize, usize) {
        let k: usize = sum.terms.iter().map(|term| term.left.cols).sum();
        let num_threads = if m * n * k < SMALL { 1 } else { self.num_threads() };
        let (rows, depth) = passes((m, k), waits);
        let (left, parts) = scratch_parts((rows, n, depth));
        (num_threads, left + num_threads * parts.iter().sum::<usize>())
    }

    /// Computes the parts of the rows and of the dimension summed over one after another.
    fn passes<T: FloatElement>(
        &self,
        sum: Sum<'_>,
        mut result: MatMut<'_, T>,
        num_threads: usize,
        scratch: &mut [f32],
    ) {
        let (m, n) = (result.rows, result.cols);
        let k: usize = sum.terms.iter().map(|term| term.left.cols).sum();
        let waits = T::DTYPE == DType::F32;
        let (rows, depth) = passes((m, k), waits);
        let (_, parts) = scratch_parts((rows, n, depth));
        for rows in (0..m).step_by(rows).map(|start| start..m.min(start + rows)) {
            let mut terms = sum.terms.to_vec();
            terms.iter_mut().for_each(|term| term.left = term.left.rows(rows.clone()));
            let mut rest = sum;
            for terms in if depth < k { cut(&terms, depth) } else { vec![terms] } {
                let sum = Sum { terms: &terms, ..rest };
                self.pass(sum, result.rows(rows.clone()), (num_threads, scratch, parts));
                rest = Sum { bias: None, into: Into::Add, ..rest };
            }
        }
    }

    /// [`Self::product`] with the left factor packed as a whole.
    fn pass<T: FloatElement>(
        &self,
        sum: Sum<'_>,
        result: MatMut<'_, T>,
        (num_threads, scratch, parts): (usize, &mut [f32], [usize; 2]),
    ) {
        let MatMut { data, rows: m, cols: n, row_stride } = result;
        let blocks = Block::of(self.isa(), sum.terms);
        let packed = blocks.last().map_or(0, |block| block.start + block.left_len(m));
        let (left, slabs) = scratch.split_at_mut(packed.next_multiple_of(16));
        self.pack_left(&blocks, m, num_threads, left);
        let k: usize = sum.terms.iter().map(|term| term.left.cols).sum();
        let tasks = tasks((m, n, k), (tile_rows(self.isa()), task_cols(self.isa())), num_threads);
        let (left, result) = (&*left, Disjoint::new(data));
        self.share_tasks(&tasks, slabs, (num_threads, parts.iter().sum()), |task, slab| {
            let (right, sums) = slab.split_at_mut(parts[0]);
            let mut work = Work { isa: self.isa(), blocks: &blocks, left, right, sums, task_cols: task.cols.clone() };
            work.run(&sum, task.rows.clone(), |row| {
                let start = row * row_stride + task.cols.start;
                #[allow(unsafe_code, reason = "tasks write pieces of the rows of one result")]
                // SAFETY: tasks are disjoint rectangles, and this one takes one row of its own at a time.
                unsafe {
                    result.piece(start..start + task.cols.len())
                }
            });
        });
    }

    /// Packs the left factors of all blocks, on several threads where there is enough of them.
    fn pack_left(&self, blocks: &[Block<'_>], m: usize, num_threads: usize, left: &mut [f32]) {
        let (target, unit) = (Disjoint::new(left), tile_rows(self.isa()));
        let mut tasks = Vec::new();
        for block in blocks {
            let rows = (PACKED / block.depth.len().max(1) / unit).max(1) * unit;
            tasks.extend((0..m).step_by(rows).map(|start| (block, start..m.min(start + rows))));
        }
        let num_threads = if tasks.len() < 2 { 1 } else { num_threads };
        self.share_tasks(&tasks, &mut [], (num_threads, 0), |(block, rows), _| {
            let (start, len) = (block.start + block.left_len(rows.start), block.left_len(rows.len()));
            #[allow(unsafe_code, reason = "tasks write pieces of one buffer")]
            // SAFETY: panels of different rows or blocks are disjoint, and rows are cut between panels.
            block.pack_left(rows.clone(), unsafe { target.piece(start..start + len) });
        });
    }
}

#[cfg(test)]
mod tests;
