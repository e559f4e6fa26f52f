//! Cross entropy, alone and with the output projection: vocabularies that vectors of eight, four and two divide, an odd one, and small ones,
//! which fewer units share, with each option that changes the code.

use unsloth_core::{
    DType, Result,
    ops::{
        cross_entropy::{self, LossSpec},
        linear_cross_entropy,
    },
};

use super::{Caller, dtype_pairs};

const VOCAB_SIZES: [usize; 6] = [32_000, 4100, 4098, 4099, 256, 64];
/// Rows long enough to be shared by more units, so few are 512 of them.
const LARGE_VOCAB_SIZES: [usize; 4] = [128_256, 128_260, 128_258, 128_257];
const TOKENS: usize = 512;
const HIDDEN_SIZE: usize = 64;

fn specs() -> [(&'static str, LossSpec); 4] {
    let plain = LossSpec::mean(TOKENS);
    let softcap = LossSpec { softcap: Some(30.0), ..plain };
    [
        ("plain", plain),
        ("softcap", softcap),
        ("smoothing", LossSpec { label_smoothing: 0.1, ..plain }),
        ("softcap and smoothing", LossSpec { label_smoothing: 0.1, ..softcap }),
    ]
}

pub(super) fn cross_entropy(caller: &mut Caller) -> Result<()> {
    for vocab_size in VOCAB_SIZES.into_iter().chain(LARGE_VOCAB_SIZES) {
        for dtype in DType::FLOATS {
            for (name, spec) in specs() {
                let targets = caller.tensor(DType::I32, [TOKENS])?;
                let lse = caller.tensor(DType::F32, [TOKENS])?;
                let logits = caller.tensor(dtype, [TOKENS, vocab_size])?;
                let detail = |what: &str| format!("{what}, {name}, [{TOKENS}, {vocab_size}] {dtype}");
                caller.call(detail("forward"), || cross_entropy::forward(&logits, &targets, spec));
                caller.call(detail("backward"), || cross_entropy::backward(logits, &targets, &lse, spec));
            }
        }
    }
    Ok(())
}

pub(super) fn linear_cross_entropy(caller: &mut Caller) -> Result<()> {
    for vocab_size in VOCAB_SIZES {
        for (dtype, weight_dtype) in dtype_pairs() {
            let matrix = [vocab_size, HIDDEN_SIZE];
            let weight = caller.device.prepare_weight(caller.tensor(weight_dtype, matrix)?)?;
            let x = caller.tensor(dtype, [TOKENS, HIDDEN_SIZE])?;
            let targets = caller.tensor(DType::I32, [TOKENS])?;
            let mut dweight = caller.tensor(DType::F32, matrix)?;
            let detail = format!("{TOKENS} x {HIDDEN_SIZE} -> {vocab_size} {dtype}, weight {weight_dtype}");
            let spec = LossSpec::mean(TOKENS);
            caller
                .call(detail, || linear_cross_entropy::forward(&x, &weight, &targets, spec, true, Some(&mut dweight)));
        }
    }
    Ok(())
}
