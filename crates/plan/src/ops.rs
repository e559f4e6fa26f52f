//! Every operator as the buffers it makes.

use unsloth_core::{
    DType, KvView, Lengths, Result, Sequences, Tensor, Weight,
    ops::{
        adafactor, adamw, adamw8bit, attention, cross_entropy, dora, elementwise, embedding, glu, layer_norm, linear,
        linear_cross_entropy, lion, lora_linear, muon, reduce, rms_norm, rope, sgd, stochastic_rounding,
    },
};

use crate::{
    backend::{PlanBackend, output, take_or_copy},
    kernels, scratch,
};

impl elementwise::Elementwise for PlanBackend {
    fn add(&self, a: Tensor, _b: &Tensor) -> Result<Tensor> {
        take_or_copy(a)
    }
    fn mul(&self, a: Tensor, _b: &Tensor) -> Result<Tensor> {
        take_or_copy(a)
    }
    fn scale(&self, x: Tensor, _factor: f32) -> Result<Tensor> {
        take_or_copy(x)
    }
    fn scale_by(&self, x: Tensor, _scalar: &Tensor) -> Result<Tensor> {
        take_or_copy(x)
    }
    fn accumulate(&self, _accumulator: &mut Tensor, _x: &Tensor) -> Result<()> {
        Ok(())
    }
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        x.device().empty(*x.shape(), dtype, x.buffer().category())
    }
    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        x.device().empty(*x.shape(), x.dtype(), x.buffer().category())
    }
    fn fill_zero(&self, _x: &mut Tensor) -> Result<()> {
        Ok(())
    }
}

impl reduce::Reduce for PlanBackend {
    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        output(x, DType::F32, [1])
    }
    fn all_finite(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        output(tensors[0], DType::F32, [1])
    }
    fn grad_norm(&self, tensors: &[&Tensor]) -> Result<Tensor> {
        output(tensors[0], DType::F32, [1])
    }
}

impl embedding::Embedding for PlanBackend {
    fn embedding_forward(&self, spec: &embedding::Spec, _weight: &Weight, ids: &Tensor) -> Result<Tensor> {
        output(ids, spec.dtype, [spec.tokens, spec.hidden_size])
    }
    fn embedding_backward(
        &self,
        _spec: &embedding::Spec,
        _ids: &Tensor,
        _dout: &Tensor,
        _dweight: &mut Tensor,
    ) -> Result<()> {
        Ok(())
    }
}

impl rms_norm::RmsNorm for PlanBackend {
    fn rms_norm_forward(
        &self,
        spec: &rms_norm::Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        _weight: &Tensor,
    ) -> Result<rms_norm::Forward> {
        let out = output(&x, spec.dtype, [spec.rows, spec.hidden_size])?;
        let rstd = output(&x, DType::F32, [spec.rows])?;
        let _scratch = self.on_cpu(|_| [spec.hidden_size])?;
        let sum = residual.map(|_| take_or_copy(x)).transpose()?;
        Ok(rms_norm::Forward { out, sum, rstd })
    }
    fn rms_norm_backward(
        &self,
        spec: &rms_norm::Spec,
        inputs: rms_norm::Backward<'_>,
        dweight: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let dx = take_or_copy(inputs.dout)?;
        let with_dweight = dweight.is_some();
        let _scratch =
            self.on_cpu(|_| scratch::norm_backward([spec.rows, spec.hidden_size], usize::from(with_dweight)))?;
        let _parts = self.on_kernels(|_| [kernels::column_sums([spec.rows, spec.hidden_size], with_dweight)])?;
        Ok(dx)
    }
}

impl layer_norm::LayerNorm for PlanBackend {
    fn layer_norm_forward(
        &self,
        spec: &layer_norm::Spec,
        x: Tensor,
        residual: Option<&Tensor>,
        affine: layer_norm::Affine<'_>,
    ) -> Result<layer_norm::Forward> {
        let out = output(&x, spec.dtype, [spec.rows, spec.hidden_size])?;
        let (mean, rstd) = (output(&x, DType::F32, [spec.rows])?, output(&x, DType::F32, [spec.rows])?);
        let _scratch = self.on_cpu(|_| [spec.hidden_size, affine.bias.map_or(0, |_| spec.hidden_size)])?;
        let sum = residual.map(|_| take_or_copy(x)).transpose()?;
        Ok(layer_norm::Forward { out, sum, mean, rstd })
    }
    fn layer_norm_backward(
        &self,
        spec: &layer_norm::Spec,
        inputs: layer_norm::Backward<'_>,
        gradients: layer_norm::ParameterGradients<'_>,
    ) -> Result<Tensor> {
        let [of_weight, of_bias] = [gradients.dweight.is_some(), gradients.dbias.is_some()];
        let size = [spec.rows, spec.hidden_size];
        let dx = take_or_copy(inputs.dout)?;
        let _scratch = self.on_cpu(|_| scratch::norm_backward(size, usize::from(of_weight) + usize::from(of_bias)))?;
        let of_parameters = |_| [kernels::column_sums(size, of_weight), kernels::column_sums(size, of_bias)];
        let _parts = self.on_kernels(of_parameters)?;
        Ok(dx)
    }
}

