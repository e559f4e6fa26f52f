//! Lion in one pass over parameter, gradient and momentum.             Chen et al. 2023, arXiv:2302.06675, algorithm 2
//!
//! With `g = grad * gradient_scale`:
//! - `param = param * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)`
//! - `m = beta2 * m + (1 - beta2) * g`
//!
//! Traffic: parameter and momentum are read and written once, the gradient is read once. The gradient scale and the skip flag come
//! from the step's state, as [`crate::adamw::control`] leaves it.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

/// Hyper-parameters of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Learning rate.
    pub learning_rate: f32,
    /// Weight of the momentum in the direction of a step, in `[0, 1)`.
    pub beta1: f32,
    /// Decay of the momentum, in `[0, 1)`.
    pub beta2: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// Buffers of one parameter, each of `len` elements, and the step's state.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// `E`, updated.
    pub param: &'a Handle,
    /// f32
    pub grad: &'a Handle,
    /// f32, updated: momentum.
    pub m: &'a Handle,
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
    let launch = Launch::new(client, "lion");
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    let decay = 1.0 - f64::from(options.learning_rate) * f64::from(options.weight_decay);
    unchecked!(step_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("param", args.param, len, width)?,
        launch.vectors::<f32>("grad", args.grad, len, width)?,
        launch.vectors::<f32>("m", args.m, len, width)?,
        launch.array::<f32>("state", args.state, 4)?,
        options.learning_rate,
        decay as f32,
        options.beta1,
        options.beta2,
        (len / width) as u32,
    ));
    Ok(())
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch_unchecked)]
fn step_kernel<E: Float, N: Size>(
    param: &mut Array<Vector<E, N>>,
    grad: &Array<Vector<f32, N>>,
    m: &mut Array<Vector<f32, N>>,
    state: &Array<f32>,
    learning_rate: f32,
    decay: f32,
    beta1: f32,
    beta2: f32,
    items: u32,
) {
    let width = N::value();
    if state[2] == 0.0 {
        let scale = state[1];
        let walk = CUBE_COUNT * CUBE_DIM as usize;
        let mut i = ABSOLUTE_POS;
        while i < items as usize {
            let g = grad[i] * Vector::new(scale);
            let momentum = m[i];
            let mut step = Vector::new(beta1) * momentum + Vector::new(1.0 - beta1) * g;
            m[i] = Vector::new(beta2) * momentum + Vector::new(1.0 - beta2) * g;
            #[unroll]
            for component in 0..width {
                let c = step[component];
                step[component] = select(c > 0.0, learning_rate, select(c < 0.0, -learning_rate, 0.0f32));
            }
            param[i] = Vector::cast_from(Vector::<f32, N>::cast_from(param[i]) * Vector::new(decay) - step);
            i += walk;
        }
    }
}
