//! The formulas of [`unsloth_core::ops::attention`], one row of scores at a time.

use std::ops::Range;

use unsloth_core::ops::attention::{Options, Window};

use crate::arith::{Arith, Exact};

/// Heads, masks and sequence boundaries of one attention.
#[derive(Clone, Debug)]
pub struct Problem {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Scale and masks.
    pub options: Options,
    /// Length of each query sequence.
    pub lens_q: Vec<usize>,
    /// Length of each key sequence, as many as of the queries.
    pub lens_k: Vec<usize>,
}

/// Values of the inputs.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[tokens_q, num_heads, head_dim]`
    pub q: &'a [f64],
    /// `[tokens_k, num_kv_heads, head_dim]`
    pub k: &'a [f64],
    /// `[tokens_k, num_kv_heads, head_dim]`
    pub v: &'a [f64],
}

/// Values of the forward results.
#[derive(Clone, Debug)]
pub struct Forward {
    /// `[tokens_q, num_heads, head_dim]`
    pub out: Vec<f64>,
    /// `[num_heads, tokens_q]`
    pub lse: Vec<f64>,
}

/// Values of the gradients.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// `[tokens_q, num_heads, head_dim]`
    pub dq: Vec<f64>,
    /// `[tokens_k, num_kv_heads, head_dim]`
    pub dk: Vec<f64>,
    /// `[tokens_k, num_kv_heads, head_dim]`
    pub dv: Vec<f64>,
}

/// One query row of one head: where its channels start, and the keys of its sequence.
struct Row {
    /// Token and head of the query.
    query: (usize, usize),
    /// Position of the query among the keys, negative before the first one.
    position: isize,
    /// Tokens of the keys.
    keys: Range<usize>,
}

impl Problem {
    /// Tokens over all query sequences.
    pub fn tokens_q(&self) -> usize {
        self.lens_q.iter().sum()
    }

    /// Tokens over all key sequences.
    pub fn tokens_k(&self) -> usize {
        self.lens_k.iter().sum()
    }

    fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Channels of one head of one query token.
    fn q<'a>(&self, values: &'a [f64], token: usize, head: usize) -> &'a [f64] {
        let start = (token * self.num_heads + head) * self.head_dim;
        &values[start..start + self.head_dim]
    }

    /// Channels of one head of one key token.
    fn kv<'a>(&self, values: &'a [f64], token: usize, kv_head: usize) -> &'a [f64] {
        let start = (token * self.num_kv_heads + kv_head) * self.head_dim;
        &values[start..start + self.head_dim]
    }

    /// Query and key tokens of each sequence.
    fn sequences(&self) -> Vec<(Range<usize>, Range<usize>)> {
        let (mut q, mut k) = (0, 0);
        let mut all = Vec::new();
        for (&len_q, &len_k) in self.lens_q.iter().zip(&self.lens_k) {
            all.push((q..q + len_q, k..k + len_k));
            (q, k) = (q + len_q, k + len_k);
        }
        all
    }

    fn row(&self, queries: &Range<usize>, keys: &Range<usize>, token: usize, head: usize) -> Row {
        let position = (token - queries.start + keys.len()) as isize - queries.len() as isize;
        Row { query: (token, head), position, keys: keys.clone() }
    }

    /// Whether a query at `position` sees key `j` of its sequence.
    fn sees(&self, position: isize, j: isize) -> bool {
        let not_after = !self.options.causal || j <= position;
        let not_before = match self.options.window {
            Window::Full => true,
            Window::Sliding { left } => j >= position.saturating_sub_unsigned(left),
        };
        not_after && not_before
    }

    /// `s` of one row, `-inf` where masked.
    fn scores(&self, a: &impl Arith, x: Inputs<'_>, row: &Row) -> Vec<f64> {
        let (token, head) = row.query;
        let q = self.q(x.q, token, head);
        let score = |(j, key): (usize, usize)| {
            if !self.sees(row.position, j as isize) {
                return f64::NEG_INFINITY;
            }
            let k = self.kv(x.k, key, head / self.group());
            let s = a.store(f64::from(self.options.scale) * a.sum(q.iter().zip(k).map(|(q, k)| q * k)));
            self.options.softcap.map_or(s, |c| a.store(f64::from(c) * (s / f64::from(c)).tanh()))
        };
        row.keys.clone().enumerate().map(score).collect()
    }
}

