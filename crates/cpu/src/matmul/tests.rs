use half::{bf16, f16};
use unsloth_core::Device;

use super::*;
use crate::CpuOptions;

fn backend(isa: Isa, num_threads: usize) -> CpuBackend {
    let options = CpuOptions { isa: Some(isa), num_threads: Some(num_threads), ..CpuOptions::default() };
    CpuBackend::new(CpuOptions { fill_arbitrary_with_nan: true, ..options }).unwrap()
}

/// Small integers: every order of summation is exact, and every type holds them.
fn values(len: usize, modulus: usize) -> Vec<f32> {
    (0..len).map(|i| (i % modulus) as f32 - (modulus / 2) as f32).collect()
}

/// The same values in each float type.
struct Typed(Vec<f32>, Vec<f16>, Vec<bf16>);

impl Typed {
    fn new(values: Vec<f32>) -> Self {
        let half = values.iter().map(|&x| f16::from_f32(x)).collect();
        let bfloat = values.iter().map(|&x| bf16::from_f32(x)).collect();
        Self(values, half, bfloat)
    }

    fn elements(&self, dtype: DType) -> Elements<'_> {
        match dtype {
            DType::F32 => Elements::F32(&self.0),
            DType::F16 => Elements::F16(&self.1),
            _ => Elements::BF16(&self.2),
        }
    }

    /// `[lines, depth]`, stored as it is or as its transpose, rows three elements longer than needed.
    fn mat(&self, dtype: DType, (lines, depth): (usize, usize), transposed: bool) -> Mat<'_> {
        match transposed {
            true => Mat::new(self.elements(dtype), depth, lines, lines + 3).t(),
            false => Mat::new(self.elements(dtype), lines, depth, depth + 3),
        }
    }
}

fn exact(left: Mat<'_>, right: Mat<'_>) -> Vec<f32> {
    let at = |mat: &Mat<'_>, i: usize, j: usize| {
        let mut value = [0.0];
        let index = i * mat.row_stride + j * mat.col_stride;
        mat.data.slice(index..index + 1).add_to(&mut value);
        value[0]
    };
    let dot = |i, j| (0..left.cols).map(|k| at(&left, i, k) * at(&right, j, k)).sum();
    (0..left.rows).flat_map(|i| (0..right.rows).map(move |j| (i, j))).map(|(i, j)| dot(i, j)).collect()
}

/// Every remainder of tiles, panels, strips and blocks, in every layout and pair of types, on every path.
#[test]
fn products_equal_plain_loops() {
    let sizes = [
        (1, 1, 1),
        (1, 6, 40),
        (2, 50, 70),
        (5, 3, 2 * DEPTH + 9),
        (8, 48, 256),
        (9, 47, 257),
        (105, 25, 3),
        (17, 500, 33),
        (530, 7, 9),
        (13, 70, DEPTH + 1),
    ];
    for (m, n, k) in sizes {
        let (left, right) = (Typed::new(values((m + 3) * (k + 3), 7)), Typed::new(values((n + 3) * (k + 3), 5)));
        for transposed in [(false, false), (false, true), (true, false), (true, true)] {
            let mats = |types: (DType, DType)| {
                (left.mat(types.0, (m, k), transposed.0), right.mat(types.1, (n, k), transposed.1))
            };
            let (wide_left, wide_right) = mats((DType::F32, DType::F32));
            let expected = exact(wide_left, wide_right);
            for isa in Isa::available() {
                let backend = backend(isa, 2);
                for types in [
                    (DType::F32, DType::F32),
                    (DType::F32, DType::BF16),
                    (DType::BF16, DType::BF16),
                    (DType::F16, DType::F16),
                ] {
                    let (left, right) = mats(types);
                    let mut result = vec![f32::NAN; m * (n + 1)];
                    let target = MatMut::new(&mut result, m, n, n + 1);
                    backend.product(Sum::new(&[Term::new(left, right)], Into::Overwrite), target).unwrap();
                    for (i, row) in result.chunks(n + 1).enumerate() {
                        assert_eq!(
                            row[..n],
                            expected[i * n..(i + 1) * n],
                            "{m} {n} {k} {transposed:?} {types:?} {isa:?} {i}"
                        );
                        assert!(row[n].is_nan(), "the gap between rows is not touched");
                    }
                }
            }
        }
    }
}

