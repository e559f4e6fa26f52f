//! `embedding`: see `cases::embedding`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("embedding")
}
