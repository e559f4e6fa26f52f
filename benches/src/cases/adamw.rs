//! `adamw` of a projection's matrix.

use anyhow::Result;
use serde_json::json;
use unsloth_rs::{
    Category, DType, Device, Tensor,
    core::ops::adamw::{self, Buffers, Spec, StepState},
};
use unsloth_testkit::{
    arith::{Exact, Rounded},
    budget::Floor,
    oracle::adamw::{Parameter, State},
};

use super::{Selection, each};
use crate::{
    case::{Case, Context, Prepared, Run, random},
    check::{Host, hold, spread},
};

const OP: &str = "adamw";
const SPEC: Spec = Spec { learning_rate: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };

/// One step.
pub fn cases(selection: &Selection) -> Vec<Case> {
    each(&selection.models[..1], &selection.dtypes, |model, dtype| {
        let size = [model.intermediate_size, model.hidden_size];
        let shape = format!("{} x {}", size[0], size[1]);
        vec![Case::new((OP, "step"), (model.name, shape), dtype, move |at| step(at, size, dtype))]
    })
}

struct Tensors {
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    state: StepState,
}

impl Tensors {
    fn new(device: &Device, shape: [usize; 2], dtype: DType) -> Result<Self> {
        let zeros = || device.zeros(shape, DType::F32, Category::Optimiser);
        let (param, grad) = (random(device, shape, dtype, 1)?, random(device, shape, DType::F32, 2)?);
        Ok(Self { param, grad, m: zeros()?, v: zeros()?, state: StepState::new(device, 1)? })
    }

    fn step(&mut self) -> unsloth_rs::Result<()> {
        let Self { param, grad, m, v, state } = self;
        adamw::step(&SPEC, &mut [Buffers { param, grad, m, v }], state)
    }
}

fn step(context: &Context<'_>, shape: [usize; 2], dtype: DType) -> Result<Prepared> {
    let (mut timed, device) = (Tensors::new(context.device, shape, dtype)?, context.device.clone());
    let check = move || {
        let mut tensors = Tensors::new(&device, shape, dtype)?;
        let at = spread(shape[0], 4);
        let (param, grad) = (Host::read(&tensors.param)?.rows(&at), Host::read(&tensors.grad)?.rows(&at));
        let zeros = vec![0.0; param.len()];
        let mut exact = Parameter { param, m: zeros.clone(), v: zeros, dtype };
        let mut naive = exact.clone();
        let state = State::new(1);
        exact.step(&Exact, &SPEC, &grad, &state);
        naive.step(&Rounded(dtype), &SPEC, &grad, &state);
        tensors.step()?;
        for (name, tensor, exact, naive, dtype) in [
            ("param", &tensors.param, &exact.param, &naive.param, dtype),
            ("m", &tensors.m, &exact.m, &naive.m, DType::F32),
            ("v", &tensors.v, &exact.v, &naive.v, DType::F32),
        ] {
            hold((OP, name), &Host::read(tensor)?.rows(&at), (exact, naive), Floor::Stored(dtype))?;
        }
        Ok(())
    };
    let torch = json!({ "op": OP, "part": "step", "rows": shape[0], "columns": shape[1], "dtype": dtype.name() });
    Ok(Prepared::new(check, Run::call(move || timed.step())).with_torch(torch))
}
