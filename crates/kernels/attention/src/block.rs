//! What the kernels share: rows in global memory, tiles in shared memory, products of tiles.
//!
//! Query rows are pairs of a query and a head of the group, the head running faster: all heads that read one key head share its
//! tiles, and a single new token still fills a block.
//!
//! Loops over channels, rows and tiles have trip counts that only the device knows: where a driver compiles for a processor
//! (lavapipe), unrolling them takes minutes. Loops over what a unit keeps in registers are unrolled, since an array that is
//! indexed at run time is not in registers.

use cubecl::prelude::*;

use crate::tile::Tile;

/// Below every score that f32 can tell apart, and finite: the difference of two such is 0, not NaN.
pub(crate) const LOWEST: f32 = -3.0e38;

/// Sizes that the kernels read at run time.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) num_heads: u32,
    pub(crate) num_kv_heads: u32,
    /// Query heads per key head.
    pub(crate) group: u32,
    pub(crate) tokens_q: u32,
    /// Keys from one sequence's to the next's in a cache.
    pub(crate) capacity: u32,
    /// Vectors of channels of a head.
    pub(crate) vectors: u32,
}

/// What turns products into scores.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Scoring {
    pub(crate) scale: f32,
    pub(crate) softcap: f32,
    /// A query at `p` sees keys from `p - left` on.
    pub(crate) left: i32,
    /// A query at `p` sees keys up to `p + right`.
    pub(crate) right: i32,
}

/// The rows of one key head in `[tokens, heads, head_dim]`, for one sequence.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Rows {
    /// Token of the first row.
    pub(crate) first: usize,
    /// Number of rows.
    pub(crate) len: usize,
    /// Heads of a token.
    pub(crate) heads: usize,
    /// First head of the group.
    pub(crate) head: usize,
    /// Heads of the group, each a row.
    pub(crate) group: usize,
}

#[cube]
impl Rows {
    /// Where a row starts, in vectors.
    pub(crate) fn offset(&self, row: usize, vectors: usize) -> usize {
        ((self.first + row / self.group) * self.heads + self.head + row % self.group) * vectors
    }

    /// Where the statistics of a row lie in `[heads, tokens]`.
    pub(crate) fn statistic(&self, row: usize, tokens: usize) -> usize {
        (self.head + row % self.group) * tokens + self.first + row / self.group
    }
}

/// Which keys the queries of one sequence see.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Mask {
    /// Position of the first query among the keys; negative if there are more queries than keys.
    pub(crate) first: i32,
    pub(crate) left: i32,
    pub(crate) right: i32,
    pub(crate) seq_q: i32,
    pub(crate) seq_k: i32,
}

#[cube]
impl Mask {
    /// First and last key that a query sees; the last comes before the first if it sees none.
    pub(crate) fn seen_by(&self, query: usize) -> (i32, i32) {
        let position = query as i32 + self.first;
        (max(position - self.left, 0), min(position + self.right, self.seq_k - 1))
    }

    /// First key, and one past the last key, that some query of `from ..= to` sees.
    pub(crate) fn keys(&self, from: usize, to: usize) -> (usize, usize) {
        let start = max(from as i32 + self.first - self.left, 0);
        let end = min(to as i32 + self.first + self.right + 1, self.seq_k);
        (start as usize, max(end, start) as usize)
    }

    /// First query, and one past the last query, that see some key of `from ..= to`.
    pub(crate) fn queries(&self, from: usize, to: usize) -> (usize, usize) {
        let start = max(from as i32 - self.first - self.right, 0);
        let end = min(to as i32 - self.first + self.left + 1, self.seq_q);
        (start as usize, max(end, start) as usize)
    }
}

/// First query token, number of queries, first key and number of keys of the sequence; first streamed row and one past the last.
pub(crate) const FACTS: usize = 6;

/// Streamed rows that are summed in one round of a loop, at most; divides their number in every tile.
const TOGETHER: usize = 4;

/// One sequence and key head.
///
/// What is known of the sequence lies in shared memory and is read where it is used. In registers it would be alive from the
/// first to the last line beside the sums, and a compiler that wants room for one more cube spills just such values.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Problem {
    facts: SharedMemory<i32>,
    sizes: Sizes,
    scoring: Scoring,
}

