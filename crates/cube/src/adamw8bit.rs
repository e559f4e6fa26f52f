//! AdamW with moments in 8 bits on the kernel of `unsloth-pointwise`.

use cubecl::{prelude::Runtime, server::Handle};
use unsloth_core::{
    Result, Tensor,
    ops::{
        adamw::Spec,
        adamw8bit::{AdamW8bit, BLOCK_SIZE, Buffers, CODES, signed_map, unsigned_map},
    },
};
use unsloth_pointwise::adamw8bit as kernels;

use crate::{
    access::{dispatch_float, handle, handle_mut},
    adamw,
    backend::CubeBackend,
};

const OP: &str = "adamw8bit";

const _: () = assert!(BLOCK_SIZE == kernels::BLOCK_SIZE && CODES == kernels::CODES);

impl<R: Runtime> CubeBackend<R> {
    /// Values of the codes of both moments, which stay on the device from the first step on.
    fn maps(&self) -> Result<&Handle> {
        let maps = || [signed_map(), unsigned_map()].concat();
        self.table(&self.moment_maps, OP, maps)
    }
}

impl<R: Runtime> AdamW8bit for CubeBackend<R> {
    fn adamw8bit(&self, spec: &Spec, buffers: Buffers<'_>, state: &Tensor) -> Result<()> {
        let (len, dtype) = (buffers.grad.num_elements(), buffers.param.dtype());
        let options = adamw::options(spec);
        let args = kernels::Step {
            param: handle_mut(OP, "param", buffers.param)?,
            grad: handle(buffers.grad),
            m_codes: handle_mut(OP, "m_codes", buffers.m_codes)?,
            m_absmax: handle_mut(OP, "m_absmax", buffers.m_absmax)?,
            v_codes: handle_mut(OP, "v_codes", buffers.v_codes)?,
            v_absmax: handle_mut(OP, "v_absmax", buffers.v_absmax)?,
            maps: self.maps()?,
            state: handle(state),
        };
        self.launch(OP, |client| dispatch_float!(dtype, E => kernels::step::<R, E>(client, &options, len, args)))
    }
}
