//! Reductions of whole tensors to one f32, in two steps of fixed order: each cube folds its share into the workspace, then one
//! cube folds the workspace. No atomics, so the same input gives the same bits.
//!
//! A reduction over several tensors gives each, or each launch of several of them, a range of one workspace, and the second step is
//! launched once. Traffic: every element is read once.
//!
//! The norm keeps three sums, of squares of large elements scaled down, of small ones scaled up, and of the others, so that no
//! square overflows or vanishes; one pass is enough for that, unlike scaling by the largest element (Blue 1978, ACM TOMS 4(1)). It
//! counts elements that are not finite beside them.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, cube_reduce_bytes, cube_sum, unchecked, vector_sum};

use crate::groups::by_width;

/// Elements that a cube folds, at least, before another cube joins.
const PART_ELEMENTS: usize = 4096;
/// Cubes that fold one tensor, at most.
const MAX_PARTS: usize = 1024;
/// Sums of a part of a norm: large, middling and small elements, and how many are not finite.
const NORM_SUMS: usize = 4;

/// Partial results of a tensor of `len` elements; none for an empty one, whose first step launches nothing.
pub fn parts(len: usize) -> usize {
    len.div_ceil(PART_ELEMENTS).min(MAX_PARTS)
}

/// Elements of the f32 workspace for `parts` partial results, over all tensors of the reduction.
pub fn workspace_len(reduction: Reduction, parts: usize) -> usize {
    let sums = if reduction == Reduction::Norm { NORM_SUMS } else { 1 };
    parts.max(1) * sums
}

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduction {
    /// Sum of all elements.
    Sum,
    /// Square root of the sum of all squares.
    Norm,
    /// 1 if no element is infinite or NaN, else 0.
    AllFinite,
}

/// Partial results of one tensor.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// `[len]`
    pub x: &'a Handle,
    /// Number of elements.
    pub len: usize,
    /// f32 `[workspace_len(reduction, total_parts)]`; results `at .. at + parts(len)` are overwritten.
    pub workspace: &'a Handle,
    /// Position of the first partial result.
    pub at: usize,
    /// Partial results in the workspace.
    pub total_parts: usize,
}

impl Part<'_> {
    fn place(&self) -> (usize, usize, usize) {
        (self.len, self.at, self.total_parts)
    }
}

/// The grid of a first step, and its workspace argument.
fn partial_grid<R: Runtime>(
    launch: &Launch<'_, R>,
    reduction: Reduction,
    workspace: &Handle,
    (len, at, total_parts): (usize, usize, usize),
) -> Result<(CubeCount, CubeDim, ArrayArg<R>), LaunchError> {
    let units = launch.units_for(PART_ELEMENTS);
    let dim = CubeDim::new_1d(units as u32);
    let sums = workspace_len(reduction, 1);
    launch.cube(dim, sums * cube_reduce_bytes(units))?;
    let parts = parts(len);
    let needed = at.saturating_add(parts).max(total_parts);
    let workspace = launch.array::<f32>("workspace", workspace, workspace_len(reduction, needed))?;
    Ok((launch.cubes(parts, 1, 1)?, dim, workspace))
}

/// Launches the first step of [`Reduction::Sum`] on a tensor of `E`.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn partial_sum<R: Runtime, E: Float>(client: &ComputeClient<R>, part: Part<'_>) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "sum");
    launch.element::<E>()?;
    if part.len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(part.len);
    let (count, dim, workspace) = partial_grid(&launch, Reduction::Sum, part.workspace, part.place())?;
    let x = launch.vectors::<E>("x", part.x, part.len, width)?;
    let (items, at, units) = ((part.len / width) as u32, part.at as u32, dim.x as usize);
    unchecked!(partial_sum_kernel::launch_unchecked::<E, R>(client, count, dim, width, x, workspace, items, at, units));
    Ok(())
}

/// Grid: units stride over vectors; cube = partial result.
#[cube(launch_unchecked)]
fn partial_sum_kernel<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    workspace: &mut Array<f32>,
    items: u32,
    at: u32,
    #[comptime] units: usize,
) {
    let mut sum = Vector::<f32, N>::new(0.0);
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        sum += Vector::<f32, N>::cast_from(x[i]);
        i += CUBE_COUNT * units;
    }
    let total = cube_sum(vector_sum::<N>(sum), units);
    if UNIT_POS == 0 {
        workspace[at as usize + CUBE_POS] = total;
    }
}

