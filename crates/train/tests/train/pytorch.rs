//! A run against PyTorch 2.15 (CPU). `pytorch.py` in this folder made the constants.

use unsloth_train::{StepMetrics, Trainer, evaluate};

use crate::model::{TINY, TinyModel, config, micro_batches};

const LOSSES: [f64; 20] = [
    3.4080071449279785,
    2.9300992488861084,
    3.5296630859375,
    4.015353679656982,
    3.627739429473877,
    3.0563852787017822,
    2.7305731773376465,
    2.4936344623565674,
    2.7409322261810303,
    2.8415298461914062,
    2.98987078666687,
    2.6675727367401123,
    2.2675676345825195,
    2.4587743282318115,
    2.510998010635376,
    2.7674403190612793,
    2.8557474613189697,
    2.4451308250427246,
    2.449587106704712,
    2.4356207847595215,
];
/// Before clipping to 0.8; step 13 stays below it.
const GRAD_NORMS: [f64; 20] = [
    1.794069528579712,
    1.2531524896621704,
    1.3965721130371094,
    1.9048349857330322,
    1.8571176528930664,
    1.102316975593567,
    1.202756643295288,
    0.9552454948425293,
    1.4016495943069458,
    1.5580077171325684,
    1.0773733854293823,
    0.9685375094413757,
    0.7039461731910706,
    0.9618427157402039,
    1.2962799072265625,
    0.9877308011054993,
    1.0274649858474731,
    0.9142104387283325,
    0.9202976226806641,
    0.9776089191436768,
];
/// After the run: the first four elements of each parameter, and the sum of squares of all.
const PARAMETERS: [(&str, [f64; 4], f64); 5] = [
    ("table", [0.4304421842098236, 0.5224735140800476, 0.33480599522590637, 0.010571206919848919], 11.182074427204572),
    (
        "linear.lora_A.weight",
        [-0.20840688049793243, 0.3205033242702484, 0.6242711544036865, 0.6725578308105469],
        3.485629521958812,
    ),
    (
        "linear.lora_B.weight",
        [0.2544189691543579, 0.2797376811504364, 0.2668812870979309, 0.21281233429908752],
        0.4226361855507094,
    ),
    ("norm", [0.7641894221305847, 0.8157680630683899, 0.8330093622207642, 0.8998764753341675], 4.401979321333933),
    ("head", [0.33018192648887634, 0.2785080075263977, -0.022420110180974007, -0.27979445457458496], 4.345336170084601),
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
