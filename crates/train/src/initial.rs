//! What weights are before training.

use unsloth_core::rng::Philox;

/// Streams of other purposes have other ids: "init" in ASCII.
const STREAM: u32 = 0x696e_6974;

/// A matrix `[rows, columns]`, row-major, of normal numbers with mean 0 and this standard deviation.
///
/// An element is a function of `seed`, `name` and its place alone: matrices of other names are independent of it, in whatever
/// order they are made.
pub fn normal_matrix(seed: u64, name: &str, [rows, columns]: [usize; 2], std: f32) -> Vec<f32> {
    let stream = Philox::new(seed, STREAM);
    let name = fnv1a(name.as_bytes());
    let mut values = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        for first in (0..columns).step_by(4) {
            let block = stream.normals([name as u32, (name >> 32) as u32, row as u32, (first / 4) as u32]);
            values.extend(block.iter().take(columns - first).map(|value| std * value));
        }
    }
    values
}

/// A matrix `[rows, columns]`, row-major, of numbers that are uniform in `(-bound, bound)`. An element is a function of the
/// stream and its place alone.
pub(crate) fn uniform_matrix(stream: &Philox, [rows, columns]: [usize; 2], bound: f64) -> Vec<f32> {
    let element = |row: usize, column: usize| {
        let uniform = f64::from(stream.uniform(0, row as u32, 0, column as u32));
        ((2.0 * uniform - 1.0) * bound) as f32
    };
    (0..rows).flat_map(|row| (0..columns).map(move |column| element(row, column))).collect()
}

/// A hash that is the same in every build.        Fowler, Noll & Vo, "FNV-1a", 64 bits
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_depends_on_seed_name_and_place_alone() {
        let matrix = normal_matrix(1, "a", [5, 7], 0.5);
        assert_eq!(matrix.len(), 35);
        // Rows are those of a taller matrix; columns those of a wider one.
        assert_eq!(normal_matrix(1, "a", [9, 7], 0.5)[..35], matrix);
        let wide = normal_matrix(1, "a", [5, 11], 0.5);
        assert!(matrix.chunks(7).zip(wide.chunks(11)).all(|(row, wide)| row == &wide[..7]));
        let doubled: Vec<f32> = matrix.iter().map(|value| 2.0 * value).collect();
        assert_eq!(normal_matrix(1, "a", [5, 7], 1.0), doubled);
        for (seed, name) in [(2, "a"), (1 << 32 | 1, "a"), (1, "b"), (1, "")] {
            let other = normal_matrix(seed, name, [5, 7], 0.5);
            assert!(other.iter().zip(&matrix).all(|(other, value)| other != value), "{seed} {name}");
        }
    }

    /// Published values of the hash.
    #[test]
    fn known_hashes() {
        assert_eq!((fnv1a(b""), fnv1a(b"a")), (0xcbf2_9ce4_8422_2325, 0xaf63_dc4c_8601_ec8c));
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
