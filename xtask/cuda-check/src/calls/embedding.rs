//! Embedding: hidden sizes that vectors of eight, four and two divide, and an odd one; many tokens, and few, which fewer units look through.

use unsloth_core::{DType, Result, ops::embedding};

use super::{Caller, dtype_pairs};

const HIDDEN_SIZES: [usize; 4] = [4096, 68, 66, 65];
const VOCAB_SIZE: usize = 1024;
const TOKENS: [usize; 4] = [2048, 512, 64, 16];

pub(super) fn calls(caller: &mut Caller) -> Result<()> {
    for (hidden_size, tokens) in HIDDEN_SIZES.into_iter().flat_map(|size| TOKENS.map(|tokens| (size, tokens))) {
        let ids = caller.tensor(DType::I32, [tokens])?;
        let table = [VOCAB_SIZE, hidden_size];
        for (dtype, weight_dtype) in dtype_pairs() {
            let weight = caller.device.prepare_weight(caller.tensor(weight_dtype, table)?)?;
            let detail = format!("forward of {tokens} [{VOCAB_SIZE}, {hidden_size}] {weight_dtype} to {dtype}");
            caller.call(detail, || embedding::forward(&weight, &ids, dtype));
        }
        for dtype in DType::FLOATS {
            let dout = caller.tensor(dtype, [tokens, hidden_size])?;
            let mut dweight = caller.tensor(DType::F32, table)?;
            let detail = format!("backward of {tokens} [{VOCAB_SIZE}, {hidden_size}] {dtype}");
            caller.call(detail, || embedding::backward(&ids, &dout, &mut dweight));
        }
    }
    Ok(())
}
