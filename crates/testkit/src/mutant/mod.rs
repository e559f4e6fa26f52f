//! Backends that are wrong in one way each. A suite has to fail on every one made for it; a suite that passes one of them does
//! not prove what it says.

mod adamw;
mod attention;
mod dora;
mod layer_norm;
mod matrices;
mod memory;
mod rows;
mod updates;

use std::{
    hash::{DefaultHasher, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use unsloth_core::{Device, Result, Tensor};

use crate::{
    data,
    suite::{self, Suite},
};

/// A backend with one fault, or with none: every other call goes to the backend inside.
#[derive(Debug)]
pub struct MutantBackend<B> {
    inner: B,
    mutation: Option<Mutation>,
    reads: Reads,
}

/// A digest of all bytes that the host has read from a device, in their order.
#[derive(Clone, Debug, Default)]
pub struct Reads(Arc<Mutex<DefaultHasher>>);

impl Reads {
    fn add(&self, bytes: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes);
    }

    /// The digest of what was read since the last call.
    pub fn take(&self) -> u64 {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).finish()
    }
}

impl<B> MutantBackend<B> {
    /// `inner` with this fault. Without one the wrapper itself is held to the suites.
    pub fn new(inner: B, mutation: Option<Mutation>) -> Self {
        Self { inner, mutation, reads: Reads::default() }
    }

    /// `inner` without a fault, and with a digest of what is read from it.
    pub fn observed(inner: B, reads: Reads) -> Self {
        Self { inner, mutation: None, reads }
    }

    fn has(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }
}

/// A new tensor with changed elements.
fn edited(tensor: &Tensor, edit: impl FnOnce(&mut [f64])) -> Result<Tensor> {
    let mut values = data::read(tensor)?;
    edit(&mut values);
    data::tensor(tensor.device(), &values, *tensor.shape(), tensor.dtype())
}

/// A new tensor of the same form with each element mapped.
fn mapped(tensor: &Tensor, map: impl Fn(f64) -> f64) -> Result<Tensor> {
    edited(tensor, |values| values.iter_mut().for_each(|value| *value = map(*value)))
}

/// A new tensor of the same form, all zero.
fn zeros_like(tensor: &Tensor) -> Result<Tensor> {
    mapped(tensor, |_| 0.0)
}

/// A new i32 tensor with each element mapped by its index and value.
fn mapped_integers(tensor: &Tensor, map: impl Fn(usize, i32) -> i32) -> Result<Tensor> {
    let values: Vec<i32> = tensor.to_vec::<i32>()?.into_iter().enumerate().map(|(i, value)| map(i, value)).collect();
    data::integers(tensor.device(), &values)
}

/// A matrix of the same shape whose elements are laid out as if it were its transpose.
fn transposed(tensor: &Tensor) -> Result<Tensor> {
    let (rows, columns) = (tensor.shape()[0], tensor.shape()[1]);
    edited(tensor, |values| {
        let original = values.to_vec();
        for i in 0..rows {
            for j in 0..columns {
                values[j * rows + i] = original[i * columns + j];
            }
        }
    })
}

