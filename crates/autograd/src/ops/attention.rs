//! Exact attention; formula and gradient in [`core`].

use unsloth_core::{
    Result, Sequences,
    ops::attention::{self as core, Backward, Inputs, Options},
};

use crate::{Tape, Var};

/// Where the packed sequences of queries and keys begin and end.
#[derive(Clone, Debug)]
pub struct AttentionSequences {
    /// Sequences of the queries.
    pub q: Sequences,
    /// Sequences of the keys, as many as of the queries.
    pub k: Sequences,
}

impl From<Sequences> for AttentionSequences {
    /// Self-attention: queries and keys are the same tokens.
    fn from(sequences: Sequences) -> Self {
        Self { q: sequences.clone(), k: sequences }
    }
}

/// Attention of `q`, `[tokens_q, num_heads, head_dim]`, to `k` and `v`, `[tokens_k, num_kv_heads, head_dim]`, within each
/// sequence: `[tokens_q, num_heads, head_dim]`.
///
/// Keeps the three inputs, the output and one f32 per query and head.
///
/// # Errors
/// As [`core::forward`]; an input of another tape.
pub fn attention(
    tape: &Tape,
    q: &Var,
    k: &Var,
    v: &Var,
    sequences: &AttentionSequences,
    options: Options,
) -> Result<Var> {
    let link = tape.link("attention", &[q, k, v], &[])?;
    let inputs = Inputs { q: q.tensor(), k: k.tensor(), v: v.tensor(), seq_q: &sequences.q, seq_k: &sequences.k };
    let core::Forward { out, lse } = core::forward(inputs, options)?;
    let saved = (q.tensor().clone(), k.tensor().clone(), v.tensor().clone(), out.clone(), sequences.clone());
    let (dq_to, dk_to, dv_to) = (q.source(), k.source(), v.source());
    Ok(link.one(out, move |context, dout| {
        let (q, k, v, out, AttentionSequences { q: seq_q, k: seq_k }) = saved;
        let inputs = Inputs { q: &q, k: &k, v: &v, seq_q: &seq_q, seq_k: &seq_k };
        let core::Gradients { dq, dk, dv } =
            core::backward(inputs, Backward { dout: &dout, out: &out, lse: &lse }, options)?;
        context.send(dq_to, dq)?;
        context.send(dk_to, dk)?;
        context.send(dv_to, dv)
    }))
}
