//! Low-rank adapters as they begin.

use unsloth_autograd::{Matrix, Parameter, Tape, Var, Vector};
use unsloth_core::{Category, Device};
use unsloth_train::{Error, Linear, LoraConfig};

const CONFIG: LoraConfig = LoraConfig::new(16, 8.0);

fn linear(device: &Device, out_features: usize, in_features: usize) -> Linear {
    let values: Vec<f32> = (0..out_features * in_features).map(|i| (0.3 * i as f32).sin()).collect();
    let weight = device.from_slice(&values, [out_features, in_features], Category::Weights).unwrap();
    Linear::new("layers.3.q_proj", Matrix::Frozen(device.prepare_weight(weight).unwrap()), None)
}

fn initial_a(seed: u64, index: u32) -> Vec<f32> {
    let mut layer = linear(&unsloth_cpu::device(), 32, 512);
    layer.add_adapter(&CONFIG, seed, index).unwrap();
    layer.adapter.unwrap().lora_a.value().to_vec().unwrap()
}

#[test]
fn a_is_uniform_with_the_bound_of_peft() {
    let a = initial_a(1, 2);
    let (n, bound) = (a.len() as f64, 1.0 / 512f64.sqrt());
    assert_eq!(a.len(), 16 * 512);
    assert!(a.iter().all(|&v| f64::from(v).abs() <= bound));
    let mean = a.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let deviation = bound / 3f64.sqrt();
    assert!(mean.abs() < 4.0 * deviation / n.sqrt(), "mean {mean}");
    let variance = a.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
    // The variance of u^2 for u uniform in (-1, 1) is 4/45: four standard errors.
    let limit = 4.0 * (4.0 / 45.0 / n).sqrt() * bound * bound;
    assert!((variance - deviation * deviation).abs() < limit, "variance {variance}");
    let largest = a.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
    assert!(f64::from(largest) > 0.99 * bound, "largest {largest}");
}

#[test]
fn a_depends_on_seed_and_index_alone() {
    let a = initial_a(1, 2);
    assert!(a == initial_a(1, 2));
    for other in [initial_a(2, 2), initial_a(1, 3), initial_a(1 << 32 | 1, 2)] {
        let equal = a.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!(equal < 8, "{equal} of {} elements are equal", a.len());
    }
    let mut rows = a.chunks(512);
    let first = rows.next().unwrap();
    assert!(rows.all(|row| row != first), "rows differ");
}

#[test]
fn a_fresh_adapter_changes_nothing() {
    let device = unsloth_cpu::device();
    let mut layer = linear(&device, 24, 40);
    let x: Vec<f32> = (0..5 * 40).map(|i| (0.11 * i as f32).cos()).collect();
    let x = Var::constant(device.from_slice(&x, [5, 40], Category::Activations).unwrap());
    let y = |layer: &Linear| layer.forward(&Tape::inference(), &x, None).unwrap().tensor().to_vec::<f32>().unwrap();
    let base = y(&layer);
    layer.add_adapter(&CONFIG, 0, 0).unwrap();
    let adapter = layer.adapter.clone().unwrap();
    assert!(adapter.lora_b.value().to_vec::<f32>().unwrap().iter().all(|&b| b == 0.0));
    assert_eq!(adapter.config.scale(), 0.5);
    let adapted = y(&layer);
    let largest = base.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
    for (base, adapted) in base.iter().zip(&adapted) {
        assert!((base - adapted).abs() <= 4.0 * f32::EPSILON * largest, "{adapted} instead of {base}");
    }
    let b = vec![0.5f32; 24 * 16];
    adapter.lora_b.update(|tensor| tensor.write(&b)).unwrap();
    assert!(y(&layer).iter().zip(&base).any(|(y, base)| (y - base).abs() > 1e-2 * largest), "the adapter is used");
}

#[test]
fn parameters_are_what_is_not_frozen() {
    let device = unsloth_cpu::device();
    let names = |layer: &Linear| layer.parameters().iter().map(|p| p.name().to_owned()).collect::<Vec<_>>();
    let mut layer = linear(&device, 24, 40);
    assert_eq!((layer.out_features(), layer.in_features()), (24, 40));
    assert!(names(&layer).is_empty());
    layer.add_adapter(&CONFIG, 0, 0).unwrap();
    assert_eq!(names(&layer), ["layers.3.q_proj.lora_A.weight", "layers.3.q_proj.lora_B.weight"]);
    let zeros = |shape: [usize; 1]| device.from_slice(&vec![0.0f32; shape[0]], shape, Category::Weights).unwrap();
    let weight = Parameter::new("w", zeros([12]).reshape([3, 4]).unwrap());
    let bias = Parameter::new("b", zeros([3]));
    let layer = Linear::new("full", Matrix::Trainable(weight), Some(Vector::Trainable(bias)));
    assert_eq!((layer.out_features(), layer.in_features()), (3, 4));
    assert_eq!(names(&layer), ["w", "b"]);
}

#[test]
fn rejects_bad_adapters() {
    let device = unsloth_cpu::device();
    for (rank, out_features, in_features) in [(0, 24, 40), (25, 24, 40), (9, 24, 8)] {
        let mut layer = linear(&device, out_features, in_features);
        let error = layer.add_adapter(&LoraConfig::new(rank, 1.0), 0, 0).unwrap_err();
        let max_rank = out_features.min(in_features);
        assert_eq!(error.to_string(), format!("layers.3.q_proj: rank = {rank}, must be 1 to {max_rank}"));
        assert!(layer.adapter.is_none());
    }
    let mut layer = linear(&device, 24, 40);
    let error = layer.add_adapter(&LoraConfig::new(2, f32::NAN), 0, 0).unwrap_err();
    assert_eq!(error.to_string(), "alpha = NaN, must be finite");
    layer.add_adapter(&LoraConfig::new(24, 1.0), 0, 0).unwrap();
    let error = layer.add_adapter(&CONFIG, 0, 0).unwrap_err();
    assert!(matches!(error, Error::AdapterExists { .. }), "{error}");
    assert_eq!(LoraConfig::new(0, 1.0).validate().unwrap_err().to_string(), "rank = 0, must be at least 1");
}
