//! A function of rows, computed in tiles: what it makes in between exists for one tile at a time.
//!                             Bekman et al. 2025, "Arctic long sequence training", arXiv:2506.13996 (tiled MLP)
//!
//! Each tile is a checkpoint of its own. The backward pass walks the tiles in the order of the forward pass, so that gradients of
//! parameters are sums over tiles, in a fixed order; hooks on them wait for the last tile.

use std::ops::Range;

use unsloth_core::{
    Category, Device, Error, Lengths, Result, Sequences, Tensor,
    ops::{attention, embedding},
};

use crate::{Deferred, Parameter, Tape, Var, backward::Context, saved::Saved, var::Source};

const OP: &str = "tiled";

/// `f` of the rows of `x`, `[rows, features]`, that it is given `tile_rows` at a time (the last time, what is left), with their
/// places among all. Keeps `x`; `f` runs again in the backward pass, and must compute the same.
///
/// A row of the result may depend on the same row of `x` alone. As for [`crate::checkpoint`], values on another tape may not be
/// captured; parameters may. With all rows in one tile it is `f` itself.
///
/// # Errors
/// Those of `f`; [`Error::Shape`] unless `x` and what `f` gives have two dimensions, and as many rows;
/// [`Error::InvalidSpec`] for tiles of no rows; an input of another tape.
pub fn tiled<V: Into<Deferred>>(
    tape: &Tape,
    x: &Var,
    tile_rows: usize,
    f: impl Fn(&Tape, &Var, Range<usize>) -> Result<V> + 'static,
) -> Result<Var> {
    let rows = matrix("x", x.tensor(), None)?;
    if tile_rows == 0 {
        return Err(Error::InvalidSpec { op: OP, field: "tile_rows", value: 0.to_string(), rule: "1 or more" });
    }
    if rows <= tile_rows {
        return f(tape, x, 0..rows)?.into().compute();
    }
    let tiles = Tiles { rows, tile_rows };
    let mut out = Collected::new(tiles);
    let mut parameters = Vec::new();
    for range in tiles.ranges() {
        let (y, touched) = first_run(tape, x, &range, &f)?;
        parameters = touched;
        out.add(&range, &y)?;
    }
    let link = tape.link(OP, &[x], &parameters.iter().map(Some).collect::<Vec<_>>())?;
    let (to, x) = (x.source(), Saved::of(x));
    let out = out.finish()?;
    Ok(link.one(out, move |context, dy| backward(tiles, (to, x.take()?), dy, &f, context)))
}

/// What `f` gives of a tile, and the parameters that it uses; nothing is kept for the backward pass.
fn first_run<V: Into<Deferred>>(
    tape: &Tape,
    x: &Var,
    range: &Range<usize>,
    f: impl Fn(&Tape, &Var, Range<usize>) -> Result<V>,
) -> Result<(Tensor, Vec<Parameter>)> {
    let part = copy_rows(x.tensor(), range)?;
    if tape.is_inference() {
        let y = f(tape, &Var::constant(part), range.clone())?.into().compute()?;
        return Ok((y.into_tensor(), Vec::new()));
    }
    let trace = Tape::tracing();
    let input = entered(&trace, part, x.source().is_some());
    let variables = trace.num_variables();
    let y = f(&trace, &input, range.clone())?.into().compute()?;
    if let Some(source) = y.source() {
        trace.check_owner(OP, source)?;
    }
    if trace.num_variables() != variables {
        let device = y.tensor().device().name();
        return Err(Error::Unsupported { op: OP, what: "a variable made inside the function", device });
    }
    Ok((y.into_tensor(), trace.into_touched()))
}

fn entered(tape: &Tape, part: Tensor, is_variable: bool) -> Var {
    if is_variable { tape.variable(part) } else { Var::constant(part) }
}

