//! A run against PyTorch 2.15 (CPU). `pytorch.py` in this folder made the constants.

use unsloth_train::{StepMetrics, Trainer, evaluate};

use crate::model::{TINY, TinyModel, config, micro_batches};

const LOSSES: [f64; 20] = [
    3.4080071449279785,
    2.9300992488861084,
    3.5285022258758545,
    4.011091232299805,
    3.6207807064056396,
    3.0497732162475586,
    2.724806547164917,
    2.4893100261688232,
    2.733952283859253,
    2.832895517349243,
    2.977971315383911,
    2.6601152420043945,
    2.266519784927368,
    2.4554452896118164,
    2.506476640701294,
    2.7570791244506836,
    2.843461036682129,
    2.441443681716919,
    2.4469857215881348,
    2.4321935176849365,
];
/// Before clipping to 0.8; step 13 stays below it.
const GRAD_NORMS: [f64; 20] = [
    1.794069528579712,
    1.2531524896621704,
    1.3957018852233887,
    1.901087760925293,
    1.848564863204956,
    1.0938175916671753,
    1.189347505569458,
    0.9438802003860474,
    1.381640076637268,
    1.5318419933319092,
    1.0585482120513916,
    0.9486902952194214,
    0.6909964680671692,
    0.9422346949577332,
    1.2694894075393677,
    0.9685864448547363,
    1.0055501461029053,
    0.8945547938346863,
    0.900375247001648,
    0.956829309463501,
];
/// After the run: the first four elements of each parameter, and the sum of squares of all.
const PARAMETERS: [(&str, [f64; 4], f64); 5] = [
    ("table", [0.43009406328201294, 0.522100567817688, 0.3350040018558502, 0.01087724044919014], 11.175497392531138),
    (
        "linear.lora_A.weight",
        [-0.20841406285762787, 0.3202603757381439, 0.6240299940109253, 0.6724004745483398],
        3.4834215500009096,
    ),
    (
        "linear.lora_B.weight",
        [0.25421735644340515, 0.27961280941963196, 0.2665804326534271, 0.21267086267471313],
        0.4220857495676047,
    ),
    ("norm", [0.7480461001396179, 0.7986136674880981, 0.8145456910133362, 0.8802925944328308], 4.212693976809959),
    ("head", [0.330357164144516, 0.27866896986961365, -0.02242899499833584, -0.27984338998794556], 4.35130618750982),
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
        assert_close(&format!("loss of step {}", i + 1), step.loss.into(), LOSSES[i], 1e-5);
        assert_close(&format!("norm of step {}", i + 1), step.grad_norm.into(), GRAD_NORMS[i], 2e-5);
    }
    for (name, first, squares) in PARAMETERS {
        let value = trainer.model().parameter(name).value().to_vec::<f32>().unwrap();
        for (&actual, expected) in value.iter().zip(first) {
            assert_close(name, actual.into(), expected, 1e-5);
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
    assert_close("evaluation", loss.into(), LOSSES[0], 1e-6);
    assert!(model.snapshot() == before, "an evaluation changes nothing");
}
