//! The largest singular values of a weight, with their vectors.   Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithm 4.4
//!
//! Subspace iteration: products with the weight run on its device in f32, whatever has one row for each wanted value runs on
//! the host in f64. The result is a function of the weight, the rank and the number of iterations alone.

use unsloth_core::{Category, Device, Result, Tensor, Weight, ops::linear, rng::Philox};

/// Rows of the subspace beyond the rank: they make the wanted ones converge faster.
const OVERSAMPLING: usize = 10;
/// Most iterations where none are asked for. What has not converged by then are vectors whose values are the same but for
/// rounding, and any of those is as good.
const MAX_ITERATIONS: usize = 300;
/// Largest `|W^T u - s v| / s_1` of a value that has converged: a few roundings of the products.
const TOLERANCE: f64 = 1e-6;
/// Streams of other purposes have other ids: "svd" in ASCII.
const STREAM: u32 = 0x0073_7664;

/// `W ~ sum_i s_i u_i v_i^T`, largest values first.
pub(crate) struct TruncatedSvd {
    /// `s_i`, 0 or more.
    pub(crate) values: Vec<f64>,
    /// `u_i`, `[rank, out_features]`.
    pub(crate) left: Vec<f64>,
    /// `v_i`, `[rank, in_features]`.
    pub(crate) right: Vec<f64>,
}

/// The `rank` largest singular values of a weight, to the accuracy of f32 products, or what `iterations` power iterations
/// find of them. `rank` is at most the smaller dimension.
///
/// # Errors
/// [`unsloth_core::Error::OutOfMemory`]; [`unsloth_core::Error::Launch`] if the device failed.
pub(crate) fn truncated_svd(weight: &Weight, rank: usize, iterations: Option<usize>) -> Result<TruncatedSvd> {
    let (num_outputs, num_inputs) = (weight.out_features(), weight.in_features());
    let k = (rank + OVERSAMPLING).min(num_outputs).min(num_inputs);
    let limit = iterations.unwrap_or(MAX_ITERATIONS);
    let mut right = random_rows(k, num_inputs);
    orthonormalise(&mut right, num_inputs);
    for iteration in 0.. {
        // The rows of `V W^T`, turned so that they are orthogonal, are `s_i u_i`.
        let projected = product(weight.device(), &right, num_inputs, |rows| linear::forward(rows, weight, None))?;
        let (squares, rotation) = eigen(gram(&projected, num_outputs), k);
        right = rotated(&rotation, &right, num_inputs);
        let mut left = rotated(&rotation, &projected, num_outputs);
        let values: Vec<f64> = squares.iter().map(|square| square.max(0.0).sqrt()).collect();
        orthonormalise(&mut left, num_outputs);
        let back = product(weight.device(), &left, num_outputs, |rows| linear::input_gradient(rows, weight))?;
        let error = (0..rank).map(|i| distance(row(&back, num_inputs, i), row(&right, num_inputs, i), values[i]));
        let has_converged = error.fold(0.0, f64::max) <= TOLERANCE * values[0];
        if iteration >= limit || (iterations.is_none() && has_converged) {
            left.truncate(rank * num_outputs);
            right.truncate(rank * num_inputs);
            return Ok(TruncatedSvd { values: values[..rank].to_vec(), left, right });
        }
        right = back;
        orthonormalise(&mut right, num_inputs);
    }
    unreachable!("the loop ends at the limit")
}

fn random_rows(k: usize, width: usize) -> Vec<f64> {
    let stream = Philox::new(0, STREAM);
    let block = |row: usize, block: usize| stream.normals([0, 0, row as u32, block as u32]);
    let rows = (0..k).map(|row| (0..width.div_ceil(4)).flat_map(move |i| block(row, i)).take(width));
    rows.flatten().map(f64::from).collect()
}

