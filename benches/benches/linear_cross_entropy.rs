//! `linear_cross_entropy`: see `cases::linear_cross_entropy`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("linear_cross_entropy")
}
