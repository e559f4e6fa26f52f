//! How much of an attention one cube holds at a time on tensor cores.

use cubecl::{ir::DeviceProperties, prelude::*};
use unsloth_common::{Launch, LaunchError, mma};

use crate::{block::FACTS, shape::Shape};

/// Longest head whose sums stay in registers.
const MAX_HEAD_DIM: usize = 128;
/// Tensor cores would take heads in steps of 16 channels. With 80 of them the assembler finds, on sm_100a, registers for one more cube but
/// for a few, and spills those.
const HEAD_DIM_STEP: usize = 32;

/// What a kernel keeps, and what its tile should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    /// Tiles of held rows.
    pub(crate) held: usize,
    /// Tiles of streamed rows.
    pub(crate) streamed: usize,
    /// Numbers of each streamed row.
    pub(crate) per_streamed: usize,
    /// The tile, as far as the device has room for it.
    pub(crate) tile: Tile,
}

/// `planes` blocks of 16 rows stay with a cube, blocks of `streamed` rows pass by, `step` of them at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    pub(crate) planes: usize,
    pub(crate) streamed: usize,
    /// Streamed rows whose scores are in registers at a time.
    pub(crate) step: usize,
    pub(crate) head_dim: usize,
}

impl Need {
    /// The need with a tile that fits the device; `None` where tensor cores cannot do it: without them, for another element type, for
    /// a head that is not a multiple of 32 or above 128, or with too little shared memory.
    pub(crate) fn on_device<R: Runtime, E: Float>(self, client: &ComputeClient<R>) -> Option<Self> {
        let element = E::as_type_native_unchecked().storage_type();
        if mma::is_supported(client, element) { self.within(client.properties()) } else { None }
    }

    fn within(self, properties: &DeviceProperties) -> Option<Self> {
        let head_dim = self.tile.head_dim;
        if head_dim == 0 || head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(HEAD_DIM_STEP) {
            return None;
        }
        let hardware = &properties.hardware;
        let fits = |need: &Self| {
            need.tile.units() <= hardware.max_units_per_cube as usize
                && need.shared_bytes() <= hardware.max_shared_memory_size
        };
        let fewer = |planes: usize| Self { tile: Tile { planes, ..self.tile }, ..self };
        [self.tile.planes, self.tile.planes / 2].map(fewer).into_iter().find(fits)
    }

    pub(crate) fn shared_bytes(&self) -> usize {
        let Self { held, streamed, per_streamed, tile } = self;
        let chunks = (held * tile.held() + streamed * tile.streamed) * tile.stride();
        chunks * mma::CHUNK * 2 + ((per_streamed * tile.streamed + FACTS) * size_of::<f32>()).next_multiple_of(16)
    }

    /// One cube per block of held rows, key head and sequence.
    ///
    /// # Errors
    /// [`LaunchError::Limit`] if the grid exceeds the device's.
    pub(crate) fn grid<R: Runtime>(
        &self,
        launch: &Launch<'_, R>,
        shape: &Shape,
        rows: usize,
    ) -> Result<(CubeCount, CubeDim), LaunchError> {
        let dim = CubeDim::new_1d(self.tile.units() as u32);
        launch.cube(dim, self.shared_bytes())?;
        let count = launch.cubes(rows.div_ceil(self.tile.held()), shape.num_kv_heads, shape.num_seqs)?;
        Ok((count, dim))
    }
}

impl Tile {
    /// Rows that a cube keeps.
    pub(crate) fn held(&self) -> usize {
        self.planes * mma::ROWS
    }

    pub(crate) fn units(&self) -> usize {
        self.planes * mma::PLANE
    }

    /// Chunks of so many rows that a unit loads, at most.
    pub(crate) fn loads(&self, rows: usize) -> usize {
        (rows * self.chunks()).div_ceil(self.units())
    }

    /// Whether a unit has registers for all that it loads of a tile at once: of heads of 96 channels it has not.
    pub(crate) fn loads_ahead(&self) -> bool {
        self.head_dim.is_power_of_two()
    }

    /// Chunks of a row.
    pub(crate) fn chunks(&self) -> usize {
        self.head_dim / mma::CHUNK
    }

    /// Chunks from one row of a tile to the next.
    pub(crate) fn stride(&self) -> usize {
        mma::stride(self.head_dim)
    }
}
