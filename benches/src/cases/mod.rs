//! What is timed, an operator a file under the operator's name, and whole steps.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod decode;
pub mod elementwise;
pub mod embedding;
pub mod glu;
pub mod layer_norm;
pub mod linear;
pub mod linear_cross_entropy;
pub mod lora_linear;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod train_step;

use std::path::PathBuf;

use unsloth_rs::DType;

use crate::{
    case::Case,
    models::{LLAMA_3_2_1B, MODELS, ModelShape, QWEN2_5_0_5B},
};

/// Lengths over which it shows how cost grows.
const SEQ_LENS: [usize; 6] = [512, 1024, 2048, 4096, 8192, 16_384];

/// What cases are made of.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Whose shapes, the smallest first.
    pub models: Vec<ModelShape>,
    /// Storage types of activations.
    pub dtypes: Vec<DType>,
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// Tokens that losses over a whole vocabulary are computed for.
    pub loss_tokens: usize,
    /// Lengths of one sequence, for attention.
    pub seq_lens: Vec<usize>,
    /// Lengths of one sequence, for training steps.
    pub step_lens: Vec<usize>,
    /// All lengths of all models; else the smallest alone shows how cost grows far.
    pub all_lens: bool,
    /// All projections and calls rather than those that take longest.
    pub all_calls: bool,
    /// A Hugging Face folder to train and decode instead of models of two layers that are written for the purpose.
    pub folder: Option<PathBuf>,
}

impl Selection {
    /// The smallest model, in a few minutes on two cores.
    pub fn quick(dtypes: Vec<DType>) -> Self {
        Self {
            models: vec![QWEN2_5_0_5B],
            dtypes,
            tokens: 512,
            loss_tokens: 128,
            seq_lens: vec![256, 512, 1024],
            step_lens: vec![128, 256, 512],
            all_lens: false,
            all_calls: false,
            folder: None,
        }
    }

    /// Everything, with the tokens of a micro-batch that fits such a processor.
    pub fn full(dtypes: Vec<DType>, tokens: usize) -> Self {
        Self {
            models: MODELS.to_vec(),
            dtypes,
            tokens,
            loss_tokens: tokens.min(1024),
            seq_lens: SEQ_LENS.to_vec(),
            step_lens: SEQ_LENS.to_vec(),
            all_lens: false,
            all_calls: true,
            folder: None,
        }
    }

    /// What the criterion benches time.
    pub fn criterion() -> Self {
        Self {
            models: vec![QWEN2_5_0_5B, LLAMA_3_2_1B],
            seq_lens: vec![512, 1024],
            step_lens: vec![512],
            ..Self::quick(vec![DType::F32, DType::BF16])
        }
    }

    /// Those of `lens` for a model: up to `longest` where it is not to show how cost grows.
    fn lens_of(&self, model: &ModelShape, lens: &[usize], longest: usize) -> Vec<usize> {
        let is_whole = self.all_lens || self.models.first() == Some(model);
        lens.iter().copied().filter(|&len| is_whole || len <= longest).collect()
    }

    /// The smallest models: for what depends on the vocabulary or is a model itself.
    fn small_models(&self) -> &[ModelShape] {
        &self.models[..self.models.len().min(2)]
    }
}

type Cases = fn(&Selection) -> Vec<Case>;

/// Every group of cases, under its name.
pub const GROUPS: [(&str, Cases); 15] = [
    ("linear", linear::cases),
    ("lora_linear", lora_linear::cases),
    ("attention", attention::cases),
    ("linear_cross_entropy", linear_cross_entropy::cases),
    ("cross_entropy", cross_entropy::cases),
    ("rms_norm", rms_norm::cases),
    ("layer_norm", layer_norm::cases),
    ("rope", rope::cases),
    ("glu", glu::cases),
    ("embedding", embedding::cases),
    ("elementwise", elementwise::cases),
    ("reduce", reduce::cases),
    ("adamw", adamw::cases),
    ("train_step", train_step::cases),
    ("decode", decode::cases),
];

/// The cases of all models and types that `case` makes one for.
fn each(models: &[ModelShape], dtypes: &[DType], case: impl Fn(ModelShape, DType) -> Vec<Case>) -> Vec<Case> {
    let pairs = models.iter().flat_map(|model| dtypes.iter().map(move |dtype| (*model, *dtype)));
    pairs.flat_map(|(model, dtype)| case(model, dtype)).collect()
}

#[cfg(test)]
mod tests {
    use unsloth_rs::{
        Device,
        cpu::{CpuBackend, CpuOptions},
    };
    use unsloth_testkit::mutant::{MutantBackend, Mutation};

    use super::*;
    use crate::{
        case::{Context, Prepared},
        criterion::once,
        models::TINY,
        recorder::recorded,
    };

    fn tiny() -> Selection {
        Selection {
            models: vec![TINY],
            dtypes: vec![DType::F32, DType::BF16],
            tokens: 33,
            loss_tokens: 9,
            seq_lens: vec![40],
            step_lens: vec![24],
            all_lens: false,
            all_calls: true,
            folder: None,
        }
    }

