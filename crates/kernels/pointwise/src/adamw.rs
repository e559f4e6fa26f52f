//! AdamW in one pass over parameter, gradient and moments, and the kernel that decides about a step on the device.
//!                                                                     Loshchilov & Hutter 2017, arXiv:1711.05101
//! With `g = grad * gradient_scale`, in the order of PyTorch:
//! - `m = beta1 * m + (1 - beta1) * g`, `v = beta2 * v + (1 - beta2) * g^2`
//! - `param = param * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)`
//!
//! Traffic: parameter and moments are read and written once, the gradient is read once. Nothing is read back to the host: the
//! gradient scale, the skip flag and `t` come from the step's state.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError};

/// How [`control`] decides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ControlOptions {
    /// Gradients are scaled down to this norm if theirs is larger.
    pub max_grad_norm: Option<f32>,
    /// What gradients were multiplied by.
    pub loss_scale: f32,
    /// Whether one bad step stops all later ones.
    pub sticky: bool,
}

/// Buffers of [`control`].
#[derive(Clone, Copy, Debug)]
pub struct Control<'a> {
    /// f32 `[1]`: norm of the gradients as they are, still scaled.
    pub norm: &'a Handle,
    /// f32 `[1]`: 1 if all gradients are finite, else 0.
    pub finite: &'a Handle,
    /// f32 `[4]`: norm, gradient scale, skip, completed steps; updated for the next step.
    pub state: &'a Handle,
}

/// Launches the decision about the next step.
///
/// # Errors
/// [`LaunchError`] for a buffer that is too small.
pub fn control<R: Runtime>(
    client: &ComputeClient<R>,
    options: ControlOptions,
    args: Control<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "step_control");
    control_kernel::launch::<R>(
        client,
        launch.cubes(1, 1, 1)?,
        CubeDim::new_1d(1),
        launch.array::<f32>("norm", args.norm, 1)?,
        launch.array::<f32>("finite", args.finite, 1)?,
        launch.array::<f32>("state", args.state, 4)?,
        options.max_grad_norm.unwrap_or_default(),
        options.loss_scale,
        options.max_grad_norm.is_some(),
        options.sticky,
    );
    Ok(())
}

/// Grid: one unit.
#[cube(launch)]
fn control_kernel(
    norm: &Array<f32>,
    finite: &Array<f32>,
    state: &mut Array<f32>,
    max_grad_norm: f32,
    loss_scale: f32,
    #[comptime] clips: bool,
    #[comptime] sticky: bool,
) {
    let norm = norm[0] / loss_scale;
    // By its bits, because compilers of shaders may assume that no value is infinite or NaN.
    let exponent = u32::reinterpret(norm) & 0x7F80_0000u32;
    let mut skip = finite[0] != 1.0 || exponent == 0x7F80_0000u32;
    if comptime!(sticky) {
        skip = skip || state[2] != 0.0;
    }
    let mut clip = 1.0f32;
    if comptime!(clips) {
        clip = min(max_grad_norm / (norm + 1e-6), 1.0);
    }
    state[0] = norm;
    state[1] = clip / loss_scale;
    if skip {
        state[2] = 1.0;
    } else {
        state[2] = 0.0;
        state[3] += 1.0;
    }
}

/// Hyper-parameters of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Learning rate.
    pub learning_rate: f32,
    /// Decay of the first moment, in `[0, 1)`.
    pub beta1: f32,
    /// Decay of the second moment, in `[0, 1)`.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
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
    /// f32, updated: first moment.
    pub m: &'a Handle,
    /// f32, updated: second moment.
    pub v: &'a Handle,
    /// f32 `[4]`, as [`control`] leaves it.
    pub state: &'a Handle,
}

/// Logarithm of a decay, from which a kernel gets `beta^t` for a `t` that the host does not know.
fn log_of(beta: f32) -> f32 {
    // Zero has no logarithm that a shader may hold; the power of this one is zero as well.
    (f64::from(beta).ln() as f32).max(-1e4)
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
    let launch = Launch::new(client, "adamw");
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<f32>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    let decay = 1.0 - f64::from(options.learning_rate) * f64::from(options.weight_decay);
    step_kernel::launch::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("param", args.param, len, width)?,
        launch.vectors::<f32>("grad", args.grad, len, width)?,
        launch.vectors::<f32>("m", args.m, len, width)?,
        launch.vectors::<f32>("v", args.v, len, width)?,
        launch.array::<f32>("state", args.state, 4)?,
        options.learning_rate,
        decay as f32,
        options.beta1,
        options.beta2,
        log_of(options.beta1),
        log_of(options.beta2),
        options.eps,
        (len / width) as u32,
    );
    Ok(())
}

/// `1 - beta^steps` from the logarithm of `beta`. As a difference it would lose three digits for 0.999 and few steps: there,
/// the series of `1 - exp(y)`.
#[cube]
fn correction(log_beta: f32, steps: f32) -> f32 {
    let y = log_beta * steps;
    let mut result = 1.0f32 - f32::exp(y);
    if y > -0.5 {
        let mut sum = 1.0f32;
        let mut term = 9.0f32;
        while term > 1.0 {
            sum = 1.0 + y / term * sum;
            term -= 1.0;
        }
        result = -y * sum;
    }
    result
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch)]
fn step_kernel<E: Float, N: Size>(
    param: &mut Array<Vector<E, N>>,
    grad: &Array<Vector<f32, N>>,
    m: &mut Array<Vector<f32, N>>,
    v: &mut Array<Vector<f32, N>>,
    state: &Array<f32>,
    learning_rate: f32,
    decay: f32,
    beta1: f32,
    beta2: f32,
    log_beta1: f32,
    log_beta2: f32,
    eps: f32,
    items: u32,
) {
    if state[2] == 0.0 {
        let (scale, steps) = (state[1], state[3]);
        let step_size = learning_rate / correction(log_beta1, steps);
        let correction2 = correction(log_beta2, steps);
        let walk = CUBE_COUNT * CUBE_DIM as usize;
        let mut i = ABSOLUTE_POS;
        while i < items as usize {
            let g = grad[i] * Vector::new(scale);
            let first = Vector::new(beta1) * m[i] + Vector::new(1.0 - beta1) * g;
            let second = Vector::new(beta2) * v[i] + Vector::new(1.0 - beta2) * (g * g);
            m[i] = first;
            v[i] = second;
            let root = Vector::<f32, N>::sqrt(second / Vector::new(correction2)) + Vector::new(eps);
            let decayed = Vector::<f32, N>::cast_from(param[i]) * Vector::new(decay);
            param[i] = Vector::cast_from(decayed - Vector::new(step_size) * first / root);
            i += walk;
        }
    }
}
