//! Some of the dimension summed over of a term: how its factors are packed, and what multiplies them.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::parts::{Parts, Side};
use super::{
    DEPTH, Isa, Term, even,
    kernel::{Kernel, LEFT_WIDTH, ROWS, Tile},
    pack::{Form, Panels},
};
#[cfg(target_arch = "x86_64")]
use crate::amx::{self, Products, Tiles};
use crate::simd;

/// What a thread has to have ready to multiply.
pub(super) struct Ready {
    #[cfg(target_arch = "x86_64")]
    tiles: Option<Tiles>,
}

impl Ready {
    pub(super) fn new(isa: Isa) -> Self {
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "instructions that not every processor has")]
        // SAFETY: `Isa::choose` gives only what the processor has.
        return Self { tiles: (isa == Isa::Amx).then(|| unsafe { Tiles::configure() }) };
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = isa;
            Self {}
        }
    }
}

/// Rows of a tile of the result.
pub(super) fn tile_rows(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => amx::BLOCK,
        _ => ROWS,
    }
}

/// Columns of a task, at most. Their panels fill half a second-level cache: 1 MiB, or, where there are tiles, 2 MiB.
pub(super) fn task_cols(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => super::TASK_COLS,
        _ => 128,
    }
}

/// Columns of tiles of the result.
pub(super) fn tile_columns(isa: Isa) -> Panels {
    match isa {
        // Sums of the dimension summed over wait in the cache while a part of it is multiplied by all columns.
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => Panels { lines: super::TASK_COLS, width: super::TASK_COLS, step: amx::SIDE },
        _ => Kernel::new(isa, false).right_panels(),
    }
}

/// How a block is multiplied.
#[derive(Clone, Copy)]
enum Path {
    Vectors(Kernel, Form),
    /// By tiles of AMX, of the parts of either factor.
    #[cfg(target_arch = "x86_64")]
    Tiles(Parts, Parts),
}

impl Path {
    fn of(isa: Isa, term: &Term<'_>) -> Self {
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Amx {
            return Self::Tiles(
                Parts::new(&term.left, Side::Left, term.factor),
                Parts::new(&term.right, Side::Right, 1.0),
            );
        }
        let kernel = Kernel::new(isa, term.left.is_bf16() && term.right.is_bf16() && term.factor == 1.0);
        Self::Vectors(kernel, Form { pairs: kernel.pairs, isa })
    }

    /// Most elements of the dimension summed over in a block, and what theirs is a multiple of.
    fn depth(self) -> (usize, usize) {
        match self {
            Self::Vectors(kernel, _) => (if kernel.pairs { 2 * DEPTH } else { DEPTH }, 16),
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(_, right) => (2 * DEPTH / right.count / amx::DEPTH * amx::DEPTH, amx::DEPTH),
        }
    }
}

/// Some of the dimension summed over of one term.
pub(super) struct Block<'a> {
    term: &'a Term<'a>,
    path: Path,
    pub(super) depth: Range<usize>,
    /// 32-bit elements of a column of the packed right factor.
    pub(super) length: usize,
    /// Where its packed left factor starts.
    pub(super) start: usize,
}

