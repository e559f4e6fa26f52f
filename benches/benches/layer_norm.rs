//! `layer_norm`: see `cases::layer_norm`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("layer_norm")
}
