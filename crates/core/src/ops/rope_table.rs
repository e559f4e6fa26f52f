//! Cosine and sine tables of [`super::rope`], computed on the host in f64.
//!
//! `angle[p, i] = p * f_i` with `f_i = theta^(-2i / head_dim)` adjusted by the [`Scaling`]. Formulas are those of transformers'
//! `modeling_rope_utils`: linear (Chen et al. 2023, arXiv:2306.15595), YaRN (Peng et al. 2023, arXiv:2309.00071), llama3
//! (Llama 3 reference code).

use std::f64::consts::PI;

use super::check;
use crate::{Category, Device, Result, Tensor};

/// How frequencies are stretched for contexts beyond the pre-training length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// Frequencies as they are.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Stretch, 1 or more.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Stretch, 1 or more.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are stretched fully.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: usize,
    },
    /// YaRN: a ramp over channels between kept and stretched frequencies, and a factor on cos and sin.
    Yarn {
        /// Stretch, 1 or more.
        factor: f64,
        /// Rotations above which a channel is kept; 32 by default.
        beta_fast: f64,
        /// Rotations below which a channel is stretched fully; 1 by default.
        beta_slow: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: usize,
        /// Multiplies cos and sin; `0.1 ln(factor) + 1` by default.
        attention_factor: f64,
        /// Whether the ends of the ramp are rounded outwards to whole channels; true by default.
        truncate: bool,
    },
}

/// Rotary frequencies of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeSpec {
    /// Channels of a head; even.
    pub head_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// Stretching.
    pub scaling: Scaling,
}

impl RopeSpec {
    fn validate(&self) -> Result<()> {
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return check::invalid("rope_table", "head_dim", self.head_dim, "even and positive");
        }
        if !(self.theta > 0.0 && self.theta.is_finite()) {
            return check::invalid("rope_table", "theta", self.theta, "positive and finite");
        }
        let factor = match self.scaling {
            Scaling::Default => 1.0,
            Scaling::Linear { factor } | Scaling::Llama3 { factor, .. } | Scaling::Yarn { factor, .. } => factor,
        };
        if !(factor >= 1.0 && factor.is_finite()) {
            return check::invalid("rope_table", "factor", factor, "1 or more");
        }
        if let Scaling::Llama3 { low_freq_factor, high_freq_factor, .. } = self.scaling
            && !(low_freq_factor > 0.0 && high_freq_factor > low_freq_factor && high_freq_factor.is_finite())
        {
            return check::invalid("rope_table", "high_freq_factor", high_freq_factor, "above low_freq_factor > 0");
        }
        if let Scaling::Yarn { beta_fast, beta_slow, .. } = self.scaling
            && !(beta_slow > 0.0 && beta_fast >= beta_slow && beta_fast.is_finite())
        {
            return check::invalid("rope_table", "beta_fast", beta_fast, "at least beta_slow > 0");
        }
        Ok(())
    }

    /// Angle per position of each of the `head_dim / 2` channel pairs, and the factor on cos and sin.
    ///
    /// # Errors
    /// [`crate::Error::InvalidSpec`] for a field out of its range.
    pub fn frequencies(&self) -> Result<(Vec<f64>, f64)> {
        self.validate()?;
        let base = (0..self.head_dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / self.head_dim as f64));
        Ok(match self.scaling {
            Scaling::Default => (base.collect(), 1.0),
            Scaling::Linear { factor } => (base.map(|f| f / factor).collect(), 1.0),
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = original_max_position_embeddings as f64;
                let adjust = |f: f64| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength < original / high_freq_factor {
                        f
                    } else if wavelength > original / low_freq_factor {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                (base.map(adjust).collect(), 1.0)
            }
            Scaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                attention_factor,
                truncate,
            } => {
                let (dim, original) = (self.head_dim as f64, original_max_position_embeddings as f64);
                // The channel that makes `rotations` turns over the original context.
                let channel = |rotations: f64| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (channel(beta_fast), channel(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                // As transformers: avoids a division by zero when both ends meet.
                let width = if low == high { 0.001 } else { high - low };
                let mix = |(i, f): (usize, f64)| {
                    let stretched = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    f / factor * stretched + f * (1.0 - stretched)
                };
                (base.enumerate().map(mix).collect(), attention_factor)
            }
        })
    }

    /// Tables `cos` and `sin`, f32 `[num_positions, head_dim / 2]`, on the device.
    ///
    /// # Errors
    /// As [`RopeSpec::frequencies`]; [`crate::Error::OutOfMemory`].
    pub fn tables(&self, device: &Device, num_positions: usize) -> Result<(Tensor, Tensor)> {
        let (frequencies, factor) = self.frequencies()?;
        let angles = || (0..num_positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let cos: Vec<f32> = angles().map(|a| (a.cos() * factor) as f32).collect();
        let sin: Vec<f32> = angles().map(|a| (a.sin() * factor) as f32).collect();
        let shape = [num_positions, self.head_dim / 2];
        Ok((device.from_slice(&cos, shape, Category::Weights)?, device.from_slice(&sin, shape, Category::Weights)?))
    }
}
