//! Softmax cross entropy over a vocabulary.
//!
//! For a row of logits, first `z = softcap * tanh(logit_scale * logits / softcap)` (or `z = logit_scale * logits`), then with
//! `lse = ln sum exp z`, target `y`, smoothing `s` and `V` classes:
//! - `nll = lse - (1 - s) * z[y] - s * mean(z) + z_loss * lse^2`, 0 for a row without a target
//! - `dz = (softmax(z) * (1 + 2 * z_loss * lse) - (1 - s) * onehot(y) - s / V) * loss_scale / num_targets`,
//!   `dlogits = dz * logit_scale * (1 - (z / softcap)^2)`
//!
//! Work: one cube per row. Traffic: forward reads the logits once, with a running maximum and sum (Milakov & Gimelshein 2018,
//! arXiv:1805.02867); backward reads them once and writes over them, or into another buffer.
//! Numerics: f32 inside, sums in a fixed order.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, cube_max, cube_reduce_bytes, cube_sum, math::tanh, unchecked, vector_sum};

/// What is the same for all rows of a loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// Divisor of the loss, at least 1.
    pub num_targets: usize,
    /// Multiplies gradients, not the loss.
    pub loss_scale: f32,
    /// Multiplies the logits.
    pub logit_scale: f32,
    /// Bounds the logits smoothly to `(-softcap, softcap)`; positive.
    pub softcap: Option<f32>,
    /// Probability mass spread over all classes, in `[0, 1)`.
    pub label_smoothing: f32,
    /// Weight of `lse^2`, 0 or more.
    pub z_loss: f32,
}

impl Loss {
    /// Plain cross entropy averaged over `num_targets`.
    pub fn mean(num_targets: usize) -> Self {
        Self { num_targets, loss_scale: 1.0, logit_scale: 1.0, softcap: None, label_smoothing: 0.0, z_loss: 0.0 }
    }

    fn terms<R: Runtime>(&self) -> TermsLaunch<R> {
        TermsLaunch::new(
            self.logit_scale,
            self.softcap.unwrap_or(1.0),
            self.label_smoothing,
            self.z_loss,
            self.loss_scale / self.num_targets.max(1) as f32,
        )
    }

    fn form(&self) -> Form {
        Form { capped: self.softcap.is_some(), smoothed: self.label_smoothing > 0.0 }
    }
}

/// [`Loss`] as a kernel reads it.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Terms {
    logit_scale: f32,
    softcap: f32,
    label_smoothing: f32,
    z_loss: f32,
    /// `loss_scale / num_targets`
    factor: f32,
}

/// What changes the code. Without smoothing the mean of the logits is not looked at: one may be -inf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Form {
    capped: bool,
    smoothed: bool,
}

/// Sizes of the logits, and the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Rows of the logits.
    pub tokens: usize,
    /// Columns of the logits, at least 1.
    pub vocab_size: usize,
    /// The loss.
    pub loss: Loss,
}

/// Buffers of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[tokens, vocab_size]` of `E`
    pub logits: &'a Handle,
    /// i32 `[tokens]`; outside of `0 .. vocab_size` means that the row has no target.
    pub targets: &'a Handle,
    /// f32 `[tokens]`, overwritten: loss of each row, 0 without a target.
    pub nll: &'a Handle,
    /// f32 `[tokens]`, overwritten: 0 without a target.
    pub lse: &'a Handle,
}

/// Launches `nll, lse` of each row. [`mean`] gives the loss.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn forward<R: Runtime, E: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Forward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "cross_entropy_forward");
    launch.element::<E>()?;
    let Shape { tokens, vocab_size, loss } = shape;
    if tokens == 0 || vocab_size == 0 {
        return Ok(());
    }
    let width = launch.vector_width::<E>(vocab_size);
    let grid = launch.rows(tokens, vocab_size / width);
    launch.cube(grid.dim, 4 * cube_reduce_bytes(grid.units))?;
    unchecked!(forward_kernel::launch_unchecked::<E, R>(
        client,
        grid.count,
        grid.dim,
        width,
        launch.vectors::<E>("logits", args.logits, tokens * vocab_size, width)?,
        launch.array::<i32>("targets", args.targets, tokens)?,
        launch.array::<f32>("nll", args.nll, tokens)?,
        launch.array::<f32>("lse", args.lse, tokens)?,
        loss.terms(),
        tokens as u32,
        (vocab_size / width) as u32,
        loss.form(),
        grid.units,
    ));
    Ok(())
}

/// Below every logit that is not -inf, and far enough from the end of f32 that differences stay finite.
const LOWEST: f32 = -3.0e38;

