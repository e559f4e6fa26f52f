//! Causal attention of one sequence at the heads of a model. Throughput is FLOP/s over the visible half of the scores.

use criterion::{Criterion, Throughput};
use unsloth_benches::{DTYPES, LLAMA_3_2_1B, ModelShape, QWEN2_5_0_5B, criterion, random, timed, verified};
use unsloth_rs::{
    DType, Device,
    core::{
        Sequences,
        ops::attention::{self, Backward, Inputs, Options},
    },
    device,
};
use unsloth_testkit::suite;

fn bench_one(
    criterion: &mut Criterion,
    cpu: &Device,
    (model, seq_len): (&ModelShape, usize),
    dtype: DType,
) -> anyhow::Result<()> {
    let ModelShape { num_heads, num_kv_heads, head_dim, .. } = *model;
    let q = random(cpu, [seq_len, num_heads, head_dim], dtype, 1)?;
    let k = random(cpu, [seq_len, num_kv_heads, head_dim], dtype, 2)?;
    let v = random(cpu, [seq_len, num_kv_heads, head_dim], dtype, 3)?;
    let dout = random(cpu, [seq_len, num_heads, head_dim], dtype, 4)?;
    let seqs = Sequences::from_lengths(cpu, &[seq_len])?;
    let inputs = Inputs { q: &q, k: &k, v: &v, seq_q: &seqs, seq_k: &seqs };
    let options = Options::causal(head_dim);
    let visible = (num_heads * seq_len * (seq_len + 1) / 2 * head_dim) as u64;

    let mut group = criterion.benchmark_group(format!("attention/{}/{seq_len}", model.name));
    group.throughput(Throughput::Elements(4 * visible));
    group.bench_function(format!("forward/{dtype}"), |b| b.iter(|| timed(attention::forward(inputs, options))));
    let forward = attention::forward(inputs, options)?;
    let backward = Backward { dout: &dout, out: &forward.out, lse: &forward.lse };
    group.throughput(Throughput::Elements(10 * visible));
    group.bench_function(format!("backward/{dtype}"), |b| {
        b.iter(|| timed(attention::backward(inputs, backward, options)));
    });
    group.finish();
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let mut criterion = criterion();
    let cpu = device("cpu")?;
    verified(suite::attention::check, &cpu)?;
    for model in [LLAMA_3_2_1B, QWEN2_5_0_5B] {
        for seq_len in [512, 1024, 2048] {
            for dtype in DTYPES {
                bench_one(&mut criterion, &cpu, (&model, seq_len), dtype)?;
            }
        }
    }
    criterion.final_summary();
    Ok(())
}
