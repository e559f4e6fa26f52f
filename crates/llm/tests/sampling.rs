//! The filters before a draw, against those of transformers.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use serde::Deserialize;
use unsloth_llm::sampler::Sampling;

#[derive(Deserialize)]
struct Expected {
    logits: Vec<f32>,
    cases: Vec<Case>,
}

#[derive(Debug, Deserialize)]
struct Case {
    temperature: f64,
    top_k: Option<usize>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    /// Index and probability, in f32, of every token that is left.
    kept: Vec<(usize, f64)>,
}

#[test]
fn filters_leave_what_transformers_leaves() {
    let expected: Expected = serde_json::from_str(include_str!("fixtures/sampling/expected.json")).unwrap();
    assert_eq!(expected.cases.len(), 81);
    for case in &expected.cases {
        let &Case { temperature, top_k, top_p, min_p, .. } = case;
        let found = Sampling { temperature, top_k, top_p, min_p, seed: 0 }.distribution(&expected.logits).unwrap();
        let indices: Vec<usize> = found.iter().map(|&(index, _)| index).collect();
        let kept: Vec<usize> = case.kept.iter().map(|&(index, _)| index).collect();
        assert_eq!(indices, kept, "{case:?}");
        for (&(index, probability), &(_, reference)) in found.iter().zip(&case.kept) {
            assert!((probability - reference).abs() <= 1e-6, "{index}: {probability} in {case:?}");
        }
    }
}
