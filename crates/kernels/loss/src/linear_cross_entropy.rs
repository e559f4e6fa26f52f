//! Output projection and cross entropy over chunks of tokens; `[tokens, vocab_size]` never exists.
//!
//! Of each chunk: `logits = x W^T` in f32, loss, `dlogits`, `dx = dlogits W`, `dweight += dlogits^T x`. Gradients are
//! made at once, because recomputing the logits would cost half as much again. Liger-Kernel (arXiv:2410.10989) and Cut Cross Entropy
//! (arXiv:2411.09009) use the same idea.
//!
//! `dlogits` takes the place of the logits, in f32. Where a buffer for it is given it is rounded to the type of `x` there, so that tensor
//! cores take both factors of its products as they are: of an f32 one they would multiply three parts.
//!
//! A chunk of few rows leaves most of a large card without work in `dx`, and each chunk reads the whole matrix twice: the more memory
//! there is, the more rows a chunk has ([`chunk_bytes`]).
//!
//! Rows without a target are multiplied like the others, with a gradient of zeros: the host that sizes the launches does not see
//! the targets. Chunks follow one another in order, so `dweight` has the same bits on every run.

use cubecl::{prelude::*, server::Handle};
use unsloth_common::{Launch, LaunchError, Target};
use unsloth_linear::product::{self, Form, Matrix, Size, product};

use crate::cross_entropy::{self, Loss};

/// Bytes of the logits of a chunk on any device, where [`ROWS`] rows are not more.
const LEAST: u64 = 64 << 20;
/// Bytes of the logits of a chunk at most: 1024 rows of the largest vocabularies, enough work for the largest cards.
const MOST: u64 = 512 << 20;
/// They are this part of a device's memory; with their rounded gradient up to 1 in 85 is at work.
const SHARE: u64 = 128;
/// Rows of a chunk are a multiple of this, so that each chunk of every buffer starts at an address that devices bind.
const ROWS: usize = 128;

/// Bytes that the logits of a chunk take at most on a device with so many; `None` where that is not known.
pub fn chunk_bytes(memory_bytes: Option<u64>) -> u64 {
    memory_bytes.map_or(LEAST, |bytes| (bytes / SHARE).clamp(LEAST, MOST))
}

/// Sizes of one loss over hidden states.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Rows of `x`.
    pub tokens: usize,
    /// Columns of `x`.
    pub hidden_size: usize,
    /// Rows of the matrix, at least 1.
    pub vocab_size: usize,
    /// Bytes that the logits of a chunk may take: [`chunk_bytes`], or less. 128 rows are always allowed.
    pub chunk_bytes: u64,
    /// The loss.
    pub loss: Loss,
}

impl Shape {
    /// Rows whose logits exist at a time.
    pub fn chunk_rows(&self) -> usize {
        let row_bytes = self.vocab_size.max(1) as u64 * size_of::<f32>() as u64;
        let rows = usize::try_from(self.chunk_bytes / row_bytes).unwrap_or(usize::MAX);
        (rows / ROWS * ROWS).max(ROWS).min(self.tokens)
    }
}

/// Buffers of a call.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, hidden_size]` of `X`
    pub x: &'a Handle,
    /// `[vocab_size, hidden_size]` of `W`
    pub weight: &'a Handle,
    /// i32 `[tokens]`; outside of `0 .. vocab_size` means that the row has no target.
    pub targets: &'a Handle,
    /// f32 `[chunk_rows, vocab_size]`, overwritten.
    pub logits: &'a Handle,
    /// `[chunk_rows, vocab_size]` of `X`, overwritten: the gradient of the logits. Without, it takes their place.
    pub dlogits: Option<&'a Handle>,
    /// f32 `[tokens]`, overwritten: loss of each row.
    pub nll: &'a Handle,
    /// f32 `[tokens]`, overwritten.
    pub lse: &'a Handle,
    /// f32 `[1]`, overwritten.
    pub loss: &'a Handle,
    /// `[tokens, hidden_size]` of `X`, overwritten, if wanted.
    pub dx: Option<&'a Handle>,
    /// f32 `[vocab_size, hidden_size]`, added to, if wanted.
    pub dweight: Option<&'a Handle>,
}

