//! Elementwise operators, casts and copies. Arithmetic is f32, results are rounded once to the element type.
//!
//! Work: units stride over vectors of elements. A kernel that works in place takes its buffer once, as the one it writes.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

/// What [`binary`] computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BinaryOp {
    /// `a + b`
    Add,
    /// `a * b`
    Mul,
}

impl BinaryOp {
    fn name(self) -> &'static str {
        match self {
            BinaryOp::Add => "add",
            BinaryOp::Mul => "mul",
        }
    }
}

/// Buffers of [`binary`], each of `len` elements of `E`.
#[derive(Clone, Copy, Debug)]
pub struct Binary<'a> {
    /// The left operand; `None` if it stands in `out`.
    pub a: Option<&'a Handle>,
    /// The right operand, another buffer than `out`.
    pub b: &'a Handle,
    /// Overwritten.
    pub out: &'a Handle,
}

/// Launches `out = a op b`.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn binary<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    op: BinaryOp,
    len: usize,
    args: Binary<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, op.name());
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<E>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(binary_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        // In place the kernel never reads this argument.
        launch.vectors::<E>("a", args.a.unwrap_or(args.b), len, width)?,
        launch.vectors::<E>("b", args.b, len, width)?,
        launch.vectors::<E>("out", args.out, len, width)?,
        (len / width) as u32,
        op,
        args.a.is_none(),
    ));
    Ok(())
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch_unchecked)]
fn binary_kernel<E: Float, N: Size>(
    a: &Array<Vector<E, N>>,
    b: &Array<Vector<E, N>>,
    out: &mut Array<Vector<E, N>>,
    items: u32,
    #[comptime] op: BinaryOp,
    #[comptime] in_place: bool,
) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        let right = Vector::<f32, N>::cast_from(b[i]);
        let left =
            if comptime!(in_place) { Vector::<f32, N>::cast_from(out[i]) } else { Vector::<f32, N>::cast_from(a[i]) };
        if comptime!(op == BinaryOp::Add) {
            out[i] = Vector::cast_from(left + right);
        } else {
            out[i] = Vector::cast_from(left * right);
        }
        i += step;
    }
}

/// Launches `x *= factor` on `len` elements of `E`.
///
/// # Errors
/// As [`binary`].
pub fn scale<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    len: usize,
    x: &Handle,
    factor: f32,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "scale");
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<E>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    let x = launch.vectors::<E>("x", x, len, width)?;
    unchecked!(scale_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        x,
        factor,
        (len / width) as u32
    ));
    Ok(())
}

/// Multiplies vectors `ABSOLUTE_POS`, `ABSOLUTE_POS + number of units`, ...
#[cube]
fn scale_vectors<E: Float, N: Size>(x: &mut Array<Vector<E, N>>, factor: f32, items: usize) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items {
        x[i] = Vector::cast_from(Vector::<f32, N>::cast_from(x[i]) * Vector::new(factor));
        i += step;
    }
}

/// Grid as [`binary_kernel`].
#[cube(launch_unchecked)]
fn scale_kernel<E: Float, N: Size>(x: &mut Array<Vector<E, N>>, factor: f32, items: u32) {
    scale_vectors::<E, N>(x, factor, items as usize);
}

/// Launches `x *= scalar[0]` on `len` elements of `E`; `scalar` is f32 `[1]`.
///
/// # Errors
/// As [`binary`].
pub fn scale_by<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    len: usize,
    x: &Handle,
    scalar: &Handle,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "scale_by");
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<E>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    let (x, scalar) = (launch.vectors::<E>("x", x, len, width)?, launch.array::<f32>("scalar", scalar, 1)?);
    unchecked!(scale_by_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        x,
        scalar,
        (len / width) as u32
    ));
    Ok(())
}

/// Grid as [`binary_kernel`].
#[cube(launch_unchecked)]
fn scale_by_kernel<E: Float, N: Size>(x: &mut Array<Vector<E, N>>, scalar: &Array<f32>, items: u32) {
    scale_vectors::<E, N>(x, scalar[0], items as usize);
}

