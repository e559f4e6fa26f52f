//! Attention: head sizes of real models and an odd one, and every option that may change the code.

use unsloth_core::{
    DType, KvView, Lengths, Result, Sequences,
    ops::attention::{self, Backward, Inputs, Options, Window},
};

use super::Caller;

const HEAD_DIMS: [usize; 6] = [64, 80, 96, 128, 256, 33];
const LENGTHS: [usize; 2] = [256, 512];
const HEADS: (usize, usize) = (32, 8);

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for dtype in DType::FLOATS {
        for head_dim in HEAD_DIMS {
            for (name, options) in options(head_dim) {
                gradients(caller, (dtype, head_dim), name, options)?;
                cached(caller, (dtype, head_dim), name, options)?;
            }
            append(caller, (dtype, head_dim))?;
        }
    }
    Ok(())
}

fn options(head_dim: usize) -> [(&'static str, Options); 4] {
    let causal = Options::causal(head_dim);
    [
        ("causal", causal),
        ("full", Options { causal: false, ..causal }),
        ("window", Options { window: Window::Sliding { left: 63 }, ..causal }),
        ("softcap", Options { softcap: Some(30.0), ..causal }),
    ]
}

fn gradients(caller: &mut Caller, (dtype, head_dim): (DType, usize), name: &str, options: Options) -> Result<()> {
    let seqs = Sequences::from_lengths(&caller.device, &LENGTHS)?;
    let (tokens, (num_heads, num_kv_heads)) = (seqs.num_tokens(), HEADS);
    let rows = |heads| caller.tensor(dtype, [tokens, heads, head_dim]);
    let (q, k, v) = (rows(num_heads)?, rows(num_kv_heads)?, rows(num_kv_heads)?);
    let (out, dout) = (rows(num_heads)?, rows(num_heads)?);
    let lse = caller.tensor(DType::F32, [num_heads, tokens])?;
    let inputs = Inputs { q: &q, k: &k, v: &v, seq_q: &seqs, seq_k: &seqs };
    let detail = |what: &str| format!("{what}, {name}, head_dim {head_dim} {dtype}");
    caller.call(detail("forward"), || attention::forward(inputs, options));
    let backward = Backward { dout: &dout, out: &out, lse: &lse };
    caller.call(detail("backward"), || attention::backward(inputs, backward, options));
    Ok(())
}

fn cached(caller: &mut Caller, (dtype, head_dim): (DType, usize), name: &str, options: Options) -> Result<()> {
    let lens = Lengths::new(&caller.device, &LENGTHS)?;
    let (num_heads, num_kv_heads) = HEADS;
    let cache = [LENGTHS.len(), LENGTHS[1], num_kv_heads, head_dim];
    let (k, v) = (caller.tensor(dtype, cache)?, caller.tensor(dtype, cache)?);
    // A prompt, and one new token.
    for new in [64, 1] {
        let seq_q = Sequences::from_lengths(&caller.device, &[new; LENGTHS.len()])?;
        let q = caller.tensor(dtype, [seq_q.num_tokens(), num_heads, head_dim])?;
        let kv = KvView { k: &k, v: &v, lens: &lens };
        let detail = format!("cached, {new} new, {name}, head_dim {head_dim} {dtype}");
        caller.call(detail, || attention::cached(&q, &seq_q, kv, options));
    }
    Ok(())
}

fn append(caller: &mut Caller, (dtype, head_dim): (DType, usize)) -> Result<()> {
    let seqs = Sequences::from_lengths(&caller.device, &LENGTHS)?;
    let start = Lengths::new(&caller.device, &[0; LENGTHS.len()])?;
    let (_, num_kv_heads) = HEADS;
    let rows = caller.tensor(dtype, [seqs.num_tokens(), num_kv_heads, head_dim])?;
    let mut cache = caller.tensor(dtype, [LENGTHS.len(), LENGTHS[1], num_kv_heads, head_dim])?;
    let detail = format!("append to a cache, head_dim {head_dim} {dtype}");
    caller.call(detail, || attention::kv_append(&mut cache, &rows, &seqs, &start));
    Ok(())
}
