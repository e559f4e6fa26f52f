//! `linear` and `lora_linear` at the feed-forward shape of a model, with candle's product as a peer. Throughput is FLOP/s.

use criterion::{Criterion, Throughput};
use unsloth_benches::{DTYPES, LLAMA_3_2_1B, QWEN2_5_0_5B, TOKENS, criterion, random, timed, verified};
use unsloth_rs::{
    DType,
    core::ops::{linear, lora_linear},
    cpu::candle::to_candle,
    device,
};
use unsloth_testkit::suite;

const RANK: usize = 16;

fn bench(criterion: &mut Criterion) -> anyhow::Result<()> {
    let cpu = device("cpu")?;
    verified(suite::linear::check, &cpu)?;
    verified(suite::lora_linear::check, &cpu)?;
    for model in [LLAMA_3_2_1B, QWEN2_5_0_5B] {
        let (inputs, outputs) = (model.hidden_size, model.intermediate_size);
        let mut group = criterion.benchmark_group(format!("linear/{}", model.name));
        group.throughput(Throughput::Elements(2 * (TOKENS * inputs * outputs) as u64));
        for dtype in DTYPES {
            let x = random(&cpu, [TOKENS, inputs], dtype, 1)?;
            let dy = random(&cpu, [TOKENS, outputs], dtype, 2)?;
            let dense = random(&cpu, [outputs, inputs], dtype, 3)?;
            let weight = cpu.prepare_weight(dense.clone())?;
            group.bench_function(format!("forward/{dtype}"), |b| {
                b.iter(|| timed(linear::forward(&x, &weight, None)));
            });
            group.bench_function(format!("input_gradient/{dtype}"), |b| {
                b.iter(|| timed(linear::input_gradient(&dy, &weight)));
            });
            let lora_a = random(&cpu, [RANK, inputs], DType::F32, 4)?;
            let lora_b = random(&cpu, [outputs, RANK], DType::F32, 5)?;
            let adapter = lora_linear::Adapter { lora_a: &lora_a, lora_b: &lora_b, scale: 1.0, dropout: None };
            group.bench_function(format!("lora_forward/{dtype}"), |b| {
                b.iter(|| timed(lora_linear::forward(&x, &weight, None, adapter)));
            });
            let h = lora_linear::forward(&x, &weight, None, adapter)?.h;
            let mut dlora_a = cpu.zeros([RANK, inputs], DType::F32, unsloth_rs::Category::Gradients)?;
            let mut dlora_b = cpu.zeros([outputs, RANK], DType::F32, unsloth_rs::Category::Gradients)?;
            group.bench_function(format!("lora_backward/{dtype}"), |b| {
                b.iter(|| {
                    let inputs =
                        lora_linear::Backward { dy: &dy, x: &x, h: &h, weight: &weight, adapter, needs_dx: true };
                    let (dlora_a, dlora_b) = (Some(&mut dlora_a), Some(&mut dlora_b));
                    timed(lora_linear::backward(inputs, lora_linear::ParameterGradients { dlora_a, dlora_b }))
                });
            });
            let (peer_x, peer_weight) = (to_candle(&x)?, to_candle(&dense)?.t()?);
            group.bench_function(format!("candle_matmul/{dtype}"), |b| {
                b.iter(|| peer_x.matmul(&peer_weight).unwrap_or_else(|error| panic!("candle failed: {error}")));
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