#[cube]
impl Problem {
    pub(crate) fn queries(&self) -> Rows {
        let group = self.sizes.group as usize;
        Rows {
            first: self.facts[0] as usize,
            len: self.facts[1] as usize * group,
            heads: self.sizes.num_heads as usize,
            head: CUBE_POS_Y as usize * group,
            group,
        }
    }

    pub(crate) fn keys(&self) -> Rows {
        Rows {
            first: self.facts[2] as usize,
            len: self.facts[3] as usize,
            heads: self.sizes.num_kv_heads as usize,
            head: CUBE_POS_Y as usize,
            group: 1usize.runtime(),
        }
    }

    /// First row that passes by, and one past the last: those that see, or are seen from, a row of the block.
    pub(crate) fn streamed(&self) -> (usize, usize) {
        (self.facts[4] as usize, self.facts[5] as usize)
    }

    pub(crate) fn mask(&self) -> Mask {
        let (seq_q, seq_k) = (self.facts[1], self.facts[3]);
        Mask { first: seq_k - seq_q, left: self.scoring.left, right: self.scoring.right, seq_q, seq_k }
    }
}

/// The problem of this cube: block of `held` rows in x, key head in y, sequence in z. `bounds_k` holds offsets, or lengths when the
/// keys lie in a cache. Every unit calls it.
#[cube]
pub(crate) fn problem(
    bounds_q: &Array<i32>,
    bounds_k: &Array<i32>,
    sizes: &Sizes,
    scoring: &Scoring,
    #[comptime] form: Form,
    #[comptime] held: usize,
) -> Problem {
    let mut facts = SharedMemory::<i32>::new(FACTS);
    let problem = Problem { facts, sizes: *sizes, scoring: *scoring };
    if UNIT_POS == 0 {
        let seq = CUBE_POS_Z as usize;
        let first_q = bounds_q[seq];
        facts[0] = first_q;
        facts[1] = bounds_q[seq + 1] - first_q;
        let (first_k, seq_k) = if comptime!(form.cached) {
            (seq as i32 * sizes.capacity as i32, bounds_k[seq])
        } else {
            (bounds_k[seq], bounds_k[seq + 1] - bounds_k[seq])
        };
        facts[2] = first_k;
        facts[3] = seq_k;
        let group = sizes.group as usize;
        let start = CUBE_POS_X as usize * held;
        let end = start + held;
        // A block without rows has no use for its range.
        let (from, to) = if comptime!(form.holds_keys) {
            let (from, to) = problem.mask().queries(start, min(end, problem.keys().len) - 1);
            (from * group, to * group)
        } else {
            problem.mask().keys(start / group, (min(end, problem.queries().len) - 1) / group)
        };
        facts[4] = from as i32;
        facts[5] = to as i32;
    }
    sync_cube();
    problem
}

/// What a kernel's blocks are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Form {
    /// Keys stay and queries pass by, else queries stay.
    pub(crate) holds_keys: bool,
    /// Keys lie in a cache.
    pub(crate) cached: bool,
}

/// First and last key that each query row of a tile sees, `[count]` each. In shared memory, because it takes a division to find.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Seen {
    first: SharedMemory<i32>,
    last: SharedMemory<i32>,
}

#[cube]
impl Seen {
    /// For a tile of `count` rows.
    pub(crate) fn new(#[comptime] count: usize) -> Seen {
        Seen { first: SharedMemory::new(count), last: SharedMemory::new(count) }
    }

    /// Finds the keys of row `row` of the tile, which is query row `at`; a row that does not exist sees none.
    pub(crate) fn find(&mut self, problem: &Problem, row: usize, at: usize) {
        let queries = problem.queries();
        let (first, last) = problem.mask().seen_by(at / queries.group);
        self.first[row] = first;
        self.last[row] = select(at < queries.len, last, -1);
    }

    /// First and last key that row `row` of the tile sees.
    pub(crate) fn by(&self, row: usize) -> (i32, i32) {
        (self.first[row], self.last[row])
    }
}

