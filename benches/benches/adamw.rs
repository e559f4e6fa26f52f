//! `adamw`: see `cases::adamw`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("adamw")
}
