//! Calls of every operator through the contract, so that what is compiled is what the library launches.
//!
//! Each operator is called in every combination of storage types and options, with sizes of real models and with such that only
//! shorter vectors divide, or none: a kernel is made anew for each width of vectors, number of units or tensors, and tile. That no kernel is
//! left out is checked by name: see [`crate::kernels`].

use std::fmt::Display;

use anyhow::{Context, Result};
use cubecl::prelude::{ComputeClient, Runtime};
use unsloth_core::{Category, DType, Device, Shape, Tensor};
use unsloth_cube::{Choosing, CubeBackend, CubeOptions};

use crate::{
    architecture::Architecture,
    offline::{Launched, OfflineCuda, OfflineDevice},
};

mod attention;
mod dora;
mod embedding;
mod glu;
mod layer_norm;
mod linear;
mod lora_linear;
mod loss;
mod pointwise;
mod rms_norm;
mod rope;

type Calls = fn(&mut Caller) -> unsloth_core::Result<()>;

/// Every operator.
const OPERATORS: [(&str, Calls); 23] = [
    ("adafactor", pointwise::adafactor),
    ("adamw", pointwise::adamw),
    ("adamw8bit", pointwise::adamw8bit),
    ("lion", pointwise::lion),
    ("muon", pointwise::muon),
    ("sgd", pointwise::sgd),
    ("attention", attention::calls),
    ("attention of single tokens", attention::single_tokens),
    ("cross_entropy", loss::cross_entropy),
    ("dora", dora::calls),
    ("elementwise", pointwise::elementwise),
    ("embedding", embedding::calls),
    ("glu", glu::calls),
    ("layer_norm", layer_norm::calls),
    ("linear", linear::calls),
    ("linear with every kernel", linear::every_kernel),
    ("linear_cross_entropy", loss::linear_cross_entropy),
    ("lora_linear", lora_linear::calls),
    ("lora_linear with every kernel", lora_linear::every_kernel),
    ("reduce", pointwise::reduce),
    ("rms_norm", rms_norm::calls),
    ("rope", rope::calls),
    ("stochastic_rounding", pointwise::stochastic_rounding),
];

/// A launch and the call that led to it.
pub(crate) struct Launch {
    pub(crate) call: String,
    pub(crate) launched: Launched,
}

/// What the calls of one device led to.
pub(crate) struct Outcome {
    pub(crate) launches: Vec<Launch>,
    /// Calls that the library refused: every call here has to be possible.
    pub(crate) refused: Vec<String>,
}

/// Calls the operators whose name contains `filter` on a device of `architecture`.
///
/// # Errors
/// If the device or a tensor cannot be made.
pub(crate) fn outcome(architecture: &'static Architecture, filter: &str) -> Result<Outcome> {
    let offline = OfflineDevice { capability: architecture.capability as u16 };
    let outcome = Outcome { launches: Vec::new(), refused: Vec::new() };
    let client = OfflineCuda::client(&offline);
    let device = open(architecture, Choosing::ByRule)?;
    let mut caller = Caller { architecture, device, client, operator: "", outcome };
    for (name, calls) in OPERATORS.into_iter().filter(|(name, _)| name.contains(filter)) {
        caller.operator = name;
        calls(&mut caller).with_context(|| format!("{name} on {}", architecture.target))?;
    }
    Ok(caller.outcome)
}

/// A device of `architecture`; all of them share a client.
///
/// # Errors
/// If it does not open.
fn open(architecture: &Architecture, choosing: Choosing) -> unsloth_core::Result<Device> {
    let offline = OfflineDevice { capability: architecture.capability as u16 };
    let options = CubeOptions { choosing, ..CubeOptions::default() };
    Ok(Device::new(CubeBackend::<OfflineCuda>::new(&offline, architecture.target, options)?))
}

/// Calls operators on one device and keeps what they launch.
struct Caller {
    architecture: &'static Architecture,
    device: Device,
    client: ComputeClient<OfflineCuda>,
    operator: &'static str,
    outcome: Outcome,
}

impl Caller {
    /// Goes on with a device that chooses in another way.
    fn choose(&mut self, choosing: Choosing) -> unsloth_core::Result<()> {
        self.device = open(self.architecture, choosing)?;
        Ok(())
    }

    fn tensor(&self, dtype: DType, shape: impl Into<Shape>) -> unsloth_core::Result<Tensor> {
        self.device.empty(shape, dtype, Category::Activations)
    }

    /// Makes one call and notes what it launches.
    fn call<T>(&mut self, detail: impl Display, call: impl FnOnce() -> unsloth_core::Result<T>) {
        let name = format!("{} {detail}", self.operator);
        let result = call().and_then(|_| self.device.synchronize());
        let launched = self.client.info().take();
        self.outcome.launches.extend(launched.into_iter().map(|launched| Launch { call: name.clone(), launched }));
        if let Err(error) = result {
            let causes: Vec<String> = anyhow::Error::new(error).chain().map(ToString::to_string).collect();
            self.outcome.refused.push(format!("{name}: {}", causes.join(": ")));
        }
    }
}

/// Sizes of rows: those that vectors of eight, four, two and none divide, in rows too long to be kept in registers and in such that 512 or 256
/// units keep; and short ones that 128, 64 and 32 units share, not each in every width.
const ROW_SIZES: [usize; 21] = [
    12_288, 12_292, 12_290, 12_289, 4096, 3072, 2050, 2048, 1024, 1028, 1026, 513, 260, 130, 65, 128, 66, 33, 64, 30,
    15,
];

/// Numbers of rows that are summed in so many parts that each number of groups of units adds them up, where a part has four rows at
/// least: and with so many times more rows, where it has more.
const SUMMED_ROWS: [usize; 5] = [128, 256, 512, 1024, 2048];

/// [`ROW_SIZES`], with storage types as [`dtype_pairs`] for one size of a model and an odd one, and of one type for both elsewhere.
fn rows() -> impl Iterator<Item = (usize, (DType, DType))> {
    let is_called = |size: usize, (dtype, weight): (DType, DType)| [4096, 65].contains(&size) || dtype == weight;
    let pairs = move |size| dtype_pairs().filter(move |pair| is_called(size, *pair)).map(move |pair| (size, pair));
    ROW_SIZES.into_iter().flat_map(pairs)
}

/// Storage types of activations with those of weights beside them.
fn dtype_pairs() -> impl Iterator<Item = (DType, DType)> {
    DType::FLOATS.into_iter().flat_map(|dtype| DType::FLOATS.into_iter().map(move |weight| (dtype, weight)))
}
