//! Elementwise operators, reductions and optimisers: lengths that vectors of eight, four and two divide, and an odd one.

use unsloth_core::{
    DType, Result, Shape,
    ops::{
        adafactor as factored,
        adamw::{self as optimiser, Buffers, ControlSpec, Spec, StepState},
        adamw8bit as eight_bits, elementwise as ops, lion as sign, muon as orthogonal, reduce as reductions,
        sgd as descent, stochastic_rounding as rounding,
    },
    rng::Philox,
};

use super::{Caller, SUMMED_ROWS, dtype_pairs};

const LENGTHS: [usize; 4] = [1 << 20, 4100, 4098, 4099];
/// Tensors of one launch, where it takes several.
const COUNTS: std::ops::RangeInclusive<usize> = 1..=8;

pub(super) fn elementwise(caller: &mut Caller) -> Result<()> {
    for length in LENGTHS {
        for dtype in DType::FLOATS {
            let tensor = || caller.tensor(dtype, [length]);
            let (shared, b, scalar) = (tensor()?, tensor()?, caller.tensor(DType::F32, [1])?);
            let [a, m, x, y] = [tensor()?, tensor()?, tensor()?, tensor()?];
            let (mut accumulator, mut filled) = (caller.tensor(DType::F32, [length])?, tensor()?);
            let detail = |what: &str| format!("{what} [{length}] {dtype}");
            caller.call(detail("add in place"), || ops::add(a, &b));
            caller.call(detail("add"), || ops::add(shared.clone(), &b));
            caller.call(detail("mul in place"), || ops::mul(m, &b));
            caller.call(detail("mul"), || ops::mul(shared.clone(), &b));
            caller.call(detail("scale"), || ops::scale(x, 0.5));
            caller.call(detail("scale by a device scalar"), || ops::scale_by(y, &scalar));
            caller.call(detail("accumulate"), || ops::accumulate(&mut accumulator, &b));
            caller.call(detail("copy"), || ops::copy(&b));
            caller.call(detail("fill with zeros"), || ops::fill_zero(&mut filled));
        }
        for (from, to) in dtype_pairs().filter(|(from, to)| from != to) {
            let x = caller.tensor(from, [length])?;
            caller.call(format!("cast [{length}] {from} to {to}"), || ops::cast(&x, to));
        }
    }
    Ok(())
}

pub(super) fn reduce(caller: &mut Caller) -> Result<()> {
    for length in LENGTHS {
        for dtype in DType::FLOATS {
            let x = caller.tensor(dtype, [length])?;
            let detail = |what: &str| format!("{what} [{length}] {dtype}");
            caller.call(detail("sum"), || reductions::sum(&x));
            caller.call(detail("all_finite"), || reductions::all_finite(&[&x, &x]));
            for count in COUNTS {
                let tensors = vec![&x; count];
                caller.call(detail(&format!("grad_norm of {count}")), || reductions::grad_norm(&tensors));
            }
        }
    }
    Ok(())
}

const SPEC: Spec = Spec { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };

pub(super) fn adamw(caller: &mut Caller) -> Result<()> {
    for max_grad_norm in [None, Some(1.0)] {
        for sticky in [false, true] {
            let (norm, finite) = (caller.tensor(DType::F32, [1])?, caller.tensor(DType::F32, [1])?);
            let mut state = StepState::new(&caller.device, 0)?;
            let spec = ControlSpec { max_grad_norm, loss_scale: 1.0, sticky };
            let detail = format!("control, clipping {max_grad_norm:?}, sticky {sticky}");
            caller.call(detail, || optimiser::control(&spec, &norm, &finite, &mut state));
        }
    }
    for length in LENGTHS {
        for dtype in DType::FLOATS {
            let state = StepState::new(&caller.device, 0)?;
            for count in COUNTS {
                let tensors = |dtype| (0..count).map(|_| caller.tensor(dtype, [length])).collect::<Result<Vec<_>>>();
                let (mut params, grads) = (tensors(dtype)?, tensors(DType::F32)?);
                let (mut ms, mut vs) = (tensors(DType::F32)?, tensors(DType::F32)?);
                let moments = ms.iter_mut().zip(&mut vs);
                let buffers = |((param, grad), (m, v))| Buffers { param, grad, m, v };
                let mut all: Vec<_> = params.iter_mut().zip(&grads).zip(moments).map(buffers).collect();
                let detail = format!("step of {count} [{length}] {dtype}");
                caller.call(detail, || optimiser::step(&SPEC, &mut all, &state));
            }
        }
    }
    Ok(())
}

