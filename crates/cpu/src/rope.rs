//! RoPE, in place where the buffers allow it, in parallel over tokens.

use unsloth_core::{
    Error, FloatElement, Result, Tensor,
    ops::rope::{Angles, Direction, Layout, Rope, Spec},
};

use crate::{
    CpuBackend,
    access::{dispatch_float, read},
    elementwise::{Reused, fetch},
    simd::{BLOCK, TASK, buffer, update, vectorised},
};

/// Tables and positions as slices.
struct Table<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    positions: &'a [i32],
    /// -1 for the gradient.
    sign: f32,
    layout: Layout,
    head_dim: usize,
}

impl Table<'_> {
    /// Rotates heads of one token.
    fn rotate(&self, token: usize, heads: &mut [f32]) {
        let pairs = self.head_dim / 2;
        let start = self.positions[token] as usize * pairs;
        let (cos, sin) = (&self.cos[start..start + pairs], &self.sin[start..start + pairs]);
        vectorised(
            #[inline(always)]
            || {
                for head in heads.chunks_exact_mut(self.head_dim) {
                    match self.layout {
                        Layout::Half => rotate_halves(head.split_at_mut(pairs), (cos, sin, self.sign)),
                        Layout::Interleaved => rotate_pairs(head, (cos, sin, self.sign)),
                    }
                }
            },
        );
    }
}

#[inline(always)]
fn rotate_halves((a, b): (&mut [f32], &mut [f32]), (cos, sin, sign): (&[f32], &[f32], f32)) {
    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        let sin = sign * sin;
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[inline(always)]
fn rotate_pairs(x: &mut [f32], (cos, sin, sign): (&[f32], &[f32], f32)) {
    for (([a, b], cos), sin) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        let sin = sign * sin;
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

impl CpuBackend {
    fn rotate_rows<T: FloatElement>(&self, table: &Table<'_>, x: &mut Reused, num_heads: usize) -> Result<()> {
        let row = num_heads * table.head_dim;
        let (x, source) = x.slices::<T>("rope")?;
        if row == 0 {
            return Ok(());
        }
        let tokens = (TASK / row).max(1);
        // Whole heads.
        let together = (BLOCK / table.head_dim).max(1) * table.head_dim;
        let task = |first: usize, part: &mut [T]| {
            let mut wide = buffer::<T>(together);
            for (i, row) in part.chunks_mut(row).enumerate() {
                fetch(row, source, (first + i) * row.len());
                for heads in row.chunks_mut(together) {
                    update(heads, &mut wide, |heads| table.rotate(first + i, heads));
                }
            }
        };
        if x.len() <= tokens * row {
            task(0, x);
        } else {
            let parts = x.chunks_mut(tokens * row).enumerate();
            self.for_each_part(parts, |(i, part)| task(i * tokens, part));
        }
        Ok(())
    }
}

impl Rope for CpuBackend {
    fn rope(&self, spec: &Spec, q: Tensor, k: Tensor, angles: Angles<'_>) -> Result<(Tensor, Tensor)> {
        let positions = read::<i32>(angles.positions);
        let outside =
            |&&position: &&i32| usize::try_from(position).map_or(true, |position| position >= spec.num_positions);
        if let Some(position) = positions.iter().find(outside) {
            return Err(Error::InvalidSpec {
                op: "rope",
                field: "positions",
                value: format!("{position} with {} rows in the table", spec.num_positions),
                rule: "0 or more and below the rows of the table",
            });
        }
        let sign = if spec.direction == Direction::Forward { 1.0 } else { -1.0 };
        let (cos, sin) = (read::<f32>(angles.cos), read::<f32>(angles.sin));
        let table = Table { cos, sin, positions, sign, layout: spec.layout, head_dim: spec.head_dim };
        let (mut q, mut k) = (Reused::new(q)?, Reused::new(k)?);
        dispatch_float!(spec.dtype, T => {
            self.rotate_rows::<T>(&table, &mut q, spec.num_heads)?;
            self.rotate_rows::<T>(&table, &mut k, spec.num_kv_heads)?;
        });
        Ok((q.out, k.out))
    }
}
