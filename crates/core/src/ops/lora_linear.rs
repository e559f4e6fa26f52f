//! Linear layer with a low-rank update.                                         Hu et al. 2021, arXiv:2106.09685
//! - `y = x W^T + bias + scale * (x A^T) B^T`, where `A` is `[rank, in_features]` and `B` `[out_features, rank]`
//! - with `h = x A^T` and `dh = scale * dy B`: `dx = dy W + dh A`; `dA += dh^T x`; `dB += scale * dy^T h`
//! - with dropout, `drop(x)` takes the place of `x` in `h` and in `dA`, and `drop(dh A)` that of `dh A` in `dx`, where
//!   `drop(v)` is `v / (1 - probability)` where `u >= probability`, else 0.         Srivastava et al. 2014, JMLR 15:1929
//!
//! Products run smallest first; `W + scale * B A` is never formed. `A` and `B` may have another storage type than `x`; `h` and
//! `dh` are f32. Neither the zeros nor `drop(x)` are kept: `u` is a counter-based random number, uniform in `[0, 1)`, which the
//! backward pass draws again.

use super::{
    check,
    cost::{Cost, given, stored},
    linear,
};
use crate::{DType, Result, Tensor, Weight, rng::Philox};

/// What defines one adapted layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// The base layer.
    pub base: linear::Spec,
    /// Inner dimension, 1 or more.
    pub rank: usize,
    /// Factor of the update: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f32,
    /// Storage type of `A` and `B`; their gradients are f32.
    pub adapter_dtype: DType,
    /// Zeros in the update's input.
    pub dropout: Option<Dropout>,
}

impl Spec {
    /// That of the base layer; `A` and `B` in, `h` out.
    pub fn forward_cost(&self) -> Cost {
        self.base.forward_cost() + self.low_rank(1, 1) + Cost::read(self.adapter()) + Cost::written(self.h())
    }

    /// Of `h` alone: `x` and `A` in, `h` out.
    pub fn hidden_cost(&self) -> Cost {
        let [x, _] = self.base.activations();
        let a = stored(self.rank * self.base.in_features, self.adapter_dtype);
        self.low_rank(1, 0) + Cost::read(x + a) + Cost::written(self.h())
    }

    /// `dy` in, `h` and `x` where something reads them, `B` except for `dB` alone; with `dx` the base layer's matrix and `A` in;
    /// `dA` and `dB` in and out where they are wanted.
    pub fn backward_cost(&self, needs_dx: bool, needs_dlora_a: bool, needs_dlora_b: bool) -> Cost {
        let (through_a, through_b) = (u64::from(needs_dx) + u64::from(needs_dlora_a), u64::from(needs_dlora_b));
        let needs_dh = needs_dx || needs_dlora_a;
        let [x, y] = self.base.activations();
        let gradient = |is_wanted: bool, features: usize| given(is_wanted, stored(self.rank * features, DType::F32));
        let matrix = |is_read: bool, features: usize| given(is_read, stored(self.rank * features, self.adapter_dtype));
        let read = given(!needs_dx, y)
            + given(needs_dlora_a, x)
            + given(needs_dlora_b, self.h())
            + matrix(needs_dx, self.base.in_features)
            + matrix(needs_dh, self.base.out_features);
        let updated = gradient(needs_dlora_a, self.base.in_features) + gradient(needs_dlora_b, self.base.out_features);
        let base = if needs_dx { self.base.input_gradient_cost() } else { Cost::default() };
        base + self.low_rank(through_a, through_b + u64::from(needs_dh)) + Cost::read(read) + Cost::updated(updated)
    }

    /// Products of the size of `x A^T`, and of the size of `h B^T`.
    fn low_rank(&self, through_a: u64, through_b: u64) -> Cost {
        let rows = self.base.rows;
        Cost::products(through_a, [rows, self.rank, self.base.in_features])
            + Cost::products(through_b, [rows, self.rank, self.base.out_features])
    }

