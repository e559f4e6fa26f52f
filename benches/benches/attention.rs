//! `attention`: see `cases::attention`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("attention")
}
