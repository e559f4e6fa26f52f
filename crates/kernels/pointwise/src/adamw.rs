//! AdamW in one pass over parameters, gradients and moments, several parameters to a launch, and the kernel that decides about a
//! step on the device.                                                 Loshchilov & Hutter 2017, arXiv:1711.05101
//!
//! With `g = grad * gradient_scale`, in the order of PyTorch:
//! - `m = beta1 * m + (1 - beta1) * g`, `v = beta2 * v + (1 - beta2) * g^2`
//! - `param = param * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)`
//!
//! Traffic: parameter and moments are read and written once, the gradient is read once. Nothing is read back to the host: the
//! gradient scale, the skip flag and `t` come from the step's state.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

use crate::groups::by_width;

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
    unchecked!(control_kernel::launch_unchecked::<R>(
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
    ));
    Ok(())
}

/// Grid: one unit.
#[cube(launch_unchecked)]
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

impl Options {
    pub(crate) fn factors<R: Runtime>(&self) -> FactorsLaunch<R> {
        let &Self { learning_rate, beta1, beta2, eps, weight_decay } = self;
        let decay = 1.0 - f64::from(learning_rate) * f64::from(weight_decay);
        FactorsLaunch::new(learning_rate, decay as f32, beta1, beta2, log_of(beta1), log_of(beta2), eps)
    }
}

/// [`Options`] as a kernel reads them.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Factors {
    learning_rate: f32,
    /// `1 - learning_rate * weight_decay`
    decay: f32,
    beta1: f32,
    beta2: f32,
    log_beta1: f32,
    log_beta2: f32,
    eps: f32,
}

/// Buffers of one parameter, each of `len` elements.
#[derive(Clone, Copy, Debug)]
pub struct Parameter<'a> {
    /// `E`, updated.
    pub param: &'a Handle,
    /// f32
    pub grad: &'a Handle,
    /// f32, updated: first moment.
    pub m: &'a Handle,
    /// f32, updated: second moment.
    pub v: &'a Handle,
    /// Number of elements.
    pub len: usize,
}

/// Logarithm of a decay, from which a kernel gets `beta^t` for a `t` that the host does not know.
fn log_of(beta: f32) -> f32 {
    // Zero has no logarithm that a shader may hold; the power of this one is zero as well.
    (f64::from(beta).ln() as f32).max(-1e4)
}

/// Parameters of a launch, at most, where the device binds as many buffers.
const MOST: usize = 8;

/// Launches one step of parameters of one type, as few launches as the device's bindings allow. Nothing changes if `state`, f32 `[4]`
/// as [`control`] leaves it, says to skip.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn step<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    options: &Options,
    parameters: &[Parameter<'_>],
    state: &Handle,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "adamw");
    launch.element::<E>()?;
    // Four buffers each, beside the state and the scalars.
    let most = (client.properties().hardware.max_bindings as usize).saturating_sub(2) / 4;
    for (width, group) in by_width(&launch, parameters, |parameter| parameter.len) {
        for group in group.chunks(most.clamp(1, MOST)) {
            step_group::<R, E>(&launch, options, (group, width), state)?;
        }
    }
    Ok(())
}

fn step_group<R: Runtime, E: Float>(
    launch: &Launch<'_, R>,
    options: &Options,
    (parameters, width): (&[Parameter<'_>], usize),
    state: &Handle,
) -> Result<(), LaunchError> {
    let most = parameters.iter().map(|parameter| parameter.len / width).max().unwrap_or(0);
    let grid = launch.flat(most);
    launch.cube(grid.dim, 0)?;
    let params = parameters.iter().map(|p| launch.vectors::<E>("param", p.param, p.len, width));
    let floats = |arg, pick: fn(&Parameter<'_>) -> Handle| {
        let array = |p: &Parameter<'_>| launch.vectors::<f32>(arg, &pick(p), p.len, width);
        parameters.iter().map(array).collect::<Result<SequenceArg<R, _>, _>>()
    };
    unchecked!(step_kernel::launch_unchecked::<E, R>(
        launch.client(),
        grid.count,
        grid.dim,
        width,
        params.collect::<Result<SequenceArg<R, _>, _>>()?,
        floats("grad", |p| p.grad.clone())?,
        floats("m", |p| p.m.clone())?,
        floats("v", |p| p.v.clone())?,
        parameters.iter().map(|p| (p.len / width) as u32).collect::<SequenceArg<R, _>>(),
        launch.array::<f32>("state", state, 4)?,
        options.factors(),
    ));
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

/// What all elements of a step have in common.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Rates {
    gradient_scale: f32,
    step_size: f32,
    correction2: f32,
}

/// Of a step with this state that is not skipped.
#[cube]
pub(crate) fn rates(factors: &Factors, state: &Array<f32>) -> Rates {
    let steps = state[3];
    Rates {
        gradient_scale: state[1],
        step_size: factors.learning_rate / correction(factors.log_beta1, steps),
        correction2: correction(factors.log_beta2, steps),
    }
}

/// Some elements of a parameter and their moments.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Elements<N: Size> {
    pub(crate) param: Vector<f32, N>,
    pub(crate) m: Vector<f32, N>,
    pub(crate) v: Vector<f32, N>,
}

/// What they are after the step.
#[cube]
pub(crate) fn stepped<N: Size>(
    before: Elements<N>,
    grad: Vector<f32, N>,
    factors: &Factors,
    rates: &Rates,
) -> Elements<N> {
    let (beta1, beta2) = (factors.beta1, factors.beta2);
    let g = grad * Vector::new(rates.gradient_scale);
    let m = Vector::new(beta1) * before.m + Vector::new(1.0 - beta1) * g;
    let v = Vector::new(beta2) * before.v + Vector::new(1.0 - beta2) * (g * g);
    let root = Vector::<f32, N>::sqrt(v / Vector::new(rates.correction2)) + Vector::new(factors.eps);
    let param = before.param * Vector::new(factors.decay) - Vector::new(rates.step_size) * m / root;
    Elements::<N> { param, m, v }
}

/// Grid: unit = vector of each parameter in turn, walking on by the number of units.
#[cube(launch_unchecked)]
fn step_kernel<E: Float, N: Size>(
    params: &mut Sequence<Array<Vector<E, N>>>,
    grads: &Sequence<Array<Vector<f32, N>>>,
    ms: &mut Sequence<Array<Vector<f32, N>>>,
    vs: &mut Sequence<Array<Vector<f32, N>>>,
    items: &Sequence<u32>,
    state: &Array<f32>,
    factors: &Factors,
) {
    if state[2] == 0.0 {
        let rates = rates(factors, state);
        #[unroll]
        for p in 0..params.len() {
            let (param, m, v) = (params.index_mut(p), ms.index_mut(p), vs.index_mut(p));
            update::<E, N>(param, grads.index(p), m, v, *items.index(p), factors, &rates);
        }
    }
}

#[cube]
fn update<E: Float, N: Size>(
    param: &mut Array<Vector<E, N>>,
    grad: &Array<Vector<f32, N>>,
    m: &mut Array<Vector<f32, N>>,
    v: &mut Array<Vector<f32, N>>,
    items: u32,
    factors: &Factors,
    rates: &Rates,
) {
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        let before = Elements::<N> { param: Vector::cast_from(param[i]), m: m[i], v: v[i] };
        let after = stepped::<N>(before, grad[i], factors, rates);
        m[i] = after.m;
        v[i] = after.v;
        param[i] = Vector::cast_from(after.param);
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
}
