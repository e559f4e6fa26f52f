//! Linear cross entropy by chunks of rows that have a target: logits, loss and gradients of a chunk, then the next.

use rayon::prelude::*;
use unsloth_core::{
    Category, FloatElement, Result, Tensor, Weight,
    ops::{
        cross_entropy::LossSpec,
        linear_cross_entropy::{Forward, LinearCrossEntropy, Spec},
    },
};

use crate::{
    access::{dispatch_float, output, read, write},
    backend::{CpuBackend, Workspace},
    cross_entropy::{check_targets, mean_loss, row_gradient, row_loss},
    gemm::{Into, Mat, MatMut, matmul},
    linear::{blocks, dense},
};

/// f32 elements of a chunk's logits: 32 MiB, or [`MIN_ROWS`] rows where that is more.
const CHUNK: usize = 8 << 20;
/// Fewest rows of a chunk: the products need them to reuse each weight they load.
const MIN_ROWS: usize = 128;

impl CpuBackend {
    /// Loss and gradients of the rows `rows` of `x`: losses to `nll`, `dx` rows to `dx`.
    fn loss_chunk(&self, call: &Call<'_>, rows: &[Row], nll: &mut [f32], dweight: Option<&mut [f32]>) -> Result<Dx> {
        let (hidden, vocab) = (call.spec.hidden_size, call.spec.vocab_size);
        let mut x = self.workspace(rows.len() * hidden)?;
        dispatch_float!(call.spec.dtype, T => gather::<T>(read(call.x), rows, &mut x));
        let wide_x = Mat::new(&x, rows.len(), hidden, hidden);
        let mut logits = self.workspace(rows.len() * vocab)?;
        let block = self.weight_rows(call.weight);
        for part in blocks(vocab, block) {
            let w = self.widened(call.weight, part.start * hidden..part.end * hidden)?;
            let target = MatMut::new(&mut logits[part.start..], rows.len(), part.len(), vocab);
            let w = Mat::new(&w, part.len(), hidden, hidden);
            matmul(1.0, wide_x, w.t(), target, Into::Overwrite);
        }
        let wants_gradient = call.spec.needs_dx || dweight.is_some();
        losses(&mut logits, rows, nll, &call.spec.loss, wants_gradient);
        if let Some(dweight) = dweight {
            let dlogits = Mat::new(&logits, rows.len(), vocab, vocab);
            matmul(1.0, dlogits.t(), wide_x, MatMut::new(dweight, vocab, hidden, hidden), Into::Add);
        }
        if !call.spec.needs_dx {
            return Ok(None);
        }
        // The gathered input has served its purpose: its buffer takes the gradient.
        for part in blocks(vocab, block) {
            let w = self.widened(call.weight, part.start * hidden..part.end * hidden)?;
            let dlogits = Mat::new(&logits[part.start..], rows.len(), part.len(), vocab);
            let into = if part.start == 0 { Into::Overwrite } else { Into::Add };
            let target = MatMut::new(&mut x, rows.len(), hidden, hidden);
            matmul(1.0, dlogits, Mat::new(&w, part.len(), hidden, hidden), target, into);
        }
        Ok(Some(x))
    }
}

/// f32 `[rows of the chunk, hidden_size]`, if wanted.
type Dx = Option<Workspace>;

struct Call<'a> {
    spec: &'a Spec,
    x: &'a Tensor,
    weight: &'a Tensor,
}

/// A row of `x` that has a target.
#[derive(Clone, Copy)]
struct Row {
    index: usize,
    target: usize,
}

fn gather<T: FloatElement>(x: &[T], rows: &[Row], to: &mut [f32]) {
    let hidden = to.len() / rows.len().max(1);
    if hidden == 0 {
        return;
    }
    to.par_chunks_mut(hidden).zip(rows).for_each(|(to, row)| {
        for (to, from) in to.iter_mut().zip(&x[row.index * hidden..(row.index + 1) * hidden]) {
            *to = from.to_f32();
        }
    });
}

fn scatter<T: FloatElement>(from: &[f32], rows: &[Row], dx: &mut [T]) {
    let hidden = from.len() / rows.len().max(1);
    for (from, row) in from.chunks_exact(hidden.max(1)).zip(rows) {
        for (to, from) in dx[row.index * hidden..(row.index + 1) * hidden].iter_mut().zip(from) {
            *to = T::from_f32(*from);
        }
    }
}

/// Losses of rows of logits; the logits become their gradient where it is wanted.
fn losses(logits: &mut [f32], rows: &[Row], nll: &mut [f32], spec: &LossSpec, wants_gradient: bool) {
    let vocab = logits.len() / rows.len();
    logits.par_chunks_mut(vocab).zip(rows).zip(nll).for_each(|((logits, row), nll)| {
        let loss = row_loss(logits, row.target, spec);
        *nll = loss.nll;
        if wants_gradient {
            row_gradient(logits, row.target, loss.lse, spec);
        }
    });
}

impl LinearCrossEntropy for CpuBackend {
    fn linear_cross_entropy(
        &self,
        spec: &Spec,
        x: &Tensor,
        weight: &Weight,
        targets: &Tensor,
        dweight: Option<&mut Tensor>,
    ) -> Result<Forward> {
        const OP: &str = "linear_cross_entropy";
        let weight = dense(OP, weight)?;
        let targets = read::<i32>(targets);
        check_targets(OP, targets, spec.vocab_size)?;
        let with_target = |(index, &target): (usize, &i32)| Some(Row { index, target: usize::try_from(target).ok()? });
        let rows: Vec<Row> = targets.iter().enumerate().filter_map(with_target).collect();
        let mut dweight = dweight.map(|dweight| write::<f32>(OP, "dweight", dweight)).transpose()?;
        let mut dx = match spec.needs_dx {
            // Rows without a target keep gradient zero.
            true if rows.len() < spec.tokens => {
                Some(x.device().zeros(*x.shape(), spec.dtype, Category::Activations)?)
            }
            true => Some(output(x, spec.dtype, *x.shape(), Category::Activations)?),
            false => None,
        };
        let mut nll = self.workspace(rows.len())?;
        let call = Call { spec, x, weight };
        self.run(|| -> Result<()> {
            for chunk in blocks(rows.len(), (CHUNK / spec.vocab_size).max(MIN_ROWS)) {
                let rows = &rows[chunk.clone()];
                let chunk_dx = self.loss_chunk(&call, rows, &mut nll[chunk], dweight.as_deref_mut())?;
                if let (Some(dx), Some(chunk_dx)) = (&mut dx, chunk_dx) {
                    dispatch_float!(spec.dtype, T => scatter(&chunk_dx, rows, write::<T>(OP, "dx", dx)?));
                }
            }
            Ok(())
        })?;
        let loss = mean_loss(x, &nll, spec.loss.num_targets)?;
        Ok(Forward { loss, dx })
    }
}