/// Exponent bits of 2^48. Elements from here on are squared scaled down: 2^31 squares of what is below do not overflow.
const LARGE: u32 = 127 + 48;
/// Large elements are scaled by 2^-80.
const SHRINK: u32 = 80;
/// Exponent bits of 2^-63. Elements below are squared scaled up, because their squares would be subnormal.
const SMALL: u32 = 127 - 63;
/// Small elements are scaled by 2^75.
const GROW: u32 = 75;
/// Exponent bits of what is infinite or NaN.
const NOT_FINITE: u32 = 255;

/// Tensors of a launch, at most, where the device binds as many buffers.
const MOST: usize = 8;

/// The tensors of a norm, by launches.
#[derive(Clone, Debug)]
pub struct NormPlan<'a> {
    /// Tensors with their lengths, and the width of the vectors that they are read in.
    launches: Vec<(Vec<(&'a Handle, usize)>, usize)>,
}

impl<'a> NormPlan<'a> {
    /// Tensors of one element type, with their numbers of elements: as few launches as the device's bindings allow.
    pub fn new<R: Runtime>(client: &ComputeClient<R>, tensors: &[(&'a Handle, usize)]) -> Self {
        let launch = Launch::new(client, "grad_norm");
        // Beside the workspace and the scalars.
        let most = (client.properties().hardware.max_bindings as usize).saturating_sub(2).clamp(1, MOST);
        let mut launches = Vec::new();
        for (width, group) in by_width(&launch, tensors, |(_, len)| *len) {
            launches.extend(group.chunks(most).map(|tensors| (tensors.to_vec(), width)));
        }
        Self { launches }
    }

    /// Partial results of all launches.
    pub fn parts(&self) -> usize {
        self.launches.iter().map(|(tensors, _)| parts_of(tensors)).sum()
    }
}

/// Enough cubes for the longest of these tensors; each walks over all of them.
fn parts_of(tensors: &[(&Handle, usize)]) -> usize {
    parts(tensors.iter().map(|(_, len)| *len).max().unwrap_or(0))
}

/// Launches the first step of [`Reduction::Norm`] on tensors of `E`. The results `at .. at + plan.parts()` of `workspace`, f32
/// `[workspace_len(reduction, total_parts)]`, are overwritten.
///
/// # Errors
/// As [`partial_sum`].
pub fn partial_norm<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    plan: &NormPlan<'_>,
    workspace: &Handle,
    (at, total_parts): (usize, usize),
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "grad_norm");
    launch.element::<E>()?;
    let mut at = at;
    for (tensors, width) in &plan.launches {
        let width = *width;
        let (len, of_launch) = (tensors.iter().map(|(_, len)| *len).max().unwrap_or(0), parts_of(tensors));
        let (count, dim, workspace) = partial_grid(&launch, Reduction::Norm, workspace, (len, at, total_parts))?;
        let arrays = tensors.iter().map(|(x, len)| launch.vectors::<E>("x", x, *len, width));
        let items = tensors.iter().map(|(_, len)| (len / width) as u32).collect::<SequenceArg<R, _>>();
        let arrays = arrays.collect::<Result<SequenceArg<R, _>, _>>()?;
        let units = dim.x as usize;
        unchecked!(partial_norm_kernel::launch_unchecked::<E, R>(
            client, count, dim, width, arrays, items, workspace, at as u32, units
        ));
        at += of_launch;
    }
    Ok(())
}

/// Grid: units stride over the vectors of each tensor in turn; cube = partial result.
#[cube(launch_unchecked)]
fn partial_norm_kernel<E: Float, N: Size>(
    tensors: &Sequence<Array<Vector<E, N>>>,
    items: &Sequence<u32>,
    workspace: &mut Array<f32>,
    at: u32,
    #[comptime] units: usize,
) {
    let mut sums = NormSums { large: 0.0, middling: 0.0, small: 0.0, bad: 0.0 };
    #[unroll]
    for t in 0..tensors.len() {
        add_squares::<E, N>(tensors.index(t), *items.index(t), &mut sums, units);
    }
    let large = cube_sum(sums.large, units);
    let middling = cube_sum(sums.middling, units);
    let small = cube_sum(sums.small, units);
    let bad = cube_sum(sums.bad, units);
    if UNIT_POS == 0 {
        let to = (at as usize + CUBE_POS) * NORM_SUMS;
        workspace[to] = large;
        workspace[to + 1] = middling;
        workspace[to + 2] = small;
        workspace[to + 3] = bad;
    }
}

/// Sums of squares by the size of the elements, and the number of those that are not finite.
#[derive(CubeType)]
struct NormSums {
    large: f32,
    middling: f32,
    small: f32,
    bad: f32,
}

#[cube]
fn add_squares<E: Float, N: Size>(x: &Array<Vector<E, N>>, items: u32, sums: &mut NormSums, #[comptime] units: usize) {
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        let vector = Vector::<f32, N>::cast_from(x[i]);
        #[unroll]
        for component in 0..vector.size() {
            let value = vector[component];
            // By bits: a compiler of shaders may turn `(x * s) * (x * s)` into `x * x * (s * s)`, and may assume that no value
            // is infinite.
            let bits = u32::reinterpret(value) & 0x7FFF_FFFFu32;
            let exponent = bits >> 23u32;
            if exponent == NOT_FINITE {
                sums.bad += 1.0;
            } else if exponent >= LARGE {
                let scaled = f32::reinterpret(bits - comptime!(SHRINK << 23));
                sums.large += scaled * scaled;
            } else if exponent < SMALL {
                // Subnormal elements, which many devices take for zero, count as zero.
                if exponent > 0u32 {
                    let scaled = f32::reinterpret(bits + comptime!(GROW << 23));
                    sums.small += scaled * scaled;
                }
            } else {
                sums.middling += value * value;
            }
        }
        i += CUBE_COUNT * units;
    }
}

