//! Every operator of a model: what a call is, and the call itself handed on.

use super::{Call, Observed, results::Results};
use crate::{
    Backend, DType, KvView, Lengths, Result, Sequences, Tensor, Weight,
    ops::{
        Cost, attention, cross_entropy, dora, elementwise, embedding, glu, layer_norm, linear, linear_cross_entropy,
        lora_linear, reduce, rms_norm, rope,
    },
};

/// A call whose sizes are those of a tensor.
pub(super) fn like<'a>(name: &'static str, tensor: &Tensor, cost: Cost) -> Call<'a> {
    Call { name, shape: tensor.shape().to_string(), weights: vec![], cost }
}

/// A product.
fn product<'a>(name: &'static str, spec: &linear::Spec, weights: Vec<&'a Tensor>, cost: Cost) -> Call<'a> {
    let linear::Spec { rows, in_features, out_features, .. } = spec;
    Call { name, shape: format!("{rows} x {in_features} -> {out_features}"), weights, cost }
}

/// The tensor of a matrix, if it is one.
fn dense(weight: &Weight) -> Option<&Tensor> {
    match weight {
        Weight::Dense(tensor) => Some(tensor),
    }
}

/// A matrix and a bias.
fn base<'a>(weight: &'a Weight, bias: Option<&'a Tensor>) -> Vec<&'a Tensor> {
    dense(weight).into_iter().chain(bias).collect()
}

/// A layer with an adapter.
fn adapted<'a>(adapter: &lora_linear::Adapter<'a>, weight: &'a Weight, bias: Option<&'a Tensor>) -> Vec<&'a Tensor> {
    [adapter.lora_a, adapter.lora_b].into_iter().chain(base(weight, bias)).collect()
}

impl elementwise::Elementwise for Observed {
    fn add(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        let cost = elementwise::binary_cost(&a);
        self.call(|| like("add", b, cost), |backend| backend.add(a, b))
    }
    fn mul(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        let cost = elementwise::binary_cost(&a);
        self.call(|| like("mul", b, cost), |backend| backend.mul(a, b))
    }
    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        let (shape, cost) = (*x.shape(), elementwise::unary_cost(&x));
        let about = || Call { name: "scale", shape: shape.to_string(), weights: vec![], cost };
        self.call(about, |backend| backend.scale(x, factor))
    }
    fn scale_by(&self, x: Tensor, scalar: &Tensor) -> Result<Tensor> {
        let (shape, cost) = (*x.shape(), elementwise::unary_cost(&x));
        let about = || Call { name: "scale_by", shape: shape.to_string(), weights: vec![], cost };
        self.call(about, |backend| backend.scale_by(x, scalar))
    }
    fn accumulate(&self, accumulator: &mut Tensor, x: &Tensor) -> Result<()> {
        let cost = elementwise::accumulate_cost(accumulator, x);
        let seen = self.begin(|| like("accumulate", x, cost))?;
        self.backend().accumulate(accumulator, x)?;
        self.end(seen, [&*accumulator])
    }
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let about = || Call { weights: vec![x], ..like("cast", x, elementwise::cast_cost(x, dtype)) };
        self.call(about, |backend| backend.cast(x, dtype))
    }
    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        self.call(|| like("copy", x, elementwise::unary_cost(x)), |backend| backend.copy(x))
    }
    fn fill_zero(&self, x: &mut Tensor) -> Result<()> {
        let (shape, cost) = (*x.shape(), elementwise::fill_cost(x));
        let about = || Call { name: "fill_zero", shape: shape.to_string(), weights: vec![], cost };
        let seen = self.begin(about)?;
        self.backend().fill_zero(x)?;
        self.end(seen, [&*x])
    }
}

impl Observed {
    /// A call of an optimiser.
    pub(super) fn update<'a>(
        &'a self,
        about: impl FnOnce() -> Call<'a>,
        work: impl FnOnce(&dyn Backend) -> Result<()>,
    ) -> Result<()> {
        let seen = self.begin(about)?;
        work(self.backend())?;
        self.end(seen, [])
    }
}

/// A reduction of many tensors.
fn list<'a>(name: &'static str, tensors: &[&Tensor]) -> Call<'a> {
    let elements: usize = tensors.iter().map(|tensor| tensor.num_elements()).sum();
    let shape = format!("{} tensors, {elements} elements", tensors.len());
    Call { name, shape, weights: vec![], cost: reduce::cost(tensors) }
}

impl reduce::Reduce for Observed {
    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        self.call(|| like("sum", x, reduce::cost(&[x])), |backend| backend.sum(x))
    }
    fn all_finite(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        self.call(|| list("all_finite", tensors), |backend| backend.all_finite(tensors))
    }
    fn grad_norm(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        self.call(|| list("grad_norm", tensors), |backend| backend.grad_norm(tensors))
    }
}

