//! What AVX-512 does better than the compiler finds for itself: tiles of products in registers, and the conversion to bf16.
//!
//! The processor has the instructions where [`crate::Isa`] names them: that is checked once, when a backend is made.

use std::{arch::x86_64::*, mem::transmute};

use half::{bf16, f16};

/// Whether the processor has what [`vectorised`] compiles for.
#[inline(always)]
pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
}

/// Runs `work`, compiled for vectors of sixteen f32.
///
/// # Safety
/// [`is_available`].
#[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(crate) unsafe fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// `c = a b` or `c += a b`: element `(i, k)` of `a` is at `i * a_row + k * a_col`, rows of `b` and `c` are
/// `b_row` and `c_row` elements apart. In a tile of pairs an element of `a` and `b` is two bf16.
#[derive(Clone, Copy)]
pub(crate) struct Operands {
    pub(crate) depth: usize,
    pub(crate) a: *const u32,
    pub(crate) a_row: usize,
    pub(crate) a_col: usize,
    pub(crate) b: *const u32,
    pub(crate) b_row: usize,
    pub(crate) c: *mut f32,
    pub(crate) c_row: usize,
    pub(crate) add: bool,
    /// How many elements of `a` before they are read they are asked for: a panel from beyond the second-level cache would be
    /// waited for at each page. 0 where all of it is close.
    pub(crate) ahead: usize,
}

/// Most rows of a tile.
pub(crate) const ROWS: usize = 6;
/// Most vectors of a row of a tile: 24 sums, four vectors and a factor of 32 registers.
pub(crate) const VECTORS: usize = 4;
/// f32 of a vector.
pub(crate) const LANES: usize = 16;

/// A tile of `R` rows of `V` vectors held in registers.
macro_rules! tile {
    ($(#[$doc:meta])* $name:ident, $features:literal, $fused:expr) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// The processor has the features; all `R x depth` elements of `a` can be read, as can `depth` rows of `b` and, to be
        /// written, `R` rows of `c`, of `16 V` elements each.
        #[allow(unsafe_code, reason = "intrinsics on pointers: bounds checks would double the instructions")]
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const V: usize>(operands: Operands) {
            let Operands { depth, mut a, a_row, a_col, mut b, b_row, c, c_row, add, ahead } = operands;
            for row in 0..R {
                for v in 0..V {
                    _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(row * c_row + LANES * v).cast());
                }
            }
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            for _ in 0..depth {
                _mm_prefetch::<_MM_HINT_T0>(a.wrapping_add(ahead).cast());
                let mut vectors = [_mm512_setzero_si512(); V];
                for (v, vector) in vectors.iter_mut().enumerate() {
                    // SAFETY: the caller's promise about `b`.
                    *vector = unsafe { _mm512_loadu_si512(b.wrapping_add(LANES * v).cast()) };
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller's promise about `a`.
                    let left = _mm512_set1_epi32(unsafe { a.wrapping_add(row * a_row).read_unaligned() } as i32);
                    for (sum, vector) in sums.iter_mut().zip(vectors) {
                        *sum = $fused(*sum, left, vector);
                    }
                }
                a = a.wrapping_add(a_col);
                b = b.wrapping_add(b_row);
            }
            for (row, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    let c = c.wrapping_add(row * c_row + LANES * v);
                    // SAFETY: the caller's promise about `c`.
                    unsafe {
                        let value = if add { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum };
                        _mm512_storeu_ps(c, value);
                    }
                }
            }
        }
    };
}

tile!(
    /// Products of f32.
    f32_tile,
    "avx512f",
    |sum, a, b| _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
);
tile!(
    /// Sums of the two products of each pair.
    bf16_tile,
    "avx512f,avx512bf16",
    |sum, a: __m512i, b: __m512i| {
        #[allow(unsafe_code, reason = "no intrinsic converts between these two views of a register")]
        // SAFETY: both are 64 bytes for which every pattern is valid.
        let (a, b) = unsafe { (transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)) };
        _mm512_dpbf16_ps(sum, a, b)
    }
);