#[test]
fn terms_factors_bias_and_old_contents_add_up() {
    let bias = Typed::new(values(50, 9));
    for (m, k) in [(2, 20), (90, 300)] {
        let n = 50;
        let (x, w) = (Typed::new(values((m + 3) * (k + 3), 7)), Typed::new(values((n + 3) * (k + 3), 5)));
        let (h, b) = (Typed::new(values((m + 3) * 8, 3)), Typed::new(values((n + 3) * 8, 5)));
        for isa in Isa::available() {
            for dtype in [DType::F32, DType::BF16] {
                let product = Term::new(x.mat(dtype, (m, k), false), w.mat(dtype, (n, k), false));
                let (left, right) = (h.mat(DType::F32, (m, 5), false), b.mat(DType::F32, (n, 5), false));
                let terms = [product, Term { factor: 0.5, left, right }];
                let sum = Sum { terms: &terms, bias: Some(bias.elements(dtype)), into: Into::Add };
                let mut result = vec![2.0f32; m * n];
                backend(isa, 2).product(sum, MatMut::new(&mut result, m, n, n)).unwrap();
                let (base, update) = (exact(product.left, product.right), exact(left, right));
                for (i, value) in result.into_iter().enumerate() {
                    assert_eq!(value, 2.0 + base[i] + 0.5 * update[i] + bias.0[i % n], "{m} {isa:?} {dtype} {i}");
                }
            }
        }
    }
}

/// A left factor too large to be packed at once: sums wait in a result of f32, and rows are taken in parts for any other.
#[test]
fn long_sums_are_cut() {
    let (m, n, k) = (200, 3, 45_000);
    assert!(m * k > LEFT && LEFT > LEFT_CUT && m > MIN_ROWS);
    let (left, right) = (Typed::new(values((m + 3) * (k + 3), 7)), Typed::new(values((n + 3) * (k + 3), 5)));
    let (left, right) = (left.mat(DType::BF16, (m, k), false), right.mat(DType::BF16, (n, k), false));
    let expected = exact(left, right);
    let backend = backend(Isa::fastest(), 2);
    let mut wide = vec![1.0f32; m * n];
    let (left_end, right_end) = (left.cols(k - 5..k), right.cols(k - 5..k));
    let last = exact(left_end, right_end);
    let terms = [Term { factor: 0.5, left, right }, Term::new(left_end, right_end)];
    let bias = Typed::new(values(n, 9));
    let sum = Sum { terms: &terms, bias: Some(bias.elements(DType::F32)), into: Into::Add };
    backend.product(sum, MatMut::new(&mut wide, m, n, n)).unwrap();
    let mut narrow = vec![bf16::NAN; m * n];
    let terms = [Term::new(left, right)];
    backend.product(Sum::new(&terms, Into::Overwrite), MatMut::new(&mut narrow, m, n, n)).unwrap();
    for (i, exact) in expected.into_iter().enumerate() {
        assert_eq!((wide[i], narrow[i]), (1.0 + bias.0[i % n] + 0.5 * exact + last[i], bf16::from_f32(exact)), "{i}");
    }
}

/// Tasks cover the result once, none is wider than its scratch, and no thread has much more to do than another.
#[test]
fn tasks_tile_the_result() {
    for (m, n) in [(1, 1), (1024, 16), (1024, 128), (1024, 512), (1024, 4864), (203, 197), (7, 8192)] {
        for (num_threads, isa) in [1, 2, 7].into_iter().flat_map(|threads| Isa::ALL.map(|isa| (threads, isa))) {
            let (rows, cols) = (block::tile_rows(isa), task_cols(isa));
            let tasks = tasks((m, n, 512), (rows, cols), num_threads);
            let area = |task: &Task| task.rows.len() * task.cols.len();
            assert_eq!(tasks.iter().map(area).sum::<usize>(), m * n, "{m} {n} {num_threads}");
            assert!(tasks.iter().all(|task| task.cols.len() <= cols && task.rows.start % rows == 0));
            // Threads take tasks as they become free.
            let mut threads = vec![0; num_threads];
            for task in &tasks {
                *threads.iter_mut().min().unwrap() += area(task);
            }
            let largest = threads.into_iter().max().unwrap();
            assert!(m * n < 1 << 17 || largest * num_threads <= m * n * 9 / 8, "{m} {n} {num_threads}: {largest}");
        }
    }
}

