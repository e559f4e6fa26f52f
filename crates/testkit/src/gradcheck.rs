//! Gradients against central differences, in f64.

/// Step relative to the point: the cube root of the f64 epsilon balances truncation `h^2` and cancellation `eps / h`.
const STEP: f64 = 6.1e-6;

/// Admitted error relative to the size of the function and its gradient. Truncation and cancellation are about 1e-10 of
/// them each for functions as smooth as the operators are; a wrong formula is off by far more than this.
const TOLERANCE: f64 = 1e-7;

/// Holds `gradient` to the central differences of `f` at `x`.
///
/// # Errors
/// A sentence that names the first element that differs.
pub fn check(name: &str, x: &[f64], f: impl Fn(&[f64]) -> f64, gradient: &[f64]) -> Result<(), String> {
    if gradient.len() != x.len() {
        return Err(format!("{name}: {} gradients for {} inputs", gradient.len(), x.len()));
    }
    let largest = gradient.iter().fold(f(x).abs().max(1.0), |most, g| most.max(g.abs()));
    let mut point = x.to_vec();
    for i in 0..x.len() {
        let step = STEP * x[i].abs().max(1.0);
        let mut at = |value: f64| {
            point[i] = value;
            f(&point)
        };
        // The step that was taken, not the one asked for: x + h is rounded.
        let (above, below) = (x[i] + step, x[i] - step);
        let numeric = (at(above) - at(below)) / (above - below);
        point[i] = x[i];
        let good = (numeric - gradient[i]).abs() <= TOLERANCE * largest;
        if !good {
            return Err(format!("{name}[{i}]: gradient {:e}, central difference {numeric:e}", gradient[i]));
        }
    }
    Ok(())
}

/// `sum(a * b)`: the loss whose gradient with respect to `a` is `b`.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "a dot product pairs its elements");
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cubes(x: &[f64]) -> f64 {
        x.iter().map(|v| v * v * v).sum()
    }

    #[test]
    fn accepts_the_gradient() {
        check("x", &[0.5, -2.0, 0.0], cubes, &[0.75, 12.0, 0.0]).unwrap();
    }

    #[test]
    fn refuses_another() {
        assert!(check("x", &[0.5, -2.0], cubes, &[0.75, 12.0001]).is_err());
        assert!(check("x", &[0.5], cubes, &[f64::NAN]).is_err());
        assert!(check("x", &[0.5], cubes, &[]).is_err());
    }
}
