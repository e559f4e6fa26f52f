//! Micro-kernels: a tile of the result from two packed panels, by vectors.

use super::{isa::Isa, pack::Panels};
#[cfg(target_arch = "x86_64")]
use crate::avx512::{self, Operands};

/// Rows of a tile: with four vectors of AVX-512 or two of AVX2 they fill the registers.
pub(super) const ROWS: usize = 6;
/// Width of a panel of the left factor: squares of eight lines can be transposed into it.
pub(super) const LEFT_WIDTH: usize = 8;

/// What a micro-kernel works on: `c = a b` or `c += a b`, where `a` is `[depth][8]`, of which six are used, `b` is
/// `[depth][width]`, and `c` is `[6][width]` for a `width` of one step of the kernel or more. In a kernel of pairs an element of the
/// panels is two bf16 neighbours of the dimension summed over.
pub(super) struct Tile<'a> {
    pub(super) depth: usize,
    pub(super) width: usize,
    pub(super) a: &'a [u32],
    pub(super) b: &'a [u32],
    pub(super) c: &'a mut [f32],
    pub(super) add: bool,
}

/// A path through the processor.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    /// The width of a panel of the right factor is a multiple of it.
    step: usize,
    /// Width of every panel of the right factor but the last.
    panel: usize,
    /// Elements of a panel are pairs of bf16.
    pub(super) pairs: bool,
    isa: Isa,
}

impl Kernel {
    /// The kernel for a product of two matrices, both of bf16 or not.
    pub(super) fn new(isa: Isa, both_bf16: bool) -> Self {
        // Twelve sums, two vectors and a factor of sixteen registers; 24, four and one of 32.
        let (step, panel) = match isa {
            Isa::Portable | Isa::Avx2 => (lanes::STEP, 2 * lanes::STEP),
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => (16, 64),
        };
        Self { step, panel, pairs: both_bf16 && isa.multiplies_pairs(), isa }
    }

    pub(super) fn left_panels(self) -> Panels {
        Panels { lines: ROWS, width: LEFT_WIDTH, step: LEFT_WIDTH }
    }

    pub(super) fn right_panels(self) -> Panels {
        Panels { lines: self.panel, width: self.panel, step: self.step }
    }

    pub(super) fn run(self, tile: Tile<'_>) {
        let Tile { depth, width, .. } = tile;
        assert!(width.is_multiple_of(self.step) && width <= self.panel, "a panel is whole steps wide");
        assert!(tile.a.len() >= depth * LEFT_WIDTH && tile.b.len() >= depth * width, "panels are whole");
        assert!(tile.c.len() >= ROWS * width, "the tile of the result is whole");
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                let Some(v3) = pulp::x86::V3::try_new() else { unreachable!("a kernel is made for this processor") };
                lanes::run(v3, tile);
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
                let (a, b, c) = (tile.a.as_ptr(), tile.b.as_ptr(), tile.c.as_mut_ptr());
                let strides = Operands {
                    depth,
                    a,
                    a_row: 1,
                    a_col: LEFT_WIDTH,
                    b,
                    b_row: width,
                    c,
                    c_row: width,
                    add: tile.add,
                    ahead: 16 * LEFT_WIDTH,
                };
                #[allow(unsafe_code, reason = "compiled for instructions that not every processor has")]
                // SAFETY: `Isa::choose` gives only what the processor has; the lengths are asserted above.
                unsafe {
                    avx512::tile((ROWS, width / avx512::LANES), self.pairs, strides);
                }
            }
            #[cfg(target_arch = "aarch64")]
            _ => match pulp::aarch64::Neon::try_new() {
                Some(neon) => lanes::run(neon, tile),
                None => portable(tile),
            },
            #[cfg(not(target_arch = "aarch64"))]
            _ => portable(tile),
        }
    }
}

