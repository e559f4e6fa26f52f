//! Gradients of every golden checkpoint, held to f64 and to central differences; and a backend with a wrong one is caught.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::{Path, PathBuf};

use unsloth_rs::{
    Device, cpu,
    cpu::{CpuBackend, CpuOptions},
    exact,
    recipe::{CheckGradConfig, GradientReport, Reference, check_grad},
};
use unsloth_testkit::mutant::{MutantBackend, Mutation};

fn fixture(path: &str) -> PathBuf {
    Path::new("../llm/tests/fixtures").join(path)
}

fn reference() -> Reference {
    Reference { device: exact::device(), values: exact::values, set_values: exact::set_values }
}

fn check(device: &Device, model: &str, adapter: Option<&str>) -> GradientReport {
    let folder = fixture(&format!("{model}/model"));
    let config = CheckGradConfig { adapter: adapter.map(fixture), num_tokens: 6, ..CheckGradConfig::new(folder) };
    check_grad(device, &reference(), &config, &mut |_, _| {}).unwrap()
}

fn passes(model: &str, adapter: Option<&str>) {
    let report = check(&cpu::device(), model, adapter);
    let worst = &report.gradients[0];
    assert_eq!(report.num_wrong, 0, "{worst:?}");
    assert!((report.loss - report.exact_loss).abs() <= 1e-5 * report.exact_loss, "{report:?}");
    // The comparisons are with something: the gradients are not all nothing.
    assert!(report.gradients.iter().any(|found| found.largest > 1e-3 && found.difference > 0.0), "{worst:?}");
}

macro_rules! checkpoints {
    ($($test:ident $model:literal),* $(,)?) => {$(
        mod $test {
            #[test]
            fn every_weight() { super::passes($model, None); }
            #[test]
            fn adapter() { super::passes($model, Some(concat!($model, "/adapter"))); }
        }
    )*};
}

checkpoints!(
    tiny_llama "tiny-llama", tiny_llama3 "tiny-llama3", tiny_qwen2 "tiny-qwen2", tiny_qwen3 "tiny-qwen3",
    tiny_mistral "tiny-mistral", tiny_gemma2 "tiny-gemma2", tiny_gemma3 "tiny-gemma3",
    shapes_llama "shapes/llama", shapes_mistral "shapes/mistral", shapes_qwen2 "shapes/qwen2",
    shapes_qwen3 "shapes/qwen3", shapes_gemma2 "shapes/gemma2", shapes_gemma3 "shapes/gemma3",
);

#[test]
fn adapters_of_every_kind() {
    for (kind, model) in [("bias_all", "shapes/llama"), ("modules", "shapes/qwen3"), ("pissa", "shapes/llama")] {
        passes(model, Some(&format!("adapters/{kind}")));
    }
    passes("shapes/llama", Some("adapters/dora"));
    // The gradient takes a length for a constant that a central difference would change.
    let report = check(&cpu::device(), "shapes/llama", Some("adapters/dora"));
    for found in &report.gradients {
        let is_matrix = found.name.contains("lora_A") || found.name.contains("lora_B");
        assert_eq!(found.numeric_difference.is_none(), is_matrix, "{}", found.name);
    }
}

/// Faults of the backward pass alone: no loss differs, every one is found.
#[test]
fn wrong_gradients_are_caught_and_named() {
    let faults = [
        (Mutation::NormDropsProjection, None),
        (Mutation::RopeGradientRotatesForward, None),
        (Mutation::AttentionDropsRowTerm, None),
        (Mutation::GluDerivativeIsActivation, None),
        (Mutation::LinearTransposesWeightGradient, None),
        (Mutation::LinearLossTransposesDx, None),
        (Mutation::LoraDropsUpdateInDx, Some("tiny-llama/adapter")),
        (Mutation::LoraDropsGradientOfB, Some("tiny-llama/adapter")),
    ];
    for (fault, adapter) in faults {
        let backend = CpuBackend::new(CpuOptions::default()).unwrap();
        let report = check(&Device::new(MutantBackend::new(backend, Some(fault))), "tiny-llama", adapter);
        let worst = &report.gradients[0];
        assert!(report.num_wrong > 0 && worst.difference > 1e-2, "{fault:?}: {worst:?}");
        assert!(
            (report.loss - report.exact_loss).abs() <= 1e-5 * report.exact_loss,
            "{fault:?} is in the forward pass"
        );
        assert!(report.gradients.iter().all(|found| found.numeric_difference.unwrap() <= 1e-4), "{fault:?}");
    }
}

/// A fault of both devices: only the central differences see it.
#[test]
fn a_wrong_reference_is_caught_by_central_differences() {
    let wrong = || Device::new(MutantBackend::new(exact::ExactBackend::new(), Some(Mutation::NormDropsProjection)));
    let reference = Reference { device: wrong(), ..reference() };
    let config = CheckGradConfig { num_tokens: 8, ..CheckGradConfig::new(fixture("shapes/llama/model")) };
    let report = check_grad(&wrong(), &reference, &config, &mut |_, _| {}).unwrap();
    assert!(report.num_wrong > 0, "{:?}", report.gradients[0]);
    assert!(report.gradients.iter().all(|found| found.difference <= 1e-3), "{:?}", report.gradients[0]);
}
