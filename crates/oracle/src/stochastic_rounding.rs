//! Reference of [`unsloth_core::ops::stochastic_rounding`].

use unsloth_core::ops::stochastic_rounding::Spec;

/// The 16 random bits of an element as a number in `[0, 1)`.
fn draw(spec: &Spec, i: usize) -> f64 {
    let group = (i / 8) as u64;
    let words = spec.stream.block([spec.step, spec.tensor, (group >> 32) as u32, group as u32]);
    let word = words[i % 8 / 2];
    let bits = if i.is_multiple_of(2) { word % 65_536 } else { word / 65_536 };
    f64::from(bits) / 65_536.0
}

/// Distance of two neighbours in bf16 around a magnitude: 2^-7 of its power of two, and 2^-133 below the normal numbers.
fn spacing(magnitude: f64) -> f64 {
    let exponent = if magnitude == 0.0 { -126 } else { (magnitude.log2().floor() as i32).max(-126) };
    2f64.powi(exponent - 7)
}

/// Rounds each element, which is finite.
pub fn round(spec: &Spec, x: &[f64]) -> Vec<f64> {
    let round = |(i, &x): (usize, &f64)| {
        let step = spacing(x.abs());
        let below = (x.abs() / step).floor();
        let share = x.abs() / step - below;
        let steps = if share + draw(spec, i) >= 1.0 { below + 1.0 } else { below };
        x.signum() * steps * step
    };
    x.iter().enumerate().map(round).collect()
}

#[cfg(test)]
mod tests {
    use unsloth_core::rng::Philox;

    use super::*;

    /// Above 1 neighbours are 1 / 128 apart; what lies on one stays.
    #[test]
    fn by_hand() {
        let spec = Spec { stream: Philox::new(1, 2), step: 3, tensor: 4 };
        let x = 1.0 + 0.25 / 128.0;
        let rounded: Vec<f64> = round(&spec, &vec![x; 4000]);
        let up = rounded.iter().filter(|value| **value == 1.0 + 1.0 / 128.0).count();
        assert_eq!(up + rounded.iter().filter(|value| **value == 1.0).count(), 4000);
        // Five standard deviations of 4000 draws with probability a quarter.
        assert!((up as f64 - 1000.0).abs() < 5.0 * (4000.0f64 * 0.25 * 0.75).sqrt(), "{up}");
        assert_eq!(round(&spec, &[1.0, -1.5, 0.0, 384.0]), [1.0, -1.5, 0.0, 384.0]);
    }
}
