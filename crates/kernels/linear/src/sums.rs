//! Sums in f32 that are rounded once, when all is added up.

use std::{marker::PhantomData, ops::Range};

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, unchecked};

use crate::product::Matrix;

/// Whether sums of f32 are rounded to become `X`.
pub(crate) fn is_narrow<X: Float>() -> bool {
    X::as_type_native_unchecked().size() < size_of::<f32>()
}

/// A buffer from its row `first` on.
pub(crate) fn from_row<E: CubePrimitive>(handle: &Handle, first: usize, columns: usize) -> Handle {
    handle.clone().offset_start((first * columns * E::as_type_native_unchecked().size()) as u64)
}

/// Where sums in f32 that become rows of an output of `X` are kept: in the output itself, or in the workspace.
pub(crate) struct Sums<'a, R: Runtime, X> {
    launch: &'a Launch<'a, R>,
    arg: &'static str,
    out: Handle,
    workspace: &'a Handle,
    len: usize,
    element: PhantomData<X>,
}

impl<'a, R: Runtime, X: Float> Sums<'a, R, X> {
    /// Those of some rows of `out`, which has this many columns. The workspace has room for them where `X` is narrow.
    pub(crate) fn new(
        launch: &'a Launch<'a, R>,
        (arg, out): (&'static str, &Handle),
        (rows, columns): (&Range<usize>, usize),
        workspace: &'a Handle,
    ) -> Self {
        let (out, len) = (from_row::<X>(out, rows.start, columns), rows.len() * columns);
        Self { launch, arg, out, workspace, len, element: PhantomData }
    }

    /// f32 `[rows, columns]`
    pub(crate) fn handle(&self) -> &Handle {
        if is_narrow::<X>() { self.workspace } else { &self.out }
    }

    /// The same, as the output of a product.
    pub(crate) fn matrix(&self) -> Result<Matrix, LaunchError> {
        let arg = if is_narrow::<X>() { "workspace" } else { self.arg };
        Matrix::new::<f32>(self.launch, arg, self.handle(), self.len)
    }

    /// Rounds the sums where they are not the output.
    pub(crate) fn finish(self) -> Result<(), LaunchError> {
        if !is_narrow::<X>() || self.len == 0 {
            return Ok(());
        }
        let Self { launch, arg, out, workspace, len, .. } = self;
        launch.element::<X>()?;
        let width = launch.vector_width::<f32>(len);
        let grid = launch.flat(len / width);
        launch.cube(grid.dim, 0)?;
        let sums = launch.vectors::<f32>("workspace", workspace, len, width)?;
        let out = launch.vectors::<X>(arg, &out, len, width)?;
        unchecked!(round_kernel::launch_unchecked::<X, R>(
            launch.client(),
            grid.count,
            grid.dim,
            width,
            sums,
            out,
            (len / width) as u32
        ));
        Ok(())
    }
}

/// Grid: unit = vector, walking on by the number of units.
#[cube(launch_unchecked)]
fn round_kernel<X: Float, N: Size>(sums: &Array<Vector<f32, N>>, out: &mut Array<Vector<X, N>>, items: u32) {
    let mut i = ABSOLUTE_POS;
    while i < items as usize {
        out[i] = Vector::cast_from(sums[i]);
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
}
