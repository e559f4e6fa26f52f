//! `cross_entropy`: see `cases::cross_entropy`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("cross_entropy")
}
