//! Sampled parts of a result against the f64 oracle, at the shape that is timed.

use anyhow::Result;
use unsloth_rs::{DType, Tensor};
use unsloth_testkit::{
    budget::{self, Expected, Floor},
    report::Case,
};

/// Both references of an oracle: exact, and rounded as the unfused formula rounds.
macro_rules! references {
    ($dtype:expr, |$arith:ident| $body:expr) => {{
        let exact = {
            let $arith = &unsloth_testkit::arith::Exact;
            $body
        };
        let naive = {
            let $arith = &unsloth_testkit::arith::Rounded($dtype);
            $body
        };
        (exact, naive)
    }};
}
pub(crate) use references;

/// Holds what a device computed to the budget of its operator's suite.
///
/// # Errors
/// A failure that names the operator, the tensor and the worst element.
pub(crate) fn hold(
    (op, name): (&'static str, &str),
    actual: &[f64],
    (exact, naive): (&[f64], &[f64]),
    floor: Floor,
) -> Result<()> {
    Ok(budget::check(&Case::detached(op), name, actual, Expected { exact, naive, floor })?)
}

/// The floor for sums of terms of which the largest sum of magnitudes is `magnitude`.
pub(crate) fn cancelling(dtype: DType, magnitude: f64) -> Floor {
    Floor::Cancelling { dtype, magnitude }
}

/// Largest magnitude.
pub(crate) fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most, value| value.abs().max(most))
}

pub(crate) fn magnitudes(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| value.abs()).collect()
}

/// About `count` indices below `len`, the first and the last among them.
pub(crate) fn spread(len: usize, count: usize) -> Vec<usize> {
    let steps = count.min(len).saturating_sub(1).max(1);
    let mut indices: Vec<usize> = (0..count.min(len)).map(|i| i * (len - 1) / steps).collect();
    indices.dedup();
    indices
}

/// A matrix on the host: all dimensions but the last are its rows.
pub(crate) struct Host {
    values: Vec<f32>,
    columns: usize,
}

impl Host {
    pub(crate) fn read(tensor: &Tensor) -> Result<Self> {
        Ok(Self { values: tensor.to_f32_vec()?, columns: tensor.shape().last().max(1) })
    }

    /// The same elements as rows of another width.
    pub(crate) fn with_columns(self, columns: usize) -> Self {
        Self { columns, ..self }
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.values.len() / self.columns
    }

    pub(crate) fn all(&self) -> Vec<f64> {
        self.values.iter().map(|&value| f64::from(value)).collect()
    }

    pub(crate) fn rows(&self, rows: &[usize]) -> Vec<f64> {
        let row = |&row: &usize| self.values[row * self.columns..][..self.columns].iter();
        rows.iter().flat_map(row).map(|&value| f64::from(value)).collect()
    }

    /// Columns of all rows.
    pub(crate) fn columns(&self, columns: &[usize]) -> Vec<f64> {
        self.block(&(0..self.num_rows()).collect::<Vec<_>>(), columns)
    }

    pub(crate) fn block(&self, rows: &[usize], columns: &[usize]) -> Vec<f64> {
        let element = |row: usize, column: usize| f64::from(self.values[row * self.columns + column]);
        rows.iter().flat_map(|&row| columns.iter().map(move |&column| element(row, column))).collect()
    }
}

#[cfg(test)]
mod tests {
    use unsloth_rs::{Category, device};

    use super::{Host, hold, spread};
    use unsloth_testkit::budget::Floor;

    #[test]
    fn spread_has_both_ends() {
        assert_eq!(spread(10, 4), [0, 3, 6, 9]);
        assert_eq!(spread(2, 4), [0, 1]);
        assert_eq!(spread(1, 4), [0]);
        assert_eq!(spread(0, 4), Vec::<usize>::new());
        assert_eq!(spread(5, 1), [0]);
    }

    #[test]
    fn parts_of_a_matrix() {
        let cpu = device("cpu").unwrap();
        let values: Vec<f32> = (0..6).map(|value| value as f32).collect();
        let host = Host::read(&cpu.from_slice(&values, [2, 3], Category::Activations).unwrap()).unwrap();
        assert_eq!(host.rows(&[1]), [3.0, 4.0, 5.0]);
        assert_eq!(host.columns(&[0, 2]), [0.0, 2.0, 3.0, 5.0]);
        assert_eq!(host.with_columns(2).block(&[2], &[1]), [5.0]);
    }

    #[test]
    fn a_wrong_element_is_named() {
        let right = [1.0, 2.0];
        hold(("op", "out"), &right, (&right, &right), Floor::Exact).unwrap();
        let error = hold(("op", "out"), &[1.0, 2.5], (&right, &right), Floor::Exact).unwrap_err().to_string();
        assert!(error.contains("`out`[1]"), "{error}");
    }
}