impl<'a> Block<'a> {
    /// The blocks of all terms, in the order in which they are added.
    pub(super) fn of(isa: Isa, terms: &'a [Term<'a>]) -> Vec<Self> {
        let (mut blocks, mut start) = (Vec::new(), 0);
        for term in terms.iter().filter(|term| term.left.cols > 0) {
            let path = Path::of(isa, term);
            let (k, (most, unit)) = (term.left.cols, path.depth());
            let step = even(k, most, unit);
            for depth in (0..k).step_by(step).map(|start| start..k.min(start + step)) {
                let length = match path {
                    Path::Vectors(_, form) => form.depth(depth.len()),
                    #[cfg(target_arch = "x86_64")]
                    Path::Tiles(_, right) => right.length(depth.len()),
                };
                let block = Self { term, path, depth, length, start };
                start += block.left_len(term.left.rows);
                blocks.push(block);
            }
        }
        blocks
    }

    /// Elements of so many rows of the packed left factor, all of them or whole tiles.
    pub(super) fn left_len(&self, rows: usize) -> usize {
        match self.path {
            Path::Vectors(..) => rows.div_ceil(ROWS) * LEFT_WIDTH * self.length,
            #[cfg(target_arch = "x86_64")]
            Path::Tiles(left, _) => rows.next_multiple_of(amx::SIDE) * left.length(self.depth.len()),
        }
    }

    /// Packs rows of the left factor.
    pub(super) fn pack_left(&self, rows: Range<usize>, to: &mut [f32]) {
        let Term { left, factor, .. } = self.term;
        match self.path {
            Path::Vectors(kernel, form) => {
                form.pack(left, rows, self.depth.clone(), kernel.left_panels(), to);
                if *factor != 1.0 {
                    simd::scale(to, *factor);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Path::Tiles(parts, _) => parts.pack(left, rows, self.depth.clone(), to),
        }
    }

    /// Packs columns of the right factor.
    pub(super) fn pack_right(&self, cols: Range<usize>, to: &mut [f32]) {
        let right = &self.term.right;
        match self.path {
            Path::Vectors(kernel, form) => form.pack(right, cols, self.depth.clone(), kernel.right_panels(), to),
            #[cfg(target_arch = "x86_64")]
            Path::Tiles(_, parts) => parts.pack(right, cols, self.depth.clone(), to),
        }
    }

    /// The tile of the rows from `first_row` on and of `width` columns, whose panels `right` starts with: `c`, rows of `width`, is
    /// overwritten or added to.
    pub(super) fn multiply(
        &self,
        ready: &Ready,
        (left, first_row): (&[f32], usize),
        (right, width): (&[f32], usize),
        (c, add): (&mut [f32], bool),
    ) {
        let _ = ready;
        let left = &left[self.start + self.left_len(first_row)..];
        let right = &right[..width * self.length];
        match self.path {
            Path::Vectors(kernel, _) => {
                let depth = self.length;
                let (a, b) = (bytemuck::cast_slice(&left[..LEFT_WIDTH * depth]), bytemuck::cast_slice(right));
                kernel.run(Tile { depth, width, a, b, c, add });
            }
            #[cfg(target_arch = "x86_64")]
            Path::Tiles(parts, others) => {
                let Some(tiles) = &ready.tiles else { unreachable!("a thread of this path has its tiles") };
                let rows = (self.term.left.rows - first_row).min(amx::BLOCK).next_multiple_of(amx::SIDE);
                let a = &left[..self.left_len(rows)];
                tile_product(tiles, (parts, a, rows), (others, right, width), self.depth.len(), (c, add));
            }
        }
    }
}

/// `c = a b` or `c += a b` of packed factors of up to two tiles of rows and any number of columns.
#[cfg(target_arch = "x86_64")]
fn tile_product(
    tiles: &Tiles,
    (left, a, rows): (Parts, &[f32], usize),
    (right, b, width): (Parts, &[f32], usize),
    depth: usize,
    (c, add): (&mut [f32], bool),
) {
    assert!(rows.is_multiple_of(amx::SIDE) && width.is_multiple_of(amx::SIDE), "blocks are whole tiles");
    assert!(a.len() >= rows * left.length(depth) && b.len() >= width * right.length(depth), "factors are whole");
    assert!(c.len() >= rows * width, "the tile of the result is whole");
    let steps = depth.div_ceil(amx::DEPTH);
    let across = rows / amx::SIDE;
    let by_width = [1, 2].map(|others| Products::new([left.count, right.count], [across, others]));
    let len = steps * left.count * across * amx::TILE;
    let a = a.as_ptr().cast::<u32>();
    for col in (0..width).step_by(amx::BLOCK) {
        let others = (width - col).min(amx::BLOCK) / amx::SIDE;
        let b = b[col * right.length(depth)..].as_ptr().cast();
        let c = (c[col..].as_mut_ptr(), size_of::<f32>() * width);
        let (products, sides) = (&by_width[others - 1], [across, others]);
        // The next rows come from beyond the second-level cache, a part of them while each of these columns is at work.
        let ahead = a.wrapping_add(len + len / width.div_ceil(amx::BLOCK) * (col / amx::BLOCK));
        #[allow(unsafe_code, reason = "forwards what was asserted")]
        // SAFETY: the lengths are asserted above, and `Parts` packs blocks as `multiply` reads them.
        unsafe {
            tiles.multiply((products, sides), ([a, b, ahead], steps), c, add);
        }
    }
}
