//! Which numbers are kept in which type.

use unsloth_core::DType;

use crate::LossScaleConfig;

/// The types of a run. Sums, statistics, gradients of parameters and what an optimiser keeps are f32 (or 8 bits, if it says so) in
/// every one.                                                    Micikevicius et al. 2017, arXiv:1710.03740
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Of matrices as operators read them, frozen or trained.
    pub storage: DType,
    /// Of activations and their gradients.
    pub compute: DType,
    /// Of trained parameters as the optimiser changes them: small steps would be lost in the rounding of 16 bits to nearest. Where it is not
    /// `storage`, trained matrices have a copy in that type.
    pub master: DType,
}

impl Precision {
    /// Everything in f32, but that frozen weights may stay in fewer bits if they are stored so: operators widen what they read.
    pub const F32: Self = Self { storage: DType::F32, compute: DType::F32, master: DType::F32 };
    /// Weights and activations in bf16.
    pub const BF16: Self = Self { storage: DType::BF16, compute: DType::BF16, master: DType::F32 };
    /// Weights and activations in bf16, and no copy of what is trained in a longer type: behind a step it is rounded up or down at random,
    /// so that small steps are not lost ([`unsloth_core::ops::stochastic_rounding`]).         Gupta et al. 2015, arXiv:1502.02551
    pub const PURE_BF16: Self = Self { storage: DType::BF16, compute: DType::BF16, master: DType::BF16 };
    /// Weights and activations in f16, whose gradients need a loss scale.
    pub const F16: Self = Self { storage: DType::F16, compute: DType::F16, master: DType::F32 };

    /// The one whose activations have this type; `None` for a type without.
    pub const fn with_activations(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::BF16 => Some(Self::BF16),
            DType::F16 => Some(Self::F16),
            _ => None,
        }
    }

    /// Whether trained matrices are rounded at random behind a step.
    pub fn rounds_stochastically(self) -> bool {
        self.master == DType::BF16
    }

    /// How the loss is scaled: in f16 gradients of activations would vanish without.
    pub fn loss_scale(self) -> Option<LossScaleConfig> {
        (self.compute == DType::F16).then(LossScaleConfig::default)
    }
}