/// A tile of `rows`, at most [`ROWS`], of `vectors`, at most [`VECTORS`].
///
/// # Safety
/// The processor has AVX-512F, and its bf16 products for `pairs`; what is said of `R` and `V` above holds of `rows` and
/// `vectors`.
#[allow(unsafe_code, reason = "forwards the promises of its caller")]
#[inline]
pub(crate) unsafe fn tile((rows, vectors): (usize, usize), pairs: bool, operands: Operands) {
    macro_rules! of_vectors {
        ($rows:literal) => {
            // SAFETY: the caller's promises.
            unsafe {
                match (pairs, vectors) {
                    (false, 1) => f32_tile::<$rows, 1>(operands),
                    (false, 2) => f32_tile::<$rows, 2>(operands),
                    (false, 3) => f32_tile::<$rows, 3>(operands),
                    (false, _) => f32_tile::<$rows, 4>(operands),
                    (true, 1) => bf16_tile::<$rows, 1>(operands),
                    (true, 2) => bf16_tile::<$rows, 2>(operands),
                    (true, 3) => bf16_tile::<$rows, 3>(operands),
                    (true, _) => bf16_tile::<$rows, 4>(operands),
                }
            }
        };
    }
    match rows {
        1 => of_vectors!(1),
        2 => of_vectors!(2),
        3 => of_vectors!(3),
        4 => of_vectors!(4),
        5 => of_vectors!(5),
        _ => of_vectors!(6),
    }
}

/// The product of two lines, in four vectors of partial sums. What a vector has of each is loaded by a closure that is given a mask and
/// where to begin.
macro_rules! dot {
    ($(#[$doc:meta])* $name:ident, ($left:ty, $load_left:expr), ($line:ty, $load_line:expr), $features:literal, $fused:expr) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// The processor has the features; `line` is as long as `left`.
        #[allow(unsafe_code, reason = "intrinsics on pointers: bounds checks would double the instructions")]
        #[target_feature(enable = $features)]
        pub(crate) unsafe fn $name(left: &[$left], line: *const $line) -> f32 {
            /// Elements of a vector.
            const LEN: usize = 64 / size_of::<$left>();
            /// Bytes that are asked for before they are read, a page: the processor foresees no more by itself.
            const AHEAD: usize = 4096;
            let mut sums = [_mm512_setzero_ps(); 4];
            let whole = left.len() / (4 * LEN) * (4 * LEN);
            for at in (0..whole).step_by(4 * LEN) {
                for (u, sum) in sums.iter_mut().enumerate() {
                    let at = at + u * LEN;
                    _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(at).wrapping_byte_add(AHEAD).cast());
                    // SAFETY: whole vectors of the lines, of which the caller promises `left.len()` elements.
                    let x = unsafe { $load_left(u64::MAX, left.as_ptr().wrapping_add(at)) };
                    // SAFETY: as above.
                    let y = unsafe { $load_line(u64::MAX, line.wrapping_add(at)) };
                    *sum = $fused(*sum, x, y);
                }
            }
            for at in (whole..left.len()).step_by(LEN) {
                let mask = u64::MAX >> (64 - (left.len() - at).min(LEN));
                // SAFETY: only elements below the length of the lines are read.
                let x = unsafe { $load_left(mask, left.as_ptr().wrapping_add(at)) };
                // SAFETY: as above.
                let y = unsafe { $load_line(mask, line.wrapping_add(at)) };
                sums[0] = $fused(sums[0], x, y);
            }
            let [a, b, c, d] = sums;
            _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
        }
    };
}

/// Sixteen f32.
macro_rules! load_f32 {
    () => {
        |mask: u64, from: *const f32| _mm512_maskz_loadu_ps(mask as __mmask16, from)
    };
}

dot!(
    /// Products of f32.
    dot,
    (f32, load_f32!()),
    (f32, load_f32!()),
    "avx512f",
    |sum, a, b| _mm512_fmadd_ps(a, b, sum)
);
dot!(
    /// Products of f32 with bf16, which become f32 by sixteen bits of zeros behind theirs.
    dot_f32_bf16,
    (f32, load_f32!()),
    (bf16, |mask: u64, from: *const bf16| {
        let halves = _mm256_maskz_loadu_epi16(mask as __mmask16, from.cast());
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
    }),
    "avx512f,avx512bw,avx512vl",
    |sum, a, b| _mm512_fmadd_ps(a, b, sum)
);
dot!(
    /// Products of f32 with f16.
    dot_f32_f16,
    (f32, load_f32!()),
    (f16, |mask: u64, from: *const f16| _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask as __mmask16, from.cast()))),
    "avx512f,avx512bw,avx512vl",
    |sum, a, b| _mm512_fmadd_ps(a, b, sum)
);

