//! Attention: head sizes of real models and an odd one, every option that may change the code, and, of single tokens, so many query heads
//! to a key head as their kernel is made anew for.

use unsloth_core::{
    DType, KvView, Lengths, Result, Sequences,
    ops::attention::{self, Backward, Inputs, Options, Window},
};

use super::Caller;

const HEAD_DIMS: [usize; 8] = [32, 64, 80, 96, 128, 192, 256, 33];
const LENGTHS: [usize; 2] = [256, 512];
const HEADS: (usize, usize) = (32, 8);
/// Query heads per key head: a power of two stands for those between it and the one before, and more than four are taken four at a time.
const GROUPS: [usize; 3] = [1, 2, 4];

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for dtype in DType::FLOATS {
        for head_dim in HEAD_DIMS {
            for (name, options) in options(head_dim) {
                gradients(caller, (dtype, head_dim), name, options)?;
                // A prompt.
                cached(caller, (dtype, head_dim), (64, HEADS), (name, options))?;
            }
            append(caller, (dtype, head_dim))?;
        }
    }
    Ok(())
}

pub(super) fn single_tokens(caller: &mut Caller) -> Result<()> {
    let (_, num_kv_heads) = HEADS;
    for dtype in DType::FLOATS {
        for head_dim in HEAD_DIMS {
            for group in GROUPS {
                for option in options(head_dim) {
                    cached(caller, (dtype, head_dim), (1, (group * num_kv_heads, num_kv_heads)), option)?;
                }
            }
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

/// `new` tokens of each sequence and so many heads.
fn cached(
    caller: &mut Caller,
    (dtype, head_dim): (DType, usize),
    (new, (num_heads, num_kv_heads)): (usize, (usize, usize)),
    (name, options): (&str, Options),
) -> Result<()> {
    let lens = Lengths::new(&caller.device, &LENGTHS)?;
    let cache = [LENGTHS.len(), LENGTHS[1], num_kv_heads, head_dim];
    let (k, v) = (caller.tensor(dtype, cache)?, caller.tensor(dtype, cache)?);
    let seq_q = Sequences::from_lengths(&caller.device, &[new; LENGTHS.len()])?;
    let q = caller.tensor(dtype, [seq_q.num_tokens(), num_heads, head_dim])?;
    let kv = KvView { k: &k, v: &v, lens: &lens };
    let group = num_heads / num_kv_heads;
    let detail = format!("cached, {new} new, {name}, head_dim {head_dim}, group {group}, {dtype}");
    caller.call(detail, || attention::cached(&q, &seq_q, kv, options));
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
