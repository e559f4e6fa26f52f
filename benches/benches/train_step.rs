//! One LoRA step of two layers of a model with its whole vocabulary. Throughput is tokens per second.

use criterion::Throughput;
use unsloth_benches::{
    DTYPES, QWEN2_5_0_5B, criterion,
    training::{Options, random_batch, trainer, write_checkpoint},
};
use unsloth_rs::{device, train::Checkpointing};

const NUM_LAYERS: usize = 2;
const SEQ_LEN: usize = 512;
const RANK: usize = 16;

fn main() -> anyhow::Result<()> {
    let mut criterion = criterion();
    let cpu = device("cpu")?;
    let folder = tempfile::tempdir()?;
    write_checkpoint(folder.path(), &QWEN2_5_0_5B, NUM_LAYERS)?;
    let batch = [random_batch(&cpu, QWEN2_5_0_5B.vocab_size, (1, SEQ_LEN))?];
    let mut group = criterion.benchmark_group(format!("train_step/{}, {NUM_LAYERS} layers", QWEN2_5_0_5B.name));
    group.sample_size(10).throughput(Throughput::Elements(SEQ_LEN as u64));
    for dtype in DTYPES {
        let mut trainer =
            trainer(folder.path(), &cpu, Options { dtype, rank: RANK, checkpointing: Checkpointing::None })?;
        group.bench_function(format!("lora/{dtype}"), |b| {
            b.iter(|| trainer.step(&batch).unwrap_or_else(|error| panic!("a timed step failed: {error}")));
        });
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}
