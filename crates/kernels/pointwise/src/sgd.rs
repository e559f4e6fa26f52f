//! Gradient descent in one pass over parameter, gradient and momentum.        Polyak 1964, doi:10.1016/0041-5553(64)90137-5
//!
//! With `g = grad * gradient_scale + weight_decay * param`, in the order of PyTorch:
//! - `buf = momentum * buf + g`
//! - `param -= lr * (g + momentum * buf)` with Nesterov's momentum, else `param -= lr * buf`; `param -= lr * g` without a buffer
//!
//! Traffic: parameter and buffer are read and written once, the gradient is read once. The gradient scale and the skip flag come
//! from the step's state, as [`crate::adamw::control`] leaves it.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

/// Hyper-parameters of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Learning rate.
    pub learning_rate: f32,
    /// Share of the buffer that is kept, in `[0, 1)`.
    pub momentum: f32,
    /// Whether a step looks ahead by one momentum.
    pub nesterov: bool,
    /// Decay that is added to the gradient.
    pub weight_decay: f32,
}

/// Buffers of one parameter, each of `len` elements, and the step's state.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// `E`, updated.
    pub param: &'a Handle,
    /// f32
    pub grad: &'a Handle,
    /// f32, updated: sum of past gradients.
    pub buf: Option<&'a Handle>,
    /// f32 `[4]`
    pub state: &'a Handle,
}

/// Launches one step of one parameter; nothing changes if the state says to skip.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn step<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    options: &Options,
    len: usize,
    args: Step<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "sgd");
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    let param = launch.vectors::<E>("param", args.param, len, width)?;
    let grad = launch.vectors::<f32>("grad", args.grad, len, width)?;
    let state = launch.array::<f32>("state", args.state, 4)?;
    let &Options { learning_rate, momentum, nesterov, weight_decay } = options;
    let items = (len / width) as u32;
    match args.buf {
        Some(buf) => {
            let buf = launch.vectors::<f32>("buf", buf, len, width)?;
            // Nesterov's step is a share of the gradient and of the buffer too.
            let (of_gradient, of_buffer) = if nesterov { (1.0, momentum) } else { (0.0, 1.0) };
            unchecked!(momentum_kernel::launch_unchecked::<E, R>(
                client,
                grid.count,
                grid.dim,
                width,
                param,
                grad,
                buf,
                state,
                learning_rate,
                momentum,
                of_gradient,
                of_buffer,
                weight_decay,
                items,
            ));
        }
        None => unchecked!(step_kernel::launch_unchecked::<E, R>(
            client,
            grid.count,
            grid.dim,
            width,
            param,
            grad,
            state,
            learning_rate,
            weight_decay,
            items,
        )),
    }
    Ok(())
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch_unchecked)]
fn momentum_kernel<E: Float, N: Size>(
    param: &mut Array<Vector<E, N>>,
    grad: &Array<Vector<f32, N>>,
    buf: &mut Array<Vector<f32, N>>,
    state: &Array<f32>,
    learning_rate: f32,
    momentum: f32,
    of_gradient: f32,
    of_buffer: f32,
    weight_decay: f32,
    items: u32,
) {
    if state[2] == 0.0 {
        let scale = state[1];
        let walk = CUBE_COUNT * CUBE_DIM as usize;
        let mut i = ABSOLUTE_POS;
        while i < items as usize {
            let before = Vector::<f32, N>::cast_from(param[i]);
            let g = grad[i] * Vector::new(scale) + Vector::new(weight_decay) * before;
            let sum = Vector::new(momentum) * buf[i] + g;
            buf[i] = sum;
            let step = Vector::new(of_gradient) * g + Vector::new(of_buffer) * sum;
            param[i] = Vector::cast_from(before - Vector::new(learning_rate) * step);
            i += walk;
        }
    }
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch_unchecked)]
fn step_kernel<E: Float, N: Size>(
    param: &mut Array<Vector<E, N>>,
    grad: &Array<Vector<f32, N>>,
    state: &Array<f32>,
    learning_rate: f32,
    weight_decay: f32,
    items: u32,
) {
    if state[2] == 0.0 {
        let scale = state[1];
        let walk = CUBE_COUNT * CUBE_DIM as usize;
        let mut i = ABSOLUTE_POS;
        while i < items as usize {
            let before = Vector::<f32, N>::cast_from(param[i]);
            let g = grad[i] * Vector::new(scale) + Vector::new(weight_decay) * before;
            param[i] = Vector::cast_from(before - Vector::new(learning_rate) * g);
            i += walk;
        }
    }
}