/// Where the exponent of an element is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exponent {
    /// f32
    F32,
    /// f16
    F16,
    /// bf16
    BF16,
}

impl Exponent {
    /// Elements of a 32-bit word.
    fn per_word(self) -> usize {
        if self == Exponent::F32 { 1 } else { 2 }
    }

    /// The exponent bits of the first and of the last element of a word.
    fn masks(self) -> (u32, u32) {
        match self {
            Exponent::F32 => (0x7F80_0000, 0x7F80_0000),
            Exponent::F16 => (0x7C00, 0x7C00_0000),
            Exponent::BF16 => (0x7F80, 0x7F80_0000),
        }
    }
}

/// Launches the first step of [`Reduction::AllFinite`]. It looks at bits, because compilers of shaders may assume that no value is
/// infinite or NaN; so it takes types that the device cannot compute with as well.
///
/// # Errors
/// As [`partial_sum`].
pub fn partial_finite<R: Runtime>(
    client: &ComputeClient<R>,
    exponent: Exponent,
    part: Part<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "all_finite");
    if part.len == 0 {
        return Ok(());
    }
    let words = part.len.div_ceil(exponent.per_word());
    let width = launch.vector_width::<u32>(words);
    let (count, dim, workspace) = partial_grid(&launch, Reduction::AllFinite, part.workspace, part.place())?;
    let x = launch.vectors::<u32>("x", part.x, words, width)?;
    let (first, last) = exponent.masks();
    // The upper half of the last word may be padding, which holds anything.
    let tail = if part.len.is_multiple_of(exponent.per_word()) { u32::MAX } else { 0xFFFF };
    let (items, at, units) = ((words / width) as u32, part.at as u32, dim.x as usize);
    unchecked!(partial_finite_kernel::launch_unchecked::<R>(
        client, count, dim, width, x, workspace, items, at, first, last, tail, units
    ));
    Ok(())
}

/// Grid as [`partial_sum_kernel`], over words. A partial result is the number of words with a bad element.
#[cube(launch_unchecked)]
fn partial_finite_kernel<N: Size>(
    x: &Array<Vector<u32, N>>,
    workspace: &mut Array<f32>,
    items: u32,
    at: u32,
    first: u32,
    last: u32,
    tail: u32,
    #[comptime] units: usize,
) {
    let width = N::value();
    let mut bad = 0.0f32;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        let vector = x[i];
        #[unroll]
        for component in 0..width {
            let mut word = vector[component];
            if i + 1 == items as usize && comptime!(component + 1 == width) {
                word &= tail;
            }
            if word & first == first || word & last == last {
                bad += 1.0;
            }
        }
        i += CUBE_COUNT * units;
    }
    let total = cube_sum(bad, units);
    if UNIT_POS == 0 {
        workspace[at as usize + CUBE_POS] = total;
    }
}