/// Whether a row that sees the keys from `seen.0` to `seen.1` sees `key`.
#[cube]
pub(crate) fn sees(seen: (i32, i32), key: usize) -> bool {
    let key = key as i32;
    key >= seen.0 && key <= seen.1
}

/// Position of this unit along the held rows and along the streamed rows.
#[cube]
pub(crate) fn unit(#[comptime] tile: Tile) -> (usize, usize) {
    let unit = UNIT_POS as usize;
    (unit / tile.streamed_units, unit % tile.streamed_units)
}

/// Copies rows `start .. start + count` to a tile, zeros beyond the last row.
#[cube]
pub(crate) fn load<E: Float, N: Size>(
    from: &Array<Vector<E, N>>,
    to: &mut SharedMemory<Vector<f32, N>>,
    rows: &Rows,
    start: usize,
    vectors: usize,
    #[comptime] count: usize,
    #[comptime] tile: Tile,
) {
    let (first_row, first_vector) = unit(tile);
    let stride = comptime!(tile.stride());
    if comptime!(tile.is_unrolled()) {
        // All loads of a unit are under way together.
        let of_unit = comptime!(count / tile.held_units);
        let mut values = Array::<Vector<E, N>>::new(comptime!(of_unit * tile.vectors));
        #[unroll]
        for r in 0..of_unit {
            let row = start + first_row + r * tile.held_units;
            let at = rows.offset(row, vectors);
            #[unroll]
            for t in 0..tile.vectors {
                let c = first_vector + t * tile.streamed_units;
                let mut value = Vector::<E, N>::new(E::from_int(0));
                if row < rows.len && c < vectors {
                    value = from[at + c];
                }
                values[r * tile.vectors + t] = value;
            }
        }
        #[unroll]
        for r in 0..of_unit {
            #[unroll]
            for t in 0..tile.vectors {
                let at = (first_row + r * tile.held_units) * stride + first_vector + t * tile.streamed_units;
                to[at] = Vector::cast_from(values[r * tile.vectors + t]);
            }
        }
    } else {
        let mut row = first_row;
        while row < count {
            let exists = start + row < rows.len;
            let at = rows.offset(start + row, vectors);
            let mut c = first_vector;
            while c < vectors {
                let mut value = Vector::<f32, N>::new(0.0);
                if exists {
                    value = Vector::cast_from(from[at + c]);
                }
                to[row * stride + c] = value;
                c += tile.streamed_units;
            }
            row += tile.held_units;
        }
    }
}

/// Products of this unit's held rows with its streamed rows, `[held_rows, streamed_rows]`, in registers.
#[cube]
pub(crate) fn products<N: Size>(
    held: &SharedMemory<Vector<f32, N>>,
    streamed: &SharedMemory<Vector<f32, N>>,
    vectors: usize,
    #[comptime] tile: Tile,
) -> Array<f32> {
    let (held_unit, streamed_unit) = unit(tile);
    let stride = comptime!(tile.stride());
    let (rows, cols) = comptime!((tile.held_rows, tile.streamed_rows));
    let mut sums = Array::<f32>::new(comptime!(rows * cols));
    #[unroll]
    for i in 0..comptime!(rows * cols) {
        sums[i] = 0.0;
    }
    for c in 0..vectors {
        let mut left = Array::<Vector<f32, N>>::new(rows);
        #[unroll]
        for i in 0..rows {
            left[i] = held[(held_unit + i * tile.held_units) * stride + c];
        }
        #[unroll]
        for j in 0..cols {
            let right = streamed[(streamed_unit + j * tile.streamed_units) * stride + c];
            #[unroll]
            for i in 0..rows {
                let mut sum = sums[i * cols + j];
                #[unroll]
                for e in 0..right.size() {
                    sum += left[i][e] * right[e];
                }
                sums[i * cols + j] = sum;
            }
        }
    }
    sums
}

/// Streamed row `j` of this unit within a tile.
#[cube]
pub(crate) fn streamed_row(j: usize, #[comptime] tile: Tile) -> usize {
    let (_, streamed_unit) = unit(tile);
    streamed_unit + j * tile.streamed_units
}