impl embedding::Embedding for Observed {
    fn embedding_forward(&self, spec: &embedding::Spec, weight: &Weight, ids: &Tensor) -> Result<Tensor> {
        let about = || Call {
            name: "embedding forward",
            shape: format!("{} x {}", spec.tokens, spec.hidden_size),
            weights: base(weight, None),
            cost: spec.forward_cost(),
        };
        self.call(about, |backend| backend.embedding_forward(spec, weight, ids))
    }
    fn embedding_backward(
        &self,
        spec: &embedding::Spec,
        ids: &Tensor,
        dout: &Tensor,
        dweight: &mut Tensor,
    ) -> Result<()> {
        let seen = self.begin(|| like("embedding backward", dout, spec.backward_cost()))?;
        self.backend().embedding_backward(spec, ids, dout, dweight)?;
        self.end(seen, [&*dweight])
    }
}

impl rms_norm::RmsNorm for Observed {
    fn rms_norm_forward(
        &self,
        spec: &rms_norm::Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        weight: &Tensor,
    ) -> Result<rms_norm::Forward> {
        let about = || Call {
            name: "rms_norm forward",
            shape: format!("{} x {}", spec.rows, spec.hidden_size),
            weights: vec![weight],
            cost: spec.forward_cost(residual.is_some()),
        };
        self.call(about, |backend| backend.rms_norm_forward(spec, x, residual, weight))
    }
    fn rms_norm_backward(
        &self,
        spec: &rms_norm::Spec,
        inputs: rms_norm::Backward<'_>,
        mut dweight: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let (weight, cost) = (inputs.weight, spec.backward_cost(inputs.dsum.is_some(), dweight.is_some()));
        let shape = || format!("{} x {}", spec.rows, spec.hidden_size);
        let seen = self.begin(|| Call { name: "rms_norm backward", shape: shape(), weights: vec![weight], cost })?;
        let dx = self.backend().rms_norm_backward(spec, inputs, dweight.as_deref_mut())?;
        self.end(seen, [&dx].into_iter().chain(dweight.as_deref()))?;
        Ok(dx)
    }
}

impl layer_norm::LayerNorm for Observed {
    fn layer_norm_forward(
        &self,
        spec: &layer_norm::Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        affine: layer_norm::Affine<'_>,
    ) -> Result<layer_norm::Forward> {
        let about = || Call {
            name: "layer_norm forward",
            shape: format!("{} x {}", spec.rows, spec.hidden_size),
            weights: [affine.weight].into_iter().chain(affine.bias).collect(),
            cost: spec.forward_cost(residual.is_some(), affine.bias.is_some()),
        };
        self.call(about, |backend| backend.layer_norm_forward(spec, x, residual, affine))
    }
    fn layer_norm_backward(
        &self,
        spec: &layer_norm::Spec,
        inputs: layer_norm::Backward<'_>,
        gradients: layer_norm::ParameterGradients<'_>,
    ) -> Result<Tensor> {
        let layer_norm::ParameterGradients { mut dweight, mut dbias } = gradients;
        let num_gradients = usize::from(dweight.is_some()) + usize::from(dbias.is_some());
        let (weight, cost) = (inputs.weight, spec.backward_cost(inputs.dsum.is_some(), num_gradients));
        let shape = || format!("{} x {}", spec.rows, spec.hidden_size);
        let seen = self.begin(|| Call { name: "layer_norm backward", shape: shape(), weights: vec![weight], cost })?;
        let wanted = layer_norm::ParameterGradients { dweight: dweight.as_deref_mut(), dbias: dbias.as_deref_mut() };
        let dx = self.backend().layer_norm_backward(spec, inputs, wanted)?;
        self.end(seen, [&dx].into_iter().chain(dweight.as_deref()).chain(dbias.as_deref()))?;
        Ok(dx)
    }
}

impl rope::Rope for Observed {
    fn rope(&self, spec: &rope::Spec, q: Tensor, k: Tensor, angles: rope::Angles<'_>) -> Result<(Tensor, Tensor)> {
        let name = match spec.direction {
            rope::Direction::Forward => "rope forward",
            rope::Direction::Inverse => "rope backward",
        };
        let about = || Call {
            name,
            shape: format!("{} x ({} + {}) x {}", spec.tokens, spec.num_heads, spec.num_kv_heads, spec.head_dim),
            weights: vec![],
            cost: spec.cost(),
        };
        self.call(about, |backend| backend.rope(spec, q, k, angles))
    }
}