/// `z` of one vector of logits.
#[cube]
fn scores<E: Float, N: Size>(logits: Vector<E, N>, terms: &Terms, #[comptime] form: Form) -> Vector<f32, N> {
    let mut z = Vector::<f32, N>::cast_from(logits) * Vector::new(terms.logit_scale);
    if comptime!(form.capped) {
        #[unroll]
        for component in 0..z.size() {
            z[component] = terms.softcap * tanh(z[component] / terms.softcap);
        }
    }
    z
}

/// Grid: cube = row, units stride the columns. A row without a target has no columns; its units still meet at the barriers.
#[cube(launch_unchecked)]
fn forward_kernel<E: Float, N: Size>(
    logits: &Array<Vector<E, N>>,
    targets: &Array<i32>,
    nll: &mut Array<f32>,
    lse: &mut Array<f32>,
    terms: &Terms,
    rows: u32,
    cols: u32,
    #[comptime] form: Form,
    #[comptime] units: usize,
) {
    let width = N::value();
    let row = CUBE_POS;
    if row < rows as usize {
        // A target outside of the vocabulary, negative ones included, is at or beyond its end as a number without sign.
        let target = u32::reinterpret(targets[row]) as usize;
        let has_target = target < cols as usize * width;
        let end = select(has_target, cols, 0u32) as usize;
        let mut most = LOWEST.runtime();
        let mut sum = 0.0f32;
        let mut at_target = 0.0f32;
        let mut totals = Vector::<f32, N>::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < end {
            let z = scores::<E, N>(logits[row * cols as usize + i], terms, form);
            let before = most;
            #[unroll]
            for component in 0..z.size() {
                most = max(most, z[component]);
                if i * width + component == target {
                    at_target = z[component];
                }
            }
            let weights = Vector::<f32, N>::exp(z - Vector::new(most));
            sum = sum * f32::exp(before - most) + vector_sum::<N>(weights);
            if comptime!(form.smoothed) {
                totals += z;
            }
            i += units;
        }
        let greatest = cube_max(most, units);
        let sum = cube_sum(sum * f32::exp(most - greatest), units);
        // One unit has it, the others 0.
        let at_target = cube_sum(at_target, units);
        let log_sum = greatest + f32::ln(sum);
        let mut loss = log_sum - (1.0 - terms.label_smoothing) * at_target + terms.z_loss * log_sum * log_sum;
        if comptime!(form.smoothed) {
            let total = cube_sum(vector_sum::<N>(totals), units);
            loss -= terms.label_smoothing * total / (f32::cast_from(cols) * comptime!(width as f32));
        }
        if UNIT_POS == 0 {
            nll[row] = select(has_target, loss, 0.0);
            lse[row] = select(has_target, log_sum, 0.0);
        }
    }
}

/// Buffers of the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// `[tokens, vocab_size]` of `E`; `None` if they stand in `dlogits`.
    pub logits: Option<&'a Handle>,
    /// `[tokens, vocab_size]` of `D`, overwritten: the gradient of the logits; 0 in rows without a target.
    pub dlogits: &'a Handle,
    /// i32 `[tokens]`
    pub targets: &'a Handle,
    /// f32 `[tokens]`, from the forward pass.
    pub lse: &'a Handle,
}

/// Launches the gradient of the logits, written over them or, in any of the types, into a buffer of its own.
///
/// # Errors
/// As [`forward`].
pub fn backward<R: Runtime, E: Float, D: Float>(
    client: &ComputeClient<R>,
    shape: Shape,
    args: Backward<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "cross_entropy_backward");
    launch.element::<E>()?;
    launch.element::<D>()?;
    let Shape { tokens, vocab_size, loss } = shape;
    if tokens == 0 || vocab_size == 0 {
        return Ok(());
    }
    let (len, width) = (tokens * vocab_size, launch.vector_width::<E>(vocab_size));
    let grid = launch.rows(tokens, vocab_size / width);
    launch.cube(grid.dim, 0)?;
    unchecked!(backward_kernel::launch_unchecked::<E, D, R>(
        client,
        grid.count,
        grid.dim,
        width,
        args.logits.map(|logits| launch.vectors::<E>("logits", logits, len, width)).transpose()?.into(),
        launch.vectors::<D>("dlogits", args.dlogits, len, width)?,
        launch.array::<i32>("targets", args.targets, tokens)?,
        launch.array::<f32>("lse", args.lse, tokens)?,
        loss.terms(),
        tokens as u32,
        (vocab_size / width) as u32,
        loss.form(),
        grid.units,
    ));
    Ok(())
}

