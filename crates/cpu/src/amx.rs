//! AMX: products of tiles of bf16, 16 rows of 64 bytes each, summed in f32.
//!
//! The compiler has no stable intrinsics for it and never touches a tile by itself, so a kernel is one block of assembly that leaves
//! nothing behind in the tiles. Only their configuration outlives it, for as long as there is a [`Tiles`].
//!
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.

use std::{arch::asm, marker::PhantomData, sync::OnceLock};

/// Rows of a tile, and columns of one of f32.
pub(crate) const SIDE: usize = 16;
/// Elements of the dimension summed over in a tile.
pub(crate) const DEPTH: usize = 32;
/// 32-bit elements of a tile.
pub(crate) const TILE: usize = SIDE * SIDE;
/// Rows and columns of a result that is kept in tiles: four of them, which leaves two for each factor.
pub(crate) const BLOCK: usize = 2 * SIDE;
/// Bytes of a row of a tile.
const ROW_BYTES: usize = 4 * SIDE;
/// Most products of parts that make one product of factors.
const MAX_PRODUCTS: usize = 6;

/// Whether the processor has tiles of bf16 and the system lets this process use them, which it has to be asked for.
pub(crate) fn is_available() -> bool {
    static IS_AVAILABLE: OnceLock<bool> = OnceLock::new();
    *IS_AVAILABLE.get_or_init(|| {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        const LEAF: u32 = 7;
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let features = if __cpuid(0).eax < LEAF { 0 } else { __cpuid_count(LEAF, 0).edx };
        features & AMX_BF16 != 0 && features & AMX_TILE != 0 && is_permitted()
    })
}

/// Asks the system for the state of tiles, which every thread of this process then has.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    #[allow(unsafe_code, reason = "a system call that the standard library has not")]
    // SAFETY: the call reads its two numbers and no memory; where the system does not know it, it gives an error.
    let answer = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
    answer == 0
}

/// Other systems are not asked.
#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// This thread's tiles, all configured to their full size.
pub(crate) struct Tiles(PhantomData<*const ()>);

#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of sixteen rows of 64 bytes.
static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Tiles {
    /// # Safety
    /// [`is_available`].
    #[allow(unsafe_code, reason = "instructions that not every processor has")]
    pub(crate) unsafe fn configure() -> Self {
        // SAFETY: the caller's promise; the configuration is one of 64 bytes that the processor's only palette allows.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, preserves_flags, readonly));
        }
        Self(PhantomData)
    }
}

impl Drop for Tiles {
    #[allow(unsafe_code, reason = "instructions that not every processor has")]
    fn drop(&mut self) {
        // SAFETY: whoever made this promised that the processor has the instruction.
        unsafe {
            asm!("tilerelease", options(nostack, preserves_flags, nomem));
        }
    }
}

/// Which parts of two factors are multiplied, in which order, and how far apart their tiles lie.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Products {
    /// Bytes from a step of the dimension summed over to the next, of each factor.
    steps: [usize; 2],
    /// Bytes of `list` that are in use.
    used: usize,
    /// Where in a step a part of either factor lies, in bytes, or [`KEPT`].
    list: [[isize; 2]; MAX_PRODUCTS],
}

/// A part that is in its tiles since the product before.
const KEPT: isize = -1;

/// Products of parts, each of which has one of them in common with the one before it, which is not loaded again: otherwise a block
/// would load as many tiles as it multiplies. What is left out by [`Products::new`] is not here.
const ORDER: [[usize; 2]; MAX_PRODUCTS] = [[0, 2], [0, 1], [1, 1], [1, 0], [0, 0], [2, 0]];

impl Products {
    /// The products of factors in `parts` parts each, whose blocks have `sides` tiles each. A part is 2^-8 of the one before it or
    /// less: products of parts `i` and `j` with `i + j > 2` are 2^-24 of the whole or less, which f32 rounds away, and left out.
    pub(crate) fn new(parts: [usize; 2], sides: [usize; 2]) -> Self {
        let tile_bytes = 4 * TILE;
        let mut products = Self {
            steps: [0, 1].map(|side| parts[side] * sides[side] * tile_bytes),
            used: 0,
            list: [[KEPT; 2]; MAX_PRODUCTS],
        };
        let pairs = ORDER.into_iter().filter(|pair| pair[0] < parts[0] && pair[1] < parts[1]);
        let mut before = None;
        for (slot, pair) in products.list.iter_mut().zip(pairs) {
            for side in [0, 1] {
                if before.is_none_or(|before: [usize; 2]| before[side] != pair[side]) {
                    slot[side] = (pair[side] * sides[side] * tile_bytes).cast_signed();
                }
            }
            products.used += size_of_val(slot);
            before = Some(pair);
        }
        products
    }
}