pub(super) fn adafactor(caller: &mut Caller) -> Result<()> {
    // Columns of that many parts, sixteen rows in each, are added up by so many groups of units.
    let summed = SUMMED_ROWS.map(|rows| [4 * rows, 64]);
    let shapes = [&[1024, 1024][..], &[17, 241], &[1 << 20], &[4099]].into_iter();
    let is_called = |shape: &[usize], dtype| dtype == DType::F32 || shape.last() != Some(&64);
    for shape in shapes.chain(summed.iter().map(|shape| &shape[..])) {
        for dtype in DType::FLOATS.into_iter().filter(|&dtype| is_called(shape, dtype)) {
            for parameter_scale in [None, Some(1e-3)] {
                let spec = factored::Spec {
                    learning_rate: 1e-3,
                    decay_rate: -0.8,
                    eps: 1e-30,
                    clip_threshold: 1.0,
                    parameter_scale,
                    weight_decay: 0.01,
                };
                let state = StepState::new(&caller.device, 0)?;
                let tensor = |dtype| Shape::try_from(shape).and_then(|shape| caller.tensor(dtype, shape));
                let (mut param, grad, mut v) = (tensor(dtype)?, tensor(DType::F32)?, tensor(DType::F32)?);
                let mut row = caller.tensor(DType::F32, [shape[0]])?;
                let mut col = caller.tensor(DType::F32, [shape[shape.len() - 1]])?;
                let averages = match shape.len() {
                    2 => factored::Averages::Factored { row: &mut row, col: &mut col },
                    _ => factored::Averages::Whole(&mut v),
                };
                let buffers = factored::Buffers { param: &mut param, grad: &grad, averages };
                let detail = format!("step, scale {parameter_scale:?} {shape:?} {dtype}");
                caller.call(detail, || factored::step(&spec, buffers, &state));
            }
        }
    }
    Ok(())
}

pub(super) fn stochastic_rounding(caller: &mut Caller) -> Result<()> {
    let spec = rounding::Spec { stream: Philox::new(0, 0), step: 0, tensor: 0 };
    // The third is even where its words are not.
    for length in LENGTHS {
        let (x, mut out) = (caller.tensor(DType::F32, [length])?, caller.tensor(DType::BF16, [length])?);
        caller.call(format!("[{length}]"), || rounding::round(&spec, &x, &mut out));
    }
    Ok(())
}

pub(super) fn adamw8bit(caller: &mut Caller) -> Result<()> {
    for length in LENGTHS {
        for dtype in DType::FLOATS {
            let state = StepState::new(&caller.device, 0)?;
            let (mut param, grad) = (caller.tensor(dtype, [length])?, caller.tensor(DType::F32, [length])?);
            let (num_codes, blocks) = eight_bits::lengths(length);
            let codes = || caller.tensor(DType::I32, [num_codes]);
            let absmax = || caller.tensor(DType::F32, [blocks]);
            let buffers = eight_bits::Buffers {
                param: &mut param,
                grad: &grad,
                m_codes: &mut codes()?,
                m_absmax: &mut absmax()?,
                v_codes: &mut codes()?,
                v_absmax: &mut absmax()?,
            };
            caller.call(format!("step [{length}] {dtype}"), || eight_bits::step(&SPEC, buffers, &state));
        }
    }
    Ok(())
}

pub(super) fn lion(caller: &mut Caller) -> Result<()> {
    let spec = sign::Spec { learning_rate: 1e-3, beta1: 0.9, beta2: 0.99, weight_decay: 0.01 };
    for length in LENGTHS {
        for dtype in DType::FLOATS {
            let state = StepState::new(&caller.device, 0)?;
            let (mut param, grad) = (caller.tensor(dtype, [length])?, caller.tensor(DType::F32, [length])?);
            let mut m = caller.tensor(DType::F32, [length])?;
            let buffers = sign::Buffers { param: &mut param, grad: &grad, m: &mut m };
            caller.call(format!("step [{length}] {dtype}"), || sign::step(&spec, buffers, &state));
        }
    }
    Ok(())
}

pub(super) fn muon(caller: &mut Caller) -> Result<()> {
    let spec = orthogonal::Spec {
        learning_rate: 1e-3,
        adjustment: 1.0,
        momentum: 0.95,
        nesterov: true,
        eps: 1e-7,
        weight_decay: 0.01,
    };
    for shape in [[1024, 1024], [18, 241], [17, 241]] {
        for dtype in DType::FLOATS {
            let state = StepState::new(&caller.device, 0)?;
            let (mut param, grad) = (caller.tensor(dtype, shape)?, caller.tensor(DType::F32, shape)?);
            let mut buf = caller.tensor(DType::F32, shape)?;
            let buffers = orthogonal::Buffers { param: &mut param, grad: &grad, buf: &mut buf };
            caller.call(format!("step {shape:?} {dtype}"), || orthogonal::step(&spec, buffers, &state));
        }
    }
    Ok(())
}

pub(super) fn sgd(caller: &mut Caller) -> Result<()> {
    for length in LENGTHS {
        for dtype in DType::FLOATS {
            for momentum in [0.0, 0.9] {
                let spec = descent::Spec { learning_rate: 1e-3, momentum, nesterov: true, weight_decay: 0.01 };
                let state = StepState::new(&caller.device, 0)?;
                let (mut param, grad) = (caller.tensor(dtype, [length])?, caller.tensor(DType::F32, [length])?);
                let mut buf = caller.tensor(DType::F32, [length])?;
                let buf = (momentum > 0.0).then_some(&mut buf);
                let buffers = descent::Buffers { param: &mut param, grad: &grad, buf };
                let detail = format!("step, momentum {momentum} [{length}] {dtype}");
                caller.call(detail, || descent::step(&spec, buffers, &state));
            }
        }
    }
    Ok(())
}