impl glu::Glu for Observed {
    fn glu_forward(&self, spec: &glu::Spec, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let about = || like("glu forward", gate, spec.forward_cost());
        self.call(about, |backend| backend.glu_forward(spec, gate, up))
    }
    fn glu_backward(&self, spec: &glu::Spec, dout: &Tensor, gate: Tensor, up: Tensor) -> Result<glu::Gradients> {
        let about = || like("glu backward", dout, spec.backward_cost());
        self.call(about, |backend| backend.glu_backward(spec, dout, gate, up))
    }
}

fn heads(spec: &attention::Spec, tokens_q: usize, tokens_k: usize) -> String {
    let attention::Spec { num_heads, num_kv_heads, head_dim, .. } = spec;
    format!("{tokens_q} x {num_heads} on {tokens_k} x {num_kv_heads}, {head_dim}")
}

impl attention::Attention for Observed {
    fn attention_forward(&self, spec: &attention::Spec, inputs: attention::Inputs<'_>) -> Result<attention::Forward> {
        let about = || Call {
            name: "attention forward",
            shape: heads(spec, inputs.seq_q.num_tokens(), inputs.seq_k.num_tokens()),
            weights: vec![],
            cost: spec.forward_cost(inputs.seq_q.offsets(), inputs.seq_k.offsets()),
        };
        self.call(about, |backend| backend.attention_forward(spec, inputs))
    }
    fn attention_backward(
        &self,
        spec: &attention::Spec,
        inputs: attention::Inputs<'_>,
        backward: attention::Backward<'_>,
    ) -> Result<attention::Gradients> {
        let about = || Call {
            name: "attention backward",
            shape: heads(spec, inputs.seq_q.num_tokens(), inputs.seq_k.num_tokens()),
            weights: vec![],
            cost: spec.backward_cost(inputs.seq_q.offsets(), inputs.seq_k.offsets()),
        };
        self.call(about, |backend| backend.attention_backward(spec, inputs, backward))
    }
    fn attention_cached(
        &self,
        spec: &attention::Spec,
        q: &Tensor,
        seq_q: &Sequences,
        kv: KvView<'_>,
    ) -> Result<Tensor> {
        let about = || Call {
            name: "attention cached",
            shape: heads(spec, seq_q.num_tokens(), kv.lens.host().iter().sum()),
            weights: vec![],
            cost: spec.cached_cost(seq_q.offsets(), kv.lens.host()),
        };
        self.call(about, |backend| backend.attention_cached(spec, q, seq_q, kv))
    }
    fn kv_append(&self, cache: &mut Tensor, rows: &Tensor, seqs: &Sequences, start: &Lengths) -> Result<()> {
        let seen = self.begin(|| like("kv_append", rows, attention::kv_append_cost(rows)))?;
        self.backend().kv_append(cache, rows, seqs, start)?;
        // Behind the rows that were written the cache holds anything.
        self.end(seen, [])
    }
}

impl linear::Linear for Observed {
    fn linear_forward(
        &self,
        spec: &linear::Spec,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let about = || product("linear forward", spec, base(weight, bias), spec.forward_cost());
        self.call(about, |backend| backend.linear_forward(spec, x, weight, bias))
    }
    fn linear_input_gradient(&self, spec: &linear::Spec, dy: &Tensor, weight: &Weight) -> Result<Tensor> {
        let about = || product("linear input gradient", spec, base(weight, None), spec.input_gradient_cost());
        self.call(about, |backend| backend.linear_input_gradient(spec, dy, weight))
    }
    fn linear_weight_gradient(&self, spec: &linear::Spec, dy: &Tensor, x: &Tensor, dweight: &mut Tensor) -> Result<()> {
        let seen = self.begin(|| product("linear weight gradient", spec, vec![], spec.weight_gradient_cost()))?;
        self.backend().linear_weight_gradient(spec, dy, x, dweight)?;
        self.end(seen, [&*dweight])
    }
    fn linear_bias_gradient(&self, spec: &linear::Spec, dy: &Tensor, dbias: &mut Tensor) -> Result<()> {
        let seen = self.begin(|| like("linear bias gradient", dy, spec.bias_gradient_cost()))?;
        self.backend().linear_bias_gradient(spec, dy, dbias)?;
        self.end(seen, [&*dbias])
    }
}

