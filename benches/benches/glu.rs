//! `glu` of a micro-batch. Throughput is the least traffic per second.

use criterion::{Criterion, Throughput};
use unsloth_benches::{DTYPES, LLAMA_3_2_1B, QWEN2_5_0_5B, TOKENS, criterion, random, timed, verified};
use unsloth_rs::{
    core::ops::glu::{self, Activation},
    device,
};
use unsloth_testkit::suite;

fn bench(criterion: &mut Criterion) -> anyhow::Result<()> {
    let cpu = device("cpu")?;
    verified(suite::glu::check, &cpu)?;
    for model in [LLAMA_3_2_1B, QWEN2_5_0_5B] {
        let shape = [TOKENS, model.intermediate_size];
        let mut group = criterion.benchmark_group(format!("glu/{}", model.name));
        for dtype in DTYPES {
            let (gate, up) = (random(&cpu, shape, dtype, 1)?, random(&cpu, shape, dtype, 2)?);
            let dout = random(&cpu, shape, dtype, 3)?;
            for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
                group.throughput(Throughput::Bytes(3 * gate.bytes() as u64));
                group.bench_function(format!("forward/{activation:?}/{dtype}"), |b| {
                    b.iter(|| timed(glu::forward(&gate, &up, activation)));
                });
                group.throughput(Throughput::Bytes(5 * gate.bytes() as u64));
                group.bench_function(format!("backward/{activation:?}/{dtype}"), |b| {
                    b.iter(|| timed(glu::backward(&dout, gate.clone(), up.clone(), activation)));
                });
            }
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
