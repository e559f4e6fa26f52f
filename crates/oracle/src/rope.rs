//! Reference of [`unsloth_core::ops::rope`].

use unsloth_core::ops::rope::{Direction, Layout};

use crate::arith::Arith;

/// Angles of each token, and what to do with them.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// `[num_positions, head_dim / 2]`
    pub cos: &'a [f64],
    /// `[num_positions, head_dim / 2]`
    pub sin: &'a [f64],
    /// `[tokens]`
    pub positions: &'a [i32],
    /// Channels of a head.
    pub head_dim: usize,
    /// Pairing of channels.
    pub layout: Layout,
    /// Embedding or gradient.
    pub direction: Direction,
}

/// Rotates `x`, `[tokens, heads, head_dim]`.
pub fn rotate<A: Arith>(arith: &A, x: &[f64], rotation: Rotation<'_>) -> Vec<f64> {
    let Rotation { cos, sin, positions, head_dim, layout, direction } = rotation;
    let half = head_dim / 2;
    let heads = if positions.is_empty() { 0 } else { x.len() / positions.len() / head_dim };
    let mut out = vec![0.0; x.len()];
    for (token, &position) in positions.iter().enumerate() {
        for head in 0..heads {
            let at = (token * heads + head) * head_dim;
            for i in 0..half {
                let (first, second) = match layout {
                    Layout::Half => (at + i, at + i + half),
                    Layout::Interleaved => (at + 2 * i, at + 2 * i + 1),
                };
                let c = cos[position as usize * half + i];
                let s = match direction {
                    Direction::Forward => sin[position as usize * half + i],
                    Direction::Inverse => -sin[position as usize * half + i],
                };
                let (a, b) = (x[first], x[second]);
                out[first] = arith.store(arith.store(a * c) - arith.store(b * s));
                out[second] = arith.store(arith.store(b * c) + arith.store(a * s));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use unsloth_core::DType;

    use super::*;
    use unsloth_testkit::{
        data::Data,
        gradcheck::{self, dot},
    };

    use crate::arith::Exact;

    /// A quarter turn takes (1, 0) to (0, 1): channels 0 and 2 in halves, 0 and 1 interleaved. The other pair stays.
    #[test]
    fn by_hand() {
        let rotation = |layout| Rotation {
            cos: &[0.0, 1.0],
            sin: &[1.0, 0.0],
            positions: &[0],
            head_dim: 4,
            layout,
            direction: Direction::Forward,
        };
        assert_eq!(rotate(&Exact, &[1.0, 2.0, 0.0, 3.0], rotation(Layout::Half)), [0.0, 2.0, 1.0, 3.0]);
        assert_eq!(rotate(&Exact, &[1.0, 0.0, 2.0, 3.0], rotation(Layout::Interleaved)), [0.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn gradient() {
        let mut data = Data::new(3);
        let mut draw = |count| data.normal(count, 1.0, DType::F32);
        // Tables that are no rotation at all, so that an inverse that relies on cos^2 + sin^2 = 1 would show (YaRN scales).
        let (cos, sin, x, dout) = (draw(6), draw(6), draw(24), draw(24));
        for layout in [Layout::Half, Layout::Interleaved] {
            let rotation =
                |direction| Rotation { cos: &cos, sin: &sin, positions: &[2, 0, 2], head_dim: 4, layout, direction };
            let loss = |x: &[f64]| dot(&rotate(&Exact, x, rotation(Direction::Forward)), &dout);
            gradcheck::check("dx", &x, loss, &rotate(&Exact, &dout, rotation(Direction::Inverse))).unwrap();
        }
    }
}