/// Launches the second step: folds `parts` partial results into `out`, f32 `[1]`.
///
/// # Errors
/// As [`partial_sum`].
pub fn fold<R: Runtime>(
    client: &ComputeClient<R>,
    reduction: Reduction,
    parts: usize,
    workspace: &Handle,
    out: &Handle,
) -> Result<(), LaunchError> {
    let name = match reduction {
        Reduction::Sum => "sum",
        Reduction::Norm => "grad_norm",
        Reduction::AllFinite => "all_finite",
    };
    let launch = Launch::new(client, name);
    let units = launch.units_for(MAX_PARTS);
    let dim = CubeDim::new_1d(units as u32);
    launch.cube(dim, workspace_len(reduction, 1) * cube_reduce_bytes(units))?;
    let workspace = launch.array::<f32>("workspace", workspace, workspace_len(reduction, parts))?;
    let (out, count) = (launch.array::<f32>("out", out, 1)?, launch.cubes(1, 1, 1)?);
    if reduction == Reduction::Norm {
        unchecked!(fold_norm_kernel::launch_unchecked::<R>(
            client,
            count,
            dim,
            workspace,
            out,
            parts as u32,
            f32::NAN,
            units
        ));
    } else {
        let count_bad = reduction == Reduction::AllFinite;
        unchecked!(fold_sum_kernel::launch_unchecked::<R>(
            client,
            count,
            dim,
            workspace,
            out,
            parts as u32,
            count_bad,
            units
        ));
    }
    Ok(())
}

/// Sum of the partial results `offset`, `offset + stride`, ... up to `len`, the same on every unit.
#[cube]
pub(crate) fn fold_strided(
    workspace: &Array<f32>,
    len: usize,
    stride: usize,
    offset: usize,
    #[comptime] units: usize,
) -> f32 {
    let mut sum = 0.0f32;
    let mut i = UNIT_POS as usize * stride + offset;
    while i < len {
        sum += workspace[i];
        i += units * stride;
    }
    cube_sum(sum, units)
}

/// Grid: one cube.
#[cube(launch_unchecked)]
fn fold_sum_kernel(
    workspace: &Array<f32>,
    out: &mut Array<f32>,
    parts: u32,
    #[comptime] none_is_one: bool,
    #[comptime] units: usize,
) {
    let mut total = fold_strided(workspace, parts as usize, 1, 0, units);
    if comptime!(none_is_one) {
        total = select(total == 0.0, 1.0, 0.0);
    }
    if UNIT_POS == 0 {
        out[0] = total;
    }
}

/// 2^-80, which large elements were scaled by.
const SHRINK_FACTOR: f32 = 1.0 / ((1u128 << SHRINK) as f32);
/// 2^75, which small elements were scaled by.
const GROW_FACTOR: f32 = (1u128 << GROW) as f32;
/// 2^-30: beside a norm above it, 2^31 small elements are less than half a unit in the last place.
const NEGLIGIBLE: f32 = 1.0 / ((1u64 << 30) as f32);

/// Grid: one cube.
#[cube(launch_unchecked)]
fn fold_norm_kernel(
    workspace: &Array<f32>,
    out: &mut Array<f32>,
    parts: u32,
    // Shading languages have no literal for it.
    nan: f32,
    #[comptime] units: usize,
) {
    let len = parts as usize * NORM_SUMS;
    let large = fold_strided(workspace, len, NORM_SUMS, 0, units);
    let middling = fold_strided(workspace, len, NORM_SUMS, 1, units);
    let small = fold_strided(workspace, len, NORM_SUMS, 2, units);
    let bad = fold_strided(workspace, len, NORM_SUMS, 3, units);
    if UNIT_POS == 0 {
        let root = f32::sqrt(middling);
        if bad > 0.0 {
            out[0] = nan;
        } else if large > 0.0 {
            let shrunk = root * f32::new(SHRINK_FACTOR);
            out[0] = f32::sqrt(large + shrunk * shrunk) / f32::new(SHRINK_FACTOR);
        } else if small > 0.0 && root < f32::new(NEGLIGIBLE) {
            let grown = root * f32::new(GROW_FACTOR);
            out[0] = f32::sqrt(grown * grown + small) / f32::new(GROW_FACTOR);
        } else {
            out[0] = root;
        }
    }
}
