//! Operators that have no kernel yet: a typed error, never a silent detour through the host.

use cubecl::prelude::Runtime;
use unsloth_core::{
    Result, Tensor, Weight,
    ops::{cross_entropy, embedding, glu, linear_cross_entropy, lora_linear},
};

use crate::backend::CubeBackend;

impl<R: Runtime> embedding::Embedding for CubeBackend<R> {
    fn embedding_forward(&self, _spec: &embedding::Spec, _weight: &Weight, _ids: &Tensor) -> Result<Tensor> {
        self.unsupported("embedding_forward")
    }
    fn embedding_backward(
        &self,
        _spec: &embedding::Spec,
        _ids: &Tensor,
        _dout: &Tensor,
        _dweight: &mut Tensor,
    ) -> Result<()> {
        self.unsupported("embedding_backward")
    }
}

impl<R: Runtime> glu::Glu for CubeBackend<R> {
    fn glu_forward(&self, _spec: &glu::Spec, _gate: &Tensor, _up: &Tensor) -> Result<Tensor> {
        self.unsupported("glu_forward")
    }
    fn glu_backward(&self, _spec: &glu::Spec, _dout: &Tensor, _gate: Tensor, _up: Tensor) -> Result<glu::Gradients> {
        self.unsupported("glu_backward")
    }
}

impl<R: Runtime> lora_linear::LoraLinear for CubeBackend<R> {
    fn lora_linear_forward(
        &self,
        _spec: &lora_linear::Spec,
        _x: &Tensor,
        _weight: &Weight,
        _bias: Option<&Tensor>,
        _adapter: lora_linear::Adapter<'_>,
    ) -> Result<lora_linear::Forward> {
        self.unsupported("lora_linear_forward")
    }
    fn lora_linear_backward(
        &self,
        _spec: &lora_linear::Spec,
        _inputs: lora_linear::Backward<'_>,
        _gradients: lora_linear::ParameterGradients<'_>,
    ) -> Result<Option<Tensor>> {
        self.unsupported("lora_linear_backward")
    }
}

impl<R: Runtime> cross_entropy::CrossEntropy for CubeBackend<R> {
    fn cross_entropy_forward(
        &self,
        _spec: &cross_entropy::Spec,
        _logits: &Tensor,
        _targets: &Tensor,
    ) -> Result<cross_entropy::Forward> {
        self.unsupported("cross_entropy_forward")
    }
    fn cross_entropy_backward(
        &self,
        _spec: &cross_entropy::Spec,
        _logits: Tensor,
        _targets: &Tensor,
        _lse: &Tensor,
    ) -> Result<Tensor> {
        self.unsupported("cross_entropy_backward")
    }
}

impl<R: Runtime> linear_cross_entropy::LinearCrossEntropy for CubeBackend<R> {
    fn linear_cross_entropy(
        &self,
        _spec: &linear_cross_entropy::Spec,
        _x: &Tensor,
        _weight: &Weight,
        _targets: &Tensor,
        _dweight: Option<&mut Tensor>,
    ) -> Result<linear_cross_entropy::Forward> {
        self.unsupported("linear_cross_entropy")
    }
}
