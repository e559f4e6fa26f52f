//! Which kernel makes a product: by rule, or the fastest of those that can, as measured on the device.

use cubecl::prelude::*;
use unsloth_common::{Choices, Launch, LaunchError};

#[cfg(feature = "cubek")]
use crate::cubek;
use crate::{
    measure,
    product::{self, Job},
    tensor,
};

/// A way to make a product. Those of this crate sum in the same order whatever the tile and give the same bits, but for narrow tiles, which
/// add up parts of the terms.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Strategy {
    /// The portable kernel.
    Tiled(product::Tile),
    /// Tensor cores.
    Tensor(tensor::Operands, tensor::Tile),
    /// The kernel of cubek-matmul.
    #[cfg(feature = "cubek")]
    Cubek,
}

impl Strategy {
    /// What needs no measuring: tensor cores where they take the operands, in the tile that the device has room and cubes for.
    fn by_rule(client: &ComputeClient<impl Runtime>, job: &Job) -> Self {
        match tensor::Operands::of(client, job) {
            Some(operands) => Self::Tensor(operands, tensor::Tile::for_device(client, job, operands)),
            None => Self::Tiled(product::Tile::for_device(client)),
        }
    }

    /// Other ways to make the same product.
    fn others(self, client: &ComputeClient<impl Runtime>, job: &Job) -> Vec<Self> {
        #[cfg_attr(not(feature = "cubek"), allow(unused_mut, reason = "there are no others"))]
        let mut others: Vec<Self> = match self {
            Self::Tensor(operands, rule) => {
                let fitting = tensor::Tile::fitting(client, job, operands);
                fitting.filter(|tile| *tile != rule).map(|tile| Self::Tensor(operands, tile)).collect()
            }
            _ => product::Tile::others(client).map(Self::Tiled).collect(),
        };
        #[cfg(feature = "cubek")]
        if cubek::can(client, job) {
            others.push(Self::Cubek);
        }
        others
    }

    /// What it is called where people read it.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Tiled(tile) => tile.name(),
            Self::Tensor(_, tile) => tile.name(),
            #[cfg(feature = "cubek")]
            Self::Cubek => cubek::NAME.to_owned(),
        }
    }

    /// Launches it, `scale` in place of the job's.
    ///
    /// # Errors
    /// [`LaunchError::Limit`] if the product exceeds a limit of the device; [`LaunchError::Unsupported`] from a library's kernel,
    /// which has conditions of its own.
    pub(crate) fn launch<R: Runtime>(&self, launch: &Launch<'_, R>, job: &Job, scale: f32) -> Result<(), LaunchError> {
        match *self {
            Self::Tiled(tile) => product::tiled(launch, job, tile, scale),
            Self::Tensor(operands, tile) => tensor::product(launch, job, (operands, tile), scale),
            #[cfg(feature = "cubek")]
            Self::Cubek => cubek::launch(launch, job),
        }
    }
}

/// The names of all strategies, by which [`Choices`] know them: which of them can make a product depends on its types and sizes
/// and on the device.
pub fn names() -> Vec<String> {
    let own = product::Tile::ALL.iter().map(product::Tile::name);
    let names = own.chain(tensor::Tile::ALL.iter().map(tensor::Tile::name));
    #[cfg(feature = "cubek")]
    let names = names.chain([cubek::NAME.to_owned()]);
    // Two tiles of one size, for operands that are whole and in parts, have one name.
    let mut names: Vec<String> = names.collect();
    names.dedup();
    names
}

/// Launches a product whose sizes are checked.
///
/// # Errors
/// [`LaunchError::Limit`] if it exceeds a limit of the device.
pub(crate) fn launch<R: Runtime>(launch: &Launch<'_, R>, job: &Job) -> Result<(), LaunchError> {
    let rule = Strategy::by_rule(launch.client(), job);
    let scale = job.args.scale;
    let chosen = match launch.choices() {
        Some(choices) => chosen(launch, job, rule, choices)?,
        None => None,
    };
    match chosen.map(|strategy| strategy.launch(launch, job, scale)) {
        // A library's kernel was measured with other rows, and refuses these: that depends on the sizes alone.
        None | Some(Err(LaunchError::Unsupported { .. })) => rule.launch(launch, job, scale),
        Some(result) => result,
    }
}

/// The strategy that was chosen instead of the rule's.
fn chosen<R: Runtime>(
    launch: &Launch<'_, R>,
    job: &Job,
    rule: Strategy,
    choices: &dyn Choices,
) -> Result<Option<Strategy>, LaunchError> {
    let name = name(job);
    let others = || rule.others(launch.client(), job);
    let choice = match choices.find(&name) {
        Some(choice) => choice,
        None if !is_worth_measuring(job) => return Ok(None),
        None => match others().as_slice() {
            [] => return Ok(None),
            others => match measure::fastest(launch, job, rule, others)? {
                Some(fastest) => choices.keep(&name, &fastest.name(), &rule.name()),
                None => return Ok(None),
            },
        },
    };
    // Mostly the rule's, for which the others need not be found at every launch.
    Ok(if choice == rule.name() { None } else { others().into_iter().find(|strategy| strategy.name() == choice) })
}

/// Rows that a tile of any strategy divides.
const WHOLE_ROWS: usize = 128;

/// What stands for a product among others: types, layout and sizes. Rows, which change from step to step, count up to the next
/// power of two; that a tile divides them makes a difference to kernels.
fn name(job: &Job) -> String {
    let Job { size, form, ref args } = *job;
    let mark = |transposed| if transposed { "^T" } else { "" };
    let (a, b, out) = (args.a.element, args.b.element, args.out.element);
    let (a_mark, b_mark) = (mark(form.a_transposed), mark(form.b_transposed));
    let (rows, whole) = (size.rows.next_power_of_two(), size.rows.is_multiple_of(WHOLE_ROWS));
    let onto = if form.accumulate { "added" } else { "written" };
    let with = if args.bias.is_some() { ", with bias" } else { "" };
    let rows = if whole { format!("{rows} whole rows") } else { format!("{rows} rows") };
    format!(
        "{a}{a_mark} x {b}{b_mark} -> {out} {onto}{with}, up to {rows}, {} columns, {} terms",
        size.cols, size.depth
    )
}

/// Products from which on measuring is worth the time that it takes.
const LEAST_FLOPS: u64 = 1 << 27;

/// What is added to cannot be made more than once.
fn is_worth_measuring(job: &Job) -> bool {
    let sizes = [job.size.rows, job.size.cols, job.size.depth];
    let flops = sizes.iter().fold(2u64, |flops, &size| flops.saturating_mul(size as u64));
    !job.form.accumulate && flops >= LEAST_FLOPS
}
