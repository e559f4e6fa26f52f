//! The operators of optimisers, which gradients are found without.

use unsloth_core::{
    Result, Tensor,
    ops::{adafactor, adamw, adamw8bit, lion, muon, sgd, stochastic_rounding},
};

use crate::{backend::ExactBackend, ops::unsupported};

fn refused<T>(op: &'static str) -> Result<T> {
    unsupported(op, "optimisers")
}

impl adamw::AdamW for ExactBackend {
    fn step_control(
        &self,
        _spec: &adamw::ControlSpec,
        _norm: &Tensor,
        _finite: &Tensor,
        _state: &mut Tensor,
    ) -> Result<()> {
        refused("step_control")
    }
    fn adamw(&self, _spec: &adamw::Spec, _parameters: &mut [adamw::Buffers<'_>], _state: &Tensor) -> Result<()> {
        refused("adamw")
    }
}

impl adamw8bit::AdamW8bit for ExactBackend {
    fn adamw8bit(&self, _spec: &adamw::Spec, _buffers: adamw8bit::Buffers<'_>, _state: &Tensor) -> Result<()> {
        refused("adamw8bit")
    }
}

impl adafactor::Adafactor for ExactBackend {
    fn adafactor(&self, _spec: &adafactor::Spec, _buffers: adafactor::Buffers<'_>, _state: &Tensor) -> Result<()> {
        refused("adafactor")
    }
}

impl lion::Lion for ExactBackend {
    fn lion(&self, _spec: &lion::Spec, _buffers: lion::Buffers<'_>, _state: &Tensor) -> Result<()> {
        refused("lion")
    }
}

impl muon::Muon for ExactBackend {
    fn muon_direction(&self, _spec: &muon::Spec, _grad: &Tensor, _buf: &mut Tensor, _state: &Tensor) -> Result<Tensor> {
        refused("muon")
    }
    fn muon_apply(&self, _spec: &muon::Spec, _param: &mut Tensor, _direction: &Tensor, _state: &Tensor) -> Result<()> {
        refused("muon")
    }
}

impl sgd::Sgd for ExactBackend {
    fn sgd(&self, _spec: &sgd::Spec, _buffers: sgd::Buffers<'_>, _state: &Tensor) -> Result<()> {
        refused("sgd")
    }
}

impl stochastic_rounding::StochasticRounding for ExactBackend {
    fn round_stochastically(&self, _spec: &stochastic_rounding::Spec, _x: &Tensor, _out: &mut Tensor) -> Result<()> {
        refused("stochastic_rounding")
    }
}
