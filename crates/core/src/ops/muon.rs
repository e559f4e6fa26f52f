//! Muon: momentum made orthogonal by a Newton-Schulz iteration.     Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>
//!
//! With `g = grad * gradient_scale`:
//! - `buf = momentum * buf + (1 - momentum) * g`
//! - `u = (1 - momentum) * g + momentum * buf` with Nesterov's momentum, else `u = buf`; `X = u / max(|u|, eps)`, Frobenius' norm
//! - [`ITERATIONS`] times `X = a X + (b G + c G^2) X` with `G = X X^T`, which brings singular values near 1
//! - `param = param * (1 - lr * weight_decay) - lr * adjustment * X`
//!
//! This is `torch.optim.Muon`, but for the iteration, which is f32 here and bf16 there. Of a matrix with more rows than columns it has
//! `G = X^T X` on the other side, which is the same. Nothing changes when the step is to be skipped ([`StepState`]).

use super::{adamw::StepState, check, cost::Cost, elementwise, linear};
use crate::{Category, DType, Result, Tensor};

/// Factors `a`, `b` and `c` of the iteration, those of the source.
pub const COEFFICIENTS: [f32; 3] = [3.4445, -4.775, 2.0315];
/// How often it is applied.
pub const ITERATIONS: usize = 5;

/// Hyper-parameters of one step of one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Learning rate of this step, 0 or more.
    pub learning_rate: f32,
    /// What the rate is multiplied by, but for the decay, because of the matrix's shape; positive.
    pub adjustment: f32,
    /// Share of the buffer that is kept, in `[0, 1)`.
    pub momentum: f32,
    /// Whether a step looks ahead by one momentum.     Nesterov 1983
    pub nesterov: bool,
    /// Least norm that a matrix is divided by, positive.
    pub eps: f32,
    /// Decoupled weight decay, 0 or more.
    pub weight_decay: f32,
}

impl Spec {
    fn validate(&self) -> Result<()> {
        const OP: &str = "muon";
        check::not_negative(OP, "learning_rate", self.learning_rate)?;
        check::positive(OP, "adjustment", self.adjustment)?;
        check::share(OP, "momentum", self.momentum)?;
        check::positive(OP, "eps", self.eps)?;
        check::not_negative(OP, "weight_decay", self.weight_decay)
    }
}

/// Buffers of one matrix.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// The parameter, any float type, `[rows, columns]`.
    pub param: &'a mut Tensor,
    /// Its gradient, f32.
    pub grad: &'a Tensor,
    /// Average of past gradients, f32.
    pub buf: &'a mut Tensor,
}

/// Cost of [`Muon::muon_direction`]: the gradient in, the buffer in and out, the direction out.
pub fn direction_cost(grad: &Tensor, buf: &Tensor) -> Cost {
    Cost::of(&[grad, buf], &[buf, grad])
}

/// Cost of [`Muon::muon_apply`]: the direction in, the parameter in and out.
pub fn apply_cost(param: &Tensor, direction: &Tensor) -> Cost {
    Cost::of(&[direction, param], &[param])
}

/// The parts of Muon that are not matrix products, of a backend.
pub trait Muon {
    /// Brings `buf` up to date and returns the direction that is to be made orthogonal, `u / max(|u|, eps)`, f32; all zero in a step to
    /// be skipped, which changes nothing.
    fn muon_direction(&self, spec: &Spec, grad: &Tensor, buf: &mut Tensor, state: &Tensor) -> Result<Tensor>;
    /// `param = param * (1 - lr * weight_decay) - lr * adjustment * direction`, but in a step to be skipped.
    fn muon_apply(&self, spec: &Spec, param: &mut Tensor, direction: &Tensor, state: &Tensor) -> Result<()>;
}

/// One step of one matrix, steered by `state`. Takes four more matrices while it runs, two of them square in the smaller of the
/// dimensions.
///
/// # Errors
/// Shape, dtype or device mismatch; a field out of its range; [`crate::Error::Shared`] if a buffer to write is shared;
/// [`crate::Error::OutOfMemory`].
pub fn step(spec: &Spec, buffers: Buffers<'_>, state: &StepState) -> Result<()> {
    const OP: &str = "muon";
    spec.validate()?;
    let Buffers { param, grad, buf } = buffers;
    check::rank(OP, "grad", grad, 2, "[rows, columns]")?;
    check::update(OP, (param, grad), state)?;
    let device = grad.device().clone();
    check::tensor(OP, "buf", buf, (grad.shape(), DType::F32, &device))?;
    if param.buffer_mut().is_none() {
        return Err(crate::Error::Shared { op: OP, arg: "param" });
    }
    if grad.num_elements() == 0 {
        return Ok(());
    }
    let direction = orthogonalize(device.backend().muon_direction(spec, grad, buf, state.tensor())?)?;
    device.backend().muon_apply(spec, param, &direction, state.tensor())
}

/// The iteration, of products that every backend has.
fn orthogonalize(mut x: Tensor) -> Result<Tensor> {
    let [a, b, c] = COEFFICIENTS;
    let (device, is_wide) = (x.device().clone(), x.shape()[0] <= x.shape()[1]);
    for _ in 0..ITERATIONS {
        let gram = match is_wide {
            true => linear::forward(&x, &device.prepare_weight(x.clone())?, None)?,
            false => {
                let columns = x.shape()[1];
                let mut gram = device.zeros([columns, columns], DType::F32, Category::Activations)?;
                linear::weight_gradient(&x, &x, &mut gram)?;
                gram
            }
        };
        // It is its own transpose.
        let square = linear::forward(&gram, &device.prepare_weight(gram.clone())?, None)?;
        let polynomial = elementwise::add(elementwise::scale(gram, b)?, &elementwise::scale(square, c)?)?;
        let change = match is_wide {
            true => linear::input_gradient(&polynomial, &device.prepare_weight(x.clone())?)?,
            false => linear::forward(&x, &device.prepare_weight(polynomial)?, None)?,
        };
        x = elementwise::add(elementwise::scale(x, a)?, &change)?;
    }
    Ok(x)
}