/// Thirty-two bf16.
macro_rules! load_bf16 {
    () => {
        |mask: u64, from: *const bf16| _mm512_maskz_loadu_epi16(mask as __mmask32, from.cast())
    };
}

dot!(
    /// Products of bf16.
    dot_bf16,
    (bf16, load_bf16!()),
    (bf16, load_bf16!()),
    "avx512f,avx512bw,avx512bf16",
    |sum, a: __m512i, b: __m512i| {
        #[allow(unsafe_code, reason = "no intrinsic converts between these two views of a register")]
        // SAFETY: both are 64 bytes for which every pattern is valid.
        let (a, b) = unsafe { (transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)) };
        _mm512_dpbf16_ps(sum, a, b)
    }
);

/// `to[i] = from[i]`, rounded to nearest even; subnormal numbers become zero. Lengths are whole vectors.
///
/// # Safety
/// The processor has AVX-512 with bf16.
#[allow(unsafe_code, reason = "intrinsics on pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn narrow(from: &[f32], to: &mut [bf16]) {
    for (from, to) in from.as_chunks::<LANES>().0.iter().zip(to.as_chunks_mut::<LANES>().0) {
        // SAFETY: sixteen f32 are read, and sixteen bf16 of two bytes written.
        unsafe {
            let halves = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from.as_ptr())));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), halves);
        }
    }
}

/// `to[i]` = the pair of `low[i]` and `high[i]`, rounded as by [`narrow`]. Lengths are whole vectors.
///
/// # Safety
/// The processor has AVX-512 with bf16.
#[allow(unsafe_code, reason = "intrinsics on pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn narrow_pairs(low: &[f32], high: &[f32], to: &mut [u32]) {
    let rows = low.as_chunks::<LANES>().0.iter().zip(high.as_chunks::<LANES>().0);
    for ((low, high), to) in rows.zip(to.as_chunks_mut::<LANES>().0) {
        // SAFETY: sixteen elements of each slice.
        unsafe {
            let wide = |x: &[f32; LANES]| {
                let halves = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr())));
                _mm512_cvtepu16_epi32(halves)
            };
            let pairs = _mm512_or_si512(wide(low), _mm512_slli_epi32::<16>(wide(high)));
            _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs);
        }
    }
}

/// The transpose of a square of 32-bit elements.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn transposed(r: [__m512i; LANES]) -> [__m512i; LANES] {
    let zero = _mm512_setzero_si512();
    // Within each quarter of 128 bits: squares of two, then of four.
    let mut twos = [zero; LANES];
    for i in (0..LANES).step_by(2) {
        twos[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        twos[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    let mut fours = [zero; LANES];
    for i in (0..LANES).step_by(4) {
        for j in 0..2 {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(twos[i + j], twos[i + j + 2]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(twos[i + j], twos[i + j + 2]);
        }
    }
    // `fours[4 i + j]` has column `4 q + j` of rows `4 i ..` in quarter `q`: a transpose of quarters is left.
    let mut columns = [zero; LANES];
    for j in 0..4 {
        let (a, b, c, d) = (fours[j], fours[4 + j], fours[8 + j], fours[12 + j]);
        let (low_ab, high_ab) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xDD>(a, b));
        let (low_cd, high_cd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xDD>(c, d));
        columns[j] = _mm512_shuffle_i32x4::<0x88>(low_ab, low_cd);
        columns[4 + j] = _mm512_shuffle_i32x4::<0x88>(high_ab, high_cd);
        columns[8 + j] = _mm512_shuffle_i32x4::<0xDD>(low_ab, low_cd);
        columns[12 + j] = _mm512_shuffle_i32x4::<0xDD>(high_ab, high_cd);
    }
    columns
}