    fn adapter(&self) -> usize {
        stored(self.rank * (self.base.in_features + self.base.out_features), self.adapter_dtype)
    }

    fn h(&self) -> usize {
        stored(self.base.rows * self.rank, DType::F32)
    }
}

/// Which elements of the update's input are zero: element `channel` of a row where
/// [`stream.uniform(step, sequence, position, channel)`](Philox::uniform) is below `probability`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Share of zeros, in `[0, 1)`.
    pub probability: f32,
    /// Random numbers of this layer in this run.
    pub stream: Philox,
    /// Optimiser step.
    pub step: u32,
}

/// Dropout, and where each row stands in the step: what its zeros depend on, and not how the step is split.
#[derive(Clone, Copy, Debug)]
pub struct RowDropout<'a> {
    /// What all rows have in common.
    pub dropout: Dropout,
    /// i32 `[rows]`: number of the row's sequence among all of the step.
    pub sequences: &'a Tensor,
    /// i32 `[rows]`: place of the row in its sequence.
    pub positions: &'a Tensor,
}

/// A low-rank update.
#[derive(Clone, Copy, Debug)]
pub struct Adapter<'a> {
    /// `[rank, in_features]`
    pub lora_a: &'a Tensor,
    /// `[out_features, rank]`
    pub lora_b: &'a Tensor,
    /// Factor of the update.
    pub scale: f32,
    /// Zeros in the update's input; a backward pass is given those of its forward pass.
    pub dropout: Option<RowDropout<'a>>,
}

/// Results of the forward pass.
#[derive(Debug)]
pub struct Forward {
    /// `[rows, out_features]`
    pub y: Tensor,
    /// `h = drop(x) A^T`, f32 `[rows, rank]`: what backward reads.
    pub h: Tensor,
}

/// Inputs of the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// Gradient of `y`.
    pub dy: &'a Tensor,
    /// Input of the layer.
    pub x: &'a Tensor,
    /// From the forward pass.
    pub h: &'a Tensor,
    /// Base matrix.
    pub weight: &'a Weight,
    /// The update.
    pub adapter: Adapter<'a>,
    /// Whether `dx` is wanted; the product with the base matrix is skipped where it is not.
    pub needs_dx: bool,
}

/// Parameter gradients to add to, f32; `None` where not wanted.
#[derive(Debug, Default)]
pub struct ParameterGradients<'a> {
    /// `[rank, in_features]`
    pub dlora_a: Option<&'a mut Tensor>,
    /// `[out_features, rank]`
    pub dlora_b: Option<&'a mut Tensor>,
}

