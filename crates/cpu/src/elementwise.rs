//! Elementwise operators, in parallel over blocks; memory-bound, so every operator reads and writes once.

use unsloth_core::{Category, DType, Element, Error, FloatElement, Result, Tensor, ops::elementwise::Elementwise};

use crate::{
    CpuBackend,
    access::{cpu_buffer, dispatch_float, output, read, write},
    simd::{self, BLOCK, TASK, update, vectorised, widened},
};

/// What an operator that may reuse an input works on.
pub(crate) struct Reused {
    /// The tensor to write.
    pub(crate) out: Tensor,
    /// Where the values still are, if `out` is a new buffer.
    pub(crate) source: Option<Tensor>,
}

impl Reused {
    /// The input itself if nobody shares it and it is not adopted, else a new buffer.
    pub(crate) fn new(x: Tensor) -> Result<Self> {
        if x.is_unique() && cpu_buffer(x.buffer()).is_owned() {
            return Ok(Self { out: x, source: None });
        }
        let out = output(&x, x.dtype(), *x.shape(), Category::Activations)?;
        Ok(Self { out, source: Some(x) })
    }

    /// The elements to write, and those to copy there first.
    pub(crate) fn slices<T: Element>(&mut self, op: &'static str) -> Result<(&mut [T], Option<&[T]>)> {
        Ok((write(op, "out", &mut self.out)?, self.source.as_ref().map(read)))
    }
}

/// Brings `source[start ..]` into `block`, where it is not there already.
#[inline(always)]
pub(crate) fn fetch<T: Element>(block: &mut [T], source: Option<&[T]>, start: usize) {
    if let Some(source) = source {
        block.copy_from_slice(&source[start..start + block.len()]);
    }
}

impl CpuBackend {
    /// Runs `work(start, block, buffers)` on blocks of at most [`BLOCK`] elements, in parallel when there are many. Buffers have
    /// arbitrary contents.
    pub(crate) fn for_each_block<T: Element, const BUFFERS: usize>(
        &self,
        out: &mut [T],
        work: impl Fn(usize, &mut [T], &mut [[f32; BLOCK]; BUFFERS]) + Sync,
    ) {
        let task = |start: usize, part: &mut [T]| {
            let mut buffers = [[0.0; BLOCK]; BUFFERS];
            for (i, block) in part.chunks_mut(BLOCK).enumerate() {
                work(start + i * BLOCK, block, &mut buffers);
            }
        };
        self.for_each_part(out.chunks_mut(TASK).enumerate(), |(i, part)| task(i * TASK, part));
    }

    /// `x[i] = f(x[i], b[i])`, reusing `x`.
    fn zip(&self, op: &'static str, x: Tensor, b: &Tensor, f: impl Fn(f32, f32) -> f32 + Sync) -> Result<Tensor> {
        let mut x = Reused::new(x)?;
        dispatch_float!(b.dtype(), T => {
            let b = read::<T>(b);
            let (out, source) = x.slices::<T>(op)?;
            self.for_each_block(out, |start, block, [first, second]| {
                fetch(block, source, start);
                let b = widened(&b[start..start + block.len()], second);
                update(block, first, |x| vectorised(#[inline(always)] || x.iter_mut().zip(b).for_each(|(x, b)| *x = f(*x, *b))));
            });
        });
        Ok(x.out)
    }

    /// Copies any tensor of one element type.
    fn copy_elements<T: Element>(&self, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let x = read::<T>(x);
        self.for_each_block(write::<T>("copy", "out", out)?, |start, block, []| fetch(block, Some(x), start));
        Ok(())
    }

    fn zero_elements<T: Element>(&self, x: &mut Tensor) -> Result<()> {
        self.for_each_block(write::<T>("fill_zero", "x", x)?, |_, block, []| block.fill(T::zeroed()));
        Ok(())
    }

    fn cast_elements<From: FloatElement, To: FloatElement>(&self, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let x = read::<From>(x);
        self.for_each_block(write::<To>("cast", "out", out)?, |start, block, [buffer]| {
            simd::narrow(widened(&x[start..start + block.len()], buffer), block);
        });
        Ok(())
    }
}

impl Elementwise for CpuBackend {
    fn add(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        self.zip("add", a, b, |a, b| a + b)
    }

    fn mul(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        self.zip("mul", a, b, |a, b| a * b)
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        let mut x = Reused::new(x)?;
        dispatch_float!(x.out.dtype(), T => {
            let (out, source) = x.slices::<T>("scale")?;
            self.for_each_block(out, |start, block, [buffer]| {
                fetch(block, source, start);
                update(block, buffer, |x| vectorised(#[inline(always)] || simd::scale(x, factor)));
            });
        });
        Ok(x.out)
    }

    fn scale_by(&self, x: Tensor, scalar: &Tensor) -> Result<Tensor> {
        self.scale(x, read::<f32>(scalar)[0])
    }

    fn accumulate(&self, accumulator: &mut Tensor, x: &Tensor) -> Result<()> {
        dispatch_float!(x.dtype(), T => {
            let x = read::<T>(x);
            self.for_each_block(write::<f32>("accumulate", "accumulator", accumulator)?, |start, block, [buffer]| {
                let x = widened(&x[start..start + block.len()], buffer);
                vectorised(#[inline(always)] || block.iter_mut().zip(x).for_each(|(sum, x)| *sum += x));
            });
        });
        Ok(())
    }

    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let mut out = output(x, dtype, *x.shape(), x.buffer().category())?;
        dispatch_float!(x.dtype(), From => dispatch_float!(dtype, To => self.cast_elements::<From, To>(x, &mut out)?));
        Ok(out)
    }

    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        let mut out = output(x, x.dtype(), *x.shape(), x.buffer().category())?;
        match x.dtype() {
            DType::I32 => self.copy_elements::<i32>(x, &mut out)?,
            float => dispatch_float!(float, T => self.copy_elements::<T>(x, &mut out)?),
        }
        Ok(out)
    }

    fn fill_zero(&self, x: &mut Tensor) -> Result<()> {
        match x.dtype() {
            DType::I32 => self.zero_elements::<i32>(x),
            float => dispatch_float!(float, T => self.zero_elements::<T>(x)),
        }
    }
}

/// A scalar on the device of `like`.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn scalar(like: &Tensor, value: f32) -> Result<Tensor, Error> {
    like.device().from_slice(&[value], [1], Category::Activations)
}
