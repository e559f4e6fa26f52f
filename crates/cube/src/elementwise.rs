//! Elementwise operators on the kernels of `unsloth-pointwise`.

use cubecl::prelude::Runtime;
use unsloth_core::{Category, DType, Error, Memory, Result, Tensor, ops::elementwise::Elementwise};
use unsloth_pointwise::elementwise as kernels;

use crate::{
    access::{allocate, dispatch_float, handle, handle_mut, output},
    backend::CubeBackend,
};

impl<R: Runtime> CubeBackend<R> {
    /// `x` itself if nobody shares it, else a copy to write to.
    pub(crate) fn reusable(&self, x: Tensor) -> Result<Tensor> {
        if x.is_unique() {
            return Ok(x);
        }
        let copy = self.copy(&x)?;
        copy.retag(Category::Activations);
        Ok(copy)
    }

    fn binary(&self, op: kernels::BinaryOp, name: &'static str, a: Tensor, b: &Tensor) -> Result<Tensor> {
        let (len, dtype) = (a.num_elements(), a.dtype());
        let (mut out, a) = if a.is_unique() { (a, None) } else { (output(name, &a, dtype, *a.shape())?, Some(a)) };
        let out_handle = handle_mut(name, "out", &mut out)?;
        let args = kernels::Binary { a: a.as_ref().map(handle), b: handle(b), out: out_handle };
        self.launch(name, |client| dispatch_float!(dtype, E => kernels::binary::<R, E>(client, op, len, args)))?;
        Ok(out)
    }
}

/// 32-bit words that hold a tensor; every buffer is as many words long.
fn words(tensor: &Tensor) -> usize {
    tensor.bytes().div_ceil(4)
}

impl<R: Runtime> Elementwise for CubeBackend<R> {
    fn add(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        self.binary(kernels::BinaryOp::Add, "add", a, b)
    }

    fn mul(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        self.binary(kernels::BinaryOp::Mul, "mul", a, b)
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        let (len, dtype) = (x.num_elements(), x.dtype());
        let mut x = self.reusable(x)?;
        let out = handle_mut("scale", "x", &mut x)?;
        self.launch("scale", |client| dispatch_float!(dtype, E => kernels::scale::<R, E>(client, len, out, factor)))?;
        Ok(x)
    }

    fn scale_by(&self, x: Tensor, scalar: &Tensor) -> Result<Tensor> {
        let (len, dtype) = (x.num_elements(), x.dtype());
        let mut x = self.reusable(x)?;
        let (out, scalar) = (handle_mut("scale_by", "x", &mut x)?, handle(scalar));
        self.launch(
            "scale_by",
            |client| dispatch_float!(dtype, E => kernels::scale_by::<R, E>(client, len, out, scalar)),
        )?;
        Ok(x)
    }

    fn accumulate(&self, accumulator: &mut Tensor, x: &Tensor) -> Result<()> {
        let (len, dtype) = (x.num_elements(), x.dtype());
        let (accumulator, x) = (handle_mut("accumulate", "accumulator", accumulator)?, handle(x));
        self.launch(
            "accumulate",
            |client| dispatch_float!(dtype, E => kernels::accumulate::<R, E>(client, len, accumulator, x)),
        )
    }

    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        if !self.supports(dtype) {
            return Err(Error::UnsupportedDType { op: "cast", dtype, device: self.name() });
        }
        let mut out = allocate("cast", x, dtype, (*x.shape(), x.buffer().category()))?;
        let (len, from) = (x.num_elements(), x.dtype());
        let (x, to_out) = (handle(x), handle_mut("cast", "out", &mut out)?);
        self.launch("cast", |client| {
            dispatch_float!(from, From => dispatch_float!(dtype, To =>
                kernels::cast::<R, From, To>(client, len, x, to_out)))
        })?;
        Ok(out)
    }

    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        let mut out = allocate("copy", x, x.dtype(), (*x.shape(), x.buffer().category()))?;
        let to_out = handle_mut("copy", "out", &mut out)?;
        self.launch("copy", |client| kernels::copy(client, words(x), handle(x), to_out))?;
        Ok(out)
    }

    fn fill_zero(&self, x: &mut Tensor) -> Result<()> {
        let words = words(x);
        let x = handle_mut("fill_zero", "x", x)?;
        self.launch("fill_zero", |client| kernels::fill(client, words, x, 0))
    }
}
