//! The operators of optimisers: what a call is, and the call itself handed on.

use super::{Call, Observed, ops::like};
use crate::{
    Result, Tensor,
    ops::{adafactor, adamw, adamw8bit, lion, muon, reduce, sgd, stochastic_rounding},
};

impl adamw::AdamW for Observed {
    fn step_control(
        &self,
        spec: &adamw::ControlSpec,
        norm: &Tensor,
        finite: &Tensor,
        state: &mut Tensor,
    ) -> Result<()> {
        let cost = reduce::cost(&[norm, finite]);
        self.update(|| like("step_control", norm, cost), |backend| backend.step_control(spec, norm, finite, state))
    }
    fn adamw(&self, spec: &adamw::Spec, parameters: &mut [adamw::Buffers<'_>], state: &Tensor) -> Result<()> {
        let (shape, cost) = (format!("{} parameters", parameters.len()), parameters.iter().map(|p| p.cost()).sum());
        let about = || Call { name: "adamw step", shape, weights: vec![], cost };
        self.update(about, |backend| backend.adamw(spec, parameters, state))
    }
}

impl adamw8bit::AdamW8bit for Observed {
    fn adamw8bit(&self, spec: &adamw::Spec, buffers: adamw8bit::Buffers<'_>, state: &Tensor) -> Result<()> {
        let (grad, cost) = (buffers.grad, buffers.cost());
        self.update(|| like("adamw8bit step", grad, cost), |backend| backend.adamw8bit(spec, buffers, state))
    }
}

impl lion::Lion for Observed {
    fn lion(&self, spec: &lion::Spec, buffers: lion::Buffers<'_>, state: &Tensor) -> Result<()> {
        let (grad, cost) = (buffers.grad, buffers.cost());
        self.update(|| like("lion step", grad, cost), |backend| backend.lion(spec, buffers, state))
    }
}

impl adafactor::Adafactor for Observed {
    fn adafactor(&self, spec: &adafactor::Spec, buffers: adafactor::Buffers<'_>, state: &Tensor) -> Result<()> {
        let (grad, cost) = (buffers.grad, buffers.cost());
        self.update(|| like("adafactor step", grad, cost), |backend| backend.adafactor(spec, buffers, state))
    }
}

impl muon::Muon for Observed {
    fn muon_direction(&self, spec: &muon::Spec, grad: &Tensor, buf: &mut Tensor, state: &Tensor) -> Result<Tensor> {
        let cost = muon::direction_cost(grad, buf);
        self.call(|| like("muon direction", grad, cost), |backend| backend.muon_direction(spec, grad, buf, state))
    }
    fn muon_apply(&self, spec: &muon::Spec, param: &mut Tensor, direction: &Tensor, state: &Tensor) -> Result<()> {
        let cost = muon::apply_cost(param, direction);
        self.update(|| like("muon apply", direction, cost), |backend| backend.muon_apply(spec, param, direction, state))
    }
}

impl stochastic_rounding::StochasticRounding for Observed {
    fn round_stochastically(&self, spec: &stochastic_rounding::Spec, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let cost = stochastic_rounding::cost(x, out);
        self.update(|| like("stochastic_rounding", x, cost), |backend| backend.round_stochastically(spec, x, out))
    }
}

impl sgd::Sgd for Observed {
    fn sgd(&self, spec: &sgd::Spec, buffers: sgd::Buffers<'_>, state: &Tensor) -> Result<()> {
        let (grad, cost) = (buffers.grad, buffers.cost());
        self.update(|| like("sgd step", grad, cost), |backend| backend.sgd(spec, buffers, state))
    }
}