/// Launches `accumulator += x`: `len` elements, f32 and `E`, in buffers of their own.
///
/// # Errors
/// As [`binary`].
pub fn accumulate<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    len: usize,
    accumulator: &Handle,
    x: &Handle,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "accumulate");
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    let accumulator = launch.vectors::<f32>("accumulator", accumulator, len, width)?;
    let x = launch.vectors::<E>("x", x, len, width)?;
    unchecked!(accumulate_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        accumulator,
        x,
        (len / width) as u32
    ));
    Ok(())
}

/// Grid as [`binary_kernel`].
#[cube(launch_unchecked)]
fn accumulate_kernel<E: Float, N: Size>(accumulator: &mut Array<Vector<f32, N>>, x: &Array<Vector<E, N>>, items: u32) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        accumulator[i] = accumulator[i] + Vector::<f32, N>::cast_from(x[i]);
        i += step;
    }
}

/// Launches `out = x` in another element type, rounded to nearest even: `len` elements, `From` and `To`.
///
/// # Errors
/// As [`binary`].
pub fn cast<R: Runtime, From: Float, To: Float>(
    client: &ComputeClient<R>,
    len: usize,
    x: &Handle,
    out: &Handle,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "cast");
    launch.element::<From>()?;
    launch.element::<To>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    let (x, out) = (launch.vectors::<From>("x", x, len, width)?, launch.vectors::<To>("out", out, len, width)?);
    unchecked!(cast_kernel::launch_unchecked::<From, To, R>(
        client,
        grid.count,
        grid.dim,
        width,
        x,
        out,
        (len / width) as u32
    ));
    Ok(())
}

/// Grid as [`binary_kernel`].
#[cube(launch_unchecked)]
fn cast_kernel<From: Float, To: Float, N: Size>(
    x: &Array<Vector<From, N>>,
    out: &mut Array<Vector<To, N>>,
    items: u32,
) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        // By way of f32, so that no pair of 16-bit types needs a conversion of its own.
        out[i] = Vector::cast_from(Vector::<f32, N>::cast_from(x[i]));
        i += step;
    }
}

/// Launches a copy of `words` 32-bit words, whatever they hold, to a buffer of its own.
///
/// # Errors
/// As [`binary`].
pub fn copy<R: Runtime>(client: &ComputeClient<R>, words: usize, x: &Handle, out: &Handle) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "copy");
    if words == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<u32>(words);
    let grid = launch.flat(words / width);
    launch.cube(grid.dim, 0)?;
    let (x, out) = (launch.vectors::<u32>("x", x, words, width)?, launch.vectors::<u32>("out", out, words, width)?);
    unchecked!(copy_kernel::launch_unchecked::<R>(client, grid.count, grid.dim, width, x, out, (words / width) as u32));
    Ok(())
}

/// Grid as [`binary_kernel`].
#[cube(launch_unchecked)]
fn copy_kernel<N: Size>(x: &Array<Vector<u32, N>>, out: &mut Array<Vector<u32, N>>, items: u32) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        out[i] = x[i];
        i += step;
    }
}

/// Launches `x = word` on `words` 32-bit words: zero is zero in every element type, all bits set is NaN in every float type.
///
/// # Errors
/// As [`binary`].
pub fn fill<R: Runtime>(client: &ComputeClient<R>, words: usize, x: &Handle, word: u32) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "fill");
    if words == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<u32>(words);
    let grid = launch.flat(words / width);
    launch.cube(grid.dim, 0)?;
    let x = launch.vectors::<u32>("x", x, words, width)?;
    unchecked!(fill_kernel::launch_unchecked::<R>(
        client,
        grid.count,
        grid.dim,
        width,
        x,
        word,
        (words / width) as u32
    ));
    Ok(())
}

/// Grid as [`binary_kernel`].
#[cube(launch_unchecked)]
fn fill_kernel<N: Size>(x: &mut Array<Vector<u32, N>>, word: u32, items: u32) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        x[i] = Vector::new(word);
        i += step;
    }
}
