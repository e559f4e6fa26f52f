//! Options of optimisers and schedules, of which each has its own.

use unsloth_train::{
    AdafactorConfig, AdamWConfig, LionConfig, MuonConfig, OptimizerConfig, OptimizerKind, ScheduleKind, SgdConfig,
};

use super::TrainOptions;
use crate::{Result, fields::decimal, recipe::config::invalid};

/// The optimiser that these options describe.
///
/// # Errors
/// [`crate::Error::InvalidOption`] for an option that it, or the schedule, does not have.
pub(super) fn config(options: &TrainOptions) -> Result<OptimizerConfig> {
    let kind = options.optimizer.unwrap_or_default();
    require_used(options, kind)?;
    Ok(match kind {
        OptimizerKind::AdamW => OptimizerConfig::AdamW(adamw(options)),
        OptimizerKind::AdamW8bit => OptimizerConfig::AdamW8bit(adamw(options)),
        OptimizerKind::Sgd => {
            let defaults = SgdConfig::default();
            OptimizerConfig::Sgd(SgdConfig {
                momentum: narrow(options.momentum, defaults.momentum),
                nesterov: options.nesterov.unwrap_or(defaults.nesterov),
                weight_decay: narrow(options.weight_decay, defaults.weight_decay),
            })
        }
        OptimizerKind::Adafactor => {
            let defaults = AdafactorConfig::default();
            OptimizerConfig::Adafactor(AdafactorConfig {
                scale_parameter: options.scale_parameter.unwrap_or(defaults.scale_parameter),
                weight_decay: narrow(options.weight_decay, defaults.weight_decay),
            })
        }
        OptimizerKind::Muon => {
            let defaults = MuonConfig::default();
            OptimizerConfig::Muon(MuonConfig {
                momentum: narrow(options.momentum, defaults.momentum),
                nesterov: options.nesterov.unwrap_or(defaults.nesterov),
                adjust_lr: options.adjust_lr.unwrap_or(defaults.adjust_lr),
                adamw: adamw(options),
            })
        }
        OptimizerKind::Lion => {
            let defaults = LionConfig::default();
            OptimizerConfig::Lion(LionConfig {
                beta1: narrow(options.beta1, defaults.beta1),
                beta2: narrow(options.beta2, defaults.beta2),
                weight_decay: narrow(options.weight_decay, defaults.weight_decay),
            })
        }
    })
}

/// No option is given that changes nothing.
fn require_used(options: &TrainOptions, kind: OptimizerKind) -> Result<()> {
    use OptimizerKind::{Adafactor, AdamW, AdamW8bit, Lion, Muon, Sgd};
    let schedule = options.schedule.unwrap_or_default();
    let adamw = matches!(kind, AdamW | AdamW8bit | Muon);
    let (betas, momentum) = (adamw || kind == Lion, matches!(kind, Sgd | Muon));
    let (polynomial, wsd) = (schedule == ScheduleKind::Polynomial, schedule == ScheduleKind::Wsd);
    let number = |on: Option<bool>| on.map(|on| f64::from(u8::from(on)));
    let decay_steps = options.decay_steps.map(|steps| steps as f64);
    for (field, value, is_used, rule) in [
        ("beta1", options.beta1, betas, "used with adamw, adamw8bit, lion or muon"),
        ("beta2", options.beta2, betas, "used with adamw, adamw8bit, lion or muon"),
        ("adam_eps", options.adam_eps, adamw, "used with adamw, adamw8bit or muon"),
        ("momentum", options.momentum, momentum, "used with sgd or muon"),
        ("nesterov", number(options.nesterov), momentum, "used with sgd or muon"),
        ("scale_parameter", number(options.scale_parameter), kind == Adafactor, "used with adafactor"),
        ("end_learning_rate", options.end_learning_rate, polynomial, "used with the schedule polynomial"),
        ("power", options.power, polynomial, "used with the schedule polynomial"),
        ("decay_steps", decay_steps, wsd, "used with the schedule wsd"),
    ] {
        if let Some(value) = value.filter(|_| !is_used) {
            return invalid(field, value, rule);
        }
    }
    match options.adjust_lr.filter(|_| kind != Muon) {
        Some(rule) => invalid("adjust_lr", rule, "used with muon"),
        None => Ok(()),
    }
}