impl rope::Rope for PlanBackend {
    fn rope(&self, _spec: &rope::Spec, q: Tensor, k: Tensor, _angles: rope::Angles<'_>) -> Result<(Tensor, Tensor)> {
        Ok((take_or_copy(q)?, take_or_copy(k)?))
    }
}

impl glu::Glu for PlanBackend {
    fn glu_forward(&self, spec: &glu::Spec, gate: &Tensor, _up: &Tensor) -> Result<Tensor> {
        output(gate, spec.dtype, *gate.shape())
    }
    fn glu_backward(&self, _spec: &glu::Spec, _dout: &Tensor, gate: Tensor, up: Tensor) -> Result<glu::Gradients> {
        Ok(glu::Gradients { dgate: take_or_copy(gate)?, dup: take_or_copy(up)? })
    }
}

impl attention::Attention for PlanBackend {
    fn attention_forward(&self, spec: &attention::Spec, inputs: attention::Inputs<'_>) -> Result<attention::Forward> {
        let out = output(inputs.q, spec.dtype, *inputs.q.shape())?;
        let lse = output(inputs.q, DType::F32, [spec.num_heads, inputs.q.shape()[0]])?;
        let _scratch = self.on_cpu(|threads| [scratch::attention_forward(spec, inputs.seq_q, threads)])?;
        Ok(attention::Forward { out, lse })
    }
    fn attention_backward(
        &self,
        spec: &attention::Spec,
        inputs: attention::Inputs<'_>,
        _backward: attention::Backward<'_>,
    ) -> Result<attention::Gradients> {
        let like = |x: &Tensor| output(x, spec.dtype, *x.shape());
        let gradients = attention::Gradients { dq: like(inputs.q)?, dk: like(inputs.k)?, dv: like(inputs.v)? };
        let _scratch =
            self.on_cpu(|threads| [scratch::attention_backward(spec, (inputs.seq_q, inputs.seq_k), threads)])?;
        let _row_sums = self.on_kernels(|_| [spec.num_heads * inputs.seq_q.num_tokens()])?;
        Ok(gradients)
    }
    fn attention_cached(
        &self,
        spec: &attention::Spec,
        q: &Tensor,
        seq_q: &Sequences,
        kv: KvView<'_>,
    ) -> Result<Tensor> {
        let out = output(q, spec.dtype, *q.shape())?;
        self.on_cpu(|threads| [scratch::attention_cached(spec, seq_q, threads)])?;
        self.on_cpu(|threads| scratch::attention_cached_rows(spec, (seq_q, kv.lens), threads))?;
        Ok(out)
    }
    fn kv_append(&self, _cache: &mut Tensor, _rows: &Tensor, _seqs: &Sequences, _start: &Lengths) -> Result<()> {
        Ok(())
    }
}

impl linear::Linear for PlanBackend {
    fn linear_forward(
        &self,
        spec: &linear::Spec,
        x: &Tensor,
        _weight: &Weight,
        _bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let y = output(x, spec.dtype, [spec.rows, spec.out_features])?;
        self.product_of_rows(
            (spec.dtype, spec.weight_dtype),
            spec.dtype == DType::F32,
            [spec.rows, spec.out_features, spec.in_features],
        )?;
        Ok(y)
    }
    fn linear_input_gradient(&self, spec: &linear::Spec, dy: &Tensor, _weight: &Weight) -> Result<Tensor> {
        let dx = output(dy, spec.dtype, [spec.rows, spec.in_features])?;
        self.product(spec.dtype == DType::F32, [spec.rows, spec.in_features, spec.out_features])?;
        Ok(dx)
    }
    fn linear_weight_gradient(
        &self,
        spec: &linear::Spec,
        _dy: &Tensor,
        _x: &Tensor,
        _dweight: &mut Tensor,
    ) -> Result<()> {
        self.product(true, [spec.out_features, spec.in_features, spec.rows])
    }
    fn linear_bias_gradient(&self, _spec: &linear::Spec, _dy: &Tensor, _dbias: &mut Tensor) -> Result<()> {
        Ok(())
    }
}