/// LoRA layers of a backend.
pub trait LoraLinear {
    /// `h` alone, with the bits that [`LoraLinear::lora_linear_forward`] gives it.
    fn lora_linear_hidden(&self, spec: &Spec, x: &Tensor, adapter: Adapter<'_>) -> Result<Tensor>;
    /// `y` and `h`.
    fn lora_linear_forward(
        &self,
        spec: &Spec,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        adapter: Adapter<'_>,
    ) -> Result<Forward>;
    /// `dx` if wanted; adds to the parameter gradients.
    fn lora_linear_backward(
        &self,
        spec: &Spec,
        inputs: Backward<'_>,
        gradients: ParameterGradients<'_>,
    ) -> Result<Option<Tensor>>;
}

fn spec(x: &Tensor, weight: &Weight, adapter: &Adapter<'_>) -> Result<Spec> {
    const OP: &str = "lora_linear";
    check::float(OP, "x", x.dtype())?;
    check::in_features(OP, "x", x, weight)?;
    check::on(OP, "weight", weight.device(), x.device())?;
    check::float(OP, "lora_a", adapter.lora_a.dtype())?;
    check::rank(OP, "lora_a", adapter.lora_a, 2, "[rank, in_features]")?;
    let (rank, adapter_dtype) = (adapter.lora_a.shape()[0], adapter.lora_a.dtype());
    if rank == 0 {
        return check::invalid(OP, "rank", rank, "at least 1");
    }
    check::tensor(OP, "lora_a", adapter.lora_a, (&[rank, weight.in_features()], adapter_dtype, x.device()))?;
    check::tensor(OP, "lora_b", adapter.lora_b, (&[weight.out_features(), rank], adapter_dtype, x.device()))?;
    let base = linear::Spec {
        rows: x.shape()[0],
        in_features: weight.in_features(),
        out_features: weight.out_features(),
        dtype: x.dtype(),
        weight_dtype: weight.dtype(),
    };
    let dropout = adapter.dropout.map(|rows| checked_dropout(x, &rows)).transpose()?;
    Ok(Spec { base, rank, scale: adapter.scale, adapter_dtype, dropout })
}

fn checked_dropout(x: &Tensor, rows: &RowDropout<'_>) -> Result<Dropout> {
    let probability = rows.dropout.probability;
    if !(0.0..1.0).contains(&probability) {
        return check::invalid("lora_linear", "probability", probability, "in [0, 1)");
    }
    let like: (&[usize], _, _) = (&[x.shape()[0]], DType::I32, x.device());
    check::tensor("lora_linear", "sequences", rows.sequences, like)?;
    check::tensor("lora_linear", "positions", rows.positions, like)?;
    Ok(rows.dropout)
}

/// `y = x W^T + bias + scale * (x A^T) B^T`, `x`: `[rows, in_features]`.
///
/// # Errors
/// Shape, dtype or device mismatch; [`crate::Error::InvalidSpec`] for rank 0 or a probability outside `[0, 1)`.
pub fn forward(x: &Tensor, weight: &Weight, bias: Option<&Tensor>, adapter: Adapter<'_>) -> Result<Forward> {
    let spec = spec(x, weight, &adapter)?;
    if let Some(bias) = bias {
        check::float("lora_linear", "bias", bias.dtype())?;
        check::tensor("lora_linear", "bias", bias, (&[weight.out_features()], bias.dtype(), x.device()))?;
    }
    x.device().backend().lora_linear_forward(&spec, x, weight, bias, adapter)
}

/// `h` of [`forward`] alone, with the same bits: what the backward pass reads where nothing reads `y`.
///
/// # Errors
/// As [`forward`].
pub fn hidden(x: &Tensor, weight: &Weight, adapter: Adapter<'_>) -> Result<Tensor> {
    let spec = spec(x, weight, &adapter)?;
    x.device().backend().lora_linear_hidden(&spec, x, adapter)
}

/// `dx` if wanted; adds to the parameter gradients that are given.
///
/// # Errors
/// Shape, dtype or device mismatch; [`crate::Error::Shared`].
pub fn backward(inputs: Backward<'_>, gradients: ParameterGradients<'_>) -> Result<Option<Tensor>> {
    let spec = spec(inputs.x, inputs.weight, &inputs.adapter)?;
    let device = inputs.x.device().clone();
    let rows = spec.base.rows;
    check::tensor("lora_linear", "dy", inputs.dy, (&[rows, spec.base.out_features], spec.base.dtype, &device))?;
    check::tensor("lora_linear", "h", inputs.h, (&[rows, spec.rank], DType::F32, &device))?;
    if let Some(dlora_a) = &gradients.dlora_a {
        check::tensor("lora_linear", "dlora_a", dlora_a, (inputs.adapter.lora_a.shape(), DType::F32, &device))?;
    }
    if let Some(dlora_b) = &gradients.dlora_b {
        check::tensor("lora_linear", "dlora_b", dlora_b, (inputs.adapter.lora_b.shape(), DType::F32, &device))?;
    }
    device.backend().lora_linear_backward(&spec, inputs, gradients)
}
