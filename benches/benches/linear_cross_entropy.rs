//! `linear_cross_entropy` with the gradient of the hidden states, at a real vocabulary. Throughput is FLOP/s.

use criterion::{Criterion, Throughput};
use unsloth_benches::{DTYPES, QWEN2_5_0_5B, TOKENS, criterion, random, timed, verified};
use unsloth_rs::{
    Category,
    core::ops::{cross_entropy::LossSpec, linear_cross_entropy},
    device,
};
use unsloth_testkit::suite;

fn bench(criterion: &mut Criterion) -> anyhow::Result<()> {
    let cpu = device("cpu")?;
    verified(suite::linear_cross_entropy::check, &cpu)?;
    let model = QWEN2_5_0_5B;
    let targets: Vec<i32> = (0..TOKENS).map(|t| (t * 7919 % model.vocab_size) as i32).collect();
    let targets = cpu.from_slice(&targets, [TOKENS], Category::Activations)?;
    let mut group = criterion.benchmark_group(format!("linear_cross_entropy/{}", model.name));
    group.sample_size(10);
    for dtype in DTYPES {
        let x = random(&cpu, [TOKENS, model.hidden_size], dtype, 1)?;
        let head = cpu.prepare_weight(random(&cpu, [model.vocab_size, model.hidden_size], dtype, 2)?)?;
        let product = 2 * (TOKENS * model.hidden_size * model.vocab_size) as u64;
        for (name, needs_dx, products) in [("loss", false, 1), ("loss_and_dx", true, 2)] {
            group.throughput(Throughput::Elements(products * product));
            group.bench_function(format!("{name}/{dtype}"), |b| {
                let spec = LossSpec::mean(TOKENS);
                b.iter(|| timed(linear_cross_entropy::forward(&x, &head, &targets, spec, needs_dx, None)));
            });
        }
    }
    group.finish();
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let mut criterion = criterion();
    bench(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}