impl PlanBackend {
    /// Scratch of a product: rows, columns, and the dimension summed over, which may be cut or not.
    fn product(&self, may_cut: bool, size: [usize; 3]) -> Result<()> {
        self.on_cpu(|threads| [scratch::product(may_cut, size, threads)]).map(drop)
    }

    /// Scratch of a product of which few rows are not packed.
    fn product_of_rows(&self, dtypes: (DType, DType), may_cut: bool, size: [usize; 3]) -> Result<()> {
        self.on_cpu(|threads| [scratch::product_of_rows(dtypes, may_cut, size, threads)]).map(drop)
    }
}

impl lora_linear::LoraLinear for PlanBackend {
    fn lora_linear_hidden(
        &self,
        spec: &lora_linear::Spec,
        x: &Tensor,
        _adapter: lora_linear::Adapter<'_>,
    ) -> Result<Tensor> {
        let h = output(x, DType::F32, [spec.base.rows, spec.rank])?;
        self.on_cpu(|threads| scratch::lora_input(spec, threads))?;
        self.on_kernels(|_| [kernels::lora(spec)])?;
        Ok(h)
    }
    fn lora_linear_forward(
        &self,
        spec: &lora_linear::Spec,
        x: &Tensor,
        _weight: &Weight,
        _bias: Option<&Tensor>,
        _adapter: lora_linear::Adapter<'_>,
    ) -> Result<lora_linear::Forward> {
        let lora_linear::Spec { base, rank, .. } = spec;
        let h = output(x, DType::F32, [base.rows, *rank])?;
        self.on_cpu(|threads| scratch::lora_input(spec, threads))?;
        let y = output(x, base.dtype, [base.rows, base.out_features])?;
        self.on_kernels(|_| [kernels::lora(spec)])?;
        let (may_cut, size) = (base.dtype == DType::F32, |depth| [base.rows, base.out_features, depth]);
        if [base.weight_dtype, spec.adapter_dtype].iter().all(|&right| scratch::is_few(base.rows, right)) {
            self.product_of_rows((base.dtype, base.weight_dtype), may_cut, size(base.in_features))?;
        } else {
            self.product(may_cut, size(base.in_features + rank))?;
        }
        Ok(lora_linear::Forward { y, h })
    }
    fn lora_linear_backward(
        &self,
        spec: &lora_linear::Spec,
        inputs: lora_linear::Backward<'_>,
        gradients: lora_linear::ParameterGradients<'_>,
    ) -> Result<Option<Tensor>> {
        let lora_linear::Spec { base, rank, .. } = spec;
        let lora_linear::Backward { dy, needs_dx, .. } = inputs;
        if gradients.dlora_b.is_some() {
            self.product(true, [base.out_features, *rank, base.rows])?;
        }
        if gradients.dlora_a.is_none() && !needs_dx {
            return Ok(None);
        }
        let _dh = output(dy, DType::F32, [base.rows, *rank])?;
        self.product(true, [base.rows, *rank, base.out_features])?;
        if gradients.dlora_a.is_some() {
            self.on_cpu(|threads| scratch::lora_input_transposed(spec, threads))?;
            self.on_kernels(|_| [kernels::lora(spec)])?;
        }
        if !needs_dx {
            return Ok(None);
        }
        let dx = output(dy, base.dtype, [base.rows, base.in_features])?;
        self.on_cpu(|threads| scratch::lora_input_gradient(spec, threads))?;
        self.on_kernels(|_| [kernels::lora(spec)])?;
        Ok(Some(dx))
    }
}

impl dora::Dora for PlanBackend {
    fn dora_norms(&self, spec: &dora::NormSpec, weight: &Weight, _lora_a: &Tensor, _lora_b: &Tensor) -> Result<Tensor> {
        output(&weight.to_dense()?, DType::F32, [spec.out_features])
    }
    fn dora_forward(
        &self,
        spec: &dora::Spec,
        t: &Tensor,
        _lengths: dora::Lengths<'_>,
        _bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let y = output(t, spec.dtype, [spec.rows, spec.out_features])?;
        self.on_cpu(|_| [2 * spec.out_features])?;
        Ok(y)
    }
    fn dora_backward(
        &self,
        spec: &dora::Spec,
        dy: Tensor,
        _t: &Tensor,
        _lengths: dora::Lengths<'_>,
        dmagnitude: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let dt = take_or_copy(dy)?;
        self.on_cpu(|_| [2 * spec.out_features])?;
        self.on_kernels(|_| [kernels::column_sums([spec.rows, spec.out_features], dmagnitude.is_some())])?;
        Ok(dt)
    }
}

