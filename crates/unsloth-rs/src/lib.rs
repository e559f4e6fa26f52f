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
//! What such a run would hold, by running it on a [device that computes nothing](plan) but memory:
//!
//! ```no_run
//! use unsloth_rs::{Category, Device, plan::{PlanBackend, PlanOptions}, recipe::{PlanConfig, plan}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::new(PlanBackend::new(PlanOptions::default())?);
//! let usage = plan(&device, &PlanConfig { batch_size: 4, ..PlanConfig::new("Llama-3.2-1B".into(), 2048) })?;
//! println!("{} bytes, {} of them activations", usage.total_peak_bytes(), usage.at_peak(Category::Activations));
//! # Ok(())
//! # }
//! ```

pub use unsloth_autograd as autograd;
pub use unsloth_core as core;
pub use unsloth_core::{Category, DType, Device, Error, Result, Shape, Tensor};
pub use unsloth_cpu as cpu;
pub use unsloth_llm as llm;
pub use unsloth_llm::recipe;
pub use unsloth_memory as memory;
pub use unsloth_plan as plan;
pub use unsloth_train as train;

/// The device of this name, with default options. This build has `cpu`.
///
/// # Errors
/// [`Error::InvalidSpec`] for any other name.
pub fn device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(cpu::device()),
        _ => Err(Error::InvalidSpec {
            op: "device",
            field: "name",
            value: name.to_owned(),
            rule: "cpu, the one device of this build",
        }),
    }
}