/// Launches loss and wanted gradients. Gradients, not the loss, are multiplied by the loss scale.
///
/// # Errors
/// [`LaunchError`] for an element type that the device lacks, a buffer that is too small, or a limit exceeded.
pub fn forward<'t, R: Runtime, X: Float, W: Float>(
    target: impl Into<Target<'t, R>>,
    shape: Shape,
    args: Args<'_>,
) -> Result<(), LaunchError> {
    let launch = Launch::on(target.into(), "linear_cross_entropy");
    for first in (0..shape.tokens).step_by(shape.chunk_rows().max(1)) {
        let rows = shape.chunk_rows().min(shape.tokens - first);
        chunk::<R, X, W>(&launch, shape, first..first + rows, args)?;
    }
    let rows = cross_entropy::Shape { tokens: shape.tokens, vocab_size: shape.vocab_size, loss: shape.loss };
    cross_entropy::mean(launch.client(), rows, cross_entropy::Mean { nll: args.nll, loss: args.loss })
}

/// A buffer from its row `first` on.
fn from_row<E: CubePrimitive>(handle: &Handle, first: usize, columns: usize) -> Handle {
    let bytes = first as u64 * columns as u64 * E::as_type_native_unchecked().size() as u64;
    handle.clone().offset_start(bytes)
}

/// Launches the work of the tokens `at`.
fn chunk<R: Runtime, X: Float, W: Float>(
    launch: &Launch<'_, R>,
    shape: Shape,
    at: std::ops::Range<usize>,
    args: Args<'_>,
) -> Result<(), LaunchError> {
    let Shape { hidden_size, vocab_size, loss, .. } = shape;
    let (first, rows) = (at.start, at.len());
    let of_x =
        |arg, handle| Matrix::new::<X>(launch, arg, &from_row::<X>(handle, first, hidden_size), rows * hidden_size);
    let of_logits = || Matrix::new::<f32>(launch, "logits", args.logits, rows * vocab_size);
    let weight = || Matrix::new::<W>(launch, "weight", args.weight, vocab_size * hidden_size);

    let matrices = product::Args { a: of_x("x", args.x)?, b: weight()?, bias: None, out: of_logits()?, scale: 1.0 };
    let form = Form { a_transposed: false, b_transposed: true, accumulate: false };
    product(launch, Size { rows, cols: vocab_size, depth: hidden_size }, form, matrices)?;

    let of_rows = |handle| from_row::<f32>(handle, first, 1);
    let (targets, nll, lse) = (of_rows(args.targets), of_rows(args.nll), of_rows(args.lse));
    let losses = cross_entropy::Shape { tokens: rows, vocab_size, loss };
    let forward = cross_entropy::Forward { logits: args.logits, targets: &targets, nll: &nll, lse: &lse };
    cross_entropy::forward::<R, f32>(launch.client(), losses, forward)?;
    if args.dx.is_none() && args.dweight.is_none() {
        return Ok(());
    }
    let dlogits = match args.dlogits {
        Some(dlogits) => {
            let logits = Some(args.logits);
            let backward = cross_entropy::Backward { logits, dlogits, targets: &targets, lse: &lse };
            cross_entropy::backward::<R, f32, X>(launch.client(), losses, backward)?;
            Matrix::new::<X>(launch, "dlogits", dlogits, rows * vocab_size)?
        }
        None => {
            let backward = cross_entropy::Backward { logits: None, dlogits: args.logits, targets: &targets, lse: &lse };
            cross_entropy::backward::<R, f32, f32>(launch.client(), losses, backward)?;
            of_logits()?
        }
    };
    if let Some(dweight) = args.dweight {
        let out = Matrix::new::<f32>(launch, "dweight", dweight, vocab_size * hidden_size)?;
        let matrices = product::Args { a: dlogits.clone(), b: of_x("x", args.x)?, bias: None, out, scale: 1.0 };
        let form = Form { a_transposed: true, b_transposed: false, accumulate: true };
        product(launch, Size { rows: vocab_size, cols: hidden_size, depth: rows }, form, matrices)?;
    }
    if let Some(dx) = args.dx {
        let matrices = product::Args { a: dlogits, b: weight()?, bias: None, out: of_x("dx", dx)?, scale: 1.0 };
        let form = Form { a_transposed: false, b_transposed: false, accumulate: false };
        product(launch, Size { rows, cols: hidden_size, depth: vocab_size }, form, matrices)?;
    }
    Ok(())
}