fn adamw(options: &TrainOptions) -> AdamWConfig {
    let defaults = AdamWConfig::default();
    AdamWConfig {
        beta1: narrow(options.beta1, defaults.beta1),
        beta2: narrow(options.beta2, defaults.beta2),
        eps: narrow(options.adam_eps, defaults.eps),
        weight_decay: narrow(options.weight_decay, defaults.weight_decay),
    }
}

fn narrow(value: Option<f64>, default: f32) -> f32 {
    value.map_or(default, |value| value as f32)
}

/// `options` with those of this optimiser.
pub(super) fn options(options: TrainOptions, config: &OptimizerConfig) -> TrainOptions {
    let shown = |value: f32| Some(decimal(value));
    let options = TrainOptions { optimizer: Some(config.kind()), ..options };
    match *config {
        OptimizerConfig::AdamW(AdamWConfig { beta1, beta2, eps, weight_decay })
        | OptimizerConfig::AdamW8bit(AdamWConfig { beta1, beta2, eps, weight_decay }) => TrainOptions {
            beta1: shown(beta1),
            beta2: shown(beta2),
            adam_eps: shown(eps),
            weight_decay: shown(weight_decay),
            ..options
        },
        OptimizerConfig::Sgd(SgdConfig { momentum, nesterov, weight_decay }) => TrainOptions {
            momentum: shown(momentum),
            nesterov: Some(nesterov),
            weight_decay: shown(weight_decay),
            ..options
        },
        OptimizerConfig::Muon(MuonConfig { momentum, nesterov, adjust_lr, adamw }) => TrainOptions {
            momentum: shown(momentum),
            nesterov: Some(nesterov),
            adjust_lr: Some(adjust_lr),
            beta1: shown(adamw.beta1),
            beta2: shown(adamw.beta2),
            adam_eps: shown(adamw.eps),
            weight_decay: shown(adamw.weight_decay),
            ..options
        },
        OptimizerConfig::Adafactor(AdafactorConfig { scale_parameter, weight_decay }) => {
            TrainOptions { scale_parameter: Some(scale_parameter), weight_decay: shown(weight_decay), ..options }
        }
        OptimizerConfig::Lion(LionConfig { beta1, beta2, weight_decay }) => {
            TrainOptions { beta1: shown(beta1), beta2: shown(beta2), weight_decay: shown(weight_decay), ..options }
        }
    }
}

#[cfg(test)]
mod tests {
    use unsloth_train::AdjustLr;

    use super::*;

    #[test]
    fn what_an_optimiser_or_a_schedule_does_not_have_is_refused() {
        let named = |optimizer| TrainOptions { optimizer: Some(optimizer), ..TrainOptions::default() };
        let (sgd, lion) = (named(OptimizerKind::Sgd), named(OptimizerKind::Lion));
        let plain = TrainOptions::default();
        for (options, expected) in [
            (
                TrainOptions { beta1: Some(0.5), ..sgd.clone() },
                "beta1 = 0.5, must be used with adamw, adamw8bit, lion or muon",
            ),
            (
                TrainOptions { adam_eps: Some(0.5), ..lion.clone() },
                "adam_eps = 0.5, must be used with adamw, adamw8bit or muon",
            ),
            (
                TrainOptions { beta2: Some(0.5), ..named(OptimizerKind::Adafactor) },
                "beta2 = 0.5, must be used with adamw, adamw8bit, lion or muon",
            ),
            (
                TrainOptions { scale_parameter: Some(true), ..plain.clone() },
                "scale_parameter = 1, must be used with adafactor",
            ),
            (TrainOptions { momentum: Some(0.5), ..lion }, "momentum = 0.5, must be used with sgd or muon"),
            (TrainOptions { nesterov: Some(true), ..plain.clone() }, "nesterov = 1, must be used with sgd or muon"),
            (
                TrainOptions { power: Some(2.0), ..plain.clone() },
                "power = 2, must be used with the schedule polynomial",
            ),
            (
                TrainOptions { adjust_lr: Some(AdjustLr::MatchRmsAdamw), ..plain.clone() },
                "adjust_lr = match_rms_adamw, must be used with muon",
            ),
            (TrainOptions { decay_steps: Some(3), ..plain }, "decay_steps = 3, must be used with the schedule wsd"),
        ] {
            assert_eq!(config(&options).unwrap_err().to_string(), expected);
        }
        let found = config(&TrainOptions { momentum: Some(0.5), nesterov: Some(true), ..sgd }).unwrap();
        let expected = SgdConfig { momentum: 0.5, nesterov: true, ..SgdConfig::default() };
        assert_eq!(found, OptimizerConfig::Sgd(expected));
    }
}
