//! Steps that fail: what is reported, and what is kept.

use std::error::Error as _;

use unsloth_autograd::{Parameter, Tape, Var};
use unsloth_core::{Device, Result, ops::cross_entropy::LossSpec};
use unsloth_train::{Batch, Document, Error, Model, Trainer, evaluate};

use crate::model::{TINY, TinyModel, constant, micro_batches};

/// Runs `count` good steps.
fn trained(device: &Device, count: usize) -> Trainer<TinyModel> {
    let mut trainer = Trainer::new(TinyModel::new(device, TINY), constant(1e-2)).unwrap();
    for step in 0..count {
        trainer.step(&micro_batches(device, step, 2)).unwrap();
    }
    trainer
}

/// Sets the first weight of the norm, and returns what it was.
fn set_norm(trainer: &Trainer<TinyModel>, value: f32) -> f32 {
    let set = |tensor: &mut unsloth_core::Tensor| {
        let mut values = tensor.to_vec::<f32>()?;
        let before = std::mem::replace(&mut values[0], value);
        tensor.write(&values)?;
        Ok(before)
    };
    trainer.model().parameter("norm").update(set).unwrap()
}

#[test]
fn a_step_that_is_not_finite_keeps_the_last_good_state() {
    let device = unsloth_cpu::device();
    for poison in [f32::INFINITY, f32::NAN] {
        let mut trainer = trained(&device, 3);
        let good = trainer.model().snapshot();
        let head = trainer.model().parameter("head");
        let moments = |trainer: &Trainer<TinyModel>| {
            let [m, v] = ["m", "v"].map(|name| trainer.optimizer().part(&head, name).unwrap());
            (m.to_vec::<f32>().unwrap(), v.to_vec::<f32>().unwrap())
        };
        let good_moments = moments(&trainer);

        let before = set_norm(&trainer, poison);
        let third = trainer.step(&micro_batches(&device, 3, 2)).unwrap().unwrap();
        assert_eq!(third.step, 3);
        set_norm(&trainer, before);
        assert!(trainer.model().snapshot() == good, "step 4 changed a parameter");

        // Its own gradients are finite, but the trainer has not seen yet that step 4 failed.
        let error = trainer.step(&micro_batches(&device, 4, 2)).unwrap_err();
        let Error::NonFinite { step: 4, loss, grad_norm, origin: None } = error else {
            panic!("step 4 is to blame: {error}");
        };
        assert!(!(loss.is_finite() && grad_norm.is_finite()), "{loss}, {grad_norm}");
        assert!(error.to_string().starts_with("step 4: loss "), "{error}");
        assert!(trainer.model().snapshot() == good, "step 5 changed a parameter");
        assert!(moments(&trainer) == good_moments, "moments changed");

        let error = trainer.step(&micro_batches(&device, 5, 2)).unwrap_err();
        assert!(matches!(error, Error::Stopped { step: 4 }), "{error}");
        assert!(matches!(trainer.finish().unwrap_err(), Error::Stopped { step: 4 }));
        assert!(trainer.model().snapshot() == good, "a refused step changed a parameter");
    }
}

#[test]
fn the_last_step_is_checked_by_finish() {
    let device = unsloth_cpu::device();
    let mut trainer = trained(&device, 1);
    let good = trainer.model().snapshot();
    let before = set_norm(&trainer, f32::INFINITY);
    trainer.step(&micro_batches(&device, 1, 2)).unwrap();
    assert!(matches!(trainer.finish().unwrap_err(), Error::NonFinite { step: 2, .. }));
    assert!(matches!(trainer.finish().unwrap_err(), Error::Stopped { step: 2 }));
    set_norm(&trainer, before);
    assert!(trainer.model().snapshot() == good);
}

#[test]
fn a_failed_operator_stops_the_trainer() {
    let device = unsloth_cpu::device();
    let mut trainer = trained(&device, 2);
    let good = trainer.model().snapshot();
    let beyond = TINY.vocab_size as i32;
    let bad = Batch::new(&device, &[Document { ids: &[1, beyond], targets: &[2, 3] }]).unwrap();
    let error = trainer.step(&[bad]).unwrap_err();
    assert!(matches!(error, Error::Step { step: 3, .. }), "{error}");
    assert_eq!(error.to_string(), "step 3 failed");
    assert!(error.source().unwrap().to_string().contains("embedding"), "{:?}", error.source());
    let error = trainer.step(&micro_batches(&device, 2, 2)).unwrap_err();
    assert_eq!(error.to_string(), "training stopped with an error at step 3; the trainer takes no more steps");
    assert_eq!(trainer.finish().unwrap().unwrap().step, 2, "the step before can still be read");
    assert!(trainer.model().snapshot() == good);
}

#[test]
fn a_step_without_targets_is_refused_and_nothing_is_lost() {
    let device = unsloth_cpu::device();
    let mut trainer = trained(&device, 1);
    let masked = Batch::new(&device, &[Document { ids: &[1, 2], targets: &[-100, -100] }]).unwrap();
    assert_eq!(masked.num_targets, 0);
    for batches in [&[][..], std::slice::from_ref(&masked)] {
        let error = trainer.step(batches).unwrap_err();
        assert_eq!(error.to_string(), "step 2: no token has a target");
    }
    assert_eq!(trainer.step(&micro_batches(&device, 1, 4)).unwrap().unwrap().step, 1);
    assert_eq!(trainer.finish().unwrap().unwrap().step, 2);
    assert!(matches!(evaluate(trainer.model(), &[masked]), Err(Error::NothingToEvaluate)));
}

#[test]
fn documents_must_have_a_target_per_id() {
    let device = unsloth_cpu::device();
    let good = Document { ids: &[1, 2], targets: &[2, -100] };
    let short = Document { ids: &[1, 2, 3], targets: &[2, 3] };
    let error = Batch::new(&device, &[good, short]).unwrap_err();
    assert_eq!(error.to_string(), "document 1: 2 targets for 3 ids");
    assert!(matches!(Batch::new(&device, &[]), Err(Error::EmptyBatch { num_documents: 0 })));
    let empty = Document { ids: &[], targets: &[] };
    assert!(matches!(Batch::new(&device, &[empty]), Err(Error::EmptyBatch { num_documents: 1 })));

    let batch = Batch::new(&device, &[good, empty, Document { ids: &[5, 6, 7], targets: &[6, 7, 8] }]).unwrap();
    assert_eq!(batch.ids.to_vec::<i32>().unwrap(), [1, 2, 5, 6, 7]);
    assert_eq!(batch.targets.to_vec::<i32>().unwrap(), [2, -100, 6, 7, 8]);
    assert_eq!(batch.positions.to_vec::<i32>().unwrap(), [0, 1, 0, 1, 2]);
    assert_eq!(batch.sequences.offsets(), [0, 2, 2, 5]);
    assert_eq!((batch.num_tokens(), batch.num_targets), (5, 4));
}

#[test]
fn a_model_without_parameters_is_refused() {
    struct Frozen(TinyModel);
    impl Model for Frozen {
        fn loss(&self, tape: &Tape, batch: &Batch, loss: LossSpec) -> Result<Var> {
            self.0.loss(tape, batch, loss)
        }
        fn parameters(&self) -> Vec<Parameter> {
            Vec::new()
        }
        fn device(&self) -> &Device {
            self.0.device()
        }
    }
    let model = Frozen(TinyModel::new(&unsloth_cpu::device(), TINY));
    let error = Trainer::new(model, constant(1e-2)).err().unwrap();
    assert_eq!(error.to_string(), "parameters = 0, must be at least one parameter to train");
}