/// Tiles of the left factor.
macro_rules! left {
    (1) => {
        "tileloadd tmm4, [{from} + {row}]"
    };
    (2) => {
        concat!(left!(1), "\n tileloadd tmm5, [{from} + {row} + 1024]")
    };
}

/// Tiles of the right factor.
macro_rules! right {
    (1) => {
        "tileloadd tmm6, [{from} + {row}]"
    };
    (2) => {
        concat!(right!(1), "\n tileloadd tmm7, [{from} + {row} + 1024]")
    };
}

/// Asks for as many tiles, line by line.
macro_rules! prefetch {
    (1) => {
        prefetch!("0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15")
    };
    (2) => {
        concat!(prefetch!(1), "\n", prefetch!("16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31"))
    };
    ($lines:literal) => {
        concat!(".irp line, ", $lines, "\n prefetcht0 [{from} + 64 * \\line] \n .endr")
    };
}

/// A kernel for a block of one or two tiles by one or two.
///
/// What a factor has in the next step is asked for as soon as the same part of this step is loaded; that of the left one only where
/// there are several products to hide it behind.
macro_rules! block {
    (
        $name:ident, $across:tt by $others:tt,
        [$($load:literal),*], [$($zero:literal),*], [$($product:literal),*], [$($store:literal),*]
    ) => {
        /// # Safety
        /// As for [`Tiles::multiply`].
        #[allow(unsafe_code, reason = "assembly")]
        unsafe fn $name(products: &Products, [a, b, ahead]: [*const u32; 3], steps: usize, (c, c_bytes): (*mut f32, usize), add: bool) {
            // SAFETY: the caller's promises: all that is read and written lies in `a`, `b`, `c` and `products`.
            unsafe {
                asm!(
                    "test {list:e}, {list:e}",
                    "jz 2f",
                    $($load,)*
                    "jmp 3f",
                    "2:",
                    $($zero,)*
                    "3:",
                    "lea {list}, [{products} + 24]",
                    "mov {end}, [{products} + 16]",
                    "add {end}, {list}",
                    "4:",
                    "mov {from}, [{list}]",
                    "test {from}, {from}",
                    "js 5f",
                    "add {from}, {a}",
                    left!($across),
                    "cmp qword ptr [{products} + 16], 16",
                    "je 5f",
                    "add {from}, [{products}]",
                    prefetch!($across),
                    "5:",
                    "mov {from}, [{list} + 8]",
                    "test {from}, {from}",
                    "js 6f",
                    "add {from}, {b}",
                    right!($others),
                    "add {from}, [{products} + 8]",
                    prefetch!($others),
                    "6:",
                    "prefetcht1 [{ahead}]",
                    "prefetcht1 [{ahead} + 64]",
                    "add {ahead}, 128",
                    $($product,)*
                    "add {list}, 16",
                    "cmp {list}, {end}",
                    "jne 4b",
                    "prefetcht1 [{ahead}]",
                    "prefetcht1 [{ahead} + 64]",
                    "add {ahead}, 128",
                    "add {a}, [{products}]",
                    "add {b}, [{products} + 8]",
                    "dec {steps}",
                    "jnz 3b",
                    $($store,)*
                    products = in(reg) products,
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    steps = inout(reg) steps => _,
                    c = in(reg) c,
                    below = in(reg) c.wrapping_byte_add(SIDE * c_bytes),
                    c_bytes = in(reg) c_bytes,
                    row = in(reg) ROW_BYTES,
                    ahead = inout(reg) ahead => _,
                    list = inout(reg) usize::from(add) => _,
                    end = out(reg) _,
                    from = out(reg) _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack)
                );
            }
        }
    };
}

