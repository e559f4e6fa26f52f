//! A run against PyTorch 2.15 (CPU). `pytorch.py` in this folder made the constants.

use unsloth_train::{StepMetrics, Trainer, evaluate};

use crate::model::{TINY, TinyModel, config, micro_batches};

const LOSSES: [f32; 20] = [
    3.408_007_1,
    2.930_099_2,
    3.528_502_2,
    4.011_091_2,
    3.620_780_7,
    3.049_773_2,
    2.724_806_5,
    2.489_310_0,
    2.733_952_3,
    2.832_895_5,
    2.977_971_3,
    2.660_115_2,
    2.266_519_8,
    2.455_445_3,
    2.506_476_6,
    2.757_079_1,
    2.843_461_0,
    2.441_443_7,
    2.446_985_7,
    2.432_193_5,
];
/// Before clipping to 0.8; step 13 stays below it.
const GRAD_NORMS: [f32; 20] = [
    1.794_069_5,
    1.253_152_5,
    1.395_701_9,
    1.901_087_8,
    1.848_564_9,
    1.093_817_6,
    1.189_347_5,
    0.943_880_2,
    1.381_640_1,
    1.531_842_0,
    1.058_548_2,
    0.948_690_3,
    0.690_996_5,
    0.942_234_7,
    1.269_489_4,
    0.968_586_4,
    1.005_550_1,
    0.894_554_8,
    0.900_375_2,
    0.956_829_3,
];
/// After the run: the first four elements of each parameter, and the sum of squares of all.
const PARAMETERS: [(&str, [f32; 4], f64); 5] = [
    ("table", [0.430_094_06, 0.522_100_57, 0.335_004_0, 0.010_877_24], 11.175_497_392_531_138),
    ("linear.lora_A.weight", [-0.208_414_06, 0.320_260_38, 0.624_03, 0.672_400_47], 3.483_421_550_000_909_6),
    ("linear.lora_B.weight", [0.254_217_36, 0.279_612_8, 0.266_580_43, 0.212_670_87], 0.422_085_749_567_604_7),
    ("norm", [0.748_046_1, 0.798_613_67, 0.814_545_7, 0.880_292_6], 4.212_693_976_809_959),
    ("head", [0.330_357_16, 0.278_668_97, -0.022_428_995, -0.279_843_4], 4.351_306_187_509_82),
];

fn assert_close(what: &str, actual: f64, expected: f64, tolerance: f64) {
    let difference = (actual - expected).abs();
    assert!(difference <= tolerance, "{what}: {actual} instead of {expected}, off by {difference:e}");
}

#[test]
fn twenty_steps_as_pytorch() {
    let device = unsloth_cpu::device();
    let mut trainer = Trainer::new(TinyModel::new(&device, TINY), config()).unwrap();
    let mut metrics: Vec<StepMetrics> = Vec::new();
    for step in 0..20 {
        metrics.extend(trainer.step(&micro_batches(&device, step, 2)).unwrap());
        assert_eq!(metrics.len(), step, "metrics come one step late");
    }
    metrics.extend(trainer.finish().unwrap());
    assert_eq!(metrics.len(), 20);
    assert_eq!(trainer.finish().unwrap(), None, "nothing is left to drain");
    for (i, step) in metrics.iter().enumerate() {
        assert_eq!(step.step, i + 1);
        assert_eq!(step.learning_rate, config().schedule.rate(i));
        let batches = micro_batches(&device, i, 2);
        assert_eq!(step.num_tokens, batches.iter().map(|b| b.num_tokens()).sum::<usize>());
        assert_eq!(step.num_targets, batches.iter().map(|b| b.num_targets).sum::<usize>());
        // 1e-5 is some 30 roundings of a loss near 3; both sides sum in f32 in another order.
        assert_close(&format!("loss of step {}", i + 1), step.loss.into(), LOSSES[i].into(), 1e-5);
        assert_close(&format!("norm of step {}", i + 1), step.grad_norm.into(), GRAD_NORMS[i].into(), 2e-5);
    }
    for (name, first, squares) in PARAMETERS {
        let value = trainer.model().parameter(name).value().to_vec::<f32>().unwrap();
        for (&actual, expected) in value.iter().zip(first) {
            assert_close(name, actual.into(), expected.into(), 1e-5);
        }
        let actual = value.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
        assert_close(name, actual, squares, 1e-5 * squares);
    }
}

#[test]
fn evaluation_is_the_loss_of_the_next_step() {
    let device = unsloth_cpu::device();
    let model = TinyModel::new(&device, TINY);
    let before = model.snapshot();
    let loss = evaluate(&model, &micro_batches(&device, 0, 2)).unwrap();
    assert_close("evaluation", loss.into(), LOSSES[0].into(), 1e-6);
    assert!(model.snapshot() == before, "an evaluation changes nothing");
}
