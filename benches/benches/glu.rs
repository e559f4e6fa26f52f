//! `glu`: see `cases::glu`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("glu")
}