macro_rules! mutations {
    ($($op:ident: $($(#[doc = $doc:literal])* $name:ident),+;)+) => {
        /// One fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Mutation {
            $($($(#[doc = $doc])* $name,)+)+
        }

        /// Every fault with the name of its suite and the suite that has to catch it.
        pub fn mutants() -> Vec<(Mutation, &'static str, Suite)> {
            vec![$($((Mutation::$name, stringify!($op), suite::$op::check as fn(&Device) -> _),)+)+]
        }

        /// The suites that have faults, with their names.
        pub fn suites() -> Vec<(&'static str, Suite)> {
            vec![$((stringify!($op), suite::$op::check),)+]
        }
    };
}

mutations! {
    elementwise:
        /// `a - b`.
        AddSubtracts,
        /// The last element of a product is not computed.
        MulSkipsTail,
        /// The factor is 1.
        ScaleIgnoresFactor,
        /// The device scalar is 1.
        ScaleByIgnoresScalar,
        /// The accumulator is overwritten.
        AccumulateOverwrites,
        /// bf16 by cutting off the lower half of an f32.
        CastTruncates,
        /// The copy is the original.
        CopyShares,
        /// The last element keeps its value.
        FillZeroSkipsTail;
    reduce:
        /// The last element is not added.
        SumSkipsTail,
        /// The sum is a bf16.
        SumInBf16,
        /// Infinities pass for finite.
        FiniteIgnoresInfinity,
        /// Only the first tensor is looked at.
        FiniteLooksAtFirst,
        /// The sum of squares without the root.
        NormIsSquared,
        /// Only the first tensor counts.
        NormOfFirst,
        /// Infinities count as zeros.
        NormIgnoresInfinity;
    embedding:
        /// Each id reads the row after its own.
        EmbeddingReadsNextRow,
        /// A token whose id came before adds nothing.
        EmbeddingDropsRepeats,
        /// The gradient is overwritten.
        EmbeddingOverwritesGradient;
    rms_norm:
        /// eps is 0, or nearly.
        NormDropsEps,
        /// The weight's offset is not added in the forward pass.
        NormDropsWeightOffset,
        /// The weight's offset is not added in the backward pass.
        NormBackwardDropsWeightOffset,
        /// The residual is not added.
        NormDropsResidual,
        /// `dx = rstd * g`: rstd is taken for a constant.
        NormDropsProjection,
        /// The gradient of the residual stream is lost.
        NormDropsDsum,
        /// dweight is overwritten.
        NormOverwritesDweight,
        /// What is added to dweight is 1% too large.
        NormScalesDweight;
    layer_norm:
        /// eps is 0, or nearly.
        LayerNormDropsEps,
        /// Rows are not centred.
        LayerNormIgnoresMean,
        /// The bias is not added.
        LayerNormDropsBias,
        /// The residual is not added.
        LayerNormDropsResidual,
        /// The gradient of the residual stream is lost.
        LayerNormDropsDsum,
        /// `dx` and `dweight` as if rows had the mean 0.
        LayerNormGradientIgnoresMean,
        /// rstd is taken for a constant.
        LayerNormDropsProjection,
        /// Nothing is added to dweight.
        LayerNormForgetsDweight,
        /// dbias is overwritten.
        LayerNormOverwritesDbias;
    rope:
        /// `-sin`.
        RopeFlipsSin,
        /// The gradient is rotated forward.
        RopeGradientRotatesForward,
        /// Interleaved for half and half for interleaved.
        RopeSwapsLayout,
        /// Positions count through all documents.
        RopeIgnoresRestart,
        /// Keys are not rotated.
        RopeLeavesKeys;
    glu:
        /// The activation is applied to `up`.
        GluSwapsOperands,
        /// The exact GELU is computed by its tanh approximation.
        GluErfIsTanh,
        /// `dgate` has the activation for its derivative.
        GluDerivativeIsActivation,
        /// `dup = dout`.
        GluDupDropsActivation;
    attention:
        /// Scores are not scaled.
        AttentionDropsScale,
        /// `dq` and `dk` are not scaled.
        AttentionBackwardDropsScale,
        /// A query sees the key after its own.
        AttentionMaskOffByOne,
        /// A query sees all later keys.
        AttentionNotCausal,
        /// The window is one key wider.
        AttentionWindowOffByOne,
        /// Scores are not capped.
        AttentionDropsSoftcap,
        /// The backward pass takes the capped scores for plain ones.
        AttentionBackwardDropsSoftcap,
        /// Groups of query heads read key heads in reverse order.
        AttentionReversesGroups,
        /// Documents see each other.
        AttentionMergesSequences,
        /// Base-2 logarithms.
        AttentionLseInBase2,
        /// `ds = P * dP`.
        AttentionDropsRowTerm,
        /// `dk` and `dv` of one query head of a group only.
        AttentionDropsGroupSum,
        /// Keys beyond a cache's length are read.
        CachedIgnoresLength,
        /// New rows are written from the start of a cache.
        KvAppendIgnoresStart;
    linear:
        /// The bias is not added.
        LinearDropsBias,
        /// `dx = dy W^T`.
        LinearTransposesInputGradient,
        /// The weight's gradient is laid out transposed.
        LinearTransposesWeightGradient,
        /// The weight's gradient is overwritten.
        LinearOverwritesWeightGradient,
        /// The bias's gradient is overwritten.
        LinearOverwritesBiasGradient;
    lora_linear:
        /// The update is not scaled.
        LoraDropsScale,
        /// The update's gradients are not scaled.
        LoraBackwardDropsScale,
        /// The bias is not added.
        LoraDropsBias,
        /// The base layer is rounded before the update is added.
        LoraRoundsTwice,
        /// `dx` lacks the part that goes through the update.
        LoraDropsUpdateInDx,
        /// The gradient of `B` is lost.
        LoraDropsGradientOfB,
        /// Gradients are overwritten.
        LoraOverwritesGradients;
    lora_dropout:
        /// Nothing is dropped in the forward pass.
        LoraForwardIgnoresDropout,
        /// Nothing is dropped in the backward pass.
        LoraBackwardIgnoresDropout,
        /// Nothing is dropped where `h` is all that is asked for.
        LoraHiddenIgnoresDropout,
        /// Every step drops the same elements.
        LoraDropoutIgnoresStep,
        /// Every sequence drops the same elements.
        LoraDropoutIgnoresSequence,
        /// Rows are counted through the call instead of by their positions.
        LoraDropoutCountsRows,
        /// What is kept is not scaled up.
        LoraDropoutKeepsMagnitude;
    dora:
        /// Lengths of the rows without the update.
        DoraNormsOfBase,
        /// Lengths with a scale of 1.
        DoraNormsIgnoreScale,
        /// No bias.
        DoraDropsBias,
        /// `dt = dy`.
        DoraGradientIgnoresLengths,
        /// The gradient of the magnitudes is overwritten.
        DoraOverwritesGradient;
    cross_entropy:
        /// The loss is a sum.
        LossForgetsNumTargets,
        /// The gradient is that of a sum.
        LossGradientForgetsNumTargets,
        /// Ignored rows count as class 0.
        LossCountsIgnored,
        /// Ignored rows have a gradient.
        LossGradientCountsIgnored,
        /// No label smoothing.
        LossDropsSmoothing,
        /// No z-loss.
        LossDropsZLoss,
        /// The gradient lacks z-loss.
        LossGradientDropsZLoss,
        /// Logits are not capped.
        LossDropsSoftcap,
        /// Logits are not scaled.
        LossDropsLogitScale,
        /// The gradient is not multiplied by the loss scale.
        LossDropsLossScale;
    linear_cross_entropy:
        /// The loss is a sum.
        LinearLossForgetsNumTargets,
        /// Ignored rows count as class 0.
        LinearLossCountsIgnored,
        /// No gradient is multiplied by the loss scale.
        LinearLossDropsLossScale,
        /// `dx = dlogits W^T`.
        LinearLossTransposesDx,
        /// dweight is overwritten.
        LinearLossOverwritesDweight;
    adamw:
        /// Gradients are not clipped.
        ControlIgnoresClip,
        /// Gradients are not unscaled.
        ControlIgnoresLossScale,
        /// A step that is not finite is not skipped.
        ControlIgnoresFinite,
        /// The step after a skipped one is not skipped.
        ControlIsNotSticky,
        /// A skipped step counts.
        ControlCountsSkippedSteps,
        /// Moments are not corrected for their start at 0.
        AdamwDropsBiasCorrection,
        /// The gradient is taken as it is.
        AdamwIgnoresGradientScale,
        /// A step to be skipped is made.
        AdamwIgnoresSkip,
        /// eps is 0, or nearly.
        AdamwDropsEps,
        /// No weight decay.
        AdamwDropsDecay,
        /// Decay is added to the gradient.
        AdamwCouplesDecay,
        /// The last of several parameters is not changed.
        AdamwLeavesLast;
    adamw8bit:
        /// Some codes are one too low.
        Adamw8bitRoundsDown,
        /// All blocks have the magnitude of the largest.
        Adamw8bitKeepsOneMagnitude,
        /// The gradient is taken as it is.
        Adamw8bitIgnoresGradientScale,
        /// A step to be skipped is made.
        Adamw8bitIgnoresSkip;
    lion:
        /// Direction and momentum have each other's decay.
        LionSwapsBetas,
        /// No weight decay.
        LionDropsDecay,
        /// A direction of 0 counts as positive.
        LionHasNoZero,
        /// The gradient is taken as it is.
        LionIgnoresGradientScale,
        /// A step to be skipped is made.
        LionIgnoresSkip;
    sgd:
        /// The buffer is that of this step alone.
        SgdForgetsMomentum,
        /// Plain momentum instead of Nesterov's.
        SgdIgnoresNesterov,
        /// Decay acts on the parameter instead of the gradient.
        SgdDecouplesDecay,
        /// The gradient is taken as it is.
        SgdIgnoresGradientScale,
        /// A step to be skipped is made.
        SgdIgnoresSkip;
    adafactor:
        /// Changes are not scaled down.
        AdafactorIgnoresThreshold,
        /// Averages are as long at every step.
        AdafactorKeepsDecay,
        /// eps is 0, or nearly.
        AdafactorDropsEps,
        /// No weight decay.
        AdafactorDropsDecay,
        /// The rate is not relative to the parameter.
        AdafactorIgnoresParameter,
        /// The gradient is taken as it is.
        AdafactorIgnoresGradientScale,
        /// A step to be skipped is made.
        AdafactorIgnoresSkip;
    muon:
        /// Every step is as without Nesterov.
        MuonIgnoresNesterov,
        /// Earlier gradients are forgotten.
        MuonForgetsMomentum,
        /// A direction keeps its norm.
        MuonKeepsNorm,
        /// A direction is divided by its norm, however small that is.
        MuonDropsEps,
        /// The rate of every shape is the same.
        MuonIgnoresShape,
        /// No weight decay.
        MuonDropsDecay,
        /// The rate of the decay depends on the shape.
        MuonAdjustsDecay,
        /// The gradient is taken as it is.
        MuonIgnoresGradientScale,
        /// A step to be skipped is made.
        MuonIgnoresSkip;
    stochastic_rounding:
        /// Every step draws the same bits.
        RoundingIgnoresStep,
        /// Every tensor draws the same bits.
        RoundingIgnoresTensor,
        /// To nearest.
        RoundingIsNearest;
}
