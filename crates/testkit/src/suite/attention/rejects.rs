//! Typed errors of attention.

use unsloth_core::{
    Category, DType, Device, KvView, Lengths, Sequences, Tensor,
    ops::attention::{self as op, Options},
};

use super::{Tensors, Values, problem};
use crate::{
    data,
    expect::{self, Rejects},
    report::{Case, Checked},
};

fn zeros(device: &Device, shape: [usize; 3]) -> unsloth_core::Result<Tensor> {
    device.zeros(shape, DType::F32, Category::Activations)
}

/// Tensors of valid shapes: 5 queries of 4 heads, 6 keys of 2 heads, 8 channels, two sequences.
fn valid(device: &Device) -> Checked<Tensors> {
    Values::new(problem((4, 2, 8), (&[2, 3], &[4, 2])), DType::F32, 1.0).tensors(device)
}

pub(super) fn inputs(device: &Device, case: &Case) -> Checked {
    let tensors = valid(device)?;
    let (inputs, good) = (tensors.inputs(), Options::causal(8));
    let rejects =
        |expected, inputs: op::Inputs<'_>, options| expect::rejects(case, expected, op::forward(inputs, options));
    let integers = data::integers(device, &[1, 2])?;
    let flat = device.zeros([5, 32], DType::F32, Category::Activations)?;
    rejects(Rejects::Shape("q"), op::Inputs { q: &flat, ..inputs }, good)?;
    rejects(Rejects::DType("q"), op::Inputs { q: &integers, ..inputs }, good)?;
    rejects(Rejects::Shape("k"), op::Inputs { k: &flat, ..inputs }, good)?;
    rejects(Rejects::Shape("k"), op::Inputs { k: &zeros(device, [6, 2, 7])?, ..inputs }, good)?;
    rejects(Rejects::Shape("v"), op::Inputs { v: &zeros(device, [5, 2, 8])?, ..inputs }, good)?;
    rejects(Rejects::Spec("num_kv_heads"), op::Inputs { k: &zeros(device, [6, 3, 8])?, ..inputs }, good)?;
    rejects(Rejects::Spec("num_kv_heads"), op::Inputs { k: &zeros(device, [6, 0, 8])?, ..inputs }, good)?;
    for head_dim in [0, 257] {
        let (q, k) = (zeros(device, [5, 4, head_dim])?, zeros(device, [6, 2, head_dim])?);
        rejects(Rejects::Spec("head_dim"), op::Inputs { q: &q, k: &k, v: &k, ..inputs }, good)?;
    }
    if let Some(&dtype) = device.float_dtypes().iter().find(|&&dtype| dtype != DType::F32) {
        let half = device.zeros([6, 2, 8], dtype, Category::Activations)?;
        rejects(Rejects::DType("k"), op::Inputs { k: &half, ..inputs }, good)?;
        rejects(Rejects::DType("v"), op::Inputs { v: &half, ..inputs }, good)?;
    }
    let sequences = |lens: &[usize]| Sequences::from_lengths(device, lens);
    rejects(Rejects::Spec("seq_q"), op::Inputs { seq_q: &sequences(&[2, 2])?, ..inputs }, good)?;
    rejects(Rejects::Spec("seq_k"), op::Inputs { seq_k: &sequences(&[4, 3])?, ..inputs }, good)?;
    rejects(Rejects::Spec("seq_k"), op::Inputs { seq_k: &sequences(&[4, 1, 1])?, ..inputs }, good)?;
    for scale in [f32::NAN, f32::INFINITY] {
        rejects(Rejects::Spec("scale"), inputs, Options { scale, ..good })?;
    }
    for softcap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        rejects(Rejects::Spec("softcap"), inputs, Options { softcap: Some(softcap), ..good })?;
    }
    Ok(())
}