/// Three rows of eight columns at a time fit the registers of any vector unit.
#[cfg_attr(target_arch = "aarch64", allow(dead_code, reason = "for processors without Neon"))]
fn portable(tile: Tile<'_>) {
    let Tile { depth, width, a, b, c, add } = tile;
    let (a, b) = (bytemuck::cast_slice::<u32, f32>(a), bytemuck::cast_slice::<u32, f32>(b));
    for i in (0..ROWS).step_by(3) {
        for j in (0..width).step_by(8) {
            let mut sums = [[0.0f32; 8]; 3];
            let panels = a.chunks_exact(LEFT_WIDTH).zip(b.chunks_exact(width)).take(depth);
            for (a, b) in panels {
                let (a, b) = (&a[i..i + 3], &b[j..j + 8]);
                for (sums, a) in sums.iter_mut().zip(a) {
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum += a * b;
                    }
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                let c = &mut c[(i + row) * width + j..][..8];
                for (c, sum) in c.iter_mut().zip(sums) {
                    *c = if add { *c + sum } else { *sum };
                }
            }
        }
    }
}

/// Vectors of four or eight f32.
mod lanes {
    use pulp::{Simd, WithSimd};

    use super::{LEFT_WIDTH, ROWS, Tile};

    /// Columns of a step, two vectors of Neon.
    pub(super) const STEP: usize = 8;

    #[cfg_attr(
        not(any(target_arch = "x86_64", target_arch = "aarch64")),
        allow(dead_code, reason = "for vector units")
    )]
    pub(super) fn run<S: Simd>(simd: S, tile: Tile<'_>) {
        const { assert!(STEP.is_multiple_of(S::F32_LANES), "a step is whole vectors") };
        simd.vectorize(Rows(tile));
    }

    struct Rows<'a>(Tile<'a>);

    impl WithSimd for Rows<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            match self.0.width / S::F32_LANES {
                1 => self.rows::<S, 1>(simd),
                2 => self.rows::<S, 2>(simd),
                _ => self.rows::<S, 4>(simd),
            }
        }
    }

    impl Rows<'_> {
        /// All rows of `V` vectors.
        #[inline(always)]
        fn rows<S: Simd, const V: usize>(self, simd: S) {
            let Tile { depth, width, a, b, c, add } = self.0;
            let mut sums = [[simd.splat_f32s(0.0); V]; ROWS];
            let (mut a, mut b) = (a.as_ptr().cast::<f32>(), b.as_ptr().cast::<f32>());
            for _ in 0..depth {
                let mut vectors = [simd.splat_f32s(0.0); V];
                for (v, vector) in vectors.iter_mut().enumerate() {
                    #[allow(unsafe_code, reason = "bounds checks would double the instructions of this loop")]
                    // SAFETY: `Kernel::run` has checked that `b` holds `depth` rows of `width`, which is `V` vectors.
                    unsafe {
                        *vector = b.wrapping_add(v * S::F32_LANES).cast::<S::f32s>().read_unaligned();
                    }
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    #[allow(unsafe_code, reason = "as above")]
                    // SAFETY: `Kernel::run` has checked that `a` holds `depth` rows of eight.
                    let factor = simd.splat_f32s(unsafe { a.wrapping_add(r).read_unaligned() });
                    for (sum, vector) in sums.iter_mut().zip(vectors) {
                        *sum = simd.mul_add_e_f32s(factor, vector, *sum);
                    }
                }
                a = a.wrapping_add(LEFT_WIDTH);
                b = b.wrapping_add(width);
            }
            let c = c.as_mut_ptr();
            for (r, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    let c = c.wrapping_add(r * width + v * S::F32_LANES).cast::<S::f32s>();
                    #[allow(unsafe_code, reason = "as above")]
                    // SAFETY: `Kernel::run` has checked that `c` holds six rows of `width`.
                    unsafe {
                        c.write_unaligned(if add { simd.add_f32s(c.read_unaligned(), sum) } else { sum });
                    }
                }
            }
        }
    }
}