/// `ln sum exp` of a row, `-inf` when all of it is masked.
fn log_sum_exp(a: &impl Arith, scores: &[f64]) -> f64 {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return max;
    }
    a.stat(max + a.sum(scores.iter().map(|s| (s - max).exp())).ln())
}

/// `exp(s - lse)`; zeros for a fully masked row, where the difference is NaN.
fn probabilities(a: &impl Arith, scores: &[f64], lse: f64) -> Vec<f64> {
    if lse == f64::NEG_INFINITY {
        return vec![0.0; scores.len()];
    }
    scores.iter().map(|s| a.store((s - lse).exp())).collect()
}

/// `out` and `lse`.
pub fn forward(a: &impl Arith, problem: &Problem, x: Inputs<'_>) -> Forward {
    let (tokens_q, head_dim) = (problem.tokens_q(), problem.head_dim);
    let mut out = vec![0.0; tokens_q * problem.num_heads * head_dim];
    let mut lse = vec![0.0; problem.num_heads * tokens_q];
    for (queries, keys) in problem.sequences() {
        for token in queries.clone() {
            for head in 0..problem.num_heads {
                let row = problem.row(&queries, &keys, token, head);
                let scores = problem.scores(a, x, &row);
                let row_lse = log_sum_exp(a, &scores);
                let p = probabilities(a, &scores, row_lse);
                lse[head * tokens_q + token] = row_lse;
                for c in 0..head_dim {
                    let values = keys.clone().map(|key| problem.kv(x.v, key, head / problem.group())[c]);
                    out[(token * problem.num_heads + head) * head_dim + c] =
                        a.store(a.sum(p.iter().zip(values).map(|(p, v)| p * v)));
                }
            }
        }
    }
    Forward { out, lse }
}

/// `P` and `ds` of one row.
fn row_gradients(
    a: &impl Arith,
    problem: &Problem,
    x: Inputs<'_>,
    (row, dout, forward): (&Row, &[f64], &Forward),
) -> (Vec<f64>, Vec<f64>) {
    let (token, head) = row.query;
    let scores = problem.scores(a, x, row);
    let p = probabilities(a, &scores, forward.lse[head * problem.tokens_q() + token]);
    let (dout, out) = (problem.q(dout, token, head), problem.q(&forward.out, token, head));
    let d = a.stat(a.sum(dout.iter().zip(out).map(|(dout, out)| dout * out)));
    let ds = row.keys.clone().zip(p.iter().zip(&scores)).map(|(key, (p, s))| {
        if *s == f64::NEG_INFINITY {
            return 0.0;
        }
        let v = problem.kv(x.v, key, head / problem.group());
        let dp = a.store(a.sum(dout.iter().zip(v).map(|(dout, v)| dout * v)));
        let ds = a.store(p * (dp - d));
        problem.options.softcap.map_or(ds, |c| a.store(ds * (1.0 - (s / f64::from(c)).powi(2))))
    });
    let ds = ds.collect();
    (p, ds)
}

/// `dq`, `dk`, `dv`, given `dout` and the results of [`forward`].
pub fn backward(a: &impl Arith, problem: &Problem, x: Inputs<'_>, dout: &[f64], forward: &Forward) -> Gradients {
    let (head_dim, group) = (problem.head_dim, problem.group());
    let scale = f64::from(problem.options.scale);
    let mut gradients = Gradients { dq: vec![0.0; x.q.len()], dk: vec![0.0; x.k.len()], dv: vec![0.0; x.v.len()] };
    for (queries, keys) in problem.sequences() {
        for kv_head in 0..problem.num_kv_heads {
            // Every (query, head) that reads this key head, with its `P` and `ds`.
            let mut readers = Vec::new();
            for head in kv_head * group..(kv_head + 1) * group {
                for token in queries.clone() {
                    let row = problem.row(&queries, &keys, token, head);
                    let (p, ds) = row_gradients(a, problem, x, (&row, dout, forward));
                    readers.push((token, head, p, ds));
                }
            }
            for (token, head, _, ds) in &readers {
                for c in 0..head_dim {
                    let k = keys.clone().map(|key| problem.kv(x.k, key, kv_head)[c]);
                    gradients.dq[(token * problem.num_heads + head) * head_dim + c] =
                        a.store(scale * a.sum(ds.iter().zip(k).map(|(ds, k)| ds * k)));
                }
            }
            for (j, key) in keys.clone().enumerate() {
                for c in 0..head_dim {
                    let at = (key * problem.num_kv_heads + kv_head) * head_dim + c;
                    let dk = readers.iter().map(|(token, head, _, ds)| ds[j] * problem.q(x.q, *token, *head)[c]);
                    let dv = readers.iter().map(|(token, head, p, _)| p[j] * problem.q(dout, *token, *head)[c]);
                    gradients.dk[at] = a.store(scale * a.sum(dk));
                    gradients.dv[at] = a.store(a.sum(dv));
                }
            }
        }
    }
    gradients
}