/// Runs every tile again, and its backward pass behind it.
fn backward<V: Into<Deferred>>(
    tiles: Tiles,
    (to, x): (Option<Source>, Tensor),
    dy: Tensor,
    f: impl Fn(&Tape, &Var, Range<usize>) -> Result<V>,
    context: &mut Context<'_>,
) -> Result<()> {
    let mut dx = Collected::new(tiles);
    for range in tiles.ranges() {
        let is_last = range.end == tiles.rows;
        let tape = Tape::new();
        let input = entered(&tape, copy_rows(&x, &range)?, context.wants(to));
        let variable = input.source();
        let y: Deferred = f(&tape, &input, range.clone())?.into();
        drop(input);
        let source = y.source();
        drop(y);
        let mut seeds = Vec::new();
        if let Some(source) = source {
            tape.check_owner(OP, source)?;
            seeds.push((source, copy_rows(&dy, &range)?));
        }
        let mut found = match is_last {
            true => context.walk_segment(tape, seeds)?,
            false => context.walk_part(tape, seeds)?,
        };
        if let Some(gradient) = variable.and_then(|variable| found.remove(&variable.node)) {
            dx.add(&range, &gradient)?;
        }
    }
    drop((x, dy));
    match dx.is_empty() {
        true => Ok(()),
        false => context.send(to, dx.finish()?),
    }
}

/// Consecutive rows, as many in each tile but the last.
#[derive(Clone, Copy)]
struct Tiles {
    rows: usize,
    tile_rows: usize,
}

impl Tiles {
    fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        let Self { rows, tile_rows } = self;
        (0..rows).step_by(tile_rows).map(move |start| start..rows.min(start + tile_rows))
    }
}

/// Rows of tiles put together.
struct Collected {
    tiles: Tiles,
    /// `[1, rows, 1, features]`, as a cache of one sequence.
    buffer: Option<Tensor>,
    num_rows: usize,
}

impl Collected {
    fn new(tiles: Tiles) -> Self {
        Self { tiles, buffer: None, num_rows: 0 }
    }

    fn is_empty(&self) -> bool {
        self.buffer.is_none()
    }

    /// Adds the rows of a tile.
    fn add(&mut self, range: &Range<usize>, part: &Tensor) -> Result<()> {
        matrix("tile", part, Some(range.len()))?;
        let (device, features) = (part.device(), part.shape()[1]);
        let buffer = match &mut self.buffer {
            Some(buffer) => buffer,
            empty => {
                let shape = [1, self.tiles.rows, 1, features];
                empty.insert(device.empty(shape, part.dtype(), Category::Activations)?)
            }
        };
        let sequence = Sequences::from_lengths(device, &[range.len()])?;
        let start = Lengths::new(device, &[range.start])?;
        start.tensor().retag(Category::Activations);
        attention::kv_append(buffer, &part.clone().reshape([range.len(), 1, features])?, &sequence, &start)?;
        self.num_rows += range.len();
        Ok(())
    }

    /// All rows, `[rows, features]`.
    fn finish(self) -> Result<Tensor> {
        let Self { tiles: Tiles { rows, .. }, buffer, num_rows } = self;
        let Some(buffer) = buffer.filter(|_| num_rows == rows) else {
            let value = format!("{num_rows} of {rows} rows");
            return Err(Error::InvalidSpec { op: OP, field: "tiles", value, rule: "all of one kind" });
        };
        let features = buffer.shape()[3];
        buffer.reshape([rows, features])
    }
}

/// Some rows of a matrix, in a buffer of their own.
fn copy_rows(x: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    let device: &Device = x.device();
    // A batch has fewer than 2^31 rows.
    let ids: Vec<i32> = range.clone().map(|row| row as i32).collect();
    let ids = device.from_slice(&ids, [ids.len()], Category::Activations)?;
    embedding::forward(&device.prepare_weight(x.clone())?, &ids, x.dtype())
}

/// The rows of a matrix.
///
/// # Errors
/// [`Error::Shape`] for another number of dimensions, or of rows.
fn matrix(arg: &'static str, x: &Tensor, rows: Option<usize>) -> Result<usize> {
    match **x.shape() {
        [actual, _] if rows.is_none_or(|rows| rows == actual) => Ok(actual),
        _ => {
            let expected = rows.map_or_else(|| "[rows, features]".to_owned(), |rows| format!("[{rows}, features]"));
            Err(Error::Shape { op: OP, arg, expected, actual: *x.shape() })
        }
    }
}