/// Multiplies rows `[k, width]` with the weight, on its device.
fn product(
    device: &Device,
    rows: &[f64],
    width: usize,
    multiply: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Vec<f64>> {
    let narrow: Vec<f32> = rows.iter().map(|&value| value as f32).collect();
    let rows = device.from_slice(&narrow, [narrow.len() / width, width], Category::Workspace)?;
    Ok(multiply(&rows)?.to_f32_vec()?.into_iter().map(f64::from).collect())
}

fn row(rows: &[f64], width: usize, index: usize) -> &[f64] {
    &rows[index * width..(index + 1) * width]
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `|a - factor b|`
fn distance(a: &[f64], b: &[f64], factor: f64) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - factor * b).powi(2)).sum::<f64>().sqrt()
}

/// Makes rows orthonormal, each to those before it, twice: once is not enough where rows are nearly parallel. A row of zeros
/// stays one.
fn orthonormalise(rows: &mut [f64], width: usize) {
    for end in (width..=rows.len()).step_by(width) {
        let (before, current) = rows[..end].split_at_mut(end - width);
        for _ in 0..2 {
            for earlier in before.chunks_exact(width) {
                let share = dot(earlier, current);
                current.iter_mut().zip(earlier).for_each(|(value, earlier)| *value -= share * earlier);
            }
            let norm = dot(current, current).sqrt();
            if norm > 0.0 {
                current.iter_mut().for_each(|value| *value /= norm);
            }
        }
    }
}

/// `R R^T` of rows `R`.
fn gram(rows: &[f64], width: usize) -> Vec<f64> {
    let rows: Vec<&[f64]> = rows.chunks_exact(width).collect();
    rows.iter().flat_map(|a| rows.iter().map(|b| dot(a, b))).collect()
}

/// `P^T R` of rows `R` `[k, width]`, `P` `[k, k]`.
fn rotated(rotation: &[f64], rows: &[f64], width: usize) -> Vec<f64> {
    let k = rows.len() / width;
    let mut turned = vec![0.0; rows.len()];
    for (i, target) in turned.chunks_exact_mut(width).enumerate() {
        for (j, source) in rows.chunks_exact(width).enumerate() {
            let factor = rotation[j * k + i];
            target.iter_mut().zip(source).for_each(|(target, source)| *target += factor * source);
        }
    }
    turned
}