#[test]
fn an_empty_dimension_to_sum_over_gives_zeros() {
    for m in [1, 20] {
        let mut result = vec![bf16::NAN; m * 3];
        let term = Term::new(Mat::f32(&[], m, 0), Mat::f32(&[], 3, 0));
        backend(Isa::Portable, 1)
            .product(Sum::new(&[term], Into::Overwrite), MatMut::new(&mut result, m, 3, 3))
            .unwrap();
        assert!(result.iter().all(|x| *x == bf16::ZERO));
    }
}

/// Neither the threads nor the cut of the result show in the bits, and they differ from f64 by rounding alone.
#[test]
fn bits_do_not_depend_on_threads() {
    let (m, n, k) = (203, 197, 1300);
    let random = |len: usize, seed: usize| -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed) % 10_007) as f32 / 5000.0 - 1.0).collect()
    };
    let (x, w) = (Typed::new(random((m + 3) * (k + 3), 1)), Typed::new(random((n + 3) * (k + 3), 2)));
    for isa in Isa::available() {
        for dtype in [DType::F32, DType::BF16] {
            let term = Term::new(x.mat(dtype, (m, k), false), w.mat(dtype, (n, k), true));
            let product = |num_threads| {
                let mut result = vec![0.0f32; m * n];
                let sum = Sum::new(std::slice::from_ref(&term), Into::Overwrite);
                backend(isa, num_threads).product(sum, MatMut::new(&mut result, m, n, n)).unwrap();
                result
            };
            let alone = product(1);
            for num_threads in [2, 3, 7] {
                assert!(alone == product(num_threads), "{isa:?} {dtype} {num_threads}");
            }
            let value = |typed: &Typed, i: usize| match dtype {
                DType::F32 => f64::from(typed.0[i]),
                _ => typed.2[i].to_f64(),
            };
            for (i, j) in [(0, 0), (100, 50), (202, 196)] {
                let dot: f64 = (0..k).map(|p| value(&x, i * (k + 3) + p) * value(&w, p * (n + 3) + j)).sum();
                assert!((f64::from(alone[i * n + j]) - dot).abs() < 2e-4, "{isa:?} {dtype}: {dot}");
            }
        }
    }
}

/// Whatever a path makes products of, f32 factors give results no worse than sums taken one term after another in f32.
#[test]
fn products_of_f32_are_as_good_as_plain_sums() {
    let (m, n, k) = (33, 40, 2000);
    let random = |len: usize, seed: usize| -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed) % 100_003) as f32 / 50_000.0 - 1.0).collect()
    };
    let (x, w) = (random(m * k, 1), random(n * k, 2));
    for isa in Isa::available() {
        let mut result = vec![0.0f32; m * n];
        let term = Term::new(Mat::f32(&x, m, k), Mat::f32(&w, n, k));
        backend(isa, 2).product(Sum::new(&[term], Into::Overwrite), MatMut::new(&mut result, m, n, n)).unwrap();
        let (mut worst, mut plain) = (0.0f64, 0.0f64);
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let terms = || x[i * k..][..k].iter().zip(&w[j * k..][..k]);
            let exact: f64 = terms().map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            let naive: f32 = terms().map(|(x, w)| x * w).sum();
            plain = plain.max((f64::from(naive) - exact).abs());
            worst = worst.max((f64::from(result[i * n + j]) - exact).abs());
        }
        assert!(worst <= plain, "{isa:?}: {worst}, one after another {plain}");
    }
}

#[test]
#[should_panic(expected = "a matrix lies in its slice")]
fn refuses_to_read_outside() {
    Mat::f32(&[0.0; 3], 2, 2);
}

#[test]
#[should_panic(expected = "a result lies in its slice")]
fn refuses_to_write_outside() {
    MatMut::new(&mut [0.0; 3], 2, 2, 2);
}

#[test]
fn an_instruction_set_is_what_was_asked_for_or_an_error() {
    assert_eq!(Isa::available().next(), Some(Isa::Portable));
    for isa in Isa::ALL {
        match CpuBackend::new(CpuOptions { isa: Some(isa), ..CpuOptions::default() }) {
            Ok(backend) => assert_eq!(Device::new(backend).name(), "cpu"),
            Err(error) => assert!(error.to_string().starts_with("cpu: isa = "), "{error}"),
        }
    }
}
