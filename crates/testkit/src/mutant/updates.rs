//! Faults of the optimisers besides AdamW, and of rounding at random.

use unsloth_core::{
    Backend, DType, Result, Tensor,
    ops::{
        adafactor::{self, Adafactor},
        adamw::{self, StepState},
        adamw8bit::{self, AdamW8bit},
        elementwise,
        lion::{self, Lion},
        muon::{self, Muon},
        sgd::{self, Sgd},
        stochastic_rounding::{self, StochasticRounding},
    },
};

use super::{MutantBackend, Mutation, edited, mapped, mapped_integers, zeros_like};

/// The state of a step that is made whatever has been decided.
fn unskipped(state: &Tensor) -> Result<Tensor> {
    edited(state, |state| state[StepState::SKIP] = 0.0)
}

/// The state of a step whose gradients are taken as they are.
fn unscaled(state: &Tensor) -> Result<Tensor> {
    edited(state, |state| state[StepState::GRADIENT_SCALE] = 1.0)
}

impl<B: Backend> Sgd for MutantBackend<B> {
    fn sgd(&self, spec: &sgd::Spec, buffers: sgd::Buffers<'_>, state: &Tensor) -> Result<()> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::SgdIgnoresNesterov) => spec.nesterov = false,
            Some(Mutation::SgdIgnoresGradientScale) => return self.inner.sgd(&spec, buffers, &unscaled(state)?),
            Some(Mutation::SgdIgnoresSkip) => return self.inner.sgd(&spec, buffers, &unskipped(state)?),
            Some(Mutation::SgdDecouplesDecay) => {
                let kept = 1.0 - f64::from(spec.learning_rate * std::mem::take(&mut spec.weight_decay));
                *buffers.param = mapped(buffers.param, |value| value * kept)?;
            }
            Some(Mutation::SgdForgetsMomentum) => {
                let sgd::Buffers { param, grad, mut buf } = buffers;
                if let Some(buf) = &mut buf {
                    **buf = zeros_like(buf)?;
                }
                return self.inner.sgd(&spec, sgd::Buffers { param, grad, buf }, state);
            }
            _ => {}
        }
        self.inner.sgd(&spec, buffers, state)
    }
}

impl<B: Backend> Lion for MutantBackend<B> {
    fn lion(&self, spec: &lion::Spec, buffers: lion::Buffers<'_>, state: &Tensor) -> Result<()> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::LionSwapsBetas) => (spec.beta1, spec.beta2) = (spec.beta2, spec.beta1),
            Some(Mutation::LionDropsDecay) => spec.weight_decay = 0.0,
            Some(Mutation::LionIgnoresGradientScale) => return self.inner.lion(&spec, buffers, &unscaled(state)?),
            Some(Mutation::LionIgnoresSkip) => return self.inner.lion(&spec, buffers, &unskipped(state)?),
            Some(Mutation::LionHasNoZero) => {
                let grad = mapped(buffers.grad, |value| if value == 0.0 { 1e-30 } else { value })?;
                return self.inner.lion(&spec, lion::Buffers { grad: &grad, ..buffers }, state);
            }
            _ => {}
        }
        self.inner.lion(&spec, buffers, state)
    }
}

impl<B: Backend> AdamW8bit for MutantBackend<B> {
    fn adamw8bit(&self, spec: &adamw::Spec, buffers: adamw8bit::Buffers<'_>, state: &Tensor) -> Result<()> {
        let adamw8bit::Buffers { param, grad, m_codes, m_absmax, v_codes, v_absmax } = buffers;
        let state = match self.mutation {
            Some(Mutation::Adamw8bitIgnoresSkip) => unskipped(state)?,
            Some(Mutation::Adamw8bitIgnoresGradientScale) => unscaled(state)?,
            _ => state.clone(),
        };
        let inner = adamw8bit::Buffers {
            param: &mut *param,
            grad,
            m_codes: &mut *m_codes,
            m_absmax: &mut *m_absmax,
            v_codes: &mut *v_codes,
            v_absmax: &mut *v_absmax,
        };
        self.inner.adamw8bit(spec, inner, &state)?;
        match self.mutation {
            // The lowest code of each word, where it has a lower neighbour.
            Some(Mutation::Adamw8bitRoundsDown) => {
                *m_codes = mapped_integers(m_codes, |_, word| word - i32::from(word & 0xFF > 0))?;
            }
            Some(Mutation::Adamw8bitKeepsOneMagnitude) => {
                *v_absmax = edited(v_absmax, |values| {
                    let largest = values.iter().fold(0.0, |largest: f64, value| largest.max(*value));
                    values.fill(largest);
                })?;
            }
            _ => {}
        }
        Ok(())
    }
}