/// Eigenvalues of a symmetric `[n, n]`, largest first, and the eigenvectors as columns: cyclic Jacobi rotations.
/// Golub & Van Loan 2013, "Matrix Computations", section 8.5
fn eigen(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    const SWEEPS: usize = 60;
    let mut vectors: Vec<f64> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
    for _ in 0..SWEEPS {
        let mut is_diagonal = true;
        for p in 0..n {
            for q in p + 1..n {
                let (app, aqq, apq) = (a[p * n + p], a[q * n + q], a[p * n + q]);
                if apq.abs() <= 1e-16 * (app.abs() * aqq.abs()).sqrt() || apq == 0.0 {
                    continue;
                }
                is_diagonal = false;
                let theta = (aqq - app) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let c = 1.0 / (t * t + 1.0).sqrt();
                rotate_columns(&mut a, n, (p, q), (c, t * c));
                rotate_rows(&mut a, n, (p, q), (c, t * c));
                rotate_columns(&mut vectors, n, (p, q), (c, t * c));
            }
        }
        if is_diagonal {
            break;
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| a[j * n + j].total_cmp(&a[i * n + i]));
    let values = order.iter().map(|&i| a[i * n + i]).collect();
    let sorted = (0..n * n).map(|i| vectors[i / n * n + order[i % n]]).collect();
    (values, sorted)
}

fn rotate_columns(a: &mut [f64], n: usize, (p, q): (usize, usize), (c, s): (f64, f64)) {
    for row in a.chunks_exact_mut(n) {
        (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
    }
}

fn rotate_rows(a: &mut [f64], n: usize, (p, q): (usize, usize), (c, s): (f64, f64)) {
    for column in 0..n {
        let (upper, lower) = (a[p * n + column], a[q * n + column]);
        (a[p * n + column], a[q * n + column]) = (c * upper - s * lower, s * upper + c * lower);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `sum_i s_i u_i v_i^T` of known values and random orthonormal vectors.
    fn matrix(values: &[f64], [num_outputs, num_inputs]: [usize; 2]) -> (Vec<f64>, Weight) {
        let device = unsloth_cpu::device();
        let mut left = random_rows(values.len(), num_outputs);
        let mut right = random_rows(2 * values.len(), num_inputs).split_off(values.len() * num_inputs);
        orthonormalise(&mut left, num_outputs);
        orthonormalise(&mut right, num_inputs);
        let dense = sum(values, &left, &right, [num_outputs, num_inputs]);
        let narrow: Vec<f32> = dense.iter().map(|&value| value as f32).collect();
        let tensor = device.from_slice(&narrow, [num_outputs, num_inputs], Category::Weights).unwrap();
        (dense, device.prepare_weight(tensor).unwrap())
    }

    fn sum(values: &[f64], left: &[f64], right: &[f64], [num_outputs, num_inputs]: [usize; 2]) -> Vec<f64> {
        let element = |i: usize, j: usize| -> f64 {
            (0..values.len()).map(|k| values[k] * left[k * num_outputs + i] * right[k * num_inputs + j]).sum()
        };
        (0..num_outputs).flat_map(|i| (0..num_inputs).map(move |j| (i, j))).map(|(i, j)| element(i, j)).collect()
    }

    #[test]
    fn known_values_are_found_in_order() {
        let values: Vec<f64> = (0..40).map(|i| 10.0 * 0.9f64.powi(i)).collect();
        for shape in [[50, 70], [70, 50], [40, 64]] {
            let (_, weight) = matrix(&values, shape);
            for rank in [1, 5, 12] {
                let found = truncated_svd(&weight, rank, None).unwrap();
                for (found, expected) in found.values.iter().zip(&values) {
                    assert!((found - expected).abs() <= 2e-5, "{shape:?}, {rank}: {found}, expected {expected}");
                }
                // No matrix of this rank is nearer: what is left has the next value as its norm.
                let rest = truncated_svd(&left_over(&weight, &found, shape), 1, None).unwrap().values[0];
                assert!((rest - values[rank]).abs() <= 1e-4, "{shape:?}, {rank}: {rest}, expected {}", values[rank]);
            }
        }
    }

    fn left_over(weight: &Weight, found: &TruncatedSvd, shape: [usize; 2]) -> Weight {
        let dense = weight.to_dense().unwrap().to_vec::<f32>().unwrap();
        let update = sum(&found.values, &found.left, &found.right, shape);
        let rest: Vec<f32> = dense.iter().zip(update).map(|(w, u)| (f64::from(*w) - u) as f32).collect();
        let device = weight.device();
        device.prepare_weight(device.from_slice(&rest, shape, Category::Weights).unwrap()).unwrap()
    }

    #[test]
    fn a_rank_that_is_the_whole_matrix_gives_it_back() {
        let (dense, weight) = matrix(&[3.0, 2.0, 2.0, 1.0], [4, 9]);
        let found = truncated_svd(&weight, 4, None).unwrap();
        let again = sum(&found.values, &found.left, &found.right, [4, 9]);
        assert!(dense.iter().zip(again).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn zeros_have_no_directions() {
        let device = unsloth_cpu::device();
        let zeros = device.zeros([6, 5], unsloth_core::DType::F32, Category::Weights).unwrap();
        let found = truncated_svd(&device.prepare_weight(zeros).unwrap(), 2, None).unwrap();
        assert!(found.values == [0.0, 0.0] && found.left.iter().all(|value| *value == 0.0));
    }

    #[test]
    fn more_iterations_come_nearer() {
        let values: Vec<f64> = (0..60).map(|i| 0.97f64.powi(i)).collect();
        let (_, weight) = matrix(&values, [60, 60]);
        let error = |iterations| {
            let found = truncated_svd(&weight, 8, Some(iterations)).unwrap();
            found.values.iter().zip(&values).map(|(found, value)| (found - value).abs()).fold(0.0, f64::max)
        };
        let errors = [error(0), error(2), error(16)];
        assert!(errors[0] > errors[1] && errors[1] > errors[2] && errors[2] < 0.02, "{errors:?}");
    }
}
