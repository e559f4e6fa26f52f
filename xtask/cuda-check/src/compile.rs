//! From launches to what their kernels use, on all cores.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use cubecl::ir::DeviceProperties;
use cubecl_cpp::shared::CompilationOptions;
use cubecl_runtime::{id::KernelId, kernel::KernelMetadata};
use serde::Serialize;

use crate::{
    architecture::{ARCHITECTURES, Architecture, Demand, Occupancy},
    calls::Launch,
    disassembler::Disassembler,
    kernels,
    nvrtc::{Nvrtc, Usage},
    offline::{Launched, describe},
};

/// A kernel with its compile-time arguments, on every architecture that launches it.
#[derive(Serialize)]
pub(crate) struct Kernel {
    /// As `norm::rms_norm::forward_kernel`.
    pub(crate) name: String,
    pub(crate) units: u32,
    /// The first call that launches it.
    pub(crate) call: String,
    /// Number of calls that launch it.
    pub(crate) num_calls: usize,
    /// By name of the architecture.
    pub(crate) on: BTreeMap<&'static str, Compiled>,
}

/// What one kernel uses on one architecture, or why it does not compile.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Compiled {
    Uses(Uses),
    Fails { error: String },
}

#[derive(Serialize)]
pub(crate) struct Uses {
    #[serde(flatten)]
    pub(crate) usage: Usage,
    /// All shared memory of a cube.
    pub(crate) shared_bytes: usize,
    /// Instructions of tensor cores in a kernel that is written for them, of the machine code, or of its source where nothing disassembles;
    /// `None` for others.
    pub(crate) tensor_core_instructions: Option<usize>,
    #[serde(flatten)]
    pub(crate) occupancy: Occupancy,
}

/// Code generation for one architecture.
struct Target {
    architecture: &'static Architecture,
    properties: DeviceProperties,
    options: CompilationOptions,
}

struct Job {
    /// Which kernel, and which of [`ARCHITECTURES`].
    at: (usize, usize),
    launched: Launched,
}

impl Job {
    /// As `attention.forward.forward_kernel-3.sm_80`.
    fn file_name(&self, kernels: &[Kernel]) -> String {
        let (kernel, architecture) = self.at;
        format!("{}-{kernel}.{}", kernels[kernel].name.replace("::", "."), ARCHITECTURES[architecture].target)
    }
}

/// What compiles, and what becomes of it.
pub(crate) struct Tools<'a> {
    pub(crate) nvrtc: &'a Nvrtc,
    pub(crate) disassembler: Option<&'a Disassembler>,
    /// Folder that keeps the generated code.
    pub(crate) sources: Option<&'a Path>,
}

/// Compiles each instantiation once per architecture; `launches` are in the order of [`ARCHITECTURES`].
pub(crate) fn compile(tools: &Tools<'_>, launches: Vec<Vec<Launch>>) -> Vec<Kernel> {
    let (mut kernels, jobs) = instantiations(launches);
    let targets: Vec<Target> = ARCHITECTURES
        .iter()
        .map(|architecture| {
            let (properties, options) = describe(architecture);
            Target { architecture, properties, options }
        })
        .collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let compiled = match compile_one(tools, &targets[job.at.1], &job.launched, &job.file_name(&kernels)) {
                Ok(uses) => Compiled::Uses(uses),
                Err(error) => Compiled::Fails { error: format!("{error:#}") },
            };
            done.push((job.at, compiled));
        }
        done
    };
    let done = thread::scope(|scope| {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<Vec<_>>()
    });
    for ((kernel, architecture), compiled) in done {
        kernels[kernel].on.insert(ARCHITECTURES[architecture].target, compiled);
    }
    kernels.sort_by(|a, b| a.name.cmp(&b.name));
    kernels
}

fn instantiations(launches: Vec<Vec<Launch>>) -> (Vec<Kernel>, Vec<Job>) {
    let mut index: HashMap<KernelId, usize> = HashMap::new();
    let (mut kernels, mut jobs) = (Vec::new(), BTreeMap::new());
    for (architecture, launches) in launches.into_iter().enumerate() {
        for Launch { call, launched } in launches {
            let (id, name) = (launched.kernel.id(), kernels::name_of(launched.kernel.name()));
            let units = id.cube_dim.num_elems();
            let kernel = *index.entry(id).or_insert_with(|| {
                kernels.push(Kernel { name, units, call, num_calls: 0, on: BTreeMap::new() });
                kernels.len() - 1
            });
            kernels[kernel].num_calls += usize::from(architecture == 0);
            if let Entry::Vacant(entry) = jobs.entry((kernel, architecture)) {
                entry.insert(launched);
            }
        }
    }
    (kernels, jobs.into_iter().map(|(at, launched)| Job { at, launched }).collect())
}

fn compile_one(tools: &Tools<'_>, target: &Target, launched: &Launched, file_name: &str) -> Result<Uses> {
    let Launched { kernel, mode } = launched;
    // CubeCL's expansion panics on what it cannot express.
    let generate = || kernel.compile(&mut Default::default(), &target.options, *mode, kernel.address_type());
    let generated = catch_unwind(AssertUnwindSafe(generate))
        .map_err(|_| anyhow!("the code generator panicked; its message is above"))?
        .map_err(|error| anyhow!("{error}"))?;
    if let Some(folder) = tools.sources {
        let path = folder.join(format!("{file_name}.cu"));
        fs::write(&path, &generated.source).with_context(|| path.display().to_string())?;
    }
    let repr = generated.repr.context("the code generator gave no kernel")?;
    let (units, limits) = (generated.cube_dim.num_elems(), &target.properties.hardware);
    ensure!(units <= limits.max_units_per_cube, "{units} units in a cube, at most {}", limits.max_units_per_cube);
    let (code, usage) = tools.nvrtc.compile(&generated.source, target.architecture.target)?;
    let for_tensor_cores = kernels::is_for_tensor_cores(&kernels::name_of(kernel.name()));
    let tensor_core_instructions = match tools.disassembler {
        _ if !for_tensor_cores => None,
        Some(disassembler) => Some(disassembler.tensor_core_instructions(&code, file_name)?),
        None => Some(generated.source.matches("mma.sync").count()),
    };
    let shared_bytes = repr.shared_memory_size() + usage.static_shared_bytes;
    let most = limits.max_shared_memory_size;
    ensure!(shared_bytes <= most, "{shared_bytes} bytes of shared memory, at most {most}");
    let demand = Demand { registers: usage.registers, shared_bytes, units };
    Ok(Uses { usage, shared_bytes, tensor_core_instructions, occupancy: target.architecture.occupancy(demand) })
}
