//! Gated linear units in one pass over the inputs; the activation's polynomial is vectorised with the product.

use unsloth_core::{
    Category, FloatElement, Result, Tensor,
    ops::glu::{Activation, Glu, Gradients, Spec},
};

use crate::{
    CpuBackend,
    access::{dispatch_float, output, read, write},
    elementwise::{Reused, fetch},
    simd::{self, BLOCK, Fused, TASK, produce, update, vectorised_fused, widened},
};

/// sqrt(2 / pi)
const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;
/// 1 / sqrt(2 pi)
const DENSITY: f32 = 0.398_942_3;

/// Value and derivative of an activation.
trait Curve {
    fn value(m: Fused, x: f32) -> f32;
    fn value_and_slope(m: Fused, x: f32) -> (f32, f32);
}

struct Silu;

impl Curve for Silu {
    #[inline(always)]
    fn value(m: Fused, x: f32) -> f32 {
        x * simd::sigmoid(m, x)
    }
    #[inline(always)]
    fn value_and_slope(m: Fused, x: f32) -> (f32, f32) {
        let s = simd::sigmoid(m, x);
        (x * s, s * (1.0 + x * (1.0 - s)))
    }
}

struct GeluTanh;

impl Curve for GeluTanh {
    #[inline(always)]
    fn value(m: Fused, x: f32) -> f32 {
        0.5 * x * (1.0 + simd::tanh(m, GELU_SCALE * (x + GELU_CUBIC * x * x * x)))
    }
    #[inline(always)]
    fn value_and_slope(m: Fused, x: f32) -> (f32, f32) {
        let t = simd::tanh(m, GELU_SCALE * (x + GELU_CUBIC * x * x * x));
        // Beyond 10 the factor `1 - t^2` is 0, but the square of a huge argument is infinite.
        let bounded = if x > 10.0 { 10.0 } else { x };
        let bounded = if bounded < -10.0 { -10.0 } else { bounded };
        let inner = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * bounded * bounded);
        (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * bounded * (1.0 - t * t) * inner)
    }
}

struct GeluErf;

impl Curve for GeluErf {
    #[inline(always)]
    fn value(m: Fused, x: f32) -> f32 {
        0.5 * x * (1.0 + simd::erf(m, x * std::f32::consts::FRAC_1_SQRT_2))
    }
    #[inline(always)]
    fn value_and_slope(m: Fused, x: f32) -> (f32, f32) {
        let probability = 0.5 * (1.0 + simd::erf(m, x * std::f32::consts::FRAC_1_SQRT_2));
        (x * probability, probability + x * DENSITY * simd::exp(m, -0.5 * x * x))
    }
}

/// Runs `$body` with `$C` bound to the activation's type.
macro_rules! dispatch_curve {
    ($activation:expr, $C:ident => $body:expr) => {
        match $activation {
            Activation::Silu => {
                type $C = Silu;
                $body
            }
            Activation::GeluTanh => {
                type $C = GeluTanh;
                $body
            }
            Activation::GeluErf => {
                type $C = GeluErf;
                $body
            }
        }
    };
}

/// `gate`, `up` become their gradients.
fn backward_block<C: Curve>(dout: &[f32], gate: &mut [f32], up: &mut [f32]) {
    vectorised_fused(
        #[inline(always)]
        |m| {
            for ((dout, gate), up) in dout.iter().zip(gate).zip(up) {
                let (value, slope) = C::value_and_slope(m, *gate);
                (*gate, *up) = (dout * *up * slope, dout * value);
            }
        },
    );
}

impl CpuBackend {
    fn glu_values<T: FloatElement, C: Curve>(&self, gate: &[T], up: &[T], out: &mut [T]) {
        self.for_each_block(out, |start, out, [wide_gate, wide_up, wide_out]| {
            let gate = widened(&gate[start..start + out.len()], wide_gate);
            let up = widened(&up[start..start + out.len()], wide_up);
            produce(out, wide_out, |out| {
                vectorised_fused(
                    #[inline(always)]
                    |m| {
                        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                            *out = C::value(m, *gate) * up;
                        }
                    },
                );
            });
        });
    }

    fn glu_gradients<T: FloatElement, C: Curve>(&self, dout: &[T], gate: &mut Reused, up: &mut Reused) -> Result<()> {
        let (dgate, gate) = gate.slices::<T>("glu")?;
        let (dup, up) = up.slices::<T>("glu")?;
        let task = |start: usize, dgate: &mut [T], dup: &mut [T]| {
            let [mut wide_dout, mut wide_gate, mut wide_up] = [[0.0; BLOCK]; 3];
            let blocks = dgate.chunks_mut(BLOCK).zip(dup.chunks_mut(BLOCK)).enumerate();
            for (i, (dgate, dup)) in blocks {
                let start = start + i * BLOCK;
                fetch(dgate, gate, start);
                fetch(dup, up, start);
                let dout = widened(&dout[start..start + dgate.len()], &mut wide_dout);
                update(dgate, &mut wide_gate, |gate| {
                    update(dup, &mut wide_up, |up| backward_block::<C>(dout, gate, up));
                });
            }
        };
        let parts = dgate.chunks_mut(TASK).zip(dup.chunks_mut(TASK)).enumerate();
        self.for_each_part(parts, |(i, (dgate, dup))| task(i * TASK, dgate, dup));
        Ok(())
    }
}

impl Glu for CpuBackend {
    fn glu_forward(&self, spec: &Spec, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let mut out = output(gate, spec.dtype, *gate.shape(), Category::Activations)?;
        dispatch_float!(spec.dtype, T => dispatch_curve!(spec.activation, C => {
            self.glu_values::<T, C>(read(gate), read(up), write("glu", "out", &mut out)?);
        }));
        Ok(out)
    }

    fn glu_backward(&self, spec: &Spec, dout: &Tensor, gate: Tensor, up: Tensor) -> Result<Gradients> {
        let (mut gate, mut up) = (Reused::new(gate)?, Reused::new(up)?);
        dispatch_float!(spec.dtype, T => dispatch_curve!(spec.activation, C => {
            self.glu_gradients::<T, C>(read(dout), &mut gate, &mut up)?;
        }));
        Ok(Gradients { dgate: gate.out, dup: up.out })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Both = fn(Fused, f32) -> (f32, f32);

    /// Far from zero a gate passes everything or nothing, however large the argument.
    #[test]
    fn slopes_of_huge_arguments_are_finite() {
        for x in [11.0f32, 100.0, 1e6, 1e19, 1e30] {
            for curve in [Silu::value_and_slope as Both, GeluTanh::value_and_slope, GeluErf::value_and_slope] {
                let ((value, slope), (negative_value, negative_slope)) =
                    vectorised_fused(|m| (curve(m, x), curve(m, -x)));
                assert!((value / x - 1.0).abs() < 2e-5 && (slope - 1.0).abs() < 2e-4, "{x}: {value} {slope}");
                assert!(
                    negative_value.abs() < 2e-4 && negative_slope.abs() < 2e-4,
                    "{x}: {negative_value} {negative_slope}"
                );
            }
        }
    }
}
