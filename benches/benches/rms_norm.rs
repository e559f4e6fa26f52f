//! `rms_norm` of a micro-batch. Throughput is the least traffic per second.

use criterion::{Criterion, Throughput};
use unsloth_benches::{DTYPES, LLAMA_3_2_1B, QWEN2_5_0_5B, TOKENS, criterion, random, timed, verified};
use unsloth_rs::{
    Category, DType,
    core::ops::rms_norm::{self, Backward, Spec},
    device,
};
use unsloth_testkit::suite;

const EPS: f32 = 1e-5;

fn bench(criterion: &mut Criterion) -> anyhow::Result<()> {
    let cpu = device("cpu")?;
    verified(suite::rms_norm::check, &cpu)?;
    for model in [LLAMA_3_2_1B, QWEN2_5_0_5B] {
        let shape = [TOKENS, model.hidden_size];
        let mut group = criterion.benchmark_group(format!("rms_norm/{}", model.name));
        for dtype in DTYPES {
            let (x, residual) = (random(&cpu, shape, dtype, 1)?, random(&cpu, shape, dtype, 2)?);
            let (weight, dout) = (random(&cpu, [model.hidden_size], dtype, 3)?, random(&cpu, shape, dtype, 4)?);
            let spec = Spec::new(&x, &weight, EPS, 0.0)?;
            let bytes = x.bytes() as u64;
            group.throughput(Throughput::Bytes(spec.forward_cost(false).bytes));
            group.bench_function(format!("forward/{dtype}"), |b| {
                b.iter(|| timed(rms_norm::forward(x.clone(), None, &weight, EPS, 0.0)));
            });
            group.throughput(Throughput::Bytes(4 * bytes));
            group.bench_function(format!("add_forward/{dtype}"), |b| {
                b.iter(|| timed(rms_norm::forward(x.clone(), Some(&residual), &weight, EPS, 0.0)));
            });
            let rstd = rms_norm::forward(x.clone(), None, &weight, EPS, 0.0)?.rstd;
            let mut dweight = cpu.zeros([model.hidden_size], DType::F32, Category::Gradients)?;
            group.throughput(Throughput::Bytes(3 * bytes));
            let inputs = || Backward { dout: dout.clone(), dsum: None, sum: &x, weight: &weight, rstd: &rstd };
            group.bench_function(format!("backward/{dtype}"), |b| {
                b.iter(|| timed(rms_norm::backward(inputs(), None, EPS, 0.0)));
            });
            group.bench_function(format!("backward_with_dweight/{dtype}"), |b| {
                b.iter(|| timed(rms_norm::backward(inputs(), Some(&mut dweight), EPS, 0.0)));
            });
        }
        group.finish();
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let mut criterion = criterion();
    bench(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}
