//! Sizes and options of one attention, and what follows from them for a launch.

use cubecl::prelude::*;
use unsloth_common::{Launch, LaunchError};

use crate::{
    block::{ScoringLaunch, SizesLaunch},
    tile::{Need, Tile},
};

/// Positions are compared in 32-bit integers: lengths stay below a quarter of their range, so that no sum of two overflows.
const MAX_LENGTH: usize = 1 << 29;

/// Sizes and options of one attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Channels of a head, 1 to 256.
    pub head_dim: usize,
    /// Packed sequences.
    pub num_seqs: usize,
    /// Query tokens over all sequences.
    pub tokens_q: usize,
    /// Key tokens over all sequences; for a cache `num_seqs * max_seqlen_k`.
    pub tokens_k: usize,
    /// Queries of the longest sequence.
    pub max_seqlen_q: usize,
    /// Keys of the longest sequence; for a cache its capacity.
    pub max_seqlen_k: usize,
    /// Multiplies `q k^T`.
    pub scale: f32,
    /// Whether a query sees only keys up to its own position.
    pub causal: bool,
    /// Number of keys before its own position that a query sees; `None` means all.
    pub left: Option<usize>,
    /// Bounds scores smoothly to `(-softcap, softcap)`; positive.
    pub softcap: Option<f32>,
}

impl Shape {
    /// # Errors
    /// [`LaunchError::Invalid`] for a field out of its range.
    pub(crate) fn check(&self, kernel: &'static str) -> Result<(), LaunchError> {
        let invalid = |field, value: usize, rule| {
            let value = value as u64;
            Err(LaunchError::Invalid { kernel, field, value, rule })
        };
        if self.num_kv_heads == 0 || !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return invalid("num_kv_heads", self.num_kv_heads, "a divisor of num_heads");
        }
        if !(1..=256).contains(&self.head_dim) {
            return invalid("head_dim", self.head_dim, "1 to 256");
        }
        let longest = self.max_seqlen_q.max(self.max_seqlen_k);
        if longest >= MAX_LENGTH {
            return invalid("max_seqlen", longest, "below 2^29");
        }
        Ok(())
    }

    /// Query heads per key head.
    pub(crate) fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Elements of `q`.
    pub(crate) fn len_q(&self) -> usize {
        self.tokens_q * self.num_heads * self.head_dim
    }

    /// Elements of `k`.
    pub(crate) fn len_k(&self) -> usize {
        self.tokens_k * self.num_kv_heads * self.head_dim
    }

    pub(crate) fn sizes<R: Runtime>(&self, width: usize) -> SizesLaunch<R> {
        SizesLaunch::new(
            self.num_heads as u32,
            self.num_kv_heads as u32,
            self.group() as u32,
            self.tokens_q as u32,
            self.max_seqlen_k as u32,
            (self.head_dim / width) as u32,
        )
    }

    pub(crate) fn scoring<R: Runtime>(&self) -> ScoringLaunch<R> {
        let left = self.left.unwrap_or(MAX_LENGTH).min(MAX_LENGTH) as i32;
        let right = if self.causal { 0 } else { MAX_LENGTH as i32 };
        ScoringLaunch::new(self.scale, self.softcap.unwrap_or(1.0), left, right)
    }

    /// One cube per block of held rows, key head and sequence.
    pub(crate) fn grid<R: Runtime>(
        &self,
        launch: &Launch<'_, R>,
        rows: usize,
        tile: Tile,
    ) -> Result<(CubeCount, CubeDim), LaunchError> {
        let count = launch.cubes(rows.div_ceil(tile.held()), self.num_kv_heads, self.num_seqs)?;
        Ok((count, CubeDim::new_1d(tile.units() as u32)))
    }

    /// The tile for this head size and device.
    pub(crate) fn tile<R: Runtime>(
        &self,
        launch: &Launch<'_, R>,
        need: Need,
        width: usize,
    ) -> Result<Tile, LaunchError> {
        let tile = Tile::for_device(launch.client().properties(), need, (self.head_dim, width));
        launch.cube(CubeDim::new_1d(tile.units() as u32), tile.shared_bytes(need, width))?;
        Ok(tile)
    }
}
