//! `linear`: see `cases::linear`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("linear")
}
