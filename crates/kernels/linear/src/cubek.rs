//! Products by cubek-matmul, as candidates beside ours. They have no bias, no factor, and do not add to their output.

use std::{
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
};

use cubecl::{
    ir::{ElemType, FloatKind, features::Tma},
    prelude::*,
};
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

/// A kernel that may be faster than ours. What is left out of the library's: `wmma` forms, which are slower than `mma`, and what
/// makes tf32 of f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Tensor cores, one tile in shared memory.
    SimpleMma,
    /// Tensor cores, two tiles, loaded in turn.
    DoubleMma,
    /// The same, planes in a fixed order.
    OrderedMma,
    /// Tensor cores, tiles by the copy engine.
    SimpleTma,
    /// The same, two in turn.
    DoubleTma,
    /// Tensor cores, some planes load and some multiply.
    SpecializedTma,
    /// Units, one tile in shared memory.
    SimpleUnit,
    /// Units, two tiles, loaded in turn.
    DoubleUnit,
}

impl Kernel {
    pub(crate) const ALL: [Self; 8] = [
        Self::SimpleMma,
        Self::DoubleMma,
        Self::OrderedMma,
        Self::SimpleTma,
        Self::DoubleTma,
        Self::SpecializedTma,
        Self::SimpleUnit,
        Self::DoubleUnit,
    ];

    /// As `cubek double mma`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::SimpleMma => "cubek simple mma",
            Self::DoubleMma => "cubek double mma",
            Self::OrderedMma => "cubek ordered mma",
            Self::SimpleTma => "cubek simple tma",
            Self::DoubleTma => "cubek double tma",
            Self::SpecializedTma => "cubek specialized tma",
            Self::SimpleUnit => "cubek simple unit",
            Self::DoubleUnit => "cubek double unit",
        }
    }

    fn strategy(self) -> Strategy {
        match self {
            Self::SimpleMma => Strategy::SimpleCyclicMma(Default::default()),
            Self::DoubleMma => Strategy::DoubleCyclicMma(Default::default()),
            Self::OrderedMma => Strategy::OrderedDoubleMma(Default::default()),
            Self::SimpleTma => Strategy::SimpleTmaMma(Default::default()),
            Self::DoubleTma => Strategy::DoubleTmaMma(Default::default()),
            Self::SpecializedTma => Strategy::SpecializedTmaMma(Default::default()),
            Self::SimpleUnit => Strategy::SimpleUnit(Default::default()),
            Self::DoubleUnit => Strategy::DoubleUnit(Default::default()),
        }
    }

    /// Those that can make a product on a device: of f32 by units, of one half-precision type by tensor cores.
    pub(crate) fn candidates(client: &ComputeClient<impl Runtime>, job: &Job) -> Vec<Self> {
        let Job { form, ref args, .. } = *job;
        if args.bias.is_some() || form.accumulate || args.scale != 1.0 || args.a.element != args.b.element {
            return Vec::new();
        }
        let has_tma = client.properties().features.tma.contains(Tma::Base);
        let is_f32 = args.a.element == ElemType::Float(FloatKind::F32).into();
        let on_tensor_cores = tensor::Operands::of(client, job).is_some();
        let can = |kernel: &Self| match kernel {
            Self::SimpleMma | Self::DoubleMma | Self::OrderedMma => on_tensor_cores,
            Self::SimpleTma | Self::DoubleTma | Self::SpecializedTma => on_tensor_cores && has_tma,
            Self::SimpleUnit | Self::DoubleUnit => is_f32,
        };
        Self::ALL.into_iter().filter(can).collect()
    }

    /// Launches it.
    ///
    /// # Errors
    /// [`LaunchError::Unsupported`] where the library has no form of this kernel for these sizes.
    pub(crate) fn launch<R: Runtime>(self, launch: &Launch<'_, R>, job: &Job) -> Result<(), LaunchError> {
        let Job { size, form, ref args } = *job;
        let (a, b, out) = (&args.a, &args.b, &args.out);
        let elements = MatmulGlobalElems { lhs: a.element, rhs: b.element, out: out.element };
        let lhs = InputBinding::new(binding(a, [size.rows, size.depth], form.a_transposed), a.element);
        let rhs = InputBinding::new(binding(b, [size.depth, size.cols], form.b_transposed), b.element);
        let to_out = binding(out, [size.rows, size.cols], false);
        let mut elements = MatmulElems::from_globals(&elements);
        let (strategy, client) = (self.strategy(), launch.client());
        // The library unwraps where it finds no division into tiles.
        let launched =
            catch_unwind(AssertUnwindSafe(|| launch_ref(&strategy, client, lhs, rhs, to_out, &mut elements)));
        let what = match launched {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => format!("{}: {error}", self.name()),
            Err(_) => format!("{} of these sizes", self.name()),
        };
        Err(LaunchError::Unsupported { kernel: launch.kernel(), what, device: R::name(client).to_owned() })
    }
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
