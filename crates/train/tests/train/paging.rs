//! What an optimiser keeps, outside of the device's memory between steps.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use unsloth_autograd::GradStore;
use unsloth_core::{Category, Device, Error, Place, Result, StoreUsage, StoredTensor, Tensor, TensorStore};
use unsloth_train::{
    AdamWConfig, Model, Optimizer, OptimizerConfig, OptimizerKind, Paging, Rates, Role, Trainer, TrainerConfig,
};

use crate::{
    model::{TINY, TinyModel, config, micro_batches},
    resume::{LARGER, goes_on, run, saved},
};

/// The scalars of a step, which stay on the device.
const SCALARS: u64 = 256;

fn kept(device: &Device) -> u64 {
    device.usage().live_bytes[Category::Optimiser.index()]
}

/// A trainer, of bf16 parameters that are rounded at random or of f32.
fn trainer(
    device: &Device,
    (optimizer, rounded): (OptimizerConfig, bool),
    paging: Option<Paging>,
) -> Trainer<TinyModel> {
    let model = TinyModel::new(device, LARGER);
    let model = if rounded { model.in_bf16() } else { model };
    let config = TrainerConfig { optimizer, stochastic_rounding: rounded, ..config() };
    Trainer::with_paging(model, config, paging).unwrap()
}

/// A table, two adapters, a norm and a head: adapter `B` and norm are brought together, all others alone.
const SMALL_GROUPS: usize = 1200;

#[test]
fn every_optimiser_has_the_same_bits_and_leaves_the_device_free() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Place::Disk { folder: folder.path().to_owned() };
    for (place, group_bytes) in [(Place::Host, Some(SMALL_GROUPS)), (disk, None)] {
        for kind in OptimizerKind::ALL {
            for rounded in [false, true] {
                let (device, other) = (unsloth_cpu::device(), unsloth_cpu::device());
                let (what, options) =
                    (format!("{kind} in {place:?}, rounded: {rounded}"), (kind.with_defaults(), rounded));
                let elsewhere = || {
                    let paging = Paging::new(other.store(&place).unwrap());
                    let group_bytes = group_bytes.unwrap_or(paging.group_bytes);
                    trainer(&other, options, Some(Paging { group_bytes, ..paging }))
                };
                let (mut here, mut away) = (trainer(&device, options, None), elsewhere());
                assert_eq!(run(&mut here, 0..5), run(&mut away, 0..5), "{what}");
                assert!(saved(&here) == saved(&away), "{what}");
                assert_eq!(kept(&other), SCALARS, "{what}: what was read is elsewhere again");
                let usage = away.optimizer().paging().unwrap().store.usage();
                assert_eq!(usage.live_bytes, kept(&device) - SCALARS, "{what}");
                let most = other.usage().peak_bytes[Category::Optimiser.index()];
                assert!(group_bytes.is_none() || most < kept(&device), "{what}: {most} bytes at once");
                drop(away);
                goes_on(&what, elsewhere);
            }
        }
    }
}

/// A store that can be full, and can lose what it has.
struct Flaky {
    store: Arc<dyn TensorStore>,
    is_full: AtomicBool,
    is_gone: Arc<AtomicBool>,
}

struct InFlaky {
    stored: Box<dyn StoredTensor>,
    is_gone: Arc<AtomicBool>,
}

fn failed<T>(action: &'static str) -> Result<T> {
    Err(Error::Storage { action, folder: "flaky".into(), source: std::io::Error::other("made to fail") })
}

impl TensorStore for Flaky {
    fn put(&self, tensor: &Tensor) -> Result<Box<dyn StoredTensor>> {
        if self.is_full.load(Relaxed) {
            return failed("write");
        }
        Ok(Box::new(InFlaky { stored: self.store.put(tensor)?, is_gone: self.is_gone.clone() }))
    }

    fn usage(&self) -> StoreUsage {
        self.store.usage()
    }
}

impl StoredTensor for InFlaky {
    fn take(self: Box<Self>) -> Result<Tensor> {
        if self.is_gone.load(Relaxed) { failed("read") } else { self.stored.take() }
    }
}

/// A step that cannot put back what it has changed keeps it; one that does not get it back is the last.
#[test]
fn a_store_that_fails_stops_the_step_and_nothing_is_made_up() {
    let device = unsloth_cpu::device();
    let parameters = TinyModel::new(&device, TINY).parameters();
    let gradients = GradStore::new(&parameters).unwrap();
    let parameters: Vec<_> = parameters.into_iter().map(|parameter| (parameter, Role::Weight)).collect();
    let store = device.store(&Place::Host).unwrap();
    let store = Arc::new(Flaky { store, is_full: false.into(), is_gone: Arc::default() });
    let paging = Some(Paging::new(store.clone()));
    let mut optimizer = Optimizer::with_paging(&device, &parameters, AdamWConfig::default().into(), paging).unwrap();
    let mut step = |index| optimizer.step(&gradients, Rates::same(1e-3), index).map_err(|error| error.to_string());
    step(0).unwrap();
    assert_eq!(kept(&device), SCALARS);

    store.is_full.store(true, Relaxed);
    assert_eq!(step(1), Err("cannot write a temporary file in `flaky`".to_owned()));
    assert!(kept(&device) > SCALARS);
    store.is_full.store(false, Relaxed);
    step(2).unwrap();
    assert_eq!(kept(&device), SCALARS);

    store.is_gone.store(true, Relaxed);
    assert_eq!(step(3), Err("cannot read a temporary file in `flaky`".to_owned()));
    store.is_gone.store(false, Relaxed);
    let lost = "optimizer: state = m, must be in its store: a later step has taken it, or an earlier failure";
    assert_eq!(step(4), Err(lost.to_owned()));
}

#[test]
fn state_that_is_read_too_late_is_refused() {
    let device = unsloth_cpu::device();
    let paging = Paging::new(device.store(&Place::Host).unwrap());
    let mut trainer = trainer(&device, (AdamWConfig::default().into(), false), Some(paging));
    let state = trainer.state().unwrap();
    let moment = state.into_iter().find(|state| state.part == "m").unwrap();
    assert!(moment.tensor().unwrap().to_vec::<f32>().unwrap().iter().all(|value| *value == 0.0));
    trainer.step(&micro_batches(&device, 0, 2)).unwrap();
    let message = moment.tensor().unwrap_err().to_string();
    assert!(message.contains("a later step has taken it"), "{message}");
}
