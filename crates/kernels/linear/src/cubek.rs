//! Products by a kernel of cubek-matmul, as a candidate beside ours: tensor cores, one tile in shared memory, put there by the copy engine.
//! It has no bias, no factor, and does not add to its output.
//!
//! Left out of the library are `wmma` forms, which are slower than `mma`; what makes tf32 of f32; and whatever spills registers on one of
//! the architectures that `cargo xtask cuda-check` compiles for, which is every other form for tensor cores.

use std::{
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
};

use cubecl::{ir::features::Tma, prelude::*};
use cubek_matmul::{
    definition::{MatmulElems, MatmulGlobalElems},
    launch::{Strategy, launch_ref},
};
use cubek_std::InputBinding;
use unsloth_common::{Launch, LaunchError};

use crate::{
    product::{Job, Matrix},
    tensor,
};

/// What it is called where people read it.
pub(crate) const NAME: &str = "cubek simple tma";

/// Whether it can make a product on a device: of one half-precision type, with a copy engine.
pub(crate) fn can(client: &ComputeClient<impl Runtime>, job: &Job) -> bool {
    let Job { form, ref args, .. } = *job;
    let is_plain = args.bias.is_none() && !form.accumulate && args.scale == 1.0 && args.a.element == args.b.element;
    is_plain && client.properties().features.tma.contains(Tma::Base) && tensor::Operands::of(client, job).is_some()
}

/// Launches it.
///
/// # Errors
/// [`LaunchError::Unsupported`] where the library has no form of this kernel for these sizes.
pub(crate) fn launch<R: Runtime>(launch: &Launch<'_, R>, job: &Job) -> Result<(), LaunchError> {
    let Job { size, form, ref args } = *job;
    let (a, b, out) = (&args.a, &args.b, &args.out);
    let elements = MatmulGlobalElems { lhs: a.element, rhs: b.element, out: out.element };
    let lhs = InputBinding::new(binding(a, [size.rows, size.depth], form.a_transposed), a.element);
    let rhs = InputBinding::new(binding(b, [size.depth, size.cols], form.b_transposed), b.element);
    let to_out = binding(out, [size.rows, size.cols], false);
    let mut elements = MatmulElems::from_globals(&elements);
    let (strategy, client) = (Strategy::SimpleTmaMma(Default::default()), launch.client());
    // The library unwraps where it finds no division into tiles.
    let launched = catch_unwind(AssertUnwindSafe(|| launch_ref(&strategy, client, lhs, rhs, to_out, &mut elements)));
    let what = match launched {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => format!("{NAME}: {error}"),
        Err(_) => format!("{NAME} of these sizes"),
    };
    Err(LaunchError::Unsupported { kernel: launch.kernel(), what, device: R::name(client).to_owned() })
}

/// A matrix of `shape`, stored row by row, or column by column where it is transposed.
fn binding<R: Runtime>(matrix: &Matrix, shape: [usize; 2], transposed: bool) -> TensorBinding<R> {
    let strides = if transposed { [1, shape[0]] } else { [shape[1], 1] };
    TensorBinding {
        handle: matrix.handle.clone().binding(),
        shape: shape.to_vec().into(),
        strides: strides.to_vec().into(),
        runtime: PhantomData,
    }
}
