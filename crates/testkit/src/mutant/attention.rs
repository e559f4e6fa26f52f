//! Faults of attention.

use std::f64::consts::LN_2;

use unsloth_core::{
    Backend, KvView, Lengths, Result, Sequences, Tensor,
    ops::attention::{Attention, Backward, Forward, Gradients, Inputs, Spec, Window},
};

use super::{MutantBackend, Mutation, edited, mapped, zeros_like};
use crate::data;

/// Heads of `[tokens, heads, head_dim]` in reverse order.
fn reversed_heads(tensor: &Tensor) -> Result<Tensor> {
    let (heads, head_dim) = (tensor.shape()[1], tensor.shape()[2]);
    edited(tensor, |values| {
        for token in values.chunks_exact_mut(heads * head_dim) {
            let original = token.to_vec();
            for (head, row) in token.chunks_exact_mut(head_dim).enumerate() {
                row.copy_from_slice(&original[(heads - 1 - head) * head_dim..][..head_dim]);
            }
        }
    })
}

/// One more row of zeros after each sequence.
fn extended(tensor: &Tensor, seqs: &Sequences) -> Result<Tensor> {
    let (heads, head_dim) = (tensor.shape()[1], tensor.shape()[2]);
    let (values, row) = (data::read(tensor)?, heads * head_dim);
    let mut rows = Vec::new();
    for pair in seqs.offsets().windows(2) {
        rows.extend_from_slice(&values[pair[0] * row..pair[1] * row]);
        rows.extend(std::iter::repeat_n(0.0, row));
    }
    let tokens = seqs.num_tokens() + seqs.num_seqs();
    data::tensor(tensor.device(), &rows, [tokens, heads, head_dim], tensor.dtype())
}

fn lengths(seqs: &Sequences, extra: usize) -> Vec<usize> {
    seqs.offsets().windows(2).map(|pair| pair[1] - pair[0] + extra).collect()
}

impl<B: Backend> MutantBackend<B> {
    fn mutated(&self, spec: &Spec) -> Spec {
        let mut spec = *spec;
        if self.has(Mutation::AttentionDropsScale) {
            spec.options.scale = 1.0;
        }
        if self.has(Mutation::AttentionNotCausal) {
            spec.options.causal = false;
        }
        if self.has(Mutation::AttentionDropsSoftcap) {
            spec.options.softcap = None;
        }
        if self.has(Mutation::AttentionWindowOffByOne)
            && let Window::Sliding { left } = &mut spec.options.window
        {
            *left += 1;
        }
        spec
    }

    fn forward_off_by_one(&self, spec: &Spec, inputs: Inputs<'_>) -> Result<Forward> {
        let (k, v) = (extended(inputs.k, inputs.seq_k)?, extended(inputs.v, inputs.seq_k)?);
        let seq_k = Sequences::from_lengths(k.device(), &lengths(inputs.seq_k, 1))?;
        self.inner.attention_forward(spec, Inputs { k: &k, v: &v, seq_k: &seq_k, ..inputs })
    }

    fn backward_of_one_head(&self, spec: &Spec, inputs: Inputs<'_>, backward: Backward<'_>) -> Result<Gradients> {
        let dq = self.inner.attention_backward(spec, inputs, backward)?.dq;
        let group = spec.num_heads / spec.num_kv_heads;
        let first = edited(backward.dout, |dout| {
            for (at, row) in dout.chunks_exact_mut(spec.head_dim).enumerate() {
                if !(at % spec.num_heads).is_multiple_of(group) {
                    row.fill(0.0);
                }
            }
        })?;
        let gradients = self.inner.attention_backward(spec, inputs, Backward { dout: &first, ..backward })?;
        Ok(Gradients { dq, ..gradients })
    }
}

impl<B: Backend> Attention for MutantBackend<B> {
    fn attention_forward(&self, spec: &Spec, inputs: Inputs<'_>) -> Result<Forward> {
        let spec = &self.mutated(spec);
        if self.has(Mutation::AttentionMaskOffByOne) {
            return self.forward_off_by_one(spec, inputs);
        }
        if self.has(Mutation::AttentionReversesGroups) {
            let (k, v) = (reversed_heads(inputs.k)?, reversed_heads(inputs.v)?);
            return self.inner.attention_forward(spec, Inputs { k: &k, v: &v, ..inputs });
        }
        if self.has(Mutation::AttentionMergesSequences) {
            let merged = |seqs: &Sequences| Sequences::from_lengths(inputs.q.device(), &[seqs.num_tokens()]);
            let (seq_q, seq_k) = (merged(inputs.seq_q)?, merged(inputs.seq_k)?);
            return self.inner.attention_forward(spec, Inputs { seq_q: &seq_q, seq_k: &seq_k, ..inputs });
        }
        let forward = self.inner.attention_forward(spec, inputs)?;
        if self.has(Mutation::AttentionLseInBase2) {
            return Ok(Forward { lse: mapped(&forward.lse, |lse| lse / LN_2)?, ..forward });
        }
        Ok(forward)
    }

    fn attention_backward(&self, spec: &Spec, inputs: Inputs<'_>, backward: Backward<'_>) -> Result<Gradients> {
        if self.has(Mutation::AttentionBackwardDropsScale) {
            let Gradients { dq, dk, dv } = self.inner.attention_backward(spec, inputs, backward)?;
            let unscaled = |x: f64| x / f64::from(spec.options.scale);
            return Ok(Gradients { dq: mapped(&dq, unscaled)?, dk: mapped(&dk, unscaled)?, dv });
        }
        if self.has(Mutation::AttentionBackwardDropsSoftcap) {
            let mut spec = *spec;
            spec.options.softcap = None;
            return self.inner.attention_backward(&spec, inputs, backward);
        }
        if self.has(Mutation::AttentionDropsRowTerm) {
            let zeros = zeros_like(backward.out)?;
            return self.inner.attention_backward(spec, inputs, Backward { out: &zeros, ..backward });
        }
        if self.has(Mutation::AttentionDropsGroupSum) {
            return self.backward_of_one_head(spec, inputs, backward);
        }
        self.inner.attention_backward(spec, inputs, backward)
    }

    fn attention_cached(&self, spec: &Spec, q: &Tensor, seq_q: &Sequences, kv: KvView<'_>) -> Result<Tensor> {
        if self.has(Mutation::CachedIgnoresLength) {
            let full = vec![kv.k.shape()[1]; kv.lens.host().len()];
            let lens = Lengths::new(q.device(), &full)?;
            return self.inner.attention_cached(spec, q, seq_q, KvView { lens: &lens, ..kv });
        }
        self.inner.attention_cached(spec, q, seq_q, kv)
    }

    fn kv_append(&self, cache: &mut Tensor, rows: &Tensor, seqs: &Sequences, start: &Lengths) -> Result<()> {
        if self.has(Mutation::KvAppendIgnoresStart) {
            let zero = Lengths::new(rows.device(), &vec![0; start.host().len()])?;
            return self.inner.kv_append(cache, rows, seqs, &zero);
        }
        self.inner.kv_append(cache, rows, seqs, start)
    }
}
