//! Attention on the kernels of `unsloth-attention`.

use cubecl::prelude::*;
use unsloth_attention::{self as kernels, Partial, Shape, Split};
use unsloth_core::{
    DType, KvView, Lengths, Result, Sequences, Tensor,
    ops::attention::{Attention, Backward, Forward, Gradients, Inputs, Spec, Window},
};

use crate::{
    access::{dispatch_float, handle, handle_mut, output, workspace},
    backend::CubeBackend,
};

const OP: &str = "attention";

/// `keys`: all of them, and the longest sequence's.
fn shape(spec: &Spec, seq_q: &Sequences, keys: (usize, usize)) -> Shape {
    let &Spec { num_heads, num_kv_heads, head_dim, options, .. } = spec;
    let left = match options.window {
        Window::Full => None,
        Window::Sliding { left } => Some(left),
    };
    Shape {
        num_heads,
        num_kv_heads,
        head_dim,
        num_seqs: seq_q.num_seqs(),
        tokens_q: seq_q.num_tokens(),
        tokens_k: keys.0,
        max_seqlen_q: seq_q.max_seqlen(),
        max_seqlen_k: keys.1,
        scale: options.scale,
        causal: options.causal,
        left,
        softcap: options.softcap,
    }
}

impl<R: Runtime> Attention for CubeBackend<R> {
    fn attention_forward(&self, spec: &Spec, inputs: Inputs<'_>) -> Result<Forward> {
        let Inputs { q, k, v, seq_q, seq_k } = inputs;
        let mut out = output(OP, q, spec.dtype, *q.shape())?;
        let mut lse = output(OP, q, DType::F32, [spec.num_heads, seq_q.num_tokens()])?;
        let shape = shape(spec, seq_q, (seq_k.num_tokens(), seq_k.max_seqlen()));
        let args = kernels::Forward {
            q: handle(q),
            k: handle(k),
            v: handle(v),
            cu_seqlens_q: handle(seq_q.cu_seqlens()),
            cu_seqlens_k: handle(seq_k.cu_seqlens()),
            out: handle_mut(OP, "out", &mut out)?,
            lse: handle_mut(OP, "lse", &mut lse)?,
        };
        self.launch(
            "attention_forward",
            |client| dispatch_float!(spec.dtype, E => kernels::forward::<R, E>(client, shape, args)),
        )?;
        Ok(Forward { out, lse })
    }

    fn attention_backward(&self, spec: &Spec, inputs: Inputs<'_>, backward: Backward<'_>) -> Result<Gradients> {
        let Inputs { q, k, v, seq_q, seq_k } = inputs;
        let [mut dq, mut dk, mut dv] = [
            output(OP, q, spec.dtype, *q.shape())?,
            output(OP, k, spec.dtype, *k.shape())?,
            output(OP, v, spec.dtype, *v.shape())?,
        ];
        let row_sums = [spec.num_heads, seq_q.num_tokens()];
        let mut row_sums = workspace(OP, q, DType::F32, row_sums)?;
        let shape = shape(spec, seq_q, (seq_k.num_tokens(), seq_k.max_seqlen()));
        let args = kernels::Backward {
            q: handle(q),
            k: handle(k),
            v: handle(v),
            cu_seqlens_q: handle(seq_q.cu_seqlens()),
            cu_seqlens_k: handle(seq_k.cu_seqlens()),
            dout: handle(backward.dout),
            out: handle(backward.out),
            lse: handle(backward.lse),
            row_sums: handle_mut(OP, "row_sums", &mut row_sums)?,
            dq: handle_mut(OP, "dq", &mut dq)?,
            dk: handle_mut(OP, "dk", &mut dk)?,
            dv: handle_mut(OP, "dv", &mut dv)?,
        };
        self.launch(
            "attention_backward",
            |client| dispatch_float!(spec.dtype, E => kernels::backward::<R, E>(client, shape, args)),
        )?;
        Ok(Gradients { dq, dk, dv })
    }

    fn attention_cached(&self, spec: &Spec, q: &Tensor, seq_q: &Sequences, kv: KvView<'_>) -> Result<Tensor> {
        let mut out = output(OP, q, spec.dtype, *q.shape())?;
        let capacity = kv.k.shape()[1];
        let shape = shape(spec, seq_q, (seq_q.num_seqs() * capacity, capacity));
        let args = kernels::Cached {
            q: handle(q),
            k: handle(kv.k),
            v: handle(kv.v),
            cu_seqlens_q: handle(seq_q.cu_seqlens()),
            lens: handle(kv.lens.tensor()),
            out: handle_mut(OP, "out", &mut out)?,
        };
        const CACHED: &str = "attention_cached";
        let longest = kv.lens.host().iter().copied().max().unwrap_or(0);
        let split = dispatch_float!(spec.dtype, E => Split::for_device::<R, E>(self.client(), &shape, longest));
        let Some(split) = split else {
            self.launch(
                CACHED,
                |client| dispatch_float!(spec.dtype, E => kernels::cached::<R, E>(client, shape, args)),
            )?;
            return Ok(out);
        };
        let rows = split.rows(&shape);
        let mut sums = workspace(CACHED, q, DType::F32, [rows, spec.head_dim])?;
        let mut statistics = workspace(CACHED, q, DType::F32, [rows, 2])?;
        let partial = Partial {
            sums: handle_mut(CACHED, "sums", &mut sums)?,
            statistics: handle_mut(CACHED, "statistics", &mut statistics)?,
        };
        self.launch(CACHED, |client| {
            dispatch_float!(spec.dtype, E => kernels::split_cached::<R, E>(client, (shape, split), args, partial))
        })?;
        Ok(out)
    }

    fn kv_append(&self, cache: &mut Tensor, rows: &Tensor, seqs: &Sequences, start: &Lengths) -> Result<()> {
        let shape = kernels::AppendShape {
            num_seqs: seqs.num_seqs(),
            tokens: seqs.num_tokens(),
            max_seqlen: seqs.max_seqlen(),
            capacity: cache.shape()[1],
            row: rows.shape()[1] * rows.shape()[2],
        };
        let args = kernels::Append {
            rows: handle(rows),
            cu_seqlens: handle(seqs.cu_seqlens()),
            start: handle(start.tensor()),
            cache: handle_mut("kv_append", "cache", cache)?,
        };
        self.launch(
            "kv_append",
            |client| dispatch_float!(rows.dtype(), E => kernels::append::<R, E>(client, shape, args)),
        )
    }
}
