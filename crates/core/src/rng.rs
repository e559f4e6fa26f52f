//! Counter-based random numbers.                    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10)
//!
//! A number depends only on its key `(seed, op id)` and counter `(optimiser step, global row, position, channel)`, never on
//! what was drawn before: recomputation, resume and other splits of a batch need no saved generator state.

/// A stream of random numbers for one operator of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    /// The stream of `op_id` in the run with this seed. Both seed halves and the op id enter the key.
    pub fn new(seed: u64, op_id: u32) -> Self {
        let low = seed as u32;
        let high = (seed >> 32) as u32;
        // The key has 64 bits: the op id is spread by an odd constant so that neighbouring ids and seeds do not collide.
        Self { key: [low, high ^ op_id.wrapping_mul(0x9E37_79B9)] }
    }

    /// The two words that stand for seed and op id, for a device that draws by itself.
    pub fn key(&self) -> [u32; 2] {
        self.key
    }

    /// Four independent words for a counter.
    pub fn block(&self, counter: [u32; 4]) -> [u32; 4] {
        let [c0, c1, c2, c3] = counter;
        self.blocks::<1>([c0, c1, c2], c3).map(|[word]| word)
    }

    /// The blocks of `N` counters that begin with the same three words and end with `last`, `last + 1`, ..: word `w` of block
    /// `i` is `[w][i]`. One after another in memory, so that the compiler can compute them side by side.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "the loop over blocks is the one to be computed side by side")]
    pub fn blocks<const N: usize>(&self, first: [u32; 3], last: u32) -> [[u32; N]; 4] {
        const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
        const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
        let mut c = [[first[0]; N], [first[1]; N], [first[2]; N], std::array::from_fn(|i| last.wrapping_add(i as u32))];
        let mut k = self.key;
        for _ in 0..10 {
            for i in 0..N {
                let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c[0][i]);
                let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c[2][i]);
                let (high0, high1) = ((p0 >> 32) as u32 ^ c[3][i] ^ k[1], (p1 >> 32) as u32 ^ c[1][i] ^ k[0]);
                (c[0][i], c[1][i], c[2][i], c[3][i]) = (high1, p1 as u32, high0, p0 as u32);
            }
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        c
    }

    /// Uniform in `[0, 1)` with 24 random bits, for a counter whose last word is `channel / 4`; `channel % 4` picks the word.
    pub fn uniform(&self, step: u32, row: u32, position: u32, channel: u32) -> f32 {
        let word = self.block([step, row, position, channel / 4])[(channel % 4) as usize];
        (word >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Four independent normal numbers of mean 0 and variance 1 for a counter, at most 6.7 from 0.
    ///
    /// Each pair of words is a point by its radius and its angle.        Box & Muller 1958, doi:10.1214/aoms/1177706645
    pub fn normals(&self, counter: [u32; 4]) -> [f32; 4] {
        let words = self.block(counter).map(f64::from);
        let point = |radius: f64, angle: f64| {
            // In (0, 1], so that the logarithm is finite.
            let radius = (-2.0 * ((radius + 1.0) / 4_294_967_296.0).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * angle / 4_294_967_296.0).sin_cos();
            ((radius * cos) as f32, (radius * sin) as f32)
        };
        let ((a, b), (c, d)) = (point(words[0], words[1]), point(words[2], words[3]));
        [a, b, c, d]
    }

    /// Uniform integer in `0 .. bound` by the multiply-shift method; the bias is below `bound / 2^32`.
    ///
    /// # Panics
    /// If `bound` is 0.
    pub fn below(&self, counter: [u32; 4], bound: u32) -> u32 {
        assert!(bound > 0, "a random integer needs a non-empty range");
        ((u64::from(self.block(counter)[0]) * u64::from(bound)) >> 32) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::Philox;

    /// Known-answer vectors of the reference implementation (Random123, `kat_vectors`, philox4x32 10).
    #[test]
    fn known_answers() {
        let zero = Philox { key: [0, 0] };
        assert_eq!(zero.block([0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = Philox { key: [u32::MAX; 2] };
        assert_eq!(ones.block([u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = Philox { key: [0xa409_3822, 0x299f_31d0] };
        assert_eq!(
            pi.block([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn blocks_side_by_side_are_those_one_by_one() {
        let stream = Philox::new(u64::MAX - 5, 77);
        let together = stream.blocks::<7>([1, 2, 3], u32::MAX - 2);
        for i in 0..7u32 {
            let block = stream.block([1, 2, 3, (u32::MAX - 2).wrapping_add(i)]);
            assert_eq!(together.map(|words| words[i as usize]), block);
        }
    }

    #[test]
    fn normals_have_the_moments_of_their_distribution() {
        let stream = Philox::new(7, 3);
        let values: Vec<f64> = (0..25_000).flat_map(|i| stream.normals([0, 0, 0, i])).map(f64::from).collect();
        let moment = |power: i32| values.iter().map(|v| v.powi(power)).sum::<f64>() / values.len() as f64;
        // Five standard errors of the mean of 100 000 powers: their variances are 1, 2, 15 and 96.
        for (power, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0f64)] {
            let limit = 5.0 * (variance / values.len() as f64).sqrt();
            let actual = moment(power);
            assert!((actual - expected).abs() <= limit, "moment {power}: {actual}");
        }
        // Neighbours, which are the two coordinates of a point, do not go together.
        let products = values.chunks(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / (values.len() / 2) as f64;
        assert!(products.abs() <= 5.0 / ((values.len() / 2) as f64).sqrt(), "covariance {products}");
        // The hand-worked first pair of the counter of zeros under a key of zeros: words 0x6627e8d5 and 0xe169c58d.
        let zero = Philox { key: [0, 0] }.normals([0; 4]);
        let (u, v) = (f64::from(0x6627_e8d6u32) / 4_294_967_296.0, f64::from(0xe169_c58du32) / 4_294_967_296.0);
        let expected = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
        assert!((f64::from(zero[0]) - expected).abs() <= 1e-6, "{zero:?}");
    }

    #[test]
    fn uniform_is_in_range_and_spread() {
        let stream = Philox::new(7, 3);
        let values: Vec<f32> = (0..10_000).map(|i| stream.uniform(0, 0, 0, i)).collect();
        assert!(values.iter().all(|v| (0.0..1.0).contains(v)));
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        assert!((mean - 0.5).abs() < 0.02, "mean {mean}");
    }
}