pub(super) fn gradients(device: &Device, case: &Case) -> Checked {
    let tensors = valid(device)?;
    let (inputs, options) = (tensors.inputs(), Options::causal(8));
    let op::Forward { out, lse } = op::forward(inputs, options)?;
    let good = op::Backward { dout: &tensors.dout, out: &out, lse: &lse };
    let rejects =
        |expected, backward: op::Backward<'_>| expect::rejects(case, expected, op::backward(inputs, backward, options));
    let other = zeros(device, [4, 4, 8])?;
    rejects(Rejects::Shape("dout"), op::Backward { dout: &other, ..good })?;
    rejects(Rejects::Shape("out"), op::Backward { out: &other, ..good })?;
    rejects(Rejects::Shape("lse"), op::Backward { lse: &other, ..good })?;
    if let Some(&dtype) = device.float_dtypes().iter().find(|&&dtype| dtype != DType::F32) {
        let half = device.zeros([5, 4, 8], dtype, Category::Activations)?;
        rejects(Rejects::DType("dout"), op::Backward { dout: &half, ..good })?;
        rejects(Rejects::DType("out"), op::Backward { out: &half, ..good })?;
    }
    let softcap = Options { softcap: Some(0.0), ..options };
    expect::rejects(case, Rejects::Spec("softcap"), op::backward(inputs, good, softcap))
}

pub(super) fn caches(device: &Device, case: &Case) -> Checked {
    let Tensors { q, seq_q, .. } = valid(device)?;
    let zeros4 = |shape: [usize; 4]| device.zeros(shape, DType::F32, Category::KvCache);
    let lengths = |lens: &[usize]| Lengths::new(device, lens);
    let (k, lens, options) = (zeros4([2, 6, 2, 8])?, lengths(&[2, 6])?, Options::causal(8));
    let good = KvView { k: &k, v: &k, lens: &lens };
    let rejects = |expected, kv: KvView<'_>| expect::rejects(case, expected, op::cached(&q, &seq_q, kv, options));
    rejects(Rejects::Shape("k"), KvView { k: &q, ..good })?;
    rejects(Rejects::Shape("k"), KvView { k: &zeros4([3, 6, 2, 8])?, ..good })?;
    rejects(Rejects::Shape("v"), KvView { v: &zeros4([2, 5, 2, 8])?, ..good })?;
    rejects(Rejects::Spec("num_kv_heads"), KvView { k: &zeros4([2, 6, 3, 8])?, ..good })?;
    rejects(Rejects::Spec("lens"), KvView { lens: &lengths(&[2, 7])?, ..good })?;
    rejects(Rejects::Spec("lens"), KvView { lens: &lengths(&[2])?, ..good })?;
    let other = Sequences::from_lengths(device, &[2, 2])?;
    expect::rejects(case, Rejects::Spec("seq_q"), op::cached(&q, &other, good, options))?;

    let (rows, seqs) = (zeros(device, [5, 2, 8])?, Sequences::from_lengths(device, &[2, 3])?);
    let append = |mut cache: Tensor, rows: &Tensor, start: &[usize]| {
        op::kv_append(&mut cache, rows, &seqs, &Lengths::new(device, start)?)
    };
    expect::rejects(case, Rejects::Spec("start"), append(zeros4([2, 6, 2, 8])?, &rows, &[0, 4]))?;
    expect::rejects(case, Rejects::Spec("start"), append(zeros4([2, 6, 2, 8])?, &rows, &[0]))?;
    expect::rejects(case, Rejects::Spec("seqs"), append(zeros4([2, 6, 2, 8])?, &zeros(device, [4, 2, 8])?, &[0, 0]))?;
    expect::rejects(case, Rejects::Shape("cache"), append(zeros4([2, 6, 2, 7])?, &rows, &[0, 0]))?;
    expect::rejects(case, Rejects::Shared("cache"), append(k.clone(), &rows, &[0, 0]))?;
    expect::rejects(
        case,
        Rejects::DType("rows"),
        append(zeros4([2, 6, 2, 8])?, &data::integers(device, &[1])?, &[0, 0]),
    )
}
