//! `train_step`: see `cases::train_step`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("train_step")
}
