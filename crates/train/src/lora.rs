//! Configuration of low-rank adapters.

use crate::{Result, error::invalid};

/// Low-rank adapters: `y = x W^T + (alpha / rank) (x A^T) B^T`.   Hu et al. 2021, arXiv:2106.09685
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Inner dimension, 1 to the smaller dimension of each adapted layer.
    pub rank: usize,
    /// Scale numerator, finite; the update is multiplied by `alpha / rank`.
    pub alpha: f32,
}

impl LoraConfig {
    /// Checks what can be checked without a layer; [`crate::Linear::add_adapter`] checks the rank against its layer.
    ///
    /// # Errors
    /// [`crate::Error::InvalidConfig`] for rank 0 or an alpha that is not finite.
    pub fn validate(&self) -> Result<()> {
        if self.rank == 0 {
            return invalid("rank", self.rank, "at least 1");
        }
        if !self.alpha.is_finite() {
            return invalid("alpha", self.alpha, "finite");
        }
        Ok(())
    }

    /// Factor of the update, `alpha / rank`.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }
}
