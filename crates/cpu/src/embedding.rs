//! Embedding lookup. The gradient is parallel over ranges of the vocabulary, so each row has one writer, which adds in the
//! order of the tokens.

use unsloth_core::{
    Category, Error, FloatElement, Result, Tensor, Weight,
    ops::embedding::{Embedding, Spec},
};

use crate::{
    CpuBackend,
    access::{dispatch_float, output, read, write},
    simd::{self, BLOCK, TASK, vectorised, widened},
};

/// Ranges that the vocabulary is cut into for the gradient.
const VOCABULARY_PARTS: usize = 256;

/// # Errors
/// [`Error::InvalidSpec`] for an id outside the table.
fn check_ids(ids: &[i32], vocab_size: usize) -> Result<()> {
    match ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= vocab_size)) {
        Some(id) => Err(Error::InvalidSpec {
            op: "embedding",
            field: "ids",
            value: format!("{id} with vocab_size {vocab_size}"),
            rule: "0 or more and below vocab_size",
        }),
        None => Ok(()),
    }
}

/// `out` = the rows of `table`; `ids` are in range.
fn gather<W: FloatElement, T: FloatElement>(spec: &Spec, table: &[W], ids: &[i32], out: &mut [T]) {
    let mut buffer = [0.0; BLOCK];
    for (id, out) in ids.iter().zip(out.chunks_mut(spec.hidden_size)) {
        let row = &table[*id as usize * spec.hidden_size..][..spec.hidden_size];
        for (from, to) in row.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
            if W::DTYPE == T::DTYPE {
                to.copy_from_slice(bytemuck::cast_slice(from));
            } else {
                simd::narrow(widened(from, &mut buffer), to);
            }
        }
    }
}

/// Adds rows of `dout` to the rows of `part`, which starts at id `first`. `tokens` is sorted by id, then by position.
fn scatter<T: FloatElement>(first: usize, part: &mut [f32], tokens: &[(i32, u32)], dout: &[T], hidden_size: usize) {
    let end = first + part.len() / hidden_size;
    let from = tokens.partition_point(|&(id, _)| (id as usize) < first);
    let to = tokens.partition_point(|&(id, _)| (id as usize) < end);
    let mut buffer = [0.0; BLOCK];
    for &(id, token) in &tokens[from..to] {
        let row = &mut part[(id as usize - first) * hidden_size..][..hidden_size];
        let dout = &dout[token as usize * hidden_size..][..hidden_size];
        for (sum, dout) in row.chunks_mut(BLOCK).zip(dout.chunks(BLOCK)) {
            let dout = widened(dout, &mut buffer);
            vectorised(
                #[inline(always)]
                || sum.iter_mut().zip(dout).for_each(|(sum, dout)| *sum += dout),
            );
        }
    }
}

impl Embedding for CpuBackend {
    fn embedding_forward(&self, spec: &Spec, weight: &Weight, ids: &Tensor) -> Result<Tensor> {
        let mut out = output(ids, spec.dtype, [spec.tokens, spec.hidden_size], Category::Activations)?;
        let table = weight.to_dense()?;
        let ids = read::<i32>(ids);
        check_ids(ids, spec.vocab_size)?;
        if spec.hidden_size == 0 {
            return Ok(out);
        }
        let rows = (TASK / spec.hidden_size).max(1);
        dispatch_float!(spec.weight_dtype, W => dispatch_float!(spec.dtype, T => {
            let (table, out) = (read::<W>(&table), write::<T>("embedding", "out", &mut out)?);
            if spec.tokens <= rows {
                gather(spec, table, ids, out);
            } else {
                let parts = out.chunks_mut(rows * spec.hidden_size).zip(ids.chunks(rows));
                self.for_each_part(parts, |(out, ids)| gather(spec, table, ids, out));
            }
        }));
        Ok(out)
    }

    fn embedding_backward(&self, spec: &Spec, ids: &Tensor, dout: &Tensor, dweight: &mut Tensor) -> Result<()> {
        let ids = read::<i32>(ids);
        check_ids(ids, spec.vocab_size)?;
        let dweight = write::<f32>("embedding", "dweight", dweight)?;
        if dweight.is_empty() {
            return Ok(());
        }
        // Positions fit u32: a tensor of ids beyond 2^32 elements is 16 GiB of ids alone.
        let mut tokens: Vec<(i32, u32)> = ids.iter().zip(0u32..).map(|(&id, token)| (id, token)).collect();
        tokens.sort_unstable();
        let rows = spec.vocab_size.div_ceil(VOCABULARY_PARTS);
        dispatch_float!(spec.dtype, T => {
            let dout = read::<T>(dout);
            let parts = dweight.chunks_mut(rows * spec.hidden_size).enumerate();
            self.for_each_part(parts, |(i, part)| scatter(i * rows, part, &tokens, dout, spec.hidden_size));
        });
        Ok(())
    }
}
