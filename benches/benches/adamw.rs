//! One AdamW step of a large matrix, and the norm and the finite check before it. Throughput is the least traffic per second.

use criterion::{Criterion, Throughput};
use unsloth_benches::{DTYPES, QWEN2_5_0_5B, criterion, random, timed, verified};
use unsloth_rs::{
    Category, DType,
    core::ops::{
        adamw::{self, Buffers, Spec, StepState},
        reduce,
    },
    device,
};
use unsloth_testkit::suite;

fn bench(criterion: &mut Criterion) -> anyhow::Result<()> {
    let cpu = device("cpu")?;
    verified(suite::adamw::check, &cpu)?;
    let shape = [QWEN2_5_0_5B.intermediate_size, QWEN2_5_0_5B.hidden_size];
    let spec = Spec { learning_rate: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let state = StepState::new(&cpu, 1)?;
    let grad = random(&cpu, shape, DType::F32, 1)?;
    let mut group = criterion.benchmark_group("adamw");
    for dtype in DTYPES {
        let mut param = random(&cpu, shape, dtype, 2)?;
        let mut m = cpu.zeros(shape, DType::F32, Category::Optimiser)?;
        let mut v = cpu.zeros(shape, DType::F32, Category::Optimiser)?;
        group.throughput(Throughput::Bytes((2 * param.bytes() + 5 * grad.bytes()) as u64));
        group.bench_function(format!("step/{dtype}"), |b| {
            b.iter(|| {
                let buffers = Buffers { param: &mut param, grad: &grad, m: &mut m, v: &mut v };
                timed(adamw::step(&spec, buffers, &state));
            });
        });
    }
    group.throughput(Throughput::Bytes(grad.bytes() as u64));
    group.bench_function("grad_norm", |b| b.iter(|| timed(reduce::grad_norm(&[&grad]))));
    group.bench_function("all_finite", |b| b.iter(|| timed(reduce::all_finite(&[&grad]))));
    group.finish();
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let mut criterion = criterion();
    bench(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}
