//! Fine-tune language models on whatever processor you have, from one Rust program.
//!
//! One import gives a [`Device`], tensors, [operators](core::ops) and their [gradients](autograd), a [trainer](train),
//! [models](llm) from Hugging Face folders, and [recipes](recipe) that put them together. The layers can also be used one by
//! one: each module is a crate of its own.
//!
//! Gradients of any expression:
//!
//! ```
//! use unsloth_rs::{Category, Result, autograd::{GradStore, Tape, ops}, device};
//!
//! # fn main() -> Result<()> {
//! let cpu = device("cpu")?;
//! let tape = Tape::new();
//! let x = tape.variable(cpu.from_slice(&[1.0f32, -2.0, 3.0], [3], Category::Activations)?);
//! let loss = ops::sum(&tape, &ops::mul(&tape, x.clone(), &x)?)?;
//! assert_eq!(loss.tensor().to_vec::<f32>()?, [14.0]);
//!
//! let mut gradients = tape.backward(&loss, &mut GradStore::new(&[])?)?;
//! let dx = gradients.take(&x).map(|dx| dx.to_vec::<f32>()).transpose()?;
//! assert_eq!(dx, Some(vec![2.0, -4.0, 6.0]));
//! # Ok(())
//! # }
//! ```
//!
//! An adapter for a model, as `unsloth train` makes it:
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//!
//! use unsloth_rs::{device, recipe::{Event, TrainConfig, train}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Another thread, or a signal, may set it: the run then saves a checkpoint and ends.
//! let stop = AtomicBool::new(false);
//! let config = TrainConfig {
//!     batch_size: 4,
//!     ..TrainConfig::new("Llama-3.2-1B".into(), vec!["tokens.jsonl".into()], "out".into())
//! };
//! let mut on_event = |event| {
//!     if let Event::Step(record) = event {
//!         println!("{}: {}", record.step, record.loss);
//!     }
//! };
//! let summary = train(&device("cpu")?, &config, &mut on_event, &stop)?;
//! println!("{} tokens in {:?}", summary.tokens, summary.elapsed);
//! # Ok(())
//! # }
//! ```
//!
//! What such a run would hold, by running it on a [device that computes nothing](plan) but memory, and the longest sequences that
//! 12 GiB have room for:
//!
//! ```no_run
//! use unsloth_rs::{Category, device, recipe::{Planner, TrainConfig}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let planner = Planner::of(&device("cpu")?);
//! let run = TrainConfig::new("Llama-3.2-1B".into(), vec![], "out".into());
//! let run = TrainConfig { batch_size: 4, max_seq_len: Some(2048), ..run };
//! let usage = planner.plan(&run)?.usage;
//! println!("{} bytes, {} of them activations", usage.total_peak_bytes(), usage.at_peak(Category::Activations));
//! println!("{:?} tokens", planner.largest_seq_len(&run, 12 << 30)?);
//! # Ok(())
//! # }
//! ```

pub use unsloth_autograd as autograd;
pub use unsloth_core as core;
pub use unsloth_core::{ByteSize, Category, DType, Device, DeviceInfo, DeviceName, Error, Result, Shape, Tensor};
pub use unsloth_cpu as cpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub use unsloth_cube as cube;
pub use unsloth_exact as exact;
pub use unsloth_llm as llm;
pub use unsloth_llm::recipe;
pub use unsloth_memory as memory;
pub use unsloth_plan as plan;
pub use unsloth_train as train;

/// The device of this name, with default options: `cpu`; with cargo feature `wgpu` also `vulkan:N` and `wgpu`, with `cuda` also
/// `cuda:N`.
///
/// # Errors
/// [`Error::InvalidSpec`] for any other name, a device that this build or this machine lacks; [`Error::Launch`] for one that does
/// not open.
pub fn device(name: &str) -> Result<Device> {
    match name.parse()? {
        DeviceName::Cpu => Ok(cpu::device()),
        #[cfg(feature = "wgpu")]
        DeviceName::Vulkan(index) => cube::vulkan(index, cube::CubeOptions::default()),
        #[cfg(feature = "wgpu")]
        DeviceName::Wgpu => cube::wgpu(cube::CubeOptions::default()),
        #[cfg(feature = "cuda")]
        DeviceName::Cuda(index) => cube::cuda(index, cube::CubeOptions::default()),
        #[cfg(not(all(feature = "wgpu", feature = "cuda")))]
        missing => Err(Error::InvalidSpec {
            op: "device",
            field: "name",
            value: missing.to_string(),
            rule: if cfg!(feature = "wgpu") {
                "cpu, vulkan:N or wgpu in this build; cargo build --features cuda adds cuda:N"
            } else if cfg!(feature = "cuda") {
                "cpu or cuda:N in this build; cargo build --features wgpu adds vulkan:N and wgpu"
            } else {
                "cpu in this build; cargo build --features wgpu,cuda adds vulkan:N, wgpu and cuda:N"
            },
        }),
    }
}