/// Writes this unit's weights, `[held_rows, streamed_rows]`, to `[streamed, held_units]`, vectors of a unit's held rows.
#[cube]
pub(crate) fn put<M: Size>(of_unit: &Array<f32>, weights: &mut SharedMemory<Vector<f32, M>>, #[comptime] tile: Tile) {
    let (held_unit, _) = unit(tile);
    #[unroll]
    for j in 0..tile.streamed_rows {
        let mut of_rows = Vector::<f32, M>::new(0.0);
        #[unroll]
        for i in 0..tile.held_rows {
            of_rows[i] = of_unit[comptime!(i * tile.streamed_rows + j)];
        }
        weights[streamed_row(j, tile) * comptime!(tile.weights_stride()) + held_unit] = of_rows;
    }
}

/// Sum over the components of a vector, first to last.
#[cube]
pub(crate) fn horizontal_sum<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..vector.size() {
        sum += vector[i];
    }
    sum
}

/// `sums[held row] += sum over streamed rows of weight * row`, for this unit's held rows and channels. Rows that do not exist have
/// weights of 0.
#[cube]
pub(crate) fn accumulate<N: Size, M: Size>(
    sums: &mut Array<Vector<f32, N>>,
    weights: &SharedMemory<Vector<f32, M>>,
    streamed: &SharedMemory<Vector<f32, N>>,
    count: usize,
    #[comptime] tile: Tile,
) {
    let (held_unit, streamed_unit) = unit(tile);
    let (stride, weights_stride) = comptime!((tile.stride(), tile.weights_stride()));
    let together = comptime!(if tile.is_unrolled() { TOGETHER } else { 1 });
    for chunk in 0..count.div_ceil(together) {
        #[unroll]
        for step in 0..together {
            let j = chunk * together + step;
            let weight = weights[j * weights_stride + held_unit];
            #[unroll]
            for t in 0..tile.vectors {
                let row = streamed[j * stride + streamed_unit + t * tile.streamed_units];
                #[unroll]
                for i in 0..tile.held_rows {
                    sums[i * tile.vectors + t] += row * Vector::new(weight[i]);
                }
            }
        }
    }
}

/// One number for each of this unit's held rows.
#[cube]
pub(crate) fn filled(value: f32, #[comptime] tile: Tile) -> Array<f32> {
    let mut rows = Array::<f32>::new(tile.held_rows);
    #[unroll]
    for i in 0..tile.held_rows {
        rows[i] = value;
    }
    rows
}

/// Zeros for [`accumulate`] to add to.
#[cube]
pub(crate) fn zeros<N: Size>(#[comptime] tile: Tile) -> Array<Vector<f32, N>> {
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(tile.held_rows * tile.vectors));
    #[unroll]
    for i in 0..comptime!(tile.held_rows * tile.vectors) {
        sums[i] = Vector::new(0.0);
    }
    sums
}

/// Writes the sums of this unit, each held row times its factor, to the rows from `start` on that exist.
#[cube]
pub(crate) fn store<E: Float, N: Size>(
    sums: &Array<Vector<f32, N>>,
    factors: &Array<f32>,
    to: &mut Array<Vector<E, N>>,
    rows: &Rows,
    start: usize,
    vectors: usize,
    #[comptime] tile: Tile,
) {
    // Not `unit(tile)`: a compiler would keep what it found there until here.
    let unit = UNIT_POS_X as usize;
    let (held_unit, streamed_unit) = (unit / tile.streamed_units, unit % tile.streamed_units);
    #[unroll]
    for i in 0..tile.held_rows {
        let row = start + held_unit + i * tile.held_units;
        if row < rows.len {
            let at = rows.offset(row, vectors);
            #[unroll]
            for t in 0..tile.vectors {
                let c = streamed_unit + t * tile.streamed_units;
                if c < vectors {
                    to[at + c] = Vector::cast_from(sums[i * tile.vectors + t] * Vector::new(factors[i]));
                }
            }
        }
    }
}

/// The score of a product.
#[cube]
pub(crate) fn score(product: f32, scoring: &Scoring, #[comptime] capped: bool) -> f32 {
    let scaled = product * scoring.scale;
    if comptime!(capped) { scoring.softcap * f32::tanh(scaled / scoring.softcap) } else { scaled }
}