/// How large the terms are that cancel in each result: what roundings are measured against.
#[derive(Clone, Copy, Debug, Default)]
pub struct Magnitudes {
    /// Largest sum of magnitudes of the products in a score, scaled.
    pub score: f64,
    /// Largest value.
    pub out: f64,
    /// Largest sum of magnitudes of the terms of an element of `dq`.
    pub dq: f64,
    /// Largest sum of magnitudes of the terms of an element of `dk`.
    pub dk: f64,
    /// Largest sum of magnitudes of the terms of an element of `dv`.
    pub dv: f64,
}

fn dot_of_magnitudes(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most, value| value.abs().max(most))
}

/// Magnitudes of the terms of every result, given the exact results of [`forward`].
pub fn magnitudes(problem: &Problem, x: Inputs<'_>, dout: &[f64], forward: &Forward) -> Magnitudes {
    let (head_dim, scale) = (problem.head_dim, f64::from(problem.options.scale.abs()));
    let (mut dk, mut dv) = (vec![0.0; x.k.len()], vec![0.0; x.v.len()]);
    let mut most = Magnitudes { out: largest(x.v), ..Magnitudes::default() };
    for (queries, keys) in problem.sequences() {
        for (token, head) in queries.clone().flat_map(|token| (0..problem.num_heads).map(move |head| (token, head))) {
            let row = problem.row(&queries, &keys, token, head);
            let scores = problem.scores(&Exact, x, &row);
            let p = probabilities(&Exact, &scores, forward.lse[head * problem.tokens_q() + token]);
            let (q, dout) = (problem.q(x.q, token, head), problem.q(dout, token, head));
            let d = dot_of_magnitudes(dout, problem.q(&forward.out, token, head));
            let mut dq = vec![0.0; head_dim];
            for (key, p) in keys.clone().zip(p) {
                let at = (key * problem.num_kv_heads + head / problem.group()) * head_dim;
                let (k, v) = (&x.k[at..at + head_dim], &x.v[at..at + head_dim]);
                let ds = p * (dot_of_magnitudes(dout, v) + d);
                most.score = most.score.max(scale * dot_of_magnitudes(q, k));
                for c in 0..head_dim {
                    dq[c] += scale * ds * k[c].abs();
                    dk[at + c] += scale * ds * q[c].abs();
                    dv[at + c] += p * dout[c].abs();
                }
            }
            most.dq = most.dq.max(largest(&dq));
        }
    }
    Magnitudes { dk: largest(&dk), dv: largest(&dv), ..most }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unsloth_testkit::{
        data::Data,
        gradcheck::{self, dot},
    };

    /// `((i * a + b) mod 17 - 8) / 8`: inputs that PyTorch and this file write the same way.
    fn pattern(count: usize, a: usize, b: usize) -> Vec<f64> {
        (0..count).map(|i| ((i * a + b) % 17) as f64 / 8.0 - 1.0).collect()
    }

    fn close(name: &str, actual: &[f64], golden: &[f64], tolerance: f64) {
        assert_eq!(actual.len(), golden.len(), "{name}");
        for (i, (a, g)) in actual.iter().zip(golden).enumerate() {
            assert!((a - g).abs() <= tolerance, "{name}[{i}]: {a}, expected {g}");
        }
    }

    /// One head of one channel, scale 1, two tokens: `q = (0, ln 3)`, `k = (0, 1)`, `v = (4, 8)`, `dout = (1, 2)`.
    /// - Row 0 sees key 0 only: `s = 0`, `lse = ln 1 = 0`, `P = 1`, `out = 4`.
    /// - Row 1: `s = (0, ln 3)`, `lse = ln(1 + 3) = ln 4`, `P = (1/4, 3/4)`, `out = 4/4 + 3 * 8/4 = 7`.
    /// - Row 0: `D = 1 * 4`, `dP = 4`, `ds = 0`. Row 1: `D = 2 * 7 = 14`, `dP = (8, 16)`, `ds = (-6/4, 3 * 2/4) = (-1.5, 1.5)`.
    /// - `dq = (0, -1.5 * 0 + 1.5 * 1)`, `dk = (-1.5, 1.5) * ln 3`, `dv = (1 * 1 + 2 * 1/4, 2 * 3/4) = (1.5, 1.5)`.
    #[test]
    fn worked_by_hand() {
        let options = Options { scale: 1.0, causal: true, window: Window::Full, softcap: None };
        let problem = Problem { num_heads: 1, num_kv_heads: 1, head_dim: 1, options, lens_q: vec![2], lens_k: vec![2] };
        let ln3 = 3f64.ln();
        let x = Inputs { q: &[0.0, ln3], k: &[0.0, 1.0], v: &[4.0, 8.0] };
        let results = forward(&Exact, &problem, x);
        close("out", &results.out, &[4.0, 7.0], 1e-14);
        close("lse", &results.lse, &[0.0, 4f64.ln()], 1e-14);
        let gradients = backward(&Exact, &problem, x, &[1.0, 2.0], &results);
        close("dq", &gradients.dq, &[0.0, 1.5], 1e-14);
        close("dk", &gradients.dk, &[-1.5 * ln3, 1.5 * ln3], 1e-14);
        close("dv", &gradients.dv, &[1.5, 1.5], 1e-14);
    }

    /// Which keys each query sees. Three queries over five keys stand at positions 2, 3 and 4; five queries over three keys
    /// at -2 to 2, so that the first two see nothing.
    #[test]
    fn masks() {
        let seen = |options: Options, len_q: usize, len_k: usize| -> Vec<String> {
            let problem = Problem {
                num_heads: 1,
                num_kv_heads: 1,
                head_dim: 1,
                options,
                lens_q: vec![len_q],
                lens_k: vec![len_k],
            };
            let (zeros_q, zeros_k) = (vec![0.0; len_q], vec![0.0; len_k]);
            let x = Inputs { q: &zeros_q, k: &zeros_k, v: &zeros_k };
            let row = |i| problem.scores(&Exact, x, &problem.row(&(0..len_q), &(0..len_k), i, 0));
            let mark = |s: &f64| if *s == 0.0 { 'x' } else { '.' };
            (0..len_q).map(|i| row(i).iter().map(mark).collect()).collect()
        };
        let causal = Options { scale: 1.0, causal: true, window: Window::Full, softcap: None };
        let window = Options { window: Window::Sliding { left: 1 }, ..causal };
        assert_eq!(seen(causal, 3, 5), ["xxx..", "xxxx.", "xxxxx"]);
        assert_eq!(seen(causal, 5, 3), ["...", "...", "x..", "xx.", "xxx"]);
        assert_eq!(seen(window, 3, 5), [".xx..", "..xx.", "...xx"]);
        assert_eq!(seen(Options { causal: false, ..window }, 3, 5), [".xxxx", "..xxx", "...xx"]);
        assert_eq!(seen(Options { window: Window::Sliding { left: 0 }, ..causal }, 2, 2), ["x.", ".x"]);
        assert_eq!(seen(Options { window: Window::Sliding { left: usize::MAX }, ..causal }, 2, 2), ["x.", "xx"]);
    }

    /// `torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)` of PyTorch 2.15 in f64,
    /// two query heads on one key head, four tokens, three channels; gradients by autograd, `lse` by `torch.logsumexp`.
    #[test]
    fn equals_pytorch() {
        let options = Options { scale: 1.0 / 3f32.sqrt(), causal: true, window: Window::Full, softcap: None };
        let problem = Problem { num_heads: 2, num_kv_heads: 1, head_dim: 3, options, lens_q: vec![4], lens_k: vec![4] };
        let (q, k, v) = (pattern(24, 5, 3), pattern(12, 7, 1), pattern(12, 3, 11));
        let x = Inputs { q: &q, k: &k, v: &v };
        let results = forward(&Exact, &problem, x);
        let gradients = backward(&Exact, &problem, x, &pattern(24, 11, 2), &results);
        // The scale is an f32, PyTorch's is an f64.
        let tolerance = 2e-7;
        close("out", &results.out, &GOLDEN_OUT, tolerance);
        close("lse", &results.lse, &GOLDEN_LSE, tolerance);
        close("dq", &gradients.dq, &GOLDEN_DQ, tolerance);
        close("dk", &gradients.dk, &GOLDEN_DK, tolerance);
        close("dv", &gradients.dv, &GOLDEN_DV, tolerance);
    }

    #[test]
    fn gradients_equal_central_differences() {
        let plain = Options { scale: 0.6, causal: false, window: Window::Full, softcap: None };
        let causal = Options { causal: true, ..plain };
        let all = [
            plain,
            causal,
            Options { softcap: Some(1.5), ..causal },
            Options { window: Window::Sliding { left: 1 }, ..causal },
            Options { window: Window::Sliding { left: 2 }, softcap: Some(3.0), ..plain },
        ];
        for (seed, options) in all.into_iter().enumerate() {
            let lens = (vec![3, 4, 2, 1], vec![3, 2, 5, 0]);
            let problem =
                Problem { num_heads: 4, num_kv_heads: 2, head_dim: 3, options, lens_q: lens.0, lens_k: lens.1 };
            let mut data = Data::new(seed as u64);
            let mut draw = |tokens: usize, heads: usize| data.normal(tokens * heads * 3, 1.0, unsloth_core::DType::F32);
            let (q, dout, k, v) = (draw(10, 4), draw(10, 4), draw(10, 2), draw(10, 2));
            let x = Inputs { q: &q, k: &k, v: &v };
            let gradients = backward(&Exact, &problem, x, &dout, &forward(&Exact, &problem, x));
            let loss = |x: Inputs<'_>| dot(&forward(&Exact, &problem, x).out, &dout);
            gradcheck::check("q", &q, |q| loss(Inputs { q, ..x }), &gradients.dq).unwrap();
            gradcheck::check("k", &k, |k| loss(Inputs { k, ..x }), &gradients.dk).unwrap();
            gradcheck::check("v", &v, |v| loss(Inputs { v, ..x }), &gradients.dv).unwrap();
        }
    }

    const GOLDEN_OUT: [f64; 24] = [
        0.375000000000,
        0.750000000000,
        -1.000000000000,
        0.375000000000,
        0.750000000000,
        -1.000000000000,
        -0.131765410544,
        0.243234589456,
        -0.429888913138,
        -0.154285012361,
        0.220714987639,
        -0.404554361094,
        0.026309968527,
        0.401309968527,
        -0.528040067778,
        0.040437663928,
        0.415437663928,
        -0.503621881426,
        -0.082626674628,
        0.292373325372,
        -0.354076439687,
        0.063869138912,
        0.438869138912,
        -0.536296975840,
    ];
    const GOLDEN_DQ: [f64; 24] = [
        0.000000000000,
        0.000000000000,
        0.000000000000,
        0.000000000000,
        0.000000000000,
        0.000000000000,
        0.014656600311,
        0.014656600311,
        -0.047633951011,
        -0.130357197482,
        -0.130357197482,
        0.423660891817,
        0.001487538783,
        0.001487538783,
        0.249313907828,
        0.052986418614,
        0.052986418614,
        0.173196619582,
        -0.020257188411,
        0.114446584877,
        0.112300011550,
        -0.140902536797,
        0.086090829439,
        0.129433473289,
    ];
    const GOLDEN_DK: [f64; 12] = [
        0.206872822539,
        -0.161311285060,
        -0.042708886567,
        -0.319249964055,
        0.103314197597,
        0.311513846863,
        0.085672039606,
        0.137673497177,
        -0.217450812245,
        0.026705101910,
        -0.079676409715,
        -0.051354148051,
    ];
    const GOLDEN_DV: [f64; 12] = [
        -0.966492568853,
        1.348128078190,
        -1.635374777361,
        0.967751651590,
        0.283058517298,
        -1.478511114400,
        0.930897720599,
        -0.062688240132,
        -1.056274200863,
        0.192843196664,
        -0.068498355356,
        -0.329839907376,
    ];
    const GOLDEN_LSE: [f64; 8] = [
        0.631476856926,
        0.264736577586,
        0.716881869561,
        1.552496601562,
        0.631476856926,
        0.311468690063,
        1.408066037846,
        1.530593578687,
    ];
}
