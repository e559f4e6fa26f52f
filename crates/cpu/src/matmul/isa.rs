//! Which instructions products are made of: a value, found once.

use pulp::WithSimd;
use unsloth_core::{Error, Result};

/// An instruction set that matrix products and attention have a path for. Every path sums in f32 and gives the same bits on every
/// call and for any number of threads; bits differ between paths, since some fuse the multiplication into the addition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// What every processor has, or Neon where that is part of the architecture.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 of x86-64-v4.
    Avx512,
    /// AVX-512 and its dot products of bf16 pairs, which products of two bf16 matrices and attention between bf16 heads use.
    Avx512Bf16,
    /// AVX-512 and AMX, whose products of bf16 tiles matrix products are made of, those of wider types as products of their parts, and attention
    /// between bf16 heads.
    Amx,
}

impl Isa {
    /// From the oldest to the newest.
    pub(super) const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// Those that this processor has, from the oldest to the newest.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Name as in the options of a device.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        let has_avx2 = || pulp::x86::V3::try_new().is_some();
        // The features that the kernels are compiled with.
        let has_avx512 = || has_avx2() && crate::avx512::is_available();
        match self {
            Self::Portable => true,
            Self::Avx2 => has_avx2(),
            Self::Avx512 => has_avx512(),
            Self::Avx512Bf16 => has_avx512() && is_x86_feature_detected!("avx512bf16"),
            Self::Amx => Self::Avx512Bf16.is_available() && crate::amx::is_available(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Self::Portable
    }

    /// Whether its products of two bf16 factors are dot products of pairs.
    pub(crate) fn multiplies_pairs(self) -> bool {
        matches!(self, Self::Avx512Bf16 | Self::Amx)
    }

    /// Whether it has vectors of AVX-512.
    pub(crate) fn has_avx512(self) -> bool {
        matches!(self, Self::Avx512 | Self::Avx512Bf16 | Self::Amx)
    }

    /// Runs what is written for vectors of any width with the widest that it has of at most eight f32.
    #[inline]
    pub(crate) fn vectorize<W: WithSimd>(self, work: W) -> W::Output {
        #[cfg(target_arch = "x86_64")]
        {
            if self == Self::Portable {
                return pulp::Simd::vectorize(pulp::Scalar::new(), work);
            }
            let Some(v3) = pulp::x86::V3::try_new() else { unreachable!("a path is chosen for this processor") };
            pulp::Simd::vectorize(v3, work)
        }
        #[cfg(not(target_arch = "x86_64"))]
        pulp::Arch::new().dispatch(work)
    }

    /// The fastest that this processor has.
    pub(crate) fn fastest() -> Self {
        // Intel's cores take dot products of pairs a fourth as often as fused multiply-adds, so that widening bf16 is twice as fast.
        let is_slow = |isa: &Self| *isa == Self::Avx512Bf16 && is_intel();
        Self::available().filter(|isa| !is_slow(isa)).last().unwrap_or(Self::Portable)
    }

    /// The fastest one, or the one asked for.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`] for one that this processor lacks.
    pub(crate) fn choose(wanted: Option<Self>) -> Result<Self> {
        match wanted {
            None => Ok(Self::fastest()),
            Some(isa) if isa.is_available() => Ok(isa),
            Some(isa) => Err(Error::InvalidSpec {
                op: "cpu",
                field: "isa",
                value: isa.name().to_owned(),
                rule: "an instruction set of this processor",
            }),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn is_intel() -> bool {
    false
}
