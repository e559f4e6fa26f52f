//! Muon beside its matrix products.     Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>
//!
//! With `g = grad * gradient_scale`:
//! - `buf = momentum * buf + (1 - momentum) * g`, `direction = (1 - momentum) * g + momentum * buf` with Nesterov's momentum, else `buf`
//! - `direction /= max(norm, eps)`, where someone else has computed the norm
//! - `param = param * (1 - lr * weight_decay) - size * direction`, behind the products
//!
//! Traffic: each reads and writes its buffers once. The gradient scale and the skip flag come from the step's state, as
//! [`crate::adamw::control`] leaves it.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

/// How gradients are averaged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Momentum {
    /// Share of the buffer that is kept, in `[0, 1)`.
    pub momentum: f32,
    /// Whether a step looks ahead by one momentum.
    pub nesterov: bool,
}

/// Buffers of [`direction`], each of `len` f32, and the step's state.
#[derive(Clone, Copy, Debug)]
pub struct Direction<'a> {
    /// Read.
    pub grad: &'a Handle,
    /// Updated: average of past gradients.
    pub buf: &'a Handle,
    /// Overwritten; all zero if the state says to skip, and then nothing else changes.
    pub out: &'a Handle,
    /// f32 `[4]`
    pub state: &'a Handle,
}

/// Launches the average and the direction before it is divided by its norm.
///
/// # Errors
/// [`LaunchError`] for a buffer that is too small, or a limit exceeded.
pub fn direction<R: Runtime>(
    client: &ComputeClient<R>,
    options: Momentum,
    len: usize,
    args: Direction<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "muon");
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    let Momentum { momentum, nesterov } = options;
    let rest = 1.0 - momentum;
    // Nesterov's direction is a share of the gradient and of the buffer.
    let (of_gradient, of_buffer) = if nesterov { (rest, momentum) } else { (0.0, 1.0) };
    unchecked!(direction_kernel::launch_unchecked::<R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<f32>("grad", args.grad, len, width)?,
        launch.vectors::<f32>("buf", args.buf, len, width)?,
        launch.vectors::<f32>("direction", args.out, len, width)?,
        launch.array::<f32>("state", args.state, 4)?,
        momentum,
        rest,
        of_gradient,
        of_buffer,
        (len / width) as u32,
    ));
    Ok(())
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch_unchecked)]
fn direction_kernel<N: Size>(
    grad: &Array<Vector<f32, N>>,
    buf: &mut Array<Vector<f32, N>>,
    out: &mut Array<Vector<f32, N>>,
    state: &Array<f32>,
    momentum: f32,
    rest: f32,
    of_gradient: f32,
    of_buffer: f32,
    items: u32,
) {
    let is_good = state[2] == 0.0;
    let scale = state[1];
    let walk = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        if is_good {
            let g = grad[i] * Vector::new(scale);
            let average = Vector::new(momentum) * buf[i] + Vector::new(rest) * g;
            buf[i] = average;
            out[i] = Vector::new(of_gradient) * g + Vector::new(of_buffer) * average;
        } else {
            out[i] = Vector::new(0.0f32);
        }
        i += walk;
    }
}

/// Launches `direction /= max(norm[0], eps)` on `len` f32.
///
/// # Errors
/// As [`direction`].
pub fn normalize<R: Runtime>(
    client: &ComputeClient<R>,
    eps: f32,
    len: usize,
    (direction, norm): (&Handle, &Handle),
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "muon");
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(normalize_kernel::launch_unchecked::<R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<f32>("direction", direction, len, width)?,
        launch.array::<f32>("norm", norm, 1)?,
        eps,
        (len / width) as u32,
    ));
    Ok(())
}

/// Grid as [`direction_kernel`].
#[cube(launch_unchecked)]
fn normalize_kernel<N: Size>(direction: &mut Array<Vector<f32, N>>, norm: &Array<f32>, eps: f32, items: u32) {
    let mut divisor = norm[0];
    if divisor < eps {
        divisor = eps;
    }
    let walk = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        direction[i] = direction[i] / Vector::new(divisor);
        i += walk;
    }
}

/// Buffers of [`apply`], each of `len` elements, and the step's state.
#[derive(Clone, Copy, Debug)]
pub struct Apply<'a> {
    /// `E`, updated.
    pub param: &'a Handle,
    /// f32
    pub direction: &'a Handle,
    /// f32 `[4]`
    pub state: &'a Handle,
}

/// Launches `param = param * kept - size * direction`; nothing changes if the state says to skip.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn apply<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    (kept, size): (f32, f32),
    len: usize,
    args: Apply<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "muon");
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(apply_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("param", args.param, len, width)?,
        launch.vectors::<f32>("direction", args.direction, len, width)?,
        launch.array::<f32>("state", args.state, 4)?,
        kept,
        size,
        (len / width) as u32,
    ));
    Ok(())
}

/// Grid as [`direction_kernel`].
#[cube(launch_unchecked)]
fn apply_kernel<E: Float, N: Size>(
    param: &mut Array<Vector<E, N>>,
    direction: &Array<Vector<f32, N>>,
    state: &Array<f32>,
    kept: f32,
    size: f32,
    items: u32,
) {
    if state[2] == 0.0 {
        let walk = CUBE_COUNT * CUBE_DIM as usize;
        let mut i = ABSOLUTE_POS;
        while i < items as usize {
            let before = Vector::<f32, N>::cast_from(param[i]);
            param[i] = Vector::cast_from(before * Vector::new(kept) - Vector::new(size) * direction[i]);
            i += walk;
        }
    }
}