/// Gradient of one vector of the logits of a row that has a target. The vector begins at class `first` of so many classes.
#[cube]
fn gradient<N: Size>(
    logits: Vector<f32, N>,
    first: usize,
    target: usize,
    log_sum: f32,
    classes: f32,
    terms: &Terms,
    #[comptime] form: Form,
) -> Vector<f32, N> {
    let probability = terms.factor * (1.0 + 2.0 * terms.z_loss * log_sum);
    let spread = terms.factor * terms.label_smoothing / classes;
    let hit = terms.factor * (1.0 - terms.label_smoothing);
    let z = scores::<f32, N>(logits, terms, form);
    let softmax = Vector::<f32, N>::exp(z - Vector::new(log_sum));
    let mut dz = softmax * Vector::new(probability) - Vector::new(spread);
    #[unroll]
    for component in 0..dz.size() {
        if first + component == target {
            dz[component] = dz[component] - hit;
        }
    }
    let mut slope = Vector::<f32, N>::new(terms.logit_scale);
    if comptime!(form.capped) {
        let capped = z / Vector::new(terms.softcap);
        slope *= Vector::new(1.0) - capped * capped;
    }
    dz * slope
}

/// Grid as [`forward_kernel`]. Each unit overwrites only what it alone reads.
#[cube(launch_unchecked)]
fn backward_kernel<E: Float, D: Float, N: Size>(
    logits: &ComptimeOption<Array<Vector<E, N>>>,
    dlogits: &mut Array<Vector<D, N>>,
    targets: &Array<i32>,
    lse: &Array<f32>,
    terms: &Terms,
    rows: u32,
    cols: u32,
    #[comptime] form: Form,
    #[comptime] units: usize,
) {
    let width = N::value();
    let row = CUBE_POS;
    if row < rows as usize {
        let target = u32::reinterpret(targets[row]) as usize;
        let has_target = target < cols as usize * width;
        let log_sum = lse[row];
        let classes = f32::cast_from(cols) * comptime!(width as f32);
        let mut i = UNIT_POS as usize;
        while i < cols as usize {
            let at = row * cols as usize + i;
            let mut dz = Vector::<f32, N>::new(0.0);
            if has_target {
                #[comptime]
                let value = match logits {
                    ComptimeOption::Some(logits) => Vector::<f32, N>::cast_from(logits[at]),
                    ComptimeOption::None => Vector::<f32, N>::cast_from(dlogits[at]),
                };
                dz = gradient::<N>(value, i * width, target, log_sum, classes, terms, form);
            }
            dlogits[at] = Vector::cast_from(dz);
            i += units;
        }
    }
}

/// Buffers of [`mean`].
#[derive(Clone, Copy, Debug)]
pub struct Mean<'a> {
    /// f32 `[tokens]`, from [`forward`].
    pub nll: &'a Handle,
    /// f32 `[1]`, overwritten.
    pub loss: &'a Handle,
}

/// Units of the cube that adds the losses of the rows.
const SUM_UNITS: usize = 256;

/// Launches `loss = sum(nll) / num_targets`.
///
/// # Errors
/// As [`forward`].
pub fn mean<R: Runtime>(client: &ComputeClient<R>, shape: Shape, args: Mean<'_>) -> Result<(), LaunchError> {
    let launch = Launch::new(client, "cross_entropy_mean");
    let units = launch.units_for(SUM_UNITS);
    let dim = CubeDim::new_1d(units as u32);
    launch.cube(dim, cube_reduce_bytes(units))?;
    unchecked!(mean_kernel::launch_unchecked::<R>(
        client,
        launch.cubes(1, 1, 1)?,
        dim,
        launch.array::<f32>("nll", args.nll, shape.tokens)?,
        launch.array::<f32>("loss", args.loss, 1)?,
        shape.tokens as u32,
        shape.loss.num_targets as f32,
        units,
    ));
    Ok(())
}

/// Grid: one cube, units stride the rows. Each unit carries what its sum could not hold (Kahan 1965): losses are alike, and the roundings of
/// a long sum of them would all go the same way.
#[cube(launch_unchecked)]
fn mean_kernel(nll: &Array<f32>, loss: &mut Array<f32>, rows: u32, num_targets: f32, #[comptime] units: usize) {
    let mut sum = 0.0f32;
    let mut excess = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < rows as usize {
        let value = nll[i] - excess;
        let next = sum + value;
        excess = (next - sum) - value;
        sum = next;
        i += units;
    }
    let total = cube_sum(sum, units);
    if UNIT_POS == 0 {
        loss[0] = total / num_targets;
    }
}