impl<B: Backend> Adafactor for MutantBackend<B> {
    fn adafactor(&self, spec: &adafactor::Spec, buffers: adafactor::Buffers<'_>, state: &Tensor) -> Result<()> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::AdafactorIgnoresThreshold) => spec.clip_threshold = 1e30,
            Some(Mutation::AdafactorKeepsDecay) => spec.decay_rate = -1e-6,
            Some(Mutation::AdafactorDropsEps) => spec.eps = 1e-30,
            Some(Mutation::AdafactorDropsDecay) => spec.weight_decay = 0.0,
            Some(Mutation::AdafactorIgnoresParameter) => spec.parameter_scale = None,
            Some(Mutation::AdafactorIgnoresGradientScale) => {
                return self.inner.adafactor(&spec, buffers, &unscaled(state)?);
            }
            Some(Mutation::AdafactorIgnoresSkip) => return self.inner.adafactor(&spec, buffers, &unskipped(state)?),
            _ => {}
        }
        self.inner.adafactor(&spec, buffers, state)
    }
}

impl<B: Backend> Muon for MutantBackend<B> {
    fn muon_direction(&self, spec: &muon::Spec, grad: &Tensor, buf: &mut Tensor, state: &Tensor) -> Result<Tensor> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::MuonIgnoresNesterov) => spec.nesterov = false,
            Some(Mutation::MuonForgetsMomentum) => *buf = zeros_like(buf)?,
            Some(Mutation::MuonKeepsNorm) => spec.eps = 1.0,
            Some(Mutation::MuonDropsEps) => spec.eps = 1e-30,
            Some(Mutation::MuonIgnoresGradientScale) => {
                return self.inner.muon_direction(&spec, grad, buf, &unscaled(state)?);
            }
            Some(Mutation::MuonIgnoresSkip) => return self.inner.muon_direction(&spec, grad, buf, &unskipped(state)?),
            _ => {}
        }
        self.inner.muon_direction(&spec, grad, buf, state)
    }

    fn muon_apply(&self, spec: &muon::Spec, param: &mut Tensor, direction: &Tensor, state: &Tensor) -> Result<()> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::MuonIgnoresShape) => spec.adjustment = 1.0,
            Some(Mutation::MuonDropsDecay) => spec.weight_decay = 0.0,
            Some(Mutation::MuonAdjustsDecay) => spec.weight_decay *= spec.adjustment,
            Some(Mutation::MuonIgnoresSkip) => {
                return self.inner.muon_apply(&spec, param, direction, &unskipped(state)?);
            }
            _ => {}
        }
        self.inner.muon_apply(&spec, param, direction, state)
    }
}

impl<B: Backend> StochasticRounding for MutantBackend<B> {
    fn round_stochastically(&self, spec: &stochastic_rounding::Spec, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let mut spec = *spec;
        match self.mutation {
            Some(Mutation::RoundingIgnoresStep) => spec.step = 0,
            Some(Mutation::RoundingIgnoresTensor) => spec.tensor = 0,
            Some(Mutation::RoundingIsNearest) => {
                *out = elementwise::cast(x, DType::BF16)?;
                return Ok(());
            }
            _ => {}
        }
        self.inner.round_stochastically(&spec, x, out)
    }
}
