//! Linear cross entropy by chunks of rows that have a target: logits, loss and gradients of a chunk, then the next.

use half::bf16;
use unsloth_core::{
    Category, DType, FloatElement, Result, Tensor, Weight,
    ops::{
        cross_entropy::LossSpec,
        linear_cross_entropy::{Forward, LinearCrossEntropy, Spec},
    },
};

use crate::{
    access::{dispatch_float, output, read, write},
    backend::{CpuBackend, Workspace},
    cross_entropy::{check_targets, mean_loss, row_gradient, row_gradient_in_bf16, row_loss},
    linear::{blocks, dense},
    matmul::{Elements, Into, Mat, MatMut, Sum, Term},
    simd,
};

/// f32 elements of a chunk's logits: 32 MiB, or [`ROWS`] rows where that is more.
const CHUNK: usize = 8 << 20;
/// Rows of a chunk that make up for packing the whole weight twice for each chunk; more of them would gain little.
const ROWS: usize = 256;
/// f32 elements that a chunk's logits may take for that many rows: 168 MiB, or [`MIN_ROWS`] rows where that is more.
const MOST: usize = 42 << 20;
/// Fewest rows of a chunk, whatever they take.
const MIN_ROWS: usize = 128;

/// Rows of each chunk but the last, which is hardly smaller where all tokens have a target: its buffers are to be those of the others.
/// How many have one does not matter, so that fewer of them never take more memory than was planned.
fn chunk_rows(tokens: usize, vocab_size: usize) -> usize {
    let most = (CHUNK / vocab_size).max(ROWS.min(MOST / vocab_size)).max(MIN_ROWS);
    tokens.div_ceil(tokens.div_ceil(most).max(1))
}

impl CpuBackend {
    /// Losses of rows of logits.
    fn losses(&self, logits: &mut [f32], rows: &[Row], nll: &mut [f32], spec: &LossSpec, gradient: Gradient) {
        let vocab = logits.len() / rows.len();
        self.for_each_part(logits.chunks_mut(vocab).zip(rows).zip(nll), |((logits, row), nll)| {
            let loss = row_loss(logits, row.target, spec);
            *nll = loss.nll;
            match gradient {
                Gradient::None => (),
                Gradient::InF32 => row_gradient(logits, row.target, loss.lse, spec),
                Gradient::InBf16 => row_gradient_in_bf16(logits, row.target, loss.lse, spec),
            }
        });
    }

    /// Loss and gradients of the rows `rows` of `x`: losses to `nll`, `dx` rows to the result.
    fn loss_chunk<T: FloatElement>(
        &self,
        call: &Call<'_>,
        rows: &[Row],
        nll: &mut [f32],
        dweight: Option<&mut [f32]>,
    ) -> Result<Dx> {
        let (hidden, vocab) = (call.spec.hidden_size, call.spec.vocab_size);
        let weight = Mat::of(call.weight);
        let mut x = self.workspace(rows.len() * hidden)?;
        let gathered = &mut bytemuck::cast_slice_mut::<f32, T>(&mut x)[..rows.len() * hidden];
        gather(read(call.x), rows, gathered);
        let narrow_x = Mat::new(Elements::from_slice(gathered), rows.len(), hidden, hidden);
        let mut logits = self.workspace(rows.len() * vocab)?;
        let target = MatMut::new(&mut logits, rows.len(), vocab, vocab);
        self.product(Sum::new(&[Term::new(narrow_x, weight)], Into::Overwrite), target)?;
        let wants_gradient = call.spec.needs_dx || dweight.is_some();
        // Rounded as its oracle's naive form does, where that makes both factors what the processor multiplies in pairs.
        let narrow = T::DTYPE == DType::BF16 && call.weight.dtype() == DType::BF16 && self.isa().multiplies_pairs();
        let gradient = match narrow {
            _ if !wants_gradient => Gradient::None,
            true => Gradient::InBf16,
            false => Gradient::InF32,
        };
        self.losses(&mut logits, rows, nll, &call.spec.loss, gradient);
        let dlogits = match gradient {
            Gradient::InBf16 => {
                let halves = Elements::from_slice(bytemuck::cast_slice::<f32, bf16>(&logits));
                Mat::new(halves, rows.len(), vocab, 2 * vocab)
            }
            _ => Mat::f32(&logits, rows.len(), vocab),
        };
        if let Some(dweight) = dweight {
            let target = MatMut::new(dweight, vocab, hidden, hidden);
            self.product(Sum::new(&[Term::new(dlogits.t(), narrow_x.t())], Into::Add), target)?;
        }
        if !call.spec.needs_dx {
            return Ok(None);
        }
        // The gathered input has served its purpose: its buffer takes the gradient.
        let target = MatMut::new(&mut x, rows.len(), hidden, hidden);
        self.product(Sum::new(&[Term::new(dlogits, weight.t())], Into::Overwrite), target)?;
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

fn gather<T: FloatElement>(x: &[T], rows: &[Row], to: &mut [T]) {
    let hidden = to.len() / rows.len().max(1);
    for (to, row) in to.chunks_exact_mut(hidden.max(1)).zip(rows) {
        to.copy_from_slice(&x[row.index * hidden..(row.index + 1) * hidden]);
    }
}

fn scatter<T: FloatElement>(from: &[f32], rows: &[Row], dx: &mut [T]) {
    let hidden = from.len() / rows.len().max(1);
    for (from, row) in from.chunks_exact(hidden.max(1)).zip(rows) {
        simd::narrow(from, &mut dx[row.index * hidden..(row.index + 1) * hidden]);
    }
}

/// What becomes of logits.
#[derive(Clone, Copy)]
enum Gradient {
    /// They stay.
    None,
    /// Their gradient takes their place.
    InF32,
    /// Their gradient takes the first half of each row.
    InBf16,
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
        dispatch_float!(spec.dtype, T => {
            for chunk in blocks(rows.len(), chunk_rows(spec.tokens, spec.vocab_size)) {
                let rows = &rows[chunk.clone()];
                let chunk_dx = self.loss_chunk::<T>(&call, rows, &mut nll[chunk], dweight.as_deref_mut())?;
                if let (Some(dx), Some(chunk_dx)) = (&mut dx, chunk_dx) {
                    scatter(&chunk_dx, rows, write::<T>(OP, "dx", dx)?);
                }
            }
        });
        let loss = mean_loss(x, &nll, spec.loss.num_targets)?;
        Ok(Forward { loss, dx })
    }
}