    fn device(mutation: Option<Mutation>) -> Device {
        Device::new(MutantBackend::new(CpuBackend::new(CpuOptions::default()).unwrap(), mutation))
    }

    /// The cases of a group but for the square product, which is large whatever the model.
    fn cases_of(group: &str) -> Vec<Case> {
        let (_, cases) = GROUPS.into_iter().find(|(name, _)| *name == group).unwrap();
        cases(&tiny()).into_iter().filter(|case| case.id.model != "square").collect()
    }

    #[test]
    fn every_case_passes_its_check_runs_and_has_a_cost() {
        let (device, recording) = recorded(&device(None));
        let context = Context { device: &device, recording: &recording, with_candle: true };
        for (group, _) in GROUPS {
            for case in cases_of(group) {
                let Prepared { mut check, mut run, candle, .. } = case.prepare(&context).unwrap();
                check().unwrap_or_else(|error| panic!("{}: {error:#}", case.id));
                let cost = recording.cost_of(|| once(&mut run).map(drop)).unwrap();
                assert!(cost.bytes() > 0, "{} moves nothing", case.id);
                if let Some(mut candle) = candle {
                    once(&mut candle).unwrap();
                }
            }
        }
    }

    #[test]
    fn what_is_written_over_is_not_copied_first() {
        let (device, recording) = recorded(&device(None));
        let context = Context { device: &device, recording: &recording, with_candle: false };
        let backward = |op: &'static str| (op, "backward");
        let simple = ["add", "mul", "scale", "accumulate"].map(|part| ("elementwise", part));
        let calls = ["rms_norm", "rope", "cross_entropy"].map(backward).into_iter().chain(simple);
        for (group, part) in calls.chain([("glu", "backward silu")]) {
            for case in cases_of(group).into_iter().filter(|case| case.id.part == part) {
                let Prepared { mut run, .. } = case.prepare(&context).unwrap();
                let before = device.usage().total_live_bytes();
                for _ in 0..2 {
                    device.backend().reset_peak();
                    once(&mut run).unwrap();
                    // A row's sums at most: the smallest matrix has more.
                    let extra = device.usage().total_peak_bytes() - before;
                    assert!(extra < 1024, "{} takes {extra} bytes", case.id);
                }
            }
        }
    }

    #[test]
    fn ids_are_different() {
        let all: Vec<Case> = GROUPS.iter().flat_map(|(group, _)| cases_of(group)).collect();
        let ids: std::collections::HashSet<_> = all.iter().map(|case| &case.id).collect();
        assert_eq!(ids.len(), all.len());
    }

    /// Of every model, where by themselves the larger ones have fewer.
    #[test]
    fn lengths_that_are_asked_for_are_the_only_ones() {
        const LEN: usize = 8192;
        let full = Selection::full(vec![DType::F32], 64);
        let asked = Selection { seq_lens: vec![LEN], step_lens: vec![LEN], all_lens: true, ..full };
        let of_part = |cases: Vec<Case>, part: &str| -> Vec<String> {
            cases.into_iter().filter(|case| case.id.part == part).map(|case| case.id.shape).collect()
        };
        for part in ["forward", "backward"] {
            let shapes = of_part(attention::cases(&asked), part);
            assert_eq!(shapes.len(), MODELS.len());
            assert!(shapes.iter().all(|shape| shape.starts_with("8192 x ")), "{shapes:?}");
        }
        let shapes = of_part(train_step::cases(&asked), "lora");
        assert_eq!(shapes.len(), 2 * asked.small_models().len(), "with and without checkpointing");
        assert!(shapes.iter().all(|shape| shape.starts_with("1 x 8192,")), "{shapes:?}");
    }

    #[test]
    fn a_wrong_operator_is_not_timed() {
        for (group, mutation) in [
            ("rms_norm", Mutation::NormScalesDweight),
            ("layer_norm", Mutation::LayerNormDropsBias),
            ("rope", Mutation::RopeFlipsSin),
            ("glu", Mutation::GluSwapsOperands),
            ("attention", Mutation::AttentionNotCausal),
            ("attention", Mutation::AttentionDropsRowTerm),
            ("linear", Mutation::LinearTransposesWeightGradient),
            ("lora_linear", Mutation::LoraBackwardDropsScale),
            ("cross_entropy", Mutation::LossForgetsNumTargets),
            ("linear_cross_entropy", Mutation::LinearLossForgetsNumTargets),
            ("embedding", Mutation::EmbeddingReadsNextRow),
            ("elementwise", Mutation::AddSubtracts),
            ("reduce", Mutation::SumSkipsTail),
            ("adamw", Mutation::AdamwDropsBiasCorrection),
            ("train_step", Mutation::AttentionNotCausal),
            ("decode", Mutation::CachedIgnoresLength),
        ] {
            let (device, recording) = recorded(&device(Some(mutation)));
            let context = Context { device: &device, recording: &recording, with_candle: false };
            let is_caught = cases_of(group).iter().any(|case| match case.prepare(&context) {
                Ok(mut prepared) => (prepared.check)().is_err(),
                Err(_) => true,
            });
            assert!(is_caught, "{group} with {mutation:?} passed");
        }
    }
}
