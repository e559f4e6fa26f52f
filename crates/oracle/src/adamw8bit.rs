//! Reference of [`unsloth_core::ops::adamw8bit`]: what codes stand for, and how far the nearest one may be.

use unsloth_core::ops::adamw8bit::{BLOCK_SIZE, CODES, signed_map, unsigned_map};

/// One of the two moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The first, which has a sign.
    First,
    /// The second, which has none.
    Second,
}

impl Which {
    fn map(self) -> [f64; 256] {
        match self {
            Which::First => signed_map().map(f64::from),
            Which::Second => unsigned_map().map(f64::from),
        }
    }

    /// What the codes of `len` elements stand for.
    pub fn decode(self, codes: &[i32], absmax: &[f64], len: usize) -> Vec<f64> {
        let map = self.map();
        let code = |i: usize| (codes[i / CODES] as u32 >> (8 * (i % CODES))) & 0xFF;
        (0..len).map(|i| map[code(i) as usize] * absmax[i / BLOCK_SIZE]).collect()
    }

    /// For each element of a moment, how far the nearest code is from it where its block has this `absmax`.
    pub fn nearest(self, moment: &[f64], absmax: &[f64]) -> Vec<f64> {
        let map = self.map();
        let distance = |(i, value): (usize, &f64)| {
            map.iter().map(|code| (code * absmax[i / BLOCK_SIZE] - value).abs()).fold(f64::INFINITY, f64::min)
        };
        moment.iter().enumerate().map(distance).collect()
    }
}

/// Largest magnitude of each block.
pub fn absmax(moment: &[f64]) -> Vec<f64> {
    moment
        .chunks(BLOCK_SIZE)
        .map(|block| block.iter().fold(0.0, |largest: f64, value| largest.max(value.abs())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Code 255 is 1 in both maps; 0 is the lowest: -(1 - 0.45 / 64) and 0.
    #[test]
    fn by_hand() {
        let codes = [i32::from_le_bytes([255, 0, 127, 255])];
        let first = Which::First.decode(&codes, &[2.0], 4);
        assert!((first[1] + 2.0 * (1.0 - 0.45 / 64.0)).abs() < 1e-6);
        assert_eq!([first[0], first[2], first[3]], [2.0, 0.0, 2.0]);
        assert_eq!(Which::Second.decode(&codes, &[2.0], 2), [2.0, 0.0]);
        assert_eq!(absmax(&[1.0, -3.0]), [3.0]);
        let far = Which::First.nearest(&[-3.0], &[3.0]);
        assert!((far[0] - 3.0 * 0.45 / 64.0).abs() < 1e-6);
    }
}
