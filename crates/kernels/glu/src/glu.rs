//! Gated linear unit: `out = act(gate) * up`.                                   Shazeer 2020, arXiv:2002.05202
//! - SwiGLU: `silu(x) = x * sigmoid(x)`; GeGLU: `gelu(x)` with tanh or erf (Hendrycks & Gimpel 2016, arXiv:1606.08415)
//! - `dgate = dout * up * act'(gate)`, `dup = dout * act(gate)`
//!
//! Work: units stride over vectors of elements. Traffic: forward reads two tensors and writes one, backward reads three and writes
//! two of them. Numerics: f32 inside, rounded once; no argument gives NaN or infinity on the way.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{
    Launch, LaunchError,
    math::{erf, scaled_exp, tanh},
    unchecked,
};

/// Activation of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt(2)))`
    GeluErf,
}

/// Buffers of the forward pass, each of `len` elements of `E`.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// What the activation is applied to.
    pub gate: &'a Handle,
    /// What it is multiplied with.
    pub up: &'a Handle,
    /// Overwritten.
    pub out: &'a Handle,
}

/// Launches `out = act(gate) * up`.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn forward<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    activation: Activation,
    len: usize,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "glu_forward");
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<E>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(forward_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("gate", args.gate, len, width)?,
        launch.vectors::<E>("up", args.up, len, width)?,
        launch.vectors::<E>("out", args.out, len, width)?,
        (len / width) as u32,
        activation,
    ));
    Ok(())
}

/// Buffers of the backward pass, each of `len` elements of `E`.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// Gradient of `out`.
    pub dout: &'a Handle,
    /// `gate` on entry, its gradient on return.
    pub gate: &'a Handle,
    /// `up` on entry, its gradient on return; another buffer than `gate`.
    pub up: &'a Handle,
}

/// Launches both gradients, written over the inputs.
///
/// # Errors
/// As [`forward`].
pub fn backward<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    activation: Activation,
    len: usize,
    args: Backward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "glu_backward");
    launch.element::<E>()?;
    if len == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<E>(len);
    let grid = launch.flat(len / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(backward_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("dout", args.dout, len, width)?,
        launch.vectors::<E>("gate", args.gate, len, width)?,
        launch.vectors::<E>("up", args.up, len, width)?,
        (len / width) as u32,
        activation,
    ));
    Ok(())
}

/// sqrt(2 / pi)
const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;
/// 1 / sqrt(2 pi)
const DENSITY: f32 = 0.398_942_3;
/// 1 / sqrt(2)
const ROOT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;

/// `x` within `-bound ..= bound`; NaN passes.
#[cube]
fn within(x: f32, bound: f32) -> f32 {
    let x = select(x > bound, bound, x);
    select(x < -bound, -bound, x)
}

/// The activation and its derivative.
#[cube]
fn value_and_slope(x: f32, #[comptime] activation: Activation) -> (f32, f32) {
    if comptime!(activation == Activation::Silu) {
        // With `e = exp(-|x|)`: sigmoid(x) is `1 / (1 + e)` or `e / (1 + e)`. A factor joins before the power of two, so that a
        // product above the subnormal numbers is not lost with an exponential among them.
        let size = f32::abs(x);
        let divisor = 1.0f32 + scaled_exp(-size, 1.0);
        let other = scaled_exp(-size, 1.0) / divisor;
        let rest = 1.0f32 + x * (1.0f32 - other);
        let value = select(x < 0.0, scaled_exp(-size, x), x) / divisor;
        let slope = select(x < 0.0, scaled_exp(-size, rest), 1.0f32 + x * other) / divisor;
        (value, slope)
    } else if comptime!(activation == Activation::GeluTanh) {
        // From 10 on tanh is 1, and the cube of a huge argument would be infinite.
        let bounded = within(x, 10.0);
        let square = bounded * bounded;
        let t = tanh(f32::new(GELU_SCALE) * bounded * (1.0f32 + f32::new(GELU_CUBIC) * square));
        let inner = f32::new(GELU_SCALE) * (1.0f32 + 3.0f32 * f32::new(GELU_CUBIC) * square);
        (0.5f32 * x * (1.0f32 + t), 0.5f32 * (1.0f32 + t) + 0.5f32 * bounded * (1.0f32 - t * t) * inner)
    } else {
        let probability = 0.5f32 * (1.0f32 + erf(x * f32::new(ROOT_HALF)));
        // From 20 on the density is 0.
        let bounded = within(x, 20.0);
        let density = f32::new(DENSITY) * scaled_exp(-(0.5f32 * bounded * bounded), 1.0);
        (x * probability, probability + bounded * density)
    }
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch_unchecked)]
fn forward_kernel<E: Float, N: Size>(
    gate: &Array<Vector<E, N>>,
    up: &Array<Vector<E, N>>,
    out: &mut Array<Vector<E, N>>,
    items: u32,
    #[comptime] activation: Activation,
) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        let mut values = Vector::<f32, N>::cast_from(gate[i]);
        #[unroll]
        for component in 0..values.size() {
            let (value, _) = value_and_slope(values[component], activation);
            values[component] = value;
        }
        out[i] = Vector::cast_from(values * Vector::<f32, N>::cast_from(up[i]));
        i += step;
    }
}

/// Grid as [`forward_kernel`].
#[cube(launch_unchecked)]
fn backward_kernel<E: Float, N: Size>(
    dout: &Array<Vector<E, N>>,
    gate: &mut Array<Vector<E, N>>,
    up: &mut Array<Vector<E, N>>,
    items: u32,
    #[comptime] activation: Activation,
) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        let mut values = Vector::<f32, N>::cast_from(gate[i]);
        let mut slopes = Vector::<f32, N>::new(0.0);
        #[unroll]
        for component in 0..values.size() {
            let (value, slope) = value_and_slope(values[component], activation);
            values[component] = value;
            slopes[component] = slope;
        }
        let dout = Vector::<f32, N>::cast_from(dout[i]);
        gate[i] = Vector::cast_from(dout * Vector::<f32, N>::cast_from(up[i]) * slopes);
        up[i] = Vector::cast_from(dout * values);
        i += step;
    }
}