impl cross_entropy::CrossEntropy for PlanBackend {
    fn cross_entropy_forward(
        &self,
        spec: &cross_entropy::Spec,
        logits: &Tensor,
        _targets: &Tensor,
    ) -> Result<cross_entropy::Forward> {
        let lse = output(logits, DType::F32, [spec.tokens])?;
        let _losses = self.workspace([spec.tokens])?;
        Ok(cross_entropy::Forward { loss: output(logits, DType::F32, [1])?, lse })
    }
    fn cross_entropy_backward(
        &self,
        _spec: &cross_entropy::Spec,
        logits: Tensor,
        _targets: &Tensor,
        _lse: &Tensor,
    ) -> Result<Tensor> {
        take_or_copy(logits)
    }
}

impl linear_cross_entropy::LinearCrossEntropy for PlanBackend {
    fn linear_cross_entropy(
        &self,
        spec: &linear_cross_entropy::Spec,
        x: &Tensor,
        _weight: &Weight,
        _targets: &Tensor,
        dweight: Option<&mut Tensor>,
    ) -> Result<linear_cross_entropy::Forward> {
        let dx = spec.needs_dx.then(|| output(x, spec.dtype, *x.shape())).transpose()?;
        let _losses = self.on_cpu(|_| [scratch::losses(spec)])?;
        self.on_cpu(|threads| scratch::loss_chunk(spec, dweight.is_some(), threads))?;
        self.on_kernels(|memory_bytes| kernels::loss(spec, dweight.is_some(), memory_bytes))?;
        Ok(linear_cross_entropy::Forward { loss: output(x, DType::F32, [1])?, dx })
    }
}

impl adamw::AdamW for PlanBackend {
    fn step_control(
        &self,
        _spec: &adamw::ControlSpec,
        _norm: &Tensor,
        _finite: &Tensor,
        _state: &mut Tensor,
    ) -> Result<()> {
        Ok(())
    }
    fn adamw(&self, _spec: &adamw::Spec, _parameters: &mut [adamw::Buffers<'_>], _state: &Tensor) -> Result<()> {
        Ok(())
    }
}

impl adamw8bit::AdamW8bit for PlanBackend {
    fn adamw8bit(&self, _spec: &adamw::Spec, _buffers: adamw8bit::Buffers<'_>, _state: &Tensor) -> Result<()> {
        Ok(())
    }
}

impl lion::Lion for PlanBackend {
    fn lion(&self, _spec: &lion::Spec, _buffers: lion::Buffers<'_>, _state: &Tensor) -> Result<()> {
        Ok(())
    }
}

impl sgd::Sgd for PlanBackend {
    fn sgd(&self, _spec: &sgd::Spec, _buffers: sgd::Buffers<'_>, _state: &Tensor) -> Result<()> {
        Ok(())
    }
}

impl adafactor::Adafactor for PlanBackend {
    fn adafactor(&self, _spec: &adafactor::Spec, buffers: adafactor::Buffers<'_>, _state: &Tensor) -> Result<()> {
        if let adafactor::Averages::Factored { row, col } = &buffers.averages {
            let size = [row.num_elements(), col.num_elements()];
            self.on_cpu(|_| [scratch::adafactor(size)])?;
            self.on_kernels(|_| [kernels::column_sums(size, true), size[0]])?;
        }
        Ok(())
    }
}

impl muon::Muon for PlanBackend {
    fn muon_direction(&self, _spec: &muon::Spec, grad: &Tensor, _buf: &mut Tensor, _state: &Tensor) -> Result<Tensor> {
        output(grad, DType::F32, *grad.shape())
    }
    fn muon_apply(&self, _spec: &muon::Spec, _param: &mut Tensor, _direction: &Tensor, _state: &Tensor) -> Result<()> {
        Ok(())
    }
}

impl stochastic_rounding::StochasticRounding for PlanBackend {
    fn round_stochastically(&self, _spec: &stochastic_rounding::Spec, _x: &Tensor, _out: &mut Tensor) -> Result<()> {
        Ok(())
    }
}