block!(
    two_by_two,
    2 by 2,
    [
        "tileloadd tmm0, [{c} + {c_bytes}]",
        "tileloadd tmm1, [{c} + {c_bytes} + 64]",
        "tileloadd tmm2, [{below} + {c_bytes}]",
        "tileloadd tmm3, [{below} + {c_bytes} + 64]"
    ],
    ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
    [
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tdpbf16ps tmm2, tmm5, tmm6",
        "tdpbf16ps tmm3, tmm5, tmm7"
    ],
    [
        "tilestored [{c} + {c_bytes}], tmm0",
        "tilestored [{c} + {c_bytes} + 64], tmm1",
        "tilestored [{below} + {c_bytes}], tmm2",
        "tilestored [{below} + {c_bytes} + 64], tmm3"
    ]
);
block!(
    two_by_one,
    2 by 1,
    ["tileloadd tmm0, [{c} + {c_bytes}]", "tileloadd tmm2, [{below} + {c_bytes}]"],
    ["tilezero tmm0", "tilezero tmm2"],
    ["tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm2, tmm5, tmm6"],
    ["tilestored [{c} + {c_bytes}], tmm0", "tilestored [{below} + {c_bytes}], tmm2"]
);
block!(
    one_by_two,
    1 by 2,
    ["tileloadd tmm0, [{c} + {c_bytes}]", "tileloadd tmm1, [{c} + {c_bytes} + 64]", "/* {below} */"],
    ["tilezero tmm0", "tilezero tmm1"],
    ["tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7"],
    ["tilestored [{c} + {c_bytes}], tmm0", "tilestored [{c} + {c_bytes} + 64], tmm1"]
);
block!(
    one_by_one,
    1 by 1,
    ["tileloadd tmm0, [{c} + {c_bytes}]", "/* {below} */"],
    ["tilezero tmm0"],
    ["tdpbf16ps tmm0, tmm4, tmm6"],
    ["tilestored [{c} + {c_bytes}], tmm0"]
);

impl Tiles {
    /// `c = a b` or `c += a b` of a block whose factors have one or two tiles across, `sides`. For each of `steps` of the dimension
    /// summed over, `a` and `b` hold the tiles of each part, a part after the other: those of `a` rows of 32 elements, those of `b`
    /// sixteen rows of pairs. Rows of `c` are `c_bytes` apart. What the third address of `factors` points to is asked for on the way,
    /// 256 bytes a step or more: it may be any.
    ///
    /// # Safety
    /// `products` is for these `sides`; `a` and `b` hold `steps` of its steps; `c` holds sixteen rows for each tile of `a`, of sixteen
    /// f32 for each of `b`; `steps` is not 0.
    #[allow(unsafe_code, reason = "forwards the promises of its caller")]
    pub(crate) unsafe fn multiply(
        &self,
        (products, sides): (&Products, [usize; 2]),
        (factors, steps): ([*const u32; 3], usize),
        c: (*mut f32, usize),
        add: bool,
    ) {
        // SAFETY: the caller's promises; the tiles are configured while `self` lives, on the thread that it cannot leave.
        unsafe {
            match sides {
                [1, 1] => one_by_one(products, factors, steps, c, add),
                [1, _] => one_by_two(products, factors, steps, c, add),
                [_, 1] => two_by_one(products, factors, steps, c, add),
                _ => two_by_two(products, factors, steps, c, add),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every product of parts that counts is there once, whichever part stays in its tiles.
    #[test]
    fn products_that_keep_a_part_are_all_there() {
        for (left, right) in (1..=3).flat_map(|left| (1..=3).map(move |right| (left, right))) {
            let sides = [2, 1];
            let products = Products::new([left, right], sides);
            let mut loaded = [KEPT; 2];
            let mut found: Vec<[usize; 2]> = Vec::new();
            for entry in &products.list[..products.used / size_of::<[isize; 2]>()] {
                for side in [0, 1] {
                    if entry[side] != KEPT {
                        loaded[side] = entry[side];
                    }
                }
                found.push([0, 1].map(|side| loaded[side].cast_unsigned() / (sides[side] * 4 * TILE)));
            }
            found.sort_unstable();
            let expected: Vec<[usize; 2]> =
                (0..left).flat_map(|i| (0..right).map(move |j| [i, j])).filter(|[i, j]| i + j < 3).collect();
            assert_eq!(found, expected, "{left} and {right} parts");
        }
    }
}