impl lora_linear::LoraLinear for Observed {
    fn lora_linear_hidden(
        &self,
        spec: &lora_linear::Spec,
        x: &Tensor,
        adapter: lora_linear::Adapter<'_>,
    ) -> Result<Tensor> {
        let about = || product("lora_linear hidden", &spec.base, vec![adapter.lora_a], spec.hidden_cost());
        self.call(about, |backend| backend.lora_linear_hidden(spec, x, adapter))
    }
    fn lora_linear_forward(
        &self,
        spec: &lora_linear::Spec,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        adapter: lora_linear::Adapter<'_>,
    ) -> Result<lora_linear::Forward> {
        let weights = || adapted(&adapter, weight, bias);
        let about = || product("lora_linear forward", &spec.base, weights(), spec.forward_cost());
        self.call(about, |backend| backend.lora_linear_forward(spec, x, weight, bias, adapter))
    }
    fn lora_linear_backward(
        &self,
        spec: &lora_linear::Spec,
        inputs: lora_linear::Backward<'_>,
        gradients: lora_linear::ParameterGradients<'_>,
    ) -> Result<Option<Tensor>> {
        let (needs_a, needs_b) = (gradients.dlora_a.is_some(), gradients.dlora_b.is_some());
        let cost = spec.backward_cost(inputs.needs_dx, needs_a, needs_b);
        let weights = || adapted(&inputs.adapter, inputs.weight, None);
        let seen = self.begin(|| product("lora_linear backward", &spec.base, weights(), cost))?;
        let lora_linear::ParameterGradients { mut dlora_a, mut dlora_b } = gradients;
        let (dlora_a, dlora_b) = (&mut dlora_a, &mut dlora_b);
        let gradients =
            lora_linear::ParameterGradients { dlora_a: dlora_a.as_deref_mut(), dlora_b: dlora_b.as_deref_mut() };
        let dx = self.backend().lora_linear_backward(spec, inputs, gradients)?;
        self.end(seen, dx.iter().chain(dlora_b.as_deref()).chain(dlora_a.as_deref()))?;
        Ok(dx)
    }
}

impl dora::Dora for Observed {
    fn dora_norms(&self, spec: &dora::NormSpec, weight: &Weight, lora_a: &Tensor, lora_b: &Tensor) -> Result<Tensor> {
        let about = || Call {
            name: "dora norms",
            shape: format!("{} x {}, rank {}", spec.out_features, spec.in_features, spec.rank),
            weights: [lora_a, lora_b].into_iter().chain(dense(weight)).collect(),
            cost: spec.cost(),
        };
        self.call(about, |backend| backend.dora_norms(spec, weight, lora_a, lora_b))
    }
    fn dora_forward(
        &self,
        spec: &dora::Spec,
        t: &Tensor,
        lengths: dora::Lengths<'_>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let weights = || [lengths.magnitude, lengths.norms].into_iter().chain(bias).collect();
        let about = || Call { weights: weights(), ..like("dora forward", t, spec.forward_cost()) };
        self.call(about, |backend| backend.dora_forward(spec, t, lengths, bias))
    }
    fn dora_backward(
        &self,
        spec: &dora::Spec,
        dy: Tensor,
        t: &Tensor,
        lengths: dora::Lengths<'_>,
        mut dmagnitude: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let weights = || vec![lengths.magnitude, lengths.norms];
        let seen = self.begin(|| Call { weights: weights(), ..like("dora backward", t, spec.backward_cost()) })?;
        let dt = self.backend().dora_backward(spec, dy, t, lengths, dmagnitude.as_deref_mut())?;
        self.end(seen, [&dt].into_iter().chain(dmagnitude.as_deref()))?;
        Ok(dt)
    }
}

impl cross_entropy::CrossEntropy for Observed {
    fn cross_entropy_forward(
        &self,
        spec: &cross_entropy::Spec,
        logits: &Tensor,
        targets: &Tensor,
    ) -> Result<cross_entropy::Forward> {
        let about = || like("cross_entropy forward", logits, spec.forward_cost());
        self.call(about, |backend| backend.cross_entropy_forward(spec, logits, targets))
    }
    fn cross_entropy_backward(
        &self,
        spec: &cross_entropy::Spec,
        logits: Tensor,
        targets: &Tensor,
        lse: &Tensor,
    ) -> Result<Tensor> {
        let about = || Call {
            name: "cross_entropy backward",
            shape: format!("{} x {}", spec.tokens, spec.vocab_size),
            weights: vec![],
            cost: spec.backward_cost(),
        };
        self.call(about, |backend| backend.cross_entropy_backward(spec, logits, targets, lse))
    }
}

impl linear_cross_entropy::LinearCrossEntropy for Observed {
    fn linear_cross_entropy(
        &self,
        spec: &linear_cross_entropy::Spec,
        x: &Tensor,
        weight: &Weight,
        targets: &Tensor,
        mut dweight: Option<&mut Tensor>,
    ) -> Result<linear_cross_entropy::Forward> {
        let cost = spec.cost(dweight.is_some());
        let seen = self.begin(|| Call {
            name: "linear_cross_entropy",
            shape: format!("{} x {} -> {}", spec.tokens, spec.hidden_size, spec.vocab_size),
            weights: base(weight, None),
            cost,
        })?;
        let forward = self.backend().linear_cross_entropy(spec, x, weight, targets, dweight.as_deref_mut())?;
        self.end(seen, forward.tensors().into_iter().chain(dweight.as_deref()))?;
        Ok(forward)
    }
}
